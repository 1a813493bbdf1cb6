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
import random
from collections.abc import Mapping
from typing import Any

from paris_swarm.dht_schemas.records import Progress
from paris_swarm.swarm.claims import ROUTER
from paris_swarm.swarm.lane import Claim, Lane, Look, Release, Report, Request, Rest, Start, Stop
from paris_swarm.swarm.lane_state import LaneState, RunningLane
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.slot_training import SlotTraining
from paris_swarm.swarm.standing_by import CopyKeeper, Rivals
from paris_swarm.swarm.trainer import CheckCheckpoint, LocalCheckpoint, StartTrainer
from paris_swarm.swarm.transport import TransportError
from paris_swarm.swarm.verified import VerifiedCheckpoints

__all__ = ["LaneState", "Peer"]

log = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2


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
        verified = VerifiedCheckpoints(node, check)
        self._rivals, self._copies = Rivals(node, verified), CopyKeeper(node, verified)
        self._training = SlotTraining(
            node,
            verified,
            start_trainer=start_trainer,
            local_checkpoint=local_checkpoint,
            keep_checkpoints=max(KEPT_CHECKPOINTS, keep_checkpoints),
        )
        self._target_steps = target_steps
        self._device = device
        self._dice = dice or random.Random()
        self._leaving = asyncio.Event()
        self._lanes: list[RunningLane] = []
        if cluster is not None:
            names = tuple(slot for slot in node.plan.slots if slot != ROUTER)
            self._lanes.append(RunningLane("cluster", names, None if cluster == "auto" else cluster))
        if router:
            self._lanes.append(RunningLane("router", (ROUTER,), ROUTER))

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

    async def _live(self, lane: RunningLane) -> None:
        """Work, but stand by while the organiser has paused or ended the swarm (SPEC.md, R-NOT-6)."""
        node = self.node
        while not self._leaving.is_set():
            if not node.halted:
                await self._work(lane)
                continue
            node.check_own()
            lane.show("finished" if node.trusted.standing.state == "ended" else "waiting", note=node.halted)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), node.plan.policy.lease_s / 3)
        lane.show("left")

    async def _work(self, lane: RunningLane) -> None:
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

    async def _carry_out(self, lane: RunningLane, request: Request) -> Report:
        node, views = self.node, None
        node.check_own()
        match request:
            case Look(slots):
                try:
                    await node.refresh(slots)
                    views = {slot: self._rivals.view(lane, slot) for slot in slots}
                except TransportError as error:
                    log.warning("cannot look at slots %s: %s", ", ".join(slots), error)
            case Claim(slot):
                await self._end_chores(lane)
                await node.publish_claim(slot, self._progress(lane, slot))
            case Release(slot, yielded):
                await node.publish_claim(slot, self._progress(lane, slot), released=True)
                if yielded is not None:
                    node.files.log_event({"event": "yield", "slot": slot, "to": yielded.to, "why": yielded.why})
                    lane.show("looking", note=f"slot {slot} is {yielded.to[-8:]}'s: {yielded.why}")
            case Start(slot):
                lane.stopping.clear()
                lane.training = asyncio.create_task(self._training.run(lane, slot))
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

    async def _rest(self, lane: RunningLane, rest: Rest) -> None:
        """Wait; wake early when the peer leaves or the trainer ends. Chores of standing by run beside it."""
        if rest.phase != "training":
            lane.show(rest.phase, slot=rest.slot, note=rest.note)
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

    async def _do_chores(self, lane: RunningLane, *, copying: bool) -> None:
        if copying:
            await self._copies.keep_copy(lane)
        if self.node.clock() - lane.idle_since > self.node.plan.policy.first_checkpoint_grace_s and (
            await self._rivals.check_one(lane)
        ):
            lane.idle_since = self.node.clock()

    async def _end_chores(self, lane: RunningLane) -> None:
        """Drop what is under way; raises what chores raised that were done."""
        chores, lane.chores = lane.chores, None
        if chores is None:
            return
        if chores.done():
            chores.result()
            return
        chores.cancel()
        await asyncio.gather(chores, return_exceptions=True)

    # ---- small things ----------------------------------------------------------

    def _progress(self, lane: RunningLane, slot: str) -> Progress:
        seen = lane.state.progress if lane.state.slot == slot else None
        return Progress(
            step=seen.step if seen else 0,
            steps=self._target_steps[slot],
            loss=seen.loss if seen else None,
            images_per_s=round(seen.images_per_s, 2) if seen else 0.0,
            device=self._device,
        )
