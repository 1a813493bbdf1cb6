"""What a training step means: the protocol every task meets, and the expert's own task."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paris_swarm.dht_schemas.provenance import RowsUsed
from paris_swarm.expert.flow import sample_t
from paris_swarm.expert.model import Expert, seeded
from paris_swarm.expert.objective import Objective
from paris_swarm.expert.recipe import Recipe, TrainConfig
from paris_swarm.expert.rows import Batch, BatchOrder, Rows, drop_captions
from paris_swarm.expert.verify import Probe, expert_probe_loss


class MovableBatch(Protocol):
    """A batch can be put on a device."""

    def to(self, device: torch.device) -> Any: ...


class TaskRecipe(Protocol):
    """What the loop reads of a recipe; `digest` tells two recipes apart."""

    @property
    def train(self) -> TrainConfig: ...
    def digest(self) -> str: ...


class Task(Protocol):
    """One thing to be trained by `expert.training.train`.

    `batch(step)` is a pure function of the step, `loss` of (weights, batch, generator), `probe` of the weights: that is
    all it takes for a killed run to continue bit for bit.
    """

    @property
    def recipe(self) -> TaskRecipe: ...
    def build_model(self) -> nn.Module: ...
    def rows_used(self) -> RowsUsed: ...
    def batch(self, step: int) -> MovableBatch: ...
    def loss(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Tensor: ...
    def probe(self, model: nn.Module) -> float: ...


class ExpertTask:
    """An expert learns the velocity of its own cluster: flow matching with conditioning dropout.

    `probe` rows decide the published probe loss and are never among `rows` (`rows.select_rows` leaves them out).
    """

    def __init__(self, recipe: Recipe, rows: Rows, probe: Probe) -> None:
        self._recipe = recipe
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

    def batch(self, step: int) -> Batch:
        """The rows of `step`, on the CPU."""
        return self._rows.batch(self._order.positions(step))

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """The recipe's loss on `batch` with times, noise and dropped captions from `generator`: a scalar."""
        config = self._recipe.train
        device = batch.x0.device
        t = sample_t(batch.x0.shape[0], config, generator, device)  # [B]
        noise = torch.randn(batch.x0.shape, generator=generator, device=device)  # [B, C, H, W]
        states, mask = drop_captions(batch.states, batch.mask, self._rows.null, config.condition_dropout, generator)
        objective = self._objective
        point = objective.noised(batch.x0, noise, t)
        said = model(point.x, point.u, states, mask, raw=True)  # [B, C, H, W]
        return objective.loss(said, point, batch.x0, noise, config.loss)

    def probe(self, model: nn.Module) -> float:
        """Loss on the probe rows at fixed times and noise."""
        return expert_probe_loss(model, self._probe)


def build_expert(recipe: Recipe) -> Expert:
    """An untrained expert, its weights a function of `recipe.train.seed`."""
    model = seeded(Expert, recipe.model, recipe.train.seed)
    assert isinstance(model, Expert)
    return model
