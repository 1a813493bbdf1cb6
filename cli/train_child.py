"""The trainer process: `python -m paris_swarm.cli.train_child JOB.json`. Prints JSON lines; opens no socket.

Ends with a last checkpoint on SIGTERM, and when its standard input closes (the peer is gone, however it died).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def main(job_path: str) -> int:
    """Run the job; returns the exit code."""
    job = json.loads(Path(job_path).read_text("utf-8"))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch_parent, args=(stop,), daemon=True).start()
    os.nice(5)  # the machine's owner and the node come first

    import torch

    from paris_swarm.cli.plan_folder import open_plan_folder
    from paris_swarm.cli.tasks import build_task
    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.expert.training import (
        CheckpointReport,
        DoneReport,
        ResumeReport,
        StepReport,
        TornReport,
        TrainJob,
        train,
    )

    # Subnormal numbers cost a CPU a hundred times a normal one; this changes the whole process, so only a process of
    # our own may do it.
    torch.set_flush_denormal(True)
    plan_folder = open_plan_folder(Path(job["plan_folder"]), plan_id=job["plan_id"])
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
            stop=stop.is_set,
        )
    )
    for report in reports:
        if isinstance(report, StepReport):
            _say("progress", step=report.step, steps=report.steps, loss=report.loss, images_per_s=report.images_per_s)
        elif isinstance(report, CheckpointReport):
            files = sorted(path.name for path in report.folder.iterdir())
            _say(
                "checkpoint",
                step=report.step,
                steps=report.steps,
                folder=str(report.folder),
                files=files,
                probe_loss=report.probe_loss,
                facts=report.facts,
            )
        elif isinstance(report, ResumeReport):
            _say("resume", step=report.step, folder=str(report.folder))
        elif isinstance(report, TornReport):
            _say("torn", folder=str(report.folder), reason=report.reason)
            sys.stderr.write(f"set aside {report.folder}: {report.reason}\n")
        elif isinstance(report, DoneReport):
            _say("stopped" if report.stopped else "done", step=report.step)
    return 0


def _say(event: str, **values: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


def _watch_parent(stop: threading.Event) -> None:
    """Standard input closes when the peer's process ends; nothing is ever sent on it."""
    while sys.stdin.buffer.read(1):
        pass
    stop.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
