"""The world of the simulation: a virtual clock, messages that are late, lost, doubled and out of order, partitions, and
the DHT's replicas with hivemind's faults.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.swarm.crowd import NEAREST, population
from paris_swarm.swarm.simulation.verifying import Verifier

REPLICAS = 5
MOST_SUBKEYS = 256
START = 1_800_000_000.0


class VirtualClock:
    """Runs what is due, in order of time and then of scheduling."""

    def __init__(self) -> None:
        self.now = START
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def after(self, seconds: float, what: Callable[..., None], *args: Any) -> None:
        """Run ``what(*args)`` in so many virtual seconds."""
        self._count += 1
        heapq.heappush(self._due, (self.now + max(0.0, seconds), self._count, what, args))

    def run(self, until: float) -> None:
        """Let the world run until a virtual time."""
        while self._due and self._due[0][0] <= until:
            self.now, _, what, args = heapq.heappop(self._due)
            what(*args)
        self.now = until


@dataclass(frozen=True)
class Faults:
    """What the network does.

    median_s, spread: of a DHT operation's time (log-normal). loss: probability that one message between two nodes is
    lost; a store of one replica is one message, reading it two. duplicate: probability that a stored message arrives
    twice, the second time later. absent: probability that a read does not find one of the replicas at all (routing
    tables lag). early_eviction: hivemind's storage fault, on nodes that do not run ours: a store that is refused
    because it ends earlier makes the standing record end then as well.
    """

    median_s: float = 0.4
    spread: float = 0.6
    loss: float = 0.0
    duplicate: float = 0.0
    absent: float = 0.0
    early_eviction: bool = False


@dataclass(slots=True)
class Node:
    """A DHT node. Stored: key -> subkey -> [value, until, evicted at]. hides: it answers nothing (a liar)."""

    peer: str
    position: float
    side: int = 0
    hides: bool = False
    stored: dict[str, dict[str, list[Any]]] = field(default_factory=dict)


class Dht:
    """Replicated storage: a record lies on the nodes nearest to its key."""

    def __init__(self, clock: VirtualClock, dice: random.Random, faults: Faults, verifier: Verifier) -> None:
        self.clock, self.dice, self.faults, self.verifier = clock, dice, faults, verifier
        self._nodes: dict[str, Node] = {}
        self._rings: list[list[tuple[float, str]]] = [[]]
        self._places: dict[str, float] = {}
        self.refused = 0

    # ---- nodes

    def join(self, peer: str, *, hides: bool = False) -> None:
        """A node appears, with nothing stored."""
        position = _share(peer)
        node = Node(peer, position, self._side_of(position), hides)
        self._nodes[peer] = node
        insort(self._rings[node.side], (position, peer))

    def leave(self, peer: str) -> None:
        """A node is gone, with all it stored."""
        node = self._nodes.pop(peer)
        ring = self._rings[node.side]
        del ring[bisect_left(ring, (node.position, peer))]

    def part(self) -> None:
        """Divide the world in two."""
        self._rings = [[], []]
        self._place()

    def heal(self) -> None:
        """End the partition."""
        self._rings = [[]]
        self._place()

    def side(self, peer: str) -> int:
        """On which side of a partition a node is."""
        return self._nodes[peer].side

    def _place(self) -> None:
        for node in self._nodes.values():
            node.side = self._side_of(node.position)
            self._rings[node.side].append((node.position, node.peer))
        for ring in self._rings:
            ring.sort()

    def _side_of(self, position: float) -> int:
        return int(position * 2**40) % len(self._rings)

    def population(self, peer: str) -> int:
        """What that node's neighbourhood tells it of the number of nodes (`swarm.crowd`)."""
        node = self._nodes[peer]
        ring = self._rings[node.side]
        others = len(ring) - 1
        if others <= NEAREST:
            return population((), others)
        at = bisect_left(ring, (node.position, peer))
        far, _ = ring[(at + NEAREST) % len(ring)]
        return population([0.0] * (NEAREST - 1) + [(far - node.position) % 1.0], others)

    # ---- records

    def delay(self) -> float:
        """Seconds that one operation takes."""
        return self.dice.lognormvariate(math.log(self.faults.median_s), self.faults.spread)

    def store(self, place: tuple[str, bytes], subkey: str, value: bytes, until: float, by: str) -> None:
        """Send a record to the replicas of its key; it arrives at each in its own time, or not."""
        key, dht_id = place
        if by not in self._nodes:
            return
        for node in self._nearest(key, self._nodes[by].side):
            copies = 1 + (self.dice.random() < self.faults.duplicate)
            for copy in range(copies):
                if self.dice.random() >= self.faults.loss:
                    late = self.delay() * (1 + 4 * copy)
                    self.clock.after(late, self._arrive, node, key, dht_id, subkey, value, until)

    def _arrive(self, node: Node, key: str, dht_id: bytes, subkey: str, value: bytes, until: float) -> None:
        if node.peer not in self._nodes:
            return
        try:
            self.verifier.admit(dht_id, subkey, value, until, self.clock.now)
        except RecordError:
            self.refused += 1
            return
        now = self.clock.now
        records = node.stored.setdefault(key, {})
        if len(records) >= MOST_SUBKEYS:
            for name in [name for name, one in records.items() if one[2] <= now]:
                del records[name]
        standing = records.get(subkey)
        if standing is None or standing[2] <= now:
            if standing is not None or len(records) < MOST_SUBKEYS:
                records[subkey] = [value, until, until]
        elif until > standing[1]:
            records[subkey] = [value, until, until]
        elif self.faults.early_eviction:
            standing[2] = min(standing[2], until)

    def read(self, place: tuple[str, bytes], by: str) -> dict[str, bytes]:
        """subkey -> the record that ends last, of the replicas that answered."""
        key, _ = place
        now = self.clock.now
        unheard = 1 - (1 - self.faults.loss) ** 2 * (1 - self.faults.absent)
        found: dict[str, tuple[float, bytes]] = {}
        for node in self._nearest(key, self._nodes[by].side):
            if node.hides or (unheard > 0 and self.dice.random() < unheard):
                continue
            records = node.stored.get(key)
            if not records:
                continue
            for subkey, (value, until, evicted_at) in list(records.items()):
                if evicted_at <= now:
                    del records[subkey]
                    continue
                self.verifier.count += 1
                standing = found.get(subkey)
                if standing is None or until > standing[0]:
                    found[subkey] = (until, value)
        return {subkey: value for subkey, (_, value) in found.items()}

    def _nearest(self, key: str, side: int) -> Iterator[Node]:
        ring, place = self._rings[side], self._places.get(key)
        if place is None:
            place = self._places[key] = _share(key)
        at = bisect_left(ring, (place, ""))
        for step in range(min(REPLICAS, len(ring))):
            yield self._nodes[ring[(at + step) % len(ring)][1]]


def _share(name: str) -> float:
    """Where a name lies in the key space, as a share of it."""
    return int(blake3_hex(name.encode())[:13], 16) / 16**13
