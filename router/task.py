"""Training a router with the expert's loop, and the probe loss anyone can recompute.

Cross-entropy on the true cluster of labelled, noised samples at every t (Decentralized Diffusion Models, arXiv
2501.05450, section 3). A router needs rows of all clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from paris_swarm.dht_schemas.provenance import RowsUsed
from paris_swarm.expert.checkpoint import load_weights
from paris_swarm.expert.flow import interpolate
from paris_swarm.expert.memory import check_forward
from paris_swarm.expert.model import seeded
from paris_swarm.expert.rows import Rows
from paris_swarm.expert.task import Examples
from paris_swarm.expert.verify import BAR_MARGIN, BATCH, PROBE_TIMES, Probe, load_probe
from paris_swarm.router.labelled_rows import LabelledBatch, LabelledRows
from paris_swarm.router.model import Router
from paris_swarm.router.recipe import RouterRecipe

# ---------------------------------------------------------------------------------------------------------------------
# the task
# ---------------------------------------------------------------------------------------------------------------------


class RouterTask:
    """A router learns p(k | x_t, t, caption), the caption replaced by the null caption with the recipe's probability.

    labels [N]: the cluster of every row of the data (not only of `rows`), as `select_rows` takes them. drawn_by: where
    the rows are drawn ones (drawn_rows.py), the root of each cluster's expert: the checkpoint's provenance says so.

    Raises:
        ValueError: a row has no label, or one outside 0..K-1, or a cluster has no row.
    """

    def __init__(
        self,
        recipe: RouterRecipe,
        rows: Rows,
        labels: NDArray[np.integer[Any]],
        probe: RouterProbe,
        drawn_by: Mapping[str, str] | None = None,
    ) -> None:
        clusters = recipe.model.clusters
        self._rows = LabelledRows(rows, labels, clusters, recipe.train)
        counts = np.bincount(self._rows.labels, minlength=clusters)
        if not counts.all():
            empty = np.flatnonzero(counts == 0).tolist()
            raise ValueError(f"a router needs rows of every cluster; there are none of {empty}")
        self._recipe = recipe
        self._probe = probe
        self._drawn_by = None if drawn_by is None else dict(drawn_by)

    @property
    def recipe(self) -> RouterRecipe:
        """Model and training values."""
        return self._recipe

    def rows_used(self) -> RowsUsed:
        """Which rows it is trained on, and with which label each, for the checkpoint's provenance."""
        used = self._rows.used()
        if self._drawn_by is None:
            return used
        return RowsUsed.model_validate({**used.model_dump(), "drawn_by": self._drawn_by})

    def build_model(self) -> Router:
        """The network with initial weights that depend on the recipe's seed alone."""
        return build_router(self._recipe)

    def begin(self, model: nn.Module) -> None:
        """A router starts from its initial weights."""

    def batch(self, step: int) -> LabelledBatch:
        """The labelled rows of `step`, on the CPU."""
        return self._rows.batch(step)

    def draw(self, batch: LabelledBatch, generator: torch.Generator) -> Examples:
        """Times, noise and dropped captions of `batch` from `generator`."""
        drawn = self._rows.draw(batch, generator)
        captions = {"states": drawn.states, "mask": drawn.mask}
        return Examples(drawn.t, {"x0": batch.x0, "noise": drawn.noise, **captions, "labels": batch.labels})

    def losses(self, model: nn.Module, examples: Examples) -> Tensor:
        """Cross-entropy in nats of each example: float32 [B]."""
        parts = examples.parts
        x = interpolate(parts["x0"], parts["noise"], examples.t)  # [B, C, H, W]
        logits = model(x, examples.t, parts["states"], parts["mask"])  # [B, K]
        return F.cross_entropy(logits.float(), parts["labels"], reduction="none")

    def loss(self, model: nn.Module, batch: LabelledBatch, generator: torch.Generator) -> Tensor:
        """Mean of `losses` over `batch`: a scalar."""
        return self.losses(model, self.draw(batch, generator)).mean()

    def probe(self, model: nn.Module) -> float:
        """Cross-entropy on the probe rows at fixed times and noise."""
        return router_probe_loss(model, self._probe)


def build_router(recipe: RouterRecipe, rows: int = 1) -> Router:
    """An untrained router, its weights a function of `recipe.train.seed`; rows: how many are to go through it at once.

    Raises:
        TooLarge: this machine has no memory for it.
    """
    check_forward(recipe.model, rows)
    model = seeded(Router, recipe.model, recipe.train.seed)
    assert isinstance(model, Router)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# the probe
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RouterProbe:
    """The union of the experts' probe rows, with the cluster of each: labels int64 [n]."""

    rows: Probe
    labels: Tensor


def join_probes(probes: list[Probe], seed: int, clusters: Sequence[int] | None = None) -> RouterProbe:
    """The union of the probes of `clusters` (0..K-1 when None), in this order; all with captions of the same padded
    length, and judged at the same times.
    """
    numbers = range(len(probes)) if clusters is None else clusters
    rows = Probe(
        x0=torch.cat([probe.x0 for probe in probes]),
        states=torch.cat([probe.states for probe in probes]),
        mask=torch.cat([probe.mask for probe in probes]),
        null=probes[0].null,
        seed=seed,
        times=probes[0].times,
    )
    labels = [torch.full((len(probe),), k) for k, probe in zip(numbers, probes, strict=True)]
    return RouterProbe(rows, torch.cat(labels))


def load_router_probe(path: Path, clusters: int, seed: int, times: Sequence[float] = PROBE_TIMES) -> RouterProbe:
    """The router's probe from a plan's probe file: the rows of slots "0" to "K-1".

    Raises:
        ValueError: the file is no probe set, or a slot has no rows in it, or `times` are none.
    """
    return join_probes([load_probe(path, str(slot), seed, times) for slot in range(clusters)], seed)


@torch.no_grad()
def router_probe_loss(model: nn.Module, probe: RouterProbe, batch: int = BATCH) -> float:
    """Mean cross-entropy in nats over the probe rows and their times, every row with its own caption; float32, summed
    in float64. `batch` (rows at once) changes rounding at most.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    states, mask = probe.rows.states.to(device), probe.rows.mask.to(device)
    total = 0.0
    with torch.autocast(device.type, enabled=False):
        for rows, x, t, _noise in probe.rows.noised(batch):
            logits = model(x.to(device), t.to(device), states[rows], mask[rows]).float().cpu()  # [b, K]
            total += float(F.cross_entropy(logits, probe.labels[rows], reduction="none").double().sum())
    model.train(training)
    return total / (len(probe.labels) * len(probe.rows.times))


def router_probe_loss_of_file(recipe: RouterRecipe, weights: Path, probe: RouterProbe) -> float:
    """Probe loss of the router weights in a safetensors file.

    Raises:
        CheckpointError: the tensors are not those of the recipe. TooLarge: this machine has no memory for its network.
    """
    check_forward(recipe.model, BATCH)
    model = seeded(Router, recipe.model, 0)
    load_weights(model, weights)
    return router_probe_loss(model, probe)


# ---------------------------------------------------------------------------------------------------------------------
# the bars
# ---------------------------------------------------------------------------------------------------------------------


def router_resumable_bar(recipe: RouterRecipe, probe: RouterProbe) -> float:
    """Probe loss of untrained weights, less BAR_MARGIN: their last layer is zero, so they give each of the K clusters
    the same probability, every row of `probe` costs log K, and no network has to be built.
    """
    logits = torch.zeros(len(probe.labels), recipe.model.clusters)
    return (1 - BAR_MARGIN) * float(F.cross_entropy(logits, probe.labels, reduction="none").double().mean())


def router_assemblable_bar(probe: RouterProbe) -> float:
    """Entropy in nats of the probe's labels, less BAR_MARGIN: the least cross-entropy of any router that looks at
    nothing.
    """
    share = torch.bincount(probe.labels).double() / len(probe.labels)
    return (1 - BAR_MARGIN) * float(-(share[share > 0] * share[share > 0].log()).sum())
