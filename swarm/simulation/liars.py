"""Peers that lie, one kind each. Besides what they say, liars answer no reads of the records they store."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.records import Claim, Progress

if TYPE_CHECKING:
    from paris_swarm.swarm.simulation.scenario import Simulation

KINDS = ("forger", "replayer", "squatter", "idle")


class Liar:
    """A liar of one kind, at work every third of a lease.

    forger: claims in honest peers' names, signed by itself, and claims with a byte changed. replayer: stores records
    again that it has read, oldest first. squatter: claims every slot of the plan, trains none. (The idle key is
    a `SimulatedPeer` that never trains.)
    """

    def __init__(self, world: Simulation, identity: Identity, kind: str, dice: random.Random) -> None:
        self.world, self.identity, self.kind, self._dice = world, identity, kind, dice
        self.peer_id = identity.peer_id
        self.alive = True
        self._kept: list[tuple[str, str, bytes, float]] = []
        self._seq = 0

    def start(self) -> None:
        """Begin to lie."""
        self.world.clock.after(self._dice.random() * self._third, self._act)

    def die(self) -> None:
        """Vanish."""
        self.alive = False

    @property
    def _third(self) -> float:
        return self.world.opened.plan.policy.lease_s / 3

    def _act(self) -> None:
        if not self.alive:
            return
        slots = self.world.slots
        if self.kind == "squatter":
            for slot in slots[:256]:
                self._store(slot, self.peer_id, self._claim(slot, self.identity))
        elif self.kind == "forger":
            for slot in self._dice.sample(slots, min(8, len(slots))):
                victim = next(iter(self.world.measures.trainers.get(slot) or [self.world.opened.plan.organiser]))
                data, until = self._claim(slot, self.identity)
                self._store(slot, victim, (data, until))
                self._store(slot, self.peer_id, (data[:60] + bytes([data[60] ^ 1]) + data[61:], until))
        else:
            slot = self._dice.choice(slots)
            for subkey, data in self.world.dht.read(self.world.claim_place[slot], self.peer_id).items():
                self._kept.append((slot, subkey, data, Claim.open(data).record.until))
            self._kept = [kept for kept in self._kept if kept[3] > self.world.clock.now][-64:]
            for kept_slot, subkey, data, until in self._kept:
                self._store(kept_slot, subkey, (data, until))
        self.world.clock.after(self._third, self._act)

    def _claim(self, slot: str, identity: Identity) -> tuple[bytes, float]:
        now = self.world.clock.now
        self._seq = max(self._seq + 1, int(now * 1000))
        claim = Claim(
            plan=self.world.opened.plan_id,
            slot=slot,
            peer=identity.peer_id,
            seq=self._seq,
            until=now + self.world.opened.plan.policy.lease_s,
            progress=Progress(step=10**9, steps=10**9, loss=None, images_per_s=0.0, device="cpu"),
        )
        return claim.seal(identity), claim.until

    def _store(self, slot: str, subkey: str, signed: tuple[bytes, float]) -> None:
        self.world.dht.store(self.world.claim_place[slot], subkey, *signed, self.peer_id)
