"""What one simulated peer has read: `swarm.sightings` as it ships, and around it what lets ten thousand of them fit
into one process. A simulated peer looks at few of a plan's slots, and reads the same bytes many times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.plan import OpenedPlan
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.dht_schemas.trusted import TrustedSwarm
from paris_swarm.swarm.sightings import Sightings


class SimulatedSightings(Sightings):
    """The verified records of the slots one peer looked at."""

    def __init__(self, opened: OpenedPlan, own: str) -> None:
        trusted = TrustedSwarm(opened)
        trusted.claims = defaultdict(dict)
        trusted.holdings = defaultdict(dict)
        super().__init__(trusted, own)
        self._fed: dict[tuple[str, str, str], bytes] = {}
        self.refused = 0

    def feed(self, kind: str, slot: str, subkey: str, data: bytes, now: float) -> None:
        """Take in a record read from the DHT, or refuse it. The same bytes again say nothing new."""
        if self._fed.get((kind, slot, subkey)) == data:
            return
        try:
            if kind == "claim":
                self.feed_claim(data, now)
            else:
                self.feed_holding(data, now)
        except RecordError:
            self.refused += 1
            return
        self._fed[(kind, slot, subkey)] = data

    def forget_lapsed(self, slots: Collection[str], now: float) -> None:
        """Drop what has lapsed in these slots; `TrustedSwarm.expire` goes through all of them."""
        for slot in slots:
            claims, holdings = self.trusted.claims.get(slot, {}), self.trusted.holdings.get(slot, {})
            for peer in [peer for peer, claim in claims.items() if claim.until <= now]:
                del claims[peer]
                self._fed.pop(("claim", slot, peer), None)
            for holder in [holder for holder, (holding, _) in holdings.items() if holding.until <= now]:
                del holdings[holder]
                self._fed.pop(("holding", slot, holder), None)

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
