from __future__ import annotations

import pytest
import torch

from paris_swarm.router.samplers import SAMPLERS, euler, heun, named_sampler, picture_draws, picture_noise, times


def test_a_straight_path_is_followed_exactly_in_any_number_of_steps():
    x0, noise = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 2, 4, 4).double()
    for steps in (1, 7, 50):
        torch.testing.assert_close(euler(lambda x, t: noise - x0, noise, steps), x0)


def test_velocity_is_asked_at_t_from_one_downwards_never_at_zero():
    seen: list[float] = []
    told: list[tuple[int, int]] = []

    def velocity(x, t):
        seen.extend(t.tolist())
        return torch.zeros_like(x)

    euler(velocity, torch.zeros(2, 3), 4, lambda step, steps: told.append((step, steps)))
    assert seen == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert times(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_euler_is_first_order():
    errors = [abs(euler(lambda x, t: x, torch.ones(1, 1).double(), n).item() - torch.e**-1) for n in (100, 200)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)


def test_noise_of_a_picture_depends_on_seed_and_number_alone():
    whole = picture_noise(3, range(6), (3, 8, 8))
    assert torch.equal(picture_noise(3, [4], (3, 8, 8))[0], whole[4])
    assert torch.equal(picture_noise(3, [5, 1], (3, 8, 8)), whole[[5, 1]])
    assert len({row.numpy().tobytes() for row in torch.cat([whole, picture_noise(4, range(6), (3, 8, 8))])}) == 12
    assert whole.dtype == torch.float32
    assert abs(whole.mean()) < 0.1
    assert abs(whole.std() - 1) < 0.1


def test_drawing_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    picture_noise(0, range(2), (1, 2, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="at least 1 step"):
        euler(lambda x, t: x, torch.zeros(1, 1), 0)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_follows_a_straight_path_and_counts_its_steps(name):
    if name == "dpm++":
        pytest.importorskip("diffusers")
    draw = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 2, 4, 4, generator=draw).double() for _ in range(2))
    told: list[tuple[int, int]] = []
    got = named_sampler(name)(lambda x, t: noise - x0, noise, 9, lambda step, steps: told.append((step, steps)))
    torch.testing.assert_close(got, x0, rtol=2e-3, atol=2e-3)  # dpm++ starts at t = 0.999
    assert told == [(step, 9) for step in range(1, 10)]


def gaussian_flow(x, t):
    """The exact velocity towards N(0.5, 0.3^2): where a curved path separates first from second order."""
    t = t.reshape(-1, 1)
    variance = (1 - t) ** 2 * 0.09 + t**2
    return (t - (1 - t) * 0.09) * (x - (1 - t) * 0.5) / variance - 0.5


@pytest.mark.parametrize("name", ["heun", "dpm++"])
def test_second_order_samplers_beat_euler_at_the_same_steps(name):
    if name == "dpm++":
        pytest.importorskip("diffusers")
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = 0.5 + 0.3 * noise  # the flow's map of one Gaussian to another is affine
    error = {kind: (named_sampler(kind)(gaussian_flow, noise, 12) - exact).abs().max() for kind in ("euler", name)}
    assert error[name] < error["euler"] / 3


def test_heun_is_second_order_and_asks_once_in_its_last_step():
    asked: list[float] = []

    def velocity(x, t):
        asked.append(float(t[0]))
        return gaussian_flow(x, t)

    noise = torch.ones(1, 1, dtype=torch.float64)
    heun(velocity, noise, 4)
    assert asked == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


def test_an_unknown_sampler_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="euler, heun"):
        named_sampler("ddim")


def test_draws_of_a_picture_depend_on_seed_and_number_alone_and_not_on_its_noise():
    whole = picture_draws(3, range(6), 8)
    assert torch.equal(picture_draws(3, [5, 1], 8), whole[[5, 1]])
    assert ((whole >= 0) & (whole < 1)).all()
    assert not torch.equal(whole, picture_draws(4, range(6), 8))
