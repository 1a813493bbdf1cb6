"""Fetch and verify the best checkpoint of every slot."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paris_swarm.cli.checking import EMA_FILE, check_weights
from paris_swarm.cli.connect import Connected
from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.swarm.node import Candidate
from paris_swarm.swarm.transport import TransportError

if TYPE_CHECKING:
    from rich.progress import Progress

    from paris_swarm.router.folder import SlotSource


@dataclass(frozen=True)
class Found:
    """A verified checkpoint of one slot; ``probe_loss`` is our own measurement."""

    announcement: Announcement
    probe_loss: float
    source: SlotSource


@dataclass
class Gathered:
    slots: dict[str, Found] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


async def gather_slots(here: Connected, bars: Progress) -> Gathered:
    """The best checkpoint of every slot that verifies; what was refused, and why, is kept.

    Candidates come in the order of their announced probe loss, and an announced loss must agree with ours: the first
    that passes is the best verified one.
    """
    gathered = Gathered()
    node = here.node
    await node.refresh(node.plan.slots)
    for slot in node.plan.slots:
        for candidate in node.candidates(slot):
            who = f"slot {slot}, {candidate.announcement.root[:12]} of {candidate.announcement.author[-8:]}"
            try:
                gathered.slots[slot] = await _take(here, candidate, bars)
                break
            except (RecordError, TransportError) as error:
                gathered.refused.append(f"{who}: {error}")
    gathered.refused += node.refused
    return gathered


async def _take(here: Connected, candidate: Candidate, bars: Progress) -> Found:
    from paris_swarm.router.folder import SlotSource

    node = here.node
    task = bars.add_task(f"slot {candidate.slot}, step {candidate.announcement.step}", total=None)
    folder = await node.fetch_checkpoint(
        candidate,
        names=[EMA_FILE],
        on_progress=lambda done, total: bars.update(task, completed=done, total=total),
    )
    loss = await asyncio.to_thread(
        check_weights, here.plan_folder, candidate.slot, folder, candidate.announcement, "assemble"
    )
    manifest = node.store.read_blob(candidate.announcement.root)
    assert manifest is not None, "fetch_checkpoint keeps the manifest"
    return Found(candidate.announcement, loss, SlotSource(candidate.envelope, manifest, folder / EMA_FILE))
