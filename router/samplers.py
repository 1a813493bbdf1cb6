"""From noise to a sample: solvers that ask for velocities, and noise that belongs to one picture.

A velocity is any function (x [B, ...], t [B]) -> [B, ...] with v = eps - x_0 and t = 1 at noise, so one step of a
solver moves from t to a smaller t. A solver is a generator, written once: it yields the points where it wants to know
the velocity and is sent the answers. `euler`, `heun` and `dpm_solver` ask a function for a whole batch at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from paris_swarm.dht_schemas.digest import blake3_hex

Velocity = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Query:
    """Where a solver asks for the velocity: x [B, ...] at time t, in its step number `step` (from 0)."""

    x: Tensor
    t: float
    step: int


Queries = Generator[Query, Tensor, Tensor]
"""Yields queries from t = 1 downwards, is sent the velocity [B, ...] at each, returns the samples [B, ...]."""


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


def euler_queries(noise: Tensor, steps: int) -> Queries:
    """Euler's method: one velocity a step."""
    x = noise
    for step, (now, then) in enumerate(itertools.pairwise(times(steps).tolist())):
        v = yield Query(x, now, step)  # [B, ...]
        x = x + (then - now) * v  # [B, ...]
    return x


def heun_queries(noise: Tensor, steps: int) -> Queries:
    """Heun's method, of second order: two velocities a step, one in the last (EDM, arXiv 2206.00364, algorithm 1)."""
    x = noise
    for step, (now, then) in enumerate(itertools.pairwise(times(steps).tolist())):
        first = yield Query(x, now, step)  # [B, ...]
        ahead = x + (then - now) * first  # [B, ...]
        if then > 0:
            second = yield Query(ahead, then, step)  # [B, ...]
            x = x + (then - now) / 2 * (first + second)  # [B, ...]
        else:
            x = ahead  # at t = 0 there is nothing left to correct
    return x


def dpm_solver_queries(noise: Tensor, steps: int) -> Queries:
    """DPM-Solver++(2M) by diffusers' scheduler: second order from one velocity a step (arXiv 2211.01095).

    Its grid starts at t = 0.999, where the scheduler's noise schedule ends. Raises ValueError where diffusers is not
    installed (extra `diffusers`).
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
        v = yield Query(x, float(scheduler.sigmas[step]), step)  # [B, ...]
        x = scheduler.step(v, timestep, x, return_dict=False)[0]  # [B, ...]
    return x


@dataclass(frozen=True)
class Solver:
    """A `Sampler` that can also be asked query by query (`queries`), so that each picture may go at its own pace."""

    queries: Callable[[Tensor, int], Queries]

    def __call__(self, velocity: Velocity, noise: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
        queries = self.queries(noise, steps)
        query = next(queries)
        while True:
            t = torch.full((len(noise),), query.t, dtype=noise.dtype, device=noise.device)  # [B]
            try:
                following = queries.send(velocity(query.x, t))
            except StopIteration as end:
                following = None
                x: Tensor = end.value  # [B, ...]
            if on_step is not None and (following is None or following.step > query.step):
                on_step(query.step + 1, steps)
            if following is None:
                return x
            query = following


euler = Solver(euler_queries)
heun = Solver(heun_queries)
dpm_solver = Solver(dpm_solver_queries)
SAMPLERS: dict[str, Solver] = {"euler": euler, "heun": heun, "dpm++": dpm_solver}


def named_sampler(name: str) -> Solver:
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
