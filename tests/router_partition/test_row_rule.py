"""The rule by which a peer finds the cluster of a row that the organiser has never seen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_swarm.router.partition import bounded_biases, nearest, partition
from paris_swarm.router.row_rule import RowRule, class_partition, keyed_labels, random_partition


def rows(count: int, dim: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    centres = 2.5 * generator.normal(size=(6, dim))
    points = centres[generator.choice(6, count, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05])] + generator.normal(
        size=(count, dim)
    )
    return points.astype(np.float32), generator.integers(0, 256, (count, 16), dtype=np.uint8)


def unread() -> list[dict[str, object]]:
    raise AssertionError("captions do not decide here")


def test_random_shards_depend_on_the_row_and_the_seed_alone() -> None:
    features, digests = rows(2000)
    found = random_partition(features, digests, 4, seed=7)
    assert found.method == "random"
    assert np.bincount(found.labels).min() > 420  # 500 expected, standard deviation 19
    rule = RowRule.of(found)
    some = np.arange(1999, -1, -3)
    np.testing.assert_array_equal(rule.labels(features[some] * 0, digests[some], unread), found.labels[some])
    other = random_partition(features, digests, 4, seed=8).labels
    assert 0.15 < (other == found.labels).mean() < 0.35
    # Written into docs and SPEC: a second implementation must find the same shard.
    assert keyed_labels([bytes(16), b"\x01" * 16, b"\x02" * 16, b"\x03" * 16], 1000, 0).tolist() == [163, 849, 66, 986]


@pytest.mark.parametrize("field", [None, "", ["kind"], {"kind": 1}, 7])
def test_a_field_that_is_no_name_is_refused(field: object) -> None:
    with pytest.raises(ValueError, match="caption field"):
        RowRule("class", np.eye(2, dtype=np.float32), class_key=field)  # type: ignore[arg-type]


@pytest.mark.parametrize("clusters", [1, 3, 1024])
def test_every_keyed_label_is_a_cluster(clusters: int) -> None:
    labels = keyed_labels((bytes([k, j]) for k, j in itertools.product(range(64), range(64))), clusters, 3)
    assert labels.min() >= 0
    assert labels.max() < clusters


def test_classes_fill_clusters_largest_first() -> None:
    names = ["a"] * 50 + ["b"] * 30 + ["c"] * 25 + ["d"] * 5
    features, digests = rows(len(names))
    records = [{"text": "x", "attributes": {"kind": name}} for name in names]
    found = class_partition(features, records, 2, 0, "kind")
    assert dict(found.classes) == {"a": 0, "b": 1, "c": 1, "d": 0}
    assert np.bincount(found.labels).tolist() == [55, 55]
    rule = RowRule.of(found)
    np.testing.assert_array_equal(rule.labels(features, digests, lambda: records), found.labels)
    new = [{"text": "x", "kind": "unheard of"}] * 2
    first, second = rule.labels(features[:2], digests[:2], lambda: new).tolist()
    assert first == second == int(keyed_labels([b"unheard of"], 2, 0)[0])


@pytest.mark.parametrize(
    ("records", "clusters", "words"),
    [
        ([{"text": "x", "family": "a"}] * 4, 2, "1 different values, 2 clusters"),
        ([{"text": "x", "family": "a"}, {"text": "x", "file": "b.png"}] * 2, 2, r"row 1 \(b.png\) has no 'family'"),
        ([{"text": "x", "family": ["a"]}] * 4, 1, "row 0"),
    ],
)
def test_data_without_usable_classes_is_refused(records: list[dict[str, object]], clusters: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        class_partition(rows(4)[0], records, clusters, 0, "family")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "magic"}, "one of clusters"),
        ({"method": "class"}, "field"),
        ({"classes": {"a": 2}}, "outside 0 to 1"),
    ],
)
def test_a_plan_that_says_no_rule_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RowRule(**{"method": "clusters", "centroids": np.eye(2, dtype=np.float32), **change})  # type: ignore[arg-type]


def test_a_bound_on_sizes_holds_and_is_a_rule_for_new_rows() -> None:
    features, digests = rows(3000)
    free = partition(features, 6, seed=1)
    assert np.bincount(free.labels).max() > 1.8 * 500
    found = partition(features, 6, seed=1, balance=1.25)
    assert np.bincount(found.labels, minlength=6).max() <= 625
    assert found.biases is not None
    assert (found.biases >= 0).all()
    np.testing.assert_array_equal(RowRule.of(found).labels(features, digests, unread), found.labels)
    new, _ = rows(3000, seed=0)
    fresh = nearest(new + np.float32(0.05), found.centroids, found.biases)
    assert np.bincount(fresh, minlength=6).max() < 1.25 * 500 * 1.1
    again = partition(features, 6, seed=1, balance=1.25)
    np.testing.assert_array_equal(found.biases, again.biases)
    np.testing.assert_array_equal(found.labels, again.labels)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), clusters=st.integers(2, 7), balance=st.floats(1.05, 3))
def test_bounded_clusters_never_exceed_their_bound(seed: int, clusters: int, balance: float) -> None:
    features, _ = rows(200, dim=5, seed=seed)
    centroids = np.random.default_rng(seed).normal(size=(clusters, 5)).astype(np.float32)
    biases = bounded_biases(features, centroids, balance)
    sizes = np.bincount(nearest(features, centroids, biases), minlength=clusters)
    assert sizes.max() <= max(int(balance * 200 / clusters), -(-200 // clusters))


def test_a_bound_that_equal_rows_make_unreachable_is_refused() -> None:
    with pytest.raises(ValueError, match="many rows are equal"):
        bounded_biases(np.ones((40, 3), dtype=np.float32), np.eye(3, dtype=np.float32), 1.2, rounds=50)
    with pytest.raises(ValueError, match=r"0\.5 times an even share"):
        partition(rows(40)[0], 2, balance=0.5)
