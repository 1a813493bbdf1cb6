"""The partition: every image to one of K clusters, by two-stage spherical k-means on the encoder's features.

Decentralized Diffusion Models (arXiv 2501.05450): many fine centroids first, merged to K coarse ones, then each item to
its nearest coarse centroid. Distances are those of L2-normalised features. Features are read in blocks, so they may be
anything that gives rows by slice and by number: a memory map, or shards on disk. In memory are a sample of at most
`_FITTED_ROWS` rows for each fine centroid, and a few numbers an item. The same features and seed give the same
partition on one machine. Two controls need no features: random shards, and one class a cluster (row_rule.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

MAX_FINE = 1024
METHODS = ("clusters", "random", "class")

_PIECE = 8192  # rows of features held as float32 at a time
_SEEDS = 8192  # k-means++ looks at this many rows, or at eight for each centroid
_FITTED_ROWS = 128  # rows a fine centroid is fitted on: more do not move it (docs/results/partition-2026-11.md)
_STAGED = 32768  # from this many rows on, Lloyd begins on a 16th of them, then a quarter
_PRICED = 1 << 27  # numbers held while clusters are bounded: rows times clusters


class FeatureArray(Protocol):
    """float [N, F] that gives blocks of rows: a numpy array, a memory map, `expert.data.sharded_rows.ShardedRows`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> Any: ...


@dataclass(frozen=True)
class Partition:
    """centroids float32 [K, F], unit length; labels int64 [N], 0..K-1; fine: how many fine centroids there were.

    method: one of METHODS; with "clusters" cluster 0 is the largest. biases float32 [K]: what is taken off a row's
    cosine with each centroid before the highest wins; None without a bound on the clusters' sizes. class_key and
    classes: with "class", the caption's field and the cluster of each of its values.
    """

    centroids: np.ndarray
    labels: np.ndarray
    fine: int
    seed: int
    method: str = "clusters"
    biases: np.ndarray | None = None
    class_key: str | None = None
    classes: Mapping[str, int] = field(default_factory=dict)

    @property
    def clusters(self) -> int:
        """K."""
        return len(self.centroids)


def partition(
    features: FeatureArray,
    clusters: int,
    *,
    seed: int = 0,
    fine: int | None = None,
    rounds: int = 25,
    balance: float | None = None,
) -> Partition:
    """Partition features float [N, F] into ``clusters`` clusters.

    ``fine`` centroids are fitted first (default: a 64th of the items, at least 8 a cluster and at most 1024) and merged
    by Ward's criterion. ``balance`` bounds every cluster to that many times an even share (`bounded_biases`).

    Raises ValueError: fewer items than clusters, a feature that is not finite, so many equal items that a cluster would
    stay empty, or a balance below 1.
    """
    if len(features.shape) != 2 or not all(features.shape):
        raise ValueError(f"features must have the shape [items, numbers], got {list(features.shape)}")
    count = len(features)
    if not 1 <= clusters <= count:
        raise ValueError(
            f"{count} items cannot be partitioned into {clusters} clusters: prepare more, or ask for fewer"
        )
    if balance is not None and balance < 1:
        raise ValueError(f"clusters cannot be bounded to {balance} times an even share: give 1 or more")
    if fine is None:
        fine = min(MAX_FINE, max(8 * clusters, count // 64))
    fine = max(clusters, min(fine, count))
    generator = np.random.Generator(np.random.PCG64(seed))
    fine_centroids, sizes = _fine_centroids(features, fine, generator, rounds)
    if len(fine_centroids) < clusters:
        raise ValueError(f"only {len(fine_centroids)} different items for {clusters} clusters: ask for fewer clusters")
    coarse = merge_fine(fine_centroids, sizes, clusters)
    biases = None if balance is None else bounded_biases(features, coarse, balance)
    labels = nearest(features, coarse, biases)
    counts = np.bincount(labels, minlength=clusters)
    if not counts.all():
        raise ValueError(f"{int((counts == 0).sum())} of {clusters} clusters would be empty: ask for fewer clusters")
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(clusters, dtype=np.int64)
    rank[order] = np.arange(clusters)
    bounds = None if biases is None else biases[order]
    return Partition(coarse[order], rank[labels], len(fine_centroids), seed, biases=bounds)


def nearest(features: FeatureArray, centroids: np.ndarray, biases: np.ndarray | None = None) -> np.ndarray:
    """int64 [N]: the centroid nearest to each of features float [N, F] by cosine; the lower number wins a tie.

    biases float [K] are taken off the cosines first. Raises ValueError for shapes that do not fit or a feature that is
    not finite.
    """
    if len(features.shape) != 2 or centroids.ndim != 2 or features.shape[1] != centroids.shape[1]:
        raise ValueError(f"features {list(features.shape)} do not fit centroids {list(centroids.shape)}")
    if biases is not None and biases.shape != (len(centroids),):
        raise ValueError(f"biases {list(biases.shape)} do not fit {len(centroids)} centroids")
    unit = unit_rows(np.asarray(centroids, dtype=np.float32))
    out = np.empty(len(features), dtype=np.int64)
    for start, piece in unit_pieces(features):
        cosines = piece @ unit.T
        out[start : start + len(piece)] = (cosines if biases is None else cosines - biases).argmax(axis=1)
    return out


def bounded_biases(features: FeatureArray, centroids: np.ndarray, balance: float, *, rounds: int = 1000) -> np.ndarray:
    """float32 [K] >= 0: what to take off the cosine with each centroid so that no cluster is larger than ``balance``
    times an even share.

    A bound of sizes alone would not say where a row goes that the organiser has never seen; a price for each cluster
    does. Prices rise from zero, in turn and only where a cluster is over its bound, each to where exactly its bound
    of rows stays: an auction (Bertsekas 1988), whose every step is a function of the features. Fitted on evenly spaced
    rows where all rows times all clusters are more than memory should hold.

    Raises ValueError: equal rows make the bound unreachable.
    """
    clusters = len(centroids)
    stride = -(-len(features) * clusters // _PRICED)
    rows = features if stride == 1 else features[np.arange(0, len(features), stride)]
    unit = unit_rows(np.asarray(centroids, dtype=np.float32))
    cosines = np.concatenate([piece @ unit.T for _, piece in unit_pieces(rows)])
    bound = max(int(balance * len(rows) / clusters), -(-len(rows) // clusters))
    biases = np.zeros(clusters, dtype=np.float32)
    for _ in range(rounds):
        counts = np.bincount((cosines - biases).argmax(axis=1), minlength=clusters)
        if counts.max() <= bound:
            return biases
        over = int(counts.argmax())
        priced = cosines - biases
        priced[:, over] = -np.inf
        lead = cosines[:, over] - priced.max(axis=1)  # the price at which each row leaves this cluster
        ordered = np.sort(lead)[::-1]
        price = (float(ordered[bound - 1]) + float(ordered[bound])) / 2
        biases[over] = max(np.float32(price), np.nextafter(biases[over], np.float32(np.inf)))
    raise ValueError(
        f"no cluster sizes of at most {balance} times an even share were found in {rounds} rounds (many rows are equal "
        "or the bound is too tight): give a larger --balance"
    )


def directions(features: FeatureArray, labels: np.ndarray, clusters: int) -> np.ndarray:
    """float32 [clusters, F]: the normalised mean direction of each cluster's rows; an empty cluster's is zero."""
    sums = np.zeros((clusters, features.shape[1]), dtype=np.float64)
    for start, piece in unit_pieces(features):
        sums += _sums(piece, labels[start : start + len(piece)], clusters)
    return unit_rows(sums)


def unit_pieces(features: FeatureArray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 [b, F] of unit length) for consecutive blocks of rows. Raises ValueError as `nearest`."""
    for start in range(0, len(features), _PIECE):
        yield start, unit_rows(features[start : start + _PIECE], first=start)


# --- the two stages ------------------------------------------------------------------------------------------------


def unit_rows(features: np.ndarray, first: int = 0) -> np.ndarray:
    """float32 rows of unit length; a zero row stays zero. Raises ValueError when a number is not finite."""
    rows = np.asarray(features, dtype=np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(norms).all():
        odd = first + int(np.flatnonzero(~np.isfinite(norms[:, 0]))[0])
        raise ValueError(f"row {odd} of the features is not finite")
    return rows / np.maximum(norms, 1e-12)


def _sums(piece: np.ndarray, cells: np.ndarray, count: int) -> np.ndarray:
    """float [count, F]: the sum of the rows of piece [b, F] in each cell."""
    if count <= 64:
        members = np.zeros((count, len(piece)), dtype=np.float32)
        members[cells, np.arange(len(piece))] = 1
        return members @ piece
    order = np.argsort(cells, kind="stable")
    present, starts = np.unique(cells[order], return_index=True)
    out = np.zeros((count, piece.shape[1]), dtype=np.float64)
    out[present] = np.add.reduceat(piece[order], starts, axis=0)
    return out


def _fine_centroids(
    features: FeatureArray, fine: int, generator: np.random.Generator, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [m, F], int64 [m]) m <= fine: Lloyd on the sphere from k-means++ seeds, empty cells dropped.

    Many rows are first fitted on evenly spaced 16ths and quarters of them: most of the way is covered there, at a
    fraction of the cost.
    """
    centroids = _seeds(features, fine, generator)
    fitted = max(_FITTED_ROWS * fine, _STAGED)
    if len(features) > fitted:
        rows = np.sort(generator.permutation(len(features))[:fitted])
        sample = np.empty((fitted, features.shape[1]), dtype=np.float32)
        for start in range(0, fitted, _PIECE):
            sample[start : start + _PIECE] = unit_rows(features[rows[start : start + _PIECE]])
        features = sample
    if len(features) > _STAGED:
        for stride in (16, 4):
            part = np.asarray(features[np.arange(0, len(features), stride)])
            centroids, _ = _lloyd(part, centroids, rounds, settled=0.01)
        return _lloyd(features, centroids, rounds, settled=0.02)
    return _lloyd(features, centroids, rounds, settled=0.0)


def _lloyd(features: FeatureArray, centroids: np.ndarray, rounds: int, settled: float) -> tuple[np.ndarray, np.ndarray]:
    """At most `rounds` rounds, fewer when no more than the share `settled` of the rows changes its cell."""
    previous = None
    for _ in range(rounds):
        sums = np.zeros(centroids.shape, dtype=np.float64)
        labels = np.empty(len(features), dtype=np.int64)
        for start, piece in unit_pieces(features):
            labels[start : start + len(piece)] = cells = (piece @ centroids.T).argmax(axis=1)
            sums += _sums(piece, cells, len(centroids))
        sizes = np.bincount(labels, minlength=len(centroids))
        kept = sizes > 0
        centroids = unit_rows(sums[kept])
        sizes = sizes[kept]
        if kept.all() and previous is not None and (labels != previous).mean() <= settled:
            break
        previous = labels if kept.all() else None
    return centroids, sizes


def _seeds(features: FeatureArray, fine: int, generator: np.random.Generator) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii 2007) on a sample: float32 [m, F], m <= fine (fewer when items repeat)."""
    size = min(len(features), max(_SEEDS, 8 * fine))
    sample = unit_rows(features[np.sort(generator.permutation(len(features))[:size])])
    chosen = [int(generator.integers(size))]
    distance = 1 - sample @ sample[chosen[0]]
    while len(chosen) < fine:
        weight = np.cumsum(np.maximum(distance, 0.0).astype(np.float64))
        if weight[-1] < 1e-6 * size:  # what is left are copies of the seeds
            break
        row = min(int(np.searchsorted(weight, generator.random() * weight[-1], side="right")), size - 1)
        chosen.append(row)
        distance = np.minimum(distance, 1 - sample @ sample[row])
    return sample[chosen]


def merge_fine(fine: np.ndarray, sizes: np.ndarray, clusters: int) -> np.ndarray:
    """Ward's criterion (1963) on the fine centroids, each with the weight of its items: float32 [clusters, F].

    Weights matter: without them a handful of odd items that got a fine centroid of their own ends as a coarse cluster.
    """
    means, weights = fine.astype(np.float64), sizes.astype(np.float64)
    alive = np.ones(len(fine), dtype=bool)
    costs = np.full((len(fine), len(fine)), np.inf)  # symmetric; inf on the diagonal and for merged-away rows
    for row in range(len(fine)):
        costs[row] = _merge_costs(means, weights, row)
    for _ in range(len(fine) - clusters):
        one, other = np.unravel_index(int(costs.argmin()), costs.shape)
        means[one] = (weights[one] * means[one] + weights[other] * means[other]) / (weights[one] + weights[other])
        weights[one] += weights[other]
        alive[other] = False
        costs[other] = costs[:, other] = np.inf
        costs[one] = np.where(alive, _merge_costs(means, weights, int(one)), np.inf)
        costs[:, one] = costs[one]
    return unit_rows(means[alive])


def _merge_costs(means: np.ndarray, weights: np.ndarray, row: int) -> np.ndarray:
    """float64 [m]: how much the within-cluster squares grow when ``row`` is merged with each other one."""
    squares = np.einsum("mf,mf->m", means, means)
    distances = np.maximum(squares + squares[row] - 2 * (means @ means[row]), 0.0)
    costs = weights * weights[row] / (weights + weights[row]) * distances
    costs[row] = np.inf
    return costs
