"""Fetching blobs and files from untrusted peers: every byte is hashed before it is used or written.

Sources are tried in order. One that is gone, slow or without the file is left for the next and may be asked again
when another round makes progress; one that sent bytes which do not match is named and never asked again. A file whose
download is cut, by whatever, goes on where it was: the store keeps each verified chunk.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.errors import DigestMismatch, RecordError
from paris_swarm.dht_schemas.manifest import FileEntry
from paris_swarm.swarm import wire
from paris_swarm.swarm.counters import Counters
from paris_swarm.swarm.serving import PIECE
from paris_swarm.swarm.store import ContentStore, PartialFile, RootKind
from paris_swarm.swarm.transport import Busy, NoSource, NotHeld, Stalled, Stream, Transport, TransportError

__all__ = ["BadChunk", "Counters", "fetch_blob", "fetch_files"]

log = logging.getLogger(__name__)

PIPELINE = 3
"""Chunk requests in flight on a stream: keeps it busy while a chunk is hashed and written."""

OnProgress = Callable[[int, int], None]
"""Called with (bytes here, bytes in all) of the wanted files after every chunk."""

OnFault = Callable[[str, Exception], None]
"""Called with (peer id, what it did) whenever a source is left."""

_Addresses = Mapping[str, Sequence[str]]


class BadChunk(RecordError):
    """A peer sent bytes that do not match their digest: they were dropped and the peer is not asked again.

    peer: who sent them.
    """

    rule = "R-WIRE-2"

    def __init__(self, detail: str, *, rule: str | None = None, peer: str = "") -> None:
        super().__init__(detail, rule=rule)
        self.peer = peer


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
) -> bytes:
    """Fetch a blob (a plan by plan id, a manifest by root) from the first of ``peers`` that has it.

    Args:
        max_bytes: refused when longer; at most one wire payload.
        addresses: multiaddrs to dial, by peer id, for peers that the network does not know yet.

    Raises:
        BadChunk: nobody delivered, and at least one peer sent other bytes than the digest names.
        NoSource: nobody delivered.
    """
    sources = _Sources(transport, peers, addresses or {}, on_fault, stall_s)
    what = f"blob {digest}"
    for peer in list(sources.usable):
        async with sources.attempt(peer):
            async with sources.session(peer, what) as session:
                await session.ask(wire.Request(wire.RequestKind.BLOB, digest), 0, min(max_bytes, wire.MAX_PAYLOAD))
                response = await session.answer()
            if counters is not None:
                counters.add("received", peer, "blob", wire=len(response.payload), logical=response.length)
            return await asyncio.to_thread(_opened_blob, peer, what, digest, response)
    raise sources.exhausted(what)


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
) -> dict[str, Path]:
    """Fetch files of a root into the store, going on where an earlier fetch ended.

    Files already whole are hashed again and fetched anew when they were changed on disk.

    Args:
        entries: all files of the root, in the order of its manifest or plan, verified by the caller.
        names: the files wanted; all when None.

    Returns:
        Where each wanted file lies, by name.

    Raises:
        BadChunk: somebody sent bytes that do not match, and nobody else has them.
        NoSource: nobody could deliver all of it. What came stays; another call goes on.
        OSError: no space or no permission; what came stays.
        ValueError: a name that is not among the entries.
    """
    wanted = {entry.name for entry in entries} if names is None else set(names)
    if unknown := wanted - {entry.name for entry in entries}:
        raise ValueError(f"{root} has no file named {', '.join(sorted(unknown))}")
    await asyncio.to_thread(store.begin, root, entries, kind=kind)
    fetch = _Fetch(root, kind, counters or Counters(), on_progress)
    try:
        for index, entry in enumerate(entries):
            if entry.name in wanted:
                fetch.add(index, entry, await asyncio.to_thread(_open_wanted, store, root, entry))
        fetch.report()
        sources = _Sources(transport, peers, addresses or {}, on_fault, stall_s)
        while fetch.todo:
            before = len(fetch.todo)
            for peer in list(sources.usable):
                async with sources.attempt(peer), sources.session(peer, f"files of {root}") as session:
                    await fetch.drain(peer, session)
                if not fetch.todo:
                    break
            if len(fetch.todo) == before:
                raise sources.exhausted(f"{before} chunks of {root}")
    finally:
        await asyncio.to_thread(fetch.close)
    return {name: store.path(root, name) for name in sorted(wanted)}


@dataclass
class _Sources:
    """Whom to ask, and what each did."""

    transport: Transport
    peers: Iterable[str]
    addresses: _Addresses
    on_fault: OnFault | None
    stall_s: float
    failures: dict[str, Exception] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.usable = list(dict.fromkeys(self.peers))

    @asynccontextmanager
    async def attempt(self, peer: str) -> AsyncIterator[None]:
        """Note what goes wrong inside and go on; whoever sent wrong bytes is not asked again."""
        try:
            yield
        except (TransportError, RecordError) as error:
            log.warning("left %s: %s", peer, error)
            self.failures[peer] = error
            if isinstance(error, RecordError):
                self.usable.remove(peer)
            if self.on_fault is not None:
                self.on_fault(peer, error)

    @asynccontextmanager
    async def session(self, peer: str, what: str) -> AsyncIterator[_Session]:
        stream = await self.transport.open_stream(peer, addresses=self.addresses.get(peer, ()))
        try:
            session = _Session(peer, what, stream, self.stall_s)
            await session.write(wire.HELLO)
            yield session
        finally:
            await stream.close()

    def exhausted(self, what: str) -> Exception:
        """The error to end with: wrong bytes outrank absence, since only they need somebody's attention."""
        for error in self.failures.values():
            if isinstance(error, RecordError):
                return error
        tried = "; ".join(f"{peer}: {error}" for peer, error in self.failures.items()) or "no peer is known to hold it"
        return NoSource(f"{what}: nobody could deliver ({tried}); try again when a holder is online", self.failures)


class _Session:
    """One stream to one source, speaking the file protocol."""

    def __init__(self, peer: str, what: str, stream: Stream, stall_s: float) -> None:
        self._peer, self._what, self._stream, self._stall_s = peer, what, stream, stall_s
        self._reader = wire.ResponseReader()

    async def write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await self._stream.write(data)
        except TimeoutError as error:
            raise Stalled(f"{self._peer} took nothing for {self._stall_s:g} s") from error

    async def ask(self, request: wire.Request, least: int, most: int) -> None:
        self._reader.expect(least, most)
        await self.write(request.to_bytes())

    async def answer(self) -> wire.Response:
        """The next response in order, status OK.

        Raises:
            BadChunk: the peer breaks the protocol, or says that its copy is damaged.
            NotHeld, Busy, Stalled, StreamClosed: no bytes from this one.
        """
        responses: list[wire.Response] = []
        try:
            while not responses:
                async with asyncio.timeout(self._stall_s):
                    data = await self._stream.read_exactly(min(self._reader.wants, PIECE))
                responses = self._reader.receive(data)
        except TimeoutError as error:
            raise Stalled(f"{self._peer} sent nothing for {self._stall_s:g} s") from error
        except wire.BadFrame as error:
            raise BadChunk(f"{self._what} from {self._peer}: {error.detail}", peer=self._peer) from error
        status = responses[0].status
        if status == wire.Status.NOT_HELD:
            raise NotHeld(f"{self._peer} does not hold {self._what}")
        if status == wire.Status.BUSY:
            raise Busy(f"{self._peer} serves as many streams as it can")
        if status == wire.Status.DAMAGED:
            raise BadChunk(f"{self._what} from {self._peer}: its own copy was changed on disk", peer=self._peer)
        return responses[0]


class _Fetch:
    """The chunks still to come of one root, and the files they go into."""

    def __init__(self, root: str, kind: RootKind, counters: Counters, on_progress: OnProgress | None) -> None:
        self.todo: deque[tuple[int, int]] = deque()
        self._root, self._kind, self._counters, self._on_progress = root, kind, counters, on_progress
        self._files: dict[int, PartialFile] = {}
        self._here = 0
        self._total = 0

    def add(self, index: int, entry: FileEntry, partial: PartialFile | None) -> None:
        """Take in one wanted file; ``partial`` is None when it is whole."""
        self._total += entry.length
        self._here += entry.length
        if partial is not None:
            self._files[index] = partial
            self.todo.extend((index, chunk) for chunk in partial.missing)
            self._here -= sum(partial.size(chunk) for chunk in partial.missing)

    def report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._here, self._total)

    async def drain(self, peer: str, session: _Session) -> None:
        """Ask one source for everything still to come; what it does not deliver goes back to the front."""
        asked: deque[tuple[int, int]] = deque()
        taken: deque[tuple[int, int]] = deque()
        saving: asyncio.Task[None] | None = None
        try:
            while asked or self.todo:
                while self.todo and len(asked) < PIPELINE:
                    file, chunk = self.todo[0]
                    size = self._files[file].size(chunk)
                    asked.append(self.todo.popleft())
                    await session.ask(wire.Request(wire.RequestKind.CHUNK, self._root, file, chunk), size, size)
                response = await _unless_failed(saving, session.answer())
                self._counters.add("received", peer, self._kind, wire=len(response.payload), logical=response.length)
                if saving is not None:
                    await saving
                    taken.popleft()
                taken.append(asked.popleft())
                saving = asyncio.create_task(self._save(peer, taken[-1], response))
            if saving is not None:
                await saving
                taken.popleft()
        finally:
            if saving is not None:
                await asyncio.gather(saving, return_exceptions=True)
                if not saving.cancelled() and saving.exception() is None:
                    taken.clear()
            self.todo.extendleft(reversed([*taken, *asked]))

    async def _save(self, peer: str, item: tuple[int, int], response: wire.Response) -> None:
        file, chunk = item
        partial = self._files[file]
        await asyncio.to_thread(_save_chunk, peer, partial, chunk, response)
        self._here += response.length
        self.report()

    def close(self) -> None:
        for partial in self._files.values():
            partial.close()


async def _unless_failed(
    saving: asyncio.Task[None] | None, answer: Coroutine[None, None, wire.Response]
) -> wire.Response:
    """The next answer, unless the chunk before it turns out wrong first: a liar must not hide behind silence."""
    answering = asyncio.create_task(answer)
    try:
        if saving is not None:
            await asyncio.wait({answering, saving}, return_when=asyncio.FIRST_COMPLETED)
            if saving.done():
                await saving
        return await answering
    except TransportError:
        if saving is not None:
            await saving
        raise
    finally:
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)


def _open_wanted(store: ContentStore, root: str, entry: FileEntry) -> PartialFile | None:
    """None when the file is whole and right; a file with no chunks becomes whole here."""
    store.verify_file(root, entry)
    try:
        store.path(root, entry.name)
        return None
    except FileNotFoundError:
        partial = store.open_partial(root, entry)
    if partial.complete:
        partial.finish()
        return None
    return partial


def _save_chunk(peer: str, partial: PartialFile, chunk: int, response: wire.Response) -> None:
    """Decode, hash, write; move the file into place after its last chunk. Runs in a thread."""
    what = f"chunk {chunk} of {partial.entry.name}"
    try:
        partial.write(chunk, wire.decode_payload(response))
    except (wire.BadFrame, DigestMismatch) as error:
        raise BadChunk(f"{what} from {peer}: {error.detail}", peer=peer) from error
    if partial.complete:
        partial.finish()


def _opened_blob(peer: str, what: str, digest: str, response: wire.Response) -> bytes:
    try:
        data = wire.decode_payload(response)
    except wire.BadFrame as error:
        raise BadChunk(f"{what} from {peer}: {error.detail}", peer=peer) from error
    if blake3_hex(data) != digest:
        raise BadChunk(f"{what} from {peer}: the bytes have digest {blake3_hex(data)}", peer=peer)
    return data
