"""What runs for one lane of a peer, and what it shows of it."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from paris_swarm.swarm.lane import Phase
from paris_swarm.swarm.trainer import TrainProgress


@dataclass(frozen=True)
class LaneState:
    """What one lane is doing, for the dashboard."""

    lane: str
    phase: Phase = "looking"
    slot: str | None = None
    progress: TrainProgress | None = None
    note: str = ""
    published_step: int = 0


@dataclass
class RunningLane:
    """One lane and what runs for it. ``wanted`` is a slot name, or None for any cluster slot."""

    name: str
    slots: tuple[str, ...]
    wanted: str | None
    copied: str | None = None
    """The slot whose checkpoints this lane keeps a copy of while it stands by."""
    chores: asyncio.Task[None] | None = None
    """Copying and checking, while it stands by."""
    training: asyncio.Task[str] | None = None
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    inquiry: asyncio.Task[bool] | None = None
    """Checking a rival's checkpoint while it trains."""
    inquired_at: float = -math.inf
    idle_since: float = 0.0
    state: LaneState = field(init=False)

    def __post_init__(self) -> None:
        self.state = LaneState(self.name)

    def show(self, phase: Phase, *, slot: str | None = None, note: str = "") -> None:
        """Change what the dashboard says; progress is kept while the slot is."""
        keep = self.state.progress if slot is not None and slot == self.state.slot else None
        self.state = LaneState(self.name, phase, slot, keep, note, self.state.published_step)
