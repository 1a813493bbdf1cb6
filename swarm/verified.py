"""Checkpoints of others that this peer has fetched and verified itself: what it believes, whatever is announced."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.swarm.garbage import kept_roots
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.sightings import Candidate
from paris_swarm.swarm.store_locks import InUse
from paris_swarm.swarm.trainer import CheckCheckpoint
from paris_swarm.swarm.transport import TransportError

log = logging.getLogger(__name__)


class VerifiedCheckpoints:
    """Fetches, checks and remembers.

    Attributes:
        believed: digests of announcements whose checkpoints verified here.
    """

    def __init__(self, node: SwarmNode, check: CheckCheckpoint) -> None:
        self._node, self._check = node, check
        self.believed: set[str] = set()
        self._unproven: set[str] = set()
        """Roots of which no file was here before a fetch of ours, and which did not verify since."""

    async def fetch(self, candidate: Candidate) -> Path:
        """Download and verify a checkpoint; its folder.

        Raises:
            RecordError: it is not what was announced.
            TransportError: nobody could deliver it.
            InUse, OSError: no room on this disk.
        """
        root = candidate.announcement.root
        if not await asyncio.to_thread(self._node.store.holds_some, root):
            self._unproven.add(root)
        folder = await self._node.fetch_checkpoint(candidate)
        await self._check(candidate.slot, folder, candidate.announcement, "resume")
        self.believed.add(candidate.digest)
        self._unproven.discard(root)
        return folder

    def refute(self, candidate: Candidate, why: Exception) -> None:
        """Leave an announcement out of account. Refused for good, its files go as well: one checkpoint of rubbish a
        grace would fill the disk. Only what a fetch of ours brought and nobody found true: anybody may announce a root
        that this home has had for long, its own among them, with a lie about it.
        """
        root = candidate.announcement.root
        if not self._node.doubt(candidate, why) or root not in self._unproven:
            return
        others = {other.announcement.root for other in self._node.candidates(candidate.slot)}
        if root not in others and root not in kept_roots(self._node.home):
            self._unproven.discard(root)
            self._node.own.drop(root)

    async def try_out(self, candidate: Candidate) -> bool:
        """Verify a checkpoint: it is believed then, or its author suspected. False: this disk has no room for it."""
        try:
            await self.fetch(candidate)
        except (RecordError, TransportError) as error:
            self.refute(candidate, error)
        except (InUse, OSError) as error:  # not the checkpoint's fault
            log.warning("cannot check %s: %s", candidate.announcement.root[:12], error)
            return False
        return True
