"""Records on the DHT, stored and read through a DHTNode on this loop, and the other nodes that it meets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import statistics
import time
from collections.abc import AsyncIterator, Collection, Iterable
from typing import Any

from hivemind.dht.crypto import DHTRecord
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import CompositeValidator
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError, P2PHandlerError
from hivemind.proto import dht_pb2

from paris_swarm.swarm.crowd import NEAREST, population
from paris_swarm.swarm.hivemind_transport.p2pd_process import LaunchedP2P
from paris_swarm.swarm.hivemind_transport.record_guard import RecordGuard, RecordValidator
from paris_swarm.swarm.searches import Searches
from paris_swarm.swarm.transport import RecordCheck, Stalled, TransportDown

log = logging.getLogger(__name__)

REPLICAS = 5
"""Other nodes that a record is stored on."""

_CANDIDATES = 20
_LOOKUP_S = 20.0


class RecordNode:
    """One DHTNode and the searches it makes. ``store``, ``get`` and ``clock_offset`` are those of transport.Transport.

    Attributes:
        node: hivemind's; None before ``join``.
        searches: those under way, for whoever ends the node.
        alone: set when a lookup ended with nobody left to ask.
    """

    def __init__(self, p2p: LaunchedP2P, *, observer: bool, max_subkeys: int) -> None:
        self._p2p = p2p
        self._peer_id: str = p2p.peer_id.to_base58()
        self._observer = observer
        self._max_subkeys = max_subkeys
        self._validator: Any = None
        self.node: Any = None
        self.searches = Searches()
        self.alone = asyncio.Event()

    async def join(self, check: RecordCheck, *, reserved: Collection[str]) -> None:
        """Make the node; it knows nobody until ``meet``. Raises ValueError when there is one, TransportDown."""
        self._p2p.need_up()
        if self.node is not None:
            raise ValueError("this transport has already joined the DHT")
        self._validator = RecordValidator(check)
        # No initial peers: the guard must stand before the first answer comes in.
        self.node = await DHTNode.create(
            p2p=self._p2p,
            node_id=DHTID.generate(self._peer_id),
            client_mode=self._observer,
            record_validator=CompositeValidator([self._validator]),
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
            reuse_get_requests=False,
            backoff_rate=1.0,
        )
        # What this node says itself it keeps, whoever filled the key: readers that reach it find it here.
        RecordGuard(self.node.protocol, subkeys=self._max_subkeys, reserved={*reserved, self._peer_id})

    def leave(self) -> None:
        """Let the node's own work end with the next round."""
        if self.node is not None:
            self.node.is_alive = False

    # ---- records

    async def store(self, key: str, subkey: str, value: bytes, until: float) -> bool:
        protocol = self._need_joined().protocol
        place, packed, until = DHTID.generate(key), protocol.serializer.dumps(value), float(until)
        record = DHTRecord(place.to_bytes(), protocol.serializer.dumps(subkey), packed, until)
        if not self._validator.validate(record):
            log.warning("a record of our own does not pass our own check: %s", key)
            return False
        if not self._observer:
            protocol.storage.store_subkey(place, subkey, packed, until)

        async def store_at(peer: PeerID) -> bool:
            return bool(await protocol.call_store(peer, [place], [packed], [until], [subkey]) == [True])

        async with self._lookup(f"storing {key}"):
            found = await self.searches.run(
                self.node.find_nearest_nodes([place], k_nearest=_CANDIDATES, exclude_self=True)
            )
            candidates, accepted = list(found[place].values()), 0
            while candidates and accepted < REPLICAS:
                batch, candidates = candidates[: REPLICAS - accepted], candidates[REPLICAS - accepted :]
                accepted += sum(await asyncio.gather(*map(store_at, batch)))
        return accepted > 0

    async def get(self, key: str) -> dict[str, tuple[bytes, float]]:
        node = self._need_joined()
        async with self._lookup(f"reading {key}"):
            found = await self.searches.run(node.get(key, latest=True))
        if found is None or not isinstance(found.value, dict):
            return {}
        return {
            subkey: (item.value, item.expiration_time)
            for subkey, item in found.value.items()
            if isinstance(subkey, str) and isinstance(item.value, bytes) and item.expiration_time > time.time()
        }

    @contextlib.asynccontextmanager
    async def _lookup(self, what: str) -> AsyncIterator[None]:
        """Bound a DHT operation in time; wake the watchdog when it ends with nobody left to ask."""
        try:
            async with asyncio.timeout(_LOOKUP_S):
                yield
        except TimeoutError as error:
            raise Stalled(f"{what} took longer than {_LOOKUP_S:g} s") from error
        except (P2PDaemonError, P2PHandlerError, OSError) as error:
            raise TransportDown(f"{what} failed: {error}") from error
        if not self.contacts():
            self.alone.set()

    # ---- the other nodes

    def contacts(self) -> int:
        """How many peers the routing table holds; 0 before ``join``."""
        return len(self.node.protocol.routing_table.peer_id_to_uid) if self.node is not None else 0

    def met(self) -> set[str]:
        """Their peer ids."""
        return {peer.to_base58() for peer in self.node.protocol.routing_table.peer_id_to_uid}

    async def meet(self, peer_ids: Iterable[str]) -> None:
        """Ping peers into the routing table, then let the table fill from theirs."""
        node = self.node
        peers = [PeerID.from_base58(peer_id) for peer_id in peer_ids if peer_id != self._peer_id]
        for peer, answered in zip(peers, await asyncio.gather(*map(node.protocol.call_ping, peers)), strict=True):
            if answered is not None:
                node.blacklist.register_success(peer)
        await asyncio.sleep(0)  # call_ping updates the table in a task of its own
        if self.contacts():
            with contextlib.suppress(TimeoutError, P2PDaemonError, P2PHandlerError):
                async with asyncio.timeout(_LOOKUP_S):
                    await self.searches.run(node.find_nearest_nodes([node.node_id]))

    async def clock_offset(self) -> float | None:
        protocol = self._need_joined().protocol

        async def offset(peer: PeerID) -> float | None:
            asked = time.time()
            try:
                stub = protocol.get_stub(peer)
                answer = await stub.rpc_ping(dht_pb2.PingRequest(peer=protocol.node_info), timeout=3.0)
            except (P2PDaemonError, P2PHandlerError, OSError, TimeoutError):
                return None
            return float(answer.dht_time) - (asked + time.time()) / 2

        peers = list(protocol.routing_table.peer_id_to_uid)[:8]
        offsets = [found for found in await asyncio.gather(*map(offset, peers)) if found is not None]
        return statistics.median(offsets) if offsets else None

    def population(self) -> int:
        """Estimated number of nodes, this one included (crowd.py); 1 before ``join``."""
        if self.node is None:
            return 1
        table, own = self.node.protocol.routing_table, self.node.node_id
        nearest = table.get_nearest_neighbors(own, NEAREST, exclude=own)
        return population([own.xor_distance(other) / 2**160 for other, _ in nearest], len(table.peer_id_to_uid))

    def _need_joined(self) -> Any:
        self._p2p.need_up()
        if self.node is None:
            raise TransportDown("this node has not joined the DHT: call join_dht first")
        return self.node
