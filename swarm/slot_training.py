"""Training one slot from its starting point to its end: the trainer is started, what it makes is published."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.swarm.lane_state import RunningLane
from paris_swarm.swarm.node import SwarmNode
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

PATIENCE = 3
"""Failures to train on from a slot's only checkpoint after which fresh weights are tried instead."""


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
        node = self._node
        stopping = asyncio.ensure_future(lane.stopping.wait())
        fetching = asyncio.ensure_future(self._starting_point(lane, slot))
        try:
            await asyncio.wait([fetching, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not fetching.done():
                return ""
            resume, parent = fetching.result()
        finally:
            stopping.cancel()
            fetching.cancel()
            await asyncio.gather(stopping, fetching, return_exceptions=True)
        work = node.files.work(slot)
        began = parent
        trainer = await self._start_trainer(slot, work, resume, parent)
        node.files.log_event(
            {"event": "train", "slot": slot, "resume": str(resume) if resume else None, "parent": parent}
        )
        lane.show("training", slot=slot, note="" if parent is None else f"continues {parent[:12]}")
        watching = asyncio.create_task(self._stop_when_told(trainer, lane))
        failure = ""
        try:
            async for event in trainer.events():
                if isinstance(event, TrainProgress):
                    lane.state = replace(lane.state, progress=event)
                elif isinstance(event, TrainedCheckpoint):
                    parent = await self._publish(lane, slot, event, parent)
                else:
                    failure = event.why
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await trainer.stop()
        if failure and resume is not None and parent == began:
            self._blame(slot, parent, failure)
        return failure

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

    async def _starting_point(self, lane: RunningLane, slot: str) -> tuple[Path | None, str | None]:
        """Where training starts: our own newest checkpoint, or the best verified one of the swarm if that is ahead."""
        node = self._node
        local = await asyncio.to_thread(self._local_checkpoint, node.files.work(slot))
        for candidate in node.candidates(slot):
            announcement = candidate.announcement
            if local is not None and local[1] >= announcement.step:
                break
            lane.show("fetching", slot=slot, note=f"step {announcement.step} of {announcement.author[-8:]}")
            try:
                folder = await self._verified.fetch(candidate)
                await node.hold(slot, candidate.envelope)
            except (RecordError, TransportError) as error:
                self._verified.refute(candidate, error)
                log.warning("checkpoint %s of slot %s refused: %s", announcement.root[:12], slot, error)
                continue
            return folder, announcement.root
        if local is None:
            return None, None
        return local[0], node.grown_from(slot, local[1], local[2])

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
        return root
