"""A daemon that dies is started again in place: same peer, same port, same handler, same records; not for ever."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from worlds import MemoryWorld, accept_ok, p2pd_pid, run, until

from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.swarm.memory import MemoryTransport
from paris_swarm.swarm.restarting import RestartingTransport
from paris_swarm.swarm.transport import Stream, StreamClosed, Transport, TransportDown


async def echo(_peer: str, stream: Stream) -> None:
    while True:
        await stream.write(await stream.read_exactly(1))


def test_a_dead_daemon_comes_back_with_its_handler_and_its_validator(memory_world: MemoryWorld, soon: float) -> None:
    async def scenario() -> None:
        async with memory_world as world:
            other = await world.node()
            asked: list[tuple[int | None, Sequence[str]]] = []

            async def launch(port: int | None, seeds: Sequence[str]) -> Transport:
                asked.append((port, list(seeds)))
                return await MemoryTransport.start(world.network, "me", [*await other.addresses(), *seeds])

            node = await RestartingTransport.start(launch, check_every_s=0.01)
            world.nodes.append(node)
            node.serve(echo)
            await node.join_dht(accept_ok)
            await node.connect((await other.addresses())[0])
            first_port = int((await node.addresses())[0].split("/")[4])
            stream = await other.open_stream("me")
            world.network.kill("me")
            with pytest.raises(StreamClosed):
                await stream.read_exactly(1)
            assert node.alive(), "it is coming back"

            async def back() -> bool:
                return node.restarts == 1

            await until(back)
            assert asked == [(None, []), (first_port, await other.addresses())]
            stream = await other.open_stream("me")
            await stream.write(b"x")
            assert await stream.read_exactly(1) == b"x"
            await stream.close()
            assert await node.store("key", "me", b"ok", soon)
            assert not await node.store("key", "me", b"no", soon), "the validator is the same"

    run(scenario())


def test_a_daemon_that_does_not_last_is_given_up(memory_world: MemoryWorld) -> None:
    async def scenario() -> None:
        async with memory_world as world:
            starts = 0

            async def launch(_port: int | None, _seeds: Sequence[str]) -> Transport:
                nonlocal starts
                starts += 1
                if starts == 3:
                    raise TransportDown("p2pd did not start")
                return await MemoryTransport.start(world.network, "me")

            node = await RestartingTransport.start(launch, attempts=3, check_every_s=0.001, backoff_s=0.001)
            world.nodes.append(node)

            async def over() -> bool:
                if world.network._nodes["me"].alive():
                    world.network.kill("me")
                return not node.alive()

            await until(over)
            assert starts == 1 + 3
            with pytest.raises(TransportDown):
                await node.connected_peers()

    run(scenario())


def test_the_first_start_is_not_tried_again() -> None:
    async def launch(_port: int | None, _seeds: Sequence[str]) -> Transport:
        raise TransportDown("p2pd did not start")

    async def scenario() -> None:
        with pytest.raises(TransportDown, match="did not start"):
            await RestartingTransport.start(launch)

    asyncio.run(scenario())


def test_a_killed_p2pd_comes_back_on_its_port_as_the_same_peer(tmp_path: Path, soon: float) -> None:
    from paris_swarm.swarm.hivemind_transport import HivemindTransport

    async def scenario() -> None:
        (tmp_path / "a").write_bytes(Identity.generate().to_protobuf())
        (tmp_path / "b").write_bytes(Identity.generate().to_protobuf())
        other = await HivemindTransport.start(tmp_path / "a", watch_s=0.5)
        inner: list[Any] = []

        async def launch(port: int | None, seeds: Sequence[str]) -> Transport:
            listen = f"/ip4/127.0.0.1/tcp/{port or 0}"
            inner.append(
                await HivemindTransport.start(tmp_path / "b", [*await other.addresses(), *seeds], listen=listen)
            )
            return inner[-1]  # type: ignore[no-any-return]

        node = await RestartingTransport.start(launch, check_every_s=0.05)
        try:
            await other.join_dht(accept_ok)
            await node.join_dht(accept_ok)
            node.serve(echo)
            peer_id, addresses = node.peer_id, await node.addresses()
            os.kill(p2pd_pid(inner[0]), signal.SIGKILL)

            async def back() -> bool:
                return node.restarts == 1

            await until(back)
            assert (node.peer_id, await node.addresses()) == (peer_id, addresses)
            stream = await other.open_stream(peer_id, addresses=addresses)
            await stream.write(b"x")
            assert await stream.read_exactly(1) == b"x"
            await stream.close()
            assert await node.store("key", peer_id, b"ok", soon)
            assert await other.get("key") == {peer_id: (b"ok", soon)}
        finally:
            await node.close()
            await other.close()

    run(scenario())
