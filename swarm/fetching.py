"""Fetching blobs and files from untrusted peers: every byte is hashed before it is used or written.

``fetch_files`` asks several peers at once, as scheduling.py decides. One that is gone, slow or without the file is left
and tried again later; one that sent bytes which do not match is named and never asked again by this node. A file whose
download is cut, by whatever, goes on where it was: the store keeps each verified chunk. Where streams end before a
chunk has come (relays let 128 KiB through a circuit) it is asked for in parts (parts.py), kept from stream to stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.errors import DigestMismatch, RecordError
from paris_swarm.dht_schemas.manifest import FileEntry
from paris_swarm.swarm import wire
from paris_swarm.swarm.counters import Counters
from paris_swarm.swarm.door import Door, OpenDoor
from paris_swarm.swarm.fetch_session import BadChunk, DamagedCopy, Session
from paris_swarm.swarm.partial_file import PartialFile
from paris_swarm.swarm.parts import IN_FLIGHT, BegunChunks, Part, joined, parts_of
from paris_swarm.swarm.scheduling import Chunk, ChunkScheduler, FetchPolicy
from paris_swarm.swarm.sources import SourceBook
from paris_swarm.swarm.store import ContentStore, RootKind
from paris_swarm.swarm.store_locks import InUse
from paris_swarm.swarm.transport import NoSource, Stalled, Transport, TransportError, TurnedAway

__all__ = ["BadChunk", "Counters", "FetchReport", "fetch_blob", "fetch_files"]

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 10.0
"""How often the caller is asked for further sources while a download lasts."""
_POLL_S = 0.25
_KEPT_AWAY = 4
"""Peers without a stream at the moment whose parts of a chunk are kept: at most a chunk each in memory."""

OnProgress = Callable[[int, int], None]
"""Called with (bytes here, bytes in all) of the wanted files after every chunk."""

OnFault = Callable[[str, Exception], None]
"""Called with (peer id, what it did) whenever a source is left."""

MoreSources = Callable[[], Awaitable[Iterable[str]]]
"""Asked now and then for peer ids that hold the files by now; those already known may be among them."""

_Addresses = Mapping[str, Sequence[str]]


@dataclass
class FetchReport:
    """What a download did. All in bytes.

    Attributes:
        saved: verified and written. refused: did not verify.
        twice: came more than once: chunks asked of two peers near the end, and the pieces of answers that were cut.
        chunks: peer id -> chunks that it delivered.
        resumed: streams that ended early, having brought something, and were followed by another one at once.
        faults: (peer id, what it did), in order; without those.
    """

    saved: int = 0
    twice: int = 0
    refused: int = 0
    chunks: dict[str, int] = field(default_factory=dict)
    resumed: int = 0
    faults: list[tuple[str, Exception]] = field(default_factory=list)


async def fetch_blob(
    transport: Transport,
    peers: Iterable[str],
    digest: str,
    *,
    max_bytes: int,
    addresses: _Addresses | None = None,
    counters: Counters | None = None,
    on_fault: OnFault | None = None,
    stall_s: float = 10.0,
    door: Door | None = None,
    book: SourceBook | None = None,
) -> bytes:
    """Fetch a blob (a plan by plan id, a manifest by root) from the best of ``peers`` that has it.

    Args:
        max_bytes: refused when longer; at most one wire payload.
        addresses: multiaddrs to dial, by peer id, for peers that the network does not know yet.
        door: what this node says of itself, and whom it will not ask.
        book: what this node knows of its sources; a liar is written down in it.

    Raises:
        BadChunk: nobody delivered, and at least one peer sent other bytes than the digest names.
        NoSource: nobody delivered.
        TurnedAway: nobody lets this node in.
    """
    book = book if book is not None else SourceBook()
    sources = _Sources(transport, addresses or {}, on_fault, stall_s, door or OpenDoor(), book)
    what = f"blob {digest}"
    for peer in sorted(dict.fromkeys(peers), key=lambda peer: -book.of(peer).score):
        if book.of(peer).banned is not None:
            continue
        try:
            parts = await _blob_parts(sources, peer, digest, min(max_bytes, wire.MAX_PAYLOAD), counters)
            return await asyncio.to_thread(_opened_blob, peer, what, digest, parts)
        except (TransportError, RecordError) as error:
            sources.note(peer, error)
    raise sources.error(what)


async def _blob_parts(
    sources: _Sources, peer: str, digest: str, most: int, counters: Counters | None
) -> list[wire.Response]:
    """All of a blob from one peer, over as many streams as it takes while each brings something. Raises as ``Session``
    and ``open_stream``.
    """
    parts: list[wire.Response] = []
    offset = 0
    while True:
        session: Session | None = None
        kept = len(parts)
        try:
            async with sources.session(peer, f"blob {digest}") as session:
                while True:
                    # One byte more than it may have: a longer one is refused by what its answer states.
                    asked = min(max(wire.PART, min(sources.book.of(peer).part, most + 1 - offset)), wire.MAX_PAYLOAD)
                    request = wire.Request(wire.RequestKind.BLOB, digest, offset=offset, length=asked)
                    await session.ask(request, 0, min(asked, most - offset))
                    response = await session.answer()
                    if response.status == wire.Status.NOT_HELD:
                        raise session.not_held()
                    if counters is not None:
                        counters.add("received", peer, "blob", wire=len(response.payload), logical=response.length)
                    parts.append(response)
                    offset += response.length
                    if response.length < asked or offset == most:
                        return parts
        except TransportError as error:
            shrunk = session is not None and sources.book.cut_short(peer, session.came)
            if not shrunk and len(parts) == kept:
                raise
            sources.resume(peer, error)


async def fetch_files(
    transport: Transport,
    store: ContentStore,
    peers: Iterable[str],
    root: str,
    entries: Sequence[FileEntry],
    names: Iterable[str] | None = None,
    *,
    kind: RootKind = "checkpoint",
    addresses: _Addresses | None = None,
    on_progress: OnProgress | None = None,
    on_fault: OnFault | None = None,
    stall_s: float = 10.0,
    counters: Counters | None = None,
    door: Door | None = None,
    book: SourceBook | None = None,
    policy: FetchPolicy | None = None,
    patience_s: float = 0.0,
    more_sources: MoreSources | None = None,
    report: FetchReport | None = None,
) -> dict[str, Path]:
    """Fetch files of a root into the store from several peers at once, going on where an earlier fetch ended.

    Files already whole are hashed again and fetched anew when they were changed on disk. A file that another task or
    process is fetching into this store is waited for, not fetched twice.

    Args:
        entries: all files of the root, in the order of its manifest or plan, verified by the caller.
        names: the files wanted; all when None.
        stall_s: as in FetchPolicy; used when there is no ``policy``.
        patience_s: how long to go on trying when nobody delivers anything any more; 0: until everybody was tried.
        report: filled in as the download goes.

    Returns:
        Where each wanted file lies, by name.

    Raises:
        BadChunk: somebody sent bytes that do not match, and nobody else has them.
        NoSource: nobody could deliver all of it. What came stays; another call goes on.
        TurnedAway: nobody lets this node in.
        InUse: the root is being deleted.
        OSError: no space, quota or permission; what came stays.
        ValueError: a name that is not among the entries.
    """
    wanted = {entry.name for entry in entries} if names is None else set(names)
    if unknown := wanted - {entry.name for entry in entries}:
        raise ValueError(f"{root} has no file named {', '.join(sorted(unknown))}")
    book = book if book is not None else SourceBook()
    policy = policy or FetchPolicy(stall_s=stall_s)
    sources = _Sources(transport, addresses or {}, on_fault, policy.stall_s, door or OpenDoor(), book)
    use = await asyncio.to_thread(store.use, root)
    try:
        await asyncio.to_thread(store.begin, root, entries, kind=kind)
        download = _Download(
            store,
            root,
            kind,
            {index: entry for index, entry in enumerate(entries) if entry.name in wanted},
            sources,
            ChunkScheduler({}, policy=policy, book=book),
            counters or Counters(),
            on_progress,
            report if report is not None else FetchReport(),
        )
        for peer in peers:
            download.scheduler.add_source(peer)
        try:
            await download.run(patience_s, more_sources)
        finally:
            await asyncio.to_thread(download.close)
        return {name: store.path(root, name) for name in sorted(wanted)}
    finally:
        use.release()


@dataclass
class _Sources:
    """How to reach peers, and what each did last."""

    transport: Transport
    addresses: _Addresses
    on_fault: OnFault | None
    stall_s: float
    door: Door
    book: SourceBook
    failures: dict[str, Exception] = field(default_factory=dict)

    @asynccontextmanager
    async def session(
        self, peer: str, what: str, *, arriving: Callable[[int], None] | None = None
    ) -> AsyncIterator[Session]:
        stream = await self.transport.open_stream(peer, addresses=self.addresses.get(peer, ()))
        try:
            session = Session(peer, what, stream, self.stall_s, arriving=arriving)
            await session.greet(self.door)
            yield session
        finally:
            await stream.close()

    def resume(self, peer: str, error: Exception) -> None:
        """Keep what ended a stream that was of use: another one is opened at once."""
        log.debug("another stream to %s: %s", peer, error)
        self.failures[peer] = error

    def note(self, peer: str, error: Exception) -> None:
        """Keep what a peer did; whoever sent wrong bytes is banned."""
        log.warning("left %s: %s", peer, error)
        self.failures[peer] = error
        if isinstance(error, BadChunk) and not isinstance(error, DamagedCopy):
            self.book.ban(peer, error.detail)
        if self.on_fault is not None:
            self.on_fault(peer, error)

    def error(self, what: str) -> Exception:
        """The error to end with: wrong bytes outrank absence, since only they need somebody's attention."""
        for error in self.failures.values():
            if isinstance(error, RecordError):
                return error
        if self.failures and all(isinstance(error, TurnedAway) for error in self.failures.values()):
            return next(iter(self.failures.values()))
        tried = "; ".join(f"{peer}: {error}" for peer, error in self.failures.items())
        banned = "; ".join(f"{peer} was banned: {why}" for peer, why in self.book.banned().items())
        why = "; ".join(part for part in (tried, banned) if part) or "no peer is known to hold it"
        return NoSource(f"{what}: nobody could deliver ({why}); try again when a holder is online", self.failures)


class _Download:
    """One download: a task for each source, the files they fill, and the scheduler that decides between them."""

    def __init__(
        self,
        store: ContentStore,
        root: str,
        kind: RootKind,
        wanted: dict[int, FileEntry],
        sources: _Sources,
        scheduler: ChunkScheduler,
        counters: Counters,
        on_progress: OnProgress | None,
        report: FetchReport,
    ) -> None:
        self.scheduler = scheduler
        self._store, self._root, self._kind, self._sources = store, root, kind, sources
        self._counters, self._on_progress, self._report = counters, on_progress, report
        self._unopened = dict(wanted)
        self._files: dict[int, PartialFile] = {}
        self._begun = BegunChunks(_KEPT_AWAY)
        self._workers: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._clock = asyncio.get_running_loop().time
        self._total = sum(entry.length for entry in wanted.values())
        self._here = 0

    async def run(self, patience_s: float, more_sources: MoreSources | None) -> None:
        """Until every file is whole. Raises as fetch_files."""
        await self._open_files()
        self._tell()
        hopeful_until = self._clock() + patience_s
        looked_at, saved = self._clock(), self._report.saved
        try:
            while self._unopened or not self.scheduler.done:
                now = self._clock()
                if self._report.saved != saved:
                    saved, hopeful_until = self._report.saved, now + patience_s
                idle = self.scheduler.exhausted and not self._workers and not self._unopened
                if more_sources is not None and now - looked_at >= (LOOK_AGAIN_S if patience_s or not idle else 0):
                    new = [peer for peer in await more_sources() if self.scheduler.add_source(peer)]
                    looked_at = now
                    idle = idle and not new
                if idle and now >= hopeful_until:
                    raise self._sources.error(f"{self.scheduler.missing} chunks of {self._root}")
                self._start_workers()
                await self._wait()
                if self._unopened:
                    await self._open_files()
        finally:
            for task in self._workers.values():
                task.cancel()
            await asyncio.gather(*self._workers.values(), return_exceptions=True)
            self._report.twice += self.scheduler.duplicate_bytes + self._begun.dropped

    def _start_workers(self) -> None:
        now = self._clock()
        for peer in self.scheduler.ready(now):
            self.scheduler.engage(peer, now)
            self._workers[peer] = asyncio.create_task(self._ask(peer))

    async def _wait(self) -> None:
        """Until something happens: a source was left, all is done, or it is time to try one again."""
        pauses = [LOOK_AGAIN_S, self.scheduler.next_retry(self._clock()), _POLL_S if self._unopened else None]
        change = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait(
                {change, *self._workers.values()},
                timeout=min(pause for pause in pauses if pause is not None),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            change.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await change
        self._changed.clear()
        for peer, task in list(self._workers.items()):
            if task.done():
                del self._workers[peer]
                task.result()

    # ---- files

    async def _open_files(self) -> None:
        """Take in the wanted files that nobody else is fetching into this store."""
        for index, entry in list(self._unopened.items()):
            try:
                partial = await asyncio.to_thread(_open_wanted, self._store, self._root, entry)
            except InUse as error:
                log.debug("%s", error)
                continue
            del self._unopened[index]
            self._here += entry.length
            if partial is not None:
                self._files[index] = partial
                sizes = {(index, chunk): partial.size(chunk) for chunk in partial.missing}
                self.scheduler.add_chunks(sizes)
                self._here -= sum(sizes.values())
            self._wake()

    def _tell(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._here, self._total)

    def _wake(self) -> None:
        self._changed.set()

    def close(self) -> None:
        """Let go of the files; blocks."""
        for partial in self._files.values():
            partial.close()

    # ---- one source

    async def _ask(self, peer: str) -> None:
        """One stream to one source, from its opening to its end."""
        scheduler, slow = self.scheduler, False
        session: Session | None = None

        def arriving(size: int) -> None:
            scheduler.arriving(peer, size, self._clock())

        try:
            async with self._sources.session(peer, f"files of {self._root}", arriving=arriving) as session:
                try:
                    slow = await self._drain(peer, session)
                finally:
                    self._report.twice += session.cut
                    self._begun.ended(peer, self._workers.keys() - {peer})
            if slow:
                rate = scheduler.policy.min_rate
                raise Stalled(f"{peer} sent less than {rate:g} bytes/s while others could do better")
            scheduler.leave(peer)
        except (TransportError, RecordError) as error:
            if isinstance(error, RecordError):
                scheduler.drop(peer)
            elif slow:
                scheduler.slow(peer, self._clock())
            elif scheduler.failed(peer, self._clock(), session.came if session is not None else 0):
                self._report.resumed += 1
                self._sources.resume(peer, error)
                return
            self._report.faults.append((peer, error))
            self._sources.note(peer, error)
        except BaseException:
            scheduler.leave(peer)
            raise

    async def _drain(self, peer: str, session: Session) -> bool:
        """Ask one source for whatever the scheduler gives it. True: it is too slow; False: all is done."""
        scheduler, asked, upcoming = self.scheduler, deque[Part](), deque[Part]()
        answering: asyncio.Task[wire.Response] | None = None
        saving: asyncio.Task[None] | None = None
        try:
            while True:
                while len(asked) < IN_FLIGHT and (part := self._next_part(peer, upcoming)) is not None:
                    await session.ask(part.request(self._root), part.length, part.length)
                    asked.append(part)
                if not asked:
                    if saving is not None:
                        await saving
                        saving = None
                    elif not self._unopened and (scheduler.done or scheduler.useless(peer)):
                        if scheduler.done:
                            return False
                        raise session.not_held()
                    else:
                        await asyncio.sleep(_POLL_S)
                    continue
                answering = answering or asyncio.create_task(session.answer())
                # A liar must not hide behind silence: what came before is judged while the next answer is awaited.
                waiting = {answering} if saving is None else {answering, saving}
                await asyncio.wait(waiting, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                if saving is not None and saving.done():
                    await saving
                    saving = None
                if not answering.done():
                    if scheduler.too_slow(peer, self._clock()):
                        return True
                    continue
                if saving is not None:  # a bad chunk outranks whatever the next answer is
                    await saving
                    saving = None
                response, answering = answering.result(), None
                saving = self._take_answer(peer, asked.popleft(), response, upcoming)
        finally:
            if answering is not None:
                answering.cancel()
            left = [task for task in (answering, saving) if task is not None]
            await asyncio.gather(*left, return_exceptions=True)  # what is being written is written to its end

    def _next_part(self, peer: str, upcoming: deque[Part]) -> Part | None:
        """What to ask of this peer next: the rest of a chunk it is asked for, else another chunk."""
        while upcoming:
            part = upcoming.popleft()
            if self.scheduler.owes(peer, part.chunk) and not self.scheduler.here(part.chunk):
                return part
            self.scheduler.give_up(peer, part.chunk)  # another copy came; what is left of this one is not asked for
        chunk = self.scheduler.take(peer, self._clock())
        if chunk is None:
            return None
        size = self._files[chunk[0]].size(chunk[1])
        upcoming.extend(parts_of(chunk, size, self._begun.length(peer, chunk), self._sources.book.of(peer).part))
        return upcoming.popleft()

    def _take_answer(
        self, peer: str, part: Part, response: wire.Response, upcoming: deque[Part]
    ) -> asyncio.Task[None] | None:
        """Keep a part; begin to check and write a chunk with its last one; None when there is nothing to write."""
        chunk = part.chunk
        if response.status == wire.Status.NOT_HELD:
            if self.scheduler.owes(peer, chunk):
                self.scheduler.not_held(peer, chunk)
            while upcoming and upcoming[0].chunk == chunk:
                upcoming.popleft()
            return None
        self._counters.add("received", peer, self._kind, wire=len(response.payload), logical=response.length)
        whole = part.first and part.last
        if not self.scheduler.owes(peer, chunk) or (self.scheduler.here(chunk) and not whole):
            self.scheduler.give_up(peer, chunk)
            self._report.twice += response.length
            return None
        # One that does not follow on was asked for before the chunk was given up, and taken again because the copy that
        # had come was a liar's: it is dropped. Joined to what is here it would look like this peer's lie.
        if not part.last or part.offset != self._begun.length(peer, chunk):
            if self._begun.keep(peer, part, response):
                self.scheduler.part(peer, chunk)
            return None
        parts, in_one_go = self._begun.complete(peer, part, response)
        self._report.chunks[peer] = self._report.chunks.get(peer, 0) + 1
        if in_one_go:
            self._sources.book.came_whole(peer)
        if not self.scheduler.delivered(peer, chunk, self._clock()):
            return None
        return asyncio.create_task(self._save(peer, chunk, parts))

    async def _save(self, peer: str, chunk: Chunk, parts: list[wire.Response]) -> None:
        try:
            await asyncio.to_thread(_save_chunk, peer, self._files[chunk[0]], chunk[1], parts)
        except BadChunk as error:
            self._report.refused += sum(len(part.payload) for part in parts)
            self.scheduler.refused(peer, chunk, error.detail)
            raise
        except BaseException:
            self.scheduler.unsaved(chunk)
            raise
        self.scheduler.saved(peer, chunk)
        self._begun.forget(chunk)
        size = sum(part.length for part in parts)
        self._report.saved += size
        self._here += size
        self._tell()
        if self.scheduler.done:
            self._wake()


def _open_wanted(store: ContentStore, root: str, entry: FileEntry) -> PartialFile | None:
    """None when the file is whole and right; a file with no chunks becomes whole here. Raises InUse."""
    store.verify_file(root, entry)
    if store.holds_file(root, entry):
        return None
    partial = store.open_partial(root, entry)
    if store.holds_file(root, entry):  # whoever fetched it finished between the two looks
        partial.discard()
        return None
    if partial.complete:
        partial.finish()
        return None
    return partial


def _save_chunk(peer: str, partial: PartialFile, chunk: int, parts: list[wire.Response]) -> None:
    """Decode, hash, write; move the file into place after its last chunk. Runs in a thread."""
    what = f"chunk {chunk} of {partial.entry.name}"
    try:
        partial.write(chunk, joined(parts))
    except (wire.BadFrame, DigestMismatch) as error:
        raise BadChunk(f"{what} from {peer}: {error.detail}", peer=peer) from error
    if partial.complete:
        partial.finish()


def _opened_blob(peer: str, what: str, digest: str, parts: list[wire.Response]) -> bytes:
    try:
        data = joined(parts)
    except wire.BadFrame as error:
        raise BadChunk(f"{what} from {peer}: {error.detail}", peer=peer) from error
    if blake3_hex(data) != digest:
        raise BadChunk(f"{what} from {peer}: the bytes have digest {blake3_hex(data)}", peer=peer)
    return data
