"""A seed is one picture: whatever the batch, the number of pictures, or how experts are numbered and listed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paris_swarm.router.draw import Pictures, draw
from paris_swarm.router.ensemble import Ensemble, Network, NullText

K, TOKENS, DIM, SIDE, STEPS = 4, 3, 6, 4, 5
STRATEGIES = ["top-1", "top-2", "top-3", "full", "threshold-0.2", "sample", "nucleus-0.8", "adaptive", "oracle"]
PROMPTS = 3


def expert(k: int) -> Network:
    """A flow to a picture of its own, bent by the caption."""
    dice = torch.Generator().manual_seed(100 + k)
    goal = torch.rand(1, 3, SIDE, SIDE, generator=dice) - 0.5
    bend = 0.1 * torch.randn(DIM, generator=dice)

    def velocity(x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        told = ((states * mask[..., None]).sum(1) @ bend)[:, None, None, None]
        return (x - goal - told) / (t[:, None, None, None] + 0.2)

    return velocity


def router(order: list[int]) -> Network:
    """Logits from picture, time and caption; place j answers for expert order[j]."""
    dice = torch.Generator().manual_seed(7)
    look, read = torch.randn(3 * SIDE * SIDE, K, generator=dice), torch.randn(DIM, K, generator=dice)

    def logits(x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        seen = x.flatten(1) @ look * (1 - t[:, None]) + (states * mask[..., None]).sum(1) @ read
        return (0.5 * seen)[:, order]

    return logits


def drawn(
    strategy: str, *, order: list[int], batch: int, n: int, sampler: str = "euler", guidance: float = 1.5, seed: int = 3
) -> Pictures:
    dice = torch.Generator().manual_seed(1)
    states = torch.randn(PROMPTS, TOKENS, DIM, generator=dice)
    loaders: dict[int, Callable[[], Network]] = {
        j: (lambda k=k: expert(k))
        for j, k in reversed(list(enumerate(order)))  # type: ignore[misc]
    }
    null = NullText(torch.zeros(TOKENS, DIM), 1)
    return draw(
        Ensemble(K, loaders, router(order), null),
        states,
        [3, 2, 1],
        shape=(3, SIDE, SIDE),
        n=n,
        strategy=strategy,
        sampler=sampler,
        steps=STEPS,
        guidance=guidance,
        seed=seed,
        batch=batch,
        labels=[order.index(k) for k in (2, 0, 3)],
    )


def assert_same(one: Pictures, other: Pictures, order: list[int]) -> None:
    """The same pictures, and the same weights once the experts of `other` have their plain numbers again."""
    assert np.abs(one.images.astype(int) - other.images.astype(int)).max() <= 1
    plain = np.empty_like(other.weights)
    plain[..., order] = other.weights
    np.testing.assert_allclose(plain, one.weights, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(STRATEGIES),
    st.permutations(range(K)),
    st.integers(1, 7),
    st.sampled_from(["euler", "heun"]),
    st.sampled_from([0.0, 1.0, 2.5]),
)
def test_neither_batches_nor_the_order_of_experts_show_in_a_picture(
    strategy: str, order: list[int], batch: int, sampler: str, guidance: float
) -> None:
    plain = drawn(strategy, order=list(range(K)), batch=64, n=2, sampler=sampler, guidance=guidance)
    other = drawn(strategy, order=list(order), batch=batch, n=2, sampler=sampler, guidance=guidance)
    assert_same(plain, other, list(order))


def test_another_seed_is_another_picture() -> None:
    one, other = (drawn("top-1", order=list(range(K)), batch=8, n=1, seed=seed) for seed in (3, 4))
    assert (one.images != other.images).any()


def test_strategies_are_not_all_the_same_here() -> None:
    """Else the law above would say nothing about them."""
    kept = {name: drawn(name, order=list(range(K)), batch=8, n=2).weights for name in STRATEGIES}
    names = [(a, b) for a in STRATEGIES for b in STRATEGIES if a < b]
    assert all(np.abs(kept[a] - kept[b]).max() > 1e-3 for a, b in names)
    assert len(np.unique((kept["adaptive"] > 0).sum(-1))) > 1, "k changes from step to step"
