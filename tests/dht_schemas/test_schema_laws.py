"""Laws that hold for every record and in every order: what one peer accepts, all accept, however it reached them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_swarm.dht_schemas import (
    Announcement,
    Claim,
    Equivocation,
    Holding,
    Identity,
    RecordError,
    Rollback,
    TrustedSwarm,
    blake3_hex,
    canonical_json,
    check_token,
    open_manifest,
    open_plan,
    parse_json,
    seal_token,
    unseal,
)
from paris_swarm.dht_schemas.admission import check_delegation, seal_delegation
from paris_swarm.dht_schemas.envelope import payload_type
from paris_swarm.dht_schemas.notice import Notice, open_notice, seal_notice

PEERS = [Identity(bytes([number]) * 32) for number in range(10, 14)]


# ---- sign, mutate, verify --------------------------------------------------------------------------------------------


def signed(world: Any) -> dict[str, tuple[bytes, Callable[[bytes], object]]]:
    """Of each kind an envelope, and what reads it."""
    plan, plan_id = world.invited.plan, world.invited.plan_id
    token = seal_token(world.organiser, plan_id, world.alice.peer_id)
    delegation = seal_delegation(world.alice, plan_id, world.bob.peer_id, world.now + 60)
    notice = seal_notice(world.organiser, Notice(plan=plan_id, number=1, state="paused"))
    return {
        "plan": (world.opened.envelope, open_plan),
        "claim": (world.claim().seal(world.alice), Claim.open),
        "announcement": (world.announcement().seal(world.alice), Announcement.open),
        "holding": (world.holding().seal(world.alice), Holding.open),
        "token": (
            token.encode(),
            lambda data: check_token(plan, plan_id, world.alice.peer_id, data.decode("utf-8", "surrogateescape")),
        ),
        "delegation": (
            delegation.encode(),
            lambda data: check_delegation(
                plan_id, world.bob.peer_id, data.decode("utf-8", "surrogateescape"), world.now
            ),
        ),
        "notice": (notice, lambda data: open_notice(plan, plan_id, data)),
    }


@pytest.mark.parametrize("kind", ["plan", "claim", "announcement", "holding", "token", "delegation", "notice"])
def test_any_single_changed_byte_is_refused(world: Any, kind: str) -> None:
    """R-ENV-3, R-ENV-5. Every place once, and each of the 8 bits somewhere."""
    envelope, read = signed(world)[kind]
    read(envelope)
    rng = random.Random(1)
    for place in range(len(envelope)):
        changed = bytearray(envelope)
        changed[place] ^= 1 << place % 8 if rng.random() < 0.5 else rng.randrange(1, 256)
        with pytest.raises(RecordError):
            read(bytes(changed))


@given(st.data())
def test_any_edit_of_an_envelope_is_refused(world: Any, data: st.DataObject) -> None:
    """Cut, doubled, moved: no other bytes carry the same signature."""
    envelope, read = signed(world)[data.draw(st.sampled_from(["claim", "holding", "notice"]))]
    start = data.draw(st.integers(0, len(envelope)))
    end = data.draw(st.integers(start, len(envelope)))
    other = envelope[:start] + data.draw(st.binary(max_size=8)) + envelope[end:]
    if other == envelope:
        return
    with pytest.raises(RecordError):
        read(other)


# ---- one spelling ----------------------------------------------------------------------------------------------------

LEAVES = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text('aé\n"\\/\x7f\u2028😀', max_size=4)
VALUES = st.recursive(
    LEAVES | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\n", max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, VALUES)
def test_different_values_have_different_bytes_and_equal_ones_the_same(one: object, other: object) -> None:
    same = repr(parse_json(canonical_json(one))) == repr(parse_json(canonical_json(other)))
    if canonical_json(one) == canonical_json(other):
        assert same
    if same:
        assert canonical_json(one) == canonical_json(other)


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_one_set_of_files_has_one_root(names: list[str], rng: random.Random) -> None:
    """R-MAN-4: no other order or spelling of the same files is a manifest."""
    files = [{"name": f"{name}.json", "length": 0, "chunks": []} for name in sorted(names)]
    value = {"v": 1, "kind": "expert", "slot": "0", "files": files, "meta": {"step": 1, "parent": None}}
    data = canonical_json(value)
    assert open_manifest(data, blake3_hex(data), cap_bytes=1).step == 1
    shuffled = rng.sample(files, len(files))
    other = canonical_json({**value, "files": shuffled})
    if shuffled != files:
        with pytest.raises(RecordError):
            open_manifest(other, blake3_hex(other), cap_bytes=1)


# ---- order -----------------------------------------------------------------------------------------------------------

RECORD = st.tuples(st.sampled_from(["claim", "holding"]), st.integers(0, 3), st.integers(0, 3))


def honest(world: Any, kind: str, peer: int, seq: int) -> bytes:
    """The one record that this peer makes under this sequence: what it says follows from the sequence."""
    identity = PEERS[peer]
    if kind == "claim":
        return bytes(world.claim(identity, seq=seq, until=world.now + 60 + seq, slot="01"[seq % 2]).seal(identity))
    # Which checkpoint is held under a sequence follows from it too, or its holder would contradict itself.
    made_by = PEERS[(peer + seq) % len(PEERS)]
    inner = world.announcement(made_by, seq=(seq * 7 + peer) % 5, step=(seq * 7 + peer) % 5).seal(made_by)
    return bytes(world.holding(identity, inner, seq=seq, until=world.now + 60 + seq).seal(identity))


def feeding(swarm: TrustedSwarm, envelope: bytes) -> Callable[[bytes, float], object]:
    types = (payload_type("claim"), payload_type("holding"))
    found = unseal(envelope, types, max_bytes=4096).payload_type
    return swarm.feed_claim if found == types[0] else swarm.feed_holding


def fed(world: Any, envelopes: list[bytes]) -> TrustedSwarm:
    swarm = TrustedSwarm(world.opened)
    for envelope in envelopes:
        with contextlib.suppress(Rollback):
            feeding(swarm, envelope)(envelope, world.now)
    return swarm


@settings(max_examples=40)
@given(st.lists(RECORD, max_size=8), st.randoms(use_true_random=False))
def test_order_and_repetition_of_honest_records_make_no_difference(
    world: Any, said: list[tuple[str, int, int]], rng: random.Random
) -> None:
    """R-SET-1, R-SET-2. Any order, any repetition: the same claims, holdings and highest sequences, and nobody is
    ever convicted.
    """
    envelopes = [honest(world, *record) for record in said]
    again = rng.sample(envelopes, len(envelopes)) + rng.choices(envelopes, k=len(envelopes)) if envelopes else []
    rng.shuffle(again)
    one, other = fed(world, envelopes), fed(world, again)
    assert one.claims == other.claims
    assert one.holdings == other.holdings
    assert one.highest == other.highest
    assert not one.outlaws
    assert not other.outlaws


@settings(max_examples=40)
@given(st.lists(RECORD, max_size=6), st.integers(0, 3), st.data())
def test_two_payloads_of_one_sequence_end_a_signer_and_nobody_else(
    world: Any, said: list[tuple[str, int, int]], liar: int, data: st.DataObject
) -> None:
    """R-SET-3, R-SET-4. Wherever the two stand among other peers' records."""
    identity = PEERS[liar]
    two = [world.claim(identity, seq=99, until=world.now + left).seal(identity) for left in (40, 50)]
    others = [honest(world, *record) for record in said if record[1] != liar]
    places = sorted(data.draw(st.lists(st.integers(0, len(others)), min_size=2, max_size=2)))
    swarm = TrustedSwarm(world.opened)
    sequence = [*others[: places[0]], two[0], *others[places[0] : places[1]], two[1], *others[places[1] :]]
    caught = 0
    for envelope in sequence:
        try:
            feeding(swarm, envelope)(envelope, world.now)
        except Equivocation:
            caught += 1
        except Rollback:
            continue
    assert caught >= 1
    assert swarm.outlaws == {identity.peer_id}
    assert all(identity.peer_id not in claims for claims in swarm.claims.values())
    for holdings in swarm.holdings.values():
        for holder, (_holding, announcement) in holdings.items():
            assert identity.peer_id not in (holder, announcement.author)
