"""JSON: what is written reads back equal; what cannot be one value everywhere is refused, by MalformedRecord only."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas.canonical import MAX_DEPTH, MAX_INT, canonical_json, parse_json
from paris_swarm.dht_schemas.errors import MalformedRecord

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
LEAVES = (
    st.none() | st.booleans() | st.integers(-MAX_INT, MAX_INT) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=30
)


@given(JSON)
def test_what_is_written_reads_back_equal_and_writes_the_same(value: object) -> None:
    data = canonical_json(value)
    again = parse_json(data)
    assert again == value
    assert canonical_json(again) == data


@given(st.dictionaries(TEXT, LEAVES, min_size=2, max_size=6))
def test_the_order_in_which_keys_were_set_does_not_show(value: dict[str, object]) -> None:
    assert canonical_json(dict(reversed(list(value.items())))) == canonical_json(value)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_value_or_a_refusal(data: bytes) -> None:
    with contextlib.suppress(MalformedRecord):
        canonical_json(parse_json(data))


@given(st.text(st.sampled_from('[]{}",:\\u0dD8eE+-.19 tfnN'), max_size=60))
def test_almost_json_gives_a_value_or_a_refusal(text: str) -> None:
    with contextlib.suppress(MalformedRecord):
        canonical_json(parse_json(text.encode()))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nothing",
        b"NaN",
        b"-Infinity",
        b'{"a":1,"a":2}',
        b'[{"b":{"a":1,"a":1}}]',
        b"1e999",
        b"0." + b"1" * 100,
        str(MAX_INT + 1).encode(),
        str(-MAX_INT - 1).encode(),
        b"9" * 100_000,
        rb'"\ud800"',
        rb'{"\udfff":1}',
        b'"\xed\xa0\x80"',
        b'"\xff"',
        b"\xef\xbb\xbf{}",
        b'"\n"',
        b"[" * 200_000,
        b"[" * 200_000 + b"]" * 200_000,
        b'{"a":' * 200_000,
        b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
        b'{"a"}',
        b"[1,]",
        b"1 2",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_refused(data: bytes) -> None:
    with pytest.raises(MalformedRecord) as caught:
        parse_json(data)
    assert caught.value.rule == "R-ENV-2"
    assert len(str(caught.value)) < 500


def test_brackets_in_strings_are_not_nesting() -> None:
    value = ["[" * 1000 + '"\\' + "{" * 1000, '\\"[']
    assert parse_json(canonical_json(value)) == value
    depth: object = 1
    for _ in range(MAX_DEPTH):
        depth = [depth]
    assert parse_json(canonical_json(depth)) == depth


def test_unclosed_strings_cost_linear_time() -> None:
    # Two million escaped quotation marks in a string that never ends: a quadratic scan would take days.
    for data in (b'"' + b'\\"' * 2_000_000, b'"' * 2_000_001, b'["' + b"\\\\" * 2_000_000 + b"\\"):
        with pytest.raises(MalformedRecord):
            parse_json(data)


def test_a_surrogate_pair_is_one_character() -> None:
    assert parse_json(rb'"\ud83d\ude00"') == "😀"


@pytest.mark.parametrize("value", [math.nan, math.inf, MAX_INT + 1, {1: 2}, {"a": {3}}, b"bytes", "\ud800", 1j])
def test_what_json_cannot_hold_is_the_callers_error(value: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        canonical_json([value])


def test_nesting_is_bounded_when_writing_too() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested"):
        canonical_json(deep)
