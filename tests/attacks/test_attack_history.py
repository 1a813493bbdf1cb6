"""Replays, rollbacks, freezes, equivocation and early eviction: old truths and double tongues, on real nodes."""

from __future__ import annotations

import asyncio
import time

import pytest
from arena import Arena, Stage, forge, pack
from fixture_types import NamedRule, Timed
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage

from paris_swarm.dht_schemas.errors import Equivocation, Rollback
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.trusted import TrustedSwarm


def test_replay_of_an_old_claim(stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: replay of an old claim: alice's earlier claim, still within its lease, offered again after she renewed
    Rule: R-SET-2 (Rollback); a node keeps the record that ends later
    Seen: alice's newest claim
    """
    arena, claim, envelope = stage.arena, stage.claim, stage.envelope

    async def scenario() -> None:
        await stage.renew()
        assert stage.claim.seq > claim.seq
        await arena.check_honest_claim(stage)
        with timed():
            for target in (arena.alice, arena.bob):
                await arena.rogue.offer(target, stage.key, claim.peer, envelope, claim.until)
            await arena.check_honest_claim(stage)
        with pytest.raises(Rollback) as caught:
            arena.bob.trusted.feed_claim(envelope, time.time())
        named_rule(caught.value)

    arena.run(scenario())


def test_replay_of_an_old_announcement(stage: Stage, timed: Timed) -> None:
    """
    Attack: replay of an old announcement: mallory holds and serves alice's first checkpoint, long replaced
    Rule: R-SET-2: an announcement is a timeless fact and no rollback; the better probe loss decides (SPEC 15)
    Seen: alice's newest checkpoint first, the old one after it
    """
    arena = stage.arena

    async def scenario() -> None:
        old = await arena.publish(arena.alice, stage.slot, step=10, probe_loss=0.4)
        envelope = arena.alice.files.ledger.last("checkpoint", stage.slot)
        assert envelope is not None
        await arena.bob.refresh([stage.slot])
        new = await arena.publish(arena.alice, stage.slot, step=60, probe_loss=0.2)
        replayed = arena.holding(stage.slot, envelope, until=time.time() + 200)
        with timed():
            for target in (arena.alice, arena.bob):
                me = arena.mallory.peer_id
                assert await arena.rogue.offer(target, stage.ckpt_key, me, replayed.seal(arena.mallory), replayed.until)
            await arena.carol.refresh([stage.slot])
            found = [candidate.announcement.root for candidate in arena.carol.candidates(stage.slot)]
        assert found == [new.root, old.root]
        assert arena.carol.slot_view(stage.slot).step == 60

    arena.run(scenario())


def test_rollback_across_a_restart(stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: rollback: a reader restarts and is served nothing but the claim from before, still within its lease
    Rule: R-SET-2 (Rollback): the highest sequence of every signer is kept on disk
    Seen: the newest claim seen, or none; never the older one
    """
    arena, old = stage.arena, stage.envelope

    async def scenario() -> None:
        await stage.renew()
        await arena.carol.refresh([stage.slot])
        kept = arena.carol.home.swarm(arena.opened.plan_id, ledger="observer.json").ledger.highest()
        restarted = TrustedSwarm(arena.opened, highest=kept)
        with timed(), pytest.raises(Rollback) as caught:
            restarted.feed_claim(old, time.time())
        named_rule(caught.value)
        assert restarted.claims[stage.slot] == {}
        assert restarted.feed_claim(stage.envelope, time.time()) == stage.claim

    arena.run(scenario())


def test_freeze(stage: Stage, timed: Timed) -> None:
    """
    Attack: freeze: a node that holds records answers every question with the state of a minute ago, all of it valid
    Rule: R-SET-2; a search asks every near node and takes the newest, and what is frozen dies with its lease (R-REC-5)
    Seen: alice's newest claim and checkpoint, as long as one honest node near the key answers
    """
    arena, alice = stage.arena, stage.arena.alice.identity.peer_id

    async def scenario() -> None:
        frozen = [(alice, pack(stage.envelope), stage.claim.until)]
        await stage.renew()
        with arena.rogue.answering(frozen):
            await arena.rogue.meet(arena.bob, arena.carol)
            with timed():
                await arena.check_honest_claim(stage)
            # Whoever asks the frozen node alone gets the old claim, and not for longer than its lease.
            answer = await arena.carol.transport._records.node.protocol.call_find(  # type: ignore[attr-defined]
                arena.rogue.node.peer_id, [DHTID.generate(stage.key)]
            )
            ((found, _nearest),) = answer.values()
            assert found.value.get(alice).expiration_time == frozen[0][2] <= time.time() + 120

    arena.run(scenario())


def test_equivocation(stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: equivocation: two announcements of different checkpoints under one sequence, spread by two holders
    Rule: R-SET-3, R-SET-4 (Equivocation): both envelopes are kept as proof, and the signer is out
    Seen: alice's claim; nothing that the equivocator signed, its claim included
    """
    arena, other = stage.arena, Identity.generate()
    liar = Identity.generate()
    seq = int(time.time() * 1000)

    async def scenario() -> None:
        one = arena.announcement(stage.slot, liar, seq=seq, root="1" * 64).seal(liar)
        two = arena.announcement(stage.slot, liar, seq=seq, root="2" * 64).seal(liar)
        claim = arena.claim(stage.slot, liar)
        assert await arena.rogue.offer(arena.alice, stage.key, liar.peer_id, claim.seal(liar), claim.until)
        for holder, envelope in ((liar, one), (other, two)):
            holding = arena.holding(stage.slot, envelope, holder)
            assert await arena.rogue.offer(
                arena.alice, stage.ckpt_key, holder.peer_id, holding.seal(holder), holding.until
            )
        with timed():
            await arena.carol.refresh([stage.slot])
        trusted = arena.carol.trusted
        assert liar.peer_id in trusted.outlaws
        proof = next(proof for proof in trusted.proofs if proof.signer == liar.peer_id)
        assert {proof.first, proof.second} == {one, two}
        assert liar.peer_id not in trusted.claims[stage.slot]
        assert arena.carol.candidates(stage.slot) == []
        with pytest.raises(Equivocation) as caught:
            trusted.feed_claim(arena.claim(stage.slot, liar, seq=seq + 9).seal(liar), time.time())
        named_rule(caught.value)

    arena.run(scenario())


def test_equivocation_in_claims(stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: equivocation between replicas: one claim to alice and another of the same sequence and end to bob
    Rule: R-SET-3 (Equivocation), by whoever sees both
    Seen: alice's claim; a reader that sees only one of the two sees that one until its lease ends
    """
    arena, liar = stage.arena, Identity.generate()
    one = arena.claim(stage.slot, liar)
    two = one.model_copy(update={"progress": one.progress.model_copy(update={"step": 99})})

    async def scenario() -> None:
        for target, claim in ((arena.alice, one), (arena.bob, two)):
            assert await arena.rogue.offer(target, stage.key, liar.peer_id, claim.seal(liar), claim.until)
        seen = [(await node.transport.get(stage.key))[liar.peer_id][0] for node in (arena.alice, arena.bob)]
        assert set(seen) <= {one.seal(liar), two.seal(liar)}
        reader = TrustedSwarm(arena.opened)
        reader.feed_claim(one.seal(liar), time.time())
        with timed(), pytest.raises(Equivocation) as caught:
            reader.feed_claim(two.seal(liar), time.time())
        named_rule(caught.value)
        assert reader.claims[stage.slot] == {}
        assert liar.peer_id in reader.outlaws

    arena.run(scenario())


def test_early_eviction_by_a_rejected_store(stage: Stage, timed: Timed) -> None:
    """
    Attack: early eviction: hivemind's storage refuses an older record and yet drops the newer one when the older ends
    Rule: R-SET-1, R-REC-9; our storage never shortens a life, and a peer stores its records again while it lives
    Seen: alice's claim, on our nodes throughout; after a plain hivemind node lost it, from her next renewal on
    """
    arena = stage.arena
    alice, place = arena.alice.identity.peer_id, DHTID.generate(stage.key)

    async def scenario() -> None:
        # The fault itself, in hivemind's own storage: stored until later, offered again until sooner.
        brief = time.time() + 0.3
        stock = DHTLocalStorage()
        assert stock.store_subkey(place, "subkey", b"new", stage.claim.until)
        assert not stock.store_subkey(place, "subkey", b"old", brief)
        # The same offer to our nodes: a valid older claim of alice that ends in a moment.
        older = stage.claim.model_copy(update={"seq": stage.claim.seq - 1, "until": brief})
        envelope = forge(arena.alice.identity, "claim", older.model_dump())
        with timed():
            for target in (arena.alice, arena.bob):
                await arena.rogue.offer(target, stage.key, alice, envelope, brief)
            while time.time() <= brief:
                await asyncio.sleep(brief - time.time() + 0.01)
            await arena.check_honest_claim(stage)
        entry = stock.get(place)
        assert entry is None or entry.value.get("subkey") is None, "hivemind lost the newer record"
        # A plain node among the replicas lost it; the honest peer's own memory did not, and it stores it again.
        assert arena.alice.trusted.claims[stage.slot][alice] == stage.claim
        arena.rogue.node.protocol.storage.data.pop(place, None)
        await stage.renew()
        back = arena.rogue.node.protocol.storage.get(place)
        assert back is not None and back.value.get(alice) is not None

    arena.run(scenario())


def test_sequence_from_the_end_of_time(stage: Stage, timed: Timed) -> None:
    """
    Attack: time travel: a checkpoint and a claim with sequence 2^53 - 1, to look fresh for ever and be the last word
    Rule: R-SET-8, R-REC-11: a checkpoint counts as made when the reader first saw it, if its sequence says later
    Seen: alice's claim; the traveller's claim is stale two cadences after its only checkpoint was first seen
    """
    arena = stage.arena
    last = 2**53 - 1
    traveller = Identity.generate()
    offset = 0.0

    async def scenario() -> None:
        nonlocal offset
        late = await arena.node("late", arena.alice, arena.bob, observer=True, clock=lambda: time.time() + offset)
        announcement = arena.announcement(stage.slot, traveller, seq=last, root="7" * 64).seal(traveller)
        claim = arena.claim(stage.slot, traveller, seq=last, until=time.time() + 700)
        holding = arena.holding(stage.slot, announcement, traveller, seq=last, until=time.time() + 700)
        for key, record in ((stage.key, claim), (stage.ckpt_key, holding)):
            assert await arena.rogue.offer(arena.bob, key, traveller.peer_id, record.seal(traveller), record.until)
        policy = arena.opened.plan.policy
        with timed():
            await late.refresh([stage.slot])
            view, now = late.slot_view(stage.slot), late.clock()
            assert traveller.peer_id in view.protecting(now, policy)
        offset = 2 * policy.checkpoint_every_s + policy.first_checkpoint_grace_s + 1
        await late.refresh([stage.slot])
        view, now = late.slot_view(stage.slot), late.clock()
        assert traveller.peer_id in view.live(now)
        assert traveller.peer_id not in view.protecting(now, policy)
        assert late.last_seen[traveller.peer_id] <= now
        await arena.close_nodes(late)

    arena.run(scenario())


def test_a_reader_fed_backwards(arena: Arena, stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: mix: releases and claims of one peer delivered in the wrong order, to make a slot look held or free
    Rule: R-SET-2 (Rollback): within one signer the higher sequence is the truth, in whatever order it comes
    Seen: the peer's last word
    """
    liar = Identity.generate()
    first = arena.claim(stage.slot, liar, seq=100)
    released = arena.claim(stage.slot, liar, seq=101, released=True)
    reader = TrustedSwarm(arena.opened)
    with timed():
        reader.feed_claim(released.seal(liar), time.time())
        with pytest.raises(Rollback) as caught:
            reader.feed_claim(first.seal(liar), time.time())
    named_rule(caught.value)
    assert reader.claims[stage.slot][liar.peer_id].released
