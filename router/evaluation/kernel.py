"""Kernel distance of two sets of features (KID: Binkowski et al. 2018, arXiv 1801.01401, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCKS = 32
BLOCK_ROWS = 256


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over blocks. Unbiased: 0 on average for equal distributions, so it may be below 0."""

    mean: float
    deviation: float


def squared_mmd(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Unbiased squared maximum mean discrepancy of features [n, F] and [m, F] with k(x, y) = (x.y / F + 1)^3.

    Raises:
        ValueError: fewer than 2 rows on a side, or widths that differ.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"two sets [n, F] of 2 rows or more are needed, got {list(a.shape)} and {list(b.shape)}")
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    n, m = len(x), len(y)
    within_x, within_y, between = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    own = (within_x.sum() - np.trace(within_x)) / (n * (n - 1)) + (within_y.sum() - np.trace(within_y)) / (m * (m - 1))
    return float(own - 2 * between.mean())


def kernel_distance(
    a: NDArray[np.floating],
    b: NDArray[np.floating],
    *,
    blocks: int = BLOCKS,
    rows: int = BLOCK_ROWS,
    seed: int = 0,
) -> KernelDistance:
    """`squared_mmd` of `blocks` pairs of random blocks, each of at most `rows` rows of either side.

    Raises:
        ValueError: as `squared_mmd`; fewer than 1 block or 2 rows.
    """
    if blocks < 1 or rows < 2:
        raise ValueError(f"at least 1 block of 2 rows is needed, got {blocks} of {rows}")
    dice = np.random.Generator(np.random.PCG64(seed))
    found = [squared_mmd(a[dice.permutation(len(a))[:rows]], b[dice.permutation(len(b))[:rows]]) for _ in range(blocks)]
    return KernelDistance(float(np.mean(found)), float(np.std(found)))


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, F], [m, F] -> [n, m]."""
    values: NDArray[np.float64] = (x @ y.T / x.shape[1] + 1) ** 3
    return values
