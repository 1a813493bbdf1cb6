"""Where peers are reached: dialled by address, asked for theirs, remembered for when the routing table is empty."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from paris_swarm.dht_schemas.invite import peer_address, peer_id_in
from paris_swarm.swarm.hivemind_transport.p2pd_control import CONTROL_S, Control
from paris_swarm.swarm.hivemind_transport.p2pd_process import LaunchedP2P
from paris_swarm.swarm.p2pd_words import one_line
from paris_swarm.swarm.transport import TransportDown, Unreachable

_MAX_KNOWN = 64


class PeerAddresses:
    """Addresses as p2pd knows them, and the connections it makes of them. ``connect``, ``own``, ``connected`` and
    ``listening`` raise TransportDown when p2pd is gone.

    Attributes:
        known: peer id -> the address under which the watchdog dials it again.
        unreachable_seeds: address -> why, of the seeds that have not answered yet.
    """

    def __init__(self, p2p: LaunchedP2P, control: Control, *, observer: bool) -> None:
        self._p2p = p2p
        self._control = control
        self._peer_id: str = p2p.peer_id.to_base58()
        self._observer = observer
        self.known: dict[str, str] = {}
        self.unreachable_seeds: dict[str, str] = {}

    async def dial_seeds(self, seeds: Sequence[str]) -> None:
        """Dial them all at once; our own address is no seed, and those that do not answer are kept for later."""
        seeds = [seed for seed in seeds if peer_id_in(seed) != self._peer_id]
        self.known.update({peer_id_in(seed): seed for seed in seeds})
        answers = await asyncio.gather(*map(self.connect, seeds), return_exceptions=True)
        for seed, answer in zip(seeds, answers, strict=True):
            if isinstance(answer, Unreachable):
                self.unreachable_seeds[seed] = str(answer)
            elif isinstance(answer, BaseException):
                raise answer

    async def connect(self, address: str) -> str:
        """See transport.Transport."""
        self._p2p.need_up()
        address = peer_address(address)
        peer_id = peer_id_in(address)
        target = p2pd_pb2.ConnectRequest(
            peer=PeerID.from_base58(peer_id).to_bytes(),
            addrs=[Multiaddr(address.rpartition("/p2p/")[0]).to_bytes()],
            timeout=int(CONTROL_S / 2),
        )
        try:
            await self._control.request(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=target))
        except P2PDaemonError as error:
            raise Unreachable(f"nobody answers as this peer at {address}: {one_line(error)}") from error
        self.learn({peer_id: address})
        self.unreachable_seeds.pop(address, None)
        return peer_id

    async def own(self) -> list[str]:
        """Full multiaddrs under which others can dial this node; empty for an observer."""
        self._p2p.need_up()
        if self._observer:
            return []
        response = await self._asked(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        return [f"{Multiaddr(raw)}/p2p/{self._peer_id}" for raw in response.identify.addrs]

    async def connected(self) -> list[str]:
        """Peer ids with an open connection, sorted."""
        self._p2p.need_up()
        response = await self._asked(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        return sorted({PeerID(peer.id).to_base58() for peer in response.peers})

    async def listening(self) -> list[str]:
        """Dialable full multiaddrs of connected peers."""
        peers = (await self.connected())[:_MAX_KNOWN]
        return [address for found in await asyncio.gather(*map(self._where, peers)) for address in found]

    async def _where(self, peer_id: str) -> list[str]:
        """Where a connected peer says it listens; the port of an inbound connection would not do."""
        wanted = p2pd_pb2.DHTRequest(
            type=p2pd_pb2.DHTRequest.FIND_PEER, peer=PeerID.from_base58(peer_id).to_bytes(), timeout=2
        )
        try:
            response = await self._control.request(p2pd_pb2.Request(type=p2pd_pb2.Request.DHT, dht=wanted))
        except P2PDaemonError:
            return []
        return [f"{Multiaddr(raw)}/p2p/{peer_id}" for raw in response.dht.peer.addrs]

    def learn(self, addresses: dict[str, str]) -> None:
        """Remember peer id -> address of others, as far as there is room; the first address of a peer stays."""
        for peer, address in addresses.items():
            if peer != self._peer_id and (peer in self.known or len(self.known) < _MAX_KNOWN):
                self.known.setdefault(peer, address)

    async def _asked(self, request: p2pd_pb2.Request) -> p2pd_pb2.Response:
        try:
            return await self._control.request(request)
        except P2PDaemonError as error:
            raise TransportDown(f"p2pd refused a request: {error}") from error
