"""A direct TLS connection between two peers that are already connected through libp2p, as a faster road for files.

Everything that goes through p2pd is copied and encrypted in three processes; between two reachable peers one TLS
connection, from process to process, carries the same bytes at more than twice the speed
(docs/decisions/0006-direct-tls.md). It is agreed on over libp2p, which has proved both peer ids:

    client -> server   8 bytes   "PSWD" | version u16 = 1 | reserved u16 = 0       on a libp2p stream of DIRECT_PROTOCOL
    server -> client  72 bytes   "PSWD" | version u16 = 1 | port u16 (0: not now) | SHA-256 of a certificate | ticket
    client -> server  32 bytes   the ticket, inside TLS 1.3 to that port            once the certificate's digest agrees
    server -> client   8 bytes   "PSWD" | version u16 = 1 | reserved u16 = 0; from here on a file stream as any other

  R-TLS-1  the client dials the address at which libp2p is connected to the server, never one that it was told, and no
           port below LOWEST_PORT: behind one address may stand other people's services
  R-TLS-2  the certificate's digest comes over a channel that proved the server's peer id: nobody else can own its key.
           The ticket goes nowhere before that was checked
  R-TLS-3  a ticket is 32 random bytes, given to one peer id, good once and for TICKET_S: it proves who the client is
  R-TLS-4  without a ticket to redeem from that address a connection is closed unread: a scanner learns nothing but a
           port. At most PENDING connections shake hands at a time, PENDING_PER_HOST of them from one address, each for
           HANDSHAKE_S at most
  R-TLS-5  whatever fails, libp2p carries the stream, just as authentic; the peer is not tried directly for AVOID_S
           (RELAYED_S behind a relay, for libp2p may get past it)
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import socket
import ssl
import struct
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from paris_swarm.swarm.direct_tls import (
    Certificate,
    TlsChannel,
    client_context,
    ephemeral_certificate,
    server_context,
)
from paris_swarm.swarm.socket_stream import BareSocket, SocketStream
from paris_swarm.swarm.transport import Stream, StreamHandler, TransportError, Unreachable

log = logging.getLogger(__name__)

DIRECT_PROTOCOL = "/paris-swarm/direct/1"
"""The libp2p protocol on which a direct connection is agreed."""

TICKET_S = 15.0
TICKETS = 64
"""Tickets outstanding, in all."""
TICKETS_PER_PEER = 8
PENDING = 16
PENDING_PER_HOST = 4
LOWEST_PORT = 1024
HANDSHAKE_S = 5.0
DIAL_S = 3.0
AVOID_S = 300.0
RELAYED_S = 30.0
"""For how long a peer that libp2p reaches through a relay is not asked again for a direct connection."""

_HELLO = struct.Struct(">4sHH")
_OFFER = struct.Struct(">4sHH32s32s")
_MAGIC, _VERSION = b"PSWD", 1
_OPENING = _HELLO.pack(_MAGIC, _VERSION, 0)
_REMEMBERED = 256


def host_of(multiaddr: str) -> str | None:
    """The IP address of a multiaddr that leads straight to a host; None for relayed and other addresses (R-TLS-1)."""
    parts = multiaddr.split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6") or "p2p-circuit" in parts:
        return None
    try:
        return _plain(parts[2])
    except ValueError:
        return None


def _plain(address: str) -> str:
    """One spelling of an IP address, whichever family the socket that says it belongs to."""
    ip = ipaddress.ip_address(address)
    return str(ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else str(ip)


@dataclass(frozen=True)
class _Ticket:
    peer_id: str
    host: str
    until: float


class DirectStreams:
    """This node's direct connections, outgoing and (after ``listen``) incoming.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._client = client_context()
        self._certificate: Certificate | None = None
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._handler: StreamHandler | None = None
        self._tickets: dict[bytes, _Ticket] = {}
        self._avoided: dict[str, float] = {}
        self._pending: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._channels: weakref.WeakSet[TlsChannel] = weakref.WeakSet()

    # ---- serving

    async def listen(self, host: str, port: int, handler: StreamHandler) -> int:
        """Accept direct connections; each is handed to ``handler`` as a stream. Returns the port.

        Raises:
            OSError: the port is taken, or not ours to use.
            ValueError: no peer would dial this port (R-TLS-1).
        """
        if 0 < port < LOWEST_PORT:
            raise ValueError(f"port {port} is dialled by no peer: choose {LOWEST_PORT} to 65535, or 0 for any")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=PENDING)
        listener.setblocking(False)
        self._certificate = await asyncio.to_thread(ephemeral_certificate)
        context = await asyncio.to_thread(server_context, self._certificate)
        self._listener, self._handler = listener, handler
        self._accepting = asyncio.create_task(self._accept(listener, context))
        return int(listener.getsockname()[1])

    async def offer(self, stream: Stream, remote: str) -> None:
        """Answer one request for a direct connection, on a libp2p stream from ``remote``. Raises TransportError."""
        if await stream.read_exactly(_HELLO.size) != _OPENING:
            raise Unreachable(f"{stream.peer_id} does not speak {DIRECT_PROTOCOL}")
        port, digest, ticket = 0, bytes(32), bytes(32)
        host = host_of(remote)
        if self._listener is not None and self._certificate is not None and host is not None and self._has_room(stream):
            port, digest, ticket = self._listener.getsockname()[1], self._certificate.digest, secrets.token_bytes(32)
            self._tickets[ticket] = _Ticket(stream.peer_id, host, self._clock() + TICKET_S)
        await stream.write(_OFFER.pack(_MAGIC, _VERSION, port, digest, ticket))

    def _has_room(self, stream: Stream) -> bool:
        now = self._clock()
        self._tickets = {key: ticket for key, ticket in self._tickets.items() if ticket.until > now}
        held = Counter(ticket.peer_id for ticket in self._tickets.values())
        return held.total() < TICKETS and held[stream.peer_id] < TICKETS_PER_PEER

    def _expects(self, host: str) -> bool:
        now = self._clock()
        return any(ticket.host == host and ticket.until > now for ticket in self._tickets.values())

    async def _accept(self, listener: socket.socket, context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listener)
            except OSError as error:  # no descriptors left: those in use come back
                log.warning("cannot accept a direct connection: %s", error)
                await asyncio.sleep(1.0)
                continue
            host = _plain(address[0])
            full = self._pending.total() >= PENDING or self._pending[host] >= PENDING_PER_HOST
            if full or not self._expects(host):
                sock.close()
                continue
            self._pending[host] += 1
            task = asyncio.create_task(self._welcome(BareSocket(host, sock), host, context))
            self._tasks.add(task)
            task.add_done_callback(self._welcomed)

    def _welcomed(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the handler of a direct stream failed", exc_info=error)

    async def _welcome(self, bare: BareSocket, host: str, context: ssl.SSLContext) -> None:
        """From a fresh connection to a stream with a peer id."""
        channel: TlsChannel | None = None
        ticket: _Ticket | None = None
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                channel = await TlsChannel.accept(bare, context)
                shown = await SocketStream(host, channel).read_exactly(32)
                ticket = self._tickets.pop(shown, None)
                if ticket is None or ticket.until <= self._clock() or ticket.host != host:
                    raise Unreachable(f"{host} shows no valid ticket")
                await channel.send(_OPENING)
        except (TransportError, TimeoutError) as error:
            log.info("a direct connection from %s came to nothing: %s", host, error)
            bare.abort()
            return
        finally:
            self._pending[host] -= 1
            self._pending += Counter()  # drops addresses at 0
        self._channels.add(channel)
        stream = SocketStream(ticket.peer_id, channel)
        try:
            if self._handler is not None:
                await self._handler(ticket.peer_id, stream)
        finally:
            await stream.close()

    # ---- dialling

    def worth_trying(self, peer_id: str) -> bool:
        """False for a while after a direct connection to this peer did not come about."""
        return self._avoided.get(peer_id, 0.0) <= self._clock()

    def avoid(self, peer_id: str, seconds: float = AVOID_S) -> None:
        """Use libp2p for this peer for a while."""
        now = self._clock()
        self._avoided = {peer: until for peer, until in self._avoided.items() if until > now}
        if len(self._avoided) < _REMEMBERED:
            self._avoided[peer_id] = now + seconds

    async def dial(self, control: Stream, remote: str) -> Stream | None:
        """Ask for an offer on ``control``, a libp2p stream to ``remote``, and take it up; None: use libp2p."""
        if "p2p-circuit" in remote.split("/"):
            # libp2p may punch a hole at any time, and then it is connected to an address that can be tried.
            self.avoid(control.peer_id, RELAYED_S)
            return None
        try:
            async with asyncio.timeout(DIAL_S + HANDSHAKE_S):
                return await self._dial(control, remote)
        except (TransportError, OSError) as error:  # TimeoutError is an OSError
            log.info("no direct connection to %s, libp2p is used: %s", control.peer_id, error or "no answer in time")
            self.avoid(control.peer_id)
            return None

    async def _dial(self, control: Stream, remote: str) -> Stream:
        host = host_of(remote)
        if host is None:
            raise Unreachable(f"{remote or 'its address'} does not lead straight to it")
        await control.write(_OPENING)
        magic, version, port, digest, ticket = _OFFER.unpack(await control.read_exactly(_OFFER.size))
        if (magic, version) != (_MAGIC, _VERSION) or port == 0:
            raise Unreachable("it offers none now")
        if port < LOWEST_PORT:
            raise Unreachable(f"it names port {port}, which is not for peers")
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        bare = BareSocket(control.peer_id, sock)
        try:
            async with asyncio.timeout(DIAL_S):
                await asyncio.get_running_loop().sock_connect(sock, (host, port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            channel = await TlsChannel.connect(bare, self._client, digest)
            await channel.send(ticket)
            stream = SocketStream(control.peer_id, channel, remote=remote)
            if await stream.read_exactly(_HELLO.size) != _OPENING:
                raise Unreachable("it answers in another protocol")
            self._channels.add(channel)
            return stream
        except BaseException:
            bare.abort()
            raise

    # ---- the end

    def abandon(self) -> None:
        """Stop listening and cut every stream, incoming or outgoing: whoever reads or writes finds out."""
        if self._accepting is not None:
            self._accepting.cancel()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for channel in list(self._channels):
            channel.abort()

    async def close(self) -> None:
        """Abandon everything and end the handlers too; never raises, may be called twice."""
        self.abandon()
        tasks = [*self._tasks, *([self._accepting] if self._accepting is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
