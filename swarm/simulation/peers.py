"""A simulated honest peer: carries out what its lane asks for, on the virtual clock."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from paris_swarm.dht_schemas.dht_rules import checkpoint_key, claim_key, dht_id
from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.records import Announcement, Holding, Progress
from paris_swarm.dht_schemas.records import Claim as ClaimRecord
from paris_swarm.swarm.announcing import holding_is_due, holding_lease_s
from paris_swarm.swarm.claims import ROUTER, SlotView
from paris_swarm.swarm.lane import Claim, Lane, Look, Release, Report, Request, Rest, Start, Stop
from paris_swarm.swarm.simulation.sightings import SimulatedSightings
from paris_swarm.swarm.standing_by import COPIES

if TYPE_CHECKING:
    from paris_swarm.swarm.simulation.scenario import Simulation

STEPS = 1_000_000_000
"""Steps that a slot asks for: none is finished within a simulation."""
STEPS_PER_S = 5
SLOW = 3
"""Cadences between two checkpoints of a slow peer: more than the usual grace."""
_FETCH_S = (5.0, 60.0)


class SimulatedPeer:
    """One peer with a lane for cluster slots.

    skew: seconds by which its clock is ahead. idle: it does all an honest peer does, and never trains or publishes.
    slow: its checkpoints take ``SLOW`` times as long as the plan says.
    """

    def __init__(
        self, world: Simulation, identity: Identity, *, skew: float, dice: random.Random, idle: bool, slow: bool
    ) -> None:
        self.world, self.identity, self.skew, self.idle, self.slow = world, identity, skew, idle, slow
        self._every_s = world.opened.plan.policy.checkpoint_every_s * (SLOW if slow else 1)
        self.peer_id = identity.peer_id
        self.sightings = SimulatedSightings(world.opened, self.peer_id)
        self.slot: str | None = None
        """The slot it trains."""
        self.alive = True
        self._dice = dice
        self._step = 0
        self._begun_at = 0.0
        self._training = 0
        self._held: dict[str, str] = {}
        self._renewing = False
        self._published = False
        self._copying = False
        self._seq = 0
        self._waking = 0
        self._leaving = False
        plan = world.opened.plan
        self._lane = Lane(
            world.opened.plan_id,
            self.peer_id,
            world.slots,
            wanted=None,
            policy=plan.policy,
            target_steps=world.target_steps,
            dice=dice,
        ).decide()

    @property
    def now(self) -> float:
        """This peer's clock."""
        return self.world.clock.now + self.skew

    # ---- living and dying

    def start(self) -> None:
        """Begin to live."""
        self._go_on(next(self._lane))

    def die(self) -> None:
        """Vanish without a word."""
        self.alive = False
        self._waking += 1
        if self.slot is not None:
            self.world.measures.ends(self.slot, self.peer_id, self.world.clock.now, died=True)
        self._lane.close()

    def leave(self) -> None:
        """Give the slot back and go."""
        self._leaving = True
        self._waking += 1
        self._told(self._waking, None)
        if self.alive:
            self.world.forget(self)

    # ---- the lane's requests

    def _told(self, turn: int, views: dict[str, SlotView] | None) -> None:
        if not self.alive or turn != self._waking:
            return
        try:
            request = self._lane.send(self._report(views))
        except StopIteration:
            return
        self._go_on(request)

    def _report(self, views: dict[str, SlotView] | None) -> Report:
        return Report(self.now, self.world.dht.population(self.peer_id), views=views, leaving=self._leaving)

    def _go_on(self, request: Request) -> None:
        clock = self.world.clock
        while True:
            self._waking += 1
            match request:
                case Look(slots):
                    clock.after(self.world.dht.delay(), self._looked, self._waking, slots)
                    return
                case Claim(slot):
                    self._say(slot, released=False)
                    if not self._leaving:
                        clock.after(self.world.dht.delay(), self._told, self._waking, None)
                        return
                case Release(slot, yielded):
                    if yielded is not None:
                        self.world.measures.yields += 1
                        self.world.measures.pushed_out += self.slot is not None
                    self._say(slot, released=True)
                case Start(slot):
                    self._begin(slot)
                case Stop():
                    self._end()
                case Rest():
                    if request.held and not self._published:
                        self._keep_copy()
                    clock.after(request.seconds, self._told, self._waking, None)
                    return
            try:
                request = self._lane.send(self._report(None))
            except StopIteration:
                return

    def _looked(self, turn: int, slots: tuple[str, ...]) -> None:
        if not self.alive or turn != self._waking:
            return
        now, world = self.now, self.world
        for slot in slots:
            self._read("claim", slot, world.claim_place[slot])
            self._read("holding", slot, world.checkpoint_place[slot])
        for slot in sorted(self.sightings.to_read_again(slots, now)):
            self._read("claim", slot, world.claim_place[slot])
        self.sightings.forget_lapsed(slots, now)
        self.sightings.settle(slots, now, read=slots)
        self._told(turn, {slot: self.sightings.slot_view(slot, now) for slot in slots})

    def _read(self, kind: str, slot: str, place: tuple[str, bytes]) -> None:
        found = self.world.dht.read(place, self.peer_id)
        self.world.note_read(self, slot, kind, len(found))
        for subkey, data in found.items():
            self.sightings.feed(kind, slot, subkey, data, self.now)

    # ---- training

    def _begin(self, slot: str) -> None:
        self.slot = slot
        self._training += 1
        best = self.sightings.best(slot, self.now)
        self._step = best[0].step if best else 0
        self._begun_at = self.now
        self.world.measures.holds(slot, self.world.clock.now)
        if not self.idle:
            self.world.measures.begins(slot, self.peer_id, self.world.clock.now)
            self.world.clock.after(self._every_s, self._publish, self._training)

    def _end(self) -> None:
        if self.slot is not None:
            if not self.idle:
                self.world.measures.lost(self.now - self._begun_at, slow=self.slow)
            self.world.measures.ends(self.slot, self.peer_id, self.world.clock.now)
        self.slot = None
        self._training += 1

    def _publish(self, training: int) -> None:
        if not self.alive or training != self._training or self.slot is None:
            return
        self._step, self._begun_at = self._steps_done(), self.now
        best = self.sightings.best(self.slot, self.now)
        announcement = Announcement(
            plan=self.world.opened.plan_id,
            slot=self.slot,
            author=self.peer_id,
            seq=self._next(),
            step=self._step,
            parent=best[0].root if best else None,
            root=blake3_hex(f"{self.peer_id} {self.slot} {self._step}".encode()),
            bytes=1_000_000,
            probe_loss=1.0 + 1.0 / (1 + self._step),
        )
        self._published = True
        self.world.measures.published[self.slow] += 1
        self._hold(self.slot, announcement.seal(self.identity).decode())
        self.world.clock.after(self._every_s, self._publish, training)

    def _steps_done(self) -> int:
        return self._step + int((self.now - self._begun_at) * STEPS_PER_S)

    # ---- records

    def _next(self) -> int:
        self._seq = max(self._seq + 1, int(self.now * 1000))
        return self._seq

    def _say(self, slot: str, *, released: bool) -> None:
        steps = self._steps_done() if slot == self.slot else 0
        claim = ClaimRecord(
            plan=self.world.opened.plan_id,
            slot=slot,
            peer=self.peer_id,
            seq=self._next(),
            until=self.now + self.world.opened.plan.policy.lease_s,
            released=released,
            progress=Progress(step=steps, steps=STEPS, loss=None, images_per_s=0.0, device="cpu"),
        )
        data = claim.seal(self.identity)
        self.sightings.feed("claim", slot, self.peer_id, data, self.now)
        self.world.note_store(self)
        self.world.dht.store(self.world.claim_place[slot], self.peer_id, data, claim.until, self.peer_id)

    def _hold(self, slot: str, announcement: str) -> None:
        self._held[slot] = announcement
        self._renew_holding(slot)
        if not self._renewing:
            self._renewing = True
            self.world.clock.after(self.world.opened.plan.policy.lease_s / 3, self._keep_alive)

    def _keep_alive(self) -> None:
        if self.alive:
            own = self.peer_id
            for slot in self._held:
                standing = self.sightings.trusted.holdings[slot].get(own)
                if standing is None or holding_is_due(standing[0], self._holding_s, self.now):
                    self._renew_holding(slot)
            self.world.clock.after(self.world.opened.plan.policy.lease_s / 3, self._keep_alive)

    @property
    def _holding_s(self) -> float:
        return holding_lease_s(self.world.opened.plan.policy)

    def _renew_holding(self, slot: str) -> None:
        holding = Holding(
            plan=self.world.opened.plan_id,
            slot=slot,
            holder=self.peer_id,
            seq=self._next(),
            until=self.now + self._holding_s,
            announcement=self._held[slot],
        )
        data = holding.seal(self.identity)
        self.sightings.feed("holding", slot, self.peer_id, data, self.now)
        self.world.note_store(self)
        self.world.dht.store(self.world.checkpoint_place[slot], self.peer_id, data, holding.until, self.peer_id)

    def _keep_copy(self) -> None:
        """As `Peer` does while it stands by: a verified copy of one slot's newest checkpoint."""
        if self._copying:
            return
        now, own = self.now, self.peer_id
        best = {
            slot: found for slot in list(self.sightings.trusted.holdings) if (found := self.sightings.best(slot, now))
        }
        slot = next(iter(self._held), None)
        if slot not in best:
            slot = min(best, key=lambda name: (len(self.sightings.holders(name, now)), name), default=None)
        if slot is None or own in best[slot][2]:
            return
        if own not in (holders := self.sightings.holders(slot, now)) and len(holders) >= COPIES:
            return
        self._copying = True
        self.world.clock.after(self._dice.uniform(*_FETCH_S), self._copied, slot, best[slot][1])

    def _copied(self, slot: str, announcement: str) -> None:
        self._copying = False
        if self.alive and not self._published:
            if slot not in self._held:
                self._held.clear()
            self._hold(slot, announcement)


def places(plan_id: str, slots: tuple[str, ...]) -> tuple[dict[str, tuple[str, bytes]], dict[str, tuple[str, bytes]]]:
    """(key, DHT id) of every slot's claims, and of its holdings."""
    claims = {slot: claim_key(plan_id, slot) for slot in slots}
    holdings = {slot: checkpoint_key(plan_id, slot) for slot in slots}
    return (
        {slot: (key, dht_id(key)) for slot, key in claims.items()},
        {slot: (key, dht_id(key)) for slot, key in holdings.items()},
    )


def cluster_slots(slots: tuple[str, ...]) -> tuple[str, ...]:
    """The slots without the router's."""
    return tuple(slot for slot in slots if slot != ROUTER)
