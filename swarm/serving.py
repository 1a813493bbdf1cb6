"""Serving blobs and chunks of the content store to whoever asks; see wire.py for the protocol.

Bounded on every side: streams in all and per peer, two prepared responses a stream (one being written, one ready),
a stall time for readers that stop reading and an idle time for streams that stop asking.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass

from paris_swarm.dht_schemas.errors import DigestMismatch
from paris_swarm.swarm import wire
from paris_swarm.swarm.counters import Counters, Kind
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.transport import Stalled, Stream, StreamClosed, StreamHandler, TransportError

__all__ = ["Counters", "ServingLimits", "serve_files"]

log = logging.getLogger(__name__)

PIECE = 256 * 1024
"""Bytes per write and per read: with 4 MiB chunks the fastest through p2pd."""


@dataclass(frozen=True)
class ServingLimits:
    """streams: at once, in all and per peer. idle_s: without a request. stall_s: for a reader to take one piece."""

    streams: int = 32
    streams_per_peer: int = 4
    idle_s: float = 120.0
    stall_s: float = 30.0


def serve_files(store: ContentStore, counters: Counters, *, limits: ServingLimits | None = None) -> StreamHandler:
    """A stream handler that answers the file protocol from ``store`` and counts what it sent in ``counters``.

    What the store does not hold is answered with a status, never guessed. A peer that breaks the protocol is
    disconnected; nothing a peer sends raises out of the handler.
    """
    bounds = limits or ServingLimits()
    open_streams: Counter[str] = Counter()

    async def handle(peer_id: str, stream: Stream) -> None:
        busy = open_streams.total() >= bounds.streams or open_streams[peer_id] >= bounds.streams_per_peer
        open_streams[peer_id] += 1
        try:
            await _Connection(peer_id, stream, store, counters, bounds).run(busy=busy)
        except (wire.BadFrame, TransportError) as error:
            log.info("stream from %s ended: %s", peer_id, error)
        finally:
            open_streams[peer_id] -= 1
            if not open_streams[peer_id]:
                del open_streams[peer_id]

    return handle


@dataclass(frozen=True)
class _Connection:
    peer_id: str
    stream: Stream
    store: ContentStore
    counters: Counters
    limits: ServingLimits

    async def run(self, *, busy: bool) -> None:
        """Answer requests in order; while one response is being written, the next one is prepared."""
        reader = wire.RequestReader()
        upcoming = asyncio.create_task(self._next(reader, busy=busy))
        try:
            await self._write(wire.HELLO)
            while (item := await upcoming) is not None:
                response, kind = item
                if response.status == wire.Status.BUSY:
                    await self._write(response.header())
                    return
                upcoming = asyncio.create_task(self._next(reader, busy=False))
                await self._send(response, kind)
        finally:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)

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
        if busy:
            return wire.Response(wire.Status.BUSY), "blob"
        return await asyncio.to_thread(self._answer, requests[0])

    async def _send(self, response: wire.Response, kind: Kind) -> None:
        await self._write(response.header())
        for start in range(0, len(response.payload), PIECE):
            await self._write(memoryview(response.payload)[start : start + PIECE])
        if response.status == wire.Status.OK:
            self.counters.add("sent", self.peer_id, kind, wire=len(response.payload), logical=response.length)

    def _answer(self, request: wire.Request) -> tuple[wire.Response, Kind]:
        """Read, hash and perhaps compress; runs in a thread."""
        kind: Kind = "blob"
        try:
            if request.kind == wire.RequestKind.BLOB:
                data = self.store.read_blob(request.digest)
            else:
                data = self.store.read_chunk(request.digest, request.file, request.chunk)
                if data is not None:
                    kind = self.store.kind(request.digest)
        except DigestMismatch as error:
            log.error("%s: fetch it again or restore it from a backup", error)
            return wire.Response(wire.Status.DAMAGED), kind
        except OSError as error:
            log.error("cannot read %s from the content store: %s", request.digest, error)
            return wire.Response(wire.Status.NOT_HELD), kind
        if data is None:
            return wire.Response(wire.Status.NOT_HELD), kind
        return wire.encode_payload(data), kind

    async def _write(self, data: bytes | memoryview) -> None:
        try:
            async with asyncio.timeout(self.limits.stall_s):
                await self.stream.write(data)
        except TimeoutError as error:
            raise Stalled(f"{self.peer_id} took nothing for {self.limits.stall_s:g} s") from error
