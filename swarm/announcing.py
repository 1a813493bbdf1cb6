"""What a node says in the DHT: claims, announcements of its checkpoints, and holdings, its leases on what it serves.

All of it is signed, written down, and only then sent (R-REC-9). DHT presence is never truth (a rejected store can evict
a newer record early, lost replicas are not repaired): what was said is said again long before its lease ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from paris_swarm.dht_schemas import records
from paris_swarm.dht_schemas.dht_rules import checkpoint_key, claim_key
from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.plan import Policy
from paris_swarm.dht_schemas.records import Announcement, Claim, Holding, Progress
from paris_swarm.swarm.greeting import SwarmDoor
from paris_swarm.swarm.home import SwarmHome
from paris_swarm.swarm.sightings import Sightings
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.transport import Transport, TransportError

log = logging.getLogger(__name__)

Clock = Callable[[], float]


def holding_lease_s(policy: Policy) -> float:
    """Seconds for which a holding counts: two leases of the plan, as far as the rules allow."""
    return min(2 * policy.lease_s, records.MAX_LEASE_S)


def holding_is_due(holding: Holding, lease_s: float, now: float) -> bool:
    """Whether a third of a holding's lease has passed: time to say it again."""
    return now >= holding.until - lease_s * 2 / 3


class Announcer:
    """The voice of one peer in one swarm.

    Args:
        door: has this peer's admission token.
        clock: Unix seconds.
    """

    def __init__(
        self,
        identity: Identity,
        transport: Transport,
        files: SwarmHome,
        store: ContentStore,
        sightings: Sightings,
        door: SwarmDoor,
        clock: Clock,
    ) -> None:
        self._identity, self._transport, self._files, self._store = identity, transport, files, store
        self._sightings, self._door, self._clock = sightings, door, clock
        self._plan_id, self._policy = sightings.trusted.plan_id, sightings.trusted.plan.policy

    # ---- claims ---------------------------------------------------------------

    async def publish_claim(self, slot: str, progress: Progress, *, released: bool = False) -> Claim:
        """Claim or renew a slot for one lease; ``released`` gives it back at once."""
        now, own = self._clock(), self._identity.peer_id
        seq = self._next_sequence(Claim.KIND, slot, now)
        claim = Claim(
            plan=self._plan_id,
            slot=slot,
            peer=own,
            seq=seq,
            until=now + self._policy.lease_s,
            released=released,
            progress=progress,
            token=self._door.token,
        )
        envelope = claim.seal(self._identity)
        self._files.ledger.record("claim", slot, seq, envelope)
        self._sightings.feed_claim(envelope, now)
        await self._send(claim_key(self._plan_id, slot), envelope, claim.until)
        return claim

    def _next_sequence(self, kind: str, slot: str, now: float) -> int:
        """Above all that this key has signed here, or was seen to have signed with another ledger (R-REC-9)."""
        seen, _digest = self._sightings.trusted.highest.get((self._identity.peer_id, kind, slot), (0, ""))
        return self._files.ledger.next_sequence(kind, slot, now=now, seen=seen)

    # ---- checkpoints ----------------------------------------------------------

    async def announce(
        self, slot: str, *, step: int, root: str, parent: str | None, total_bytes: int, probe_loss: float
    ) -> Announcement:
        """Sign a checkpoint of ours, write it down, and announce that we hold it."""
        ledger = self._files.ledger
        announcement = Announcement(
            plan=self._plan_id,
            slot=slot,
            author=self._identity.peer_id,
            seq=self._next_sequence(Announcement.KIND, slot, self._clock()),
            step=step,
            parent=parent,
            root=root,
            bytes=total_bytes,
            probe_loss=probe_loss,
            token=self._door.token,
        )
        envelope = announcement.seal(self._identity)
        ledger.record("checkpoint", slot, announcement.seq, envelope)
        await self.hold(slot, envelope)
        return announcement

    async def hold(self, slot: str, author_envelope: bytes) -> None:
        """Say that this node holds and serves an announced checkpoint (its own or another author's)."""
        self._files.note_root(Announcement.open(author_envelope).record.root)
        self._files.hold(slot, author_envelope)
        await self._renew_holding(slot, author_envelope)

    async def keep_copy(self, slot: str, author_envelope: bytes, *, announced: bool) -> None:
        """Keep a verified checkpoint for others; ``announced``: say so now."""
        self._files.keep_copy(slot, author_envelope)
        if announced and slot not in self._files.held():
            await self._renew_holding(slot, author_envelope)

    async def _renew_holding(self, slot: str, author_envelope: bytes) -> None:
        now = self._clock()
        holding = Holding(
            plan=self._plan_id,
            slot=slot,
            holder=self._identity.peer_id,
            seq=self._next_sequence(Holding.KIND, slot, now),
            until=now + holding_lease_s(self._policy),
            announcement=author_envelope.decode("utf-8"),
            token=self._door.token,
        )
        envelope = holding.seal(self._identity)
        self._files.ledger.record("holding", slot, holding.seq, envelope)
        self._sightings.feed_holding(envelope, now)
        self._sightings.settle((slot,), now, read=())
        await self._send(checkpoint_key(self._plan_id, slot), envelope, holding.until)

    # ---- saying it again ------------------------------------------------------

    async def send_again(self) -> None:
        """What was signed last and still counts, the very same bytes: a crash may have come before they were sent."""
        for kind, key in ((Claim, claim_key), (Holding, checkpoint_key)):
            for envelope in self._files.ledger.signed(kind.KIND):
                record = kind.open(envelope).record
                if record.until > self._clock():
                    await self._send(key(self._plan_id, record.slot), envelope, record.until)

    def finish_interrupted(self) -> None:
        """Announcements signed before a crash: the very same bytes are sent again, never new ones in their place."""
        held = self._files.held()
        for envelope in self._files.ledger.signed("checkpoint"):
            announcement = Announcement.open(envelope).record
            if announcement.slot not in held and self._store.has(announcement.root):
                self._files.hold(announcement.slot, envelope)

    async def renew_due(self) -> None:
        """Announce again what this home holds and has not been announced for a third of its lease."""
        for slot, envelope in self.to_announce().items():
            if self._is_due(slot, envelope):
                await self._renew_if_counted(slot, envelope)

    def _is_due(self, slot: str, envelope: bytes) -> bool:
        standing = self._sightings.trusted.holdings.get(slot, {}).get(self._identity.peer_id)
        if standing is None or standing[0].announcement.encode() != envelope:
            return True
        return holding_is_due(standing[0], holding_lease_s(self._policy), self._clock())

    async def _renew_if_counted(self, slot: str, envelope: bytes) -> None:
        """Renew one holding. What counts no longer (its author was revoked, or equivocated) is left to lapse: it must
        not keep the holdings of other slots from being renewed.
        """
        try:
            self._sightings.trusted.check_signer(Announcement.open(envelope).record.author)
            await self._renew_holding(slot, envelope)
        except RecordError as error:
            log.info("the checkpoint held for slot %s is not announced again: %s", slot, error)

    def to_announce(self) -> dict[str, bytes]:
        """What this home holds, one checkpoint a slot: what its peer trained or took over, and else what an `assemble`
        of the same home, perhaps another process, left here for others.
        """
        copies = {
            slot: envelope
            for slot, envelope in self._files.copies().items()
            if self._store.holds_some(Announcement.open(envelope).record.root)
        }
        return {**copies, **self._files.held()}

    async def _send(self, key: str, envelope: bytes, until: float) -> None:
        try:
            await self._transport.store(key, self._identity.peer_id, envelope, until)
        except TransportError as error:
            # Training goes on while the network is away; the timer stores it again.
            log.warning("could not store %s: %s", key, error)
