"""Input made to cost more than it weighs, or to mean different things to different readers."""

from __future__ import annotations

import tracemalloc
import unicodedata
from typing import Any

import pytest

from paris_swarm.dht_schemas import (
    BadManifest,
    Invite,
    InviteError,
    LeaseTooLong,
    MalformedRecord,
    RecordError,
    WrongPlan,
    WrongSlot,
    blake3_hex,
    canonical_json,
    check_store,
    open_manifest,
    open_plan,
    public_key_bytes,
    seal,
    verify,
)
from paris_swarm.dht_schemas.dht_rules import check_lease
from paris_swarm.dht_schemas.envelope import payload_type
from paris_swarm.dht_schemas.fields import is_printable
from paris_swarm.dht_schemas.identity import peer_id_of

P = 2**255 - 19


# ---- keys that are nobody's ------------------------------------------------------------------------------------------


def low_order_encodings() -> list[bytes]:
    """Every 32 bytes that decode to one of the eight points of small order, worked out from the curve itself."""
    d = -121665 * pow(121666, -1, P) % P

    def add(one: tuple[int, int], two: tuple[int, int]) -> tuple[int, int]:
        (x1, y1), (x2, y2) = one, two
        k = d * x1 * x2 * y1 * y2 % P
        return (
            (x1 * y2 + x2 * y1) * pow(1 + k, -1, P) % P,
            (y1 * y2 + x1 * x2) * pow(1 - k, -1, P) % P,
        )

    def times(scalar: int, point: tuple[int, int]) -> tuple[int, int]:
        total = (0, 1)
        while scalar:
            if scalar & 1:
                total = add(total, point)
            point, scalar = add(point, point), scalar >> 1
        return total

    subgroup = 2**252 + 27742317777372353535851937790883648493
    points: set[tuple[int, int]] = set()
    y = 2
    while len(points) < 8:  # (order of the subgroup) * (any point) has an order that divides 8
        y += 1
        square = (y * y - 1) * pow(d * y * y + 1, -1, P) % P
        x = pow(square, (P + 3) // 8, P)
        if x * x % P != square:
            x = x * pow(2, (P - 1) // 4, P) % P
        if x * x % P != square:
            continue
        point = times(subgroup, (x, y))
        points |= {times(scalar, point) for scalar in range(8)}
    found = []
    for _, y in points:
        for spelling in (y, y + P):
            if spelling < 2**255:
                found += [(spelling | sign << 255).to_bytes(32, "little") for sign in (0, 1)]
    return sorted(set(found))


def test_a_key_for_which_anybody_can_sign_is_no_key() -> None:
    """With a public key of order 1, R = the neutral point and S = 0 verify for every message."""
    forged = b"\x01" + bytes(63)
    for message in (b"DSSEv1 one", b"DSSEv1 two"):
        with pytest.raises(MalformedRecord) as caught:
            verify(peer_id_of(b"\x01" + bytes(31)), message, forged)
        assert caught.value.rule == "R-KEY-2"


def test_every_spelling_of_a_point_of_small_order_is_refused() -> None:
    encodings = low_order_encodings()
    assert len(encodings) == 14
    for raw in encodings:
        with pytest.raises(MalformedRecord) as caught:
            public_key_bytes(peer_id_of(raw))
        assert caught.value.rule == "R-KEY-2"


def test_a_coordinate_beyond_the_field_is_refused() -> None:
    for y in (P, P + 3, 2**255 - 1):
        for sign in (0, 1):
            with pytest.raises(MalformedRecord) as caught:
                public_key_bytes(peer_id_of((y | sign << 255).to_bytes(32, "little")))
            assert caught.value.rule == "R-KEY-2"


# ---- refusals that cost more than their input ------------------------------------------------------------------------


def _plan_payload(world: Any, **changes: Any) -> bytes:
    return canonical_json({**world.plan().model_dump(), **changes})


def _table(table: Any) -> dict[str, Any]:
    return {"recipe": {}, "files": {"a.safetensors": table}}


BOMBS: dict[str, dict[str, Any]] = {
    "numbers for files": {"files": [0] * 300_000},
    "empty tensors": {"expert": _table([{}] * 200_000)},
    "one tensor of many extents": {"expert": _table([{"name": "w", "dtype": "F32", "shape": [-1] * 200_000}])},
    "tables of many files": {"expert": {"recipe": {}, "files": {f"{number:x}": 0 for number in range(60_000)}}},
    "bars of no slot": {"verification": {"probe_seed": 1, "bars": {f"{number:x}": 0 for number in range(60_000)}}},
    "chunks that are numbers": {"files": [{"name": "a", "length": 1, "chunks": [0] * 300_000}]},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_refused_plan_costs_memory_in_proportion_to_its_bytes(world: Any, name: str) -> None:
    """One error was once kept for every wrong item: 700 MB for a plan of 0.8 MB."""
    data = seal(world.organiser, payload_type("plan"), _plan_payload(world, **BOMBS[name]))
    tracemalloc.start()
    with pytest.raises(MalformedRecord) as caught:
        open_plan(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.rule == "R-PLAN-3"
    assert peak < 40 * len(data)


def test_a_refused_manifest_costs_memory_in_proportion_to_its_bytes() -> None:
    data = canonical_json(
        {
            "v": 1,
            "kind": "expert",
            "slot": "0",
            "files": [{"name": "a", "length": 3, "chunks": [0] * 400_000}],
            "meta": {"step": 1, "parent": None},
        }
    )
    tracemalloc.start()
    with pytest.raises(BadManifest):
        open_manifest(data, blake3_hex(data), cap_bytes=10**9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * len(data)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expiration", [10**400, -(10**400), 2**63], ids=["huge", "very negative", "2**63"])
def test_expirations_that_no_float_can_hold(world: Any, expiration: int) -> None:
    with pytest.raises(RecordError):
        check_store({}, dht_id=b"", subkey=world.alice.peer_id, value=b"x", expiration=expiration, now=world.now)
    if expiration > 0:
        with pytest.raises(LeaseTooLong):
            check_lease(expiration, world.now)


@pytest.mark.parametrize("spelling", ["true", '"1"', "1.0", "1e0", "null", "[1]"])
def test_a_count_is_an_integer_and_nothing_else(world: Any, spelling: str) -> None:
    payload = canonical_json(world.claim().model_dump()).replace(b'"seq":10', b'"seq":' + spelling.encode())
    with pytest.raises(MalformedRecord) as caught:
        type(world.claim()).open(seal(world.alice, payload_type("claim"), payload))
    assert caught.value.rule == "R-REC-1"


@pytest.mark.parametrize("spelling", ["true", '"1800000060.25"', "null"])
def test_a_time_is_a_number_and_nothing_else(world: Any, spelling: str) -> None:
    payload = canonical_json(world.claim().model_dump()).replace(b"1800000060.25", spelling.encode())
    with pytest.raises(MalformedRecord):
        type(world.claim()).open(seal(world.alice, payload_type("claim"), payload))


# ---- text ------------------------------------------------------------------------------------------------------------


def test_what_is_printable_does_not_depend_on_the_version_of_unicode() -> None:
    """R-REC-12. Two nodes must agree, so a character that a later Unicode assigns stays what it was; and no character
    that a terminal would act on gets through, whatever version this Python knows.
    """
    for code in range(0x110000):
        character = chr(code)
        category = unicodedata.category(character)
        if category in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") or (category == "Zs" and character != " "):
            assert not is_printable(character), hex(code)
        elif category != "Cn" and code >> 12 != 0xE0:  # plane 14 shows nothing: variation selectors and tags
            assert is_printable(character), hex(code)
    assert is_printable("\U0001fae8")  # a face that Unicode 15 added: Python 3.11 knows 14
    assert not is_printable("\U000e0041")  # an invisible tag


# ---- names that mean something to the reader's own language ----------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["signer", "KIND", "SIGNER", "seal", "model_dump", "model_extra", "__class__", "__dict__", "__init__"]
)
def test_unknown_fields_named_like_our_own_attributes_change_nothing(world: Any, name: str) -> None:
    claim = world.claim()
    data = world.forge(world.alice, "claim", {**claim.model_dump(), name: world.bob.peer_id})
    opened = type(claim).open(data).record
    assert opened.signer == world.alice.peer_id
    assert type(opened) is type(claim)
    assert opened.model_dump()[name] == world.bob.peer_id


# ---- arguments that a caller took from a peer ------------------------------------------------------------------------


def test_a_probe_of_an_announcement_of_nobodys_slot(world: Any) -> None:
    from paris_swarm.dht_schemas import TrustedSwarm

    swarm = TrustedSwarm(world.opened)
    with pytest.raises(WrongSlot):
        swarm.feed_probe(world.announcement(slot="9"), 0.25)
    with pytest.raises(WrongPlan):
        swarm.feed_probe(world.announcement(plan="d" * 64), 0.25)


def test_an_invite_that_could_not_be_read_back_is_not_made(world: Any) -> None:
    long = tuple(f"/dns4/{'a' * 60}.{'b' * 60}.{'c' * 60}.{n}/tcp/1/p2p/{world.alice.peer_id}" for n in range(32))
    with pytest.raises(InviteError, match="characters"):
        Invite("a" * 64, long)
