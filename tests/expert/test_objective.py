"""Objectives behind one velocity: whatever an expert was trained to say, it is called as the same flow."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.expert.synthetic import small_recipe

from paris_swarm.expert.model import Expert, seeded
from paris_swarm.expert.objective import Objective
from paris_swarm.expert.recipe import ModelConfig, Recipe

OBJECTIVES = [
    Objective("velocity", "flow"),
    Objective("data", "flow"),
    Objective("residual", "flow"),
    Objective("noise", "flow"),
    Objective("noise", "cosine"),
    Objective("data", "cosine"),
]


def pair(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    shape = (count, 3, 4, 4)
    return (
        torch.rand(shape, generator=draw, dtype=torch.float64) * 2 - 1,
        torch.randn(shape, generator=draw, dtype=torch.float64),
    )


def perfect(
    objective: Objective, x0: torch.Tensor, noise: torch.Tensor, x: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """What a network that knows the answer would say."""
    if objective.output == "data":
        return x0
    if objective.output == "noise":
        return noise
    if objective.output == "velocity":
        return noise - x0
    # "residual" is affine in what is said: solve for the value whose velocity is right.
    zero = objective.velocity(torch.zeros_like(x), x, t)
    slope = objective.velocity(torch.ones_like(x), x, t) - zero
    return (noise - x0 - zero) / slope


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.output}-{o.path}")
@settings(deadline=None)
@given(t=st.floats(0.06, 0.98))
def test_a_network_that_knows_gives_the_flow_s_velocity(objective: Objective, t: float) -> None:
    x0, noise = pair()
    times = torch.full((len(x0),), t, dtype=torch.float64)
    x = (1 - t) * x0 + t * noise
    point = objective.locate(x, times)
    torch.testing.assert_close(point.x, point.signal * x0 + point.sigma * noise)
    said = perfect(objective, x0, noise, x, times)
    torch.testing.assert_close(objective.velocity(said, x, times), noise - x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.output}-{o.path}")
@settings(deadline=None)
@given(u=st.floats(0.0, 1.0))
def test_training_and_sampling_see_the_same_points(objective: Objective, u: float) -> None:
    """A point drawn in training, moved to the straight path and back, is the same point at the same time."""
    x0, noise = pair()
    times = torch.full((len(x0),), u, dtype=torch.float64)
    point = objective.noised(x0, noise, times)
    share = (point.sigma / (point.signal + point.sigma)).flatten()
    straight = point.x / (point.signal + point.sigma)
    back = objective.locate(straight, share)
    torch.testing.assert_close(back.x, point.x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(back.u, times, rtol=1e-4, atol=1e-5)


def test_the_cosine_path_is_the_published_schedule() -> None:
    """Improved DDPM, section 3.2: the share of the signal's variance, at a few steps of 1,000."""
    steps = torch.tensor([1.0, 250.0, 500.0, 999.0], dtype=torch.float64)

    def f(u: torch.Tensor) -> torch.Tensor:
        return torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2

    signal, sigma = Objective("noise", "cosine").coefficients(steps / 1000)
    torch.testing.assert_close(signal.square(), f(steps / 1000) / f(torch.zeros((), dtype=torch.float64)))
    torch.testing.assert_close(signal.square() + sigma.square(), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.output}-{o.path}")
@pytest.mark.parametrize("kind", ["velocity", "data", "noise"])
def test_every_loss_is_nought_for_a_network_that_knows(objective: Objective, kind: str) -> None:
    x0, noise = pair()
    u = torch.linspace(0.1, 0.9, len(x0), dtype=torch.float64)
    point = objective.noised(x0, noise, u)
    said = (
        perfect(objective, x0, noise, point.x, u)
        if objective.path == "flow"
        else (x0 if objective.output == "data" else noise)
    )
    if objective.path == "cosine" and kind == "velocity":
        with pytest.raises(ValueError, match="flow"):
            objective.loss(said, point, x0, noise, kind)
        return
    assert objective.loss(said, point, x0, noise, kind).item() < 1e-10
    assert objective.loss(said + 0.5, point, x0, noise, kind).item() > 1e-4


def test_an_expert_of_any_objective_answers_with_finite_velocities_at_both_ends() -> None:
    base = small_recipe().model
    for output, path in [("noise", "cosine"), ("data", "cosine"), ("noise", "flow")]:
        model = seeded(Expert, replace(base, output=output, path=path), 1)
        x = torch.randn(3, base.channels, base.resolution, base.resolution)
        states = torch.randn(3, base.text_tokens, base.text_dim)
        mask = torch.ones(3, base.text_tokens, dtype=torch.bool)
        velocity = model(x, torch.tensor([0.0, 0.5, 1.0]), states, mask)
        assert velocity.isfinite().all()


@pytest.mark.parametrize(
    ("output", "path"), [("velocity", "cosine"), ("residual", "cosine"), ("eps", "flow"), ("noise", "vp")]
)
def test_meaningless_combinations_are_refused_by_name(output: str, path: str) -> None:
    with pytest.raises(ValueError, match=r"model\.(output|path)"):
        ModelConfig(output=output, path=path)


def test_a_velocity_loss_off_the_straight_path_is_refused() -> None:
    recipe = small_recipe()
    with pytest.raises(ValueError, match=r"train\.loss"):
        Recipe(replace(recipe.model, output="noise", path="cosine"), replace(recipe.train, loss="velocity"))
