import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_swarm.expert.flow import (
    from_pixels,
    interpolate,
    sample_t,
    scalar_predictor_loss,
    to_pixels,
    velocity_target,
)
from paris_swarm.expert.recipe import TrainConfig


def test_the_path_runs_from_data_to_noise() -> None:
    x0, noise = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    assert torch.equal(interpolate(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(3)), noise)


@settings(deadline=None)
@given(st.floats(0, 1))
def test_walking_back_along_the_velocity_gives_the_data(t: float) -> None:
    x0, noise = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    at = torch.full((2,), t, dtype=torch.float64)
    torch.testing.assert_close(interpolate(x0, noise, at) - t * velocity_target(x0, noise), x0)


def test_every_pixel_value_survives() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(from_pixels(to_pixels(every)), every)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 64), st.sampled_from(["uniform", "logit-normal"]), st.floats(0, 1), st.integers(0, 99))
def test_times_lie_between_data_and_noise(count: int, kind: str, share: float, seed: int) -> None:
    config = TrainConfig(t_sampling=kind, t_uniform=share)
    t = sample_t(count, config, torch.Generator().manual_seed(seed), torch.device("cpu"))
    assert t.shape == (count,)
    assert bool(((t >= 0) & (t <= 1)).all())


def test_times_have_the_distribution_they_are_named_after() -> None:
    draw = torch.Generator().manual_seed(0)
    uniform = sample_t(4000, TrainConfig(t_sampling="uniform"), draw, torch.device("cpu"))
    assert np.allclose(np.quantile(uniform, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.01)
    config = TrainConfig(t_sampling="logit-normal", t_mean=0.8, t_std=1.2, t_uniform=0.0)
    logits = torch.logit(sample_t(4000, config, draw, torch.device("cpu")).double())
    assert abs(float(logits.mean()) - 0.8) < 0.02
    assert abs(float(logits.std()) - 1.2) < 0.02


def test_the_scalar_predictor_is_the_best_of_its_kind() -> None:
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(400, 1, 4, 4, generator=draw) * 0.3 + 0.5
    times = (0.2, 0.5, 0.9)
    noises = torch.randn(3, 400, 1, 4, 4, generator=draw)
    found = scalar_predictor_loss(rows, rows, noises, noises, times)
    # For independent pixels of mean m and deviation s the best linear guess errs by s^2 / ((1-t)^2 s^2 + t^2).
    expected = np.mean([0.09 / ((1 - t) ** 2 * 0.09 + t**2) for t in times])
    assert abs(found - expected) < 0.03 * expected
