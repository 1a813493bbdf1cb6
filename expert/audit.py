"""How far published weights are from the same steps trained again, and how much of that rounding explains.

Three folders are compared with the one that all of them grew from: what was **published**, what was **replayed** here
with the same precision, and the **reference**, the same steps with far less rounding (float64 for float32, float32 for
bfloat16). Every distance is Euclidean and divided by the replay's own **move**, its distance from the start: 1 means
"as far away as if nothing had been trained", and a forger cannot stretch the measure.

Rounding has carried the replay away from the reference by its **noise**, and an honest peer on any hardware by about as
much (docs/results/audit-2026-11.md measures it with other instruction sets). `MARGIN` times the noise is explained, of
every file as a whole and of every tensor for itself; a tensor whose own noise is small by chance is granted that of its
file. Noise grows with the steps in between, and so does what is explained: short intervals are audited more sharply.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paris_swarm.dht_schemas.files import sync
from paris_swarm.dht_schemas.provenance import Environment
from paris_swarm.expert.checkpoint import (
    WEIGHT_FILES,
    CheckpointError,
    CheckpointState,
    read_tensors,
    write_state,
)
from paris_swarm.expert.task import Task
from paris_swarm.expert.training import StepSettings, TrainState

MARGIN = 16.0
"""Times the noise that honest hardware may differ by."""
REFERENCES = {"fp32": "fp64", "bf16": "fp32"}
"""Precision of the reference run for each precision of training."""

Verdict = Literal["identical", "explained", "unexplained", "other version"]
"""Bit for bit; apart by no more than rounding; apart by more; and apart by more, but by code that is not the author's:
that accuses nobody.
"""


# ---------------------------------------------------------------------------------------------------------------------
# records
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorDistance:
    """One tensor, in weights' own units: the lengths of published - replayed (`distance`), replayed - start (`move`)
    and replayed - reference (`noise`, None as long as there is no reference).
    """

    name: str
    distance: float
    move: float
    noise: float | None

    @property
    def relative(self) -> float:
        """distance / move; infinite where a tensor differs that training leaves alone."""
        return _ratio(self.distance, self.move)


@dataclass(frozen=True)
class FileDistance:
    """One weights file. `published_move` is published - start; `identical` means bit for bit."""

    name: str
    identical: bool
    distance: float
    move: float
    published_move: float
    noise: float | None
    tensors: tuple[TensorDistance, ...]

    @property
    def relative(self) -> float:
        """distance / move of the whole file."""
        return _ratio(self.distance, self.move)

    @property
    def relative_noise(self) -> float | None:
        """noise / move of the whole file, or None without a reference."""
        return None if self.noise is None else _ratio(self.noise, self.move)

    def excess(self, tensor: TensorDistance) -> float:
        """A tensor's distance over what its noise, or its share of the file's, comes to."""
        assert tensor.noise is not None and self.noise is not None
        granted = max(tensor.noise, _ratio(self.noise, self.move) * tensor.move)
        return _ratio(tensor.distance, granted)

    @property
    def worst(self) -> tuple[float, str] | None:
        """Largest excess among the file as a whole and its tensors, and which it is; None without a reference."""
        if self.noise is None:
            return None
        found = [(_ratio(self.distance, self.noise), "the whole file")]
        found += [(self.excess(tensor), tensor.name) for tensor in self.tensors]
        return max(found, key=lambda item: math.inf if math.isnan(item[0]) else item[0])

    def explained(self, margin: float = MARGIN) -> bool:
        """Whether rounding explains the difference, of the file and of each tensor."""
        return self.identical or (self.worst is not None and self.worst[0] <= margin)


@dataclass(frozen=True)
class Comparison:
    """The files of one checkpoint against their replay."""

    files: tuple[FileDistance, ...]

    @property
    def identical(self) -> bool:
        """Every file bit for bit."""
        return all(file.identical for file in self.files)

    @property
    def untrained(self) -> bool:
        """Whether the published weights are those of the start; what the optimiser's state says does not count."""
        return all(file.published_move == 0 for file in self.files if file.name != "optimizer.safetensors")

    def verdict(self, *, must_be_identical: bool, other_version: bool = False, margin: float = MARGIN) -> Verdict:
        """must_be_identical: the replay ran where it gives the same bits (`same_bits_expected`). other_version: other
        code than the author's trained the replay, and may do other sums; weights that did not move no code excuses.
        """
        if self.identical:
            return "identical"
        if not must_be_identical and all(file.explained(margin) for file in self.files):
            return "explained"
        return "other version" if other_version and not self.untrained else "unexplained"


def _ratio(part: float, whole: float) -> float:
    if whole > 0:
        return part / whole
    return 0.0 if part == 0 else math.inf


# ---------------------------------------------------------------------------------------------------------------------
# where a replay starts
# ---------------------------------------------------------------------------------------------------------------------


def write_start(folder: Path, task: Task, step: int, weights: Path | None) -> None:
    """A checkpoint folder to replay from: the three files of `weights`, or of the recipe's initial weights (None).

    state.json is written anew, for an author's own could name another step. The folder appears whole or not at all.

    Raises:
        CheckpointError: the files are not those of the recipe.
        ValueError: initial weights are those of step 0, or the start weights that the recipe names are not at hand.
    """
    from safetensors.torch import save_file

    state = TrainState(task, torch.device("cpu"), settings=StepSettings(micro_batch=1))  # no batch goes through it
    if weights is None:
        state.begin()
    parts: Sequence[Mapping[str, Tensor]] = (state.ema.state_dict(), state.model.state_dict(), state.optimiser.state())
    if weights is None and step != 0:
        raise ValueError(f"there are no initial weights of step {step}")
    draft = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, tensors in zip(WEIGHT_FILES, parts, strict=True):
        kept = dict(tensors) if weights is None else read_tensors(weights / name, tensors)
        save_file({key: value.contiguous() for key, value in kept.items()}, draft / name)
        sync(draft / name)
    train = task.recipe.train
    record = CheckpointState(
        step=step,
        steps=train.steps,
        seed=train.seed,
        recipe=task.recipe.digest(),
        parent=None,
        probe_loss=0.0,
        losses=(),
    )
    write_state(draft, record, {})
    shutil.rmtree(folder, ignore_errors=True)  # what an older version began
    draft.rename(folder)


# ---------------------------------------------------------------------------------------------------------------------
# comparing
# ---------------------------------------------------------------------------------------------------------------------


def same_bits_expected(mine: Environment, theirs: Environment) -> bool:
    """Whether two environments must give the same bits: equal in all that decides rounding, no atomics at work, and no
    kernels made on the spot by a compiler whose version nobody recorded.
    """
    orderly = (mine.device == "cpu" or mine.deterministic) and not mine.compiled
    return orderly and not environment_differences(mine, theirs)


def environment_differences(mine: Environment, theirs: Environment) -> dict[str, tuple[str, str]]:
    """What differs: field -> (mine, theirs). `package` is among them: another version of the code may add up otherwise
    (docs/decisions/0005-what-an-audit-proves.md).
    """
    return {
        name: (str(getattr(mine, name)), str(getattr(theirs, name)))
        for name in Environment.model_fields
        if getattr(mine, name) != getattr(theirs, name)
    }


def compare(
    start: Path, published: Path, replayed: Path, reference: Path | None = None, *, names: Sequence[str] = WEIGHT_FILES
) -> Comparison:
    """Compares checkpoint folders, tensor by tensor, in float64.

    Raises:
        CheckpointError: a file is missing, or two of them hold other tensors.
    """
    return Comparison(
        tuple(
            _compare_file(
                name, start / name, published / name, replayed / name, None if reference is None else reference / name
            )
            for name in names
        )
    )


def _compare_file(name: str, start: Path, published: Path, replayed: Path, reference: Path | None) -> FileDistance:
    tensors: list[TensorDistance] = []
    published_moves: list[float] = []
    identical = True
    paths = [start, published, replayed, *([reference] if reference is not None else [])]
    try:
        files = [safe_open(path, framework="pt") for path in paths]
        keys = sorted(files[0].keys())
        for path, file in zip(paths, files, strict=True):
            if sorted(file.keys()) != keys:
                raise CheckpointError(f"{path} holds other tensors than {start}")
        for key in keys:
            own = [file.get_tensor(key) for file in files]
            if len({tensor.shape for tensor in own}) > 1:
                raise CheckpointError(f"{published}: {key} has another shape than in {start}")
            identical = identical and _same_bits(own[1], own[2])
            begun, said, mine, *exact = (tensor.double() for tensor in own)
            tensors.append(TensorDistance(key, _length(said - mine), _length(mine - begun), _noise(mine, exact)))
            published_moves.append(_length(said - begun))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{name} cannot be compared: {error}") from error
    noises = [tensor.noise for tensor in tensors if tensor.noise is not None]
    return FileDistance(
        name=name,
        identical=identical,
        distance=math.hypot(*(tensor.distance for tensor in tensors)),
        move=math.hypot(*(tensor.move for tensor in tensors)),
        published_move=math.hypot(*published_moves),
        noise=math.hypot(*noises) if reference is not None else None,
        tensors=tuple(tensors),
    )


def _noise(mine: Tensor, exact: Sequence[Tensor]) -> float | None:
    return _length(mine - exact[0]) if exact else None


def _length(difference: Tensor) -> float:
    return float(torch.linalg.vector_norm(difference))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
