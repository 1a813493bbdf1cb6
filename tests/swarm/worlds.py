"""Worlds to run the same scenario in: a network in memory, and real p2pd processes on loopback."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from paris_swarm.dht_schemas.errors import MalformedRecord
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.swarm.memory import MemoryNetwork, MemoryTransport

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T], *, limit_s: float = 90.0) -> T:
    """Run one scenario on a loop of its own. A scenario that hangs fails; one that leaves tasks behind fails too."""

    async def bounded() -> T:
        async with asyncio.timeout(limit_s):
            result = await work
        for _ in range(50):  # cancelled tasks and closing sockets need a few turns of the loop
            await asyncio.sleep(0.01)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            if not left:
                return result
            del left
            # hivemind's search forgets one `Event.wait()` a request and leaves it to the garbage collector
            # (traverse.py: `del await_finished_task`); what is still referenced after this is a leak.
            gc.collect()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        raise AssertionError(f"tasks left behind: {left}")

    return asyncio.run(bounded())


async def until(condition: Callable[[], Awaitable[bool]], *, limit_s: float = 30.0) -> None:
    """Wait for what has no event to wait for: asks again and again, and fails when it never comes true."""
    async with asyncio.timeout(limit_s):
        while not await condition():
            await asyncio.sleep(0.05)


def accept_ok(_dht_id: bytes, _subkey: str | None, value: object, _expiration: float) -> None:
    """A check for tests: bytes that begin with b"ok"."""
    if not isinstance(value, bytes) or not value.startswith(b"ok"):
        raise MalformedRecord("not ok")


class World:
    """Starts nodes, and ends every one of them at the end of the scenario."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[Any] = []

    async def __aenter__(self) -> World:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.gather(*(node.close() for node in self.nodes))

    async def start(self, addresses: Sequence[str], *, observer: bool) -> Any:
        raise NotImplementedError

    async def kill(self, node: Any) -> None:
        raise NotImplementedError

    async def node(
        self,
        *seeds: Any,
        addresses: Sequence[str] = (),
        observer: bool = False,
        check: Callable[..., object] | None = accept_ok,
    ) -> Any:
        """A node connected to ``seeds`` and ``addresses``, and joined to the DHT (unless ``check`` is None)."""
        dial = [address for seed in seeds for address in await seed.addresses()]
        node = await self.start([*addresses, *dial], observer=observer)
        self.nodes.append(node)
        if check is not None:
            await node.join_dht(check)
        return node

    async def nodes_in_line(self, count: int) -> list[Any]:
        """Each node knows only the first one."""
        first = await self.node()
        return [first, *[await self.node(first) for _ in range(count - 1)]]


class MemoryWorld(World):
    """In one process, in memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.network = MemoryNetwork(seed=0)

    async def start(self, addresses: Sequence[str], *, observer: bool) -> Any:
        return await MemoryTransport.start(self.network, Identity.generate().peer_id, addresses, observer=observer)

    async def kill(self, node: Any) -> None:
        self.network.kill(node.peer_id)


class HivemindWorld(World):
    """Real p2pd processes on loopback."""

    async def start(self, addresses: Sequence[str], *, observer: bool) -> Any:
        from paris_swarm.swarm.hivemind_transport import HivemindTransport

        path = self.folder / f"identity-{len(self.nodes)}"
        path.write_bytes(Identity.generate().to_protobuf())
        return await HivemindTransport.start(path, addresses, observer=observer, watch_s=0.5)

    async def kill(self, node: Any) -> None:
        os.kill(p2pd_pid(node), signal.SIGKILL)

        async def dead() -> bool:
            return not node.alive()

        await until(dead)


def p2pd_pid(node: Any) -> int:
    return int(node._p2p._child.pid)


def process_runs(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
