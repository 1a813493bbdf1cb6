"""What the session's one small swarm is, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarm_processes import Answer, events

STEPS = 24
TINY = ("-k", 2, "--steps", STEPS, "--router-steps", STEPS, "--batch", 8)
SLOTS = ("0", "1", "router")


@dataclass
class Story:
    """What one swarm did, and what it left on disk. ``model`` is the assembled folder: copy it before changing it."""

    folder: Path
    plan_id: str
    invite: str
    model: Path
    peers: dict[str, str] = field(default_factory=dict)
    """Home name -> peer id, of the processes that joined."""
    early: Answer | None = None
    """`assemble` while nothing was published."""
    status: dict[str, Any] = field(default_factory=dict)
    status_text: str = ""
    served_before: int = 0
    """Bytes of checkpoint chunks that anybody had sent before `assemble`, by the counters on disk."""
    assembled: dict[str, Any] = field(default_factory=dict)
    keeper: str = ""
    """Peer id of a home that trained nothing, assembled with --serve, and stayed."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What its `assemble` answered."""
    outlived: dict[str, Any] = field(default_factory=dict)
    """`assemble` of yet another home, after everybody who had trained was gone."""
    served: int = 0
    """The same at the end, when every process had written its counters for the last time."""
    exit_codes: dict[str, int] = field(default_factory=dict)
    left_running: list[str] = field(default_factory=list)

    def home(self, name: str) -> Path:
        return self.folder / name

    def events(self, name: str) -> list[dict[str, Any]]:
        return events(self.home(name), self.plan_id)
