"""The trainer process, seen from the peer: started with a JSON job, read as JSON lines, stopped by SIGTERM.

Training runs in its own process so that torch threads, a crash or an out-of-memory kill never touch the node, and so
that isolation can be seen from outside: the child opens no socket (docs/architecture.md, "Isolation").
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paris_swarm.cli.exits import Usage
from paris_swarm.cli.settings import check_compiler
from paris_swarm.swarm.trainer import TrainedCheckpoint, TrainerEvent, TrainFailed, TrainProgress

STOP_SECONDS = 30.0
"""What a trainer has to end in once it is asked to, beside the time that a step and a checkpoint take."""
UNKNOWN_SAVE_SECONDS = 60.0
"""Granted for a checkpoint as long as none has been seen."""
LINE_LIMIT = 1 << 20


@dataclass(frozen=True)
class TrainerChoices:
    """How this machine trains, as `join` was told.

    ``micro_batch``, ``recompute`` and ``compiled`` are those of `expert.step.StepSettings`; ``processes`` share each
    batch, one to a GPU; ``deterministic`` refuses algorithms that are not; ``metrics``: "none", "jsonl" or
    "tensorboard", kept beside the checkpoints.
    """

    micro_batch: int = 0
    recompute: bool = False
    compiled: bool = False
    processes: int = 1
    deterministic: bool = False
    metrics: str = "none"


def check_choices(choices: TrainerChoices, device: str, batches: Iterable[int]) -> None:
    """Refuse what this machine cannot do before a slot is claimed: a trainer that fails would be laid at the door of
    the checkpoint that it starts from. device: as `pick_device` gave it; batches: those of the slots wanted.

    Raises:
        Usage: which option, and what it needs.
    """
    if choices.processes > 1:
        if importlib.util.find_spec("accelerate") is None:
            raise Usage("--processes needs accelerate: pip install 'paris-swarm[accelerate]'")
        if odd := [batch for batch in batches if batch % choices.processes]:
            raise Usage(
                f"--processes {choices.processes}: a batch of {odd[0]} rows does not divide into {choices.processes} "
                "equal shares"
            )
        if device == "cuda":
            import torch

            if torch.cuda.device_count() < choices.processes:
                raise Usage(f"--processes {choices.processes}: this machine has {torch.cuda.device_count()} GPUs")
    if choices.metrics == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise Usage("--metrics tensorboard needs tensorboard: pip install 'paris-swarm[tensorboard]'")
    if choices.compiled:
        check_compiler()


@dataclass(frozen=True, kw_only=True)
class TrainJobFile(TrainerChoices):
    """What the child is told: this machine's choices, and one slot. Paths are absolute; ``threads`` 0 leaves torch's
    own default.

    ``start_from``: start weights that do not travel with the plan. ``until``, ``precision`` and ``keep`` (checkpoints
    on disk) are those of `expert.training.TrainJob`.
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
    start_from: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")


class TrainerProcess:
    """A running child; implements `swarm.trainer.Trainer`."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self._save_seconds = UNKNOWN_SAVE_SECONDS
        self._step_seconds = 0.0

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
                env=trainer_environment(os.environ, job),
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
            if report["event"] == "progress":
                self._step_seconds = float(report["step_s"])
            if report["event"] == "checkpoint" and report["seconds"]:  # none: an earlier run wrote it
                self._save_seconds = max(float(report["seconds"]), 1.0)
            event = _event(report)
            if event is not None:
                yield event
        code = await self._process.wait()
        if not finished and code not in (0, -signal.SIGTERM):
            yield TrainFailed(f"the trainer ended with code {code}: {_last_line(self._log)} (whole log: {self._log})")

    @property
    def stop_seconds(self) -> float:
        """How long it may take from SIGTERM to the end: two steps and three times what the last checkpoint took."""
        return STOP_SECONDS + 2 * self._step_seconds + 3 * self._save_seconds

    async def stop(self) -> None:
        if self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(asyncio.shield(self._process.wait()), self.stop_seconds)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def allocator_settings() -> dict[str, str]:
    """Environment of a process whose memory allocator keeps what a step frees for the next step.

    A training step frees and takes the same large blocks again and again; glibc would give each of them back to the
    system and have it zeroed (docs/results/train-2026-11.md). Huge pages spare lookups of addresses.
    """
    return {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }


def trainer_environment(own: Mapping[str, str], job: TrainJobFile) -> dict[str, str]:
    """The child's environment: allocator and threads; allocator settings that the caller has made are left alone."""
    out = {**allocator_settings(), **own}
    if job.threads:
        out["OMP_NUM_THREADS"] = str(job.threads)
    if job.deterministic:
        out["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS asks for; elsewhere it says nothing
    return out


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
