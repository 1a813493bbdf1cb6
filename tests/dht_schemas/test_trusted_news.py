"""The trusted set and what outranks single records: notices, proofs from others, own lists; and its bounded memory."""

from __future__ import annotations

from typing import Any

import pytest

import paris_swarm.dht_schemas.trusted as trusted_module
from paris_swarm.dht_schemas import (
    BadSignature,
    Blocked,
    Equivocation,
    Identity,
    LeaseExpired,
    MalformedRecord,
    NotAProof,
    Notice,
    PeerLists,
    RecordError,
    Revoked,
    Rollback,
    TrustedSwarm,
    WrongKind,
    WrongPlan,
    WrongSigner,
    WrongSlot,
    check_proof,
    check_store,
    checkpoint_key,
    claim_key,
    dht_id,
    seal_notice,
)


@pytest.fixture
def swarm(world: Any) -> TrustedSwarm:
    return TrustedSwarm(world.opened)


def said(world: Any, number: int, *revoked: Identity, **changes: Any) -> bytes:
    keys = tuple(sorted(identity.peer_id for identity in revoked))
    values: dict[str, Any] = {"plan": world.opened.plan_id, "number": number, "state": "running", "revoked": keys}
    return seal_notice(world.organiser, Notice(**{**values, **changes}))


def contradiction(world: Any, identity: Identity, **changes: Any) -> tuple[bytes, bytes]:
    return (
        world.claim(identity, **changes).seal(identity),
        world.claim(identity, released=True, **changes).seal(identity),
    )


# ---- notices ---------------------------------------------------------------------------------------------------------


def test_a_revoked_key_is_dropped_with_all_it_signed_and_refused_from_then_on(world: Any, swarm: TrustedSwarm) -> None:
    swarm.feed_claim(world.claim().seal(world.alice), world.now)
    swarm.feed_claim(world.claim(world.bob).seal(world.bob), world.now)
    carried = world.holding(world.bob)
    swarm.feed_holding(carried.seal(world.bob), world.now)
    swarm.feed_notice(said(world, 1, world.alice))
    assert swarm.claims["0"].keys() == {world.bob.peer_id}
    assert swarm.holdings["0"] == {}, "what bob held was alice's announcement"
    for feed, data in (
        (swarm.feed_claim, world.claim(seq=11).seal(world.alice)),
        (swarm.feed_holding, world.holding(world.bob, seq=11).seal(world.bob)),
        (swarm.feed_holding, world.holding(world.alice, seq=11).seal(world.alice)),
    ):
        with pytest.raises(Revoked) as caught:
            feed(data, world.now)
        assert caught.value.rule == "R-NOT-5"
        assert "notice 1" in str(caught.value)
    swarm.feed_claim(world.claim(world.bob, seq=11).seal(world.bob), world.now)


def test_the_next_notice_restores_whom_it_does_not_list(world: Any, swarm: TrustedSwarm) -> None:
    swarm.feed_notice(said(world, 1, world.alice))
    swarm.feed_notice(said(world, 2, world.bob, state="paused"))
    swarm.feed_claim(world.claim().seal(world.alice), world.now)
    assert swarm.standing.state == "paused"
    with pytest.raises(Rollback) as caught:
        swarm.feed_notice(said(world, 1, world.alice))
    assert caught.value.rule == "R-NOT-3"
    assert swarm.standing.revoked == {world.bob.peer_id}
    swarm.feed_notice(said(world, 2, world.bob, state="paused"))
    assert not swarm.standing.contradicted, "the same notice again is no contradiction"


def test_a_refused_notice_changes_nothing(world: Any, swarm: TrustedSwarm) -> None:
    swarm.feed_notice(said(world, 1, message="good"))
    before = swarm.standing
    other = Notice(plan=world.invited.plan_id, number=9, state="ended")
    for data in (
        seal_notice(world.organiser, other),
        seal_notice(world.alice, Notice(plan=world.opened.plan_id, number=9, state="ended")),
        said(world, 9, world.organiser),
        b"{}",
    ):
        with pytest.raises(RecordError):
            swarm.feed_notice(data)
        assert swarm.standing == before


def test_contradicting_notices_both_count(world: Any, swarm: TrustedSwarm) -> None:
    swarm.feed_notice(said(world, 5, world.alice))
    swarm.feed_notice(said(world, 5, world.bob, state="ended"))
    assert swarm.standing.contradicted
    assert swarm.standing.state == "ended"
    for identity in (world.alice, world.bob):
        with pytest.raises(Revoked):
            swarm.feed_claim(world.claim(identity).seal(identity), world.now)
    assert len(swarm.notices) == 2


# ---- own lists, and the validator ------------------------------------------------------------------------------------


def test_own_lists_refuse_records_of_the_blocked_and_of_authors_that_are(world: Any) -> None:
    swarm = TrustedSwarm(world.opened, lists=PeerLists(blocked=frozenset({world.alice.peer_id})))
    with pytest.raises(Blocked):
        swarm.feed_claim(world.claim().seal(world.alice), world.now)
    with pytest.raises(Blocked):
        swarm.feed_holding(world.holding(world.bob).seal(world.bob), world.now)
    swarm.feed_claim(world.claim(world.bob).seal(world.bob), world.now)


@pytest.mark.parametrize("out", ["revoked", "outlawed", "blocked"])
def test_a_validator_stores_nothing_of_whoever_is_out(world: Any, swarm: TrustedSwarm, out: str) -> None:
    claim, carried = world.claim(), world.holding(world.bob)

    def store(key: str, record: Any, identity: Identity) -> None:
        check_store(
            {world.opened.plan_id: world.opened.plan},
            dht_id=dht_id(key),
            subkey=identity.peer_id,
            value=record.seal(identity),
            expiration=record.until,
            now=world.now,
            check_signer=swarm.check_signer,
        )

    claims, checkpoints = claim_key(world.opened.plan_id, "0"), checkpoint_key(world.opened.plan_id, "0")
    store(claims, claim, world.alice)
    store(checkpoints, carried, world.bob)
    error: type[RecordError]
    if out == "revoked":
        swarm.feed_notice(said(world, 1, world.alice))
        error = Revoked
    elif out == "outlawed":
        swarm.feed_proof(*contradiction(world, world.alice))
        error = Equivocation
    else:
        swarm.lists = PeerLists(blocked=frozenset({world.alice.peer_id}))
        error = Blocked
    with pytest.raises(error):
        store(claims, claim, world.alice)
    with pytest.raises(error):
        store(checkpoints, carried, world.bob)


# ---- proofs ----------------------------------------------------------------------------------------------------------


def test_a_proof_from_anybody_puts_its_signer_out(world: Any, swarm: TrustedSwarm) -> None:
    swarm.feed_claim(world.claim(seq=9).seal(world.alice), world.now)
    swarm.feed_holding(world.holding(world.bob).seal(world.bob), world.now)
    first, second = contradiction(world, world.alice)
    proof = swarm.feed_proof(first, second)
    assert proof is not None
    assert (proof.signer, proof.kind, proof.slot, proof.seq) == (world.alice.peer_id, "claim", "0", 10)
    assert swarm.claims["0"] == swarm.holdings["0"] == {}
    with pytest.raises(Equivocation) as caught:
        swarm.feed_claim(world.claim(seq=12).seal(world.alice), world.now)
    assert caught.value.rule == "R-SET-4"
    assert swarm.feed_proof(second, first) is None, "it is out already"
    assert len(swarm.proofs) == 1


def test_proofs_are_timeless(world: Any, swarm: TrustedSwarm) -> None:
    first, second = contradiction(world, world.alice, until=1.0)
    assert swarm.feed_proof(first, second) is not None


def test_what_proves_nothing(world: Any, swarm: TrustedSwarm) -> None:
    claim, other = contradiction(world, world.alice)
    later = world.claim(seq=11).seal(world.alice)
    elsewhere = world.claim(slot="1", released=True).seal(world.alice)
    bobs = world.claim(world.bob, released=True).seal(world.bob)
    foreign = contradiction(world, world.alice, plan=world.invited.plan_id)
    nowhere = contradiction(world, world.alice, slot="77")
    announcement = world.announcement().seal(world.alice)
    stolen = world.forge(world.bob, "claim", world.claim(released=True).model_dump())
    damaged = other[:40] + (b"B" if other[40:41] != b"B" else b"C") + other[41:]
    for first, second, error in (
        (claim, claim, NotAProof),
        (claim, later, NotAProof),
        (claim, elsewhere, NotAProof),
        (claim, bobs, NotAProof),
        (claim, announcement, NotAProof),
        (*foreign, WrongPlan),
        (claim, foreign[1], WrongPlan),
        (*nowhere, WrongSlot),
        (claim, stolen, WrongSigner),
        (claim, damaged, (BadSignature, MalformedRecord)),
        (claim, said(world, 1), WrongKind),
        (claim, b"", MalformedRecord),
    ):
        with pytest.raises(error):
            swarm.feed_proof(first, second)
    assert not swarm.outlaws
    assert not swarm.proofs


@pytest.mark.parametrize("kind", ["claim", "checkpoint", "holding"])
def test_every_kind_of_record_can_prove(world: Any, swarm: TrustedSwarm, kind: str) -> None:
    made = {
        "claim": [world.claim(until=world.now + n) for n in (1, 2)],
        "checkpoint": [world.announcement(step=n) for n in (1, 2)],
        "holding": [world.holding(until=world.now + n) for n in (1, 2)],
    }[kind]
    proof = check_proof(swarm.plan, swarm.plan_id, *(record.seal(world.alice) for record in made))
    assert proof.kind == kind


def test_keys_made_up_to_fill_the_list_give_way_and_are_not_passed_on(
    world: Any, swarm: TrustedSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-SET-7"""
    monkeypatch.setattr(trusted_module, "MAX_OUTLAWS", 6)
    swarm.feed_claim(world.claim(seq=9).seal(world.alice), world.now)
    swarm.feed_proof(*contradiction(world, world.alice))
    made_up = [Identity(bytes([n]) * 32) for n in range(1, 12)]
    for identity in made_up:
        swarm.feed_proof(*contradiction(world, identity))
    assert len(swarm.proofs) == len(swarm.outlaws) == 6
    assert world.alice.peer_id in swarm.outlaws, "it had records here: it does not give way to unheard-of keys"
    assert [proof.signer for proof in swarm.notable_proofs()] == [world.alice.peer_id]
    last = made_up[-1]
    with pytest.raises(Equivocation):
        swarm.feed_claim(world.claim(last).seal(last), world.now)
    assert {proof.signer for proof in swarm.notable_proofs()} == {world.alice.peer_id, last.peer_id}


def test_own_half_proofs_count_here_and_are_not_passed_on(world: Any, swarm: TrustedSwarm) -> None:
    _first, second = contradiction(world, world.alice)
    assert swarm.feed_own_proof(None, second) is not None
    assert swarm.outlaws == {world.alice.peer_id}
    assert swarm.notable_proofs() == []
    with pytest.raises(WrongPlan):
        swarm.feed_own_proof(None, world.claim(plan=world.invited.plan_id).seal(world.alice))


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_sequences_are_forgotten_when_nothing_can_be_replayed_any_more(world: Any, swarm: TrustedSwarm) -> None:
    """R-SET-5"""
    old = world.claim(until=world.now + 900).seal(world.alice)
    swarm.feed_claim(old, world.now)
    swarm.feed_claim(world.claim(seq=11, until=world.now + 20).seal(world.alice), world.now + 1)
    author = (world.alice.peer_id, "claim", "0")
    for later in (21, 800, 899):
        swarm.expire(world.now + later)
        assert author in swarm.highest
        with pytest.raises(Rollback):
            swarm.feed_claim(old, world.now + later)
    swarm.expire(world.now + 907)
    assert swarm.highest == {}
    with pytest.raises(LeaseExpired):
        swarm.feed_claim(old, world.now + 907)


def test_after_a_restart_sequences_live_on_for_as_long(world: Any, swarm: TrustedSwarm) -> None:
    swarm.feed_claim(world.claim(seq=11).seal(world.alice), world.now)
    again = TrustedSwarm(world.opened, swarm.highest)
    again.expire(world.now + 500)
    with pytest.raises(Rollback):
        again.feed_claim(world.claim(until=world.now + 900).seal(world.alice), world.now + 500)
    again.expire(world.now + 500 + 906)
    assert again.highest == {}


def test_a_flood_of_keys_is_forgotten_and_live_leases_are_not(
    world: Any, swarm: TrustedSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trusted_module, "MAX_SEEN", 5)
    swarm.feed_claim(world.claim(seq=11, until=world.now + 600).seal(world.alice), world.now)
    flood = [Identity(bytes([n]) * 32) for n in range(1, 30)]
    for n, identity in enumerate(flood):
        swarm.feed_claim(world.claim(identity, until=world.now + 40).seal(identity), world.now + n)
        announcement = world.announcement(identity, root=f"{n:064x}").seal(identity)
        swarm.feed_holding(world.holding(identity, announcement, until=world.now + 40).seal(identity), world.now + n)
    swarm.expire(world.now + 41)
    seen = {kind: sum(author[1] == kind for author in swarm.highest) for kind in ("claim", "holding", "checkpoint")}
    assert seen == {"claim": 5 + 1, "holding": 5, "checkpoint": 5}
    with pytest.raises(Rollback):
        swarm.feed_claim(world.claim(until=world.now + 600).seal(world.alice), world.now + 41)
    newest = {identity.peer_id for identity in flood[-5:]}
    assert {author[0] for author in swarm.highest} == newest | {world.alice.peer_id}


def test_a_sequence_from_the_far_future_harms_its_signer_alone(world: Any, swarm: TrustedSwarm) -> None:
    last = 2**53 - 1
    swarm.feed_claim(world.claim(seq=last).seal(world.alice), world.now)
    swarm.feed_claim(world.claim(world.bob).seal(world.bob), world.now)
    assert swarm.claims["0"].keys() == {world.alice.peer_id, world.bob.peer_id}
    with pytest.raises(ValueError, match="9007199254740991"):
        world.claim(seq=last + 1)
    with pytest.raises(Rollback):
        swarm.feed_claim(world.claim(seq=last - 1, until=world.now + 90).seal(world.alice), world.now)
    swarm.expire(world.now + 61)
    assert swarm.claims["0"] == {}, "it could not renew: its claim ended with its lease"
