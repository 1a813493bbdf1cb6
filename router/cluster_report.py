"""What the organiser should look at before signing: how large, how separate and how mixed the clusters are.

Everything is a function of the rows and a seed, and reads the features in blocks: sizes and Davies-Bouldin from all
rows, the silhouette, whose cost is the square of its rows, from SILHOUETTE_SAMPLE of them.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from paris_swarm.router.partition import FeatureArray, Partition, unit_pieces, unit_rows

SILHOUETTE_SAMPLE = 2048


@dataclass(frozen=True)
class ClusterReport:
    """What the organiser should look at before signing.

    sizes and shares of each cluster; silhouette (-1 to 1, cosine, on a sample; None when it is not defined) whole and
    by cluster; davies_bouldin (0 and up, lower is more separate, on unit features; None for one cluster); families: for
    each cluster how many rows of each family, where the source knows them; purity: share of rows in their cluster's
    main family; nmi: normalised mutual information of clusters and families; examples: rows drawn at random from each
    cluster; warnings: sentences for a person; method: how rows got their cluster (`partition.METHODS`).
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
    davies_bouldin: float | None = None
    method: str = "clusters"


def cluster_report(
    features: FeatureArray,
    found: Partition,
    *,
    captions: Iterable[Mapping[str, Any]] | None = None,
    examples: int = 36,
    seed: int = 0,
) -> ClusterReport:
    """Describe a partition. ``captions``: the rows' caption records; "family", else "class", counts if all have it."""
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
        warnings=_warnings(sizes / count, silhouette, found.method),
        davies_bouldin=davies_bouldin(features, found.labels, clusters),
        method=found.method,
    )


def davies_bouldin(features: FeatureArray, labels: np.ndarray, clusters: int) -> float | None:
    """Davies and Bouldin 1979 on L2-normalised features: mean over clusters of the worst (s_i + s_j) / d_ij.

    s_i: mean distance of a cluster's rows to their mean; d_ij: distance of two means. None where fewer than two
    clusters have rows, or two means coincide.
    """
    means = np.zeros((clusters, features.shape[1]), dtype=np.float64)
    for start, piece in unit_pieces(features):
        here = labels[start : start + len(piece)]
        for cluster in np.unique(here).tolist():
            means[cluster] += piece[here == cluster].sum(axis=0, dtype=np.float64)
    sizes = np.bincount(labels, minlength=clusters)
    means /= np.maximum(sizes, 1)[:, None]
    spread = np.zeros(clusters)
    for start, piece in unit_pieces(features):
        here = labels[start : start + len(piece)]
        away = np.linalg.norm(piece - means[here].astype(np.float32), axis=1)
        spread += np.bincount(here, weights=away, minlength=clusters)
    spread /= np.maximum(sizes, 1)
    there = sizes > 0
    means, spread = means[there], spread[there]
    if len(means) < 2:
        return None
    squares = (means**2).sum(axis=1)
    apart = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * means @ means.T, 0))
    np.fill_diagonal(apart, np.inf)
    if not apart.all():
        return None
    return float(((spread[:, None] + spread[None]) / apart).max(axis=1).mean())


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


# --- parts of the report -------------------------------------------------------------------------------------------


def _silhouette(
    features: FeatureArray, labels: np.ndarray, clusters: int, generator: np.random.Generator
) -> tuple[float | None, tuple[float | None, ...]]:
    rows = np.sort(generator.permutation(len(labels))[:SILHOUETTE_SAMPLE])
    here = labels[rows]
    if not 2 <= len(np.unique(here)) < len(here):
        return None, (None,) * clusters
    from sklearn.metrics import silhouette_samples

    values = silhouette_samples(unit_rows(features[rows]), here, metric="cosine")
    members = [values[here == cluster] for cluster in range(clusters)]
    parts = tuple(float(part.mean()) if len(part) else None for part in members)
    return float(values.mean()), parts


def _families(
    labels: np.ndarray, clusters: int, captions: Iterable[Mapping[str, Any]] | None
) -> tuple[tuple[Mapping[str, int], ...] | None, float | None, float | None]:
    """One number a row is kept of the captions, however many there are."""
    numbers: dict[str, int] = {}
    found = array("q")
    for caption in captions or ():
        family = caption.get("family", caption.get("class"))
        if family is None:
            return None, None, None
        found.append(numbers.setdefault(str(family), len(numbers)))
    if not found:
        return None, None, None
    names = sorted(numbers)
    place_of = np.argsort(np.argsort(list(numbers)))
    codes = place_of[np.frombuffer(found, dtype=np.int64)]
    table = np.zeros((clusters, len(names)), dtype=np.int64)
    np.add.at(table, (labels, codes), 1)
    families = tuple(
        {names[place]: int(row[place]) for place in np.argsort(-row, kind="stable") if row[place]} for row in table
    )
    from sklearn.metrics import normalized_mutual_info_score

    return families, float(table.max(axis=1).sum() / len(labels)), float(normalized_mutual_info_score(codes, labels))


def _warnings(shares: np.ndarray, silhouette: float | None, method: str) -> tuple[str, ...]:
    fair = 1 / len(shares)
    found = []
    for cluster, share in enumerate(shares.tolist() if len(shares) > 1 else []):
        if share > min(0.75, 2.5 * fair):
            found.append(
                f"cluster {cluster} holds {share:.0%} of the images, {share / fair:.1f} times an even share: "
                "a catch-all; look at its example grid, and try another number of clusters, or --balance"
            )
        elif share < 0.1 * fair:
            found.append(f"cluster {cluster} holds only {share:.1%} of the images: its expert will see very few")
    if silhouette is not None and silhouette < 0.05 and method != "random":
        found.append(f"the clusters overlap (silhouette {silhouette:.2f}): experts will share one kind of picture")
    if method == "random":
        found.append("random shards, a control: every expert sees every kind of picture, and no router can tell them")
    return tuple(found)
