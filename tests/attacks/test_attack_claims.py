"""Squatters, idlers, thieves of work, Sybils and floods: valid records, used against the swarm."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from arena import ORGANISER, PROGRESS, Arena, LoopThread, Stage, best_verified, pack, small_plan
from fixture_types import NamedRule, Timed

from paris_swarm.dht_schemas.admission import seal_token
from paris_swarm.dht_schemas.dht_rules import check_store, claim_key, dht_id
from paris_swarm.dht_schemas.errors import NotAdmitted, ProbeFailed, RecordError
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.swarm.claims import Keep, Take, Wait, choose, rendezvous_weight, review
from paris_swarm.swarm.hivemind_transport import MAX_SUBKEYS
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.peer import Peer
from paris_swarm.swarm.sightings import Candidate

CAP = 8


@pytest.fixture(scope="module")
def narrow(loop_thread: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """Six slots, and nodes that keep eight records under a key."""
    made = Arena(loop_thread, tmp_path_factory.mktemp("narrow"), small_plan(clusters=6))
    loop_thread.run(made.open(max_subkeys=CAP))
    yield made
    loop_thread.run(made.close())


@pytest.fixture(scope="module")
def closed(loop_thread: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """A swarm for invited peers; alice is its organiser, who needs no token."""
    made = Arena(loop_thread, tmp_path_factory.mktemp("closed"), small_plan(clusters=6, admission="invited"))
    loop_thread.run(made.open(alice=ORGANISER))
    yield made
    loop_thread.run(made.close())


@pytest.fixture
def narrow_stage(narrow: Arena) -> Iterator[Stage]:
    made = narrow.run(narrow.raise_curtain())
    yield made
    narrow.run(narrow.check_honest_claim(made))
    narrow.run(narrow.drop_curtain(made))


def chosen(node: SwarmNode, peer: str, slots: list[str]) -> Take | Wait:
    """What a peer without a slot does, on what this node has read."""
    return choose(
        node.plan_id,
        peer,
        {slot: node.slot_view(slot) for slot in slots},
        policy=node.plan.policy,
        target_steps=dict.fromkeys(slots, 100),
        now=node.clock(),
    )


def test_squatting_every_slot_from_one_key(narrow: Arena, narrow_stage: Stage, timed: Timed) -> None:
    """
    Attack: squatting every slot from one key: valid claims on all slots, renewed for ever
    Rule: R-REC-10: of a key's live claims only slots_per_key count; R-REC-13: of one that claims far more, none
    Seen: alice's claim; every slot is free to take
    """
    squatter = Identity.generate()
    slots = [slot for slot in narrow.opened.plan.slots if slot != "router"]
    policy = narrow.opened.plan.policy

    async def scenario() -> None:
        for slot in slots:
            claim = narrow.claim(slot, squatter)
            key = claim_key(narrow.opened.plan_id, slot)
            assert await narrow.rogue.offer(narrow.alice, key, squatter.peer_id, claim.seal(squatter), claim.until)
        with timed():
            for reader in (narrow.bob, narrow.carol):
                await reader.refresh(slots)
        for reader in (narrow.bob, narrow.carol):
            views = {slot: reader.slot_view(slot) for slot in slots}
            now = reader.clock()
            assert all(squatter.peer_id in view.live(now) for view in views.values()), "shown"
            held = [slot for slot, view in views.items() if squatter.peer_id in view.protecting(now, policy)]
            assert held == []
            free = [slot for slot in slots if slot != narrow_stage.slot]
            assert all(isinstance(chosen(reader, "somebody", [slot]), Take) for slot in free)

    narrow.run(scenario())


def test_idle_key(arena: Arena, stage: Stage, timed: Timed) -> None:
    """
    Attack: idle key: claims a slot, renews the claim, and never publishes a checkpoint
    Rule: C2 (swarm/claims.py): after the plan's first-checkpoint grace a claim without a fresh checkpoint is ignored
    Seen: alice's claim; the idler's claim as stale, its slot free to take
    """
    idler, slot = Identity.generate(), arena.next_slot()
    policy = arena.opened.plan.policy
    offset = 0.0

    async def scenario() -> SwarmNode:
        late = await arena.node("idle-late", arena.alice, arena.bob, observer=True, clock=lambda: time.time() + offset)
        claim = arena.claim(slot, idler, until=time.time() + 600)
        key = claim_key(arena.opened.plan_id, slot)
        assert await arena.rogue.offer(arena.alice, key, idler.peer_id, claim.seal(idler), claim.until)
        await late.refresh([slot])
        return late

    late = arena.run(scenario())
    assert isinstance(chosen(late, "somebody", [slot]), Wait)
    offset = policy.first_checkpoint_grace_s + 1
    with timed():
        arena.run(late.refresh([slot]))
        assert chosen(late, "somebody", [slot]) == Take(slot)
    assert idler.peer_id in late.slot_view(slot).live(late.clock())
    arena.run(arena.close_nodes(late))


def ground_key(plan_id: str, slot: str, below: str) -> Identity:
    """A key whose rendezvous weight on the slot beats that of ``below``: a few tries, as an attacker would."""
    while True:
        key = Identity.generate()
        if rendezvous_weight(plan_id, key.peer_id, slot) > rendezvous_weight(plan_id, below, slot):
            return key


def measured(node: SwarmNode, loss: float) -> object:
    """A check that measures this loss on whatever it is given."""

    def check(candidate: Candidate, _folder: Path) -> None:
        node.trusted.feed_probe(candidate.announcement, loss)

    return check


def test_author_re_announcing_anothers_root(arena: Arena, stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: re-announcing another's root as one's own, truthfully to live on alice's work and take her slot with a
    ground key, and with a lie about its loss to have her checkpoint refused
    Rule: R-REC-11: a root is credited to the author seen with it first; R-VAL-2 (ProbeFailed) refuses the lying
    announcement, not the root
    Seen: alice keeps her slot; her checkpoint verifies, whoever lied about it first
    """
    alice = arena.alice.identity.peer_id
    thief, liar = (ground_key(arena.opened.plan_id, stage.slot, alice) for _ in range(2))
    policy = arena.opened.plan.policy

    async def scenario() -> None:
        made = await arena.publish(arena.alice, stage.slot, probe_loss=0.25)
        for reader in (arena.alice, arena.bob, arena.carol):
            await reader.refresh([stage.slot])
        facts = {"root": made.root, "bytes": made.bytes, "step": made.step}
        for key, loss in ((thief, 0.25), (liar, 0.01)):
            claim = arena.claim(stage.slot, key)
            assert await arena.rogue.offer(arena.alice, stage.key, key.peer_id, claim.seal(key), claim.until)
            stolen = arena.announcement(stage.slot, key, probe_loss=loss, seq=made.seq - 1, **facts).seal(key)
            holding = arena.holding(stage.slot, stolen, key)
            assert await arena.rogue.offer(arena.alice, stage.ckpt_key, key.peer_id, holding.seal(key), holding.until)
        with timed():
            for reader in (arena.alice, arena.bob, arena.carol):
                await reader.refresh([stage.slot])
                view, now = reader.slot_view(stage.slot), reader.clock()
                assert view.fresh(alice, now, policy)
                assert not view.fresh(thief.peer_id, now, policy)
            verdict = review(
                arena.opened.plan_id,
                alice,
                arena.alice.slot_view(stage.slot),
                policy=policy,
                claimed_at=time.time(),
                settled=True,
                now=time.time(),
            )
            assert verdict == Keep(stage.slot)
            best, refusals = await best_verified(arena.bob, stage.slot, measured(arena.bob, 0.25))  # type: ignore[arg-type]
        assert best is not None and best.announcement == made
        (refusal,) = refusals
        assert isinstance(refusal, ProbeFailed)
        named_rule(refusal)

    arena.run(scenario())


def test_one_root_announced_again_and_again(arena: Arena, stage: Stage, timed: Timed) -> None:
    """
    Attack: one checkpoint, announced anew once a cadence, so that an idle claim looks like one at work
    Rule: R-REC-11: a root is as old as the reader has known it
    Seen: alice's claim; the idler's claim goes stale two cadences after its only checkpoint was first seen
    """
    idler = Identity.generate()
    policy = arena.opened.plan.policy
    offset = 0.0

    def announce() -> tuple[bytes, float]:
        now = time.time() + offset
        seq = int(now * 1000)
        announcement = arena.announcement(stage.slot, idler, seq=seq, root="9" * 64).seal(idler)
        holding = arena.holding(stage.slot, announcement, idler, seq=seq, until=time.time() + 300 + offset)
        return holding.seal(idler), holding.until

    async def look(late: SwarmNode) -> None:
        envelope, until = announce()
        assert await arena.rogue.offer(arena.bob, stage.ckpt_key, idler.peer_id, envelope, until)
        await late.refresh([stage.slot])

    async def open_late() -> SwarmNode:
        claim = arena.claim(stage.slot, idler, until=time.time() + 600)
        assert await arena.rogue.offer(arena.bob, stage.key, idler.peer_id, claim.seal(idler), claim.until)
        return await arena.node("again-late", arena.bob, observer=True, clock=lambda: time.time() + offset)

    late = arena.run(open_late())
    with timed():
        arena.run(look(late))
    assert idler.peer_id in late.slot_view(stage.slot).protecting(late.clock(), policy)
    offset = policy.first_checkpoint_grace_s + 1
    arena.run(look(late))
    assert idler.peer_id in late.slot_view(stage.slot).protecting(late.clock(), policy), "one cadence: still at work"
    offset = 2 * policy.checkpoint_every_s + 1
    arena.run(look(late))
    assert idler.peer_id not in late.slot_view(stage.slot).protecting(late.clock(), policy)
    arena.run(arena.close_nodes(late))


def test_lie_about_a_finished_step(arena: Arena, stage: Stage, timed: Timed) -> None:
    """
    Attack: a finished step: a bare announcement of the last step, served by nobody, so that nobody trains the slot
    Rule: docs/architecture.md, "Claims": a peer idle for a grace period verifies what keeps it idle
    Seen: alice's claim; after that check the slot is unfinished again
    """
    slot = arena.next_slot()
    key = arena.mallory
    announcement = arena.announcement(slot, step=100).seal(key)
    holding = arena.holding(slot, announcement)

    async def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing to verify was served")

    async def scenario() -> None:
        ckpt_key = f"paris/{arena.opened.plan_id}/ckpt/{slot}"
        assert await arena.rogue.offer(arena.alice, ckpt_key, key.peer_id, holding.seal(key), holding.until)
        await arena.bob.refresh([slot])
        assert chosen(arena.bob, arena.bob.identity.peer_id, [slot]) == Wait("finished")
        peer = Peer(
            arena.bob,
            cluster=slot,
            router=False,
            start_trainer=never,  # type: ignore[arg-type]
            check=never,  # type: ignore[arg-type]
            local_checkpoint=lambda _work: None,
            target_steps={slot: 100},
            device="cpu",
            dice=random.Random(0),
        )
        with timed():
            assert await peer._rivals.check_one(peer._lanes[0])
        assert chosen(arena.bob, arena.bob.identity.peer_id, [slot]) == Take(slot)

    arena.run(scenario())


def test_50_sybil_keys_in_an_open_swarm(arena: Arena, stage: Stage, timed: Timed) -> None:
    """
    Attack: 50 Sybil keys in an open swarm: each claims the slot, none publishes
    Rule: none refuses them (SPEC 15, Sybils); C2 ends their protection after one grace period, C5 keeps them from
    pushing out who is at work
    Seen: alice's claim among 51, and her checkpoint; after the grace hers is the only claim that counts
    """
    sybils = [Identity.generate() for _ in range(50)]
    policy = arena.opened.plan.policy
    alice = arena.alice.identity.peer_id
    offset = 0.0

    async def open_late() -> SwarmNode:
        records = [(key.peer_id, arena.claim(stage.slot, key, until=time.time() + 300)) for key in sybils]
        sealed = [(name, claim.seal(key), claim.until) for key, (name, claim) in zip(sybils, records, strict=True)]
        for target in (arena.alice, arena.bob):
            assert await arena.rogue.offer_many(target, stage.key, sealed) == 50
        return await arena.node("sybil-late", arena.bob, arena.alice, observer=True, clock=lambda: time.time() + offset)

    with timed():
        late = arena.run(open_late())
        arena.run(arena.check_honest_claim(stage))
        arena.run(late.refresh([stage.slot]))
    assert len(late.slot_view(stage.slot).protecting(late.clock(), policy)) == 51
    assert len(late.slot_view(stage.slot).live(late.clock())) == 51

    async def work() -> None:
        await arena.publish(arena.alice, stage.slot)
        await arena.alice.refresh([stage.slot])

    arena.run(work())
    verdict = review(
        arena.opened.plan_id,
        alice,
        arena.alice.slot_view(stage.slot),
        policy=policy,
        claimed_at=time.time(),
        settled=True,
        now=time.time(),
    )
    assert verdict == Keep(stage.slot), "whoever trains does not yield to bare claims"
    offset = policy.first_checkpoint_grace_s + 5
    arena.run(late.refresh([stage.slot]))
    assert set(late.slot_view(stage.slot).protecting(late.clock(), policy)) == {alice}
    arena.run(arena.close_nodes(late))


def test_50_sybil_keys_in_a_closed_swarm(closed: Arena, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: 50 Sybil keys in a closed swarm, without a token, with a token of their own making, with another's token
    and with one for another plan
    Rule: R-ADM-1 (NotAdmitted)
    Seen: the organiser's claim and an invited peer's, and nobody else's
    """
    plan_id = closed.opened.plan_id
    stage = closed.run(closed.raise_curtain())
    guest = Identity.generate()
    token = seal_token(ORGANISER, plan_id, guest.peer_id)
    sybils = [Identity.generate() for _ in range(50)]
    tokens = [
        lambda _key: None,
        lambda key: seal_token(key, plan_id, key.peer_id),
        lambda _key: token,
        lambda key: seal_token(ORGANISER, "a" * 64, key.peer_id),
        lambda _key: "not a token",
    ]
    claims = [
        closed.claim(stage.slot, key, token=tokens[number % len(tokens)](key)) for number, key in enumerate(sybils)
    ]
    sealed = [(key.peer_id, claim.seal(key), claim.until) for key, claim in zip(sybils, claims, strict=True)]
    for subkey, envelope, until in sealed:
        with pytest.raises(NotAdmitted) as caught:
            check_store(
                {plan_id: closed.opened.plan},
                dht_id=dht_id(stage.key),
                subkey=subkey,
                value=envelope,
                expiration=until,
                now=time.time(),
            )
        named_rule(caught.value)

    async def scenario() -> None:
        invited = closed.claim(stage.slot, guest, token=token)
        with timed():
            for target in (closed.alice, closed.bob):
                assert await closed.rogue.offer_many(target, stage.key, sealed) == 0
                assert await closed.rogue.offer(target, stage.key, guest.peer_id, invited.seal(guest), invited.until)
            await closed.check_honest_claim(stage)
        assert set(await closed.carol.transport.get(stage.key)) == {ORGANISER.peer_id, guest.peer_id}

    closed.run(scenario())


async def flood(arena: Arena, stage: Stage, keys: list[Identity]) -> dict[str, int]:
    """A valid claim of every key, offered to both full peers; how many each took."""
    sealed = []
    for key in keys:
        claim = arena.claim(stage.slot, key, until=stage.claim.until + 30)
        sealed.append((key.peer_id, claim.seal(key), claim.until))
    return {
        target.home.path.name: sum(
            [
                await arena.rogue.offer_many(target, stage.key, sealed[start : start + 200])
                for start in range(0, len(sealed), 200)
            ]
        )
        for target in (arena.alice, arena.bob)
    }


def test_flood_of_subkeys(narrow: Arena, narrow_stage: Stage, timed: Timed) -> None:
    """
    Attack: a flood of subkeys under one key (nodes of this test keep eight)
    Rule: R-DHT-8: a full key refuses newcomers; who is in it renews, the organiser finds room, a node keeps its own
    Seen: alice's claim and her renewals, the organiser's claim, and a newcomer's from the newcomer's own node
    """
    arena, stage = narrow, narrow_stage

    async def scenario() -> None:
        with timed():
            taken = await flood(arena, stage, [Identity.generate() for _ in range(40)])
            assert all(count <= CAP - 1 for count in taken.values()), "alice's claim was there already"
            await arena.check_honest_claim(stage)
        late = arena.claim(stage.slot, Identity.generate())
        refused = await arena.rogue.offer(arena.bob, stage.key, late.peer, late.model_dump_json().encode(), late.until)
        assert refused is False
        await stage.renew()
        await arena.check_honest_claim(stage)
        organised = arena.claim(stage.slot, ORGANISER)
        for target in (arena.alice, arena.bob):
            assert await arena.rogue.offer(
                target, stage.key, ORGANISER.peer_id, organised.seal(ORGANISER), organised.until
            )
        dora = await arena.node("dora", arena.alice, arena.bob)
        assert not (await dora.transport.store(*await own_claim(dora, stage))), "no other node has room for her"
        found = await arena.carol.transport.get(stage.key)
        assert {ORGANISER.peer_id, dora.identity.peer_id, arena.alice.identity.peer_id} <= set(found)
        await arena.close_nodes(dora)

    arena.run(scenario())


async def own_claim(node: SwarmNode, stage: Stage) -> tuple[str, str, bytes, float]:
    claim = await node.publish_claim(stage.slot, PROGRESS)
    envelope = node.files.ledger.last("claim", stage.slot)
    assert envelope is not None
    return stage.key, claim.peer, envelope, claim.until


@pytest.mark.slow
def test_10_000_subkeys(arena: Arena, stage: Stage, timed: Timed) -> None:
    """
    Attack: 10,000 subkeys under one key, and an answer with as many as fit into one message
    Rule: R-DHT-8: at most 256 are kept; a reader judges at most 512 of one answer
    Seen: alice's claim (the time is that of 20,000 offers to two nodes, each signature judged)
    """
    keys = [Identity.generate() for _ in range(10_000)]

    async def scenario() -> None:
        with timed():
            taken = await flood(arena, stage, keys)
            assert all(count == MAX_SUBKEYS - 1 for count in taken.values())
            await arena.check_honest_claim(stage)
        claims = [(key, arena.claim(stage.slot, key, until=stage.claim.until + 60)) for key in keys[:3000]]
        crowd = [(key.peer_id, pack(claim.seal(key)), claim.until) for key, claim in claims]
        with arena.rogue.answering(crowd):
            await arena.rogue.meet(arena.bob, arena.carol)
            await arena.check_honest_claim(stage)
            found = await arena.carol.transport.get(stage.key)
            assert len(found) <= 3 * MAX_SUBKEYS

    arena.run(scenario(), limit_s=280)


def test_strangers_announcement_in_a_members_holding(closed: Arena, timed: Timed) -> None:
    """
    Attack: a holding by an admitted peer that carries the announcement of a peer without a token
    Rule: R-REC-7, R-ADM-1 (NotAdmitted): the announcement inside passes every rule of its own
    Seen: no checkpoint of a stranger, whoever holds it
    """
    slot = closed.next_slot()
    stranger = Identity.generate()
    announcement = closed.announcement(slot, stranger).seal(stranger)
    holding = closed.holding(slot, announcement, ORGANISER)
    key = f"paris/{closed.opened.plan_id}/ckpt/{slot}"

    async def scenario() -> None:
        with timed():
            for target in (closed.alice, closed.bob):
                assert not await closed.rogue.offer(
                    target, key, ORGANISER.peer_id, holding.seal(ORGANISER), holding.until
                )
            assert await closed.carol.transport.get(key) == {}

    closed.run(scenario())
    with pytest.raises(RecordError):
        closed.bob.trusted.feed_holding(holding.seal(ORGANISER), time.time())
