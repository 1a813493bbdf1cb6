"""The transport that joins them: one p2pd and one DHTNode behind the Transport protocol."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal

from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.utils.logging import use_hivemind_log_handler

from paris_swarm.dht_schemas.invite import peer_address
from paris_swarm.swarm.direct import DIRECT_PROTOCOL
from paris_swarm.swarm.hivemind_transport.p2pd_control import Control, stream_over
from paris_swarm.swarm.hivemind_transport.p2pd_process import LaunchedP2P, ended, launched
from paris_swarm.swarm.hivemind_transport.peer_addresses import PeerAddresses
from paris_swarm.swarm.hivemind_transport.record_guard import MAX_SUBKEYS
from paris_swarm.swarm.hivemind_transport.record_node import RecordNode
from paris_swarm.swarm.hivemind_transport.watchdog import keep_connected
from paris_swarm.swarm.p2pd_words import stream_error
from paris_swarm.swarm.peer_streams import PeerStreams
from paris_swarm.swarm.socket_stream import SocketStream
from paris_swarm.swarm.transport import (
    FILE_PROTOCOL,
    RecordCheck,
    Stream,
    StreamClosed,
    StreamHandler,
    TransportDown,
    Unreachable,
)

log = logging.getLogger(__name__)

_SEARCH_END_S = 2.0


class HivemindTransport:
    """One p2pd and one DHTNode on the running event loop; make it with ``await HivemindTransport.start(...)``.

    Not thread-safe: use it from the loop that started it. When that loop's thread ends, p2pd ends too.

    Attributes:
        unreachable_seeds: address -> why, of the seeds that did not answer at the start (they are tried again).
    """

    def __init__(
        self, p2p: LaunchedP2P, *, observer: bool, watch_s: float, max_subkeys: int = MAX_SUBKEYS, direct: bool = True
    ) -> None:
        self._p2p = p2p
        self._peer_id: str = p2p.peer_id.to_base58()
        self._watch_s = watch_s
        self._control = Control(p2p)
        self._addresses = PeerAddresses(p2p, self._control, observer=observer)
        self._records = RecordNode(p2p, observer=observer, max_subkeys=max_subkeys)
        self._streams = PeerStreams(self._open, direct=direct)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.unreachable_seeds = self._addresses.unreachable_seeds

    @classmethod
    async def start(
        cls,
        identity_path: Path | str | None,
        seeds: Sequence[str] = (),
        *,
        listen: str | Sequence[str] = "/ip4/127.0.0.1/tcp/0",
        announce: Sequence[str] = (),
        public: bool = False,
        reachability: Literal["public", "private"] | None = None,
        observer: bool = False,
        startup_timeout: float = 60.0,
        watch_s: float = 5.0,
        max_subkeys: int = MAX_SUBKEYS,
        direct: bool = True,
        direct_port: int = 0,
    ) -> HivemindTransport:
        """Start p2pd, dial the seeds; streams work from here on. Seeds that do not answer do not fail the start.

        Args:
            identity_path: Ed25519 key file (libp2p PrivateKey protobuf); None: a fresh key that nobody keeps.
            seeds: full multiaddrs, each ending in /p2p/<peer id>.
            listen: where to listen; port 0 lets the system choose.
            announce: addresses to tell others instead of the ones listened on.
            public: reachable from outside: NAT detection, UPnP and relays on. Off, nothing leaves the addresses above;
                peers behind relays are dialled either way.
            reachability: with ``public``: what is known of this node and need not be found out. "public": it also
                relays for peers that nobody can dial; "private": it is such a peer and looks for a relay among the
                seeds, which takes about three minutes.
            observer: listens nowhere, keeps no records of others, serves no files.
            watch_s: how often the watchdog looks at the routing table, seconds.
            max_subkeys: records of others that this node keeps under one key.
            direct: carry file streams over a TLS connection between the two processes where the other peer can be
                reached and offers it (direct.py), and offer the same.
            direct_port: TCP port for that, on the first address of ``listen``; 0 lets the system choose.

        Raises:
            TransportDown: p2pd did not start; the message holds its words.
            ValueError: no such key file, or a seed that is not a full multiaddr.
        """
        if identity_path is not None and not Path(identity_path).is_file():
            raise ValueError(f"there is no identity file at {identity_path}")  # hivemind would make an RSA key here
        seeds = [peer_address(seed) for seed in seeds]
        use_hivemind_log_handler("nowhere")
        try:
            p2p = await launched(
                identity_path=None if identity_path is None else str(identity_path),
                host_maddrs=[listen] if isinstance(listen, str) else list(listen),
                announce_maddrs=list(announce) or None,
                no_listen=observer,
                dht_mode="client" if observer else "server",
                auto_nat=public,
                nat_port_map=public,
                use_relay=public,  # to be reached through one; p2pd dials through relays in any case
                use_auto_relay=public and reachability != "public" and not observer,
                force_reachability=reachability,
                check_if_identity_free=False,
                startup_timeout=startup_timeout,
            )
        except (P2PDaemonError, OSError, TimeoutError) as error:
            raise TransportDown(f"p2pd did not start: {error}") from error
        self = cls(p2p, observer=observer, watch_s=watch_s, max_subkeys=max_subkeys, direct=direct)
        try:
            self._spawn(self._supervise())
            if not observer:
                await p2p.add_binary_stream_handler(FILE_PROTOCOL, self._incoming)
                if await self._streams.listen(listen, direct_port):
                    await p2p.add_binary_stream_handler(DIRECT_PROTOCOL, self._incoming)
            await self._addresses.dial_seeds(seeds)
        except BaseException:
            await self.close()
            raise
        return self

    @property
    def peer_id(self) -> str:
        return self._peer_id

    # ---- records

    async def join_dht(self, check: RecordCheck, *, reserved: Collection[str] = ()) -> None:
        await self._records.join(check, reserved=reserved)
        await self._records.meet(await self._addresses.connected())
        self._spawn(keep_connected(self._records, self._addresses, self._watch_s))

    async def store(self, key: str, subkey: str, value: bytes, until: float) -> bool:
        return await self._records.store(key, subkey, value, until)

    async def get(self, key: str) -> dict[str, tuple[bytes, float]]:
        return await self._records.get(key)

    # ---- streams

    def serve(self, handler: StreamHandler) -> None:
        self._streams.handler = handler

    async def open_stream(self, peer_id: str, *, addresses: Sequence[str] = ()) -> Stream:
        self._p2p.need_up()
        for address in addresses:
            with contextlib.suppress(Unreachable):
                await self.connect(address)
                break
        return await self._streams.open(peer_id)

    async def _open(self, peer_id: str, protocol: str) -> SocketStream:
        try:
            return await self._control.open_stream(peer_id, protocol)
        except P2PDaemonError as error:
            raise stream_error(peer_id, error) from error

    async def _incoming(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            stream = await stream_over(info.peer_id.to_base58(), info.addr.to_bytes(), reader, writer)
        except StreamClosed:
            return
        await self._streams.incoming(stream, info.proto)

    # ---- peers

    async def connect(self, address: str) -> str:
        return await self._addresses.connect(address)

    async def addresses(self) -> list[str]:
        return await self._addresses.own()

    async def connected_peers(self) -> list[str]:
        return await self._addresses.connected()

    async def known_addresses(self) -> list[str]:
        return await self._addresses.listening()

    async def clock_offset(self) -> float | None:
        return await self._records.clock_offset()

    def population(self) -> int:
        return self._records.population()

    # ---- its life

    def alive(self) -> bool:
        return self._p2p.alive()

    async def close(self) -> None:
        if self._p2p.closing:
            return
        self._p2p.closing = True
        self._records.leave()
        await self._streams.close()
        self._p2p.fail_calls()
        # Every call they wait for has failed: they end by themselves.
        await self._records.searches.settle(_SEARCH_END_S)
        await ended(self._p2p, (*self._tasks, *self._records.searches.tasks))

    async def _supervise(self) -> None:
        code = await self._p2p._child.wait()
        self._p2p.fail_calls()
        self._streams.abandon()  # the peer is gone as a whole: nobody is to find half of it alive
        if not self._p2p.closing:
            log.error("p2pd ended with exit status %s: this node is offline until it is started again", code)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
