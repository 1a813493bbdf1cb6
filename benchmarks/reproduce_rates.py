"""`benchmarks/reproduce.py OUT --rates`: the same learning rates tried on both sides, before anything is compared.

Short runs of the dense model and of two experts, every rate of the recipe times each of `FACTORS`, all with a seed that
no cell uses; the factor with the smallest held-out loss is what a side's `*_rates` of the scale should say.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from reproduce_cells import World, write_json
from reproduce_grid import DENSE, Arm, Scale, faster

from paris_swarm.expert.rows import Rows, select_rows
from paris_swarm.expert.task import ExpertTask
from paris_swarm.expert.training import StepReport, TrainJob, train

FACTORS = (0.5, 1.0, 2.0, 4.0)
SHARE = 3
"""A short run has the scale's steps over this."""
SEED = 1000

Own = Callable[[Path, str], AbstractContextManager[bool]]


@dataclass(frozen=True)
class Trial:
    """One short run: cluster `slot` of `arm`, its rates times `factor`."""

    arm: Arm
    slot: int
    factor: float

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.slot}-times-{self.factor:g}"

    def done(self, out: Path) -> Path:
        return out / "rates" / f"{self.name}.json"


def trials(scale: Scale) -> Iterator[Trial]:
    """The longest first: one dense model, then the first two experts of the first K."""
    for factor in FACTORS:
        yield Trial(Arm(DENSE, 1), 0, factor)
    for slot in range(2):
        for factor in FACTORS:
            yield Trial(Arm("encoder", scale.clusters[0]), slot, factor)


def run_trial(world: World, trial: Trial) -> None:
    """Trains one short run and writes its held-out loss."""
    scale, manifest = world.scale, world.data.manifest
    labels = world.labels(trial.arm)
    if trial.arm.partition == DENSE:
        recipe = scale.dense_recipe(SEED, manifest)
        used = scale.dense_rates
    else:
        recipe = scale.expert_recipe(trial.arm.clusters, SEED, manifest)
        used = scale.expert_rates
    # The recipe's own rates hold the scale's factor already.
    short = replace(faster(recipe.train, trial.factor / used), steps=max(1, scale.train.steps // SHARE))
    rows = Rows(world.data, select_rows(world.data, labels, trial.slot, world.digests))
    task = ExpertTask(replace(recipe, train=short), rows, world.probe(trial.arm, trial.slot))
    folder = world.out / "rates" / trial.name
    job = TrainJob(task, folder, checkpoint_every_s=120.0, keep=1, report_every_s=30.0, device="cpu", precision="fp32")
    done: Any = None
    for done in train(job):
        if isinstance(done, StepReport):
            world.say(f"{trial.name}: {done.step}/{done.steps} loss {done.loss:.4f}")
    loss = json.loads((done.folder / "state.json").read_text())["probe_loss"]
    write_json(trial.done(world.out), {"factor": trial.factor, "held_out_loss": loss, "steps": short.steps})


def work(scale: Scale, data: Path, out: Path, own: Own, say: Callable[[str], None]) -> None:
    """One worker: every trial that is not done and that nobody else has in hand."""
    torch.set_num_threads(1)
    world = World(scale, data, out, say)
    for trial in trials(scale):
        with own(out, f"rates-{trial.name}") as mine:
            if mine and not trial.done(out).is_file():
                run_trial(world, trial)


def run(scale: Scale, data: Path, out: Path, *, workers: int, own: Own, say: Callable[[str], None]) -> None:
    """All trials, then the table.

    Raises:
        RuntimeError: a worker failed; its own error stands above.
    """
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=work, args=(scale, data, out, own, say)) for _ in range(workers)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    if any(process.exitcode for process in running):
        raise RuntimeError(f"a worker failed: exit codes {[process.exitcode for process in running]}")
    print(table(scale, out))


def table(scale: Scale, out: Path) -> str:
    """Held-out loss by factor, as Markdown; empty where the trials were not run.

    The experts' column is the mean over the experts tried.
    """
    found: dict[tuple[str, float], list[float]] = {}
    for trial in trials(scale):
        if trial.done(out).is_file():
            said = json.loads(trial.done(out).read_text())["held_out_loss"]
            found.setdefault((trial.arm.name, trial.factor), []).append(said)
    if not found:
        return ""
    names = list(dict.fromkeys(trial.arm.name for trial in trials(scale)))
    lines = [f"| rates times | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for factor in FACTORS:
        cells = (found.get((name, factor), []) for name in names)
        shown = (f"{sum(values) / len(values):.4f}" if values else "-" for values in cells)
        lines.append(f"| {factor:g} | {' | '.join(shown)} |")
    return "\n".join(lines)
