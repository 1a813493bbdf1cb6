"""Checkpoints as folders: everything a successor needs to continue bit for bit, and nothing that can run code.

    WORK/checkpoints/step-00000400/
        ema.safetensors        averaged weights: what is sampled and judged
        model.safetensors      the weights being trained
        optimizer.safetensors  the optimiser's state
        state.json             step, seed, recipe digest, parent, losses, and length and BLAKE3 of the three files

Written beside its place and renamed into it, so a folder under its final name was whole once. One that no longer is
(a torn disk, an edit) is renamed `*.corrupt-N`, which names it and keeps it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from paris_swarm.dht_schemas.digest import digest_file
from paris_swarm.dht_schemas.files import quarantine, sync

WEIGHT_FILES = ("ema.safetensors", "model.safetensors", "optimizer.safetensors")
STATE_FILE = "state.json"
FORMAT = 1

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


class CheckpointError(ValueError):
    """A checkpoint cannot be used: what is wrong with it, and in which file."""


@dataclass(frozen=True)
class CheckpointState:
    """What state.json says, apart from the files' digests.

    `losses` is the tail of the training loss, one mean a report; `rng` names how randomness follows from the step
    ("counter": every step's generator is seeded from (seed, step), so there is no other state to keep). `facts`: what a
    manifest will say of its training (`provenance.training_facts`), from its `from_step` on; empty where nobody knows.
    """

    step: int
    steps: int
    seed: int
    recipe: str
    parent: str | None
    probe_loss: float
    losses: tuple[float, ...]
    rng: str = "counter"
    facts: Mapping[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# writing
# ---------------------------------------------------------------------------------------------------------------------


def checkpoint_folder(work_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return work_dir / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(
    work_dir: Path,
    state: CheckpointState,
    *,
    ema: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
) -> Path:
    """Writes a checkpoint folder atomically and gives its path; one that is already there in whole is kept.

    Raises:
        OSError: no space, or no permission.
    """
    target = checkpoint_folder(work_dir, state.step)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        if _problem(target) is None:
            return target
        quarantine(target)
    draft = target.with_name(f".{target.name}.partial-{os.getpid()}")
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir()
    try:
        files: dict[str, Any] = {}
        for name, tensors in zip(WEIGHT_FILES, (ema, model, optimizer), strict=True):
            plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(plain, draft / name)
            sync(draft / name)
            files[name] = {"length": (draft / name).stat().st_size, "blake3": digest_file(draft / name)}
        write_state(draft, state, files)
        sync(draft)
        draft.rename(target)
        sync(target.parent)
    finally:
        if draft.exists():
            shutil.rmtree(draft, ignore_errors=True)
    return target


def write_state(folder: Path, state: CheckpointState, files: Mapping[str, Any]) -> None:
    """Writes state.json into a folder; `files` maps each weights file to its length and digest."""
    record = {"format": FORMAT, **asdict(state), "files": dict(files)}
    (folder / STATE_FILE).write_text(json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n")
    sync(folder / STATE_FILE)


def prune(work_dir: Path, keep: int) -> list[Path]:
    """Deletes all but the newest `keep` checkpoints (never a quarantined one) and names the deleted."""
    gone = list(_folders(work_dir))[:-keep] if keep > 0 else []
    for folder in gone:
        # Out of its final name first: a crash in the middle must leave no half of a checkpoint under that name.
        doomed = folder.with_name(f".{folder.name}.partial-gone")
        if doomed.exists():
            shutil.rmtree(doomed)
        folder.rename(doomed)
        shutil.rmtree(doomed)
    return gone


# ---------------------------------------------------------------------------------------------------------------------
# reading
# ---------------------------------------------------------------------------------------------------------------------


def read_state(folder: Path) -> CheckpointState:
    """state.json of a checkpoint folder.

    Raises:
        CheckpointError: missing, not JSON, or not of this format.
    """
    return _read_state_and_files(folder)[0]


def _read_state_and_files(folder: Path) -> tuple[CheckpointState, dict[str, Any]]:
    path = folder / STATE_FILE
    try:
        value = json.loads(path.read_bytes())
        if value["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {value['format']}, this version reads {FORMAT}; update paris-swarm"
            )
        names = {"step", "steps", "seed", "recipe", "parent", "probe_loss", "losses", "rng"}
        fields = {name: value[name] for name in names}
        if not isinstance(fields["step"], int) or fields["step"] < 0:
            raise CheckpointError(f"{path}: step must be a whole number, got {fields['step']!r}")
        facts = value.get("facts", {})  # written since 2026-11
        if not isinstance(facts, dict):
            raise CheckpointError(f"{path}: facts must be an object, got {facts!r:.80}")
        state = CheckpointState(**{**fields, "losses": tuple(fields["losses"])}, facts=facts)
        return state, dict(value["files"])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no checkpoint state: {error!r}") from error


def _problem(folder: Path) -> str | None:
    """What is wrong with a folder, or None. Every byte is read: a checkpoint is small beside the run it carries."""
    try:
        _, files = _read_state_and_files(folder)
    except CheckpointError as error:
        return str(error)
    for name in WEIGHT_FILES:
        path = folder / name
        if name not in files:
            return f"{folder / STATE_FILE} does not mention {name}"
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != files[name].get("length"):
            return f"{path} has {path.stat().st_size} bytes, state.json says {files[name].get('length')}"
        if digest_file(path) != files[name].get("blake3"):
            return f"{path} does not have the digest state.json says"
    return None


def _folders(work_dir: Path) -> Iterator[Path]:
    parent = work_dir / "checkpoints"
    if parent.is_dir():
        yield from sorted(
            path for path in parent.iterdir() if path.is_dir() and path.name.startswith("step-") and path.suffix == ""
        )


@dataclass(frozen=True)
class TornCheckpoint:
    """A checkpoint that was found damaged: where it lies now, and why it was set aside."""

    folder: Path
    reason: str


def newest_whole(work_dir: Path) -> tuple[Path | None, tuple[TornCheckpoint, ...]]:
    """The newest undamaged checkpoint of a work folder, and the newer ones that had to be set aside.

    Leftovers of writes and deletions that a crash cut short are removed: they have no final name.
    """
    parent = work_dir / "checkpoints"
    if parent.is_dir():
        for draft in parent.glob(".step-*.partial-*"):
            shutil.rmtree(draft, ignore_errors=True)
    torn: list[TornCheckpoint] = []
    for folder in reversed(list(_folders(work_dir))):
        reason = _problem(folder)
        if reason is None:
            return folder, tuple(torn)
        torn.append(TornCheckpoint(quarantine(folder), reason))
    return None, tuple(torn)


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must be exactly those of `expected`: names, shapes and dtypes (float32
    also where float64 is expected; it is given as it is).

    Raises:
        CheckpointError: anything differs, or the file cannot be read; the message names the tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            missing, extra = sorted(set(expected) - names), sorted(names - set(expected))
            if missing or extra:
                raise CheckpointError(
                    f"{path} holds other tensors than the recipe: missing {missing[:5]}, unexpected {extra[:5]}"
                )
            out = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    for name, tensor in out.items():
        want = expected[name]
        widened = tensor.dtype == torch.float32 and want.dtype == torch.float64  # an audit's reference run
        if tensor.shape != want.shape or not (tensor.dtype == want.dtype or widened):
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"the recipe says {want.dtype} {list(want.shape)}"
            )
    return out


def load_weights(model: nn.Module, path: Path) -> None:
    """Weights of `model` from a safetensors file, strictly.

    Raises:
        CheckpointError: names, shapes or dtypes differ; the model is left as it was.
    """
    own = model.state_dict()
    tensors = read_tensors(path, own)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


# ---------------------------------------------------------------------------------------------------------------------
# the table in the plan
# ---------------------------------------------------------------------------------------------------------------------


def tensor_table(tensors: Mapping[str, Tensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, safetensors dtype, shape) of each tensor, sorted by name."""
    return sorted((name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items())
