"""What this peer announced last of a slot, and what it owes to that: it does not go back behind it (SPEC.md, R-REC-14).

A disk may lose the newest checkpoint and keep an older one. Whoever trains on from the older one says nothing of it
until it is past the newer one, which others may have; it takes that one back as soon as somebody can be asked for it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.swarm.announcing import holding_lease_s
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.sightings import Candidate
from paris_swarm.swarm.store_locks import InUse
from paris_swarm.swarm.transport import TransportError
from paris_swarm.swarm.verified import VerifiedCheckpoints

log = logging.getLogger(__name__)


class LastAnnounced:
    """The last announcement of ``slot`` in this peer's ledger, when training of the slot begins.

    Attributes:
        envelope: as it was signed; None where nothing was announced.
        step: what it announced; 0 where nothing was.
    """

    def __init__(self, node: SwarmNode, verified: VerifiedCheckpoints, slot: str) -> None:
        self._node, self._verified, self._slot = node, verified, slot
        self.envelope = node.files.ledger.last("checkpoint", slot)
        self.step = 0 if self.envelope is None else Announcement.open(self.envelope).record.step
        self._missed_since: float | None = None
        """Since when (Unix s) other peers are in sight and none of them serves it."""
        self._lost = False

    def withholds(self, step: int) -> bool:
        """Whether a checkpoint of ours at ``step`` is not announced: it is behind, and what it is behind may be true,
        and with others.
        """
        if self.envelope is None or step >= self.step:
            return False
        return not self._lost and not self._node.sightings.is_false(self.envelope)

    def candidate(self) -> Candidate | None:
        """It, and who else is known to hold it; also where the swarm is out of sight. None once it was found false."""
        if self.envelope is None or self._node.sightings.is_false(self.envelope):
            return None
        for found in self._node.candidates(self._slot):
            if found.envelope == self.envelope:
                return found
        return Candidate(self._slot, Announcement.open(self.envelope).record, self.envelope, ())

    async def fetch(self) -> Path | None:
        """Its folder, from our own store or from others, verified; None when it cannot be had, or was found false."""
        candidate = self.candidate()
        if candidate is None:
            return None
        try:
            return await self._verified.fetch(candidate)
        except RecordError as error:
            self._verified.refute(candidate, error)
            log.warning("checkpoint of step %d of slot %s refused: %s", self.step, self._slot, error)
        except (TransportError, InUse, OSError) as error:  # out of reach, or no room here: nothing against it
            log.warning("checkpoint of step %d of slot %s cannot be had: %s", self.step, self._slot, error)
        return None

    async def recovered(self) -> bool:
        """Look for it once more, and fetch it where others hold it: whether it lies here now, whole and true.

        Where other peers are in sight for as long as a holding counts, and nobody serves it, it is lost, and withholds
        nothing any more.
        """
        node = self._node
        try:
            await node.refresh([self._slot])
            in_sight = bool(await node.transport.connected_peers())
        except TransportError:
            in_sight = False
        candidate = self.candidate()
        held = candidate is not None and set(candidate.holders) - {node.identity.peer_id}
        if held and await self.fetch() is not None:
            return True
        if not in_sight:
            self._missed_since = None
        elif self._missed_since is None:
            self._missed_since = node.clock()
        elif node.clock() - self._missed_since >= holding_lease_s(node.plan.policy):
            self._lost = True
            log.warning("nobody serves our checkpoint of step %d of slot %s any more", self.step, self._slot)
        return False
