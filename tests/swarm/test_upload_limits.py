"""Upload limits and turns: what is sent never exceeds the limit, and no peer gets more by asking more often."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.swarm.limits import MIN_PIECE, PIECE, TokenBucket, UploadGate, UploadQueue


@given(
    st.floats(1e3, 1e8),
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, PIECE)), min_size=1, max_size=50),
)
def test_a_bucket_never_lets_more_pass_than_its_rate_and_one_burst(
    rate: float, pieces: list[tuple[float, int]]
) -> None:
    bucket, now, passed = TokenBucket(rate, PIECE), 100.0, 0
    for pause, size in pieces:
        now += pause
        now += bucket.wait(now)
        assert bucket.wait(now) <= 1e-6
        bucket.take(size, now)
        passed += size
        assert passed <= rate * (now - 100.0) + 2 * PIECE + 1e-3 * passed


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_limit_that_lets_nothing_pass_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="leave the limit out"):
        UploadGate(total=rate)
    with pytest.raises(ValueError, match="leave the limit out"):
        UploadGate(per_peer=rate)


def served(queue: UploadQueue, demand: dict[str, int], seconds: float, size: int) -> Counter[str]:
    """Bytes each peer got when peer p keeps ``demand[p]`` pieces waiting all the time."""
    got: Counter[str] = Counter()
    for peer, streams in demand.items():
        for _ in range(streams):
            queue.add(peer, peer, size)
    now = 0.0
    while now < seconds:
        ticket, wait = queue.next(now)
        if ticket is None:
            now += wait
            continue
        peer = str(ticket)
        got[peer] += size
        queue.sent(peer)
        queue.add(peer, peer, size)
    return got


def test_turns_go_by_bytes_not_by_streams() -> None:
    got = served(UploadQueue(total=1e6), {"greedy": 4, "modest": 1}, 10.0, PIECE // 4)
    assert got["greedy"] + got["modest"] == pytest.approx(1e7, rel=0.05)
    assert got["greedy"] == pytest.approx(got["modest"], rel=0.05)


def test_a_peer_with_large_pieces_gets_no_more_than_one_with_small_ones() -> None:
    queue, got = UploadQueue(total=1e6), Counter[str]()
    sizes = {"large": PIECE, "small": MIN_PIECE}
    for peer, size in sizes.items():
        queue.add(peer, peer, size)
    now = 0.0
    while now < 30.0:
        ticket, wait = queue.next(now)
        now += wait if ticket is None else 0.0
        if ticket is not None:
            peer = str(ticket)
            got[peer] += sizes[peer]
            queue.sent(peer)
            queue.add(peer, peer, sizes[peer])
    assert got["large"] == pytest.approx(got["small"], rel=0.1)


def test_a_limit_for_each_peer_leaves_the_others_alone() -> None:
    queue = UploadQueue(total=1e6, per_peer=2e5)
    assert served(queue, {"one": 3}, 10.0, queue.piece)["one"] == pytest.approx(2e6, rel=0.05)
    got = served(UploadQueue(total=1e6, per_peer=2e5), {f"p{number}": 1 for number in range(10)}, 10.0, queue.piece)
    assert sum(got.values()) == pytest.approx(1e7, rel=0.05)


def test_who_was_away_does_not_come_back_with_a_claim() -> None:
    queue = UploadQueue(total=1e6)
    served(queue, {"steady": 1}, 60.0, MIN_PIECE)
    queue.add("late", "late", MIN_PIECE)
    order = []
    now = 61.0
    while len(order) < 20:
        ticket, wait = queue.next(now)
        now += wait if ticket is None else 0.0
        if ticket is not None:
            order.append(str(ticket))
            queue.sent(str(ticket))
            queue.add(str(ticket), ticket, MIN_PIECE)
    assert 8 <= order.count("late") <= 12


def test_without_a_limit_everybody_goes_at_once_one_piece_each() -> None:
    queue = UploadQueue()
    assert queue.piece == PIECE
    for peer in ("a", "a", "b"):
        queue.add(peer, (peer,), PIECE)
    assert {queue.next(0.0)[0], queue.next(0.0)[0]} == {("a",), ("b",)}
    assert queue.next(0.0) == (None, math.inf)
    queue.sent("a")
    assert queue.next(0.0)[0] == ("a",)


def test_a_low_limit_is_sent_in_small_pieces() -> None:
    assert UploadGate(total=1_000_000).piece == 62_500
    assert UploadGate(total=1000).piece == MIN_PIECE
    assert UploadGate(total=1e9, per_peer=1e6).piece == 62_500


def test_the_gate_forgets_a_stream_that_was_given_up() -> None:
    async def scenario() -> None:
        now = [0.0]
        gate = UploadGate(total=1000.0, clock=lambda: now[0])
        order: list[str] = []

        async def send(peer: str) -> None:
            async with gate.turn(peer, 4096):
                order.append(peer)

        await send("first")
        await send("second")  # the burst is spent: the next one waits
        waiting = [asyncio.create_task(send(peer)) for peer in ("gone", "stays")]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        now[0] = 60.0
        gate._let_through()
        await waiting[1]
        assert order == ["first", "second", "stays"]
        gate.close()

    asyncio.run(scenario())


def test_a_failed_write_gives_the_turn_back() -> None:
    async def scenario() -> None:
        gate = UploadGate()
        with pytest.raises(OSError, match="gone"):
            async with gate.turn("peer", 1):
                raise OSError("gone")
        async with asyncio.timeout(5), gate.turn("peer", 1):
            pass

    asyncio.run(scenario())
