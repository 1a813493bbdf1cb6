"""A whole network in one process, with faults: the transport for tests and simulations.

Same contract as the real one (tests/swarm/test_transport_contract.py). Reach follows connections: two nodes reach each
other when a chain of ``connect`` calls joins them and no partition divides them. Every joined node that is not an
observer keeps a replica of every record; nothing is lost but by the faults asked for, which one seeded generator rolls.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from paris_swarm.dht_schemas.dht_rules import dht_id
from paris_swarm.swarm.transport import (
    NotHeld,
    PeerNotFound,
    RecordCheck,
    Stream,
    StreamClosed,
    StreamHandler,
    TransportDown,
    Unreachable,
)

_BUFFER = 256 * 1024


@dataclass(frozen=True)
class StreamFaults:
    """What happens to the bytes that a peer sends, counted from the start of each of its streams; None: nothing.

    stall_after: nothing more is delivered, and the stream stays open. truncate_after: the stream closes cleanly.
    flip_at: the lowest bit of this byte is flipped.
    """

    stall_after: int | None = None
    truncate_after: int | None = None
    flip_at: int | None = None


class MemoryNetwork:
    """The world: nodes, connections, partitions, faults.

    Args:
        seed: of the generator that decides which record messages are dropped.
        clock: Unix seconds.
    """

    def __init__(self, seed: int = 0, *, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.drop = 0.0
        """Probability that one store or one find between two nodes is lost."""
        self._random = random.Random(seed)
        self._nodes: dict[str, MemoryTransport] = {}
        self._connections: set[frozenset[str]] = set()
        self._groups: list[frozenset[str]] = []
        self._faults: dict[str, StreamFaults] = {}
        self._next_port = 1

    def partition(self, *groups: Iterable[str]) -> None:
        """Only peers of one group reach each other from now on; peers in no group form one together."""
        self._groups = [frozenset(group) for group in groups]

    def heal(self) -> None:
        """End the partition."""
        self._groups = []

    def set_faults(self, peer_id: str, faults: StreamFaults | None) -> None:
        """Faults of the bytes a peer sends on streams opened from now on; None ends them."""
        if faults is None:
            self._faults.pop(peer_id, None)
        else:
            self._faults[peer_id] = faults

    def kill(self, peer_id: str) -> None:
        """The peer dies at once: its streams end, its replica is lost, its transport is down."""
        self._nodes[peer_id]._die()

    def plant(self, peer_id: str, key: str, subkey: str | None, value: object, until: float) -> None:
        """Put a record on a node unchecked, as a node that lies, or runs no validator, would."""
        self._nodes[peer_id]._replica.setdefault(dht_id(key), {})[subkey] = (value, until)

    # ---- for the transports

    def _add(self, node: MemoryTransport) -> int:
        standing = self._nodes.get(node.peer_id)
        if standing is not None and standing.alive():
            raise TransportDown(f"peer {node.peer_id} is already running")
        self._nodes[node.peer_id] = node
        self._next_port += 1
        return self._next_port

    def _divided(self, one: str, other: str) -> bool:
        side = {peer: index for index, group in enumerate(self._groups) for peer in group}
        return side.get(one) != side.get(other)

    def _connect(self, one: str, other: str) -> None:
        self._connections.add(frozenset((one, other)))

    def _disconnect(self, peer_id: str) -> None:
        self._connections = {pair for pair in self._connections if peer_id not in pair}

    def _neighbours(self, peer_id: str) -> list[str]:
        pairs = (pair - {peer_id} for pair in self._connections if peer_id in pair)
        found = (next(iter(pair)) for pair in pairs if pair)
        return sorted(peer for peer in found if self._up(peer) and not self._divided(peer_id, peer))

    def _up(self, peer_id: str) -> bool:
        return peer_id in self._nodes and self._nodes[peer_id].alive()

    def _reachable(self, peer_id: str) -> list[str]:
        seen, edge = {peer_id}, [peer_id]
        while edge:
            edge = [peer for at in edge for peer in self._neighbours(at) if peer not in seen]
            seen.update(edge)
        return sorted(seen - {peer_id})

    def _lost(self) -> bool:
        return self.drop > 0 and self._random.random() < self.drop


class MemoryTransport:
    """One node of a MemoryNetwork; make it with ``await MemoryTransport.start(...)``."""

    def __init__(self, network: MemoryNetwork, peer_id: str, *, observer: bool = False, skew: float = 0.0) -> None:
        self._network = network
        self._peer_id = peer_id
        self._observer = observer
        self._skew = skew
        self._check: RecordCheck | None = None
        self._handler: StreamHandler | None = None
        self._replica: dict[bytes, dict[str | None, tuple[object, float]]] = {}
        self._streams: set[_MemoryStream] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._alive = True
        self._port = network._add(self)

    @classmethod
    async def start(
        cls,
        network: MemoryNetwork,
        peer_id: str,
        seeds: Sequence[str] = (),
        *,
        observer: bool = False,
        skew: float = 0.0,
    ) -> MemoryTransport:
        """Start a node and dial the seeds; seeds that do not answer are passed over, as in the real transport.

        Args:
            observer: reads and writes records but keeps no replica, and cannot be dialled.
            skew: seconds by which this node's clock is ahead.
        """
        self = cls(network, peer_id, observer=observer, skew=skew)
        for seed in seeds:
            try:
                await self.connect(seed)
            except Unreachable:
                continue
        return self

    @property
    def peer_id(self) -> str:
        return self._peer_id

    # ---- records

    async def join_dht(self, check: RecordCheck, *, reserved: Collection[str] = ()) -> None:
        """``reserved`` changes nothing: there is always room here."""
        self._need_up()
        self._check = check

    async def store(self, key: str, subkey: str, value: bytes, until: float) -> bool:
        self._need_joined()
        place = dht_id(key)
        if not self._passes(place, subkey, value, until):
            return False
        if not self._observer:
            self._take(place, subkey, value, until)
        others = [peer for peer in self._others() if not self._network._lost()]
        return sum(peer._take(place, subkey, value, until) for peer in others) > 0

    async def get(self, key: str) -> dict[str, tuple[bytes, float]]:
        self._need_joined()
        place = dht_id(key)
        found: dict[str, tuple[bytes, float]] = {}
        for node in [self, *(peer for peer in self._others() if not self._network._lost())]:
            for subkey, (value, until) in node._replica.get(place, {}).items():
                if until <= self._network.clock() or not self._passes(place, subkey, value, until):
                    continue
                assert isinstance(subkey, str)
                assert isinstance(value, bytes)
                if subkey not in found or until > found[subkey][1]:
                    found[subkey] = (value, until)
        return found

    def _others(self) -> list[MemoryTransport]:
        nodes = (self._network._nodes[peer] for peer in self._network._reachable(self._peer_id))
        return [node for node in nodes if node._check is not None and not node._observer]

    def _passes(self, place: bytes, subkey: str | None, value: object, until: float) -> bool:
        if self._check is None or not isinstance(subkey, str) or not isinstance(value, bytes):
            return False
        try:
            self._check(place, subkey, value, until)
        except Exception:  # noqa: BLE001 - whatever the check raises means: refused
            return False
        return True

    def _take(self, place: bytes, subkey: str, value: bytes, until: float) -> bool:
        if until <= self._network.clock() or not self._passes(place, subkey, value, until):
            return False
        standing = self._replica.setdefault(place, {}).get(subkey)
        if standing is not None and standing[1] >= until:
            return standing[1] > until or standing[0] == value
        self._replica[place][subkey] = (value, until)
        return True

    # ---- streams

    def serve(self, handler: StreamHandler) -> None:
        self._handler = handler

    async def open_stream(self, peer_id: str, *, addresses: Sequence[str] = ()) -> Stream:
        self._need_up()
        for address in addresses:
            await self.connect(address)
        if peer_id not in self._network._reachable(self._peer_id):
            raise PeerNotFound(f"peer {peer_id} is not known to anyone connected to this node")
        other = self._network._nodes[peer_id]
        if other._observer:
            raise NotHeld(f"peer {peer_id} serves no files")
        self._network._connect(self._peer_id, peer_id)
        there, back = _Pipe(), _Pipe()
        ours = _MemoryStream(peer_id, back, there, self._network._faults.get(self._peer_id))
        theirs = _MemoryStream(self._peer_id, there, back, self._network._faults.get(peer_id))
        self._streams.add(ours)
        other._streams.add(theirs)
        task = asyncio.create_task(other._serve(theirs))
        other._serving.add(task)
        task.add_done_callback(other._serving.discard)
        return ours

    async def _serve(self, stream: _MemoryStream) -> None:
        try:
            if self._handler is not None:
                await self._handler(stream.peer_id, stream)
        finally:
            await stream.close()
            self._streams.discard(stream)

    # ---- peers

    async def connect(self, address: str) -> str:
        self._need_up()
        head, mark, peer_id = address.rpartition("/p2p/")
        if not mark or not peer_id:
            raise ValueError(f"{address!r} does not end in /p2p/<peer id>")
        other = self._network._nodes.get(peer_id)
        if (
            other is None
            or not other.alive()
            or address not in await other.addresses()
            or self._network._divided(self._peer_id, peer_id)
        ):
            raise Unreachable(f"nobody answers at {head} as {peer_id}")
        self._network._connect(self._peer_id, peer_id)
        return peer_id

    async def addresses(self) -> list[str]:
        self._need_up()
        return [] if self._observer else [f"/ip4/127.0.0.1/tcp/{self._port}/p2p/{self._peer_id}"]

    async def connected_peers(self) -> list[str]:
        self._need_up()
        return self._network._neighbours(self._peer_id)

    async def known_addresses(self) -> list[str]:
        self._need_up()
        nodes = [self._network._nodes[peer] for peer in self._network._neighbours(self._peer_id)]
        return [address for node in nodes for address in await node.addresses()]

    async def clock_offset(self) -> float | None:
        self._need_joined()
        others = [node._skew - self._skew for node in self._others()]
        return statistics.median(others) if others else None

    def population(self) -> int:
        return len(self._others()) + 1 if self._alive and self._check is not None else 1

    def alive(self) -> bool:
        return self._alive

    async def close(self) -> None:
        self._die()
        tasks = list(self._serving)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _die(self) -> None:
        self._alive = False
        self._check = None
        self._replica.clear()
        for stream in self._streams:
            stream.cut()
        self._streams.clear()
        self._network._disconnect(self._peer_id)

    def _need_up(self) -> None:
        if not self._alive:
            raise TransportDown(f"the node of {self._peer_id} is not running: start it again")

    def _need_joined(self) -> None:
        self._need_up()
        if self._check is None:
            raise TransportDown("this node has not joined the DHT: call join_dht first")


class _Pipe:
    """One direction of a stream: bytes in order, a bounded buffer, an end."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._ended = False
        self._changed = asyncio.Condition()

    async def put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        async with self._changed:
            while len(view):
                await self._changed.wait_for(lambda: self._ended or len(self._buffer) < _BUFFER)
                if self._ended:
                    raise StreamClosed("the other end closed the stream")
                taken = view[: _BUFFER - len(self._buffer)]
                self._buffer += taken
                view = view[len(taken) :]
                self._changed.notify_all()

    async def take_some(self, most: int) -> bytes:
        async with self._changed:
            await self._changed.wait_for(lambda: self._ended or len(self._buffer) > 0)
            if not self._buffer:
                raise StreamClosed("the stream ended")
            piece = bytes(self._buffer[:most])
            del self._buffer[: len(piece)]
            self._changed.notify_all()
        return piece

    async def take(self, size: int) -> bytes:
        gathered = bytearray()
        async with self._changed:
            while len(gathered) < size:
                await self._changed.wait_for(lambda: self._ended or len(self._buffer) > 0)
                if not self._buffer:
                    raise StreamClosed(f"the stream ended after {len(gathered)} of {size} bytes")
                piece = self._buffer[: size - len(gathered)]
                del self._buffer[: len(piece)]
                gathered += piece
                self._changed.notify_all()
        return bytes(gathered)

    async def wait_end(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._ended)

    async def end(self) -> None:
        async with self._changed:
            self._ended = True
            self._changed.notify_all()

    def cut(self) -> None:
        """End at once, from outside the loop's tasks: whoever waits is woken soon."""
        self._ended = True
        self._waking = asyncio.ensure_future(self.end())


class _MemoryStream:
    def __init__(self, peer_id: str, incoming: _Pipe, outgoing: _Pipe, faults: StreamFaults | None) -> None:
        self._peer_id = peer_id
        self._incoming, self._outgoing = incoming, outgoing
        self._faults = faults or StreamFaults()
        self._sent = 0

    @property
    def peer_id(self) -> str:
        return self._peer_id

    async def read_exactly(self, size: int) -> bytes:
        return await self._incoming.take(size)

    async def read_into(self, view: memoryview) -> int:
        piece = await self._incoming.take_some(len(view))
        view[: len(piece)] = piece
        return len(piece)

    async def write(self, data: bytes | memoryview) -> None:
        payload = bytearray(data)
        start, self._sent = self._sent, self._sent + len(payload)
        faults = self._faults
        if faults.flip_at is not None and start <= faults.flip_at < self._sent:
            payload[faults.flip_at - start] ^= 1
        for limit in (faults.stall_after, faults.truncate_after):
            if limit is not None:
                del payload[max(0, limit - start) :]
        await self._outgoing.put(bytes(payload))
        if faults.stall_after is not None and self._sent > faults.stall_after:
            await self._outgoing.wait_end()
        if faults.truncate_after is not None and self._sent > faults.truncate_after:
            await self.close()

    async def close(self) -> None:
        await self._outgoing.end()
        await self._incoming.end()

    def cut(self) -> None:
        self._outgoing.cut()
        self._incoming.cut()
