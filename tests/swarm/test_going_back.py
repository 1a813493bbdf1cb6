"""A peer whose disk kept only an older checkpoint does not announce what lies behind its newest (SPEC.md, R-REC-14)."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_peer_life import FILES, make_plan
from worlds import run

from paris_swarm.dht_schemas.errors import ProbeFailed
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.lane_state import RunningLane
from paris_swarm.swarm.memory import MemoryNetwork, MemoryTransport
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.slot_training import SlotTraining
from paris_swarm.swarm.trainer import Purpose, TrainedCheckpoint, TrainerEvent
from paris_swarm.swarm.verified import VerifiedCheckpoints

Before = Callable[[int], Awaitable[None]]
"""Told the step that the trainer reports next."""


def weights(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        save_file({"w": np.array([step, 0], dtype=np.float32)}, folder / name)
    return folder


class Steps:
    """A trainer that reports a checkpoint at each of some steps, those up to where it started left out."""

    def __init__(self, work: Path, done: int, steps: list[int], before: Before | None) -> None:
        self._work, self._left, self._before = work, [step for step in steps if step > done], before

    async def events(self) -> AsyncIterator[TrainerEvent]:
        while self._left:
            step = self._left.pop(0)
            if self._before is not None:
                await self._before(step)
            yield TrainedCheckpoint(step, weights(self._work / f"step-{step}", step), FILES, 1.0 / step)

    async def stop(self) -> None:
        self._left.clear()


@dataclass
class World:
    """Alice, who announced steps 10 and 20; bob, who keeps a copy of 20; alice again, with an older one on her disk."""

    folder: Path
    ahead_s: float = 0.0
    started: list[tuple[int, str | None]] = field(default_factory=list)
    """Step and parent of each trainer that alice started."""
    false: int = -1
    """A step whose weights do not hold."""
    roots: dict[int, str] = field(default_factory=dict)
    nodes: list[SwarmNode] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network = MemoryNetwork(seed=0, clock=self.now)

    def now(self) -> float:
        return time.time() + self.ahead_s

    async def node(self, name: str) -> SwarmNode:
        home = Home(self.folder / name)
        identity = home.identity()
        seeds = [address for node in self.nodes for address in await node.transport.addresses()]
        transport = await MemoryTransport.start(self.network, identity.peer_id, seeds=seeds)
        node = SwarmNode(home, identity, transport, make_plan(lease_s=600.0), clock=self.now)
        await node.join()
        self.nodes.append(node)
        return node

    async def begin(self) -> SwarmNode:
        bob, alice = await self.node("bob"), await self.node("alice")
        parent = None
        for step in (10, 20):
            made = weights(self.folder / f"made-{step}", step)
            manifest, data, root = build_manifest(made, FILES, "0", meta={"step": step, "parent": parent})
            alice.store.put_folder(data, made)
            size = manifest.total_bytes
            await alice.announce("0", step=step, root=root, parent=parent, total_bytes=size, probe_loss=1.0 / step)
            parent = self.roots[step] = root
        await bob.refresh(["0"])
        await bob.fetch_checkpoint(bob.candidates("0")[0])
        await bob.hold("0", bob.candidates("0")[0].envelope)
        await self.close(alice)
        return bob

    async def again(self, *, torn: bool = True) -> SwarmNode:
        """Alice starts again; ``torn``: step 20 is gone from her store as well."""
        alice = await self.node("alice")
        if torn:
            alice.store.delete(self.roots[20], blob=False)
        return alice

    async def close(self, node: SwarmNode) -> None:
        self.nodes.remove(node)
        await node.close()

    async def train(self, node: SwarmNode, local: int, steps: list[int], before: Before | None = None) -> RunningLane:
        async def check(slot: str, folder: Path, announcement: Announcement, purpose: Purpose) -> float:
            step = int(load_file(folder / FILES[0])["w"][0])
            if step == self.false:
                raise ProbeFailed(f"step {step} does not hold")
            return 1.0 / step

        async def start_trainer(slot: str, work: Path, resume: Path | None, parent: str | None) -> Steps:
            done = 0 if resume is None else int(load_file(resume / FILES[0])["w"][0])
            self.started.append((done, parent))
            return Steps(work, done, steps, before)

        training = SlotTraining(
            node,
            VerifiedCheckpoints(node, check),
            start_trainer=start_trainer,
            local_checkpoint=lambda work: (weights(self.folder / f"made-{local}", local), local, None),
            keep_checkpoints=2,
        )
        lane = RunningLane("cluster", ("0",), "0")
        assert await training.run(lane, "0") == ""
        return lane


def said(node: SwarmNode) -> Announcement:
    envelope = node.files.ledger.last("checkpoint", "0")
    assert envelope is not None
    return Announcement.open(envelope).record


def told(tmp_path: Path, story: Callable[[World], Awaitable[Any]]) -> None:
    async def bounded() -> None:
        world = World(tmp_path)
        try:
            await story(world)
        finally:
            for node in list(world.nodes):
                await world.close(node)

    run(bounded())


def test_out_of_sight_of_the_swarm_nothing_older_than_the_newest_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(world: World) -> None:
        bob = await world.begin()
        world.network.partition([bob.identity.peer_id])
        alice = await world.again()
        announced: list[int] = []

        async def note(_step: int) -> None:
            announced.append(said(alice).step)

        lane = await world.train(alice, 10, [12, 18, 22, 30], note)
        assert world.started == [(10, world.roots[10])]
        assert announced == [20, 20, 20, 22]
        assert (said(alice).step, lane.state.published_step, lane.state.note) == (30, 30, "")
        first = alice.stored_manifest(said(alice).parent or "")
        assert first is not None
        assert (first.step, first.parent) == (22, world.roots[10]), "what it grew from, not what it passed by"
        events = [json.loads(line) for line in (alice.files.path / "events.jsonl").read_text().splitlines()]
        withheld = [(event["step"], event["announced"]) for event in events if event["event"] == "withheld"]
        assert withheld == [(12, 20), (18, 20)]
        assert "step 12 of slot 0 is not announced: this peer announced step 20 before" in caplog.text

    told(tmp_path, story)


def test_the_lane_says_why_it_is_silent(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        bob = await world.begin()
        world.network.partition([bob.identity.peer_id])
        lane = await world.train(await world.again(), 10, [12])
        assert lane.state.note == "silent until step 20, which was announced before and cannot be had"

    told(tmp_path, story)


def test_what_passed_the_newest_in_silence_is_no_continuation_of_it_after_a_crash(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        bob = await world.begin()
        world.network.partition([bob.identity.peer_id])
        alice = await world.again()
        await world.train(alice, 10, [12])
        await world.close(alice)
        alice = await world.again()  # step 25 was written, and then it died
        await world.train(alice, 25, [])
        assert world.started[-1] == (25, world.roots[10])

    told(tmp_path, story)


def test_the_newest_is_taken_back_from_who_holds_it(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.begin()
        alice = await world.again()
        await alice.refresh(["0"])
        await world.train(alice, 10, [12, 22])
        assert world.started == [(20, world.roots[20])]
        assert (said(alice).step, said(alice).parent) == (22, world.roots[20])

    told(tmp_path, story)


def test_the_newest_is_taken_back_as_soon_as_its_holder_is_in_sight(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        bob = await world.begin()
        world.network.partition([bob.identity.peer_id])
        alice = await world.again()

        async def heal(step: int) -> None:
            if step == 14:
                world.network.heal()
                await alice.transport.connect((await bob.transport.addresses())[0])

        await world.train(alice, 10, [12, 14, 16, 22], heal)
        assert world.started == [(10, world.roots[10]), (20, world.roots[20])]
        assert (said(alice).step, said(alice).parent) == (22, world.roots[20])

    told(tmp_path, story)


def test_what_lies_whole_in_the_own_store_needs_nobody(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        bob = await world.begin()
        world.network.partition([bob.identity.peer_id])
        await world.train(await world.again(torn=False), 10, [12, 22])
        assert world.started == [(20, world.roots[20])]

    told(tmp_path, story)


def test_a_newest_that_was_found_false_silences_nobody(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.false = 20
        await world.begin()
        alice = await world.again(torn=False)
        await world.train(alice, 10, [12])
        assert world.started == [(10, world.roots[10])]
        assert (said(alice).step, said(alice).parent) == (12, world.roots[10])

    told(tmp_path, story)


def test_a_newest_that_nobody_holds_for_two_leases_silences_nobody(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        bob = await world.begin()
        await world.close(bob)
        await world.node("carol")
        alice = await world.again()
        announced: list[int] = []

        async def wait(step: int) -> None:
            announced.append(said(alice).step)
            world.ahead_s += 400.0

        await world.train(alice, 10, [11, 12, 13, 14, 15, 16], wait)
        assert announced == [20, 20, 20, 20, 14, 15], "a holding counts for 900 s here: three looks of 400 s later"
        assert (said(alice).step, said(alice).author) == (16, alice.identity.peer_id)

    told(tmp_path, story)
