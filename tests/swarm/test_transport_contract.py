"""What every transport promises (swarm/transport.py), held against the in-memory one and real p2pd processes."""

from __future__ import annotations

import asyncio
import time

import pytest
from worlds import World, run, until

from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.invite import peer_id_in
from paris_swarm.swarm.transport import (
    NotHeld,
    PeerNotFound,
    Stream,
    StreamClosed,
    TransportDown,
    TransportError,
    Unreachable,
)


async def echo(_peer_id: str, stream: Stream) -> None:
    size = int.from_bytes(await stream.read_exactly(4), "big")
    await stream.write(await stream.read_exactly(size))


async def ask_echo(stream: Stream, data: bytes) -> bytes:
    try:
        await stream.write(len(data).to_bytes(4, "big") + data)
        return await stream.read_exactly(len(data))
    finally:
        await stream.close()


async def write_on_and_on(stream: Stream) -> None:
    while True:
        await stream.write(bytes(1 << 16))


# ---- records


def test_a_record_stored_by_one_node_is_read_by_every_other(world: World, soon: float) -> None:
    async def scenario() -> None:
        async with world:
            nodes = await world.nodes_in_line(3)
            assert await nodes[1].store("key", nodes[1].peer_id, b"ok 1", soon)
            for node in nodes:
                assert await node.get("key") == {nodes[1].peer_id: (b"ok 1", soon)}
            assert await nodes[0].get("another key") == {}

    run(scenario())


def test_alone_a_record_is_kept_but_not_called_stored_and_a_newcomer_gets_it(world: World, soon: float) -> None:
    async def scenario() -> None:
        async with world:
            first = await world.node()
            assert not await first.store("key", "me", b"ok", soon)
            assert await first.get("key") == {"me": (b"ok", soon)}
            second = await world.node(first)
            assert await second.get("key") == {"me": (b"ok", soon)}

    run(scenario())


def test_a_record_outlives_the_node_that_stored_it(world: World, soon: float) -> None:
    async def scenario() -> None:
        async with world:
            first, second, third = await world.nodes_in_line(3)
            assert await second.store("key", "second", b"ok", soon)
            await world.kill(second)
            assert await third.get("key") == {"second": (b"ok", soon)}
            assert await first.get("key") == {"second": (b"ok", soon)}

    run(scenario())


def test_records_of_many_signers_merge_and_the_newest_of_each_counts(world: World, soon: float) -> None:
    async def scenario() -> None:
        async with world:
            nodes = await world.nodes_in_line(3)
            for node in nodes:
                await node.store("key", node.peer_id, b"ok old", soon)
            assert await nodes[2].store("key", nodes[2].peer_id, b"ok new", soon + 1)
            assert not await nodes[2].store("key", nodes[2].peer_id, b"ok other", soon + 1), "the first one stays"
            assert await nodes[2].store("key", nodes[2].peer_id, b"ok new", soon + 1), "the same bytes again are fine"
            await nodes[2].store("key", nodes[2].peer_id, b"ok older", soon - 30)
            expected = {node.peer_id: (b"ok old", soon) for node in nodes[:2]}
            expected[nodes[2].peer_id] = (b"ok new", soon + 1)
            for node in nodes:
                assert await node.get("key") == expected

    run(scenario())


def test_a_record_is_gone_when_its_lease_ends(world: World) -> None:
    async def scenario() -> None:
        async with world:
            first, second = await world.nodes_in_line(2)
            end = time.time() + 1.0
            assert await first.store("key", "me", b"ok", end)
            assert not await first.store("key", "late", b"ok", time.time() - 1.0)

            async def gone() -> bool:
                return await second.get("key") == {}

            await until(gone)
            assert time.time() >= end

    run(scenario())


def test_what_the_check_refuses_is_neither_stored_nor_read(world: World, soon: float) -> None:
    async def scenario() -> None:
        async with world:
            strict = await world.node()
            lax = await world.node(strict, check=lambda *_: None)
            assert not await strict.store("key", "strict", b"junk", soon), "its own check"
            assert not await lax.store("key", "lax", b"junk", soon), "the strict node's check"
            assert await strict.store("key", "strict", b"ok", soon)
            assert await strict.get("key") == {"strict": (b"ok", soon)}, "the junk is left out, not all of it"
            assert set(await lax.get("key")) == {"strict", "lax"}

    run(scenario())


def test_a_check_that_fails_in_any_other_way_refuses_too(world: World, soon: float) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async def scenario() -> None:
        async with world:
            first = await world.node(check=broken)
            second = await world.node(first)
            assert not await second.store("key", "me", b"ok", soon)
            assert await first.get("key") == {}

    run(scenario())


def test_records_need_the_dht(world: World, soon: float) -> None:
    async def scenario() -> None:
        async with world:
            node = await world.node(check=None)
            with pytest.raises(TransportDown, match="join_dht"):
                await node.store("key", "me", b"ok", soon)
            with pytest.raises(TransportDown, match="join_dht"):
                await node.get("key")

    run(scenario())


def test_an_observer_reads_and_publishes_but_keeps_nothing(world: World, soon: float) -> None:
    async def scenario() -> None:
        async with world:
            first = await world.node()
            await first.store("key", "first", b"ok", soon)
            observer = await world.node(first, observer=True)
            assert await observer.addresses() == []
            assert await observer.get("key") == {"first": (b"ok", soon)}
            assert await observer.store("key", "observer", b"ok too", soon)
            assert set(await first.get("key")) == {"first", "observer"}
            await world.kill(first)
            assert await observer.get("key") == {}

    run(scenario())


def test_clocks_of_one_machine_agree(world: World) -> None:
    async def scenario() -> None:
        async with world:
            _first, second = await world.nodes_in_line(2)
            offset = await second.clock_offset()
            assert offset is not None
            assert abs(offset) < 1.0
            alone = await world.node()
            assert await alone.clock_offset() is None

    run(scenario())


# ---- streams


def test_a_stream_carries_bytes_both_ways_before_any_dht(world: World) -> None:
    async def scenario() -> None:
        async with world:
            server = await world.node(check=None)
            server.serve(echo)
            client = await world.node(server, check=None)
            data = bytes(range(256)) * 4096 * 3
            stream = await client.open_stream(server.peer_id)
            assert stream.peer_id == server.peer_id
            assert await ask_echo(stream, data) == data

    run(scenario())


def test_the_server_knows_who_asks(world: World) -> None:
    async def scenario() -> None:
        async with world:
            seen: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

            async def note(peer_id: str, stream: Stream) -> None:
                await seen.put((peer_id, stream.peer_id))
                await echo(peer_id, stream)

            server = await world.node(check=None)
            server.serve(note)
            client = await world.node(server, observer=True, check=None)
            await ask_echo(await client.open_stream(server.peer_id), b"hello")
            assert await seen.get() == (client.peer_id, client.peer_id)

    run(scenario())


def test_a_peer_is_found_by_its_id_alone(world: World) -> None:
    async def scenario() -> None:
        async with world:
            _seed, one, other = await world.nodes_in_line(3)
            other.serve(echo)
            assert await ask_echo(await one.open_stream(other.peer_id), b"hello") == b"hello"

    run(scenario())


def test_a_peer_nobody_knows_is_dialled_at_a_given_address(world: World) -> None:
    async def scenario() -> None:
        async with world:
            server = await world.node(check=None)
            server.serve(echo)
            client = await world.node(check=None)
            with pytest.raises(PeerNotFound):
                await client.open_stream(server.peer_id)
            stream = await client.open_stream(server.peer_id, addresses=await server.addresses())
            assert await ask_echo(stream, b"hello") == b"hello"

    run(scenario())


def test_a_handler_that_returns_early_ends_the_stream(world: World) -> None:
    async def scenario() -> None:
        async with world:

            async def short(_peer_id: str, stream: Stream) -> None:
                await stream.write(b"four")

            server = await world.node(check=None)
            server.serve(short)
            client = await world.node(server, check=None)
            stream = await client.open_stream(server.peer_id)
            with pytest.raises(StreamClosed):
                await stream.read_exactly(5)
            await stream.close()
            await stream.close()

    run(scenario())


def test_a_peer_without_a_handler_ends_the_stream_and_an_observer_has_none(world: World) -> None:
    async def scenario() -> None:
        async with world:
            seed = await world.node(check=None)
            client = await world.node(seed, check=None)
            stream = await client.open_stream(seed.peer_id)
            with pytest.raises(StreamClosed):
                await stream.read_exactly(1)
            await stream.close()
            observer = await world.node(seed, observer=True, check=None)
            with pytest.raises(NotHeld):
                await seed.open_stream(observer.peer_id)

    run(scenario())


def test_both_ends_notice_when_the_other_node_dies(world: World) -> None:
    async def scenario() -> None:
        async with world:
            waiting: asyncio.Event = asyncio.Event()
            ended: asyncio.Queue[Exception] = asyncio.Queue()

            async def wait(_peer_id: str, stream: Stream) -> None:
                waiting.set()
                try:
                    await stream.read_exactly(1 << 20)
                except StreamClosed as error:
                    await ended.put(error)

            server = await world.node(check=None)
            server.serve(wait)
            client = await world.node(server, check=None)
            stream = await client.open_stream(server.peer_id)
            await stream.write(b"x")
            await waiting.wait()
            await world.kill(server)
            assert isinstance(await ended.get(), StreamClosed)
            with pytest.raises(StreamClosed):
                await stream.read_exactly(1)
            with pytest.raises(StreamClosed):
                await write_on_and_on(stream)
            await stream.close()

    run(scenario())


# ---- peers


def test_addresses_name_their_node_and_cached_ones_can_be_dialled(world: World) -> None:
    async def scenario() -> None:
        async with world:
            first, second = await world.nodes_in_line(2)
            for node in (first, second):
                assert {peer_id_in(address) for address in await node.addresses()} == {node.peer_id}
            assert await first.connected_peers() == [second.peer_id]
            cached = await first.known_addresses()
            assert [peer_id_in(address) for address in cached] == [second.peer_id]
            newcomer = await world.node()
            assert await newcomer.connect(cached[0]) == second.peer_id
            assert second.peer_id in await newcomer.connected_peers()

    run(scenario())


def test_dialling_says_who_did_not_answer(world: World) -> None:
    async def scenario() -> None:
        async with world:
            first, second = await world.nodes_in_line(2)
            address = (await first.addresses())[0]
            head = address.rpartition("/p2p/")[0]
            with pytest.raises(Unreachable):
                await second.connect(f"{head}/p2p/{Identity.generate().peer_id}")
            await world.kill(first)
            with pytest.raises(Unreachable, match=first.peer_id):
                await second.connect(address)
            with pytest.raises(ValueError, match="p2p"):
                await second.connect("/ip4/127.0.0.1/tcp/1")
            with pytest.raises(TransportError):
                await second.open_stream(first.peer_id)

    run(scenario())


def test_a_dead_seed_does_not_stop_a_start(world: World, soon: float) -> None:
    async def scenario() -> None:
        async with world:
            first, dead = await world.nodes_in_line(2)
            await first.store("key", "first", b"ok", soon)
            addresses = [*await dead.addresses(), *await first.addresses()]
            await world.kill(dead)
            newcomer = await world.node(addresses=addresses)
            assert await newcomer.get("key") == {"first": (b"ok", soon)}
            lonely = await world.node(addresses=addresses[:1])
            assert await lonely.get("key") == {}

    run(scenario())


def test_a_node_that_died_or_was_closed_says_so(world: World, soon: float) -> None:
    async def scenario() -> None:
        async with world:
            first, second = await world.nodes_in_line(2)
            assert first.alive()
            assert second.alive()
            await world.kill(first)
            await second.close()
            await second.close()
            for node in (first, second):
                assert not node.alive()
                for call in (
                    node.get("key"),
                    node.store("key", "me", b"ok", soon),
                    node.open_stream(second.peer_id),
                    node.connected_peers(),
                    node.addresses(),
                ):
                    with pytest.raises(TransportDown):
                        await call

    run(scenario())
