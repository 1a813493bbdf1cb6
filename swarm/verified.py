"""Checkpoints of others that this peer has fetched and verified itself: what it believes, whatever is announced."""

from __future__ import annotations

import logging
from pathlib import Path

from paris_swarm.dht_schemas.errors import RecordError
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

    async def fetch(self, candidate: Candidate) -> Path:
        """Download and verify a checkpoint; its folder.

        Raises:
            RecordError: it is not what was announced.
            TransportError: nobody could deliver it.
            InUse, OSError: no room on this disk.
        """
        folder = await self._node.fetch_checkpoint(candidate)
        await self._check(candidate.slot, folder, candidate.announcement, "resume")
        self.believed.add(candidate.digest)
        return folder

    async def try_out(self, candidate: Candidate) -> bool:
        """Verify a checkpoint: it is believed then, or its author suspected. False: this disk has no room for it."""
        try:
            await self.fetch(candidate)
        except (RecordError, TransportError) as error:
            self._node.refute(candidate, error)
        except (InUse, OSError) as error:  # not the checkpoint's fault
            log.warning("cannot check %s: %s", candidate.announcement.root[:12], error)
            return False
        return True
