"""The partition: every image to one of K clusters, by two-stage spherical k-means on the encoder's features.

Decentralized Diffusion Models (arXiv 2501.05450): many fine centroids first, merged to K coarse ones, then each item to
its nearest coarse centroid, with no balancing. Distances are those of L2-normalised features. The fine stage reads the
features in pieces, so they may be a memory map larger than memory. The same features and seed give the same partition.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_FINE = 1024
SILHOUETTE_SAMPLE = 2048

_PIECE = 8192  # rows of features held as float32 at a time
_SEEDING_SAMPLE = 65536  # rows the first centroids are chosen from


@dataclass(frozen=True)
class Partition:
    """centroids float32 [K, F], unit length; labels int64 [N], 0..K-1, cluster 0 the largest; fine: the first count."""

    centroids: np.ndarray
    labels: np.ndarray
    fine: int
    seed: int

    @property
    def clusters(self) -> int:
        """K."""
        return len(self.centroids)


@dataclass(frozen=True)
class ClusterReport:
    """What the organiser should look at before signing.

    sizes and shares of each cluster; silhouette (-1 to 1, cosine, on a sample; None when it is not defined) whole and
    by cluster; families: for each cluster how many rows of each family, where the source knows them; purity: share of
    rows in their cluster's main family; nmi: normalised mutual information of clusters and families; examples: rows
    drawn at random from each cluster; warnings: sentences for a person.
    """

    sizes: tuple[int, ...]
    shares: tuple[float, ...]
    silhouette: float | None
    silhouettes: tuple[float | None, ...]
    families: tuple[Mapping[str, int], ...] | None
    purity: float | None
    nmi: float | None
    examples: tuple[tuple[int, ...], ...]
    warnings: tuple[str, ...]


def partition(
    features: np.ndarray, clusters: int, *, seed: int = 0, fine: int | None = None, rounds: int = 25
) -> Partition:
    """Partition features float [N, F] into ``clusters`` clusters.

    ``fine`` centroids are fitted first (default: a 64th of the items, at least 8 a cluster and at most 1024) and merged
    by Ward's criterion. Raises ValueError: fewer items than clusters, a feature that is not finite, or so many equal
    items that a cluster would stay empty.
    """
    if features.ndim != 2 or not features.size:
        raise ValueError(f"features must have the shape [items, numbers], got {list(features.shape)}")
    count = len(features)
    if not 1 <= clusters <= count:
        raise ValueError(
            f"{count} items cannot be partitioned into {clusters} clusters: prepare more, or ask for fewer"
        )
    if fine is None:
        fine = min(MAX_FINE, max(8 * clusters, count // 64))
    fine = max(clusters, min(fine, count))
    generator = np.random.Generator(np.random.PCG64(seed))
    fine_centroids, sizes = _fine_centroids(features, fine, generator, rounds)
    if len(fine_centroids) < clusters:
        raise ValueError(f"only {len(fine_centroids)} different items for {clusters} clusters: ask for fewer clusters")
    coarse = _merge(fine_centroids, sizes, clusters)
    labels = nearest(features, coarse)
    counts = np.bincount(labels, minlength=clusters)
    if not counts.all():
        raise ValueError(f"{int((counts == 0).sum())} of {clusters} clusters would be empty: ask for fewer clusters")
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(clusters, dtype=np.int64)
    rank[order] = np.arange(clusters)
    return Partition(coarse[order], rank[labels], len(fine_centroids), seed)


def nearest(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """int64 [N]: the centroid nearest to each of features float [N, F] by cosine; the lower number wins a tie.

    Raises ValueError for shapes that do not fit or a feature that is not finite.
    """
    if features.ndim != 2 or centroids.ndim != 2 or features.shape[1] != centroids.shape[1]:
        raise ValueError(f"features {list(features.shape)} do not fit centroids {list(centroids.shape)}")
    unit = _normalised(np.asarray(centroids, dtype=np.float32))
    pieces = [
        (_normalised(features[start : start + _PIECE]) @ unit.T).argmax(axis=1)
        for start in range(0, len(features), _PIECE)
    ]
    return np.concatenate(pieces).astype(np.int64) if pieces else np.empty(0, dtype=np.int64)


def cluster_report(
    features: np.ndarray,
    found: Partition,
    *,
    captions: Sequence[Mapping[str, Any]] | None = None,
    examples: int = 36,
    seed: int = 0,
) -> ClusterReport:
    """Describe a partition. ``captions`` are the rows' caption records: "family" is used where every row has one."""
    count, clusters = len(found.labels), found.clusters
    sizes = np.bincount(found.labels, minlength=clusters)
    generator = np.random.Generator(np.random.PCG64([seed, 1]))
    silhouette, silhouettes = _silhouette(features, found.labels, clusters, generator)
    families, purity, nmi = _families(found.labels, clusters, captions)
    rows = [np.flatnonzero(found.labels == cluster) for cluster in range(clusters)]
    chosen = [np.sort(generator.permutation(row)[:examples]) for row in rows]
    return ClusterReport(
        sizes=tuple(sizes.tolist()),
        shares=tuple((sizes / count).tolist()),
        silhouette=silhouette,
        silhouettes=silhouettes,
        families=families,
        purity=purity,
        nmi=nmi,
        examples=tuple(tuple(row.tolist()) for row in chosen),
        warnings=_warnings(sizes / count, silhouette),
    )


def example_grid(images: np.ndarray, *, columns: int = 6, scale: int = 3, gap: int = 2) -> bytes:
    """A PNG of images uint8 [n, H, W, 3] side by side on white, each pixel drawn ``scale`` by ``scale``."""
    from PIL import Image

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"images must be uint8 [n, H, W, 3] with n > 0, got {images.dtype} {list(images.shape)}")
    big = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = big.shape
    columns = min(columns, count)
    lines = -(-count // columns)
    sheet = np.full((lines * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for place, image in enumerate(big):
        top = gap + place // columns * (height + gap)
        left = gap + place % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, format="PNG")
    return stream.getvalue()


# --- the two stages ------------------------------------------------------------------------------------------------


def _normalised(features: np.ndarray) -> np.ndarray:
    """float32 rows of unit length; a zero row stays zero. Raises ValueError when a number is not finite."""
    rows = np.asarray(features, dtype=np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(norms).all():
        raise ValueError(f"row {int(np.flatnonzero(~np.isfinite(norms[:, 0]))[0])} of the features is not finite")
    return rows / np.maximum(norms, 1e-12)


def _fine_centroids(
    features: np.ndarray, fine: int, generator: np.random.Generator, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [m, F], int64 [m]) m <= fine: Lloyd on the sphere from k-means++ seeds, empty cells dropped."""
    centroids = _seeds(features, fine, generator)
    previous = None
    for _ in range(rounds):
        sums = np.zeros(centroids.shape, dtype=np.float64)
        labels = np.empty(len(features), dtype=np.int64)
        for start in range(0, len(features), _PIECE):
            piece = _normalised(features[start : start + _PIECE])
            labels[start : start + len(piece)] = cells = (piece @ centroids.T).argmax(axis=1)
            members = np.zeros((len(centroids), len(piece)), dtype=np.float32)
            members[cells, np.arange(len(piece))] = 1
            sums += members @ piece
        sizes = np.bincount(labels, minlength=len(centroids))
        kept = sizes > 0
        centroids = _normalised(sums[kept])
        sizes = sizes[kept]
        if kept.all() and previous is not None and np.array_equal(labels, previous):
            break
        previous = labels if kept.all() else None
    return centroids, sizes


def _seeds(features: np.ndarray, fine: int, generator: np.random.Generator) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii 2007) on a sample: float32 [m, F], m <= fine (fewer when items repeat)."""
    size = min(len(features), _SEEDING_SAMPLE)
    sample = _normalised(features[np.sort(generator.permutation(len(features))[:size])])
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


def _merge(fine: np.ndarray, sizes: np.ndarray, clusters: int) -> np.ndarray:
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
    return _normalised(means[alive])


def _merge_costs(means: np.ndarray, weights: np.ndarray, row: int) -> np.ndarray:
    """float64 [m]: how much the within-cluster squares grow when ``row`` is merged with each other one."""
    squares = np.einsum("mf,mf->m", means, means)
    distances = np.maximum(squares + squares[row] - 2 * (means @ means[row]), 0.0)
    costs = weights * weights[row] / (weights + weights[row]) * distances
    costs[row] = np.inf
    return costs


# --- the report ----------------------------------------------------------------------------------------------------


def _silhouette(
    features: np.ndarray, labels: np.ndarray, clusters: int, generator: np.random.Generator
) -> tuple[float | None, tuple[float | None, ...]]:
    rows = np.sort(generator.permutation(len(labels))[:SILHOUETTE_SAMPLE])
    here = labels[rows]
    if not 2 <= len(np.unique(here)) < len(here):
        return None, (None,) * clusters
    from sklearn.metrics import silhouette_samples

    values = silhouette_samples(_normalised(features[rows]), here, metric="cosine")
    members = [values[here == cluster] for cluster in range(clusters)]
    parts = tuple(float(part.mean()) if len(part) else None for part in members)
    return float(values.mean()), parts


def _families(
    labels: np.ndarray, clusters: int, captions: Sequence[Mapping[str, Any]] | None
) -> tuple[tuple[Mapping[str, int], ...] | None, float | None, float | None]:
    if not captions or not all("family" in caption for caption in captions):
        return None, None, None
    names, codes = np.unique([str(caption["family"]) for caption in captions], return_inverse=True)
    table = np.zeros((clusters, len(names)), dtype=np.int64)
    np.add.at(table, (labels, codes), 1)
    families = tuple(
        {str(names[place]): int(row[place]) for place in np.argsort(-row, kind="stable") if row[place]} for row in table
    )
    from sklearn.metrics import normalized_mutual_info_score

    return families, float(table.max(axis=1).sum() / len(labels)), float(normalized_mutual_info_score(codes, labels))


def _warnings(shares: np.ndarray, silhouette: float | None) -> tuple[str, ...]:
    fair = 1 / len(shares)
    found = []
    if len(shares) > 1:
        for cluster, share in enumerate(shares.tolist()):
            if share > min(0.75, 2.5 * fair):
                found.append(
                    f"cluster {cluster} holds {share:.0%} of the images, {share / fair:.1f} times an even share: "
                    "a catch-all; look at its example grid, and try another number of clusters"
                )
            elif share < 0.1 * fair:
                found.append(f"cluster {cluster} holds only {share:.1%} of the images: its expert will see very few")
    if silhouette is not None and silhouette < 0.05:
        found.append(f"the clusters overlap (silhouette {silhouette:.2f}): experts will share one kind of picture")
    return tuple(found)
