"""The training loop, for any task: a generator of frozen reports that neither prints nor knows the network.

    for report in train(TrainJob(task, work_dir, stop=should_stop)):
        ...

Every step's rows and randomness follow from (seed, step), so a run killed at any moment continues from its newest
whole checkpoint to the same bits as one that was never killed (on the same kind of machine, with the same threads).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paris_swarm.expert.checkpoint import (
    CheckpointError,
    CheckpointState,
    checkpoint_folder,
    load_weights,
    newest_whole,
    prune,
    read_state,
    read_tensors,
    save_checkpoint,
    tensor_table,
)
from paris_swarm.expert.optim import Optimiser
from paris_swarm.expert.provenance import PRECISIONS, training_facts
from paris_swarm.expert.task import Task

KEPT_LOSSES = 200


# ---------------------------------------------------------------------------------------------------------------------
# records
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepReport:
    """`step` of `steps` are done; `loss` and speed are means since the last report, `seconds` count from the start."""

    step: int
    steps: int
    loss: float
    images_per_s: float
    seconds: float


@dataclass(frozen=True)
class CheckpointReport:
    """A whole checkpoint lies in `folder`. `probe_loss` is that of its EMA weights; `parent` the root it grew from.

    facts: what the manifest will say of its training (`provenance.training_facts`); empty for a reference run.
    """

    step: int
    steps: int
    folder: Path
    probe_loss: float
    parent: str | None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ResumeReport:
    """Training continues from `folder` at `step`."""

    step: int
    folder: Path


@dataclass(frozen=True)
class TornReport:
    """A damaged checkpoint was set aside: where it lies now, and why."""

    folder: Path
    reason: str


@dataclass(frozen=True)
class DoneReport:
    """The loop ended at `step`: its schedule is over, or it was asked to end (`stopped`). `folder` holds the state."""

    step: int
    steps: int
    folder: Path
    stopped: bool


Report = StepReport | CheckpointReport | ResumeReport | TornReport | DoneReport


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite: the last checkpoint is sound, the recipe's rates are too high for this data."""


@dataclass(frozen=True)
class TrainJob:
    """One run.

    resume: a checkpoint folder to start from unless the work folder has one at least as far (a successor's download);
    `parent` is then that checkpoint's root. until: the step to end at, None for the end of the schedule.
    checkpoint_every_s and checkpoint_every_steps: whichever comes first, None for never; the last step always has one.
    keep: checkpoints left on disk. threads: torch threads of this process, None leaves them. precision:
    "auto" is bf16 where the hardware multiplies it natively, else fp32; "fp64" keeps weights and optimiser in float64,
    an audit's reference (audit.py). clock: seconds, monotonic.
    """

    task: Task
    work_dir: Path
    resume: Path | None = None
    parent: str | None = None
    until: int | None = None
    checkpoint_every_s: float | None = None
    checkpoint_every_steps: int | None = None
    keep: int = 2
    report_every_s: float = 1.0
    threads: int | None = None
    device: str = "auto"
    precision: str = "auto"
    stop: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.monotonic


# ---------------------------------------------------------------------------------------------------------------------
# devices, precision, randomness
# ---------------------------------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "mps" as a device.

    Raises:
        ValueError: not one of these, or not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if there["cuda"] else "mps" if there["mps"] else "cpu")
    if name not in there:
        raise ValueError(f"no device is called {name!r}; choose auto, cpu, cuda or mps")
    if not there[name]:
        raise ValueError(f"this machine, or this build of torch, has no {name}; choose auto or cpu")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """ "auto", "fp32", "bf16" or "fp64" as a dtype. bf16 (of matrix products only) is emulated, slowly, on most CPUs.

    Raises:
        ValueError: not one of these.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        return torch.bfloat16 if native else torch.float32
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
    if name not in known:
        raise ValueError(f"no precision is called {name!r}; choose auto, fp32, bf16 or fp64")
    return known[name]


def step_seed(seed: int, step: int) -> int:
    """The 63-bit seed of one step's generator."""
    digest = hashlib.blake2b(f"paris-swarm step {seed} {step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# ---------------------------------------------------------------------------------------------------------------------
# the run's state
# ---------------------------------------------------------------------------------------------------------------------


class TrainState:
    """Everything a checkpoint holds: weights, their average, the optimiser, the step.

    wide: all of it in float64. Batches and noise stay the float32 numbers they always are and are widened on their way
    into the model, so a wide run takes the same steps with less rounding.
    """

    def __init__(self, task: Task, device: torch.device, *, wide: bool = False) -> None:
        self.task = task
        self.device = device
        self.config = task.recipe.train
        self.model = task.build_model().to(device)
        self.ema = task.build_model().to(device).requires_grad_(False)
        if wide:
            for model in (self.model, self.ema):
                model.to(torch.float64).register_forward_pre_hook(_widen)
        self.optimiser = Optimiser(self.model, self.config)
        self.step = 0
        self._weights = list(self.model.parameters())
        self._average = list(self.ema.parameters())

    def take_step(self, precision: torch.dtype) -> Tensor:
        """One optimiser step and one EMA update; gives the loss (a detached scalar on the device)."""
        batch = self.task.batch(self.step).to(self.device)
        generator = torch.Generator(self.device).manual_seed(step_seed(self.config.seed, self.step))
        mixed: AbstractContextManager[object] = nullcontext()
        if precision is torch.bfloat16:
            mixed = torch.autocast(self.device.type, dtype=precision)
        with mixed:
            loss = self.task.loss(self.model, batch, generator)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.grad_clip:
            nn.utils.clip_grad_norm_(self._weights, self.config.grad_clip, foreach=True)
        self.optimiser.step(self.config.rate(self.step))
        decay = self.config.ema_decay(self.step)
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._weights, 1 - decay)
        self.step += 1
        return loss.detach()

    def load(self, folder: Path) -> CheckpointState:
        """Continues from a checkpoint folder.

        Raises:
            CheckpointError: not of this recipe, or damaged.
        """
        state = read_state(folder)
        if state.recipe != self.task.recipe.digest():
            raise CheckpointError(f"{folder} was trained with another recipe ({state.recipe[:12]}...)")
        optimizer = read_tensors(folder / "optimizer.safetensors", self.optimiser.state())
        load_weights(self.model, folder / "model.safetensors")
        load_weights(self.ema, folder / "ema.safetensors")
        self.optimiser.load(optimizer, state.step)
        self.step = state.step
        return state


def _widen(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.double() if part.dtype == torch.float32 else part for part in inputs)


def checkpoint_tables(task: Task) -> dict[str, list[tuple[str, str, tuple[int, ...]]]]:
    """For the plan: file name -> (tensor name, dtype, shape) of every safetensors file of the task's checkpoints."""
    state = TrainState(task, torch.device("cpu"))
    weights = tensor_table(state.model.state_dict())
    return {
        "ema.safetensors": weights,
        "model.safetensors": weights,
        "optimizer.safetensors": tensor_table(state.optimiser.state()),
    }


# ---------------------------------------------------------------------------------------------------------------------
# the loop
# ---------------------------------------------------------------------------------------------------------------------


def train(job: TrainJob) -> Iterator[Report]:
    """Runs `job` to the end of its schedule, or until `job.stop()` says so, reporting on the way.

    Raises:
        CheckpointError: the checkpoint to continue from is not of this recipe.
        TrainingDiverged: the loss became infinite or NaN.
        ValueError: the device or precision does not exist.
        OSError: a checkpoint could not be written.
    """
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    device = pick_device(job.device)
    precision = pick_precision(job.precision, device)
    state = TrainState(job.task, device, wide=precision is torch.float64)
    steps = state.config.steps
    end = steps if job.until is None else min(steps, job.until)
    losses: list[float] = []
    parent = job.parent

    own, torn = newest_whole(job.work_dir)
    yield from (TornReport(item.folder, item.reason) for item in torn)
    if own is not None and job.resume is not None and read_state(own).step < read_state(job.resume).step:
        own = None  # a successor that once trained this slot: what it fetched is further than what it left
    start = own or job.resume
    if start is not None:
        loaded = state.load(start)
        losses = list(loaded.losses)
        parent = loaded.parent if own is not None else job.parent
        yield ResumeReport(state.step, start)

    begun = last_report = last_save = job.clock()
    saved_step = state.step if own is not None else -1
    reported_step, pending = state.step, torch.zeros((), device=device)
    stopped = False
    facts = training_facts(job.task, device, precision) if precision in PRECISIONS else {}
    while state.step < end:
        stopped = job.stop()
        if stopped:
            break
        pending = pending + state.take_step(precision)
        now = job.clock()
        final = state.step == end
        if final or now - last_report >= job.report_every_s:
            mean = float(pending) / (state.step - reported_step)
            if not math.isfinite(mean):
                raise TrainingDiverged(f"the loss is {mean} at step {state.step}")
            losses = [*losses, mean][-KEPT_LOSSES:]
            speed = (state.step - reported_step) * state.config.batch / max(now - last_report, 1e-9)
            yield StepReport(state.step, steps, mean, speed, now - begun)
            last_report, reported_step, pending = now, state.step, torch.zeros((), device=device)
        due = job.checkpoint_every_s is not None and now - last_save >= job.checkpoint_every_s
        due = due or (job.checkpoint_every_steps is not None and state.step % job.checkpoint_every_steps == 0)
        if due and not final:
            yield _save(job, state, losses, parent, facts)
            last_save, saved_step = job.clock(), state.step
    if saved_step != state.step:
        report = _save(job, state, losses, parent, facts)
        yield report
        folder = report.folder
    else:
        folder = checkpoint_folder(job.work_dir, state.step)
    yield DoneReport(state.step, steps, folder, stopped)


def _save(
    job: TrainJob, state: TrainState, losses: list[float], parent: str | None, facts: dict[str, Any]
) -> CheckpointReport:
    probe_loss = job.task.probe(state.ema)
    if not math.isfinite(probe_loss):
        raise TrainingDiverged(f"the probe loss is {probe_loss} at step {state.step}")
    record = CheckpointState(
        step=state.step,
        steps=state.config.steps,
        seed=state.config.seed,
        recipe=job.task.recipe.digest(),
        parent=parent,
        probe_loss=probe_loss,
        losses=tuple(losses),
    )
    folder = save_checkpoint(
        job.work_dir,
        record,
        ema=state.ema.state_dict(),
        model=state.model.state_dict(),
        optimizer=state.optimiser.state(),
    )
    prune(job.work_dir, job.keep)
    return CheckpointReport(state.step, state.config.steps, folder, probe_loss, parent, facts)


__all__ = [
    "CheckpointReport",
    "DoneReport",
    "Report",
    "ResumeReport",
    "StepReport",
    "TornReport",
    "TrainJob",
    "TrainState",
    "TrainingDiverged",
    "checkpoint_tables",
    "pick_device",
    "pick_precision",
    "step_seed",
    "train",
]
