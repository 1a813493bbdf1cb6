"""How many peers a swarm has, from what every DHT node knows anyway: how densely ids lie around its own.

Ids are spread evenly over the key space, so where the k-th nearest of N ids lies at the share d of that space, N is
about k / d (the size estimate of Kademlia networks; its relative error is about 1 / sqrt(k)). It costs no message, and
it is what lets surplus peers stay silent (lane.py, rule L1): nobody counts heads, and no standing-by peer writes.
"""

from __future__ import annotations

from collections.abc import Sequence

NEAREST = 16
"""Neighbours that the estimate rests on: an error of about a quarter."""


def population(nearest: Sequence[float], known: int) -> int:
    """Estimated number of peers, this one included.

    Args:
        nearest: distances to the nearest other ids, ascending, as shares of the key space (0 to 1).
        known: how many other ids this node knows; a node that knows no more than ``NEAREST`` counts them.
    """
    if known <= NEAREST or len(nearest) < NEAREST:
        return known + 1
    span = nearest[NEAREST - 1]
    # (k - 1) / d is the unbiased estimate of k / d
    return max(NEAREST + 1, round((NEAREST - 1) / span)) if span > 0 else known + 1
