"""What a peer needs from outside its room: a trainer, a judge of checkpoints, and a look at what lies on disk.

The trainer is another process; the judge knows tensors. Both are handed in, so that this room knows neither torch nor
the model.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from paris_swarm.dht_schemas.records import Announcement


@dataclass(frozen=True)
class TrainProgress:
    """Loss and speed at a step, as the trainer reports them."""

    step: int
    steps: int
    loss: float | None
    images_per_s: float


@dataclass(frozen=True)
class TrainedCheckpoint:
    """A whole checkpoint folder on disk, with the probe loss measured on it.

    facts: what the trainer knows of its provenance (SPEC.md, "Training provenance"); empty where it does not say.
    """

    step: int
    folder: Path
    files: tuple[str, ...]
    probe_loss: float
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainFailed:
    """The trainer ended without finishing; ``why`` is its own last word."""

    why: str


TrainerEvent = TrainProgress | TrainedCheckpoint | TrainFailed


class Trainer(Protocol):
    """A running training process."""

    def events(self) -> AsyncIterator[TrainerEvent]:
        """Reports until the process ends."""

    async def stop(self) -> None:
        """Ask for a last checkpoint and the end; `events` ends once it is written. Kills what does not obey."""


class StartTrainer(Protocol):
    async def __call__(self, slot: str, work: Path, resume: Path | None, parent: str | None) -> Trainer: ...


Purpose = Literal["resume", "assemble"]
CheckCheckpoint = Callable[[str, Path, Announcement, Purpose], Awaitable[float]]
"""(slot, folder, announcement, purpose) -> own probe loss; raises RecordError when the weights do not hold."""

LocalCheckpoint = Callable[[Path], tuple[Path, int, str | None] | None]
"""Newest whole checkpoint folder under a work folder, its step, and the root that its run began from."""
