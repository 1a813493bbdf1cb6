"""Small made data for the expert room's tests: pictures whose colour follows the caption's states."""

from __future__ import annotations

from typing import Any

import numpy as np

from paris_swarm.expert.recipe import ModelConfig, Recipe, TrainConfig
from paris_swarm.expert.rows import Rows
from paris_swarm.expert.task import ExpertTask
from paris_swarm.expert.verify import Probe, probe_from_rows

TEXT_TOKENS, TEXT_DIM = 6, 12


class SyntheticData:
    """Meets `rows.RowSource` in memory: flat 8 x 8 pictures, their colour written into the caption's first token."""

    def __init__(self, count: int = 400, resolution: int = 8) -> None:
        draw = np.random.default_rng(7)
        self.count = count
        colours = draw.integers(0, 256, (count, 1, 1, 3))
        noise = draw.integers(-10, 11, (count, resolution, resolution, 3))
        self._pixels = np.clip(colours + noise, 0, 255).astype(np.uint8)
        self._states = draw.normal(size=(count, TEXT_TOKENS, TEXT_DIM)).astype(np.float16)
        self._states[:, 0, :3] = (colours[:, 0, 0] / 127.5 - 1).astype(np.float16)
        self._lengths = draw.integers(2, TEXT_TOKENS, count).astype(np.int16)
        self.null_states = np.zeros((TEXT_TOKENS, TEXT_DIM), dtype=np.float16)
        self.manifest: dict[str, Any] = {"null_length": 2}
        self.digests = draw.integers(0, 256, (count, 16), dtype=np.uint8)

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        return self._pixels[rows]

    def states(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._states[rows], self._lengths[rows]


def small_recipe(output: str = "velocity", **train: Any) -> Recipe:
    """A network of a few thousand numbers. Width 16 is too narrow for the noise of a patch: "residual" learns well."""
    values: dict[str, Any] = {"steps": 8, "batch": 4, "warmup_steps": 2, "seed": 3, **train}
    model = ModelConfig(
        resolution=8,
        patch=4,
        hidden=16,
        depth=2,
        heads=2,
        text_dim=TEXT_DIM,
        text_tokens=TEXT_TOKENS,
        output=output,
    )
    return Recipe(model=model, train=TrainConfig(**values))


def small_probe(data: SyntheticData) -> Probe:
    """The last eight rows."""
    return probe_from_rows(Rows(data, np.arange(data.count - 8, data.count)), seed=11)


def small_task(output: str = "velocity", **train: Any) -> ExpertTask:
    """An expert's task on all rows but the probe's."""
    data = SyntheticData()
    return ExpertTask(small_recipe(output, **train), Rows(data, np.arange(data.count - 8)), small_probe(data))
