"""From noise to a sample: free functions of a velocity, and noise that belongs to one picture.

A velocity is any function (x [B, ...], t [B]) -> [B, ...] with v = eps - x_0 and t = 1 at noise, so one step of a
solver moves from t to a smaller t.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from paris_swarm.dht_schemas.digest import blake3_hex

Velocity = Callable[[Tensor, Tensor], Tensor]


def times(steps: int) -> Tensor:
    """The grid of a solver: float64 [steps + 1], evenly from 1 (noise) to 0 (data).

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, got {steps}")
    return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)


def euler(velocity: Velocity, noise: Tensor, steps: int, on_step: Callable[[int, int], None] | None = None) -> Tensor:
    """Integrates dx/dt = v(x, t) from t = 1 to t = 0 by Euler's method: noise [B, ...] -> samples [B, ...].

    `on_step` is told (steps done, steps) after each step.

    Raises:
        ValueError: fewer than one step.
    """
    grid = times(steps).tolist()
    x = noise
    for step, (now, then) in enumerate(itertools.pairwise(grid)):
        t = torch.full((x.shape[0],), now, dtype=x.dtype, device=x.device)  # [B]
        x = x + (then - now) * velocity(x, t)  # [B, ...]
        if on_step is not None:
            on_step(step + 1, steps)
    return x


def picture_noise(seed: int, indices: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Starting noise, float32 [len(indices), *shape] on the CPU; row i depends on (seed, indices[i]) alone.

    So a picture is the same in whatever batch, and on whatever device, it is drawn.
    """
    rows = []
    for index in indices:
        generator = torch.Generator().manual_seed(_mixed(seed, index))
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows)


def _mixed(seed: int, index: int) -> int:
    # Hashed, so that neighbouring seeds and indices share no generator state; 63 bits fit torch's seed.
    return int(blake3_hex(f"paris-swarm picture {seed} {index}".encode())[:16], 16) >> 1
