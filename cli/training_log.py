"""The course of a training run on disk, for people who watch a run for weeks: JSON lines or TensorBoard event files.

Written by the trainer process beside its checkpoints. A run that was killed continues from its last checkpoint and
writes the steps since then once more; the later line is the one that holds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from paris_swarm.expert.training import CheckpointReport, StepReport

EVERY_S = 10.0
LOG_NAME = "training.jsonl"
EVENTS_NAME = "tensorboard"


class Writer(Protocol):
    """Where rows of numbers go."""

    def write(self, step: int, values: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One object a line: `step`, `unix_s`, and the values; appended to WORK/training.jsonl."""

    def __init__(self, work: Path, clock: Callable[[], float] = time.time) -> None:
        path = work / LOG_NAME
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")  # by a crash in the middle of a line
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115 (lives as long as the run)
        self._file.write("\n" if torn else "")
        self._clock = clock

    def write(self, step: int, values: dict[str, Any]) -> None:
        line = {"step": step, "unix_s": round(self._clock(), 3), **values}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars under WORK/tensorboard; the loss by time as `loss_by_time/0.0-0.1` and so on.

    Raises:
        ImportError: tensorboard is not installed; the message says how to get it.
    """

    def __init__(self, work: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "--metrics tensorboard needs tensorboard: pip install 'paris-swarm[tensorboard]'"
            ) from error
        self._writer: Any = SummaryWriter(str(work / EVENTS_NAME))

    def write(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name != "loss_by_time":
                self._writer.add_scalar(name, value, step)
                continue
            for index, (mean, rows) in enumerate(value):
                if rows:
                    low, high = index / len(value), (index + 1) / len(value)
                    self._writer.add_scalar(f"loss_by_time/{low:.1f}-{high:.1f}", mean, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class TrainingLog:
    """Gathers step reports and writes their means every `every_s` seconds of training."""

    def __init__(self, writer: Writer, every_s: float = EVERY_S) -> None:
        self._writer = writer
        self._every_s = every_s
        self._gathered: list[tuple[int, StepReport]] = []
        self._last_step: int | None = None
        self._written_s = 0.0

    def steps_from(self, step: int) -> None:
        """Where training starts."""
        self._last_step = step

    def step(self, report: StepReport) -> None:
        """Takes in a report; a row is written when it is due."""
        taken = report.step - (self._last_step if self._last_step is not None else 0)
        self._last_step = report.step
        self._gathered.append((max(taken, 1), report))
        if report.seconds - self._written_s >= self._every_s or report.step == report.steps:
            self.flush()

    def flush(self) -> None:
        """Writes what has been gathered."""
        if not self._gathered:
            return
        last = self._gathered[-1][1]
        steps = sum(taken for taken, _ in self._gathered)
        seconds = sum(taken / report.images_per_s for taken, report in self._gathered if report.images_per_s)
        by_time = []
        for bins in zip(*(report.by_time for _, report in self._gathered), strict=True):
            rows = sum(count for _, count in bins)
            total = sum(mean * count for mean, count in bins if mean is not None)
            by_time.append([total / rows if rows else None, rows])
        values = {
            "loss": sum(taken * report.loss for taken, report in self._gathered) / steps,
            "images_per_s": steps / seconds if seconds else 0.0,
            "learning_rate_share": last.rate,
            "loss_by_time": by_time,
        }
        self._writer.write(last.step, values)
        self._gathered.clear()
        self._written_s = last.seconds

    def checkpoint(self, report: CheckpointReport) -> None:
        """Writes a checkpoint's probe loss."""
        self.flush()
        self._writer.write(report.step, {"probe_loss": report.probe_loss})

    def close(self) -> None:
        """Writes the rest."""
        self.flush()
        self._writer.close()


def open_log(kind: str, work: Path) -> TrainingLog | None:
    """The log of a run in `work`: "jsonl", "tensorboard", or None for "none".

    Raises:
        ImportError: tensorboard is asked for and not installed.
        ValueError: no such kind.
    """
    if kind == "none":
        return None
    if kind == "jsonl":
        return TrainingLog(JsonLines(work))
    if kind == "tensorboard":
        return TrainingLog(TensorBoard(work))
    raise ValueError(f"metrics must be none, jsonl or tensorboard, not {kind!r}")
