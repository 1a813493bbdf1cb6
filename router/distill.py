"""One dense student of an ensemble: it learns the velocity of the expert that a picture's cluster names.

Decentralized Diffusion Models (arXiv 2501.05450), section 4.6. A picture x_0 of cluster k is noised to x_t, and the
student is to say there what expert k says, under the same caption (or the empty one, where the caption was dropped).
The squared error over pictures of all clusters has its least at sum_k p(k | x_t, t, caption) v_k: the flow of the
ensemble with the exact posterior in place of a router. The label comes from the picture, so no router is needed, and
the student is not told it. One network and no router: a step of it costs what a step of one expert costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paris_swarm.dht_schemas.provenance import RowsUsed
from paris_swarm.expert.flow import interpolate
from paris_swarm.expert.model import Expert
from paris_swarm.expert.recipe import ModelConfig, Recipe, TrainConfig, recipe_digest
from paris_swarm.expert.rows import Rows
from paris_swarm.expert.task import Examples, build_expert
from paris_swarm.expert.verify import Probe, expert_probe_loss
from paris_swarm.router.ensemble import Network
from paris_swarm.router.labelled_rows import LabelledBatch, LabelledRows

STARTS = ("fresh", "mean")


@dataclass(frozen=True)
class DistillRecipe:
    """Everything that decides what a student becomes, apart from its rows.

    student: its network and training values; teachers: the root of each cluster's expert; start: "fresh" initial
    weights, or the "mean" of the teachers' (experts of one plan begin from the same weights; what the paper starts from
    is not published).

    Raises:
        ValueError: no such start, no teachers, or a student of another path than the straight one.
    """

    student: Recipe
    teachers: Mapping[str, str]
    start: str = "fresh"

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise ValueError(f"a student starts {' or '.join(STARTS)}, not {self.start!r}")
        if set(self.teachers) != set(map(str, range(len(self.teachers)))) or not self.teachers:
            raise ValueError('teachers are numbered "0" to "K-1", at least one')
        if self.student.model.path != "flow" or self.student.start is not None:
            raise ValueError("a student learns the straight path (model.path flow), and brings no start weights")

    @property
    def model(self) -> ModelConfig:
        """The shape of the student's network."""
        return self.student.model

    @property
    def train(self) -> TrainConfig:
        """The student's training values."""
        return self.student.train

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "student": self.student.to_dict(), "teachers": dict(self.teachers)}

    def digest(self) -> str:
        """BLAKE3 of the same as canonical JSON, 64 hex digits."""
        return recipe_digest(self.to_dict())


class DistillTask:
    """A student learns from teachers, with the expert's loop (`expert.training.train`), so it resumes bit for bit.

    labels [N]: the cluster of every row of the data (not only of `rows`). teacher: cluster -> its expert, a frozen
    network on the device of the training, asked for at every step: what loads experts may keep few in memory. probe:
    held-out rows of all clusters; the student is judged as an expert is, by the true velocity.

    Raises:
        ValueError: a row has no label, or one outside 0..K-1.
    """

    def __init__(
        self,
        recipe: DistillRecipe,
        rows: Rows,
        labels: NDArray[np.integer[Any]],
        teacher: Callable[[int], Network],
        probe: Probe,
    ) -> None:
        self._recipe = recipe
        self._rows = LabelledRows(rows, labels, len(recipe.teachers), recipe.train)
        self._teacher = teacher
        self._probe = probe

    @property
    def recipe(self) -> DistillRecipe:
        """Student, teachers and start."""
        return self._recipe

    def rows_used(self) -> RowsUsed:
        """Which rows it is trained on, and with which label each."""
        return self._rows.used()

    def build_model(self) -> Expert:
        """The student with initial weights that depend on the recipe's seed alone."""
        return build_expert(self._recipe.student)

    def begin(self, model: nn.Module) -> None:
        """Give a fresh student the weights that it starts from.

        Raises:
            ValueError: the mean of teachers whose tensors are not the student's.
        """
        if self._recipe.start == "mean":
            mean_weights(model, (self._teacher(int(slot)) for slot in self._recipe.teachers))

    def batch(self, step: int) -> LabelledBatch:
        """The labelled rows of `step`, on the CPU."""
        return self._rows.batch(step)

    def draw(self, batch: LabelledBatch, generator: torch.Generator) -> Examples:
        """Times, noise and dropped captions of `batch` from `generator`."""
        drawn = self._rows.draw(batch, generator)
        x = interpolate(batch.x0, drawn.noise, drawn.t)  # [B, C, H, W]
        return Examples(drawn.t, {"x": x, "states": drawn.states, "mask": drawn.mask, "labels": batch.labels})

    def losses(self, model: nn.Module, examples: Examples) -> Tensor:
        """Mean squared distance from the teacher's velocity, of each example: float32 [B]."""
        parts = examples.parts
        taught = self.taught(examples)  # [B, C, H, W]
        said = model(parts["x"], examples.t, parts["states"], parts["mask"])  # [B, C, H, W]
        return (said.float() - taught).square().flatten(1).mean(1)  # [B]

    @torch.no_grad()
    def taught(self, examples: Examples) -> Tensor:
        """What the expert of each example's cluster says there: float32 [B, C, H, W]."""
        parts = examples.parts
        asked = (parts["x"], examples.t, parts["states"], parts["mask"])
        out = torch.empty_like(parts["x"], dtype=torch.float32)  # [B, C, H, W]
        for k in torch.unique(parts["labels"]).tolist():
            rows = torch.nonzero(parts["labels"] == k).flatten()  # [b]
            said = self._teacher(k)(*(part.index_select(0, rows) for part in asked))  # [b, C, H, W]
            out.index_copy_(0, rows, said.float())
        return out

    def probe(self, model: nn.Module) -> float:
        """Loss on the probe rows at fixed times and noise, against the true velocity."""
        return expert_probe_loss(model, self._probe)


@torch.no_grad()
def mean_weights(model: nn.Module, networks: Iterable[Network]) -> None:
    """Replaces the weights of `model` by the mean of those of `networks`, summed in float64.

    Raises:
        ValueError: a network has other tensors.
    """
    own = model.state_dict()
    sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in own.items()}
    count = 0
    for network in networks:
        other = network.state_dict() if isinstance(network, nn.Module) else {}
        if other.keys() != own.keys() or any(other[name].shape != own[name].shape for name in own):
            raise ValueError(
                "the mean of the experts' weights needs experts of the student's size and objective: start fresh"
            )
        for name, tensor in other.items():
            sums[name] += tensor.double()
        count += 1
    for name, tensor in own.items():
        tensor.copy_(sums[name] / count)
