"""Experts under a memory budget: what is loaded, what goes, and that pictures do not change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from paris_swarm.router.ensemble import Ensemble, NullText
from paris_swarm.router.resident import Resident, weight_bytes


def counted(sizes: dict[int, int], budget: int | None) -> tuple[Resident[int], list[int]]:
    loaded: list[int] = []

    def loader(k: int) -> int:
        loaded.append(k)
        return sizes[k]

    return Resident({k: (lambda k=k: loader(k)) for k in sizes}, budget, size=lambda size: size), loaded


def test_the_least_recently_used_goes_first() -> None:
    held, loaded = counted({0: 10, 1: 10, 2: 10}, 20)
    for k in (0, 1, 0, 2, 0, 1):
        held.get(k)
    assert loaded == [0, 1, 2, 1]
    assert held.held_bytes == 20


def test_without_a_budget_each_is_loaded_once() -> None:
    held, loaded = counted({0: 10, 1: 10}, None)
    for k in (0, 1, 1, 0):
        held.get(k)
    assert loaded == [0, 1]


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=6),
    st.integers(0, 120),
    st.lists(st.integers(0, 5), max_size=40),
)
def test_memory_stays_within_the_budget_or_one_expert(sizes: list[int], budget: int, asked: list[int]) -> None:
    held, _ = counted(dict(enumerate(sizes)), budget)
    for k in asked:
        if k < len(sizes):
            assert held.get(k) == sizes[k]
            assert held.held_bytes <= max(budget, sizes[k])


def test_a_step_uses_what_is_in_memory_before_it_loads_more() -> None:
    held, loaded = counted(dict.fromkeys(range(4), 10), 20)
    for _ in range(5):  # five steps that all need all four
        for k in held.in_order(range(4)):
            held.get(k)
    assert len(loaded) == 4 + 4 * 2  # two of four stay from step to step; in plain order all four would go each time


def test_room_is_made_before_an_expert_is_loaded() -> None:
    memory: list[int] = []  # bytes held at each loading
    held: list[Resident[int]] = []

    def loader() -> int:
        memory.append(held[0].held_bytes)
        return 10

    held.append(Resident(dict.fromkeys(range(4), loader), 20, size=lambda size: size))
    for k in range(4):
        held[0].get(k)
    assert memory == [0, 10, 10, 10]


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        counted({0: 1}, -1)


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((1000,), value))

    def forward(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        return x * self.value[0]


@pytest.mark.parametrize("strategy", ["top-1", "top-2", "full"])
def test_velocities_do_not_depend_on_the_budget(strategy: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x, t = torch.randn(12, 2, generator=draw), torch.rand(12, generator=draw)
    states, mask = torch.zeros(12, 1, 1), torch.ones(12, 1, dtype=torch.bool)
    table = torch.randn(12, 4, generator=draw)

    def build(budget: int | None) -> Ensemble:
        loaders = {k: (lambda k=k: Constant(k + 1.0)) for k in range(4)}
        return Ensemble(4, loaders, lambda *_: table, NullText(torch.zeros(1, 1), 1), memory_budget=budget)

    assert weight_bytes(Constant(1.0)) == 4000
    free, tight = build(None), build(8000)
    for _ in range(3):
        got = [e.velocity(x, t, states, mask, e.route(x, t, states, mask, strategy=strategy)) for e in (free, tight)]
        torch.testing.assert_close(got[0], got[1])
    assert tight.resident.held_bytes <= 8000
    assert tight.resident.loads > free.resident.loads == 4
