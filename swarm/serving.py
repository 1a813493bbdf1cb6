"""Serving blobs and chunks of the content store to whoever asks; see wire.py for the protocol.

Bounded on every side: streams in all and per peer, two prepared responses a stream (one being written, one ready),
a stall time for readers that stop reading, an idle time for streams that stop asking, bytes a second in all and per
peer, chunks kept in memory for peers that ask for parts of them, and one part read at a time. Each peer has one piece
on its way at a time, and the one that got the fewest bytes goes next (limits.py).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

from paris_swarm.dht_schemas.errors import DigestMismatch, RecordError
from paris_swarm.swarm import wire
from paris_swarm.swarm.counters import Counters, Kind
from paris_swarm.swarm.door import GREETING_S, Door, OpenDoor, greet_client
from paris_swarm.swarm.encoding import Compress, Compression
from paris_swarm.swarm.limits import UploadGate
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.transport import Stalled, Stream, StreamClosed, StreamHandler, TransportError

__all__ = ["Counters", "ServingLimits", "serve_files"]

log = logging.getLogger(__name__)

RECENT_CHUNKS = 8
RECENT_PER_PEER = 2
"""Chunks of which parts were asked for that are kept in memory, in all and per peer: who asks for the next part costs
no reading again, and no peer that asks for parts of many puts out those of another.
"""
MAX_REFUSED = 64
MAX_REFUSED_PER_PEER = 4
"""Streams beyond the limits that are answered "busy", in all and per peer; and streams that have not greeted yet."""
GREETING_YIELDS_S = 2.0
"""After which a stream that has not greeted gives its place up, when all such places are taken: a greeting comes with
the opening, and a few keys that never greet must not keep everybody else out.
"""


@dataclass(frozen=True)
class ServingLimits:
    """streams: at once, in all and per peer. idle_s: without a request; yield_s: the same when all places are taken and
    another peer needs one. stall_s: for a reader to take one piece.
    upload, upload_per_peer: bytes/s of payloads; None: no limit. compress: see encoding.Compress.
    """

    streams: int = 32
    streams_per_peer: int = 4
    idle_s: float = 120.0
    yield_s: float = 5.0
    stall_s: float = 30.0
    upload: float | None = None
    upload_per_peer: float | None = None
    compress: Compress = "auto"


def serve_files(
    store: ContentStore, counters: Counters, *, limits: ServingLimits | None = None, door: Door | None = None
) -> StreamHandler:
    """A stream handler that answers the file protocol from ``store`` and counts what it sent in ``counters``.

    ``door`` decides who is let in (everybody, without one); whoever is not learns nothing but that.

    What the store does not hold is answered with a status, never guessed. A peer that breaks the protocol is
    disconnected; nothing a peer sends raises out of the handler.
    """
    bounds = limits or ServingLimits()
    # Streams that are told "busy" have places of their own: otherwise one peer that opens many, each to be refused,
    # would use up the places of all. Beyond those a stream is closed without a word.
    # Those that have not greeted yet have others: strangers to a closed swarm use up none of its members' places.
    greeting: Counter[str] = Counter()
    served: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    arriving: dict[Stream, float] = {}
    # Streams that only wait for a request, and since when, the longest first: where all places are taken that one gives
    # up its own. Otherwise a few keys that ask for something now and then would keep everybody else out.
    resting: dict[Stream, float] = {}
    gate = UploadGate(total=bounds.upload, per_peer=bounds.upload_per_peer)
    compression = Compression(bounds.compress)
    recent = RecentChunks(store)
    # Who asks for a part has a whole chunk read and hashed for the few bytes that limits of upload count: however many
    # streams do, it costs one thread, and those that serve whole chunks and save downloads are left.
    one_part = asyncio.Semaphore(1)

    async def handle(peer_id: str, stream: Stream) -> None:
        admits = door or OpenDoor()
        connection = _Connection(
            peer_id, stream, recent, one_part, counters, bounds, admits, gate, compression, resting
        )
        try:
            # Counted before anything is waited for: streams that come together would all find the same place free.
            with _place(greeting, peer_id):
                if greeting[peer_id] > MAX_REFUSED_PER_PEER or (
                    greeting.total() > MAX_REFUSED and not await _made_room(arriving, GREETING_YIELDS_S)
                ):
                    return
                arriving[stream] = asyncio.get_running_loop().time()
                try:
                    if not await connection.greet():
                        return
                finally:
                    arriving.pop(stream, None)
        except (RecordError, TransportError) as error:
            log.info("stream from %s ended: %s", peer_id, error)
            return
        try:
            full = served.total() >= bounds.streams and served[peer_id] < bounds.streams_per_peer
            made_room = full and await _made_room(resting, bounds.yield_s)
            # Counted behind that wait, in which the peer's other streams may have come in.
            busy = served[peer_id] >= bounds.streams_per_peer or (full and not made_room)
            if busy and (refused.total() >= MAX_REFUSED or refused[peer_id] >= MAX_REFUSED_PER_PEER):
                return
            with _place(refused if busy else served, peer_id):
                await connection.run(busy=busy)
        except (RecordError, TransportError) as error:
            log.info("stream from %s ended: %s", peer_id, error)
        finally:
            admits.leave(peer_id, stream)

    return handle


@contextmanager
def _place(places: Counter[str], peer_id: str) -> Iterator[None]:
    places[peer_id] += 1
    try:
        yield
    finally:
        places[peer_id] -= 1
        if not places[peer_id]:
            del places[peer_id]


async def _made_room(waiting: dict[Stream, float], after_s: float) -> bool:
    """End the stream that we have waited for longest, if it is ``after_s`` already; its place is another's then."""
    longest = next(iter(waiting), None)
    if longest is None or asyncio.get_running_loop().time() - waiting[longest] < after_s:
        return False
    del waiting[longest]
    await longest.close()
    return True


class RecentChunks:
    """Reads the store, and keeps the verified chunks that are read in parts; used from several threads."""

    def __init__(self, store: ContentStore) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, wire.Request], bytes] = {}
        """(peer, request for the whole chunk) -> its bytes; what was asked for last comes last."""

    def part(self, peer: str, request: wire.Request) -> bytes | None:
        """The bytes asked for; None when the chunk is not here. Raises DigestMismatch, OSError."""
        if request.kind == wire.RequestKind.BLOB:
            data = self.store.read_blob(request.digest)
            return None if data is None else data[request.offset : request.offset + request.length]
        whole = replace(request, offset=0, length=wire.MAX_PAYLOAD)
        with self._lock:
            data = next((kept for (_, chunk), kept in self._kept.items() if chunk == whole), None)
        if data is None:
            data = self.store.read_chunk(request.digest, request.file, request.chunk)
        if data is None or (request.offset == 0 and len(data) <= request.length):
            return data
        with self._lock:
            self._keep((peer, whole), data)
        return data[request.offset : request.offset + request.length]

    def _keep(self, key: tuple[str, wire.Request], data: bytes) -> None:
        self._kept.pop(key, None)
        self._kept[key] = data
        theirs = [kept for kept in self._kept if kept[0] == key[0]]
        if len(theirs) > RECENT_PER_PEER:
            del self._kept[theirs[0]]
        if len(self._kept) > RECENT_CHUNKS:
            # Whoever has most gives up its oldest: many peers at once have one each.
            most = Counter(peer for peer, _ in self._kept)
            del self._kept[min(self._kept, key=lambda kept: -most[kept[0]])]


@dataclass(frozen=True)
class _Connection:
    peer_id: str
    stream: Stream
    chunks: RecentChunks
    one_part: asyncio.Semaphore
    counters: Counters
    limits: ServingLimits
    door: Door
    gate: UploadGate
    compression: Compression
    resting: dict[Stream, float]
    doing: set[str] = field(default_factory=set)
    reader: wire.RequestReader = field(default_factory=wire.RequestReader)

    async def greet(self) -> bool:
        """Whether the peer is let in; it has entered the door then, and is to leave it."""
        greeting_s = min(GREETING_S, self.limits.idle_s)
        return await greet_client(
            self.stream, self.reader, self.door, greeting_s=greeting_s, stall_s=self.limits.stall_s
        )

    async def run(self, *, busy: bool) -> None:
        """Answer requests in order; while one response is being written, the next one is prepared."""
        upcoming = asyncio.create_task(self._next(self.reader, busy=busy))
        if not busy:
            self.resting[self.stream] = asyncio.get_running_loop().time()
        try:
            while (item := await upcoming) is not None:
                response, kind = item
                if response.status == wire.Status.BUSY:
                    await self._write(response.header())
                    return
                upcoming = asyncio.create_task(self._next(self.reader, busy=False))
                with self._at_work("sending"):
                    await self._send(response, kind)
        finally:
            upcoming.cancel()
            try:
                await asyncio.gather(upcoming, return_exceptions=True)
            finally:
                self.resting.pop(self.stream, None)

    async def _next(self, reader: wire.RequestReader, *, busy: bool) -> tuple[wire.Response, Kind] | None:
        """Read one request and prepare its response; None when the peer has nothing more to ask."""
        requests: list[wire.Request] = []
        while not requests:
            try:
                async with asyncio.timeout(self.limits.idle_s):
                    data = await self.stream.read_exactly(reader.wants)
            except (TimeoutError, StreamClosed):
                return None
            requests = reader.receive(data)
        self.door.check(self.peer_id)
        if busy:
            return wire.Response(wire.Status.BUSY), "blob"
        request = requests[0]
        part = request.kind == wire.RequestKind.CHUNK and (request.offset > 0 or request.length < wire.MAX_PAYLOAD)
        with self._at_work("preparing"):
            async with self.one_part if part else nullcontext():
                return await asyncio.to_thread(self._answer, request)

    @contextmanager
    def _at_work(self, what: str) -> Iterator[None]:
        """The stream does not wait for a request, or not only: another one is prepared while one is being sent."""
        self.doing.add(what)
        self.resting.pop(self.stream, None)
        try:
            yield
        finally:
            self.doing.discard(what)
            if not self.doing:
                self.resting[self.stream] = asyncio.get_running_loop().time()

    async def _send(self, response: wire.Response, kind: Kind) -> None:
        await self._write(response.header())
        begun = time.perf_counter()
        for start in range(0, len(response.payload), self.gate.piece):
            piece = memoryview(response.payload)[start : start + self.gate.piece]
            async with self.gate.turn(self.peer_id, len(piece)):
                await self._write(piece)
        if response.status == wire.Status.OK:
            self.compression.sent(self.peer_id, len(response.payload), time.perf_counter() - begun)
            self.counters.add("sent", self.peer_id, kind, wire=len(response.payload), logical=response.length)

    def _answer(self, request: wire.Request) -> tuple[wire.Response, Kind]:
        """Read, hash and perhaps compress; runs in a thread."""
        kind: Kind = "blob"
        if not self.door.serves(request.digest):
            return wire.Response(wire.Status.NOT_HELD), kind
        try:
            data = self.chunks.part(self.peer_id, request)
            if data is not None and request.kind == wire.RequestKind.CHUNK:
                kind = self.chunks.store.kind(request.digest)
        except DigestMismatch as error:
            log.error("%s: fetch it again or restore it from a backup", error)
            return wire.Response(wire.Status.DAMAGED), kind
        except OSError as error:
            log.error("cannot read %s from the content store: %s", request.digest, error)
            return wire.Response(wire.Status.NOT_HELD), kind
        if data is None:
            return wire.Response(wire.Status.NOT_HELD), kind
        # Manifests and plans are small and shrink by half; whether weights are worth it depends on the link. Who asks
        # for parts has streams that end after so many bytes: the fewer the better.
        small = kind == "blob" or request.offset > 0 or request.length < wire.MAX_PAYLOAD
        compress = self.compression.pays(self.peer_id) or (small and self.limits.compress != "never")
        begun = time.perf_counter()
        response = wire.encode_payload(data, compress=compress)
        if compress:
            self.compression.packed(len(data), len(response.payload), time.perf_counter() - begun)
        return response, kind

    async def _write(self, data: bytes | memoryview) -> None:
        try:
            async with asyncio.timeout(self.limits.stall_s):
                await self.stream.write(data)
        except TimeoutError as error:
            raise Stalled(f"{self.peer_id} took nothing for {self.limits.stall_s:g} s") from error
