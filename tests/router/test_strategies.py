"""Every strategy of the papers' tables: what it keeps, what it weighs, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_swarm.router.strategies import Strategy

POSTERIOR = torch.tensor(
    [[0.5, 0.1, 0.3, 0.1], [0.01, 0.97, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64
)
NAMES = ["top-1", "top-2", "top-4", "full", "threshold-0.2", "sample", "nucleus-0.7", "adaptive", "oracle"]


@pytest.mark.parametrize("typed", ["top1", "topk", "threshold", "nucleus", "Full"])
def test_a_name_that_is_none_is_answered_with_names_that_can_be_typed(typed: str) -> None:
    with pytest.raises(ValueError, match=r"top-1, .*as threshold-0\.05.*as nucleus-0\.9"):
        Strategy.parse(typed, None)
    assert Strategy.parse("top-900", None).value == 900


def weights(name: str, posterior: torch.Tensor = POSTERIOR, **kwargs: torch.Tensor) -> torch.Tensor:
    return Strategy.parse(name, posterior.shape[1]).weights(posterior, **kwargs)


def test_threshold_drops_what_is_below_tau_and_always_keeps_the_likeliest() -> None:
    got = weights("threshold-0.3")
    torch.testing.assert_close(got[0], torch.tensor([0.625, 0, 0.375, 0], dtype=torch.float64))
    assert got[1].tolist() == [0, 1, 0, 0]
    assert (got[2] > 0).sum() == 1


def test_adaptive_uses_as_many_experts_as_there_is_doubt() -> None:
    got = weights("adaptive")
    assert (got > 0).sum(1).tolist() == [3, 1, 4]
    torch.testing.assert_close(got[2], POSTERIOR[2])


def test_sample_draws_experts_in_proportion_to_the_posterior() -> None:
    draws = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    got = weights("sample", POSTERIOR[:1].expand(2000, -1), draws=draws)
    assert set(got.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(got.mean(0), POSTERIOR[0], rtol=0, atol=1e-3)


def test_nucleus_draws_only_among_the_likeliest_that_reach_p() -> None:
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    got = weights("nucleus-0.7", POSTERIOR[:1].expand(1000, -1), draws=draws).mean(0)
    torch.testing.assert_close(got, torch.tensor([0.625, 0, 0.375, 0], dtype=torch.float64), rtol=0, atol=2e-3)


def test_oracle_listens_to_the_label_alone() -> None:
    assert weights("oracle", labels=torch.tensor([3, 0, 1])).argmax(1).tolist() == [3, 0, 1]


@settings(deadline=None)
@given(
    st.sampled_from(NAMES),
    st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=5),
    st.floats(0, 1),
)
def test_weights_sum_to_one_and_never_name_an_expert_without_probability(
    name: str, rows: list[list[float]], draw: float
) -> None:
    raw = torch.tensor(rows, dtype=torch.float64)
    raw[:, 0] += 1e-3
    raw[raw < 1e-9] = 0
    posterior = raw / raw.sum(1, keepdim=True)
    draws = torch.full((len(rows),), draw, dtype=torch.float64)
    got = weights(name, posterior, draws=draws, labels=torch.zeros(len(rows), dtype=torch.int64))
    torch.testing.assert_close(got.sum(1), torch.ones(len(rows), dtype=torch.float64))
    assert (got >= 0).all()
    assert (posterior[got > 0] > 0).all()
    likeliest = posterior.max(1).values
    if name.startswith(("top", "full", "threshold", "adaptive")):
        assert torch.equal(posterior.gather(1, got.argmax(1, keepdim=True))[:, 0], likeliest)


@pytest.mark.parametrize(
    "name",
    [
        "top-0",
        "top-5",
        "top-01",
        "Top-1",
        "top",
        "best",
        "",
        "top-1 ",
        "threshold-0",
        "threshold-1.5",
        "threshold-nan",
        "threshold--0.1",
        "nucleus",
        "nucleus-2",
        "sample-1",
    ],
)
def test_unknown_strategies_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="strategy"):
        Strategy.parse(name, 4)


@pytest.mark.parametrize("name", ["sample", "nucleus-0.5", "oracle"])
def test_a_strategy_without_what_it_needs_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=r"needs"):
        weights(name)


def test_oracle_refuses_labels_that_are_no_expert_here() -> None:
    missing = torch.tensor([[0.6, 0.0, 0.4]], dtype=torch.float64)
    with pytest.raises(ValueError, match="missing"):
        weights("oracle", missing, labels=torch.tensor([1]))
    with pytest.raises(ValueError, match="labels 0 to 2"):
        weights("oracle", missing, labels=torch.tensor([3]))
