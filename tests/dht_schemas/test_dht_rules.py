"""What a node may store: nothing but a signed claim or holding of a known plan in its own place."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas import (
    BadSignature,
    CheckpointTooLarge,
    Claim,
    Holding,
    LeaseExpired,
    LeaseMismatch,
    LeaseTooLong,
    MalformedRecord,
    NotAdmitted,
    RecordError,
    RecordTooLarge,
    WrongKey,
    WrongKind,
    WrongPlan,
    WrongSigner,
    WrongSlot,
    check_store,
    checkpoint_key,
    claim_key,
    dht_id,
    seal_token,
)


def store(world: Any, value: object, **changes: Any) -> Claim | Holding:
    """Store alice's value in the place of a claim of slot 0, but for ``changes``."""
    arguments: dict[str, Any] = {
        "dht_id": dht_id(claim_key(world.opened.plan_id, "0")),
        "subkey": world.alice.peer_id,
        "value": value,
        "expiration": world.now + 60.25,
        "now": world.now,
    }
    plans = {opened.plan_id: opened.plan for opened in (world.opened, world.invited)}
    return check_store(plans, **{**arguments, **changes})


def ckpt(world: Any, slot: str = "0") -> bytes:
    return dht_id(checkpoint_key(world.opened.plan_id, slot))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300))
def test_keys_are_placed_where_hivemind_places_them(key: str) -> None:
    """R-DHT-6"""
    from hivemind.dht.routing import DHTID

    assert dht_id(key) == DHTID.generate(key).to_bytes()


@pytest.mark.parametrize("length", [0, 31, 32, 255, 256, 65535])
def test_every_length_of_key(length: int) -> None:
    from hivemind.dht.routing import DHTID

    assert dht_id("k" * length) == DHTID.generate("k" * length).to_bytes()


def test_a_key_that_is_none() -> None:
    with pytest.raises(ValueError, match="longer"):
        dht_id("k" * 65536)


def test_key_names(world: Any) -> None:
    plan_id = world.opened.plan_id
    assert claim_key(plan_id, "router") == f"paris/{plan_id}/claim/router"
    assert checkpoint_key(plan_id, "0") == f"paris/{plan_id}/ckpt/0"


def test_good_records_are_stored(world: Any) -> None:
    claim = world.claim()
    assert store(world, claim.seal(world.alice)) == claim
    holding = world.holding()
    assert store(world, holding.seal(world.alice), dht_id=ckpt(world)) == holding
    second_hand = world.holding(world.bob)
    stored = store(world, second_hand.seal(world.bob), dht_id=ckpt(world), subkey=world.bob.peer_id)
    assert stored == second_hand
    released = world.claim(released=True)
    assert store(world, released.seal(world.alice)) == released


@pytest.mark.parametrize("value", [None, 1, "text", [b"x"], {"a": b"x"}, bytearray(b"x"), 1.5, True])
def test_values_that_are_not_bytes(world: Any, value: object) -> None:
    with pytest.raises(MalformedRecord) as caught:
        store(world, value)
    assert caught.value.rule == "R-DHT-1"


def test_a_plain_value_would_wipe_the_dictionary(world: Any) -> None:
    with pytest.raises(WrongKey):
        store(world, world.claim().seal(world.alice), subkey=None)


@pytest.mark.parametrize("subkey", [b"bytes", 5, ("a",), True])
def test_subkeys_that_are_not_text(world: Any, subkey: Any) -> None:
    with pytest.raises(WrongKey):
        store(world, world.claim().seal(world.alice), subkey=subkey)


@pytest.mark.parametrize(
    "make", [lambda w: w.bob.peer_id, lambda w: w.alice.peer_id + "|x", lambda w: "", lambda w: "\x00" * 9999]
)
def test_the_subkey_of_another(world: Any, make: Any) -> None:
    with pytest.raises(WrongSigner) as caught:
        store(world, world.claim().seal(world.alice), subkey=make(world))
    assert caught.value.rule == "R-DHT-4"
    assert len(str(caught.value)) < 500


def test_a_copy_of_somebody_elses_record_under_ones_own_subkey(world: Any) -> None:
    with pytest.raises(WrongSigner):
        store(world, world.claim().seal(world.alice), subkey=world.bob.peer_id)


@pytest.mark.parametrize("size", [4097, 1_000_000])
def test_size(world: Any, size: int) -> None:
    with pytest.raises(RecordTooLarge):
        store(world, b"x" * size)


@pytest.mark.parametrize("expiration", [math.inf, -math.inf, math.nan, 1e18, 1_800_000_905.5])
def test_leases_without_end(world: Any, expiration: float) -> None:
    with pytest.raises(LeaseTooLong):
        store(world, world.claim().seal(world.alice), expiration=expiration)
    if math.isfinite(expiration) and expiration < 1e16:
        honestly_signed = world.claim(until=expiration).seal(world.alice)
        with pytest.raises(LeaseTooLong):
            store(world, honestly_signed, expiration=expiration)


@pytest.mark.parametrize("expiration", [None, "1", True, b"1"])
def test_expirations_that_are_no_numbers(world: Any, expiration: Any) -> None:
    with pytest.raises(MalformedRecord):
        store(world, world.claim().seal(world.alice), expiration=expiration)


def test_the_bounds_of_a_lease(world: Any) -> None:
    for left, error in (
        (905.0, None),
        (905.001, LeaseTooLong),
        (0.001, None),
        (0.0, LeaseExpired),
        (-1.0, LeaseExpired),
    ):
        until = world.now + left
        value = world.claim(until=until).seal(world.alice)
        if error is None:
            store(world, value, expiration=until)
        else:
            with pytest.raises(error):
                store(world, value, expiration=until)


def test_the_expiration_is_the_one_signed(world: Any) -> None:
    with pytest.raises(LeaseMismatch):
        store(world, world.claim().seal(world.alice), expiration=math.nextafter(world.now + 60.25, math.inf))


def test_a_replayed_claim_has_expired(world: Any) -> None:
    with pytest.raises(LeaseExpired):
        store(world, world.claim().seal(world.alice), now=world.now + 61)
    with pytest.raises(LeaseMismatch):
        store(world, world.claim().seal(world.alice), now=world.now + 61, expiration=world.now + 121)


def test_the_key_of_another_slot_kind_or_plan(world: Any) -> None:
    claim, holding = world.claim().seal(world.alice), world.holding().seal(world.alice)
    plan_id = world.opened.plan_id
    for value, key in (
        (claim, claim_key(plan_id, "1")),
        (claim, checkpoint_key(plan_id, "0")),
        (claim, claim_key(world.invited.plan_id, "0")),
        (claim, "anything"),
        (holding, claim_key(plan_id, "0")),
        (holding, checkpoint_key(plan_id, "router")),
    ):
        with pytest.raises(WrongKey):
            store(world, value, dht_id=dht_id(key))
    with pytest.raises(WrongKey):
        store(world, claim, dht_id=b"")


def test_other_kinds_are_not_stored(world: Any) -> None:
    for value in (
        world.opened.envelope[:4096]
        if len(world.opened.envelope) <= 4096
        else world.forge(world.organiser, "plan", {}),
        world.announcement().seal(world.alice),
        seal_token(world.organiser, world.opened.plan_id, world.alice.peer_id).encode(),
        world.forge(world.alice, "lock", {}),
    ):
        with pytest.raises(WrongKind):
            store(world, value)


def test_unknown_plan_and_slot(world: Any) -> None:
    stranger = "d" * 64
    with pytest.raises(WrongPlan):
        store(world, world.claim(plan=stranger).seal(world.alice), dht_id=dht_id(claim_key(stranger, "0")))
    for slot in ("3", "1023"):
        with pytest.raises(WrongSlot):
            store(world, world.claim(slot=slot).seal(world.alice), dht_id=dht_id(claim_key(world.opened.plan_id, slot)))


def test_the_announcement_inside_is_checked_too(world: Any) -> None:
    def refused(error: type[RecordError], announcement: bytes, **changes: Any) -> None:
        value = world.holding(world.bob, announcement, **changes).seal(world.bob)
        with pytest.raises(error):
            store(world, value, dht_id=ckpt(world, changes.get("slot", "0")), subkey=world.bob.peer_id)

    good = world.announcement()
    envelope = good.seal(world.alice)
    refused(MalformedRecord, b"rubbish")
    refused(MalformedRecord, b"")
    refused(WrongKind, world.claim().seal(world.alice))
    refused(WrongSigner, world.forge(world.bob, "checkpoint", good.model_dump()))
    refused(BadSignature, envelope.replace(world.alice.peer_id.encode(), world.bob.peer_id.encode()))
    refused(WrongSlot, envelope, slot="1")
    refused(WrongPlan, world.announcement(plan=world.invited.plan_id).seal(world.alice))
    refused(CheckpointTooLarge, world.announcement(bytes=10_000_001).seal(world.alice))


def test_a_closed_swarm(world: Any) -> None:
    plan_id = world.invited.plan_id
    place = dht_id(claim_key(plan_id, "0"))

    def attempt(token: str | None) -> Claim | Holding:
        return store(world, world.claim(plan=plan_id, token=token).seal(world.alice), dht_id=place)

    good = seal_token(world.organiser, plan_id, world.alice.peer_id)
    assert attempt(good).token == good
    for token in (
        None,
        "",
        "rubbish",
        seal_token(world.alice, plan_id, world.alice.peer_id),
        seal_token(world.organiser, plan_id, world.bob.peer_id),
        seal_token(world.organiser, world.opened.plan_id, world.alice.peer_id),
        good.replace("A", "B", 1),
        world.forge(world.organiser, "lock", {"plan": plan_id, "peer": world.alice.peer_id}).decode(),
    ):
        with pytest.raises(NotAdmitted):
            attempt(token)
    organisers_own = world.claim(world.organiser, plan=plan_id).seal(world.organiser)
    assert store(world, organisers_own, dht_id=place, subkey=world.organiser.peer_id)


def test_a_closed_swarm_asks_author_and_holder(world: Any) -> None:
    plan_id = world.invited.plan_id
    place = dht_id(checkpoint_key(plan_id, "0"))
    tokens = {peer.peer_id: seal_token(world.organiser, plan_id, peer.peer_id) for peer in (world.alice, world.bob)}

    def attempt(author_token: str | None, holder_token: str | None) -> Claim | Holding:
        inner = world.announcement(plan=plan_id, token=author_token).seal(world.alice)
        value = world.holding(world.bob, inner, plan=plan_id, token=holder_token).seal(world.bob)
        return store(world, value, dht_id=place, subkey=world.bob.peer_id)

    alice, bob = tokens[world.alice.peer_id], tokens[world.bob.peer_id]
    assert attempt(alice, bob)
    for pair in ((None, bob), (alice, None), (bob, bob), (alice, alice)):
        with pytest.raises(NotAdmitted):
            attempt(*pair)


def test_a_router_slot_kept_for_one_key(world: Any) -> None:
    opened = world.open(world.plan(router_slot=world.alice.peer_id))
    plans = {opened.plan_id: opened.plan}

    def attempt(identity: Any, record: Any, key: str) -> Claim | Holding:
        return check_store(
            plans,
            dht_id=dht_id(key),
            subkey=identity.peer_id,
            value=record.seal(identity),
            expiration=record.until,
            now=world.now,
        )

    names = {"plan": opened.plan_id, "slot": "router"}
    claims, holdings = claim_key(opened.plan_id, "router"), checkpoint_key(opened.plan_id, "router")
    assert attempt(world.alice, world.claim(world.alice, **names), claims)
    with pytest.raises(NotAdmitted) as caught:
        attempt(world.bob, world.claim(world.bob, **names), claims)
    assert caught.value.rule == "R-ADM-2"
    alices = world.announcement(world.alice, **names).seal(world.alice)
    bobs = world.announcement(world.bob, **names).seal(world.bob)
    assert attempt(world.bob, world.holding(world.bob, alices, **names), holdings)
    with pytest.raises(NotAdmitted):
        attempt(world.alice, world.holding(world.alice, bobs, **names), holdings)


@given(st.binary(max_size=300), st.none() | st.text(max_size=60), st.binary(max_size=21), st.floats())
def test_arbitrary_stores_are_refused(
    world: Any, value: bytes, subkey: str | None, place: bytes, expiration: float
) -> None:
    with pytest.raises(RecordError):
        store(world, value, subkey=subkey, dht_id=place, expiration=expiration)
    with pytest.raises(RecordError):
        store(world, value)


@given(st.data())
def test_any_changed_bit_is_refused(world: Any, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["claim", "holding"]))
    good = (world.claim() if kind == "claim" else world.holding()).seal(world.alice)
    place = dht_id(claim_key(world.opened.plan_id, "0")) if kind == "claim" else ckpt(world)
    assert store(world, good, dht_id=place)
    bit = data.draw(st.integers(0, len(good) * 8 - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RecordError):
        store(world, bytes(bad), dht_id=place)
