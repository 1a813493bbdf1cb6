"""The trainer process, seen from the peer: started with a JSON job, read as JSON lines, stopped by SIGTERM.

Training runs in its own process so that torch threads, a crash or an out-of-memory kill never touch the node, and so
that isolation can be seen from outside: the child opens no socket (docs/architecture.md, "Isolation").
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paris_swarm.swarm.trainer import TrainedCheckpoint, TrainerEvent, TrainFailed, TrainProgress

STOP_SECONDS = 30.0
LINE_LIMIT = 1 << 20


@dataclass(frozen=True)
class TrainJobFile:
    """What the child is told. Paths are absolute; ``threads`` 0 leaves torch's own default.

    ``until``, ``precision`` and ``keep`` (checkpoints on disk) are those of `expert.training.TrainJob`.
    """

    plan_folder: str
    plan_id: str
    data: str
    slot: str
    work: str
    resume: str | None
    parent: str | None
    device: str
    threads: int
    checkpoint_every_s: float
    until: int | None = None
    precision: str = "auto"
    keep: int = 2

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")


class TrainerProcess:
    """A running child; implements `swarm.trainer.Trainer`."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    @classmethod
    async def start(cls, job: TrainJobFile) -> TrainerProcess:
        work = Path(job.work)
        path = work / "job.json"
        job.write(path)
        log = work / "trainer.log"
        with open(log, "ab") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "paris_swarm.cli.train_child",
                str(path),
                stdin=asyncio.subprocess.PIPE,  # closes when we die, however we die: the child then ends too
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                limit=LINE_LIMIT,
                env={**os.environ, "OMP_NUM_THREADS": str(job.threads)} if job.threads else None,
                start_new_session=True,  # Ctrl-C reaches the peer, which then asks the child for a last checkpoint
            )
        return cls(process, log)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def events(self) -> AsyncIterator[TrainerEvent]:
        assert self._process.stdout is not None
        finished = False
        async for line in self._process.stdout:
            report = json.loads(line)
            finished = finished or report["event"] in ("done", "stopped")
            event = _event(report)
            if event is not None:
                yield event
        code = await self._process.wait()
        if not finished and code not in (0, -signal.SIGTERM):
            yield TrainFailed(f"the trainer ended with code {code}: {_last_line(self._log)} (whole log: {self._log})")

    async def stop(self) -> None:
        if self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(asyncio.shield(self._process.wait()), STOP_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def _event(report: dict[str, Any]) -> TrainerEvent | None:
    if report["event"] == "progress":
        return TrainProgress(report["step"], report["steps"], report["loss"], report["images_per_s"])
    if report["event"] == "checkpoint":
        return TrainedCheckpoint(
            report["step"], Path(report["folder"]), tuple(report["files"]), report["probe_loss"], report["facts"]
        )
    return None


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").strip().splitlines() if log.exists() else []
    return lines[-1][:300] if lines else "no message"
