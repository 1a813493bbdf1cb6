"""A peer's life in a swarm: look, claim, settle, train, publish, serve; take over what others left.

One lane for each kind of slot this peer wants (a cluster slot, the router slot). A lane runs the pure policy of
`claims` on fresh records and carries out its answer. The trainer is another process behind the `Trainer` protocol and
verification is a callable: this room knows neither torch nor the model. Training goes on while the network is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.dht_schemas.records import Progress
from paris_swarm.swarm.claims import ROUTER, Keep, Take, Wait, choose, rendezvous_order, review
from paris_swarm.swarm.node import Candidate, SwarmNode
from paris_swarm.swarm.trainer import (
    CheckCheckpoint,
    LocalCheckpoint,
    StartTrainer,
    TrainedCheckpoint,
    Trainer,
    TrainProgress,
)
from paris_swarm.swarm.transport import TransportError

log = logging.getLogger(__name__)

CONSIDERED_AT_ONCE = 8
KEPT_CHECKPOINTS = 2

Phase = Literal["looking", "waiting", "settling", "fetching", "training", "finished", "left", "failed"]


# ---- state shown -----------------------------------------------------------------------------------------------


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
class _Lane:
    """``wanted`` is a slot name, or None for any cluster slot."""

    name: str
    slots: tuple[str, ...]
    wanted: str | None
    copied: str | None = None
    """The slot whose checkpoints this lane keeps a copy of while it stands by."""
    state: LaneState = field(init=False)

    def __post_init__(self) -> None:
        self.state = LaneState(self.name)


# ---- the peer --------------------------------------------------------------------------------------------------


class Peer:
    """Runs the lanes of one peer until `leave` or cancellation.

    Args:
        cluster: "auto", a slot name such as "3", or None for no cluster slot.
        router: whether to take the router slot too.
        target_steps: steps after which a slot is finished, by slot name.
        dice: jitter before a claim, so that peers started together do not read at the same instant.
    """

    def __init__(
        self,
        node: SwarmNode,
        *,
        cluster: str | None,
        router: bool,
        start_trainer: StartTrainer,
        check: CheckCheckpoint,
        local_checkpoint: LocalCheckpoint,
        target_steps: Mapping[str, int],
        device: str,
        dice: random.Random | None = None,
    ) -> None:
        self.node = node
        self._start_trainer = start_trainer
        self._check = check
        self._local_checkpoint = local_checkpoint
        self._target_steps = target_steps
        self._device = device
        self._dice = dice or random.Random()
        self._leaving = asyncio.Event()
        self._believed: set[str] = set()
        self._lanes: list[_Lane] = []
        if cluster is not None:
            names = tuple(slot for slot in node.plan.slots if slot != ROUTER)
            self._lanes.append(_Lane("cluster", names, None if cluster == "auto" else cluster))
        if router:
            self._lanes.append(_Lane("router", (ROUTER,), ROUTER))

    @property
    def lanes(self) -> tuple[LaneState, ...]:
        return tuple(lane.state for lane in self._lanes)

    @property
    def finished(self) -> bool:
        """Whether every lane has nothing left to train."""
        return all(lane.state.phase in ("finished", "failed") for lane in self._lanes)

    async def run(self) -> None:
        """Live until `leave` is called; raises what a lane raised."""
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes:
                group.create_task(self._live(lane))

    def leave(self) -> None:
        """Stop training and give the slots back; `run` returns once that is done."""
        self._leaving.set()

    # ---- one lane ------------------------------------------------------------

    async def _live(self, lane: _Lane) -> None:
        policy = self.node.plan.policy
        await self._pause(self._dice.uniform(0, min(1.0, policy.lease_s / 20)))
        idle_since = self.node.clock()
        while not self._leaving.is_set():
            action = await self._look(lane)
            if isinstance(action, Wait):
                done = action.why == "finished"
                why = "" if done else "every slot considered is held; standing by"
                self._show(lane, "finished" if done else "waiting", note=why)
                if action.why == "held":
                    await self._keep_copy(lane)
                if self.node.clock() - idle_since > policy.first_checkpoint_grace_s and await self._check_a_rival(lane):
                    idle_since = self.node.clock()
                await self._pause(policy.lease_s / 3)
                continue
            idle_since = self.node.clock()
            if await self._claim(lane, action.slot):
                failed = await self._train(lane, action.slot)
                if failed:
                    self._show(lane, "failed", note=failed)
                    await self._pause(policy.lease_s)
        self._show(lane, "left")

    async def _look(self, lane: _Lane) -> Take | Wait:
        """Refresh some slots (8 by rendezvous order, then the next 8) until one has room."""
        node = self.node
        order = rendezvous_order(node.plan_id, node.identity.peer_id, lane.slots)
        if lane.wanted is not None:
            order = [lane.wanted]
        answer = Wait("finished")
        for start in range(0, len(order), CONSIDERED_AT_ONCE):
            batch = order[start : start + CONSIDERED_AT_ONCE]
            try:
                await node.refresh(batch)
            except TransportError as error:
                self._show(lane, "waiting", note=f"swarm not reachable: {error}")
                return Wait("unreachable")
            found = choose(
                node.plan_id,
                node.identity.peer_id,
                {slot: node.slot_view(slot) for slot in batch},
                policy=node.plan.policy,
                target_steps=self._target_steps,
                now=node.clock(),
                wanted=lane.wanted,
            )
            if not isinstance(found, Wait):
                return found
            if found.why != "finished":
                answer = found
        return answer

    async def _check_a_rival(self, lane: _Lane) -> bool:
        """Verify one checkpoint that keeps this peer idle and that it has not verified yet.

        Otherwise a bare announcement of a finished step, or of one rubbish checkpoint a cadence, would hold a slot for
        ever. It costs a download, so only a peer that has been idle for a whole grace period does it, one at a time.
        Returns False when there is nothing left to check.
        """
        node = self.node
        for slot in lane.slots if lane.wanted is None else (lane.wanted,):
            for candidate in node.candidates(slot):
                announcement = candidate.announcement
                if announcement.root in self._believed or announcement.author == node.identity.peer_id:
                    continue
                try:
                    folder = await node.fetch_checkpoint(candidate)
                    await self._check(slot, folder, announcement, "resume")
                    self._believed.add(announcement.root)
                except (RecordError, TransportError) as error:
                    node.doubt(announcement.root, error)
                return True
        return False

    async def _keep_copy(self, lane: _Lane) -> None:
        """Standing by: fetch, verify and hold the newest checkpoint of one slot, so that it outlives its author.

        Without a second holder a machine that dies takes its published checkpoint with it. Only a peer that has
        trained nothing in this swarm does this: peers at work send each other no file (docs/architecture.md).
        """
        node = self.node
        if node.files.ledger.signed("checkpoint"):
            return
        order = rendezvous_order(node.plan_id, node.identity.peer_id, lane.slots)
        best = {slot: found[0] for slot in order if (found := node.candidates(slot))}
        if lane.copied not in best:
            lane.copied = min(best, key=lambda slot: (len(best[slot].holders), order.index(slot)), default=None)
        if lane.copied is None:
            return
        candidate = best[lane.copied]
        if node.identity.peer_id in candidate.holders:
            return
        copying = asyncio.ensure_future(self._copy(candidate))
        leaving = asyncio.ensure_future(self._leaving.wait())
        try:
            await asyncio.wait([copying, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            copying.cancel()
            await asyncio.gather(leaving, copying, return_exceptions=True)
        if not copying.cancelled():
            copying.result()

    async def _copy(self, candidate: Candidate) -> None:
        node, slot, announcement = self.node, candidate.slot, candidate.announcement
        try:
            folder = await node.fetch_checkpoint(candidate)
            await self._check(slot, folder, announcement, "resume")
        except TransportError as error:
            log.info("no copy of %s yet: %s", announcement.root[:12], error)
            return
        except RecordError as error:
            node.doubt(announcement.root, error)
            return
        self._believed.add(announcement.root)
        await node.hold(slot, candidate.envelope)
        node.forget_older(slot, announcement.root, keep=1)
        node.files.log_event({"event": "copied", "slot": slot, "root": announcement.root, "step": announcement.step})

    async def _claim(self, lane: _Lane, slot: str) -> bool:
        """Claim, let the claim settle, look again; False when another peer has the better right."""
        policy = self.node.plan.policy
        self._show(lane, "settling", slot=slot)
        claimed_at = self.node.clock()
        await self.node.publish_claim(slot, self._progress(lane, slot))
        await self._pause(min(3.0, policy.lease_s / 6))
        return not self._leaving.is_set() and await self._still_mine(lane, slot, claimed_at, settled=False)

    async def _still_mine(self, lane: _Lane, slot: str, claimed_at: float, *, settled: bool) -> bool:
        node = self.node
        try:
            await node.refresh([slot])
        except TransportError as error:
            log.warning("cannot look at slot %s: %s", slot, error)
            return True  # training goes on while the network is away
        verdict = review(
            node.plan_id,
            node.identity.peer_id,
            node.slot_view(slot),
            policy=node.plan.policy,
            claimed_at=claimed_at,
            settled=settled,
            now=node.clock(),
        )
        if isinstance(verdict, Keep):
            return True
        node.files.log_event({"event": "yield", "slot": slot, "to": verdict.to, "why": verdict.why})
        await node.publish_claim(slot, self._progress(lane, slot), released=True)
        self._show(lane, "looking", note=f"slot {slot} is {verdict.to[-8:]}'s: {verdict.why}")
        return False

    # ---- training ------------------------------------------------------------

    async def _train(self, lane: _Lane, slot: str) -> str:
        """Train ``slot`` to its end, or until it is lost or the peer leaves; returns why it failed, or ""."""
        node = self.node
        claimed_at = node.clock()
        resume, parent = await self._starting_point(lane, slot)
        work = node.files.work(slot)
        trainer = await self._start_trainer(slot, work, resume, parent)
        node.files.log_event(
            {"event": "train", "slot": slot, "resume": str(resume) if resume else None, "parent": parent}
        )
        self._show(lane, "training", slot=slot, note="" if parent is None else f"continues {parent[:12]}")
        lost = asyncio.Event()
        watching = [
            asyncio.create_task(self._renew(lane, slot, claimed_at, lost)),
            asyncio.create_task(self._stop_when(trainer, lost)),
        ]
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
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            await trainer.stop()
        if not lost.is_set():
            await node.publish_claim(slot, self._progress(lane, slot), released=True)
        return failure

    async def _renew(self, lane: _Lane, slot: str, claimed_at: float, lost: asyncio.Event) -> None:
        while True:
            await asyncio.sleep(self.node.plan.policy.lease_s / 3)
            if not await self._still_mine(lane, slot, claimed_at, settled=True):
                lost.set()
                return
            await self.node.publish_claim(slot, self._progress(lane, slot))

    async def _stop_when(self, trainer: Trainer, lost: asyncio.Event) -> None:
        """Stop the trainer once this peer leaves or has lost the slot; its last checkpoint is still published."""
        ends = [asyncio.ensure_future(self._leaving.wait()), asyncio.ensure_future(lost.wait())]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        await trainer.stop()

    async def _starting_point(self, lane: _Lane, slot: str) -> tuple[Path | None, str | None]:
        """Where training starts: our own newest checkpoint, or the best verified one of the swarm if that is ahead."""
        node = self.node
        local = await asyncio.to_thread(self._local_checkpoint, node.files.work(slot))
        for candidate in node.candidates(slot):
            announcement = candidate.announcement
            if local is not None and local[1] >= announcement.step:
                break
            self._show(lane, "fetching", slot=slot, note=f"step {announcement.step} of {announcement.author[-8:]}")
            try:
                folder = await node.fetch_checkpoint(candidate)
                await self._check(slot, folder, announcement, "resume")
                self._believed.add(announcement.root)
                await node.hold(slot, candidate.envelope)
            except (RecordError, TransportError) as error:
                node.doubt(announcement.root, error)
                log.warning("checkpoint %s of slot %s refused: %s", announcement.root[:12], slot, error)
                continue
            return folder, announcement.root
        if local is None:
            return None, None
        return local[0], node.last_root(slot)

    async def _publish(self, lane: _Lane, slot: str, event: TrainedCheckpoint, parent: str | None) -> str:
        """Checkpoint folder -> manifest -> content store -> signed announcement; returns the root."""
        node = self.node
        manifest, data, root = await asyncio.to_thread(
            build_manifest, event.folder, event.files, slot, meta={"step": event.step, "parent": parent}
        )
        await asyncio.to_thread(node.store.put_folder, data, event.folder)
        total = sum(entry.length for entry in manifest.files)
        await node.announce(
            slot, step=event.step, root=root, parent=parent, total_bytes=total, probe_loss=event.probe_loss
        )
        node.files.log_event({"event": "published", "slot": slot, "step": event.step, "root": root})
        node.forget_older(slot, root, keep=KEPT_CHECKPOINTS)
        lane.state = replace(lane.state, published_step=event.step)
        return root

    # ---- small things ----------------------------------------------------------

    def _progress(self, lane: _Lane, slot: str) -> Progress:
        seen = lane.state.progress if lane.state.slot == slot else None
        return Progress(
            step=seen.step if seen else 0,
            steps=self._target_steps[slot],
            loss=seen.loss if seen else None,
            images_per_s=round(seen.images_per_s, 2) if seen else 0.0,
            device=self._device,
        )

    def _show(self, lane: _Lane, phase: Phase, *, slot: str | None = None, note: str = "") -> None:
        keep = lane.state.progress if slot is not None and slot == lane.state.slot else None
        lane.state = LaneState(lane.name, phase, slot, keep, note, lane.state.published_step)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._leaving.wait(), seconds)
