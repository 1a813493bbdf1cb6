"""What a training step means: the protocol every task meets, and the expert's own task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paris_swarm.dht_schemas.provenance import RowsUsed
from paris_swarm.expert.flow import sample_t
from paris_swarm.expert.memory import check_forward
from paris_swarm.expert.model import Expert, seeded
from paris_swarm.expert.objective import Objective
from paris_swarm.expert.pretrained import head_start
from paris_swarm.expert.recipe import Recipe, TrainConfig
from paris_swarm.expert.rows import Batch, BatchOrder, Rows, drop_captions
from paris_swarm.expert.shape import Shape
from paris_swarm.expert.verify import Probe, expert_probe_loss


class MovableBatch(Protocol):
    """A batch can be put on a device."""

    def to(self, device: torch.device) -> Any: ...


class TaskRecipe(Protocol):
    """What the loop reads of a recipe; `digest` tells two recipes apart."""

    @property
    def model(self) -> Shape: ...
    @property
    def train(self) -> TrainConfig: ...
    def digest(self) -> str: ...


@dataclass(frozen=True)
class Examples:
    """One step's examples with everything random already drawn, so that any split of the rows learns the same thing.

    t: times, float32 [B]; parts: what else the task's `losses` reads, each [B, ...].
    """

    t: Tensor
    parts: Mapping[str, Tensor]

    def __len__(self) -> int:
        return self.t.shape[0]

    def rows(self, start: int, end: int) -> Examples:
        """The examples of these rows (views)."""
        return Examples(self.t[start:end], {name: part[start:end] for name, part in self.parts.items()})


class Task(Protocol):
    """One thing to be trained by `expert.training.train`.

    `batch(step)` is a pure function of the step, `draw` of (batch, generator), `losses` [B] of (weights, examples),
    each row's own, `probe` of the weights: that is all it takes for a killed run to continue bit for bit, and for a
    batch to be taken in pieces.
    """

    @property
    def recipe(self) -> TaskRecipe: ...
    def build_model(self) -> nn.Module: ...
    def rows_used(self) -> RowsUsed: ...
    def begin(self, model: nn.Module) -> None: ...
    def batch(self, step: int) -> MovableBatch: ...
    def draw(self, batch: Any, generator: torch.Generator) -> Examples: ...
    def losses(self, model: nn.Module, examples: Examples) -> Tensor: ...
    def probe(self, model: nn.Module) -> float: ...


class ExpertTask:
    """An expert learns the velocity of its own cluster: flow matching with conditioning dropout.

    `probe` rows decide the published probe loss and are never among `rows` (`rows.select_rows` leaves them out).
    start: the file of the start weights, where the recipe names any; needed only to begin.
    """

    def __init__(self, recipe: Recipe, rows: Rows, probe: Probe, start: Path | None = None) -> None:
        self._recipe = recipe
        self._start = start
        self._rows = rows
        self._probe = probe
        self._order = BatchOrder(len(rows), recipe.train.batch, recipe.train.seed)
        self._objective = Objective(recipe.model.output, recipe.model.path)

    @property
    def recipe(self) -> Recipe:
        """Model and training values."""
        return self._recipe

    def rows_used(self) -> RowsUsed:
        """Which rows it is trained on, for the checkpoint's provenance."""
        return self._rows.used()

    def build_model(self) -> Expert:
        """The network with initial weights that depend on the recipe's seed alone."""
        return build_expert(self._recipe)

    def begin(self, model: nn.Module) -> None:
        """Give a fresh model the start weights, where the recipe names any.

        Raises:
            StartRefused: they are not at hand, or other bytes. NotADiT: they do not fit the recipe.
        """
        if self._recipe.start is not None:
            assert isinstance(model, Expert)
            head_start(model, self._recipe.start, self._start)

    def batch(self, step: int) -> Batch:
        """The rows of `step`, on the CPU."""
        return self._rows.batch(self._order.positions(step))

    def draw(self, batch: Batch, generator: torch.Generator) -> Examples:
        """Times, noise and dropped captions of `batch` from `generator`."""
        config = self._recipe.train
        device = batch.x0.device
        t = sample_t(batch.x0.shape[0], config, generator, device)  # [B]
        noise = torch.randn(batch.x0.shape, generator=generator, device=device)  # [B, C, H, W]
        states, mask = drop_captions(batch.states, batch.mask, self._rows.null, config.condition_dropout, generator)
        return Examples(t, {"x0": batch.x0, "noise": noise, "states": states, "mask": mask})

    def losses(self, model: nn.Module, examples: Examples) -> Tensor:
        """The recipe's loss of each example: float32 [B]."""
        parts = examples.parts
        objective = self._objective
        point = objective.noised(parts["x0"], parts["noise"], examples.t)
        said = model(point.x, point.u, parts["states"], parts["mask"], raw=True)  # [B, C, H, W]
        return objective.losses(said, point, parts["x0"], parts["noise"], self._recipe.train.loss)

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """Mean of `losses` over `batch`: a scalar."""
        return self.losses(model, self.draw(batch, generator)).mean()

    def probe(self, model: nn.Module) -> float:
        """Loss on the probe rows at fixed times and noise."""
        return expert_probe_loss(model, self._probe)


def build_expert(recipe: Recipe, rows: int = 1) -> Expert:
    """A fresh expert, its weights a function of `recipe.train.seed` (`ExpertTask.begin` adds the start weights). rows:
    how many are to go through it at once.

    Raises:
        TooLarge: this machine has no memory for it.
    """
    check_forward(recipe.model, rows)
    model = seeded(Expert, recipe.model, recipe.train.seed)
    assert isinstance(model, Expert)
    return model
