"""Chunks in parts: what is asked for covers what is missing, and what was kept makes up the chunk, once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas.digest import CHUNK
from paris_swarm.swarm import wire
from paris_swarm.swarm.parts import BegunChunks, Part, joined, parts_of

SIZES = st.integers(1, CHUNK)
UNITS = st.integers(1, 256)


@given(SIZES, st.integers(0, 255), UNITS)
def test_parts_cover_what_is_missing_in_order_and_can_be_asked_for(size: int, kept: int, length: int) -> None:
    """R-WIRE-10"""
    start, step = kept * wire.PART, length * wire.PART
    if start >= size:
        return
    parts = parts_of((3, 5), size, start, step)
    at = start
    for number, part in enumerate(parts):
        assert (part.offset, part.first, part.last) == (at, number == 0, number == len(parts) - 1)
        at += part.length
        request = part.request("ab" * 32)
        assert wire.RequestReader().receive(wire.OPENING + request.to_bytes()) == [request]
        assert min(request.offset + request.length, size) - request.offset == part.length
    assert at == size


@given(st.integers(1, 40 * wire.PART), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1))
def test_streams_that_end_anywhere_make_up_the_chunk(size: int, streams: list[tuple[int, int]]) -> None:
    """Each stream: the length of its parts in units, and how many of them come before it ends. All of the last one."""
    content = bytes(place * 7 % 251 for place in range(size))
    begun = BegunChunks(4)
    for number, (units, come) in enumerate([*streams, (9, 1000)], start=1):
        for part in parts_of((0, 0), size, begun.length("a", (0, 0)), units * wire.PART)[:come]:
            response = wire.encode_payload(content[part.offset : part.offset + part.length])
            if part.last:
                parts, in_one_go = begun.complete("a", part, response)
                assert joined(parts) == content
                assert in_one_go == (number == 1)
                assert begun.length("a", (0, 0)) == 0
                assert begun.dropped == 0
                return
            assert begun.keep("a", part, response)
        begun.ended("a", [])
    raise AssertionError("the last stream brings all that is missing")


def part(chunk: int, number: int) -> tuple[Part, wire.Response]:
    response = wire.Response(wire.Status.OK, length=wire.PART, payload=bytes(wire.PART))
    return Part((0, chunk), number * wire.PART, wire.PART, number == 0, last=False), response


def test_a_part_that_comes_again_is_counted_and_not_used() -> None:
    begun = BegunChunks(4)
    assert begun.keep("a", *part(0, 0))
    assert not begun.keep("a", *part(0, 0))
    assert begun.keep("a", *part(0, 1))
    assert (begun.length("a", (0, 0)), begun.dropped) == (2 * wire.PART, wire.PART)


def test_only_the_newest_chunk_of_a_peer_and_few_absent_peers_are_kept() -> None:
    begun = BegunChunks(2)
    for peer in "abcd":
        begun.keep(peer, *part(0, 0))
        begun.keep(peer, *part(1, 0))
        begun.ended(peer, "a")
    kept = [(peer, chunk) for peer in "abcd" for chunk in range(2) if begun.length(peer, (0, chunk))]
    assert kept == [("a", 1), ("c", 1), ("d", 1)]
    begun.forget((0, 1))
    assert not any(begun.length(peer, (0, 1)) for peer in "abcd")
    assert begun.dropped == 8 * wire.PART
