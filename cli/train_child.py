"""The trainer process: `python -m paris_swarm.cli.train_child JOB.json`. Prints JSON lines; opens no socket.

Ends with a last checkpoint on SIGTERM, and when its standard input closes (the peer is gone, however it died). With
`processes` above 1 it starts the others (`JOB.json RANK MEETING`), which share each batch with it; those talk to each
other over loopback, and to nobody else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from paris_swarm.expert.training import CheckpointReport


def main(job_path: str, rank: int = 0, meeting: str | None = None) -> int:
    """Run the job, as its first process or one of its fellows; returns the exit code."""
    job = json.loads(Path(job_path).read_text("utf-8"))
    stop = threading.Event()
    # A fellow follows the first process's word, so that all end after the same step.
    signal.signal(signal.SIGTERM, (lambda *_: stop.set()) if rank == 0 else signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    words = _own_words()
    on_end = stop.set if rank == 0 else (lambda: os._exit(1))
    threading.Thread(target=_watch_parent, args=(on_end,), daemon=True).start()
    if rank == 0:  # its fellows inherit it
        os.nice(5)  # the machine's owner and the node come first

    import torch

    from paris_swarm.cli.fellows import Fellows
    from paris_swarm.cli.plan_folder import open_plan_folder
    from paris_swarm.cli.tasks import build_task
    from paris_swarm.cli.training_log import open_log
    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.expert.devices import pick_device
    from paris_swarm.expert.processes import Alone, Joined
    from paris_swarm.expert.training import (
        CheckpointReport,
        DoneReport,
        ResumeReport,
        StepReport,
        StepSettings,
        TornReport,
        TrainJob,
        train,
    )

    # Subnormal numbers cost a CPU a hundred times a normal one; this changes the whole process, so only a process of
    # our own may do it.
    torch.set_flush_denormal(True)
    if job["deterministic"]:
        torch.use_deterministic_algorithms(True)
    fellows = Fellows(job_path, job["processes"]) if rank == 0 and job["processes"] > 1 else None
    joined = None
    if job["processes"] > 1:
        place = fellows.meeting if fellows is not None else Path(str(meeting))
        joined = Joined(rank, job["processes"], place, pick_device(job["device"]))
    plan_folder = open_plan_folder(Path(job["plan_folder"]), plan_id=job["plan_id"])
    plan_folder = replace(plan_folder, brought=tuple(map(Path, job["start_from"])))
    task = build_task(plan_folder, PreparedData.open(Path(job["data"])), job["slot"])
    reports = train(
        TrainJob(
            task,
            Path(job["work"]),
            resume=Path(job["resume"]) if job["resume"] else None,
            parent=job["parent"],
            checkpoint_every_s=job["checkpoint_every_s"],
            threads=job["threads"] or None,
            device=job["device"],
            until=job["until"],
            precision=job["precision"],
            keep=job["keep"],
            settings=StepSettings(
                # A reference run in float64 is slow whatever is done, and must not round otherwise.
                job["micro_batch"],
                job["recompute"],
                job["compiled"] and job["precision"] != "fp64",
            ),
            processes=joined or Alone(),
            stop=stop.is_set,
        )
    )
    log = open_log(job["metrics"], Path(job["work"])) if rank == 0 else None
    for report in reports:
        if rank != 0:
            continue
        if isinstance(report, StepReport):
            if log is not None:
                log.step(report)
            _say(
                words,
                "progress",
                step=report.step,
                steps=report.steps,
                loss=report.loss,
                images_per_s=report.images_per_s,
                step_s=task.recipe.train.batch / report.images_per_s,
                rate=report.rate,
                loss_by_time=report.by_time,
            )
        elif isinstance(report, CheckpointReport):
            if log is not None:
                log.checkpoint(report)
            _say_checkpoint(words, report)
        elif isinstance(report, ResumeReport):
            if log is not None:
                log.steps_from(report.step)
            _say(words, "resume", step=report.step, folder=str(report.folder))
            if report.left is not None:  # its peer may have died before it was published
                _say_checkpoint(words, report.left)
        elif isinstance(report, TornReport):
            _say(words, "torn", folder=str(report.folder), reason=report.reason)
            sys.stderr.write(f"set aside {report.folder}: {report.reason}\n")
        elif isinstance(report, DoneReport):
            _say(words, "stopped" if report.stopped else "done", step=report.step)
    if log is not None:
        log.close()
    if joined is not None:
        joined.leave()
    if fellows is not None:
        fellows.end()
    return 0


def _own_words() -> TextIO:
    """Where the peer listens: standard output as it was. From here on what libraries print there goes to the log."""
    words = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return words


def _say(words: TextIO, event: str, **values: Any) -> None:
    words.write(json.dumps({"event": event, **values}) + "\n")
    words.flush()


def _say_checkpoint(words: TextIO, report: CheckpointReport) -> None:
    _say(
        words,
        "checkpoint",
        step=report.step,
        steps=report.steps,
        folder=str(report.folder),
        files=sorted(path.name for path in report.folder.iterdir()),
        probe_loss=report.probe_loss,
        facts=report.facts,
        seconds=report.seconds,
    )


def _watch_parent(on_end: Callable[[], object]) -> None:
    """Standard input closes when the parent process ends; nothing is ever sent on it.

    Read below Python's buffer: a thread that waits inside it makes the interpreter abort when the run is over.
    """
    while os.read(sys.stdin.fileno(), 1):
        pass
    on_end()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
    sys.exit(main(sys.argv[1]))
