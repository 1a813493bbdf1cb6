"""What a simulated swarm is judged by.

duplicate work: peer-seconds trained on a slot beyond its planned replicas, over all peer-seconds trained, from the
third lease on. orphan: a slot whose trainer died, until another peer holds it (its claim has settled). Standing by is
no work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least ``share`` of all do not exceed (nearest rank); None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


@dataclass
class Measures:
    """Counts while the simulation runs. Times are virtual Unix seconds."""

    slots: tuple[str, ...]
    replicas: int
    lease_s: float
    start: float
    counted_from: float
    """Work and records before this time do not count."""
    trainers: dict[str, set[str]] = field(default_factory=dict)
    worked: float = 0.0
    doubled: float = 0.0
    doubled_parted: float = 0.0
    """Of it, while the world was divided."""
    parted: bool = False
    all_held_at: float | None = None
    healed_at: float | None = None
    one_again_at: float | None = None
    """When, after a partition was healed, no slot had more trainers than planned any longer."""
    orphans: list[tuple[float, float]] = field(default_factory=list)
    """(time of a trainer's death, leases until somebody's settled claim held the slot again)."""
    untrained: list[tuple[float, float]] = field(default_factory=list)
    """(time of a trainer's death, leases until somebody trained the slot again): longer where an idle key took it."""
    given_back: list[tuple[float, float]] = field(default_factory=list)
    stores: Counter[str] = field(default_factory=Counter)
    """By what the peer was doing: training, standing."""
    reads: Counter[str] = field(default_factory=Counter)
    records_read: int = 0
    key_reads: Counter[str] = field(default_factory=Counter)
    """Reads of a slot's claims key, by slot."""
    starts: int = 0
    yields: int = 0
    pushed_out: int = 0
    """Yields of a peer that was training."""
    displaced: Counter[bool] = field(default_factory=Counter)
    """Honest peers that gave a slot up, by whether they are slow."""
    lost_s: Counter[bool] = field(default_factory=Counter)
    """Seconds that they had trained since their last checkpoint."""
    published: Counter[bool] = field(default_factory=Counter)
    """Checkpoints, by whether their author is slow."""
    _since: dict[str, float] = field(default_factory=dict)
    _open: dict[str, list[tuple[float, bool]]] = field(default_factory=dict)
    _resting: dict[str, list[float]] = field(default_factory=dict)

    def holds(self, slot: str, now: float) -> None:
        """A peer's claim on the slot is settled."""
        for left_at, died in self._open.pop(slot, ()):
            (self.orphans if died else self.given_back).append((left_at, (now - left_at) / self.lease_s))

    def begins(self, slot: str, peer: str, now: float) -> None:
        """A peer trains the slot from now on."""
        self._count(slot, now)
        self.trainers.setdefault(slot, set()).add(peer)
        self.starts += 1
        self.untrained += [(died_at, (now - died_at) / self.lease_s) for died_at in self._resting.pop(slot, ())]
        if self.all_held_at is None and all(self.trainers.get(name) for name in self.slots):
            self.all_held_at = now

    def ends(self, slot: str, peer: str, now: float, *, died: bool = False) -> None:
        """It trains it no longer."""
        if peer not in self.trainers.get(slot, ()):
            return
        self._count(slot, now)
        self.trainers[slot].discard(peer)
        if len(self.trainers[slot]) < self.replicas:
            self._open.setdefault(slot, []).append((now, died))
            if died:
                self._resting.setdefault(slot, []).append(now)
        elif died:
            self.orphans.append((now, 0.0))
            self.untrained.append((now, 0.0))
        if self.healed_at is not None and self.one_again_at is None and not self._crowded():
            self.one_again_at = now

    def lost(self, seconds: float, *, slow: bool) -> None:
        """An honest peer gives its slot up, with so much work that no checkpoint has."""
        self.displaced[slow] += 1
        self.lost_s[slow] += round(seconds)

    def healed(self, now: float) -> None:
        """The partition is over."""
        self.settle(now)
        self.parted, self.healed_at = False, now
        if not self._crowded():
            self.one_again_at = now

    def settle(self, now: float) -> None:
        """Count the work of every slot until now."""
        for slot in self.slots:
            self._count(slot, now)

    def close(self, now: float) -> None:
        """The end: slots that nobody took for two leases or more count with what they waited."""
        self.settle(now)
        for times in self._resting.values():
            self.untrained += [(at, (now - at) / self.lease_s) for at in times if now - at > 2 * self.lease_s]
        for waits in self._open.values():
            for left_at, died in waits:
                if now - left_at > 2 * self.lease_s:
                    (self.orphans if died else self.given_back).append((left_at, (now - left_at) / self.lease_s))

    def _crowded(self) -> bool:
        return any(len(peers) > self.replicas for peers in self.trainers.values())

    def _count(self, slot: str, now: float) -> None:
        since = max(self._since.get(slot, self.start), self.counted_from)
        self._since[slot] = now
        peers = len(self.trainers.get(slot, ()))
        if now > since and peers:
            self.worked += peers * (now - since)
            beyond = max(0, peers - self.replicas) * (now - since)
            self.doubled += beyond
            if self.parted:
                self.doubled_parted += beyond
