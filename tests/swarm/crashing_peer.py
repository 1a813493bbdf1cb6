"""A peer that is killed between any two of its steps: what it had sent by then stands in a log.

Run as a program: reads one JSON case a line, forks a peer for it, and answers how that peer ended. A real process dies,
by SIGKILL, with its real ledger on a real disk; only the network is a file. The clock stands still, so that nothing but
the ledger keeps one sequence from being used twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from closed_world import PROGRESS, closed_plan

from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.swarm.home import Home, SwarmHome
from paris_swarm.swarm.ledger import Ledger
from paris_swarm.swarm.memory import MemoryNetwork, MemoryTransport
from paris_swarm.swarm.node import SwarmNode

NOW = 1_900_000_000.0
PLAN = closed_plan(admission="open")


class Steps:
    """Counts what a peer does, and kills it at the step it was told."""

    def __init__(self, fatal: int) -> None:
        self.fatal = fatal
        self.done = 0

    def __call__(self) -> None:
        self.done += 1
        if self.done == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


class LoggedTransport(MemoryTransport):
    """Sending is appending to a file, fsynced; a step lies before and after each."""

    log: Path
    steps: Steps
    settled: asyncio.Event

    async def store(self, key: str, subkey: str, value: bytes, until: float) -> bool:
        self.steps()
        with open(self.log, "ab") as log:
            log.write(value + b"\n")
            log.flush()
            os.fsync(log.fileno())
        self.steps()
        return True

    async def known_addresses(self) -> list[str]:
        self.settled.set()  # a node asks for them after it has sent again what it had signed
        return await super().known_addresses()


async def live(home_path: Path, log: Path, action: str, number: int, steps: Steps) -> None:
    """One life: come back, then claim or announce once; ``number`` makes every life's statement another."""
    home = Home(home_path)
    identity = home.identity()
    record, hold = Ledger.record, SwarmHome.hold

    def recording(self: Ledger, *arguments: Any) -> None:
        steps()
        record(self, *arguments)
        steps()

    def holding(self: SwarmHome, *arguments: Any) -> None:
        hold(self, *arguments)
        steps()

    Ledger.record, SwarmHome.hold = recording, holding  # type: ignore[method-assign]
    transport = LoggedTransport(MemoryNetwork(clock=lambda: NOW), identity.peer_id)
    transport.log, transport.steps, transport.settled = log, steps, asyncio.Event()
    node = SwarmNode(home, identity, transport, PLAN, clock=lambda: NOW)
    await node.join()
    await transport.settled.wait()
    if action == "claim":
        await node.publish_claim("0", PROGRESS.model_copy(update={"step": number}))
    else:
        folder = home_path / f"checkpoint-{number}"
        folder.mkdir(exist_ok=True)
        (folder / "state.json").write_text(f'{{"step": {number}}}')
        manifest, data, root = build_manifest(folder, ["state.json"], "0", meta={"step": number, "parent": None})
        node.store.put_folder(data, folder)
        await node.announce(
            "0", step=number, root=root, parent=None, total_bytes=manifest.total_bytes, probe_loss=1.0 / number
        )
    await node.close()


def main() -> None:
    for line in sys.stdin:
        case = json.loads(line)
        child = os.fork()
        if child == 0:
            steps = Steps(case["fatal"])
            asyncio.run(live(Path(case["home"]), Path(case["log"]), case["action"], case["number"], steps))
            os._exit(0)
        _pid, status = os.waitpid(child, 0)
        answer = {"killed": os.WIFSIGNALED(status), "code": os.waitstatus_to_exitcode(status)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
