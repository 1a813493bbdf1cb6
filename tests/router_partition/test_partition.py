from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paris_swarm.router.cluster_report import cluster_report, example_grid
from paris_swarm.router.partition import Partition, nearest, partition


def blobs(sizes, dim=32, spread=0.25, seed=0):
    """Points around orthogonal directions, of any length: float32 [N, dim], and the direction of each."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    points = np.eye(dim)[labels] + generator.normal(0, spread / np.sqrt(dim), (len(labels), dim))
    return (points * generator.uniform(0.5, 20, (len(labels), 1))).astype(np.float32), labels


@pytest.mark.parametrize("seed", range(4))
def test_separate_groups_are_found_and_numbered_by_size(seed):
    features, truth = blobs((60, 200, 120, 20), seed=seed)
    found = partition(features, 4, seed=seed)
    assert np.bincount(found.labels).tolist() == [200, 120, 60, 20]
    for group, cluster in ((1, 0), (2, 1), (0, 2), (3, 3)):
        assert (found.labels[truth == group] == cluster).all()
    assert np.allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-5)
    assert found.centroids.dtype == np.float32


def test_the_same_seed_gives_the_same_partition():
    features, _ = blobs((100, 90, 80), spread=2.0)
    first, second, other = (
        partition(features, 3, seed=1),
        partition(features, 3, seed=1),
        partition(features, 3, seed=2),
    )
    assert np.array_equal(first.centroids, second.centroids)
    assert np.array_equal(first.labels, second.labels)
    assert not np.array_equal(first.centroids, other.centroids)


def test_labels_are_the_nearest_centroids():
    features, _ = blobs((100, 90, 80), spread=3.0)
    found = partition(features, 3)
    assert np.array_equal(nearest(features, found.centroids), found.labels)
    assert np.array_equal(nearest(features * 7, found.centroids * 3), found.labels)


def test_features_may_be_a_memory_map_read_in_pieces(tmp_path, monkeypatch):
    features, _ = blobs((100, 90, 80), spread=1.0)
    whole = partition(features, 3, seed=4)
    np.save(tmp_path / "f.npy", features)
    monkeypatch.setattr("paris_swarm.router.partition._PIECE", 37)
    pieces = partition(np.load(tmp_path / "f.npy", mmap_mode="r"), 3, seed=4)
    assert np.array_equal(whole.labels, pieces.labels)
    assert np.allclose(whole.centroids, pieces.centroids, atol=1e-5)


def test_two_stages_follow_groups_that_are_not_round():
    generator = np.random.default_rng(0)
    angle = generator.uniform(0, 2.2, (2, 600))
    arcs = [
        np.stack([np.cos(a), np.sin(a), np.full_like(a, y)], axis=1) for y, a in zip((-0.5, 0.5), angle, strict=True)
    ]
    features, truth = np.concatenate(arcs).astype(np.float32), np.repeat([0, 1], 600)

    def agreement(fine: int) -> float:
        same = (partition(features, 2, fine=fine).labels == truth).mean()
        return max(same, 1 - same)

    assert agreement(fine=2) < 0.6
    assert agreement(fine=64) > 0.95


@pytest.mark.parametrize(
    ("features", "clusters", "words"),
    [
        (np.ones((3, 4), dtype=np.float32), 4, "3 items cannot"),
        (np.ones((3, 4), dtype=np.float32), 0, "cannot be partitioned"),
        (np.ones((9, 4), dtype=np.float32), 2, "only 1 different"),
        (np.full((9, 4), np.nan, dtype=np.float32), 2, "row 0 of the features is not finite"),
        (np.ones(9, dtype=np.float32), 2, "shape"),
        (np.ones((0, 4), dtype=np.float32), 1, "shape"),
    ],
)
def test_what_cannot_be_partitioned_is_refused(features, clusters, words):
    with pytest.raises(ValueError, match=words):
        partition(features, clusters)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 60), clusters=st.integers(1, 6), fine=st.integers(1, 80))
def test_every_item_gets_a_cluster_and_none_is_empty(seed, count, clusters, fine):
    features = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    try:
        found = partition(features, clusters, seed=seed, fine=fine)
    except ValueError:
        return
    sizes = np.bincount(found.labels, minlength=clusters)
    assert sizes.sum() == count
    assert sizes.min() > 0
    assert (np.diff(sizes) <= 0).all()


def test_the_report_counts_families_and_scores_the_clusters():
    features, truth = blobs((60, 50, 40))
    captions = [{"text": "x", "family": "abc"[group]} for group in truth]
    captions[0]["family"] = "b"
    found = partition(features, 3)
    report = cluster_report(features, found, captions=captions, examples=9)
    assert report.sizes == (60, 50, 40)
    assert report.shares == (0.4, 50 / 150, 40 / 150)
    assert report.families == ({"a": 59, "b": 1}, {"b": 50}, {"c": 40})
    assert report.purity == pytest.approx(149 / 150)
    assert 0.9 < report.nmi < 1
    assert report.silhouette > 0.8
    assert all(score > 0.8 for score in report.silhouettes)
    for cluster, rows in enumerate(report.examples):
        assert len(set(rows)) == 9
        assert (found.labels[list(rows)] == cluster).all()
    assert report.warnings == ()
    assert cluster_report(features, found, captions=captions, examples=9) == report


def test_families_are_reported_only_when_every_row_has_one():
    features, _ = blobs((9, 9))
    report = cluster_report(features, partition(features, 2), captions=[{"text": "x"}] * 18)
    assert (report.families, report.purity, report.nmi) == (None, None, None)


def warnings_for(shares: list[int], spread: float = 0.1) -> tuple[str, ...]:
    features, truth = blobs(shares, spread=spread)
    return cluster_report(features, Partition(np.eye(32, dtype=np.float32)[: len(shares)], truth, 64, 0)).warnings


def test_a_catch_all_cluster_is_warned_of():
    (catch_all,) = warnings_for([416, 84, 84, 84, 84, 84, 84, 80])
    assert "cluster 0 holds 42% of the images, 3.3 times an even share" in catch_all
    assert warnings_for([200, 150, 120, 80]) == ()


def test_a_tiny_cluster_and_overlap_are_warned_of():
    assert any("cluster 3 holds only 0.7%" in words for words in warnings_for([100, 100, 100, 2]))
    assert any("overlap" in words for words in warnings_for([50, 50], spread=40.0))


def test_nearest_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        nearest(np.ones((3, 4)), np.ones((2, 5)))
    assert nearest(np.ones((0, 4)), np.ones((2, 4))).shape == (0,)


def test_the_grid_holds_every_picture():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    png = example_grid(images, columns=3, scale=2, gap=1)
    assert png == example_grid(images, columns=3, scale=2, gap=1)
    sheet = np.asarray(Image.open(io.BytesIO(png)))
    assert sheet.shape == (19, 28, 3)
    for place, image in enumerate(images):
        top, left = 1 + place // 3 * 9, 1 + place % 3 * 9
        assert np.array_equal(sheet[top : top + 8 : 2, left : left + 8 : 2], image)
    with pytest.raises(ValueError, match="n > 0"):
        example_grid(images[:0])


def test_a_handful_of_odd_items_gets_no_cluster_of_its_own():
    features, truth = blobs((300, 300, 300, 3), spread=1.2)
    labels = partition(features, 3, fine=40).labels
    for group in range(3):
        assert (np.bincount(labels[truth == group]).max()) > 280


def test_the_embedded_families_are_found_from_the_pretrained_features():
    from paris_swarm.expert.data.dicebear import DiceBearSource
    from paris_swarm.expert.data.encoders import EfficientNetLite0

    items = list(DiceBearSource(count=320, resolution=24, seed=11).items())
    features = EfficientNetLite0().encode(np.stack([item.pixels for item in items]))
    report = cluster_report(features, partition(features, 4), captions=[item.record for item in items])
    assert report.purity > 0.95
    assert min(report.sizes) > 60
    assert report.warnings == ()


class Blocks:
    """Features that can only be read in blocks: how many rows were asked for at once is remembered."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows
        self.shape = rows.shape
        self.largest = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, wanted):
        block = self._rows[wanted]
        self.largest = max(self.largest, len(block))
        return block


def test_many_rows_are_fitted_in_stages_and_never_held_at_once(monkeypatch):
    for name, value in (("_PIECE", 64), ("_STAGED", 200), ("_FITTED_ROWS", 4), ("_SEEDS", 64)):
        monkeypatch.setattr(f"paris_swarm.router.partition.{name}", value)
    features, truth = blobs((900, 500, 400, 200), spread=1.0)
    blocks = Blocks(features)
    found = partition(blocks, 4, seed=3, fine=64)
    assert [len(np.unique(found.labels[truth == group])) for group in range(4)] == [1, 1, 1, 1]
    assert np.bincount(found.labels).tolist() == [900, 500, 400, 200]
    assert blocks.largest <= 8 * 64  # the seeds' sample; of 2,000 rows
    again = partition(features, 4, seed=3, fine=64)
    assert np.array_equal(again.centroids, found.centroids)
