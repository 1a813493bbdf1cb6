"""What one peer has seen of a swarm, as the claim policy sees it: who claims what since when, whose work a checkpoint
is, whose word counts no longer. No I/O, no clock; `node` keeps it for a real peer, `simulation` for thousands.

The records themselves, verified, are in a `TrustedSwarm`. Here is what a reader adds to them: times of its own (a
record's sequence is its signer's word), doubts, and suspicions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass

from paris_swarm.dht_schemas import records
from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.errors import MalformedRecord, NotFinite, ProbeFailed, RecordTooLarge
from paris_swarm.dht_schemas.records import Announcement, Claim, Holding
from paris_swarm.dht_schemas.trusted import TrustedSwarm
from paris_swarm.swarm.claims import ROUTER, SlotView, beyond_allowance

MAX_LIVE = 1024
"""Claims, and holdings, of one slot that a reader keeps; beyond that only those it knows there renew (R-DHT-8)."""
SQUATTED = 2
"""Cluster slots beyond its allowance that a key may be seen to claim before none of its bare claims protects (C9): an
honest peer has them where all replicas of a key missed its release.
"""

_REFUSED_FOR_GOOD = (MalformedRecord, RecordTooLarge, NotFinite, ProbeFailed)
"""What a checkpoint is itself to blame for. Other bytes than its own, or a closed door, are the fault of a holder:
whoever could make an honest checkpoint count as refused by serving rubbish in its name would be rid of it.
"""


@dataclass(frozen=True)
class Candidate:
    """An announced checkpoint of a slot and who holds it now."""

    slot: str
    announcement: Announcement
    envelope: bytes
    holders: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Names the announcement. Its root does not: anyone may announce somebody else's root, with lies about it."""
        return blake3_hex(self.envelope)


class Sightings:
    """One reader's view of the swarm in ``trusted``.

    Args:
        own: the reader's own peer id; it is not suspected, and its own checkpoints need no proof.
    """

    def __init__(self, trusted: TrustedSwarm, own: str) -> None:
        self.trusted, self._own = trusted, own
        self._plan_id, self._policy = trusted.plan_id, trusted.plan.policy
        self.first_seen: dict[str, dict[str, float]] = {}
        """slot -> claimant -> when its claim was first seen here (Unix s)."""
        self.last_seen: dict[str, float] = {}
        """peer -> newest time known of it (Unix s)."""
        self.claimed: dict[str, set[str]] = {}
        """peer -> slots it was seen to claim."""
        self._credited: dict[str, dict[str, tuple[str, float]]] = {}
        """slot -> root -> (the author credited with it, when it was first seen here); R-REC-11."""
        self._doubted: dict[str, float] = {}
        """Digest of an announcement -> until when it is left out of account (Unix s)."""
        self._suspected: dict[tuple[str, str], float] = {}
        """(slot, author) -> until (Unix s) when what the author announces there keeps nobody from it; R-REC-11."""
        self._beside: dict[tuple[str, str], float] = {}
        """(slot, claimant) -> since when its bare claim is seen beside checkpoints that others keep making (C9)."""
        self._came_to: dict[tuple[str, str], frozenset[str]] = {}
        """(slot, claimant) -> who had a checkpoint there when its claim was first seen here (C9)."""
        self._beside_only: dict[str, tuple[str, frozenset[str]]] = {}
        """peer found idle for standing beside others -> (slot, those others)."""
        self._idle: dict[str, float] = {}
        """peer -> until (Unix s) when no bare claim of it protects a slot (C9)."""

    @property
    def _horizon_s(self) -> float:
        """How long a suspicion lasts: two leases, and the time that a claim may run."""
        return 2 * self._policy.lease_s + records.MAX_LEASE_S

    # ---- taking in ------------------------------------------------------------

    def has_room(self, slot: str, peer: str, *, claims: bool) -> bool:
        """Whether a record of this peer is worth judging: a full slot has room for those known there (R-DHT-8)."""
        known: Mapping[str, object] = (self.trusted.claims if claims else self.trusted.holdings)[slot]
        return len(known) < MAX_LIVE or peer in known or peer == self.trusted.plan.organiser

    def feed_claim(self, data: bytes, now: float) -> Claim:
        """Take in a claim, or raise a RecordError."""
        claim = self.trusted.feed_claim(data, now)
        self.claimed.setdefault(claim.peer, set()).add(claim.slot)
        self.first_seen.setdefault(claim.slot, {}).setdefault(claim.peer, now)
        self._note_seen(claim.peer, claim.seq, now)
        return claim

    def feed_holding(self, data: bytes, now: float) -> Holding:
        """Take in a holding and the announcement in it, or raise a RecordError."""
        holding, _announcement = self.trusted.feed_holding(data, now)
        self._note_seen(holding.holder, holding.seq, now)
        return holding

    def _note_seen(self, peer: str, seq: int, now: float) -> None:
        # A sequence from the future makes nobody younger than now (R-SET-8).
        self.last_seen[peer] = max(self.last_seen.get(peer, 0.0), min(seq / 1000, now))

    def to_read_again(self, slots: Collection[str], now: float) -> set[str]:
        """Further slots to read before anything follows from ``slots``: whoever is seen to claim more than a key may
        has the others read again, for an honest peer has moved and released its old claim (R-REC-10). Not of keys known
        to be idle that have no checkpoint here either: nothing more could follow.
        """
        found: set[str] = set()
        for slot in slots:
            made = self._made(slot, now)
            for peer in self.trusted.claims.get(slot, {}) if slot != ROUTER else ():
                if not self._is_idle(peer, now) or peer in made:
                    found |= self._too_many(peer, now)
        return found - set(slots)

    def settle(self, slots: Iterable[str], now: float, *, read: Container[str]) -> None:
        """Drop what has lapsed in ``slots``, credit authors; in those of which claims and holdings were ``read`` just
        now, find out who is idle: a checkpoint that was not looked for may be there all the same.
        """
        for slot in slots:
            seen = self.first_seen.get(slot, {})
            if not (seen or self.trusted.holdings.get(slot) or self._credited.get(slot)):
                continue
            for peer in [peer for peer in seen if not self._is_claiming(slot, peer, now)]:
                del seen[peer]  # a claimant that went away starts anew when it comes back
                self._beside.pop((slot, peer), None)
                self._came_to.pop((slot, peer), None)
            self._credit_authors(slot, now)
            if slot in read:
                self._find_idle(slot, now)

    def forget_absent(self, now: float) -> None:
        """Keep nothing about peers of whom no record is left: keys cost nothing, and a node runs for months."""
        present = {peer for claims in self.trusted.claims.values() for peer in claims}
        present |= {holder for holdings in self.trusted.holdings.values() for holder in holdings}
        self.last_seen = {peer: seen for peer, seen in self.last_seen.items() if peer in present}
        self.claimed = {peer: slots for peer, slots in self.claimed.items() if peer in present}
        self._suspected = {author: until for author, until in self._suspected.items() if until > now}
        self._doubted = {digest: until for digest, until in self._doubted.items() if until > now}
        self._idle = {peer: until for peer, until in self._idle.items() if until > now}
        self._beside_only = {peer: found for peer, found in self._beside_only.items() if peer in self._idle}

    def _credit_authors(self, slot: str, now: float) -> None:
        """Credit each root to the author seen with it first, in one reading to the earlier sequence, and from then on.

        Otherwise announcing a rival's root as one's own, or one's only root again and again, or once with a sequence
        from the future, would keep an idle claim alive, and could even push a working rival out.
        """
        held = [announcement for _holding, announcement in self.trusted.holdings.get(slot, {}).values()]
        known = self._credited.get(slot, {})
        if not held and not known:
            return
        credited = {root: known[root] for root in {one.root for one in held} if root in known}
        for announcement in sorted(held, key=lambda one: (one.seq, one.author)):
            credited.setdefault(announcement.root, (announcement.author, now))
        self._credited[slot] = credited

    def _find_idle(self, slot: str, now: float) -> None:
        """Whose bare claims protect nothing from now on (C9; R-REC-13)."""
        view = self._view(slot, self._made(slot, now))
        policy = self._policy
        live = view.live(now)
        working = frozenset(peer for peer in live if view.fresh(peer, now, policy))
        allowed = policy.slots_per_key + SQUATTED
        for peer in live:
            came_to = self._came_to.setdefault((slot, peer), working)
            if peer == self._own or peer in working:
                self._beside.pop((slot, peer), None)
                continue
            if self._idle.get(peer, 0.0) > now + policy.lease_s and peer not in self._beside_only:
                continue  # known, and for good
            # Nobody yields to who came later: rubbish announced beside a newcomer must not cost it its grace.
            should_yield_to = working & came_to
            if len(should_yield_to) >= policy.replicas:
                beside = now - self._beside.setdefault((slot, peer), now)
            else:
                self._beside.pop((slot, peer), None)
                beside = 0.0
            if now - view.first_seen.get(peer, now) >= policy.first_checkpoint_grace_s or (
                slot != ROUTER and len(self._too_many(peer, now)) > allowed
            ):
                self._idle[peer] = now + self._horizon_s
                self._beside_only.pop(peer, None)
            elif beside >= policy.lease_s:
                self._idle[peer] = now + self._horizon_s
                self._beside_only[peer] = (slot, should_yield_to)

    # ---- claims ---------------------------------------------------------------

    def _is_claiming(self, slot: str, peer: str, now: float) -> bool:
        claim = self.trusted.claims.get(slot, {}).get(peer)
        return claim is not None and not claim.released and claim.until > now

    def _too_many(self, peer: str, now: float) -> set[str]:
        """The cluster slots a peer has live claims on, when they are more than a key may hold; otherwise nothing."""
        claimed = self.claimed.get(peer, ())
        if len(claimed) <= self._policy.slots_per_key:
            return set()
        live = {slot for slot in claimed if slot != ROUTER and self._is_claiming(slot, peer, now)}
        return live if len(live) > self._policy.slots_per_key else set()

    def _is_idle(self, peer: str, now: float) -> bool:
        return self._idle.get(peer, 0.0) > now

    def _is_beyond(self, slot: str, peer: str, now: float) -> bool:
        live = self._too_many(peer, now)
        return slot in live and slot in beyond_allowance(self._plan_id, peer, live, self._policy.slots_per_key)

    def slot_view(self, slot: str, now: float, *, believed: Container[str] | None = None) -> SlotView:
        """The slot as the claim policy sees it. ``believed``: digests of announcements; of other peers' checkpoints
        only these are taken for work then.
        """
        claims, made = self.trusted.claims.get(slot, {}), self._made(slot, now, believed)
        idle = frozenset(peer for peer in claims if self._is_idle(peer, now))
        # An idle claimant without a checkpoint protects nothing: whether it claims too many need not be found out.
        counting = [peer for peer in claims if peer not in idle or peer in made] if slot != ROUTER else []
        return self._view(
            slot,
            made,
            step=max((found.step for _, found in self._counted(slot, now)), default=0),
            beyond=frozenset(peer for peer in counting if self._is_beyond(slot, peer, now)),
            idle=idle,
        )

    def _view(
        self,
        slot: str,
        made: Mapping[str, float],
        *,
        step: int = 0,
        beyond: frozenset[str] = frozenset(),
        idle: frozenset[str] = frozenset(),
    ) -> SlotView:
        claims = dict(self.trusted.claims.get(slot, {}))
        return SlotView(slot, claims, dict(self.first_seen.get(slot, {})), made, step, beyond, idle)

    # ---- checkpoints ----------------------------------------------------------

    def _counted(self, slot: str, now: float) -> list[tuple[Holding, Announcement]]:
        """Holdings whose announcements are neither doubted nor by an author suspected here."""
        return [
            (holding, found)
            for holding, found in self.trusted.holdings.get(slot, {}).values()
            if not self._is_doubted(holding, now) and self._suspected.get((slot, found.author), 0.0) <= now
        ]

    def _made(self, slot: str, now: float, believed: Container[str] | None = None) -> dict[str, float]:
        """When each author's newest checkpoint of the slot was made (Unix s), as far as it counts as its work."""
        made: dict[str, float] = {}
        credited = self._credited.get(slot, {})
        for holding, found in self._counted(slot, now):
            author, seen = credited.get(found.root, (found.author, math.inf))
            if author == found.author and (
                believed is None or author == self._own or blake3_hex(holding.announcement.encode()) in believed
            ):
                made[author] = max(made.get(author, 0.0), min(found.seq / 1000, seen))
        return made

    def candidates(self, slot: str, now: float) -> list[Candidate]:
        """Announced checkpoints of a slot that someone holds now, best announced probe loss first, ties by root, then
        by who announced it first. Announcements of one root are candidates of their own, and share its holders.
        """
        held = [entry for entry in self.trusted.holdings.get(slot, {}).values() if entry[0].until > now]
        holders: dict[str, list[str]] = {}
        announced: dict[bytes, Announcement] = {}
        for holding, announcement in held:
            holders.setdefault(announcement.root, []).append(holding.holder)
            if not self._is_doubted(holding, now):
                announced.setdefault(holding.announcement.encode(), announcement)
        credited = self._credited.get(slot, {})

        def order(candidate: Candidate) -> tuple[float, str, bool, int, str]:
            found = candidate.announcement
            borrowed = credited.get(found.root, (found.author,))[0] != found.author
            return found.probe_loss, found.root, borrowed, found.seq, found.author

        return sorted(
            (Candidate(slot, found, envelope, tuple(holders[found.root])) for envelope, found in announced.items()),
            key=order,
        )

    def doubt(self, candidate: Candidate, why: Exception, now: float) -> bool:
        """Leave an announcement out of account: for good when what it announces was refused, for two leases when
        nobody served it, or somebody served other bytes.

        For two leases and the time that a claim may run, nothing else that its author announces for this slot keeps
        anybody from the slot either: one key could announce rubbish faster than anyone can refute it (R-REC-11).

        Returns:
            Whether it was refused for good.
        """
        refused = isinstance(why, _REFUSED_FOR_GOOD)
        self._doubted[candidate.digest] = math.inf if refused else now + 2 * self._policy.lease_s
        author = candidate.announcement.author
        if author != self._own:
            self._suspected[(candidate.slot, author)] = now + self._horizon_s
            self._take_back(candidate.slot, author)
        return refused

    def _take_back(self, slot: str, author: str) -> None:
        """What was found of those who stood beside this author, whose word is not believed any more (C9)."""
        for peer, (where, others) in list(self._beside_only.items()):
            if where == slot and author in others:
                del self._beside_only[peer]
                self._idle.pop(peer, None)
        for place, others in self._came_to.items():
            if place[0] == slot and author in others:
                self._came_to[place] = others - {author}
                self._beside.pop(place, None)

    def _is_doubted(self, holding: Holding, now: float) -> bool:
        return bool(self._doubted) and self._doubted.get(blake3_hex(holding.announcement.encode()), 0.0) > now
