"""A peer's life in a swarm: look, claim, settle, train, publish, serve; take over what others left.

One lane for each kind of slot this peer wants (a cluster slot, the router slot). What a lane does when is decided in
`lane` (pure); here its requests are carried out on asyncio. The trainer is another process behind the `Trainer`
protocol and verification is a callable: this room knows neither torch nor the model. Training goes on while the network
is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.dht_schemas.records import Progress
from paris_swarm.swarm.claims import ROUTER, SlotView, rendezvous_order
from paris_swarm.swarm.lane import Claim, Lane, Look, Phase, Release, Report, Request, Rest, Start, Stop
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.sightings import Candidate
from paris_swarm.swarm.store_locks import InUse
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

KEPT_CHECKPOINTS = 2
PATIENCE = 3
"""Failures to train on from a slot's only checkpoint after which fresh weights are tried instead."""
COPIES = 3
"""Holders of a slot's checkpoints, the author included, beyond which nobody else begins to keep a copy."""


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
    chores: asyncio.Task[None] | None = None
    """Copying and checking, while it stands by."""
    training: asyncio.Task[str] | None = None
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    inquiry: asyncio.Task[None] | None = None
    """Checking a rival's checkpoint while it trains."""
    inquired_at: float = -math.inf
    idle_since: float = 0.0
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
        keep_checkpoints: how many of its own published checkpoints it goes on serving; at least two, since an audit
            needs a checkpoint and its parent. Manifests are kept of all, so the chain can be followed to its start.
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
        keep_checkpoints: int = KEPT_CHECKPOINTS,
    ) -> None:
        self.node = node
        self._keep_checkpoints = max(KEPT_CHECKPOINTS, keep_checkpoints)
        self._start_trainer = start_trainer
        self._check = check
        self._local_checkpoint = local_checkpoint
        self._target_steps = target_steps
        self._device = device
        self._dice = dice or random.Random()
        self._leaving = asyncio.Event()
        self._believed: set[str] = set()
        """Digests of announcements whose checkpoints verified here."""
        self._failures: Counter[str] = Counter()
        """Digest of an announcement -> how often training from its checkpoint failed here."""
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
        """Work, but stand by while the organiser has paused or ended the swarm (SPEC.md, R-NOT-6)."""
        node = self.node
        while not self._leaving.is_set():
            if not node.halted:
                await self._work(lane)
                continue
            node.check_own()
            self._show(lane, "finished" if node.trusted.standing.state == "ended" else "waiting", note=node.halted)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), node.plan.policy.lease_s / 3)
        self._show(lane, "left")

    async def _work(self, lane: _Lane) -> None:
        lane.idle_since = self.node.clock()
        decisions = Lane(
            self.node.plan_id,
            self.node.identity.peer_id,
            lane.slots,
            wanted=lane.wanted,
            policy=self.node.plan.policy,
            target_steps=self._target_steps,
            dice=self._dice,
        ).decide()
        try:
            request = next(decisions)
            while True:
                report = await self._carry_out(lane, request)
                try:
                    request = decisions.send(report)
                except StopIteration:
                    break
        finally:
            await self._end_chores(lane)
            under_way = [task for task in (lane.training, lane.inquiry) if task is not None]
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _carry_out(self, lane: _Lane, request: Request) -> Report:
        node, views = self.node, None
        node.check_own()
        match request:
            case Look(slots):
                try:
                    await node.refresh(slots)
                    views = {slot: self._view(lane, slot) for slot in slots}
                except TransportError as error:
                    log.warning("cannot look at slots %s: %s", ", ".join(slots), error)
            case Claim(slot):
                await self._end_chores(lane)
                await node.publish_claim(slot, self._progress(lane, slot))
            case Release(slot, yielded):
                await node.publish_claim(slot, self._progress(lane, slot), released=True)
                if yielded is not None:
                    node.files.log_event({"event": "yield", "slot": slot, "to": yielded.to, "why": yielded.why})
                    self._show(lane, "looking", note=f"slot {slot} is {yielded.to[-8:]}'s: {yielded.why}")
            case Start(slot):
                lane.stopping.clear()
                lane.training = asyncio.create_task(self._train(lane, slot))
            case Stop():
                lane.stopping.set()
            case Rest():
                await self._rest(lane, request)
        ended = None
        # An end is told when the lane waits for one: told beside a look, it would pass unheard.
        if lane.training is not None and (
            isinstance(request, Stop) or (isinstance(request, Rest) and lane.training.done())
        ):
            ended = await lane.training
            lane.training = None
            lane.idle_since = node.clock()
        return Report(
            node.clock(),
            node.transport.population(),
            views=views,
            leaving=self._leaving.is_set() or bool(node.halted),
            ended=ended,
        )

    async def _rest(self, lane: _Lane, rest: Rest) -> None:
        """Wait; wake early when the peer leaves or the trainer ends. Chores of standing by run beside it."""
        if rest.phase != "training":
            self._show(lane, rest.phase, slot=rest.slot, note=rest.note)
        if rest.phase in ("waiting", "finished") and (lane.chores is None or lane.chores.done()):
            await self._end_chores(lane)
            lane.chores = asyncio.create_task(self._do_chores(lane, copying=rest.held))
        waited: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._leaving.wait())]
        if lane.training is not None:
            waited.append(lane.training)
        try:
            await asyncio.wait(waited, timeout=rest.seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waited[0].cancel()

    async def _do_chores(self, lane: _Lane, *, copying: bool) -> None:
        if copying:
            await self._keep_copy(lane)
        if self.node.clock() - lane.idle_since > self.node.plan.policy.first_checkpoint_grace_s and (
            await self._check_a_rival(lane)
        ):
            lane.idle_since = self.node.clock()

    async def _end_chores(self, lane: _Lane) -> None:
        """Drop what is under way; raises what chores raised that were done."""
        chores, lane.chores = lane.chores, None
        if chores is None:
            return
        if chores.done():
            chores.result()
            return
        chores.cancel()
        await asyncio.gather(chores, return_exceptions=True)

    # ---- rivals ----------------------------------------------------------------

    def _view(self, lane: _Lane, slot: str) -> SlotView:
        """The slot, for a lane that trains without the checkpoints of rivals that were not verified here: a peer at
        work yields to work, not to the word of a key ground to win the rendezvous order (R-REC-11).
        """
        node, policy, now = self.node, self.node.plan.policy, self.node.clock()
        said = node.slot_view(slot)
        if lane.training is None:
            return said
        proven = node.slot_view(slot, believed=self._believed)
        working = [peer for peer in said.protecting(now, policy) if said.fresh(peer, now, policy)]
        rivals = [peer for peer in working if peer != node.identity.peer_id]
        unproven = {peer for peer in rivals if not proven.fresh(peer, now, policy)}
        if unproven and len(rivals) >= policy.replicas and (lane.inquiry is None or lane.inquiry.done()):
            found = [one for one in node.candidates(slot) if one.announcement.author in unproven]
            # It costs a download beside the training: once a grace period, as `_check_a_rival`.
            if found and now - lane.inquired_at > policy.first_checkpoint_grace_s:
                lane.inquired_at = now
                newest = max(found, key=lambda one: one.announcement.seq)
                lane.inquiry = asyncio.create_task(self._inquire(newest))
        return proven

    async def _inquire(self, candidate: Candidate) -> None:
        """Verify a rival's checkpoint: it is believed then, or its author suspected."""
        try:
            folder = await self.node.fetch_checkpoint(candidate)
            await self._check(candidate.slot, folder, candidate.announcement, "resume")
            self._believed.add(candidate.digest)
        except (RecordError, TransportError) as error:
            self.node.doubt(candidate, error)
        except (InUse, OSError) as error:  # no room on this disk: not the checkpoint's fault
            log.warning("cannot check %s: %s", candidate.announcement.root[:12], error)

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
                if candidate.digest in self._believed or announcement.author == node.identity.peer_id:
                    continue
                try:
                    folder = await node.fetch_checkpoint(candidate)
                    await self._check(slot, folder, announcement, "resume")
                    self._believed.add(candidate.digest)
                except (RecordError, TransportError) as error:
                    node.doubt(candidate, error)
                except (InUse, OSError) as error:  # no room on this disk: not the checkpoint's fault
                    log.warning("cannot check %s: %s", announcement.root[:12], error)
                    return False
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
        found = {slot: candidates for slot in order if (candidates := node.candidates(slot))}
        holders = {slot: {holder for one in found[slot] for holder in one.holders} for slot in found}
        if lane.copied not in found:
            lane.copied = min(found, key=lambda slot: (len(holders[slot]), order.index(slot)), default=None)
        if lane.copied is None or node.identity.peer_id in found[lane.copied][0].holders:
            return
        if node.identity.peer_id in holders[lane.copied] or len(holders[lane.copied]) < COPIES:
            await self._copy(found[lane.copied][0])

    async def _copy(self, candidate: Candidate) -> None:
        node, slot, announcement = self.node, candidate.slot, candidate.announcement
        try:
            folder = await node.fetch_checkpoint(candidate)
            await self._check(slot, folder, announcement, "resume")
        except (TransportError, InUse, OSError) as error:  # a full disk, or our own quota, must not end this peer
            log.warning("no copy of %s yet: %s", announcement.root[:12], error)
            return
        except RecordError as error:
            node.doubt(candidate, error)
            return
        self._believed.add(candidate.digest)
        await node.hold(slot, candidate.envelope)
        node.forget_older(slot, announcement.root, keep=1)
        node.files.log_event({"event": "copied", "slot": slot, "root": announcement.root, "step": announcement.step})

    # ---- training ------------------------------------------------------------

    async def _train(self, lane: _Lane, slot: str) -> str:
        """Train ``slot`` to its end, or until ``lane.stopping``; returns why it failed, or ""."""
        node = self.node
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
        self._show(lane, "training", slot=slot, note="" if parent is None else f"continues {parent[:12]}")
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
        found = self.node.candidates(slot)
        for candidate in found:
            if candidate.announcement.root == root and candidate.announcement.author != self.node.identity.peer_id:
                self._failures[candidate.digest] += 1
                others = any(other.announcement.root != root for other in found)
                if others or self._failures[candidate.digest] >= PATIENCE:
                    self.node.doubt(candidate, RuntimeError(f"training did not go on from it: {failure}"))

    async def _stop_when_told(self, trainer: Trainer, lane: _Lane) -> None:
        """Once the lane gives the slot up, the trainer ends; its last checkpoint is still published."""
        await lane.stopping.wait()
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
                self._believed.add(candidate.digest)
                await node.hold(slot, candidate.envelope)
            except (RecordError, TransportError) as error:
                node.doubt(candidate, error)
                log.warning("checkpoint %s of slot %s refused: %s", announcement.root[:12], slot, error)
                continue
            return folder, announcement.root
        if local is None:
            return None, None
        return local[0], node.grown_from(slot, local[1], local[2])

    async def _publish(self, lane: _Lane, slot: str, event: TrainedCheckpoint, parent: str | None) -> str | None:
        """Checkpoint folder -> manifest -> content store -> signed announcement; returns the root.

        A checkpoint that is no step further than its parent is not published: nothing was trained (R-PROV-3).
        """
        node = self.node
        before = node.stored_step(parent)
        if before is not None and event.step <= before:
            return parent
        meta: dict[str, Any] = {"step": event.step, "parent": parent}
        if event.facts and before is not None:
            meta["provenance"] = {**event.facts, "from_step": before, "to_step": event.step}
        manifest, data, root = await asyncio.to_thread(build_manifest, event.folder, event.files, slot, meta=meta)
        await asyncio.to_thread(node.store.put_folder, data, event.folder)
        total = sum(entry.length for entry in manifest.files)
        await node.announce(
            slot, step=event.step, root=root, parent=parent, total_bytes=total, probe_loss=event.probe_loss
        )
        node.files.log_event({"event": "published", "slot": slot, "step": event.step, "root": root})
        node.forget_older(slot, root, keep=self._keep_checkpoints)
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
