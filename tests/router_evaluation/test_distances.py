from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_swarm.router.evaluation.frechet import Gaussian, frechet_distance
from paris_swarm.router.evaluation.intervals import Interval
from paris_swarm.router.evaluation.kernel import kernel_distance, squared_mmd
from paris_swarm.router.evaluation.neighbours import Manifold, precision_recall


def normal(n: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)) + shift


# --- Frechet ---------------------------------------------------------------------------------------------------------


def test_frechet_distance_of_known_gaussians():
    # Commuting covariances: |m|^2 + sum (sqrt(a) - sqrt(b))^2, by hand.
    a = Gaussian.of(np.array([0.0, 0.0, 0.0]), np.diag([4.0, 1.0, 0.0]))
    b = Gaussian.of(np.array([3.0, 4.0, 0.0]), np.diag([1.0, 9.0, 4.0]))
    assert frechet_distance(a, b) == pytest.approx(25 + 1 + 4 + 4, abs=1e-6)
    assert frechet_distance(b, a) == pytest.approx(34, abs=1e-6)
    # Rotated by the same turn, nothing changes.
    turn, _ = np.linalg.qr(normal(3, 3, 5))
    rotated = [Gaussian.of(turn @ g.mean, turn @ (g.root.T @ g.root) @ turn.T) for g in (a, b)]
    assert frechet_distance(*rotated) == pytest.approx(34, abs=1e-6)


def test_frechet_distance_of_covariances_that_do_not_commute():
    # C_a C_b of two 2 x 2 matrices: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    first, second = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.5], [-0.5, 2.0]])
    product = first @ second
    root_trace = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(first) + np.trace(second) - 2 * root_trace
    zero = np.zeros(2)
    assert frechet_distance(Gaussian.of(zero, first), Gaussian.of(zero, second)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rows", [5, 400])
def test_fewer_rows_than_numbers_give_the_same_distance_as_the_full_covariance(rows):
    few, many = normal(rows, 20, 0), normal(500, 20, 1, shift=0.3)
    fitted = [Gaussian.fit(part) for part in (few, many)]
    full = [Gaussian.of(part.mean(axis=0), np.cov(part, rowvar=False)) for part in (few, many)]
    assert frechet_distance(*fitted) == pytest.approx(frechet_distance(*full), abs=1e-6)
    assert frechet_distance(fitted[0], fitted[0]) == pytest.approx(0.0, abs=1e-6)


def test_what_no_gaussian_fits_is_refused():
    with pytest.raises(ValueError, match="2 or more"):
        Gaussian.fit(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="not finite"):
        Gaussian.fit(np.array([[0.0, np.nan], [1.0, 1.0]]))
    with pytest.raises(ValueError, match="cannot be compared"):
        frechet_distance(Gaussian.fit(normal(4, 2, 0)), Gaussian.fit(normal(4, 3, 0)))


# --- kernel ----------------------------------------------------------------------------------------------------------


def test_squared_mmd_is_the_double_sum_written_out():
    a, b = normal(5, 3, 0), normal(4, 3, 1, shift=0.5)

    def kernel(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    within_a = np.mean([kernel(a[i], a[j]) for i in range(5) for j in range(5) if i != j])
    within_b = np.mean([kernel(b[i], b[j]) for i in range(4) for j in range(4) if i != j])
    between = np.mean([kernel(x, y) for x in a for y in b])
    assert squared_mmd(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-12)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    same = [kernel_distance(normal(200, 8, s), normal(200, 8, s + 100), blocks=4, rows=50, seed=s) for s in range(30)]
    means = np.array([found.mean for found in same])
    assert means.min() < 0 < means.max()
    assert abs(means.mean()) < 4 * means.std() / np.sqrt(len(means))
    shifted = kernel_distance(normal(200, 8, 1), normal(200, 8, 2, shift=1.0))
    assert shifted.mean > 10 * np.abs(means).max()
    assert shifted == kernel_distance(normal(200, 8, 1), normal(200, 8, 2, shift=1.0))


# --- neighbours ------------------------------------------------------------------------------------------------------


def by_hand(points: np.ndarray, queries: np.ndarray, k: int) -> float:
    radii = [sorted(np.linalg.norm(p - q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]
    inside = [any(np.linalg.norm(q - p) <= r + 1e-12 for p, r in zip(points, radii, strict=True)) for q in queries]
    return float(np.mean(inside))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(5, 30), st.integers(5, 30), st.integers(1, 4))
def test_precision_and_recall_are_those_of_brute_force(seed, n, m, k):
    real, drawn = normal(n, 3, seed), normal(m, 3, seed + 1, shift=0.7)
    precision, recall = precision_recall(Manifold.of(real, k), Manifold.of(drawn, k))
    assert precision == pytest.approx(by_hand(real, drawn, k))
    assert recall == pytest.approx(by_hand(drawn, real, k))


def test_identical_and_disjoint_sets():
    points = normal(1500, 4, 3)  # more than one piece
    assert precision_recall(Manifold.of(points), Manifold.of(points)) == (1.0, 1.0)
    assert precision_recall(Manifold.of(points), Manifold.of(points + 100)) == (0.0, 0.0)
    # One point, drawn again and again, is all precision and no recall.
    collapsed = np.repeat(points[:1], 50, axis=0)
    precision, recall = precision_recall(Manifold.of(points), Manifold.of(collapsed))
    assert (precision, recall) == (1.0, pytest.approx(1 / 1500))
    with pytest.raises(ValueError, match="need more points"):
        Manifold.of(points[:3])


# --- intervals -------------------------------------------------------------------------------------------------------


def test_interval_of_three_values_by_hand():
    found = Interval.of([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.303 / np.sqrt(3), rel=1e-6)
    assert found.text(2) == "2.00 ± 2.48"
    assert Interval.of([5.0]).text(1) == "5.0"
    with pytest.raises(ValueError, match="finite"):
        Interval.of([])
    with pytest.raises(ValueError, match="finite"):
        Interval.of([1.0, float("nan")])
