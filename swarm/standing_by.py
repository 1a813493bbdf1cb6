"""What a peer does about the checkpoints of others while it has no slot: rivals are checked, copies kept."""

from __future__ import annotations

import asyncio
import logging

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.swarm.claims import SlotView, rendezvous_order
from paris_swarm.swarm.lane_state import RunningLane
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.sightings import Candidate
from paris_swarm.swarm.store_locks import InUse
from paris_swarm.swarm.transport import TransportError
from paris_swarm.swarm.verified import VerifiedCheckpoints

log = logging.getLogger(__name__)

COPIES = 3
"""Holders of a slot's checkpoints, the author included, beyond which nobody else begins to keep a copy."""


class Rivals:
    """Checkpoints that keep a peer from a slot: those not verified here count for little, and are verified in turn."""

    def __init__(self, node: SwarmNode, verified: VerifiedCheckpoints) -> None:
        self._node, self._verified = node, verified

    def view(self, lane: RunningLane, slot: str) -> SlotView:
        """The slot, for a lane that trains without the checkpoints of rivals that were not verified here: a peer at
        work yields to work, not to the word of a key ground to win the rendezvous order (R-REC-11).
        """
        node, policy, now = self._node, self._node.plan.policy, self._node.clock()
        said = node.slot_view(slot)
        if lane.training is None:
            return said
        proven = node.slot_view(slot, believed=self._verified.believed)
        working = [peer for peer in said.protecting(now, policy) if said.fresh(peer, now, policy)]
        rivals = [peer for peer in working if peer != node.identity.peer_id]
        unproven = {peer for peer in rivals if not proven.fresh(peer, now, policy)}
        if unproven and len(rivals) >= policy.replicas and (lane.inquiry is None or lane.inquiry.done()):
            found = [one for one in node.candidates(slot) if one.announcement.author in unproven]
            # It costs a download beside the training: once a grace period, as `check_one`.
            if found and now - lane.inquired_at > policy.first_checkpoint_grace_s:
                lane.inquired_at = now
                newest = max(found, key=lambda one: one.announcement.seq)
                lane.inquiry = asyncio.create_task(self._verified.try_out(newest))
        return proven

    async def check_one(self, lane: RunningLane) -> bool:
        """Verify one checkpoint that keeps this peer idle and that it has not verified yet.

        Otherwise a bare announcement of a finished step, or of one rubbish checkpoint a cadence, would hold a slot for
        ever. It costs a download, so only a peer that has been idle for a whole grace period does it, one at a time.
        Returns False when there is nothing left to check.
        """
        node = self._node
        for slot in lane.slots if lane.wanted is None else (lane.wanted,):
            for candidate in node.candidates(slot):
                announcement = candidate.announcement
                if candidate.digest in self._verified.believed or announcement.author == node.identity.peer_id:
                    continue
                return await self._verified.try_out(candidate)
        return False


class CopyKeeper:
    """Keeps copies of others' checkpoints."""

    def __init__(self, node: SwarmNode, verified: VerifiedCheckpoints) -> None:
        self._node, self._verified = node, verified

    async def keep_copy(self, lane: RunningLane) -> None:
        """Standing by: fetch, verify and hold the newest checkpoint of one slot, so that it outlives its author.

        Without a second holder a machine that dies takes its published checkpoint with it. Only a peer that has
        trained nothing in this swarm does this: peers at work send each other no file (docs/architecture.md).
        """
        node = self._node
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
        node, slot, announcement = self._node, candidate.slot, candidate.announcement
        try:
            await self._verified.fetch(candidate)
        except (TransportError, InUse, OSError) as error:  # a full disk, or our own quota, must not end this peer
            log.warning("no copy of %s yet: %s", announcement.root[:12], error)
            return
        except RecordError as error:
            self._verified.refute(candidate, error)
            return
        await node.hold(slot, candidate.envelope)
        node.forget_older(slot, announcement.root, keep=1)
        node.files.log_event({"event": "copied", "slot": slot, "root": announcement.root, "step": announcement.step})
