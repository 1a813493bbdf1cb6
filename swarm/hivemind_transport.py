"""The real transport: hivemind's DHT and libp2p daemon (p2pd). The only file of the project that imports hivemind.

Why not hivemind's own front door (each point reproduced with hivemind 1.1.12):
  - ``hivemind.DHT`` forks and dies of large messages: a ``DHTNode`` lives on the caller's event loop instead.
  - hivemind's validators let plain values, junk subkeys and endless expirations through: ours refuses all but str
    subkeys with bytes, of bounded size and finite expiration, that pass the caller's check.
  - one refused record makes a reader drop the whole dictionary: ``_RecordGuard`` keeps the valid part instead.
  - a reply's own expiration is not checked and decides when a search ends: it is recomputed from the valid records.
  - a refused store can evict the newer record early, and dictionaries grow without bound: ``BoundedStorage``.
  - caches answer with stale dictionaries: all of them are off.
  - ``store`` counts its own copy as success: here True means that another node holds the record.
  - an empty routing table stays empty: a watchdog dials and pings known peers again.
  - a request that fails leaks its socket: ``_Control`` closes it.
  - a search that is cancelled leaves its tasks behind: ours are let run to their end, whoever still waits for it.
  - p2pd starts two relay services, and which one answers is decided anew at each start: started until it is ours.
  - p2pd's death is silent, Ctrl-C in a terminal reaches it too: supervised, in a session of its own, killed with us.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import CompositeValidator
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
from hivemind.proto import dht_pb2, p2pd_pb2
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.timed_storage import TimedStorage, ValueWithExpiration

from paris_swarm.dht_schemas.invite import peer_address, peer_id_in
from paris_swarm.swarm import p2pd_launch
from paris_swarm.swarm.crowd import NEAREST, population
from paris_swarm.swarm.direct import DIRECT_PROTOCOL
from paris_swarm.swarm.p2pd_words import one_line, stream_error
from paris_swarm.swarm.peer_streams import PeerStreams
from paris_swarm.swarm.raw_record import passes
from paris_swarm.swarm.relay_limit import HOP_PROTOCOL, circuit_bytes
from paris_swarm.swarm.searches import Searches
from paris_swarm.swarm.socket_stream import BareSocket, SocketStream, taken_over
from paris_swarm.swarm.transport import (
    FILE_PROTOCOL,
    RecordCheck,
    Stalled,
    Stream,
    StreamClosed,
    StreamHandler,
    TransportDown,
    TransportError,
    Unreachable,
)

log = logging.getLogger(__name__)

MAX_SUBKEYS = 256
"""Records under one key that a node keeps; further signers are refused while these leases run (R-DHT-8)."""
MAX_RECORDS = 32_768
"""Records that a node keeps in all, beyond which only keys with less than their share take in more (R-DHT-8)."""
REPLICAS = 5
"""Other nodes that a record is stored on."""

_CANDIDATES = 20
_MAX_KNOWN = 64
_CONTROL_S = 20.0
_LOOKUP_S = 20.0
_SEARCH_END_S = 2.0
_RELAYED_BYTES = 1 << 30
"""What a relay of ours lets through one circuit."""
_RELAY_STARTS = 16
"""p2pd v0.5.0 registers a second relay service, with libp2p's 128 KiB, while the one that knows our limit starts;
whichever comes last answers, in about half of all starts ours (docs/results/transfer-faults-2026-11.md).
"""


class BoundedStorage(DHTLocalStorage):  # type: ignore[misc]
    """hivemind's record storage, dictionaries only, at most ``subkeys`` records under a key and ``records`` in all.

    ``store_subkey`` is True when this record (or a newer one of its subkey) is held afterwards. An older record never
    shortens the life of a newer one. When it is full, those in it can renew and the ``reserved`` subkeys find room;
    newcomers are refused until a lease ends (R-DHT-8).
    """

    def __init__(self, subkeys: int, *, records: int = MAX_RECORDS, reserved: Collection[str] = ()) -> None:
        super().__init__()
        self._subkeys = subkeys
        self._records = records
        self._reserved = frozenset(reserved)

    def store(self, key: DHTID, value: object, expiration_time: float, subkey: object = None) -> bool:
        return subkey is not None and self.store_subkey(key, subkey, value, expiration_time)

    def get(self, key: DHTID) -> Any:
        """A copy: hivemind's search merges what others answer into the dictionary it starts from."""
        entry = super().get(key)
        if entry is None:
            return None
        copy = DictionaryDHTValue()
        for subkey, (value, expiration) in entry.value.items():
            copy.store(subkey, value, expiration)
        return ValueWithExpiration(copy, entry.expiration_time)

    def store_subkey(self, key: DHTID, subkey: object, value: object, expiration_time: float) -> bool:
        entry = super().get(key)
        records = entry.value if entry is not None else DictionaryDHTValue()
        standing = records.get(subkey)
        if standing is not None and standing.expiration_time >= expiration_time:
            return bool(standing.expiration_time > expiration_time or standing.value == value)
        if standing is None and subkey not in self._reserved and not self._has_room(len(records)):
            return False
        if not records.store(subkey, value, expiration_time):
            return False
        if entry is None or expiration_time > entry.expiration_time:
            TimedStorage.store(self, key, records, expiration_time)
        for storage in (self, records):
            # Every renewal leaves its old place in the heap until that expires; a busy signer must not fill memory.
            if len(storage.expiration_heap) > 2 * len(storage.key_to_heap) + 64:
                storage.expiration_heap = list(storage.key_to_heap.values())
                heapq.heapify(storage.expiration_heap)
        return True

    def _has_room(self, under_key: int) -> bool:
        """Whether a key with so many records may take in a newcomer. A flood of some keys leaves the others theirs."""
        if under_key >= self._subkeys:
            return False
        share = self._records // max(1, len(self.data))
        return under_key < share or sum(len(entry.value) for entry in self.data.values()) < self._records


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """hivemind's validator interface around ``check``: False for everything that is not a well-formed, valid record."""

    def __init__(self, check: RecordCheck) -> None:
        self._check = check

    def validate(self, record: DHTRecord) -> bool:
        return passes(self._check, record.key, record.subkey, record.value, record.expiration_time)


class _RecordGuard:
    """What a hivemind protocol does with dictionaries that come in: keep the valid records of each, drop the rest."""

    def __init__(self, protocol: Any, *, subkeys: int, reserved: Collection[str]) -> None:
        self._protocol = protocol
        self._find = protocol.call_find
        protocol.storage = BoundedStorage(subkeys, reserved=reserved)
        protocol.cache = BoundedStorage(0)
        protocol._validate_dictionary = self.keep_valid
        protocol.call_find = self.call_find

    def keep_valid(self, key: bytes, dictionary: object) -> bool:
        """Called for every dictionary that a peer stores or answers with; changes it in place."""
        if not isinstance(dictionary, DictionaryDHTValue):
            return False
        offered = sorted(dictionary.data.items(), key=lambda item: -item[1].expiration_time)[: 2 * MAX_SUBKEYS]
        dictionary.clear()
        dictionary.maxsize, dictionary.latest_expiration_time = math.inf, -math.inf
        for subkey, (value, expiration) in offered:
            if isinstance(subkey, str) and self._protocol._validate_record(
                key, self._protocol.serializer.dumps(subkey), value, expiration
            ):
                dictionary.store(subkey, value, expiration)
        return True

    async def call_find(self, peer: PeerID, keys: Iterable[DHTID]) -> object:
        """Ask a peer for keys; the answer's expiration becomes that of its newest valid record."""
        answer = await self._find(peer, keys)
        if answer is None:
            return None
        for key, (found, nearest) in answer.items():
            if found is None or not isinstance(found.value, DictionaryDHTValue) or not found.value.data:
                answer[key] = (None, nearest)
            else:
                answer[key] = (ValueWithExpiration(found.value, found.value.latest_expiration_time), nearest)
        return answer


class _LaunchedP2P(P2P):  # type: ignore[misc]
    """P2P whose daemon is started through p2pd_launch.py, and whose calls fail at once when the daemon is gone."""

    _gone = False

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        command: list[str] = P2P._make_process_args(*args, **kwargs)
        if kwargs.get("relay"):
            command += ["-relayService=1", f"-relayDataLimit={_RELAYED_BYTES}"]
        if not sys.executable:
            return command
        return [sys.executable, "-I", "-S", p2pd_launch.__file__, str(os.getpid()), *command]

    async def _call_unary_protobuf_handler(self, *args: Any) -> Any:
        if self._gone:
            raise P2PDaemonError("p2pd is not running")
        return await super()._call_unary_protobuf_handler(*args)

    def fail_calls(self) -> None:
        """End every call that waits for an answer, and every later one: searches over many peers end with them."""
        self._gone = True
        for answer in list(self._client.control._pending_calls.values()) if self._client is not None else []:
            if not answer.done():
                answer.set_exception(P2PDaemonError("p2pd is not running"))


class _Control:
    """Requests to p2pd over its Unix socket; every socket is closed, also when a request fails or is cancelled."""

    def __init__(self, p2p: P2P) -> None:
        self._path = p2p.daemon_listen_maddr.value_for_protocol("unix")

    async def request(self, request: p2pd_pb2.Request) -> p2pd_pb2.Response:
        """One request, one response. Raises TransportDown, or P2PDaemonError with p2pd's own words."""
        response, _reader, writer = await self._exchange(request)
        writer.close()
        return response

    async def open_stream(self, peer_id: str, protocol: str) -> SocketStream:
        """The request's own socket becomes the stream. Raises as ``request``."""
        opening = p2pd_pb2.StreamOpenRequest(peer=PeerID.from_base58(peer_id).to_bytes(), proto=[protocol])
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=opening)
        response, reader, writer = await self._exchange(request)
        return await _stream_over(peer_id, response.streamInfo.addr, reader, writer)

    async def _exchange(
        self, request: p2pd_pb2.Request
    ) -> tuple[p2pd_pb2.Response, asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            reader, writer = await asyncio.open_unix_connection(self._path)
        except OSError as error:
            raise TransportDown(f"p2pd does not answer at {self._path} ({error}): start the node again") from error
        try:
            async with asyncio.timeout(_CONTROL_S):
                await write_pbmsg(writer, request)
                response = p2pd_pb2.Response()
                await read_pbmsg_safe(reader, response)
            if response.type == p2pd_pb2.Response.ERROR:
                raise P2PDaemonError(response.error.msg)
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            writer.transport.abort()
            if isinstance(error, TimeoutError):
                raise P2PDaemonError(f"no answer within {_CONTROL_S:g} s") from error
            raise TransportDown(f"p2pd closed its control connection ({error}): start the node again") from error
        except BaseException:
            writer.transport.abort()
            raise
        return response, reader, writer


async def _launched(**options: Any) -> P2P:
    """Start p2pd; one that is to relay is started until the relay service in charge is the one with our limit.

    Raises:
        P2PDaemonError, OSError, TimeoutError: it does not start.
    """
    if not options["use_relay"] or options["force_reachability"] != "public":
        return await _LaunchedP2P.create(**options)
    for left in reversed(range(_RELAY_STARTS)):
        relay = await _LaunchedP2P.create(**options)
        try:
            limit = await _circuit_limit(relay, options["host_maddrs"])
        except BaseException:
            await _ended(relay)
            raise
        if limit is None or limit == 0 or limit >= _RELAYED_BYTES:
            break
        if left:
            await _ended(relay)
        else:
            log.warning("this relay lets %d bytes through a circuit: files through it come in small parts", limit)
    return relay


async def _circuit_limit(relay: P2P, listen: Sequence[str]) -> int | None:
    """What a relay on this host lets through a circuit, bytes, as it tells a peer that asks; None: not found out."""
    # A new one each time: one that knew the relay before it was started again still takes itself to be connected.
    probe = await _LaunchedP2P.create(
        no_listen=True,
        dht_mode="client",
        auto_nat=False,
        nat_port_map=False,
        use_relay=False,
        check_if_identity_free=False,
        startup_timeout=_CONTROL_S,
    )
    try:
        identified = await _Control(relay).request(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        # What it announces may lead here from outside only; what it listens on leads here from this host.
        here = [address.replace("/0.0.0.0/", "/127.0.0.1/").replace("/ip6/::/", "/ip6/::1/") for address in listen]
        addresses = [*(Multiaddr(address).to_bytes() for address in here), *identified.identify.addrs]
        target = p2pd_pb2.ConnectRequest(peer=relay.peer_id.to_bytes(), addrs=addresses, timeout=int(_CONTROL_S / 2))
        control = _Control(probe)
        await control.request(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=target))
        stream = await control.open_stream(relay.peer_id.to_base58(), HOP_PROTOCOL)
        try:
            async with asyncio.timeout(_CONTROL_S):
                return await circuit_bytes(stream)
        finally:
            await stream.close()
    except (P2PDaemonError, TransportError, TimeoutError, ValueError) as error:
        log.warning("what this relay lets through a circuit could not be asked for: %s", error)
        return None
    finally:
        await _ended(probe)


async def _ended(p2p: P2P, tasks: Iterable[asyncio.Task[Any]] = ()) -> None:
    """End a p2pd, what hivemind runs for it, and ``tasks``."""
    control = p2p._client.control if p2p._client is not None else None
    theirs = [p2p._listen_task, p2p._reader_task]
    theirs += [control._read_task, control._write_task] if control is not None else []
    every = [task for task in (*tasks, *theirs) if task is not None]
    child = p2p._child
    p2p.fail_calls()
    p2p._terminate()
    for task in every:
        task.cancel()
    await asyncio.gather(*every, return_exceptions=True)
    try:
        async with asyncio.timeout(5.0):
            await child.wait()
    except TimeoutError:
        child.kill()
        await child.wait()
    child._transport.close()


class HivemindTransport:
    """One p2pd and one DHTNode on the running event loop; make it with ``await HivemindTransport.start(...)``.

    Not thread-safe: use it from the loop that started it. When that loop's thread ends, p2pd ends too.

    Attributes:
        unreachable_seeds: address -> why, of the seeds that did not answer at the start (they are tried again).
    """

    def __init__(
        self, p2p: P2P, *, observer: bool, watch_s: float, max_subkeys: int = MAX_SUBKEYS, direct: bool = True
    ) -> None:
        self._p2p = p2p
        self._control = _Control(p2p)
        self._peer_id: str = p2p.peer_id.to_base58()
        self._observer = observer
        self._watch_s = watch_s
        self._max_subkeys = max_subkeys
        self._node: Any = None
        self._validator: Any = None
        self._streams = PeerStreams(self._open, direct=direct)
        self._known: dict[str, str] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._searches = Searches()
        self._alone = asyncio.Event()
        self._closing = False
        self.unreachable_seeds: dict[str, str] = {}

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
            public: reachable from outside: NAT detection, UPnP and relays on. Off, nothing leaves the addresses above.
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
            p2p = await _launched(
                identity_path=None if identity_path is None else str(identity_path),
                host_maddrs=[listen] if isinstance(listen, str) else list(listen),
                announce_maddrs=list(announce) or None,
                no_listen=observer,
                dht_mode="client" if observer else "server",
                auto_nat=public,
                nat_port_map=public,
                use_relay=public,
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
            seeds = [seed for seed in seeds if peer_id_in(seed) != self._peer_id]
            self._known.update({peer_id_in(seed): seed for seed in seeds})
            answers = await asyncio.gather(*map(self.connect, seeds), return_exceptions=True)
            for seed, answer in zip(seeds, answers, strict=True):
                if isinstance(answer, Unreachable):
                    self.unreachable_seeds[seed] = str(answer)
                elif isinstance(answer, BaseException):
                    raise answer
        except BaseException:
            await self.close()
            raise
        return self

    @property
    def peer_id(self) -> str:
        return self._peer_id

    # ---- records

    async def join_dht(self, check: RecordCheck, *, reserved: Collection[str] = ()) -> None:
        self._need_up()
        if self._node is not None:
            raise ValueError("this transport has already joined the DHT")
        self._validator = RecordValidator(check)
        # No initial peers: the guard must stand before the first answer comes in.
        self._node = await DHTNode.create(
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
        _RecordGuard(self._node.protocol, subkeys=self._max_subkeys, reserved={*reserved, self._peer_id})
        await self._meet(await self.connected_peers())
        self._spawn(self._watch())

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
            found = await self._searches.run(
                self._node.find_nearest_nodes([place], k_nearest=_CANDIDATES, exclude_self=True)
            )
            candidates, accepted = list(found[place].values()), 0
            while candidates and accepted < REPLICAS:
                batch, candidates = candidates[: REPLICAS - accepted], candidates[REPLICAS - accepted :]
                accepted += sum(await asyncio.gather(*map(store_at, batch)))
        return accepted > 0

    async def get(self, key: str) -> dict[str, tuple[bytes, float]]:
        node = self._need_joined()
        async with self._lookup(f"reading {key}"):
            found = await self._searches.run(node.get(key, latest=True))
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
        if not self._contacts():
            self._alone.set()

    # ---- streams

    def serve(self, handler: StreamHandler) -> None:
        self._streams.handler = handler

    async def open_stream(self, peer_id: str, *, addresses: Sequence[str] = ()) -> Stream:
        self._need_up()
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
            stream = await _stream_over(info.peer_id.to_base58(), info.addr.to_bytes(), reader, writer)
        except StreamClosed:
            return
        await self._streams.incoming(stream, info.proto)

    # ---- peers

    async def connect(self, address: str) -> str:
        self._need_up()
        address = peer_address(address)
        peer_id = peer_id_in(address)
        target = p2pd_pb2.ConnectRequest(
            peer=PeerID.from_base58(peer_id).to_bytes(),
            addrs=[Multiaddr(address.rpartition("/p2p/")[0]).to_bytes()],
            timeout=int(_CONTROL_S / 2),
        )
        try:
            await self._control.request(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=target))
        except P2PDaemonError as error:
            raise Unreachable(f"nobody answers as this peer at {address}: {one_line(error)}") from error
        self._learn({peer_id: address})
        self.unreachable_seeds.pop(address, None)
        return peer_id

    async def addresses(self) -> list[str]:
        self._need_up()
        if self._observer:
            return []
        response = await self._asked(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        return [f"{Multiaddr(raw)}/p2p/{self._peer_id}" for raw in response.identify.addrs]

    async def connected_peers(self) -> list[str]:
        self._need_up()
        response = await self._asked(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        return sorted({PeerID(peer.id).to_base58() for peer in response.peers})

    async def known_addresses(self) -> list[str]:
        peers = (await self.connected_peers())[:_MAX_KNOWN]
        return [address for found in await asyncio.gather(*map(self._listening, peers)) for address in found]

    async def _listening(self, peer_id: str) -> list[str]:
        """Where a connected peer says it listens; the port of an inbound connection would not do."""
        wanted = p2pd_pb2.DHTRequest(
            type=p2pd_pb2.DHTRequest.FIND_PEER, peer=PeerID.from_base58(peer_id).to_bytes(), timeout=2
        )
        try:
            response = await self._control.request(p2pd_pb2.Request(type=p2pd_pb2.Request.DHT, dht=wanted))
        except P2PDaemonError:
            return []
        return [f"{Multiaddr(raw)}/p2p/{peer_id}" for raw in response.dht.peer.addrs]

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
        if self._node is None:
            return 1
        table, own = self._node.protocol.routing_table, self._node.node_id
        nearest = table.get_nearest_neighbors(own, NEAREST, exclude=own)
        return population([own.xor_distance(other) / 2**160 for other, _ in nearest], len(table.peer_id_to_uid))

    def alive(self) -> bool:
        return not self._closing and self._p2p._child.returncode is None

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        if self._node is not None:
            self._node.is_alive = False
        await self._streams.close()
        self._p2p.fail_calls()
        await self._searches.settle(_SEARCH_END_S)  # every call they wait for has failed: they end by themselves
        await _ended(self._p2p, (*self._tasks, *self._searches.tasks))

    # ---- staying connected

    def _contacts(self) -> int:
        return len(self._node.protocol.routing_table.peer_id_to_uid) if self._node is not None else 0

    async def _meet(self, peer_ids: Iterable[str]) -> None:
        """Ping peers into the routing table, then let the table fill from theirs."""
        node = self._node
        peers = [PeerID.from_base58(peer_id) for peer_id in peer_ids if peer_id != self._peer_id]
        for peer, answered in zip(peers, await asyncio.gather(*map(node.protocol.call_ping, peers)), strict=True):
            if answered is not None:
                node.blacklist.register_success(peer)
        await asyncio.sleep(0)  # call_ping updates the table in a task of its own
        if self._contacts():
            with contextlib.suppress(TimeoutError, P2PDaemonError, P2PHandlerError):
                async with asyncio.timeout(_LOOKUP_S):
                    await self._searches.run(node.find_nearest_nodes([node.node_id]))

    async def _watch(self) -> None:
        """Keep the routing table filled: at once when it is empty, now and then for known peers missing from it."""
        pause, rounds = self._watch_s, 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._alone.wait()
                    await asyncio.sleep(min(1.0, self._watch_s))
            self._alone.clear()
            rounds += 1
            try:
                met = {peer.to_base58() for peer in self._node.protocol.routing_table.peer_id_to_uid}
                if not met or rounds % 12 == 0:
                    missing = {peer: address for peer, address in self._known.items() if peer not in met}
                    await asyncio.gather(*map(self.connect, missing.values()), return_exceptions=True)
                    await self._meet({*missing, *await self.connected_peers()} - met)
                if met and rounds % 12 == 1:
                    self._learn({peer_id_in(address): address for address in await self.known_addresses()})
            except (TransportDown, P2PDaemonError) as error:
                log.warning("the network daemon does not answer: %s", error)
            pause = self._watch_s if self._contacts() else min(2 * pause, 60.0)

    def _learn(self, addresses: dict[str, str]) -> None:
        for peer, address in addresses.items():
            if peer != self._peer_id and (peer in self._known or len(self._known) < _MAX_KNOWN):
                self._known.setdefault(peer, address)

    async def _supervise(self) -> None:
        code = await self._p2p._child.wait()
        self._p2p.fail_calls()
        self._streams.abandon()  # the peer is gone as a whole: nobody is to find half of it alive
        if not self._closing:
            log.error("p2pd ended with exit status %s: this node is offline until it is started again", code)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _asked(self, request: p2pd_pb2.Request) -> p2pd_pb2.Response:
        try:
            return await self._control.request(request)
        except P2PDaemonError as error:
            raise TransportDown(f"p2pd refused a request: {error}") from error

    def _need_up(self) -> None:
        if not self.alive():
            raise TransportDown("p2pd is not running: start the node again")

    def _need_joined(self) -> Any:
        self._need_up()
        if self._node is None:
            raise TransportDown("this node has not joined the DHT: call join_dht first")
        return self._node


async def _stream_over(
    peer_id: str, remote: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> SocketStream:
    """Our stream over a socket that p2pd answers on. remote: where it is connected, a packed multiaddr."""
    sock, early = await taken_over(reader, writer)
    try:
        address = str(Multiaddr(remote)) if remote else ""
    except ValueError:
        address = ""
    return SocketStream(peer_id, BareSocket(peer_id, sock, early), remote=address)
