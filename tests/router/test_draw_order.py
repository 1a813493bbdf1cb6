"""Which pictures are drawn together when few experts fit in memory: fewer loads, the same pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from paris_swarm.router.draw import draw, in_order, of_few_loads
from paris_swarm.router.ensemble import Ensemble, NullText

K = 6


class Pull(nn.Module):
    """An expert of ten bytes that draws towards its own number."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.full((10,), k, dtype=torch.uint8))

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
    for budget, batch in ((20, 24), (20, 5), (0, 24)):
        again, same, _ = drawn(router, budget, strategy=strategy, batch=batch)
        np.testing.assert_allclose(again.astype(int), images.astype(int), atol=1)
        np.testing.assert_allclose(same, weights, atol=1e-6)


def test_pictures_that_stay_with_an_expert_load_it_once() -> None:
    assert drawn(settled, 20)[2] <= K + 1  # in plain order: 6 at the first step, 4 at each of the nine others
    assert drawn(settled, None)[2] == K


def test_pictures_that_do_not_stay_cost_at_most_one_group_more() -> None:
    plain_order = K + 9 * (K - 2)
    assert drawn(restless, 20)[2] <= 2 * plain_order


@given(
    st.lists(st.frozensets(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(1, 20),
    st.integers(1, 4),
)
def test_every_picture_is_drawn_once(experts: list[frozenset[int]], batch: int, steps: int, room: int) -> None:
    batches = of_few_loads(experts, batch, steps, room)
    assert sorted(index for each in batches for index in each) == list(range(len(experts)))
    assert max(len(each) for each in batches) <= batch
    if len(set().union(*experts)) <= room:
        assert batches == in_order(range(len(experts)), batch)
