"""Which cluster a row belongs to, as a rule that any peer can follow for rows that the organiser has never seen.

    clusters   the nearest centroid; with a bound on sizes, after each cluster's bias is taken off the cosine
    random     keyed BLAKE3 of the row's digest (its pixels and caption): a control without any structure
    class      a field of its caption record, by the plan's table; a value the table lacks goes where the keyed BLAKE3
               of the value says, so that every row has a cluster

The plan says which (`data.partition`), so `init`, `prepare --plan`, `join`, `audit` and `verify` agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from blake3 import blake3

from paris_swarm.router.partition import METHODS, FeatureArray, Partition, directions, nearest

Records = Callable[[], Iterable[Mapping[str, Any]]]
"""A function that begins to read the rows' caption records; called only where they decide."""


@dataclass(frozen=True)
class RowRule:
    """centroids float32 [K, F]; biases float32 [K] or None; seed: of the keyed hash; class_key, classes: for "class".

    Raises:
        ValueError: an unknown method, "class" without a field, or a class of a cluster that there is not.
    """

    method: str
    centroids: np.ndarray
    seed: int = 0
    biases: np.ndarray | None = None
    class_key: str | None = None
    classes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"the partition must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method == "class" and not (isinstance(self.class_key, str) and self.class_key):
            raise ValueError("a partition by class needs the caption field that names the class")
        if any(not 0 <= cluster < len(self.centroids) for cluster in self.classes.values()):
            raise ValueError(f"a class has a cluster outside 0 to {len(self.centroids) - 1}")

    @classmethod
    def of(cls, found: Partition) -> RowRule:
        """The rule by which `found` was made."""
        return cls(found.method, found.centroids, found.seed, found.biases, found.class_key, found.classes)

    def labels(self, features: FeatureArray, digests: np.ndarray, records: Records) -> np.ndarray:
        """int64 [N], 0..K-1, of rows with features float [N, F] and digests uint8 [N, 16].

        Raises:
            ValueError: features do not fit the centroids; a row's record lacks the class field.
        """
        if self.method == "random":
            return keyed_labels((row.tobytes() for row in digests), len(self.centroids), self.seed)
        if self.method == "class":
            return self._class_labels(records())
        return nearest(features, self.centroids, self.biases)

    def _class_labels(self, records: Iterable[Mapping[str, Any]]) -> np.ndarray:
        known = dict(self.classes)
        out = []
        for value in class_values(records, self.class_key or ""):
            if value not in known:
                known[value] = int(keyed_labels([value.encode("utf-8")], len(self.centroids), self.seed)[0])
            out.append(known[value])
        return np.array(out, dtype=np.int64)


def keyed_labels(identities: Iterable[bytes], clusters: int, seed: int) -> np.ndarray:
    """int64 [N]: floor(h K / 2^64), h the first 8 bytes, big-endian, of BLAKE3(identity) keyed with
    BLAKE3("paris-swarm random partition SEED")."""
    key = blake3(f"paris-swarm random partition {seed}".encode()).digest()
    return np.fromiter(
        (int.from_bytes(blake3(each, key=key).digest(length=8), "big") * clusters >> 64 for each in identities),
        dtype=np.int64,
    )


def class_values(records: Iterable[Mapping[str, Any]], key: str) -> Iterable[str]:
    """The class of each caption record: its field ``key``, or that of its "attributes".

    Raises:
        ValueError: a record has neither; its row and file are named.
    """
    for row, record in enumerate(records):
        attributes = record.get("attributes")
        inner = attributes.get(key) if isinstance(attributes, Mapping) else None
        value = record.get(key, inner)
        if not isinstance(value, str | int):
            where = record.get("file", "?")
            raise ValueError(
                f"row {row} ({where}) has no {key!r} in its caption record: name a field that every row has "
                "(--class-key), or partition by clusters"
            )
        yield str(value)


def random_partition(features: FeatureArray, digests: np.ndarray, clusters: int, seed: int) -> Partition:
    """Random shards of rows with digests uint8 [N, 16]: a row's shard depends on itself and the seed alone.

    Raises:
        ValueError: so few rows that a shard is empty.
    """
    labels = keyed_labels((row.tobytes() for row in digests), clusters, seed)
    return _described(Partition(np.empty((clusters, 0)), labels, 0, seed, "random"), features, clusters)


def class_partition(
    features: FeatureArray, records: Iterable[Mapping[str, Any]], clusters: int, seed: int, key: str
) -> Partition:
    """A cluster for every class; where there are more classes than clusters the largest go first, each to the cluster
    that has fewest rows so far.

    Raises:
        ValueError: fewer classes than clusters, or a row without a class.
    """
    numbers: dict[str, int] = {}
    codes = np.fromiter(
        (numbers.setdefault(value, len(numbers)) for value in class_values(records, key)), dtype=np.int64
    )
    if len(numbers) < clusters:
        raise ValueError(f"{key!r} has {len(numbers)} different values, {clusters} clusters were asked for: lower -k")
    names, sizes = list(numbers), np.bincount(codes)
    filled = np.zeros(clusters, dtype=np.int64)
    classes: dict[str, int] = {}
    for name in sorted(names, key=lambda name: (-int(sizes[numbers[name]]), name)):
        classes[name] = cluster = int(filled.argmin())
        filled[cluster] += sizes[numbers[name]]
    labels = np.array([classes[name] for name in names], dtype=np.int64)[codes]
    found = Partition(np.empty((clusters, 0)), labels, 0, seed, "class", None, key, dict(sorted(classes.items())))
    return _described(found, features, clusters)


def _described(found: Partition, features: FeatureArray, clusters: int) -> Partition:
    """With the mean direction of each cluster as its centroid: what shows how far the control is from a clustering."""
    empty = clusters - len(np.unique(found.labels))
    if empty:
        raise ValueError(f"{empty} of {clusters} clusters would be empty: ask for fewer clusters, or prepare more rows")
    return replace(found, centroids=directions(features, found.labels, clusters))
