"""Claims, announcements and holdings: strict, bounded, signed by the peer they name, and tolerant of fields to come."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas import (
    MAX_RECORD,
    Announcement,
    Claim,
    Holding,
    MalformedRecord,
    Progress,
    RecordError,
    RecordTooLarge,
    WrongKind,
    WrongSigner,
    seal_token,
)
from paris_swarm.dht_schemas.canonical import MAX_INT

COUNTS = st.integers(0, MAX_INT)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
SLOTS = st.sampled_from(["router", *map(str, range(12)), "1023"])


@given(st.data())
def test_round_trip(world: Any, data: st.DataObject) -> None:
    draw = data.draw
    slot, seq = draw(SLOTS), draw(COUNTS)
    claim = world.claim(
        slot=slot,
        seq=seq,
        until=draw(st.floats(1, 1e10)),
        released=draw(st.booleans()),
        progress=Progress(
            step=draw(COUNTS),
            steps=draw(COUNTS),
            loss=draw(FINITE | st.none()),
            images_per_s=abs(draw(FINITE)),
            device=draw(st.text(st.characters(categories=["L", "N", "P"]), max_size=32)),
        ),
    )
    record, sealed = Claim.open(claim.seal(world.alice))
    assert record == claim
    assert sealed.signer == world.alice.peer_id
    announcement = world.announcement(
        slot=slot,
        seq=seq,
        step=draw(COUNTS),
        parent=draw(DIGESTS | st.none()),
        root=draw(DIGESTS),
        probe_loss=draw(FINITE),
    )
    envelope = announcement.seal(world.alice)
    assert Announcement.open(envelope).record == announcement
    holding = world.holding(world.bob, envelope, slot=slot)
    opened = Holding.open(holding.seal(world.bob)).record
    assert opened == holding
    assert opened.open_announcement().record == announcement
    assert opened.open_announcement().sealed.envelope == envelope


@pytest.mark.parametrize("kind", [Claim, Announcement, Holding])
@given(data=st.data())
def test_arbitrary_payloads_give_a_record_or_a_refusal(world: Any, kind: Any, data: st.DataObject) -> None:
    """Mostly right records with one field replaced by anything JSON can say, correctly signed."""
    good = {Claim: world.claim, Announcement: world.announcement, Holding: world.holding}[kind]().model_dump()
    field = data.draw(st.sampled_from([*good, "unknown"]))
    junk = (
        st.none()
        | st.booleans()
        | COUNTS
        | st.integers(-5, 5)
        | FINITE
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=70)
    )
    value = data.draw(
        st.recursive(
            junk,
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3),
            max_leaves=6,
        )
    )
    try:
        record = kind.open(world.forge(world.alice, kind.KIND, {**good, field: value})).record
    except RecordError:
        return
    assert kind.open(record.seal(world.alice)).record == record


@pytest.mark.parametrize("kind", [Claim, Announcement, Holding])
@given(payload=st.binary(max_size=100))
def test_arbitrary_signed_bytes_are_refused(world: Any, kind: Any, payload: bytes) -> None:
    with pytest.raises(MalformedRecord):
        kind.open(world.forge(world.alice, kind.KIND, payload))


BAD_CLAIM_FIELDS: list[tuple[str, Any]] = [
    ("plan", "A" * 64),
    ("plan", "a" * 63),
    ("plan", "a" * 64 + "\n"),
    ("slot", "01"),
    ("slot", "-1"),
    ("slot", "0\n"),
    ("slot", "٣"),
    ("slot", "10000"),
    ("slot", 0),
    ("slot", ""),
    ("peer", "alice"),
    ("seq", True),
    ("seq", -1),
    ("seq", 1.0),
    ("seq", "1"),
    ("seq", None),
    ("until", True),
    ("until", "1"),
    ("until", -1),
    ("until", 0),
    ("until", 1e300),
    ("released", 0),
    ("released", "false"),
    ("token", 5),
    ("token", "t" * 2049),
    ("progress", None),
    ("progress", []),
    ("progress", {"step": True, "steps": 1, "loss": None, "images_per_s": 0, "device": "cpu"}),
    ("progress", {"step": 1, "steps": 1, "loss": False, "images_per_s": 0, "device": "cpu"}),
    ("progress", {"step": 1, "steps": 1, "loss": None, "images_per_s": -1, "device": "cpu"}),
    ("progress", {"step": 1, "steps": 1, "loss": None, "images_per_s": 0, "device": "\x1b[2J"}),
    ("progress", {"step": 1, "steps": 1, "loss": None, "images_per_s": 0, "device": "\u202eupc"}),
    ("progress", {"step": 1, "steps": 1, "loss": None, "images_per_s": 0, "device": "c" * 33}),
    ("progress", {"step": 1, "steps": 1, "images_per_s": 0, "device": "cpu"}),
]


@pytest.mark.parametrize(("field", "value"), BAD_CLAIM_FIELDS, ids=lambda value: ascii(value)[:30])
def test_wrong_values_are_refused_and_named(world: Any, field: str, value: Any) -> None:
    data = world.forge(world.alice, "claim", {**world.claim().model_dump(), field: value})
    with pytest.raises(MalformedRecord) as caught:
        Claim.open(data)
    assert field in caught.value.detail
    assert caught.value.rule == "R-REC-1"
    with pytest.raises(ValueError, match=field):
        Claim(**{**world.claim().model_dump(), field: value})


@pytest.mark.parametrize("field", ["plan", "slot", "peer", "seq", "until", "progress"])
def test_missing_fields_are_refused(world: Any, field: str) -> None:
    values = world.claim().model_dump()
    del values[field]
    with pytest.raises(MalformedRecord, match=field):
        Claim.open(world.forge(world.alice, "claim", values))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_cannot_be_made(world: Any, value: float) -> None:
    for make in (lambda: world.claim(until=value), lambda: world.announcement(probe_loss=value)):
        with pytest.raises(ValueError, match="finite"):
            make()


def test_deep_nesting_huge_numbers_surrogates_and_twice_named_keys(world: Any) -> None:
    deep = b"[" * 1400 + b"]" * 1400
    for junk in (deep, b"9" * 2000, rb'"\ud800"', b"NaN", b"1e999", b'{"a":1,"a":1}'):
        payload = b'{"seq":' + junk + b"}"
        with pytest.raises(MalformedRecord) as caught:
            Claim.open(world.forge(world.alice, "claim", payload))
        assert caught.value.rule == "R-ENV-2"


def test_unknown_fields_are_kept_even_with_awkward_names(world: Any) -> None:
    extra = {
        "colour": "teal",
        "seal": 1,
        "model_fields": [1],
        "__class__": "x",
        "__dict__": {},
        "model_extra": None,
        "KIND": "k",
    }
    data = world.forge(world.alice, "claim", {**world.claim().model_dump(), **extra})
    record = Claim.open(data).record
    assert record.KIND == "claim"
    assert record.model_extra is not None
    assert record.model_extra["colour"] == "teal"
    again = Claim.open(record.seal(world.alice)).record
    assert again.model_dump() == record.model_dump()
    assert {name: again.model_dump()[name] for name in extra} == extra


def test_records_are_frozen(world: Any) -> None:
    with pytest.raises(ValueError, match="frozen"):
        world.claim().seq = 11


def test_only_the_named_peer_signs(world: Any) -> None:
    with pytest.raises(ValueError, match="cannot be signed"):
        world.claim().seal(world.bob)
    for kind, record in ((Claim, world.claim()), (Announcement, world.announcement()), (Holding, world.holding())):
        with pytest.raises(WrongSigner):
            kind.open(world.forge(world.bob, kind.KIND, record.model_dump()))


def test_kinds_do_not_pass_as_one_another(world: Any) -> None:
    with pytest.raises(WrongKind):
        Holding.open(world.claim().seal(world.alice))
    with pytest.raises(WrongKind):
        Claim.open(world.announcement().seal(world.alice))
    with pytest.raises(MalformedRecord):
        Claim.open(world.forge(world.alice, "claim", world.holding().model_dump()))


def test_the_largest_honest_holding_fits(world: Any) -> None:
    token = seal_token(world.organiser, world.invited.plan_id, world.alice.peer_id)
    announcement = world.announcement(
        slot="router",
        seq=MAX_INT,
        step=MAX_INT,
        parent="a" * 64,
        bytes=MAX_INT,
        probe_loss=-1.2345678901234567e-300,
        token=token,
    ).seal(world.alice)
    holding = world.holding(
        world.alice, announcement, slot="router", seq=MAX_INT, until=1234567890.1234567, token=token
    )
    assert len(holding.seal(world.alice)) <= MAX_RECORD


def test_a_record_beyond_4096_bytes_is_refused_on_both_sides(world: Any) -> None:
    fat = world.claim(note="x" * 4000)
    with pytest.raises(ValueError, match="4096"):
        fat.seal(world.alice)
    with pytest.raises(RecordTooLarge):
        Claim.open(world.forge(world.alice, "claim", fat.model_dump()))


def test_messages_quote_hostile_text(world: Any) -> None:
    hostile = {**world.claim().model_dump(), "progress": {"\x1b[31mstep": 1}, "slot": "\x1b[2J\n" * 50}
    with pytest.raises(MalformedRecord) as caught:
        Claim.open(world.forge(world.alice, "claim", hostile))
    assert str(caught.value).isprintable()
