"""Peers that keep every rule of form and mean harm: what one key can do to nodes that believe what verifies."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from closed_world import ORGANISER, PROGRESS, Closed, closed, closed_plan
from safetensors.numpy import save
from test_peer_life import FILES, STEPS, Swarm, told, until

from paris_swarm.dht_schemas.admission import seal_delegation, seal_token
from paris_swarm.dht_schemas.dht_rules import checkpoint_key, claim_key
from paris_swarm.dht_schemas.errors import Equivocation, NotAdmitted, ProbeFailed
from paris_swarm.dht_schemas.greeting import Greeting
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import build_manifest, file_entry
from paris_swarm.dht_schemas.notice import Notice, seal_notice
from paris_swarm.dht_schemas.records import Claim
from paris_swarm.dht_schemas.trusted import TrustedSwarm
from paris_swarm.swarm import downloads, greeting, node, sightings
from paris_swarm.swarm.claims import rendezvous_weight
from paris_swarm.swarm.greeting import SwarmDoor
from paris_swarm.swarm.home import MAX_EVENTS, Home
from paris_swarm.swarm.node import MAX_REFUSALS
from paris_swarm.swarm.trainer import TrainerEvent, TrainFailed
from paris_swarm.swarm.verified import VerifiedCheckpoints

OPEN = closed_plan(admission="open")
CLOSED = closed_plan()


def claim_of(key: Identity, plan_id: str, *, seq: int = 1, slot: str = "0", now: float = 1000.0) -> bytes:
    said = Claim(plan=plan_id, slot=slot, peer=key.peer_id, seq=seq, until=now + 300.0, progress=PROGRESS)
    return said.seal(key)


# ---- rubbish announced faster than it is refuted --------------------------------------------------------------------


def test_one_key_cannot_hold_every_slot_finished_by_announcing_anew_what_nobody_serves(tmp_path: Path) -> None:
    """R-REC-11"""

    async def story(swarm: Swarm) -> None:
        liar = await swarm.join("liar", cluster="0", start=False)
        victim = await swarm.join("victim", start=False)

        async def announce_for_ever() -> None:
            dice = random.Random(0)
            while True:
                for slot in ("0", "1"):
                    root = dice.randbytes(32).hex()
                    await liar.node.announce(
                        slot, step=STEPS, root=root, parent=None, total_bytes=10, probe_loss=dice.random()
                    )
                await asyncio.sleep(0.05)

        lying = asyncio.create_task(announce_for_ever())
        try:
            await until(lambda: all(liar.node.candidates(slot) for slot in ("0", "1")))
            victim.start()
            await until(lambda: victim.peer.lanes[0].phase == "finished")
            await until(victim.is_training)
        finally:
            lying.cancel()
            await asyncio.gather(lying, return_exceptions=True)

    told(tmp_path, story, first_checkpoint_grace_s=0.3)


class FailingTrainer:
    """A trainer that cannot go on from what it was given."""

    async def events(self) -> AsyncIterator[TrainerEvent]:
        yield TrainFailed("the loss is nan at step 5")

    async def stop(self) -> None:
        return None


def test_a_checkpoint_that_verifies_and_cannot_be_trained_on_is_passed_over(tmp_path: Path) -> None:
    """R-VAL-4"""

    async def story(swarm: Swarm) -> None:
        authors = [await swarm.join(name, cluster="0", start=False) for name in ("honest", "liar")]
        roots = []
        for author, loss in zip(authors, (0.5, 0.4), strict=True):
            folder = tmp_path / f"made-{loss}"
            folder.mkdir()
            for name in FILES:
                values = np.array([2, 0 if name == FILES[0] else 1e30 * (loss < 0.5)], dtype=np.float32)
                (folder / name).write_bytes(save({"w": values}))
            manifest, data, root = build_manifest(folder, list(FILES), "0", meta={"step": 2, "parent": None})
            author.node.store.put_folder(data, folder)
            total = manifest.total_bytes
            await author.node.announce("0", step=2, root=root, parent=None, total_bytes=total, probe_loss=loss)
            roots.append(root)
        heir = await swarm.join("heir", cluster="0", start=False)
        start_trainer, parents = heir.peer._training._start_trainer, []

        async def start(slot: str, work: Path, resume: Path | None, parent: str | None) -> object:
            parents.append(parent)
            return FailingTrainer() if parent == roots[1] else await start_trainer(slot, work, resume, parent)

        heir.peer._training._start_trainer = start  # type: ignore[assignment]
        heir.start()
        await until(lambda: bool(heir.trainers))
        assert parents == [roots[1], roots[0]]

    told(tmp_path, story)


# ---- what one author did must not cost others -----------------------------------------------------------------------


def publish(at: node.SwarmNode, folder: Path, slot: str, value: float) -> tuple[str, int]:
    folder.mkdir()
    (folder / "ema.safetensors").write_bytes(save({"w": np.full(2, value, dtype=np.float32)}))
    manifest, data, root = build_manifest(folder, ["ema.safetensors"], slot, meta={"step": 5, "parent": None})
    at.store.put_folder(data, folder)
    return root, manifest.total_bytes


def test_an_author_who_is_out_does_not_end_the_announcing_of_what_is_held_beside(tmp_path: Path) -> None:
    async def story(swarm: Closed) -> None:
        organiser, author = await swarm.node("organiser"), await swarm.node("author")
        held = {}
        for slot, value in (("0", 1.0), ("1", 2.0)):
            maker = author if slot == "0" else organiser
            root, size = publish(maker, tmp_path / f"files-{slot}", slot, value)
            await maker.announce(slot, step=5, root=root, parent=None, total_bytes=size, probe_loss=1.0)
            held[slot] = maker.files.held()[slot]
        keeper = await swarm.node("keeper", join=False)
        for slot, envelope in held.items():
            keeper.files.hold(slot, envelope)
        keeper.trusted.feed_notice(swarm.notice(1, author))
        await keeper.join()
        await asyncio.wait_for(_announced(organiser, "1", keeper.identity.peer_id), 10)
        found = await organiser.transport.get(checkpoint_key(swarm.plan_id, "0"))
        assert keeper.identity.peer_id not in found

    closed(tmp_path, story, OPEN)


def test_rubbish_that_was_refuted_does_not_stay_on_the_disk(tmp_path: Path) -> None:
    """One announcement a grace, each by another key, would fill it. A root that others announce too is kept."""

    async def story(swarm: Closed) -> None:
        authors = [await swarm.node(name) for name in ("organiser", "second")]
        reader = await swarm.node("reader")
        roots = []

        async def refuse(*_: object) -> None:
            raise ProbeFailed("rubbish")

        for value, shared in ((1.0, False), (2.0, True)):
            root, size = publish(authors[0], tmp_path / f"files-{value}", "0", value)
            roots.append(root)
            announced = {"step": 5, "root": root, "parent": None, "total_bytes": size}
            await authors[0].announce("0", probe_loss=1.0, **announced)
            if shared:
                publish(authors[1], tmp_path / "again", "0", value)
                await authors[1].announce("0", probe_loss=2.0, **announced)
            await reader.refresh(["0"])
            mine = [one for one in reader.candidates("0") if one.announcement.author == authors[0].identity.peer_id]

            assert await VerifiedCheckpoints(reader, refuse).try_out(mine[0])
        assert not reader.store.in_use(roots[0])
        # A lie about a root that was here before takes nothing away: its own checkpoints could be lied about as well.
        root, size = publish(reader, tmp_path / "own", "0", 3.0)
        await authors[0].announce("0", step=9, root=root, parent=None, total_bytes=size, probe_loss=1.0)
        await reader.refresh(["0"])
        [lie] = [one for one in reader.candidates("0") if one.announcement.root == root]
        assert await VerifiedCheckpoints(reader, refuse).try_out(lie)
        assert reader.store.holds_some(root)
        assert [reader.store.holds_some(root) for root in roots] == [False, True]

    closed(tmp_path, story, OPEN)


async def _announced(reader: node.SwarmNode, slot: str, holder: str) -> None:
    while holder not in await reader.transport.get(checkpoint_key(reader.plan_id, slot)):
        await asyncio.sleep(0.01)


# ---- the door -------------------------------------------------------------------------------------------------------


class OpenStream:
    """A stream that only says whether it was closed."""

    closed = False

    async def close(self) -> None:
        self.closed = True


def lent_door(clock: Callable[[], float] = lambda: 1000.0) -> tuple[TrustedSwarm, SwarmDoor, Identity, Identity, bytes]:
    guest, observer = Identity(b"g" * 32), Identity(b"x" * 32)
    trusted = TrustedSwarm(CLOSED)
    door = SwarmDoor(trusted, token=None, clock=clock, dice=random.Random(0))
    said = Greeting(
        token=seal_token(ORGANISER, CLOSED.plan_id, guest.peer_id),
        delegation=seal_delegation(guest, CLOSED.plan_id, observer.peer_id, 1900.0),
    ).to_bytes()
    return trusted, door, guest, observer, said


async def revoke(trusted: TrustedSwarm, door: SwarmDoor, guest: Identity) -> None:
    said = Notice(plan=CLOSED.plan_id, number=1, state="running", revoked=(guest.peer_id,))
    trusted.feed_notice(seal_notice(ORGANISER, said))
    door.close_unwelcome()
    await asyncio.sleep(0)


def test_a_second_greeting_does_not_free_an_observers_stream_from_the_peer_it_reads_for() -> None:
    """R-GRT-5"""
    trusted, door, guest, observer, said = lent_door()

    async def story() -> bool:
        stream = OpenStream()
        door.admit(observer.peer_id, said)
        door.enter(observer.peer_id, stream)  # type: ignore[arg-type]
        with pytest.raises(NotAdmitted):
            door.admit(observer.peer_id, b"")
        await revoke(trusted, door, guest)
        return stream.closed

    assert asyncio.run(story())


def test_an_observers_stream_ends_with_the_delegation_it_was_greeted_with() -> None:
    """R-GRT-5"""
    now = [1000.0]
    _trusted, door, guest, observer, said = lent_door(clock=lambda: now[0])

    async def story() -> None:
        early, late = OpenStream(), OpenStream()
        now[0] = 1899.95
        door.admit(observer.peer_id, said)
        door.enter(observer.peer_id, early)  # type: ignore[arg-type]
        lent = seal_delegation(guest, CLOSED.plan_id, observer.peer_id, 2700.0)
        token = seal_token(ORGANISER, CLOSED.plan_id, guest.peer_id)
        door.admit(observer.peer_id, Greeting(token=token, delegation=lent).to_bytes())
        door.enter(observer.peer_id, late)  # type: ignore[arg-type]
        async with asyncio.timeout(5.0):
            while not early.closed:
                await asyncio.sleep(0.01)
        assert not late.closed
        door.leave(observer.peer_id, early)  # type: ignore[arg-type]
        door.leave(observer.peer_id, late)  # type: ignore[arg-type]
        assert door._endings == {}, "nothing is left to ring for a stream that is gone"

    asyncio.run(story())


def test_a_crowd_of_observers_does_not_make_the_door_forget_one_with_an_open_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(greeting, "MAX_OBSERVERS", 2)
    trusted, door, guest, observer, said = lent_door()

    async def story() -> bool:
        stream = OpenStream()
        door.admit(observer.peer_id, said)
        door.enter(observer.peer_id, stream)  # type: ignore[arg-type]
        for index in range(3):
            other = Identity(bytes([index]) * 32)
            lent = seal_delegation(guest, CLOSED.plan_id, other.peer_id, 1900.0)
            token = seal_token(ORGANISER, CLOSED.plan_id, guest.peer_id)
            door.admit(other.peer_id, Greeting(token=token, delegation=lent).to_bytes())
        await revoke(trusted, door, guest)
        return stream.closed

    assert asyncio.run(story())


# ---- proofs against keys made for it --------------------------------------------------------------------------------


def test_made_up_equivocators_become_worth_passing_on_by_valid_records_only() -> None:
    """R-SET-7"""
    made_up = Identity(b"u" * 32)
    for opened in (OPEN, CLOSED):
        trusted = TrustedSwarm(opened)
        first, second = (
            Claim(plan=opened.plan_id, slot="0", peer=made_up.peer_id, seq=1, until=until_, progress=PROGRESS).seal(
                made_up
            )
            for until_ in (1100.0, 1200.0)
        )
        trusted.feed_proof(first, second)
        door = SwarmDoor(trusted, token=None, clock=lambda: 1000.0, dice=random.Random(0))
        assert not door.welcomes(made_up.peer_id)
        assert trusted.notable_proofs() == []
        with pytest.raises((Equivocation, NotAdmitted)):
            trusted.feed_claim(first, 1000.0)
        assert len(trusted.notable_proofs()) == (1 if opened is OPEN else 0)


# ---- what others cause to be written and remembered -----------------------------------------------------------------


def test_refusals_that_others_cause_are_bounded_in_memory_and_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paris_swarm.swarm.home.MAX_EVENTS", 1000)
    assert MAX_EVENTS > 1000

    async def story(swarm: Closed) -> None:
        reader = await swarm.node("organiser")
        for index in range(3 * MAX_REFUSALS):
            reader._refuse(f"rubbish {index}")
        assert len(reader.refused) == MAX_REFUSALS
        assert reader.refused[-1] == f"rubbish {3 * MAX_REFUSALS - 1}"
        lines = [line for path in reader.files.path.glob("events*.jsonl") for line in path.read_text().splitlines()]
        assert sum(map(len, lines)) < 2500
        assert any(json.loads(line)["what"] == reader.refused[-1] for line in lines)

    closed(tmp_path, story, OPEN)


def test_a_reader_keeps_a_bounded_number_of_claims_and_those_it_knows_still_renew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-DHT-8"""
    monkeypatch.setattr(sightings, "MAX_LIVE", 3)

    async def story(swarm: Closed) -> None:
        reader, organiser = await swarm.node("reader"), ORGANISER
        keys = [Identity(bytes([index]) * 32) for index in range(5)]
        now = time.time()
        answer: dict[str, tuple[bytes, float]] = {}

        async def get(_key: str) -> dict[str, tuple[bytes, float]]:
            return answer

        reader.transport.get = get  # type: ignore[method-assign]
        answer |= {key.peer_id: (claim_of(key, swarm.plan_id, now=now), now + 300) for key in keys}
        await reader._read([("0", claim_key)])
        known = dict(reader.trusted.claims["0"])
        assert len(known) == 3
        assert reader.refused == []
        answer.clear()
        for key in [*keys, organiser]:
            answer[key.peer_id] = (claim_of(key, swarm.plan_id, seq=2, now=now), now + 300)
        await reader.refresh(["0"])
        assert set(reader.trusted.claims["0"]) == {*known, organiser.peer_id}
        assert {claim.seq for claim in reader.trusted.claims["0"].values()} == {2}
        assert set(reader.last_seen) == {*known, organiser.peer_id}
        answer.clear()
        reader.clock = lambda: now + 301
        await reader.refresh(["0"])
        assert (reader.last_seen, reader.sightings.claimed) == ({}, {})

    closed(tmp_path, story, OPEN)


# ---- a bare announcement against a peer at work ---------------------------------------------------------------------


def test_a_ground_key_that_announces_what_nobody_serves_does_not_take_a_slot_from_a_peer_at_work(
    tmp_path: Path,
) -> None:
    """R-REC-11"""

    async def story(swarm: Swarm) -> None:
        worker = await swarm.join("worker", cluster="0")
        await until(worker.is_training)
        worker.open(2)
        await until(lambda: worker.peer.lanes[0].published_step == 2)
        plan_id, own = swarm.plan.plan_id, worker.node.identity.peer_id
        ground = next(
            name
            for name in map("ground-{}".format, range(1000))
            if rendezvous_weight(plan_id, Home(tmp_path / name).identity().peer_id, "0")
            > rendezvous_weight(plan_id, own, "0")
        )
        liar = await swarm.join(ground, cluster="0", start=False)
        dice = random.Random(0)
        renewals = worker.node.trusted.claims["0"][own].seq
        for _ in range(12):  # five leases: past the probation of the worker's claim, and four looks after it
            await liar.node.publish_claim("0", PROGRESS)
            await liar.node.announce(
                "0", step=3, root=dice.randbytes(32).hex(), parent=None, total_bytes=10, probe_loss=0.1
            )
            await asyncio.sleep(0.5)
            assert worker.is_training()
        assert worker.node.trusted.claims["0"][own].seq > renewals
        assert len(worker.trainers) == 1

    told(tmp_path, story)


# ---- files of one swarm, asked for in another -----------------------------------------------------------------------


def test_a_parents_manifest_is_noted_as_this_swarms_before_it_lies_in_the_store(tmp_path: Path) -> None:
    """R-GRT-7"""

    async def story(swarm: Closed) -> None:
        author = await swarm.node("organiser")
        swarm.invite("auditor")
        auditor = await swarm.node("auditor")
        root, _size = publish(author, tmp_path / "files", "0", 1.0)
        await auditor.transport.connect((await author.transport.addresses())[0])
        await auditor.manifest_by_root(root, [author.transport.peer_id])
        assert root in auditor.home.foreign_roots("another plan")

    closed(tmp_path, story)


def test_no_chunk_of_another_swarm_goes_into_a_checkpoint_of_this_one(tmp_path: Path) -> None:
    """R-GRT-7: it would be served as a part of this one to whoever names its digest in a manifest."""

    async def story(swarm: Closed) -> None:
        author, victim = await swarm.node("organiser"), await swarm.node("victim")
        root, size = publish(author, tmp_path / "bait", "0", 1.0)
        secret, _size = publish(victim, tmp_path / "secret", "1", 1.0)
        assert secret != root
        victim.home.swarm(CLOSED.plan_id).note_root(secret)
        await victim.transport.connect((await author.transport.addresses())[0])
        await victim.fetch_by_root(root, [author.transport.peer_id])
        assert victim.counters.total("received", "checkpoint").logical == size

    closed(tmp_path, story, OPEN)


def test_the_files_of_a_plan_keep_to_the_stores_limit(tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    folder.mkdir()
    (folder / "probe.safetensors").write_bytes(bytes(1000))
    opened = closed_plan(admission="open", files=[file_entry(folder / "probe.safetensors").model_dump()])

    async def story(swarm: Closed) -> None:
        organiser = await swarm.node("organiser")
        organiser.store.put_files(opened.plan_id, opened.plan.files, folder, kind="plan")
        home, peer = Home(tmp_path / "guest"), organiser.transport.peer_id
        transport = await swarm.transport(home.identity().peer_id)
        with pytest.raises(OSError, match="may hold 999"):
            await downloads.fetch_plan(transport, home, opened.plan_id, [peer], store_limit=999)
        await downloads.fetch_plan(transport, home, opened.plan_id, [peer], store_limit=1000)
        await transport.close()

    closed(tmp_path, story, opened)
