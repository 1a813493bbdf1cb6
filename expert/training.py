"""The training loop, for any task: a generator of frozen reports that neither prints nor knows the network.

    for report in train(TrainJob(task, work_dir, stop=should_stop)):
        ...

Every step's rows and randomness follow from (seed, step), so a run killed at any moment continues from its newest
whole checkpoint to the same bits as one that was never killed (on the same kind of machine, with the same threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paris_swarm.expert.checkpoint import (
    CheckpointState,
    checkpoint_folder,
    newest_whole,
    prune,
    read_state,
    save_checkpoint,
    tensor_table,
)
from paris_swarm.expert.devices import pick_device, pick_precision
from paris_swarm.expert.processes import Alone, Processes
from paris_swarm.expert.provenance import PRECISIONS, training_facts
from paris_swarm.expert.step import GivenUp, StepSettings, TrainState, step_seed
from paris_swarm.expert.task import Task

KEPT_LOSSES = 200
BUILT_FOR_TABLES = 1 << 24
"""Parameters of the largest network that is built to read its tensors' shapes."""


# ---------------------------------------------------------------------------------------------------------------------
# records
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepReport:
    """`step` of `steps` are done; `loss` and speed are means since the last report, `seconds` count from the start.

    rate: the multiplier of all learning rates at the last step. by_time: the loss by `step.TIME_BINS` equal bins of t,
    each (mean since the last report, rows); the mean is None where no row fell into the bin.
    """

    step: int
    steps: int
    loss: float
    images_per_s: float
    seconds: float
    rate: float = 1.0
    by_time: tuple[tuple[float | None, int], ...] = ()


@dataclass(frozen=True)
class CheckpointReport:
    """A whole checkpoint lies in `folder`. `probe_loss` is that of its EMA weights; `parent` the root it grew from.

    facts: what the manifest will say of its training (`provenance.training_facts`), and `from_step`, the step since
    which it holds; empty for a reference run. seconds: what probing and writing it took.
    """

    step: int
    steps: int
    folder: Path
    probe_loss: float
    parent: str | None
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class ResumeReport:
    """Training continues from `folder` at `step`.

    left: that checkpoint, where an earlier run in this work folder wrote it: perhaps nobody published it. What was
    trained before and what is trained from here on must not become one link of a chain unless both were trained alike.
    """

    step: int
    folder: Path
    left: CheckpointReport | None = field(default=None, compare=False)


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
    keep: checkpoints left on disk. threads: torch threads of this process, None leaves them. precision: "auto" is the
    recipe's, and where that is "any" bf16 if the hardware multiplies it natively, else fp32; "fp64" keeps weights and
    optimiser in float64, an audit's reference (audit.py). settings: how this machine takes a step. processes: who
    shares the work; those that are not the first yield reports of steps alone. clock: seconds, monotonic.
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
    settings: StepSettings = field(default_factory=StepSettings)
    processes: Processes = field(default_factory=Alone)
    stop: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.monotonic


def checkpoint_tables(task: Task) -> dict[str, list[tuple[str, str, tuple[int, ...]]]]:
    """For the plan: file name -> (tensor name, dtype, shape) of every safetensors file of the task's checkpoints. Of a
    large network nothing but shapes is made.
    """
    # torch's meta kernels take two seconds to import; small networks are sooner built.
    device = torch.device("meta" if task.recipe.model.parameters > BUILT_FOR_TABLES else "cpu")
    with device:
        state = TrainState(task, device, settings=StepSettings(micro_batch=1))  # no batch goes through it
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
    processes = job.processes
    device = processes.device(pick_device(job.device))
    asked = job.task.recipe.train.precision if job.precision == "auto" else job.precision
    precision = pick_precision("auto" if asked == "any" else asked, device)
    state = TrainState(job.task, device, wide=precision is torch.float64, settings=job.settings, processes=processes)
    steps = state.config.steps
    end = steps if job.until is None else min(steps, job.until)
    losses: list[float] = []
    parent = job.parent

    with processes.first_then_others():  # the first sets damaged ones aside, the others then find none
        own, torn = newest_whole(job.work_dir)
    yield from (TornReport(item.folder, item.reason) for item in torn)
    if own is not None and job.resume is not None and read_state(own).step < read_state(job.resume).step:
        own = None  # a successor that once trained this slot: what it fetched is further than what it left
    start = own or job.resume
    facts = training_facts(job.task, device, precision, state) if precision in PRECISIONS else {}
    if start is None:
        state.begin()
        facts = _since(0, facts, {})
    else:
        loaded = state.load(start)
        losses = list(loaded.losses)
        parent = loaded.parent if own is not None else job.parent
        facts = _since(state.step, facts, loaded.facts if own is not None else {})
        yield ResumeReport(state.step, start, None if own is None else _left(own, loaded))

    begun = last_report = last_save = job.clock()
    saved_step = state.step if own is not None else -1
    reported_step, pending = state.step, torch.zeros((), device=device)
    stopped = False
    while state.step < end:
        (stopped,) = processes.agree([job.stop()])
        if stopped:
            break
        try:
            pending = pending + state.take_step(precision, give_up=job.stop)
        except GivenUp:
            stopped = True
            break
        now = job.clock()
        final = state.step == end
        due = job.checkpoint_every_s is not None and now - last_save >= job.checkpoint_every_s
        due = due or (job.checkpoint_every_steps is not None and state.step % job.checkpoint_every_steps == 0)
        report, due = processes.agree([final or now - last_report >= job.report_every_s, due])
        if report:
            taken = state.step - reported_step
            mean = float(processes.mean(pending)) / taken
            if not math.isfinite(mean):
                raise TrainingDiverged(f"the loss is {mean} at step {state.step}")
            losses = [*losses, mean][-KEPT_LOSSES:]
            speed = taken * state.config.batch / max(now - last_report, 1e-9)
            rate = state.config.rate(state.step - 1)
            yield StepReport(state.step, steps, mean, speed, now - begun, rate, _by_time(state))
            last_report, reported_step, pending = now, state.step, torch.zeros((), device=device)
        if due and not final:
            if processes.rank == 0:
                yield _save(job, state, losses, parent, facts)
            last_save, saved_step = job.clock(), state.step
    if saved_step != state.step and processes.rank == 0:
        saved = _save(job, state, losses, parent, facts)
        yield saved
    yield DoneReport(state.step, steps, checkpoint_folder(job.work_dir, state.step), stopped)


def _since(step: int, facts: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """`facts` with the step since which they hold: `step`, or where the run continues one of the same facts, its own.

    Code, hardware, threads or rows may have changed in between; then an audit could train neither part as it was.
    """
    if not facts:
        return {}
    same = {**before, "from_step": None} == {**facts, "from_step": None}
    return {**facts, "from_step": before["from_step"] if same and "from_step" in before else step}


def _left(folder: Path, state: CheckpointState) -> CheckpointReport:
    return CheckpointReport(state.step, state.steps, folder, state.probe_loss, state.parent, dict(state.facts))


def _by_time(state: TrainState) -> tuple[tuple[float | None, int], ...]:
    """The mean loss and the rows of each bin of t over all processes; counting starts anew."""
    sums, rows = (state.processes.mean(state.time_losses) * state.processes.count).tolist()
    state.time_losses.zero_()
    return tuple((total / count if count else None, round(count)) for total, count in zip(sums, rows, strict=True))


def _save(
    job: TrainJob, state: TrainState, losses: list[float], parent: str | None, facts: dict[str, Any]
) -> CheckpointReport:
    begun = job.clock()
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
        facts=facts,
    )
    folder = save_checkpoint(
        job.work_dir,
        record,
        ema=state.ema.state_dict(),
        model=state.model.state_dict(),
        optimizer=state.optimiser.state(),
    )
    prune(job.work_dir, job.keep)
    return CheckpointReport(
        state.step, state.config.steps, folder, probe_loss, parent, facts, seconds=job.clock() - begun
    )


__all__ = [
    "CheckpointReport",
    "DoneReport",
    "Report",
    "ResumeReport",
    "StepReport",
    "StepSettings",
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
