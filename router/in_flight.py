"""Pictures on their way from noise to data: all in step with each other, or each at its own pace to spare loadings.

Where only some experts fit in memory, a batch in step loads what its pictures need anew at every step. At its own pace
a picture goes on as long as its expert is in memory, and waits while others are drawn: pictures that stay with their
experts load each once, and pictures that change them load no more than a batch in step does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paris_swarm.router.ensemble import Decision, Ensemble
from paris_swarm.router.samplers import Queries, Query, Sampler, Solver


@dataclass(frozen=True)
class Flight:
    """B pictures to be drawn. noise [B, C, H, W]; states [P, L, D] and mask [P, L] of the prompts, prompts int64 [B]:
    each picture's; draws [B, steps] and labels [B] where the strategy needs them; guidance as `Ensemble.velocity`'s.
    """

    noise: Tensor
    states: Tensor
    mask: Tensor
    prompts: Tensor
    steps: int
    strategy: str
    guidance: float
    draws: Tensor | None = None
    labels: Tensor | None = None

    def captions(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """States [b, L, D] and mask [b, L] of these pictures."""
        prompts = self.prompts.index_select(0, rows)
        return self.states.index_select(0, prompts), self.mask.index_select(0, prompts)

    def route(self, ensemble: Ensemble, rows: Tensor, x: Tensor, t: Tensor, step: Tensor) -> Decision:
        """The decision for pictures `rows` [b] at x [b, C, H, W], t [b], each in its step number `step` [b]."""
        draws = None if self.draws is None else self.draws[rows, step]  # [b], one number a step, however often asked
        labels = None if self.labels is None else self.labels.index_select(0, rows)
        return ensemble.route(x, t, *self.captions(rows), strategy=self.strategy, draws=draws, labels=labels)


@dataclass(frozen=True)
class Landed:
    """x [B, C, H, W]; weights [B, steps, K], of the decision at each step's own t; redirected [B], its mean."""

    x: Tensor
    weights: Tensor
    redirected: Tensor


def in_step(ensemble: Ensemble, flight: Flight, sampler: Sampler, on_step: Callable[[int], None]) -> Landed:
    """All pictures at once, a decision and a velocity of the whole batch at every point; `on_step` hears steps done."""
    everyone = torch.arange(len(flight.noise), device=flight.noise.device)
    states, mask = flight.captions(everyone)
    asked: list[Decision] = []
    kept: list[Decision] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        asked.append(flight.route(ensemble, everyone, x, t, torch.full_like(everyone, len(kept))))
        return ensemble.velocity(x, t, states, mask, asked[-1], guidance=flight.guidance)  # [B, C, H, W]

    def report(step: int, _: int) -> None:
        kept.append(asked[0])  # the decision at the step's own t
        asked.clear()
        on_step(step)

    x = sampler(velocity, flight.noise, flight.steps, report)  # [B, C, H, W]
    weights = torch.stack([each.weights for each in kept], dim=1)  # [B, steps, K]
    return Landed(x, weights, torch.stack([each.redirected for each in kept], dim=1).mean(dim=1))


@dataclass
class _Picture:
    """One picture under way: where it is, and which experts have still to answer there.

    asked: points left behind; kept: the last step whose decision is kept.
    """

    queries: Queries
    at: Query
    asked: int = 0
    kept: int = -1
    weights: dict[int, float] = field(default_factory=dict)
    velocity: Tensor | None = None
    done: Tensor | None = None

    def hear(self, k: int, velocity: Tensor) -> None:
        """Expert k's velocity [1, C, H, W]; goes on to the next point once all have answered."""
        part = velocity.to(self.at.x.dtype) * self.weights.pop(k)
        self.velocity = part if self.velocity is None else self.velocity + part
        if not self.weights:
            whole, self.velocity, self.asked = self.velocity, None, self.asked + 1
            try:
                self.at = self.queries.send(whole)
            except StopIteration as end:
                self.done = end.value


def at_own_pace(
    ensemble: Ensemble, flight: Flight, solver: Solver, batch: int, on_step: Callable[[int], None]
) -> Landed:
    """Each picture as far as it gets with the experts in memory; at most `batch` go through an expert at once.

    An expert is loaded only when no picture waits for one that is here, and then one that the pictures furthest behind
    wait for. So at every point of the solver at most K less the experts that fit are loaded, as for a batch in step;
    `on_step` hears the mean number of steps done, rounded down.
    """
    count, device = len(flight.noise), flight.noise.device
    pictures: list[_Picture] = []
    for row in range(count):
        queries = solver.queries(flight.noise[row : row + 1], flight.steps)
        pictures.append(_Picture(queries, next(queries)))
    weights = torch.zeros(count, flight.steps, ensemble.clusters)
    redirected = torch.zeros(count, flight.steps)
    waiting: dict[int, list[int]] = {}
    told = 0

    def gathered(rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.cat([pictures[row].at.x for row in rows])  # [b, C, H, W]
        t = torch.tensor([pictures[row].at.t for row in rows], dtype=x.dtype, device=device)  # [b]
        return torch.tensor(rows, device=device), x, t

    def send(rows: Sequence[int]) -> None:
        """Routes pictures that are at a new point to the experts they wait for there."""
        places, x, t = gathered(rows)
        steps = [pictures[row].at.step for row in rows]
        decision = flight.route(ensemble, places, x, t, torch.tensor(steps, device=device))
        lost = decision.redirected.tolist()
        for row, step, each, share in zip(rows, steps, decision.weights.cpu(), lost, strict=True):
            pictures[row].weights = {k: float(each[k]) for k in torch.nonzero(each).flatten().tolist()}
            for k in pictures[row].weights:
                waiting.setdefault(k, []).append(row)
            if step > pictures[row].kept:  # the decision at the step's own t
                pictures[row].kept = step
                weights[row, step], redirected[row, step] = each.float(), share

    for part in _parts(range(count), batch):
        send(part)
    while waiting:
        k = _next_expert(ensemble, pictures, waiting)
        moved: list[int] = []
        for part in _parts(waiting.pop(k), batch):
            places, x, t = gathered(part)
            velocity = ensemble.guided(k, x, t, *flight.captions(places), flight.guidance)  # [b, C, H, W]
            for row, own in zip(part, velocity.split(1), strict=True):
                pictures[row].hear(k, own)
            moved += [row for row in part if not pictures[row].weights and pictures[row].done is None]
        for part in _parts(moved, batch):
            send(part)
        steps_done = sum(flight.steps if each.done is not None else each.at.step for each in pictures) // count
        for step in range(told + 1, steps_done + 1):
            on_step(step)
        told = steps_done
    x = torch.cat([each.done for each in pictures if each.done is not None])  # [B, C, H, W]
    return Landed(x, weights, redirected.mean(dim=1))


def _next_expert(ensemble: Ensemble, pictures: Sequence[_Picture], waiting: Mapping[int, Sequence[int]]) -> int:
    """Of those in memory, else of those that the pictures furthest behind wait for, the one most pictures wait for."""
    wanted = [k for k in waiting if ensemble.resident.holds(k)]
    if not wanted:
        furthest = min(pictures[row].asked for rows in waiting.values() for row in rows)
        wanted = [k for k, rows in waiting.items() if any(pictures[row].asked == furthest for row in rows)]
    return max(wanted, key=lambda k: (len(waiting[k]), -k))


def _parts(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
