"""Fetch and verify the best checkpoint of every slot."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from paris_swarm.cli.checking import EMA_FILE, check_weights
from paris_swarm.cli.connect import Connected
from paris_swarm.cli.probing import ProbeRows, load_slot, slot_loss
from paris_swarm.dht_schemas.errors import NotFinite, RecordError
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.swarm.sightings import Candidate
from paris_swarm.swarm.transport import TransportError

if TYPE_CHECKING:
    from rich.progress import Progress

    from paris_swarm.router.folder_writing import SlotSource
    from paris_swarm.router.lock import Deciding

RIVALS = 8
"""At most so many verified checkpoints of a slot are measured on deciding rows: copies are cheap to announce, and every
one costs the assembler a download.
"""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint of one slot; ``probe_loss`` is our own measurement, ``deciding_loss`` the one on the rows
    that decide, where there are any.
    """

    announcement: Announcement
    probe_loss: float
    source: SlotSource
    deciding_loss: float | None = None


@dataclass
class Gathered:
    """``slots``: what won. ``rivals``: all that verified and were measured, best first, by slot. ``refused``: which
    checkpoints were not taken, and why.
    """

    slots: dict[str, Found] = field(default_factory=dict)
    rivals: dict[str, list[Found]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


async def gather_slots(
    here: Connected, bars: Progress, deciding: ProbeRows | None = None, *, whole: bool = False
) -> Gathered:
    """The best checkpoint of every slot that verifies; what was refused, and why, is kept.

    Candidates come in the order of their announced probe loss, and an announced loss must agree with ours: the first
    that passes is the best verified one. With ``deciding`` rows up to RIVALS that pass are measured on these, and the
    lowest loss wins. What is refused is doubted: this node will not try it again. ``whole``: fetch every file, not
    only the EMA weights that sampling needs.
    """
    gathered = Gathered()
    node = here.node
    await node.refresh(node.plan.slots)
    for slot in node.plan.slots:
        verified: list[Found] = []
        roots: set[str] = set()
        for candidate in node.candidates(slot):
            if candidate.announcement.root in roots:
                continue  # another announcement of weights that have passed already
            try:
                verified.append(await _take(here, candidate, bars, deciding, whole))
                roots.add(candidate.announcement.root)
            except (RecordError, TransportError) as error:
                who = f"slot {slot}, {candidate.announcement.root[:12]} of {candidate.announcement.author[-8:]}"
                gathered.refused.append(f"{who}: {error}")
                node.doubt(candidate, error)
            if verified and (deciding is None or verified[0].deciding_loss is None or len(verified) == RIVALS):
                break
        if verified:
            if verified[0].deciding_loss is not None:
                verified.sort(key=lambda found: (found.deciding_loss, found.announcement.root))
                gathered.rivals[slot] = verified
            gathered.slots[slot] = verified[0]
    gathered.refused += node.refused
    return gathered


def deciding_record(gathered: Gathered, rows: ProbeRows) -> Deciding:
    """What the lock says about how rivals were measured. ``rows`` are sealed ones or own ones."""
    from paris_swarm.router.lock import Deciding, Rival

    measured: dict[str, tuple[Rival, ...]] = {}
    for slot, rivals in gathered.rivals.items():
        measured[slot] = tuple(
            Rival(author=found.announcement.author, root=found.announcement.root, loss=found.deciding_loss)
            for found in rivals
            if found.deciding_loss is not None
        )
    return Deciding(rows="sealed" if rows.kind == "sealed" else "own", digest=rows.digest, measured=measured)


async def _take(
    here: Connected, candidate: Candidate, bars: Progress, deciding: ProbeRows | None, whole: bool
) -> Found:
    from paris_swarm.router.folder_writing import SlotSource

    node = here.node
    task = bars.add_task(f"slot {candidate.slot}, step {candidate.announcement.step}", total=None)
    folder = await node.fetch_checkpoint(
        candidate,
        names=None if whole else [EMA_FILE],
        on_progress=lambda done, total: bars.update(task, completed=done, total=total),
    )
    loss = await asyncio.to_thread(
        check_weights, here.plan_folder, candidate.slot, folder, candidate.announcement, "assemble"
    )
    manifest = node.store.read_blob(candidate.announcement.root)
    assert manifest is not None, "fetch_checkpoint keeps the manifest"
    deciding_loss = None
    if deciding is not None:
        deciding_loss = await asyncio.to_thread(_measure, here, candidate.slot, folder / EMA_FILE, deciding)
    source = SlotSource(candidate.envelope, manifest, folder / EMA_FILE)
    return Found(candidate.announcement, loss, source, deciding_loss)


def _measure(here: Connected, slot: str, weights: Path, rows: ProbeRows) -> float | None:
    import math

    loss = slot_loss(load_slot(here.plan_folder, slot, weights), slot, rows)
    if loss is not None and not math.isfinite(loss):
        raise NotFinite(f"the loss of slot {slot} on the deciding rows is {loss}")
    return loss
