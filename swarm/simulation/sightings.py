"""What one simulated peer has read and verified, as the claim policy sees it: the bookkeeping of `node.SwarmNode`,
without files and streams.
"""

from __future__ import annotations

import math
from collections import defaultdict

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.plan import OpenedPlan
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.dht_schemas.trusted import TrustedSwarm
from paris_swarm.swarm.claims import ROUTER, SlotView, beyond_allowance


class Sightings:
    """Verified records of the slots one peer looked at."""

    def __init__(self, opened: OpenedPlan) -> None:
        self.trusted = TrustedSwarm(opened)
        # A peer looks at few of a plan's slots: no dictionaries for the others.
        self.trusted.claims = defaultdict(dict)
        self.trusted.holdings = defaultdict(dict)
        self._plan_id, self._policy = opened.plan_id, opened.plan.policy
        self._first_seen: dict[str, dict[str, float]] = {}
        self._claimed: dict[str, set[str]] = {}
        self._credited: dict[str, tuple[str, float]] = {}
        self._fed: dict[tuple[str, str, str], bytes] = {}
        self.refused = 0

    def feed(self, kind: str, slot: str, subkey: str, data: bytes, now: float) -> None:
        """Take in a record read from the DHT, or refuse it. The same bytes again say nothing new."""
        if self._fed.get((kind, slot, subkey)) == data:
            return
        try:
            if kind == "claim":
                claim = self.trusted.feed_claim(data, now)
                self._claimed.setdefault(claim.peer, set()).add(slot)
                self._first_seen.setdefault(slot, {}).setdefault(claim.peer, now)
            else:
                _holding, announcement = self.trusted.feed_holding(data, now)
                self._credited.setdefault(announcement.root, (announcement.author, now))
        except RecordError:
            self.refused += 1
            return
        self._fed[(kind, slot, subkey)] = data

    def forget(self, slot: str, now: float) -> None:
        """Drop what has lapsed in a slot; a claimant that went away starts anew when it comes back."""
        claims, holdings = self.trusted.claims.get(slot, {}), self.trusted.holdings.get(slot, {})
        for peer in [peer for peer, claim in claims.items() if claim.until <= now]:
            del claims[peer]
            self._fed.pop(("claim", slot, peer), None)
        for holder in [holder for holder, (holding, _) in holdings.items() if holding.until <= now]:
            self._credited.pop(holdings[holder][1].root, None)
            del holdings[holder]
            self._fed.pop(("holding", slot, holder), None)
        seen = self._first_seen.get(slot, {})
        for peer in [peer for peer in seen if not self._is_claiming(slot, peer, now)]:
            del seen[peer]

    def view(self, slot: str, now: float) -> SlotView:
        """The slot as the claim policy sees it."""
        made: dict[str, float] = {}
        step = 0
        for _holding, announcement in self.trusted.holdings.get(slot, {}).values():
            step = max(step, announcement.step)
            author, seen = self._credited.get(announcement.root, (announcement.author, math.inf))
            if author == announcement.author:
                made[author] = max(made.get(author, 0.0), min(announcement.seq / 1000, seen))
        claims = self.trusted.claims.get(slot, {})
        return SlotView(
            slot=slot,
            claims=dict(claims),
            first_seen=dict(self._first_seen.get(slot, {})),
            checkpoint_at=made,
            step=step,
            beyond=frozenset(peer for peer in claims if self._is_beyond(slot, peer, now)),
        )

    def best(self, slot: str, now: float) -> tuple[Announcement, str, frozenset[str]] | None:
        """The slot's best announced checkpoint, its author's envelope and its holders; None without any."""
        held = [entry for entry in self.trusted.holdings.get(slot, {}).values() if entry[0].until > now]
        if not held:
            return None
        holding, best = min(held, key=lambda entry: (entry[1].probe_loss, entry[1].root))
        return best, holding.announcement, frozenset(one.holder for one, of in held if of.root == best.root)

    def holders(self, slot: str, now: float) -> frozenset[str]:
        """Who holds any checkpoint of the slot."""
        return frozenset(
            holder for holder, (lease, _) in self.trusted.holdings.get(slot, {}).items() if lease.until > now
        )

    def overclaimed(self, slots: tuple[str, ...], now: float) -> set[str]:
        """Further slots to read because somebody seen in ``slots`` claims more of them than a key may."""
        found: set[str] = set()
        for peer in {peer for slot in slots for peer in self.trusted.claims.get(slot, {})}:
            live = {name for name in self._claimed.get(peer, ()) if self._is_claiming(name, peer, now)}
            if len(live) > self._policy.slots_per_key:
                found |= live
        return found - set(slots)

    def _is_beyond(self, slot: str, peer: str, now: float) -> bool:
        claimed = self._claimed.get(peer, ())
        if slot == ROUTER or len(claimed) <= self._policy.slots_per_key:
            return False
        live = [name for name in claimed if name != ROUTER and self._is_claiming(name, peer, now)]
        if len(live) <= self._policy.slots_per_key:
            return False
        return slot in beyond_allowance(self._plan_id, peer, live, self._policy.slots_per_key)

    def _is_claiming(self, slot: str, peer: str, now: float) -> bool:
        claim = self.trusted.claims.get(slot, {}).get(peer)
        return claim is not None and not claim.released and claim.until > now
