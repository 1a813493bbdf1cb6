"""The routing plot: colours by expert, steps from left to right, and shares that can be read off the picture."""

from __future__ import annotations

import numpy as np
import pytest

from paris_swarm.router.trace import CELL_HEIGHT, CELL_WIDTH, MARGIN, expert_colours, trace_picture


def cell(image: np.ndarray, row: int, step: int) -> np.ndarray:
    top, left = MARGIN + row * (CELL_HEIGHT + 4), MARGIN + step * CELL_WIDTH
    return image[top : top + CELL_HEIGHT, left : left + CELL_WIDTH - 1]


def test_each_cell_shows_the_experts_of_its_step_in_their_shares() -> None:
    weights = np.zeros((2, 3, 4), dtype=np.float32)
    weights[0, :, 1] = 1
    weights[1, 0, 3] = 1
    weights[1, 1:, 2], weights[1, 1:, 0] = 0.75, 0.25
    colours = expert_colours(4)
    image = trace_picture(weights)
    assert (cell(image, 0, 2) == colours[1]).all()
    assert (cell(image, 1, 0) == colours[3]).all()
    mixed = cell(image, 1, 2)[:, 0]
    assert (mixed[-1] == colours[2]).all()
    assert (mixed[0] == colours[0]).all()
    assert (mixed == colours[2]).all(axis=1).sum() == round(0.75 * CELL_HEIGHT)


def test_shares_of_any_size_fill_their_cell() -> None:
    weights = np.random.default_rng(0).dirichlet([0.3] * 8, (6, 50)).astype(np.float32)
    image = trace_picture(weights)
    colours = {tuple(colour) for colour in expert_colours(8).tolist()}
    for row in range(6):
        for step in range(50):
            assert {tuple(pixel) for pixel in cell(image, row, step).reshape(-1, 3).tolist()} <= colours


def test_the_colours_of_many_experts_differ() -> None:
    colours = expert_colours(16)
    assert len(np.unique(colours, axis=0)) == 16
    np.testing.assert_array_equal(colours[:8], expert_colours(8))


def test_any_caption_can_label_a_row() -> None:
    weights = np.full((2, 5, 2), 0.5, dtype=np.float32)
    plain = trace_picture(weights, ["x" * 500, "ein Hügel, 山 and \U0001f600"])
    assert plain.dtype == np.uint8 and plain.shape[2] == 3


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="weights"):
        trace_picture(np.zeros((2, 3), dtype=np.float32))
