from __future__ import annotations

import pytest
import torch

from paris_swarm.router.samplers import euler, picture_noise, times


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
