"""The size of a swarm, estimated from how densely ids lie around one's own."""

from __future__ import annotations

import random
import statistics

from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.swarm.crowd import NEAREST, population


@given(st.integers(0, NEAREST))
def test_a_node_that_knows_everybody_counts(others: int) -> None:
    assert population([n / 100 for n in range(1, others + 1)], others) == others + 1


def test_the_estimate_is_right_on_average_and_seldom_off_by_half() -> None:
    dice = random.Random(3)
    for peers in (40, 1000, 20_000):
        found = [
            population(sorted(dice.random() for _ in range(peers))[:NEAREST], known=64) / peers
            for _ in range(40 if peers > 10_000 else 200)
        ]
        assert abs(statistics.fmean(found) - 1) < 0.15
        assert sum(0.5 < share < 2 for share in found) / len(found) > 0.9


def test_neighbours_at_distance_zero_are_no_crowd_of_infinitely_many() -> None:
    assert population([0.0] * NEAREST, known=30) == 31
