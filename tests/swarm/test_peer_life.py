"""A peer over the in-memory network: real policy, node, store and verification, a scripted trainer, short leases."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from paris_swarm.dht_schemas.errors import ProbeFailed
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.plan import (
    Bars,
    OpenedPlan,
    Plan,
    Policy,
    SlotSpec,
    TensorSpec,
    Verification,
    open_plan,
    seal_plan,
)
from paris_swarm.dht_schemas.records import Announcement, Progress
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.memory import MemoryNetwork, MemoryTransport
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.peer import Peer
from paris_swarm.swarm.trainer import Purpose, TrainedCheckpoint, TrainerEvent, TrainProgress

STEPS = 4
LEASE_S = 1.2
FILES = ("ema.safetensors", "model.safetensors")


def make_plan(**policy: float) -> OpenedPlan:
    organiser = Identity(b"o" * 32)
    table = (TensorSpec(name="w", dtype="F32", shape=(2,)),)
    spec = SlotSpec(recipe={"train": {"steps": STEPS}}, files=dict.fromkeys(FILES, table))
    values = {"lease_s": LEASE_S, "checkpoint_every_s": 1.0, "first_checkpoint_grace_s": 60.0} | policy
    plan = Plan(
        name="scripted",
        organiser=organiser.peer_id,
        created=1,
        clusters=2,
        seed=0,
        data={},
        expert=spec,
        router=spec,
        policy=Policy(**values, checkpoint_cap_bytes=10_000),
        admission="open",
        verification=Verification(
            probe_seed=0, bars={slot: Bars(resumable=9.0, assemblable=5.0) for slot in ("0", "1", "router")}
        ),
        files=(),
    )
    return open_plan(seal_plan(organiser, plan))


class ScriptedTrainer:
    """Writes a checkpoint a step; waits before each for ``gate``, so that a test decides how far it gets."""

    def __init__(self, slot: str, work: Path, resume: Path | None, gate: asyncio.Semaphore) -> None:
        self.slot, self.work, self.resume, self.gate = slot, work, resume, gate
        self.stopped = asyncio.Event()

    async def events(self) -> AsyncIterator[TrainerEvent]:
        done = 0 if self.resume is None else int(load_file(self.resume / FILES[0])["w"][0])
        for step in range(done + 1, STEPS + 1):
            go = asyncio.ensure_future(self.gate.acquire())
            stop = asyncio.ensure_future(self.stopped.wait())
            await asyncio.wait([go, stop], return_when=asyncio.FIRST_COMPLETED)
            stop.cancel()
            if self.stopped.is_set():
                go.cancel()
                return
            yield TrainProgress(step, STEPS, 1.0 / step, 10.0)
            folder = self.work / f"step-{step}"
            folder.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                save_file({"w": np.array([step, float(self.slot == "1")], dtype=np.float32)}, folder / name)
            yield TrainedCheckpoint(step, folder, FILES, 1.0 / step)

    async def stop(self) -> None:
        self.stopped.set()


@dataclass
class Life:
    """One peer of the test: its node, and what its trainers did."""

    name: str
    node: SwarmNode
    peer: Peer
    gate: asyncio.Semaphore
    trainers: list[ScriptedTrainer] = field(default_factory=list)
    running: asyncio.Task[None] | None = None

    def start(self) -> Life:
        self.running = asyncio.create_task(self.peer.run())
        return self

    def open(self, steps: int = 1000) -> None:
        for _ in range(steps):
            self.gate.release()

    @property
    def slot(self) -> str | None:
        return self.peer.lanes[0].slot

    def is_training(self) -> bool:
        return self.peer.lanes[0].phase == "training"

    async def leave(self) -> None:
        self.peer.leave()
        if self.running is not None:
            await asyncio.wait_for(self.running, 20)


class Swarm:
    def __init__(self, folder: Path, plan: OpenedPlan) -> None:
        self.folder, self.plan = folder, plan
        self.network = MemoryNetwork(seed=1)
        self.lives: list[Life] = []

    async def join(self, name: str, *, cluster: str = "auto", start: bool = True) -> Life:
        home = Home(self.folder / name)
        identity = home.identity()
        seeds = [address for life in self.lives[:1] for address in await life.node.transport.addresses()]
        transport = await MemoryTransport.start(self.network, identity.peer_id, seeds=seeds)
        node = SwarmNode(home, identity, transport, self.plan)
        await node.join()
        gate = asyncio.Semaphore(0)
        trainers: list[ScriptedTrainer] = []

        async def start_trainer(slot: str, work: Path, resume: Path | None, parent: str | None) -> ScriptedTrainer:
            trainers.append(ScriptedTrainer(slot, work, resume, gate))
            return trainers[-1]

        async def check(slot: str, folder: Path, announcement: Announcement, purpose: Purpose) -> float:
            step = int(load_file(folder / FILES[0])["w"][0])
            if step != announcement.step:
                raise ProbeFailed(f"announced step {announcement.step}, the weights say {step}")
            return 1.0 / step

        peer = Peer(
            node,
            cluster=cluster,
            router=False,
            start_trainer=start_trainer,
            check=check,
            local_checkpoint=lambda work: None,
            target_steps=dict.fromkeys(self.plan.plan.slots, STEPS),
            device="cpu",
            dice=random.Random(name),
        )
        life = Life(name, node, peer, gate, trainers)
        self.lives.append(life)
        return life.start() if start else life

    async def close(self) -> None:
        for life in self.lives:
            if life.running is not None and not life.running.done():
                life.running.cancel()
                await asyncio.gather(life.running, return_exceptions=True)
            await life.node.close()

    def kill(self, life: Life) -> None:
        """The process dies: nothing more is said or served by this peer."""
        assert life.running is not None
        life.running.cancel()
        self.network.kill(life.node.transport.peer_id)


async def until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.02)


def told(tmp_path: Path, story: Callable[[Swarm], object], **policy: float) -> None:
    async def run() -> None:
        swarm = Swarm(tmp_path, make_plan(**policy))
        try:
            await story(swarm)  # type: ignore[misc]
        finally:
            await swarm.close()

    asyncio.run(run())


def test_peers_spread_and_the_third_stands_by(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        first, second = await swarm.join("a"), await swarm.join("b")
        await until(lambda: first.is_training() and second.is_training())
        assert {first.slot, second.slot} == {"0", "1"}
        third = await swarm.join("c")
        await until(lambda: third.peer.lanes[0].phase == "waiting")
        assert third.trainers == []

    told(tmp_path, story)


def test_peers_that_claim_at_the_same_instant_never_both_train_a_slot(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        lives = [await swarm.join(name, cluster="0", start=False) for name in "abcd"]
        for life in lives:
            life.start()
        await until(lambda: any(life.is_training() for life in lives))
        await until(lambda: all(life.is_training() or life.peer.lanes[0].phase == "waiting" for life in lives))
        assert sum(life.is_training() for life in lives) == 1

    told(tmp_path, story)


def test_a_killed_peers_slot_is_taken_and_continued_from_its_last_checkpoint(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        seed = await swarm.join("seed", cluster="1")
        victim = await swarm.join("victim", cluster="0")
        heir = await swarm.join("heir", cluster="0")
        await until(lambda: seed.is_training() and (victim.is_training() or heir.is_training()))
        if heir.is_training():
            victim, heir = heir, victim
        victim.open(2)
        await until(lambda: victim.peer.lanes[0].published_step == 2)
        root = victim.node.last_root("0")
        assert root is not None
        await until(
            lambda: any(item.root == root and item.complete for item in heir.node.store.roots())
        )  # standing by, it keeps a copy: no one else could serve it now
        swarm.kill(victim)
        await until(heir.is_training)
        started = json.loads((heir.node.files.path / "events.jsonl").read_text().splitlines()[-1])
        assert (started["event"], started["parent"]) == ("train", root)
        assert heir.trainers[0].resume is not None
        heir.open()
        await until(lambda: heir.peer.lanes[0].phase == "finished")
        own = [candidate.announcement for candidate in heir.node.candidates("0")]
        assert (own[0].step, own[0].author) == (STEPS, heir.node.identity.peer_id)

    told(tmp_path, story)


def test_a_claim_is_renewed_while_the_starting_point_is_still_being_fetched(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        life = await swarm.join("a", cluster="0", start=False)
        ready, start_trainer = asyncio.Event(), life.peer._training._start_trainer

        async def slow(*args: object) -> object:
            await ready.wait()
            return await start_trainer(*args)  # type: ignore[arg-type]

        life.peer._training._start_trainer = slow  # type: ignore[assignment]
        life.start()
        claims = life.node.trusted.claims["0"]
        await until(lambda: bool(claims))
        first = claims[life.node.identity.peer_id].until
        await until(lambda: claims[life.node.identity.peer_id].until > first + 1.5 * LEASE_S)
        assert life.trainers == []
        ready.set()
        await until(life.is_training)

    told(tmp_path, story)


def test_a_trainer_that_ends_while_its_peer_is_looking_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        life = await swarm.join("a", cluster="0", start=False)
        refresh = life.node.refresh

        async def long_look(slots: object) -> None:
            training = life.peer._lanes[0].training
            if training is not None:
                await until(life.is_training)
                life.open()
                await asyncio.wait([training])
            await refresh(slots)  # type: ignore[arg-type]

        life.node.refresh = long_look  # type: ignore[method-assign, assignment]
        life.start()
        await until(lambda: life.peer.lanes[0].phase == "finished")

    told(tmp_path, story)


def test_leaving_gives_the_slot_back_at_once(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        first = await swarm.join("a", cluster="0")
        await until(first.is_training)
        second = await swarm.join("b", cluster="0")
        await until(lambda: second.peer.lanes[0].phase == "waiting")
        await first.leave()
        await second.node.refresh(["0"])
        claim = second.node.trusted.claims["0"][first.node.identity.peer_id]
        assert claim.released
        await until(second.is_training)

    told(tmp_path, story, lease_s=6.0)


def test_training_goes_on_while_the_network_is_away(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        first, second = await swarm.join("a", cluster="0"), await swarm.join("b", cluster="1")
        await until(lambda: first.is_training() and second.is_training())
        swarm.network.partition([first.node.transport.peer_id], [second.node.transport.peer_id])
        first.open()
        await until(lambda: first.peer.lanes[0].published_step == STEPS)
        swarm.network.heal()
        await until(lambda: first.peer.lanes[0].phase == "finished")
        await first.node.hold("0", next(iter(first.node.files.held().values())))
        await second.node.refresh(["0"])
        assert second.node.candidates("0")[0].announcement.step == STEPS

    told(tmp_path, story)


def test_an_announcement_signed_before_a_crash_is_sent_again_unchanged(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        life = await swarm.join("a", start=False)
        node = life.node
        folder = tmp_path / "made"
        folder.mkdir()
        for name in FILES:
            save_file({"w": np.ones(2, dtype=np.float32)}, folder / name)
        from paris_swarm.dht_schemas.manifest import build_manifest

        manifest, data, root = build_manifest(folder, FILES, "0", meta={"step": 1, "parent": None})
        node.store.put_folder(data, folder)
        announcement = Announcement(
            plan=node.plan_id,
            slot="0",
            author=node.identity.peer_id,
            seq=node.files.ledger.next_sequence("checkpoint", "0", now=node.clock()),
            step=1,
            parent=None,
            root=root,
            bytes=manifest.total_bytes,
            probe_loss=1.0,
        )
        envelope = announcement.seal(node.identity)
        node.files.ledger.record("checkpoint", "0", announcement.seq, envelope)  # ... and here the process dies
        await node.close()
        swarm.lives.clear()
        again = await swarm.join("a", start=False)
        await until(lambda: bool(again.node.candidates("0")))
        assert again.node.candidates("0")[0].envelope == envelope

    told(tmp_path, story)


def test_a_bare_announcement_of_a_finished_slot_holds_nobody_up_for_ever(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        liar = await swarm.join("liar", start=False)
        await liar.node.announce("0", step=STEPS, root="e" * 64, parent=None, total_bytes=10, probe_loss=0.001)
        honest = await swarm.join("honest", cluster="0")
        await until(lambda: honest.peer.lanes[0].phase == "finished")  # so it seems, from the records
        await until(honest.is_training)  # but nobody serves it, and the idle peer looked

    told(tmp_path, story, first_checkpoint_grace_s=1.0)


def test_a_released_claim_carries_a_later_sequence_and_stays_legal(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        life = await swarm.join("a", start=False)
        progress = Progress(step=0, steps=STEPS, loss=None, images_per_s=0.0, device="cpu")
        claims = [await life.node.publish_claim("0", progress, released=released) for released in (False, False, True)]
        assert [claim.seq for claim in claims] == sorted({claim.seq for claim in claims})
        assert claims[-1].until > claims[-2].until  # hivemind keeps only a later expiration
        other = await swarm.join("b", start=False)
        await other.node.refresh(["0"])
        assert other.node.slot_view("0").live(other.node.clock()) == {}

    told(tmp_path, story)
