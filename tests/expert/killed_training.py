"""A training process killed (SIGKILL) at random moments, again and again: `killed_training.py WORK KILLS SEED`.

This process never trains; it forks children that do, for importing torch anew would cost seconds a kill. Each child
continues where the newest whole checkpoint lies and says every step through a pipe; between two children the folder is
looked at. Prints a JSON summary, or ends with an assertion that says what was lost.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import struct
import sys
import time
from pathlib import Path

import torch
from tests.expert.synthetic import small_task

from paris_swarm.expert.checkpoint import _problem
from paris_swarm.expert.step import StepSettings, TrainState, clip_gradients
from paris_swarm.expert.task import ExpertTask
from paris_swarm.expert.training import CheckpointReport, ResumeReport, StepReport, TornReport, TrainJob, train

INTERVAL = 5
KEEP = 3
RESUMED, STEP, SAVED, TORN = range(4)
RECORD = struct.Struct("<BQ")


def job(work: Path, until: int | None) -> TrainJob:
    return TrainJob(
        small_task("residual", optimizer="muon", steps=1_000_000, batch=8),
        work,
        until=until,
        checkpoint_every_steps=INTERVAL,
        keep=KEEP,
        report_every_s=0.0,
        settings=StepSettings(micro_batch=4),
        threads=1,
    )


def child(work: Path, out: int, until: int | None) -> None:
    """Trains for ever (or to `until`), saying what it does."""
    for report in train(job(work, until)):
        if isinstance(report, ResumeReport):
            os.write(out, RECORD.pack(RESUMED, report.step))
        elif isinstance(report, StepReport):
            os.write(out, RECORD.pack(STEP, report.step))
        elif isinstance(report, CheckpointReport):
            os.write(out, RECORD.pack(SAVED, report.step))
        elif isinstance(report, TornReport):
            os.write(out, RECORD.pack(TORN, 0))


def live(
    work: Path, seconds: float | None, until: int | None = None, *, from_birth: bool = False
) -> list[tuple[int, int]]:
    """One child's life: killed `seconds` after its first word (or its birth), or left to its end (None). Gives all
    that it said.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        code = 1
        try:
            child(work, writing, until)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    said = b""
    deadline = time.monotonic() + seconds if seconds is not None and from_birth else None
    killed = False
    while True:
        if deadline is not None and not killed and time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            killed = True
        left = None if deadline is None or killed else max(0.0, deadline - time.monotonic())
        if select.select([reading], [], [], left)[0]:
            part = os.read(reading, 1 << 16)
            if not part:
                break
            said += part
            if deadline is None and seconds is not None:
                deadline = time.monotonic() + seconds
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    if seconds is None:
        assert status == 0, f"the undisturbed child ended with status {status}"
    whole = len(said) // RECORD.size * RECORD.size
    return [RECORD.unpack_from(said, at) for at in range(0, whole, RECORD.size)]


def warm_up(task: ExpertTask) -> None:
    """Once here instead of in every child: all that is imported late. No backward pass: after one, torch's autograd
    refuses to work in a forked child.
    """
    state = TrainState(task, torch.device("cpu"))
    with torch.no_grad():
        task.losses(state.model, task.draw(task.batch(0), torch.Generator().manual_seed(0)))
    for weight in state.model.parameters():
        weight.grad = torch.zeros_like(weight)
    clip_gradients(list(state.model.parameters()), 1.0)
    state.optimiser.step(1.0)
    task.probe(state.ema)


def main(work: Path, kills: int, seed: int) -> dict[str, object]:
    """Kills `kills` times; afterwards one child trains on undisturbed to a step that a straight run can be held to."""
    torch.set_num_threads(1)
    warm_up(job(work, None).task)
    dice = random.Random(seed)
    reached = saved = 0
    lost: list[int] = []
    during_writing = 0
    for _ in range(kills):
        words = live(work, dice.uniform(0.0, 0.6), from_birth=dice.random() < 0.1)
        resumed = next((step for kind, step in words if kind == RESUMED), 0)
        assert not any(kind == TORN for kind, _ in words), "a checkpoint was found torn"
        if any(kind in (RESUMED, STEP) for kind, _ in words):
            assert reached - resumed <= INTERVAL, f"step {reached} was reached, training went on at {resumed}"
            assert resumed >= saved, f"step {saved} was saved, training went on at {resumed}"
            lost.append(reached - resumed)
            reached = max((step for kind, step in words if kind == STEP), default=resumed)
            saved = max([saved, *(step for kind, step in words if kind == SAVED)])
        folders = sorted((work / "checkpoints").glob("step-*")) if (work / "checkpoints").is_dir() else []
        for folder in folders:
            assert _problem(folder) is None, f"{folder} is damaged: {_problem(folder)}"
        assert len(folders) >= min(KEEP, saved // INTERVAL), f"only {[f.name for f in folders]} are left"
        during_writing += any((work / "checkpoints").glob(".step-*")) if folders else 0
    end = reached + INTERVAL
    live(work, None, end)
    return {
        "kills": kills,
        "steps": end,
        "interval": INTERVAL,
        "most_steps_lost": max(lost, default=0),
        "mean_steps_lost": round(sum(lost) / max(len(lost), 1), 2),
        "kills_during_writing": during_writing,
        "folder": str(work / "checkpoints" / f"step-{end:08d}"),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))) + "\n")
