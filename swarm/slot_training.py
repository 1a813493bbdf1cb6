"""Training one slot from its starting point to its end: the trainer is started, what it makes is published."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.swarm.lane_state import RunningLane
from paris_swarm.swarm.last_announced import LastAnnounced
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.sightings import Candidate
from paris_swarm.swarm.trainer import (
    LocalCheckpoint,
    StartTrainer,
    TrainedCheckpoint,
    Trainer,
    TrainProgress,
)
from paris_swarm.swarm.transport import TransportError
from paris_swarm.swarm.verified import VerifiedCheckpoints

log = logging.getLogger(__name__)

T = TypeVar("T")

SILENT = "silent"
"""How the note of a lane begins whose checkpoints are withheld."""
PATIENCE = 3
"""Failures to train on from a slot's only checkpoint after which fresh weights are tried instead."""


@dataclass(frozen=True)
class StartingPoint:
    """Where a run begins: a checkpoint folder at ``step`` (None: fresh weights), the root that the next checkpoint
    continues, and the root that the trainer of that folder began from (`OwnCheckpoints.grown_from`).
    """

    folder: Path | None
    parent: str | None
    step: int
    origin: str | None


class SlotTraining:
    """Trains slots, one run at a time for each lane.

    Args:
        keep_checkpoints: as in `peer.Peer`.
    """

    def __init__(
        self,
        node: SwarmNode,
        verified: VerifiedCheckpoints,
        *,
        start_trainer: StartTrainer,
        local_checkpoint: LocalCheckpoint,
        keep_checkpoints: int,
    ) -> None:
        self._node, self._verified = node, verified
        self._start_trainer, self._local_checkpoint = start_trainer, local_checkpoint
        self._keep_checkpoints = keep_checkpoints
        self._failures: Counter[str] = Counter()
        """Digest of an announcement -> how often training from its checkpoint failed here."""

    async def run(self, lane: RunningLane, slot: str) -> str:
        """Train ``slot`` to its end, or until ``lane.stopping``; returns why it failed, or ""."""
        while True:
            failure, again = await self._run_once(lane, slot)
            if not again or lane.stopping.is_set():
                return failure

    async def _run_once(self, lane: RunningLane, slot: str) -> tuple[str, bool]:
        """One trainer from its start to its end: why it failed, and whether to start again, from what it was behind."""
        node = self._node
        last = LastAnnounced(node, self._verified, slot)
        start = await _unless_stopping(lane, self._starting_point(lane, slot, last))
        if start is None:
            return "", False
        work = node.files.work(slot)
        parent, came_on, again = start.parent, False, False
        trainer = await self._start_trainer(slot, work, start.folder, parent)
        resume = None if start.folder is None else str(start.folder)
        node.files.log_event({"event": "train", "slot": slot, "resume": resume, "parent": parent})
        lane.show("training", slot=slot, note=_note(start, last))
        watching = asyncio.create_task(self._stop_when_told(trainer, lane))
        failure = ""
        try:
            async for event in trainer.events():
                if isinstance(event, TrainProgress):
                    lane.state = replace(lane.state, progress=event)
                elif isinstance(event, TrainedCheckpoint):
                    came_on = came_on or event.step > start.step
                    if last.withholds(event.step) and not again and await _unless_stopping(lane, last.recovered()):
                        again = True
                        await trainer.stop()  # it leaves a checkpoint, which is behind as well, or past it
                    if last.withholds(event.step):
                        self._withhold(slot, event, last)
                    else:
                        parent = await self._publish(lane, slot, event, parent)
                else:
                    failure = event.why
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await trainer.stop()
        if failure and start.folder is not None and not came_on:
            self._blame(slot, parent, failure)
        return failure, again and not failure

    def _blame(self, slot: str, root: str | None, failure: str) -> None:
        """Training from somebody's checkpoint failed before it came to a checkpoint of our own (SPEC.md, R-VAL-4).

        Whether that checkpoint or this machine is to blame cannot be told: another one is tried where there is one, and
        only after PATIENCE failures fresh weights.
        """
        found = self._node.candidates(slot)
        for candidate in found:
            if candidate.announcement.root == root and candidate.announcement.author != self._node.identity.peer_id:
                self._failures[candidate.digest] += 1
                others = any(other.announcement.root != root for other in found)
                if others or self._failures[candidate.digest] >= PATIENCE:
                    self._node.doubt(candidate, RuntimeError(f"training did not go on from it: {failure}"))

    async def _stop_when_told(self, trainer: Trainer, lane: RunningLane) -> None:
        """Once the lane gives the slot up, the trainer ends; its last checkpoint is still published."""
        await lane.stopping.wait()
        await trainer.stop()

    async def _starting_point(self, lane: RunningLane, slot: str, last: LastAnnounced) -> StartingPoint:
        """Where training starts: our own newest checkpoint, or the best verified one of the swarm if that is ahead.

        Our own newest is the one announced last, also where the disk has only an older one: it is fetched, and what is
        trained on from the older one otherwise is not taken for its continuation.
        """
        node = self._node
        local = await asyncio.to_thread(self._local_checkpoint, node.files.work(slot))
        reached = -1 if local is None else local[1]
        for candidate in self._ahead_of(reached, slot, last):
            announcement = candidate.announcement
            lane.show("fetching", slot=slot, note=f"step {announcement.step} of {announcement.author[-8:]}")
            try:
                if candidate.envelope == last.envelope:
                    folder = await last.fetch()
                    if folder is None:
                        continue
                else:
                    folder = await self._verified.fetch(candidate)
                await node.hold(slot, candidate.envelope)
            except (RecordError, TransportError) as error:
                self._verified.refute(candidate, error)
                log.warning("checkpoint %s of slot %s refused: %s", announcement.root[:12], slot, error)
                continue
            start = StartingPoint(folder, announcement.root, announcement.step, announcement.root)
            break
        else:
            if local is None:
                start = StartingPoint(None, None, 0, None)
            else:
                start = StartingPoint(local[0], node.grown_from(slot, local[1], local[2]), local[1], local[2])
        if start.step < last.step:
            node.files.ledger.branch(slot, start.origin, start.parent)
        return start

    def _ahead_of(self, reached: int, slot: str, last: LastAnnounced) -> list[Candidate]:
        """Announced checkpoints to start from, in the order in which they are tried: those that are ahead of our own
        newest, that one where it is not on this disk, and those ahead of what is.
        """
        found = self._node.candidates(slot)
        own = last.candidate()
        if own is None or last.step <= reached:
            return list(takewhile(lambda one: one.announcement.step > reached, found))
        further = takewhile(lambda one: one.announcement.step > last.step, found)
        rest = takewhile(lambda one: one.announcement.step > reached, found)
        return list({one.digest: one for one in (*further, own, *rest)}.values())

    def _withhold(self, slot: str, event: TrainedCheckpoint, last: LastAnnounced) -> None:
        """A checkpoint behind the one announced last stays on this disk, unsaid (R-REC-14)."""
        said = {"event": "withheld", "slot": slot, "step": event.step, "announced": last.step}
        self._node.files.log_event(said)
        log.warning(
            "step %d of slot %s is not announced: this peer announced step %d before", event.step, slot, last.step
        )

    async def _publish(self, lane: RunningLane, slot: str, event: TrainedCheckpoint, parent: str | None) -> str | None:
        """Checkpoint folder -> manifest -> content store -> signed announcement; returns the root.

        A checkpoint that is no step further than its parent is not published: nothing was trained (R-PROV-3).
        """
        node = self._node
        before = node.stored_step(parent)
        if before is not None and event.step <= before:
            return parent
        meta: dict[str, Any] = {"step": event.step, "parent": parent}
        # Steps before the facts' own first were trained otherwise: no audit could take them all in one way (R-PROV-5).
        if event.facts and before is not None and event.facts.get("from_step", 0) <= before:
            meta["provenance"] = {**event.facts, "from_step": before, "to_step": event.step}
        manifest, data, root = await asyncio.to_thread(build_manifest, event.folder, event.files, slot, meta=meta)
        node.files.note_root(root)  # before it lies in the store, where other swarms of this home would serve it
        await asyncio.to_thread(node.store.put_folder, data, event.folder)
        total = sum(entry.length for entry in manifest.files)
        await node.announce(
            slot, step=event.step, root=root, parent=parent, total_bytes=total, probe_loss=event.probe_loss
        )
        node.files.log_event({"event": "published", "slot": slot, "step": event.step, "root": root})
        node.forget_older(slot, root, keep=self._keep_checkpoints)
        lane.state = replace(lane.state, published_step=event.step)
        if lane.state.note.startswith(SILENT):
            lane.show("training", slot=slot)
        return root


def _note(start: StartingPoint, last: LastAnnounced) -> str:
    if last.withholds(start.step):
        return f"{SILENT} until step {last.step}, which was announced before and cannot be had"
    return "" if start.parent is None else f"continues {start.parent[:12]}"


async def _unless_stopping(lane: RunningLane, work: Coroutine[Any, Any, T]) -> T | None:
    """What ``work`` returns; None when ``lane.stopping`` came first, and it was cancelled."""
    stopping = asyncio.ensure_future(lane.stopping.wait())
    doing = asyncio.ensure_future(work)
    try:
        await asyncio.wait([doing, stopping], return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        stopping.cancel()
        doing.cancel()
        await asyncio.gather(stopping, doing, return_exceptions=True)
