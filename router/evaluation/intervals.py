"""A figure over seeds: its mean and the 95 % interval of that mean (Student's t)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# 0.975 quantiles of Student's t for 1 to 30 degrees of freedom; above that the normal quantile is within 4 %.
_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """mean of `count` values; `half` the half width of its 95 % interval, None for a single value."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Raises ValueError: no values, or one that is not finite."""
        count = len(values)
        if not count or not all(math.isfinite(value) for value in values):
            raise ValueError(f"an interval needs finite values, got {list(values)[:8]}")
        mean = sum(values) / count
        if count == 1:
            return cls(mean, None, 1)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
        quantile = _QUANTILES[count - 2] if count - 2 < len(_QUANTILES) else 1.96
        return cls(mean, quantile * spread / math.sqrt(count), count)

    def text(self, digits: int) -> str:
        """ "12.3 ± 0.4", or "12.3" for a single value."""
        return f"{self.mean:.{digits}f}" + ("" if self.half is None else f" ± {self.half:.{digits}f}")
