"""What an expert's last layer predicts, on which noise path, and how that becomes one velocity.

Every expert, whatever it was trained on, is called as v(x_t, t) on the shared path x_t = (1 - t) x_0 + t eps: the idea
of k-diffusion's model wrappers, and what lets experts of different objectives be combined (Heterogeneous Decentralized
Diffusion Models, arXiv 2603.06741). An expert on another path sees the point of its own path that has the same
signal-to-noise ratio, rescaled: the two differ by a factor only, so nothing is lost on the way.

Shapes: B batch, any shape after it. Times float [B] in 0..1; 0 is data, 1 is noise, on either path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_T = 0.05
"""Below this t a "data" output is divided by this instead of by t, which keeps velocities bounded near the data."""
SMALLEST_SIGNAL = 0.01
"""A "noise" output is divided by the signal's share, which is kept above this (HDDM, arXiv 2603.06741)."""
DATA_STD = 0.6
"""Standard deviation of the data that a "residual" output assumes."""
COSINE_OFFSET = 0.008
"""Offset of the cosine schedule near the data (Improved DDPM, arXiv 2102.09672, section 3.2)."""


@dataclass(frozen=True)
class Point:
    """A place on a path: x = signal * x_0 + sigma * eps, seen at time `u` of that path. All but x are [B, 1, ...]."""

    x: Tensor
    u: Tensor
    signal: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class Objective:
    """output: what the last layer says; path: "flow" (straight) or "cosine" (DDPM's cosine schedule, continuous).

    data_limit: data read out of a "noise" output is clamped to plus and minus this, for near t = 1 it is a small
    difference of large numbers, divided by a small one. Which go together is `recipe.ModelConfig`'s to check.
    """

    output: str = "velocity"
    path: str = "flow"
    data_limit: float = 20.0

    def noised(self, x0: Tensor, noise: Tensor, u: Tensor) -> Point:
        """The training example at time u [B] of this path: x0 and noise [B, ...]."""
        signal, sigma = self.coefficients(_column(u, x0))
        if self.path == "flow":
            return Point(torch.lerp(x0, noise, sigma), u, signal, sigma)
        return Point(signal * x0 + sigma * noise, u, signal, sigma)

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, sigma) at time u of this path, any shape."""
        if self.path == "flow":
            return 1 - u, u
        start = math.cos(_angle(0.0))
        signal = (torch.cos((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * (math.pi / 2)) / start).clamp(0, 1)
        return signal, (1 - signal.square()).clamp_min(0).sqrt()

    def locate(self, x: Tensor, t: Tensor) -> Point:
        """The point of this path that stands for x_t [B, ...] at time t [B] of the straight path.

        Equal signal-to-noise ratio: x is multiplied so that signal and noise keep their proportion.
        """
        column = _column(t, x)
        if self.path == "flow":
            return Point(x, t, 1 - column, column)
        length = ((1 - column).square() + column.square()).sqrt()  # of (1 - t, t); the cosine path's is 1
        signal, sigma = (1 - column) / length, column / length
        # Inverse of `coefficients`: the time at which the schedule has this signal.
        angle = torch.acos((signal * math.cos(_angle(0.0))).clamp(-1, 1))
        u = (angle / (math.pi / 2) * (1 + COSINE_OFFSET) - COSINE_OFFSET).clamp(0, 1)
        return Point(x / length, u.flatten(), signal, sigma)

    def velocity(self, said: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v = eps - x_0 on the straight path at (x_t [B, ...], t [B]) from what the network said of `locate(x, t)`."""
        if self.output == "velocity":
            return said
        column = _column(t, x)
        if self.output == "data":
            return (x - said) / column.clamp(min=SMALLEST_T)
        if self.output == "residual":
            variance = DATA_STD**2
            total = (1 - column).square() * variance + column.square()  # the variance of x_t
            keep = (column - (1 - column) * variance) / total  # the best linear guess of v from x_t alone
            return keep * x - (DATA_STD * total.rsqrt()) * said
        data = (x - column * said) / (1 - column).clamp(min=SMALLEST_SIGNAL)
        return said - data.clamp(-self.data_limit, self.data_limit)

    def loss(self, said: Tensor, point: Point, x0: Tensor, noise: Tensor, kind: str) -> Tensor:
        """Mean squared error of what was said at `point`, measured in the data, the noise or the velocity: a scalar.

        Raises:
            ValueError: "velocity" asked of the cosine path, on which it is not defined.
        """
        return self.losses(said, point, x0, noise, kind).mean()

    def losses(self, said: Tensor, point: Point, x0: Tensor, noise: Tensor, kind: str) -> Tensor:
        """`loss` of each row by itself: float32 [B]."""
        return self._error(said.float(), point, x0, noise, kind).square().flatten(1).mean(1)

    def _error(self, said: Tensor, point: Point, x0: Tensor, noise: Tensor, kind: str) -> Tensor:
        if self.path == "flow" and kind == "velocity":
            return self.velocity(said, point.x, point.u) - (noise - x0)
        if kind == "velocity":
            raise ValueError('train.loss "velocity" needs model.path "flow"')
        if kind == self.output:
            return said - (x0 if kind == "data" else noise)
        if self.output in ("velocity", "residual"):
            velocity = self.velocity(said, point.x, point.u)
            if kind == "data":
                return point.x - point.sigma * velocity - x0
            return point.x + point.signal * velocity - noise
        if kind == "data":  # from a noise output
            return (point.x - point.sigma * said) / point.signal.clamp(min=SMALLEST_SIGNAL) - x0
        return (point.x - point.signal * said) / point.sigma.clamp(min=SMALLEST_T) - noise


def _angle(u: float) -> float:
    return (u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * (math.pi / 2)


def _column(t: Tensor, like: Tensor) -> Tensor:
    """t [B] with ones appended until it broadcasts against `like` [B, ...]."""
    return t.reshape(-1, *([1] * (like.ndim - 1)))
