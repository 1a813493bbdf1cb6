"""Which pictures are drawn together when few experts fit in memory: fewer loads, the same pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from paris_swarm.router.draw import draw
from paris_swarm.router.ensemble import Ensemble, NullText

K = 6


class Pull(nn.Module):
    """An expert of ten kilobytes that draws towards its own number."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.full((10_000,), k, dtype=torch.uint8))

    def forward(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        return x - float(self.weights[0]) / K


def settled(x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """The caption's first number is the expert."""
    return 9.0 * torch.nn.functional.one_hot(states[:, 0, 0].long(), K).float()


def restless(x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """Another expert for every picture at every step."""
    expert = (states[:, 0, 1] + (t * 101).round()).long() % K
    return 9.0 * torch.nn.functional.one_hot(expert, K).float()


def drawn(router: object, budget: int | None, **options: object) -> tuple[np.ndarray, np.ndarray, int]:
    ensemble = Ensemble(
        K,
        {k: (lambda k=k: Pull(k)) for k in range(K)},
        router,  # type: ignore[arg-type]
        NullText(torch.zeros(1, 2), 1),
        memory_budget=budget,
    )
    states = torch.zeros(24, 1, 2)
    states[:, 0, 0] = torch.arange(24) % K
    states[:, 0, 1] = torch.arange(24)
    asked = {"batch": 24, "steps": 10, "guidance": 1.0, **options}
    pictures = draw(ensemble, states, [1] * 24, shape=(1, 2, 2), decode=_bytes, **asked)  # type: ignore[arg-type]
    return pictures.images, pictures.weights, ensemble.resident.loads


def _bytes(x: Tensor) -> Tensor:
    return x.mul(40).add(100).clamp(0, 255).to(torch.uint8).movedim(1, -1)


@pytest.mark.parametrize("strategy", ["top-1", "top-2", "sample", "full"])
@pytest.mark.parametrize("router", [settled, restless])
def test_the_order_of_drawing_changes_no_picture(router: object, strategy: str) -> None:
    images, weights, _ = drawn(router, None, strategy=strategy)
    for budget, batch in ((20_000, 24), (20_000, 5), (0, 24), (100, 5)):
        again, same, _ = drawn(router, budget, strategy=strategy, batch=batch)
        np.testing.assert_allclose(again.astype(int), images.astype(int), atol=1)
        np.testing.assert_allclose(same, weights, atol=1e-6)


@pytest.mark.parametrize("sampler", ["heun", "dpm++"])
def test_every_sampler_draws_the_same_at_its_own_pace(sampler: str) -> None:
    if sampler == "dpm++":
        pytest.importorskip("diffusers")
    images, weights, _ = drawn(wandering, None, sampler=sampler, strategy="top-2")
    again, same, loads = drawn(wandering, 20_000, sampler=sampler, strategy="top-2", batch=7)
    np.testing.assert_allclose(again.astype(int), images.astype(int), atol=1)
    np.testing.assert_allclose(same, weights, atol=1e-6)
    assert loads > K


def test_pictures_that_stay_with_an_expert_load_it_once() -> None:
    assert drawn(settled, 20_000)[2] == K  # in step: 6 at the first step, 4 at each of the nine others
    assert drawn(settled, 20_000, batch=4)[2] == K  # however few go through an expert at once
    assert drawn(settled, None)[2] == K


def wandering(x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """Now and then another expert, each picture at steps of its own."""
    expert = (states[:, 0, 1] + (t * (3 + states[:, 0, 1] % 4)).floor()).long() % K
    return 9.0 * torch.nn.functional.one_hot(expert, K).float()


@pytest.mark.parametrize("router", [restless, wandering])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_pictures_that_do_not_stay_load_no_more_than_a_batch_in_step(router: object, sampler: str) -> None:
    points = 10 if sampler == "euler" else 19
    assert drawn(router, 20_000, sampler=sampler)[2] <= K + (points - 1) * (K - 2)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_loads_are_bounded_whatever_the_router_says(
    data: st.DataObject, count: int, steps: int, room: int, kept: int, batch: int
) -> None:
    """At every point at most K - room are loaded, besides those that fill the room; and no picture is forgotten."""
    table = torch.tensor(
        data.draw(st.lists(st.permutations(range(K)), min_size=count * steps, max_size=count * steps))
    ).reshape(count, steps, K)

    def router(x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        step = ((1 - t) * steps).round().long()
        return 9.0 * table[states[:, 0, 0].long(), step].float()

    ensemble = Ensemble(
        K,
        {k: (lambda k=k: Pull(k)) for k in range(K)},
        router,
        NullText(torch.zeros(1, 2), 1),
        memory_budget=10_000 * room,
    )
    states = torch.zeros(count, 1, 2)
    states[:, 0, 0] = torch.arange(count)
    told: list[int] = []
    pictures = draw(
        ensemble,
        states,
        [1] * count,
        shape=(1, 2, 2),
        steps=steps,
        strategy=f"top-{kept}",
        guidance=1.0,
        batch=batch,
        on_step=lambda done: told.append(done.step),
        decode=_bytes,
    )
    likeliest = table.argsort(dim=2, descending=True)[:, :, :kept].sort(dim=2).values  # [count, steps, kept]
    used = torch.from_numpy(pictures.weights).nonzero().reshape(count, steps, kept, 3)[..., 2]
    assert torch.equal(used, likeliest)
    assert ensemble.resident.loads <= room + steps * max(K - room, 0)
    assert told == list(range(1, steps + 1))


def test_a_solver_of_ones_own_is_drawn_in_step() -> None:
    asked: list[int] = []

    def one_step(velocity: Any, noise: Tensor, steps: int, on_step: Any = None) -> Tensor:
        x = noise - velocity(noise, torch.ones(len(noise)))
        asked.append(len(noise))
        on_step(1, steps)
        return x

    for budget in (None, 20_000):
        drawn(settled, budget, sampler=one_step, steps=1, batch=10)
    assert asked == [10, 10, 4] * 2


@pytest.mark.parametrize("guidance", [float("inf"), float("nan"), -1.0])
def test_a_guidance_that_no_picture_can_have_is_refused(guidance: float) -> None:
    with pytest.raises(ValueError, match="guidance must be a number"):
        drawn(settled, None, guidance=guidance)
