"""Frechet distance of two Gaussians fitted to features (FID: Heusel et al. 2017, arXiv 1706.08500, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Gaussian:
    """mean float64 [F]; root float64 [r, F] with covariance = root^T root, so that few features make a small root."""

    mean: NDArray[np.float64]
    root: NDArray[np.float64]

    @classmethod
    def fit(cls, features: NDArray[np.floating]) -> Gaussian:
        """Mean and unbiased covariance of features [n, F].

        Raises:
            ValueError: fewer than 2 rows, or a number that is not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"a Gaussian needs features [n, F] with n of 2 or more, got {list(features.shape)}")
        rows = np.asarray(features, dtype=np.float64)
        if not np.isfinite(rows).all():
            raise ValueError("a Gaussian cannot be fitted to features that are not finite")
        mean = rows.mean(axis=0)
        centred = (rows - mean) / np.sqrt(len(rows) - 1)  # [n, F]
        if len(rows) <= rows.shape[1]:
            return cls(mean, centred)
        return cls.of(mean, centred.T @ centred)

    @classmethod
    def of(cls, mean: NDArray[np.float64], covariance: NDArray[np.float64]) -> Gaussian:
        """From mean [F] and symmetric covariance [F, F]; eigenvalues below 0 are rounding and count as 0."""
        values, vectors = np.linalg.eigh(covariance)
        return cls(np.asarray(mean, dtype=np.float64), np.sqrt(values.clip(min=0))[:, None] * vectors.T)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in float64; 0 or above, biased upwards for few rows.

    The trace of the root is the sum of the roots of the eigenvalues of R_a C_b R_a^T (R_a the smaller root), symmetric
    and with the same non-zero eigenvalues as C_a C_b: no root of an unsymmetric matrix, and no complex rounding.

    Raises:
        ValueError: features of two widths.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} numbers cannot be compared")
    small, large = (a.root, b.root) if len(a.root) <= len(b.root) else (b.root, a.root)
    between = large @ small.T  # [R, r]
    shared = np.sqrt(np.linalg.eigvalsh(between.T @ between).clip(min=0)).sum()
    apart = np.square(a.mean - b.mean).sum()
    return float(max(0.0, apart + np.square(a.root).sum() + np.square(b.root).sum() - 2 * shared))
