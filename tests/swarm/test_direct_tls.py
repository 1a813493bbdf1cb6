"""The direct connection: only the peer that libp2p proved gets one, and whatever goes wrong, libp2p is used instead."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.swarm import direct
from paris_swarm.swarm.direct import DirectStreams, host_of
from paris_swarm.swarm.direct_tls import TlsChannel, client_context, ephemeral_certificate, server_context
from paris_swarm.swarm.hivemind_transport import HivemindTransport
from paris_swarm.swarm.socket_stream import BareSocket, SocketStream
from paris_swarm.swarm.transport import Stream, StreamClosed, TransportDown, Unreachable

LOCAL = "/ip4/127.0.0.1/tcp/4001"
DATA = os.urandom(1_300_007)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(bounded())


def pair(one: str = "client", other: str = "server") -> tuple[SocketStream, SocketStream]:
    """Two ends of a stream that libp2p would have authenticated: each knows who the other is."""
    ours, theirs = socket.socketpair()
    return SocketStream(other, BareSocket(other, ours)), SocketStream(one, BareSocket(one, theirs))


async def echo(_peer_id: str, stream: Stream) -> None:
    size = int.from_bytes(await stream.read_exactly(4), "big")
    await stream.write(await stream.read_exactly(size))


async def ask(stream: Stream, data: bytes = DATA) -> bytes:
    writing = asyncio.create_task(stream.write(len(data).to_bytes(4, "big") + data))
    try:
        return await stream.read_exactly(len(data))
    finally:
        await writing


@asynccontextmanager
async def server(handler: Any = echo, *, clock: Callable[[], float] | None = None) -> AsyncIterator[DirectStreams]:
    streams = DirectStreams(clock=clock) if clock else DirectStreams()
    await streams.listen("127.0.0.1", 0, handler)
    try:
        yield streams
    finally:
        await streams.close()


async def dialled(
    client: DirectStreams, to: DirectStreams, *, remote: str = LOCAL, change: Callable[[bytes], bytes] = bytes
) -> Stream | None:
    """What a client gets; ``change`` is what happens to the server's offer on the way."""
    control, far = pair()
    relay, end = pair()

    async def offer() -> None:
        await to.offer(far, LOCAL)

    async def meddle() -> None:
        await control.write(await end.read_exactly(8))
        await end.write(change(await control.read_exactly(72)))

    _none, stream = await asyncio.gather(asyncio.gather(offer(), meddle()), client.dial(relay, remote))
    return stream


# ---- what works


def test_bytes_go_both_ways_and_both_ends_know_whom_they_talk_to() -> None:
    async def scenario() -> None:
        seen: list[str] = []

        async def handler(peer_id: str, stream: Stream) -> None:
            seen.extend((peer_id, stream.peer_id))
            await echo(peer_id, stream)

        async with server(handler) as there:
            stream = await dialled(DirectStreams(), there)
            assert stream is not None
            assert stream.peer_id == "server"
            assert await ask(stream) == DATA
            await stream.close()
            await stream.close()
            with pytest.raises(StreamClosed):
                await stream.read_exactly(1)
            assert seen == ["client", "client"]

    run(scenario)


def test_an_end_and_a_cut_both_end_the_stream() -> None:
    async def scenario() -> None:
        context, certificate = None, ephemeral_certificate()
        context = server_context(certificate)
        for say_goodbye in (True, False):
            ours, theirs = socket.socketpair()
            accepting = asyncio.create_task(TlsChannel.accept(BareSocket("client", theirs), context))
            channel = await TlsChannel.connect(BareSocket("server", ours), client_context(), certificate.digest)
            far = await accepting
            await far.send(b"half of it")
            if say_goodbye:
                await far.close()
            else:
                far.abort()
            buffer = memoryview(bytearray(100))
            assert await channel.receive(buffer) == 10
            if say_goodbye:
                assert await channel.receive(buffer) == 0
            else:
                with pytest.raises(StreamClosed, match="cut"):
                    await channel.receive(buffer)
            with pytest.raises(StreamClosed):
                await SocketStream("server", channel).read_exactly(1)
            await channel.close()

    run(scenario)


# ---- who is refused


def test_another_certificate_gets_no_ticket() -> None:
    """R-TLS-2: somebody between the peers, or behind the same port, shows a certificate of their own."""

    async def scenario() -> None:
        async with server() as there:
            client = DirectStreams()
            wrong = hashlib.sha256(b"of another key").digest()
            stream = await dialled(client, there, change=lambda offer: offer[:8] + wrong + offer[40:])
            assert stream is None
            assert not client.worth_trying("server")
            assert len(there._tickets) == 1, "the ticket was not redeemed: it never left"

    run(scenario)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2])
def test_older_tls_is_refused(version: ssl.TLSVersion) -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        certificate = ephemeral_certificate()
        old = client_context()
        old.minimum_version, old.maximum_version = version, version
        accepting = asyncio.create_task(TlsChannel.accept(BareSocket("client", theirs), server_context(certificate)))
        with pytest.raises(StreamClosed):
            await TlsChannel.connect(BareSocket("server", ours), old, certificate.digest)
        with pytest.raises(StreamClosed):
            await accepting

    run(scenario)


async def knock(there: DirectStreams, ticket: bytes) -> bytes:
    """What a connection with this ticket is answered: b"" when it is closed."""
    listener, certificate = there._listener, there._certificate
    assert listener is not None
    assert certificate is not None
    sock = socket.create_connection(listener.getsockname())
    bare = BareSocket("server", sock)
    try:
        channel = await TlsChannel.connect(bare, client_context(), certificate.digest)
        await channel.send(ticket)
        return await SocketStream("server", channel).read_exactly(8)
    except StreamClosed:
        return b""
    finally:
        bare.abort()


async def offered(there: DirectStreams, peer: str = "client") -> bytes:
    """A ticket for ``peer``; b"" when there is none to be had."""
    near, far = pair(peer)
    await near.write(direct._OPENING)
    await there.offer(far, LOCAL)
    offer = await near.read_exactly(72)
    return offer[40:] if any(offer[6:8]) else b""


def test_a_ticket_is_good_once_and_not_for_ever() -> None:
    """R-TLS-3"""

    async def scenario() -> None:
        now = [0.0]
        async with server(clock=lambda: now[0]) as there:
            ticket, spare = await offered(there), await offered(there)
            assert await knock(there, os.urandom(32)) == b""
            assert await knock(there, ticket) == direct._OPENING
            assert await knock(there, ticket) == b"", "a replay"
            now[0] += direct.TICKET_S
            assert await knock(there, spare) == b""
            fresh = await offered(there)
            assert await knock(there, fresh) == direct._OPENING

    run(scenario)


def test_nobody_is_answered_while_nobody_is_expected() -> None:
    """R-TLS-4: a scanner finds a port that closes, and neither certificate nor protocol."""

    async def scenario() -> None:
        async with server() as there:
            assert there._listener is not None
            reader, writer = await asyncio.open_connection(*there._listener.getsockname())
            assert await reader.read() == b""
            writer.close()

    run(scenario)


def test_tickets_are_counted() -> None:
    async def scenario() -> None:
        async with server() as there:
            first = [await offered(there, "greedy") for _ in range(direct.TICKETS_PER_PEER + 1)]
            assert [bool(ticket) for ticket in first] == [True] * direct.TICKETS_PER_PEER + [False]
            assert await offered(there, "modest")
            for number in range(direct.TICKETS):
                await offered(there, f"peer {number}")
            assert len(there._tickets) == direct.TICKETS

    run(scenario)


def test_silent_connections_hold_a_place_only_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """R-TLS-4: slow loris. The places are few, freed by time, and a peer with a ticket gets through afterwards."""
    monkeypatch.setattr(direct, "HANDSHAKE_S", 0.3)
    monkeypatch.setattr(direct, "PENDING", 2)

    async def scenario() -> None:
        async with server() as there:
            assert there._listener is not None
            ticket = await offered(there)
            silent = [await asyncio.open_connection(*there._listener.getsockname()) for _ in range(3)]
            ended = await asyncio.gather(*(reader.read() for reader, _writer in silent))
            assert ended == [b""] * 3
            for _reader, writer in silent:
                writer.close()
            assert await knock(there, ticket) == direct._OPENING

    run(scenario)


def test_one_address_cannot_take_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """R-TLS-4: of the places for handshakes one host gets a few; what it opens beyond them is closed at once."""
    monkeypatch.setattr(direct, "PENDING_PER_HOST", 2)

    async def scenario() -> None:
        async with server() as there:
            assert there._listener is not None
            await offered(there)
            address = there._listener.getsockname()
            silent = [await asyncio.open_connection(*address) for _ in range(2)]
            reader, writer = await asyncio.open_connection(*address)
            assert await reader.read() == b""
            assert there._pending == {"127.0.0.1": 2}
            for _reader, held in [*silent, (reader, writer)]:
                held.close()

    run(scenario)


# ---- falling back


def test_a_port_that_is_not_for_peers_is_not_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    """R-TLS-1: the offer names a port where something listens, but too low a one."""
    monkeypatch.setattr(direct, "LOWEST_PORT", 65_536)

    async def scenario() -> None:
        async with server() as there:
            assert await dialled(DirectStreams(), there) is None
            assert len(there._tickets) == 1, "nobody came to redeem it"

    run(scenario)


def test_a_port_that_nobody_dials_is_not_listened_on() -> None:
    """R-TLS-1: a peer that named it would wait for connections that never come."""

    async def scenario() -> None:
        with pytest.raises(ValueError, match=r"port 1023 .*1024 to 65535"):
            await DirectStreams().listen("127.0.0.1", 1023, echo)

    run(scenario)


def test_only_the_address_that_libp2p_is_connected_to_is_dialled() -> None:
    """R-TLS-1"""
    assert host_of("/ip4/10.1.2.3/tcp/99") == "10.1.2.3"
    assert host_of("/ip6/0:0::1/udp/9/quic-v1") == "::1"
    assert host_of("/ip6/::ffff:10.1.2.3/tcp/99") == "10.1.2.3"
    assert host_of("/ip4/10.1.2.3/tcp/99/p2p/12D3KooX/p2p-circuit") is None
    assert host_of("/dns4/example.org/tcp/99") is None
    assert host_of("/ip4/not-an-address/tcp/99") is None
    assert host_of("") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda offer: offer[:6] + b"\0\0" + offer[8:],
        lambda offer: b"JUNK" + offer[4:],
        lambda offer: offer[:4] + b"\0\x09" + offer[6:],
        lambda offer: offer[:40] + bytes(32),
    ],
    ids=["none now", "junk", "a later version", "no ticket"],
)
def test_whatever_is_offered_the_answer_is_a_stream_or_none(change: Callable[[bytes], bytes]) -> None:
    async def scenario() -> None:
        async with server() as there:
            assert await dialled(DirectStreams(), there, change=change) is None

    run(scenario)


def test_a_relayed_peer_is_asked_again_before_long_for_the_relay_may_be_got_past() -> None:
    async def scenario() -> None:
        now = [0.0]
        client = DirectStreams(clock=lambda: now[0])
        control, _far = pair()
        remote = "/ip4/203.0.113.5/tcp/4001/p2p/12D3KooWGRUfpYrPHmyPAhKDy9XGhpEwwWc3aPUTmGRSvk8Wa2qs/p2p-circuit"
        assert await client.dial(control, remote) is None
        assert not client.worth_trying("server")
        now[0] = direct.RELAYED_S
        assert client.worth_trying("server")

    run(scenario)


def test_a_handler_that_fails_ends_its_stream_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        unseen: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unseen.append(context))

        async def broken(_peer_id: str, _stream: Stream) -> None:
            raise KeyError("no such thing")

        async with server(broken) as there:
            stream = await dialled(DirectStreams(), there)
            assert stream is not None
            with pytest.raises(StreamClosed):
                await stream.read_exactly(1)
            await stream.close()
        gc.collect()
        assert unseen == [], "nobody looked at what the handler raised"

    run(scenario)
    assert "no such thing" in caplog.text


def test_a_port_nobody_listens_on_is_left_alone_for_a_while() -> None:
    """R-TLS-5"""

    async def scenario() -> None:
        now = [0.0]
        client = DirectStreams(clock=lambda: now[0])
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1].to_bytes(2, "big")
        async with server() as there:
            stream = await dialled(client, there, change=lambda offer: offer[:6] + port + offer[8:])
            assert stream is None
            assert not client.worth_trying("server")
            assert client.worth_trying("another")
            now[0] += direct.AVOID_S
            assert client.worth_trying("server")

    run(scenario)


def test_the_own_key_and_the_certificate_have_nothing_in_common() -> None:
    one, other = ephemeral_certificate(), ephemeral_certificate()
    assert one.digest != other.digest
    assert b"PRIVATE" not in repr(one).encode()
    with pytest.raises(Unreachable):
        run(lambda: _connect_to(one.digest, server_context(other)))


async def _connect_to(digest: bytes, context: ssl.SSLContext) -> None:
    ours, theirs = socket.socketpair()
    accepting = asyncio.create_task(TlsChannel.accept(BareSocket("client", theirs), context))
    try:
        await TlsChannel.connect(BareSocket("server", ours), client_context(), digest)
    finally:
        await asyncio.gather(accepting, return_exceptions=True)


# ---- on real nodes


@asynccontextmanager
async def node(folder: Path, name: str, **options: Any) -> AsyncIterator[HivemindTransport]:
    key = folder / name
    key.write_bytes(Identity.generate().to_protobuf())
    transport = await HivemindTransport.start(key, **options)
    try:
        yield transport
    finally:
        await transport.close()


def direct_streams(transport: HivemindTransport) -> int:
    assert transport._streams._direct is not None
    return len(transport._streams._direct._channels)


def test_real_nodes_go_direct_when_both_want_to(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with node(tmp_path, "there") as there, node(tmp_path, "off", direct=False) as off:
            for end in (there, off):
                end.serve(echo)
            async with node(tmp_path, "here") as here:
                address, other = (await there.addresses())[0], (await off.addresses())[0]
                stream = await here.open_stream(await here.connect(address))
                assert await ask(stream) == DATA
                assert direct_streams(here) == 1
                await stream.close()
                # A peer that offers none, and one that wants none, are served through libp2p all the same.
                for one, to in ((here, other), (off, address)):
                    stream = await one.open_stream(await one.connect(to))
                    assert await ask(stream) == DATA
                    await stream.close()
                assert direct_streams(here) <= 1

    run(scenario)


def test_a_port_that_was_asked_for_and_is_taken_is_said(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            key = tmp_path / "here"
            key.write_bytes(Identity.generate().to_protobuf())
            with pytest.raises(TransportDown, match="for direct connections cannot be used"):
                await HivemindTransport.start(key, direct_port=taken.getsockname()[1])

    run(scenario)
