"""Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, section 2).

Precision: the share of drawn pictures that lie within the manifold of real ones; recall: the reverse. A set's manifold
is the union of balls around its points, each as wide as the distance to the k-th nearest other point of the set.
Both depend on how many points there are: compare only figures of the same counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 3
_PIECE = 1024  # rows whose distances are held at a time


@dataclass(frozen=True)
class Manifold:
    """points float64 [n, F] and the squared radius of each one's ball, float64 [n]."""

    points: NDArray[np.float64]
    radii: NDArray[np.float64]

    @classmethod
    def of(cls, features: NDArray[np.floating], k: int = NEIGHBOURS) -> Manifold:
        """From features [n, F].

        Raises:
            ValueError: not more than k points, or k below 1.
        """
        if features.ndim != 2 or not 1 <= k < len(features):
            raise ValueError(f"balls to the {k}-th neighbour need more points than {list(features.shape)[:1]} [n, F]")
        points = np.asarray(features, dtype=np.float64)
        radii = np.empty(len(points))
        for start in range(0, len(points), _PIECE):
            squares = _squares(points[start : start + _PIECE], points)  # [b, n]
            own = np.arange(len(squares))
            squares[own, start + own] = -1.0  # a point is not its own neighbour: first in order, before any copy
            radii[start : start + len(squares)] = np.partition(squares, k, axis=1)[:, k]
        return cls(points, radii)

    def holds(self, features: NDArray[np.floating]) -> NDArray[np.bool_]:
        """bool [m]: which of features [m, F] lie in at least one ball, its surface included."""
        queries = np.asarray(features, dtype=np.float64)
        parts = [
            (_squares(queries[start : start + _PIECE], self.points) <= self.radii).any(axis=1)
            for start in range(0, len(queries), _PIECE)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


def precision_recall(real: Manifold, drawn: Manifold) -> tuple[float, float]:
    """(precision, recall), each 0 to 1."""
    return float(real.holds(drawn.points).mean()), float(drawn.holds(real.points).mean())


def _squares(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared distances [n, m]. What rounding leaves of a distance between equal points is set to 0."""
    x_squares, y_squares = np.square(x).sum(axis=1)[:, None], np.square(y).sum(axis=1)[None]
    found = x_squares + y_squares - 2 * (x @ y.T)
    found[found < 1e-12 * (x_squares + y_squares)] = 0.0
    return found
