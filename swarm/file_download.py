"""One download of files: a task for each source, the files they fill, and the scheduler that decides between them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.manifest import FileEntry
from paris_swarm.swarm import wire
from paris_swarm.swarm.counters import Counters
from paris_swarm.swarm.fetch_session import BadChunk, Session
from paris_swarm.swarm.fetch_sources import FetchSources
from paris_swarm.swarm.incoming_files import OtherRoots, open_wanted, save_chunk
from paris_swarm.swarm.partial_file import PartialFile
from paris_swarm.swarm.parts import IN_FLIGHT, BegunChunks, Part, parts_of
from paris_swarm.swarm.scheduling import Chunk, ChunkScheduler
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.store_index import RootKind
from paris_swarm.swarm.store_locks import InUse
from paris_swarm.swarm.transport import Stalled, TransportError

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 10.0
"""How often the caller is asked for further sources while a download lasts."""
_POLL_S = 0.25
_KEPT_AWAY = 4
"""Peers without a stream at the moment whose parts of a chunk are kept: at most a chunk each in memory."""

_FRUITLESS = 2
"""Times a policy's ``chunk_s`` without any chunk after which sources that were all left before, and are being asked
again, hold a download no longer: those that take turns could do so for ever.
"""

OnProgress = Callable[[int, int], None]
"""Called with (bytes here, bytes in all) of the wanted files after every chunk."""

MoreSources = Callable[[], Awaitable[Iterable[str]]]
"""Asked now and then for peer ids that hold the files by now; those already known may be among them."""


@dataclass
class FetchReport:
    """What a download did. All in bytes.

    Attributes:
        saved: verified and written. refused: did not verify. reused: lay in the store under other roots already.
        twice: came more than once: chunks asked of two peers near the end, and the pieces of answers that were cut.
        chunks: peer id -> chunks that it delivered.
        resumed: streams that ended early, having brought something, and were followed by another one at once.
        faults: (peer id, what it did), in order; without those.
    """

    saved: int = 0
    reused: int = 0
    twice: int = 0
    refused: int = 0
    chunks: dict[str, int] = field(default_factory=dict)
    resumed: int = 0
    faults: list[tuple[str, Exception]] = field(default_factory=list)


class FileDownload:
    """One download: a task for each source, the files they fill, and the scheduler that decides between them."""

    def __init__(
        self,
        store: ContentStore,
        root: str,
        kind: RootKind,
        wanted: dict[int, FileEntry],
        sources: FetchSources,
        scheduler: ChunkScheduler,
        counters: Counters,
        on_progress: OnProgress | None,
        report: FetchReport,
        foreign: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self.scheduler = scheduler
        self._store, self._root, self._kind, self._sources = store, root, kind, sources
        self._counters, self._on_progress, self._report = counters, on_progress, report
        self._elsewhere = OtherRoots(store, root, wanted.values(), foreign)
        self._unopened = dict(wanted)
        self._files: dict[int, PartialFile] = {}
        self._closing, self._closed = threading.Lock(), False
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
        looked_at = saved_at = self._clock()
        saved = self._report.saved
        try:
            while self._unopened or not self.scheduler.done:
                now = self._clock()
                if self._report.saved != saved:
                    saved, saved_at = self._report.saved, now
                idle = self.scheduler.exhausted and not self._workers and not self._unopened
                if more_sources is not None and now - looked_at >= (LOOK_AGAIN_S if patience_s or not idle else 0):
                    new = [peer for peer in await more_sources() if self.scheduler.add_source(peer)]
                    looked_at = now
                    idle = idle and not new
                waited = now - saved_at
                held = self.scheduler.fruitless and waited >= _FRUITLESS * self.scheduler.policy.chunk_s
                if (idle or (held and not self._unopened)) and waited >= patience_s:
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
                partial, reused = await asyncio.to_thread(self._open, index, entry)
            except InUse as error:
                log.debug("%s", error)
                continue
            del self._unopened[index]
            self._here += entry.length
            self._report.reused += reused
            if partial is not None:
                sizes = {(index, chunk): partial.size(chunk) for chunk in partial.missing}
                self.scheduler.add_chunks(sizes)
                self._here -= sum(sizes.values())
            self._wake()

    def _open(self, index: int, entry: FileEntry) -> tuple[PartialFile | None, int]:
        """As open_wanted. The thread outlives a download that is given up: what it opens then is let go of at once."""
        partial, reused = open_wanted(self._store, self._root, entry, self._elsewhere)
        if partial is not None:
            with self._closing:
                self._files[index] = partial
                if self._closed:
                    partial.close()
        return partial, reused

    def _tell(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._here, self._total)

    def _wake(self) -> None:
        self._changed.set()

    def close(self) -> None:
        """Let go of the files; blocks."""
        with self._closing:
            self._closed = True
            for partial in self._files.values():
                partial.close()

    # ---- one source

    async def _ask(self, peer: str) -> None:
        """One stream to one source, from its opening to its end."""
        scheduler, slow = self.scheduler, ""
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
                raise Stalled(f"{peer} {slow}")
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

    async def _drain(self, peer: str, session: Session) -> str:
        """Ask one source for whatever the scheduler gives it, until all is done or it is too slow: why, then."""
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
                            return ""
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
                    if slow := scheduler.too_slow(peer, self._clock()):
                        return slow
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
            await asyncio.to_thread(save_chunk, peer, self._files[chunk[0]], chunk[1], parts)
        except BadChunk as error:
            self._report.refused += sum(len(part.payload) for part in parts)
            self.scheduler.refused(peer, chunk, error.detail)
            raise
        except BaseException:
            self.scheduler.unsaved(chunk)
            raise
        self.scheduler.saved(peer, chunk)
        self._begun.forget(chunk)
        for part in parts:
            self._sources.memory.give_back(part.payload)
        size = sum(part.length for part in parts)
        self._report.saved += size
        self._here += size
        self._tell()
        if self.scheduler.done:
            self._wake()
