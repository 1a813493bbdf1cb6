"""From noise to a sample: free functions of a velocity, and noise that belongs to one picture.

A velocity is any function (x [B, ...], t [B]) -> [B, ...] with v = eps - x_0 and t = 1 at noise, so one step of a
solver moves from t to a smaller t.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from paris_swarm.dht_schemas.digest import blake3_hex

Velocity = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, int], None]


class Sampler(Protocol):
    """A solver of dx/dt = v(x, t) from t = 1 to t = 0: noise [B, ...] -> samples [B, ...].

    `on_step` is told (steps done, steps) after each step; the velocity is asked at least once a step, first of all at
    the step's own t. Raises ValueError for fewer than one step.
    """

    def __call__(self, velocity: Velocity, noise: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor: ...


def times(steps: int) -> Tensor:
    """The grid of a solver: float64 [steps + 1], evenly from 1 (noise) to 0 (data).

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, got {steps}")
    return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)


def euler(velocity: Velocity, noise: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
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


def heun(velocity: Velocity, noise: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
    """Heun's method, of second order: two velocities a step, one in the last (EDM, arXiv 2206.00364, algorithm 1).

    noise [B, ...] -> samples [B, ...]. Raises ValueError for fewer than one step.
    """
    grid = times(steps).tolist()
    x = noise
    for step, (now, then) in enumerate(itertools.pairwise(grid)):
        t = torch.full((x.shape[0],), now, dtype=x.dtype, device=x.device)  # [B]
        first = velocity(x, t)  # [B, ...]
        ahead = x + (then - now) * first  # [B, ...]
        if then > 0:
            x = x + (then - now) / 2 * (first + velocity(ahead, torch.full_like(t, then)))  # [B, ...]
        else:
            x = ahead  # at t = 0 there is nothing left to correct
        if on_step is not None:
            on_step(step + 1, steps)
    return x


def dpm_solver(velocity: Velocity, noise: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
    """DPM-Solver++(2M) by diffusers' scheduler: second order from one velocity a step (arXiv 2211.01095).

    noise [B, ...] -> samples [B, ...]. Its grid starts at t = 0.999, where the scheduler's noise schedule ends.

    Raises:
        ValueError: fewer than one step, or diffusers is not installed (extra `diffusers`).
    """
    times(steps)
    try:
        from diffusers import DPMSolverMultistepScheduler
    except ImportError as error:
        raise ValueError(
            "the sampler dpm++ uses diffusers: pip install 'paris-swarm[diffusers]', or choose euler or heun"
        ) from error
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(steps)
    x = noise
    for step, timestep in enumerate(scheduler.timesteps):
        t = torch.full((x.shape[0],), float(scheduler.sigmas[step]), dtype=x.dtype, device=x.device)  # [B]
        x = scheduler.step(velocity(x, t), timestep, x, return_dict=False)[0]  # [B, ...]
        if on_step is not None:
            on_step(step + 1, steps)
    return x


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "dpm++": dpm_solver}


def named_sampler(name: str) -> Sampler:
    """The sampler called `name`. Raises ValueError, naming those there are."""
    if name not in SAMPLERS:
        raise ValueError(f"the sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    return SAMPLERS[name]


def picture_noise(seed: int, indices: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Starting noise, float32 [len(indices), *shape] on the CPU; row i depends on (seed, indices[i]) alone.

    So a picture is the same in whatever batch, and on whatever device, it is drawn.
    """
    rows = []
    for index in indices:
        generator = torch.Generator().manual_seed(_mixed(seed, index))
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows)


def picture_draws(seed: int, indices: Iterable[int], steps: int) -> Tensor:
    """Uniform numbers in 0..1, float64 [len(indices), steps]; row i depends on (seed, indices[i]) alone.

    For strategies that draw an expert at every step; independent of the picture's starting noise.
    """
    rows = []
    for index in indices:
        generator = torch.Generator().manual_seed(_mixed(seed, index, "draws"))
        rows.append(torch.rand(steps, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def _mixed(seed: int, index: int, what: str = "picture") -> int:
    # Hashed, so that neighbouring seeds and indices share no generator state; 63 bits fit torch's seed.
    return int(blake3_hex(f"paris-swarm {what} {seed} {index}".encode())[:16], 16) >> 1
