"""Rows with the cluster of each, in batches and noised: what a router and a distilled student are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paris_swarm.dht_schemas.provenance import RowsUsed
from paris_swarm.expert.flow import sample_t
from paris_swarm.expert.recipe import TrainConfig
from paris_swarm.expert.rows import BatchOrder, Rows, drop_captions


@dataclass(frozen=True)
class LabelledBatch:
    """x0 float32 [B, C, H, W] in -1..1; states float32 [B, L, D]; mask bool [B, L]; labels int64 [B], the clusters."""

    x0: Tensor
    states: Tensor
    mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> LabelledBatch:
        """The same batch on `device`."""
        if self.x0.device == device:
            return self
        return LabelledBatch(self.x0.to(device), self.states.to(device), self.mask.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Drawn:
    """What chance adds to a batch: t float [B]; noise [B, C, H, W]; states [B, L, D] and mask [B, L] of the captions,
    some of them replaced by the null caption.
    """

    t: Tensor
    noise: Tensor
    states: Tensor
    mask: Tensor


class LabelledRows:
    """`rows` of a data set, whose order, times and dropped captions follow `config`.

    labels [N]: the cluster of every row of the data, not only of `rows`.

    Raises:
        ValueError: a row has no label, or one outside 0..K-1.
    """

    def __init__(self, rows: Rows, labels: NDArray[np.integer[Any]], clusters: int, config: TrainConfig) -> None:
        if int(rows.rows.max()) >= len(labels):
            raise ValueError(f"one label a row is needed: {len(labels)} labels, but a row {int(rows.rows.max())}")
        self.labels = np.asarray(labels)[rows.rows].astype(np.int64)
        """int64 [n], of these rows."""
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        if lowest < 0 or highest >= clusters:
            raise ValueError(f"labels must lie in 0..{clusters - 1}, got {lowest} to {highest}")
        self._rows = rows
        self._config = config
        self._order = BatchOrder(len(rows), config.batch, config.seed)

    def used(self) -> RowsUsed:
        """Which rows these are, and with which label each."""
        return self._rows.used(self.labels)

    def batch(self, step: int) -> LabelledBatch:
        """The labelled rows of `step`, on the CPU."""
        positions = self._order.positions(step)
        batch = self._rows.batch(positions)
        return LabelledBatch(batch.x0, batch.states, batch.mask, torch.from_numpy(self.labels[positions]))

    def draw(self, batch: LabelledBatch, generator: torch.Generator) -> Drawn:
        """Times, noise and dropped captions for `batch` from `generator`, on its device."""
        device = batch.x0.device
        t = sample_t(batch.x0.shape[0], self._config, generator, device)  # [B]
        noise = torch.randn(batch.x0.shape, generator=generator, device=device)  # [B, C, H, W]
        dropped = self._config.condition_dropout
        return Drawn(t, noise, *drop_captions(batch.states, batch.mask, self._rows.null, dropped, generator))
