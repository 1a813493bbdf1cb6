"""A scenario, its run, and the figures it gives."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.plan import (
    Bars,
    OpenedPlan,
    Plan,
    Policy,
    SlotSpec,
    TensorSpec,
    Verification,
    open_plan,
    seal_plan,
)
from paris_swarm.swarm.simulation.liars import KINDS, Liar
from paris_swarm.swarm.simulation.measures import Measures, percentile
from paris_swarm.swarm.simulation.peers import STEPS, SimulatedPeer, cluster_slots, places
from paris_swarm.swarm.simulation.verifying import Verifier
from paris_swarm.swarm.simulation.world import START, Dht, Faults, VirtualClock


@dataclass(frozen=True)
class Scenario:
    """One swarm and what befalls it.

    leases: virtual length of the run. life_leases: mean lifetime of a peer (exponential); whoever goes is replaced by
    a new key at once. leaving: share of departures that release their slot instead of dying. liars: share of the peers,
    in equal parts of each of ``kinds``. slow: share of the honest whose checkpoints take long (`peers.SLOW`). parted:
    leases from and to which the world is divided in two. skew_s: clocks are ahead or behind by up to this. Policy
    values are the defaults of `paris-swarm init`.
    """

    peers: int
    slots: int
    seed: int = 0
    leases: float = 40.0
    life_leases: float = 12.0
    leaving: float = 0.0
    faults: Faults = field(default_factory=Faults)
    liars: float = 0.0
    kinds: tuple[str, ...] = KINDS
    slow: float = 0.0
    parted: tuple[float, float] | None = None
    skew_s: float = 0.0
    join_within_s: float = 5.0
    lease_s: float = 300.0
    checkpoint_every_s: float = 600.0
    grace_s: float = 1200.0
    replicas: int = 1


class Simulation:
    """A scenario under way."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.opened = plan_of(scenario)
        self.slots = cluster_slots(self.opened.plan.slots)
        self.target_steps = dict.fromkeys(self.slots, STEPS)
        self.claim_place, self.checkpoint_place = places(self.opened.plan_id, self.slots)
        self.clock = VirtualClock()
        self.dice = random.Random(scenario.seed)
        self.verifier = Verifier({self.opened.plan_id: self.opened.plan})
        self.dht = Dht(self.clock, random.Random(scenario.seed + 1), scenario.faults, self.verifier)
        self.measures = Measures(self.slots, scenario.replicas, scenario.lease_s, START, START + 2 * scenario.lease_s)
        self.peers: dict[str, SimulatedPeer | Liar] = {}
        self.deaths = 0
        self._born = 0

    def run(self) -> dict[str, Any]:
        """Play the scenario to its end; returns the figures (README of benchmarks/claims.py)."""
        scenario, lease = self.scenario, self.scenario.lease_s
        with self.verifier.memoised():
            for _ in range(scenario.peers):
                self.clock.after(self.dice.uniform(0, scenario.join_within_s), self._bear)
            if scenario.parted is not None:
                self.clock.after(scenario.parted[0] * lease, self._part)
                self.clock.after(scenario.parted[1] * lease, self._heal)
            self.clock.run(START + scenario.leases * lease)
        self.measures.close(self.clock.now)
        return self._figures()

    # ---- comings and goings

    def _bear(self) -> None:
        scenario = self.scenario
        number, self._born = self._born, self._born + 1
        # A number of its own for each peer: what one draws changes nothing for the others.
        dice = random.Random(f"{scenario.seed}/{number}")
        identity = Identity(dice.randbytes(32))
        lies = scenario.kinds[number % len(scenario.kinds)] if dice.random() < scenario.liars else None
        peer: SimulatedPeer | Liar
        if lies is None or lies == "idle":
            skew = dice.uniform(-scenario.skew_s, scenario.skew_s)
            slow = lies is None and scenario.slow > 0 and dice.random() < scenario.slow
            peer = SimulatedPeer(self, identity, skew=skew, dice=dice, idle=lies == "idle", slow=slow)
        else:
            peer = Liar(self, identity, lies, dice)
        self.peers[peer.peer_id] = peer
        self.dht.join(peer.peer_id, hides=lies is not None)
        leaves = lies is None and dice.random() < scenario.leaving
        self.clock.after(dice.expovariate(1 / (scenario.life_leases * scenario.lease_s)), self._end, peer, leaves)
        peer.start()

    def _end(self, peer: SimulatedPeer | Liar, leaves: bool) -> None:
        if leaves and isinstance(peer, SimulatedPeer):
            peer.leave()
        else:
            self.deaths += 1
            peer.die()
            self.forget(peer)
        self._bear()

    def forget(self, peer: SimulatedPeer | Liar) -> None:
        """The peer is gone."""
        peer.alive = False
        del self.peers[peer.peer_id]
        self.dht.leave(peer.peer_id)

    def _part(self) -> None:
        self.measures.settle(self.clock.now)
        self.measures.parted = True
        self.dht.part()

    def _heal(self) -> None:
        self.dht.heal()
        self.measures.healed(self.clock.now)

    # ---- counting

    def note_read(self, peer: SimulatedPeer, slot: str, kind: str, returned: int) -> None:
        """A peer reads one key, and so many records come back."""
        if self.clock.now >= self.measures.counted_from:
            self.measures.reads["training" if peer.slot is not None else "standing"] += 1
            self.measures.records_read += returned
            if kind == "claim":
                self.measures.key_reads[slot] += 1

    def note_store(self, peer: SimulatedPeer) -> None:
        """A peer stores one record."""
        if self.clock.now >= self.measures.counted_from:
            self.measures.stores["training" if peer.slot is not None else "standing"] += 1

    def _figures(self) -> dict[str, Any]:
        seen, scenario = self.measures, self.scenario
        seconds = (scenario.leases - 2) * scenario.lease_s
        peer_seconds = seconds * scenario.peers
        reads, stores = sum(seen.reads.values()), sum(seen.stores.values())
        enough = scenario.peers >= scenario.slots
        waits = [leases for _, leases in seen.orphans]
        back = [leases for _, leases in seen.given_back]
        steady = seen.worked - seen.doubled_parted
        return {
            "duplicate_work": _share(seen.doubled, seen.worked),
            "orphan_leases_p99": percentile(waits, 0.99) if enough else None,
            "records_per_peer_s": (reads + stores) / peer_seconds,
            "all_held_s": None if seen.all_held_at is None else seen.all_held_at - seen.start,
            "detail": {
                "duplicate_work_while_whole": _share(seen.doubled - seen.doubled_parted, steady),
                "orphans": len(waits),
                "orphan_leases_median": percentile(waits, 0.5),
                "orphan_leases_max": max(waits, default=None),
                "untrained_leases_p99": percentile([leases for _, leases in seen.untrained], 0.99),
                "given_back": len(back),
                "given_back_leases_p99": percentile(back, 0.99),
                "reads_per_peer_s": reads / peer_seconds,
                "stores_per_peer_s": stores / peer_seconds,
                "reads": dict(seen.reads),
                "stores": dict(seen.stores),
                "records_returned_per_read": seen.records_read / reads if reads else 0.0,
                "reads_per_slot_key_s": sum(seen.key_reads.values()) / seconds / scenario.slots,
                "reads_per_slot_key_s_max": max(seen.key_reads.values(), default=0) / seconds,
                "heal_leases": None
                if seen.healed_at is None or seen.one_again_at is None
                else (seen.one_again_at - seen.healed_at) / scenario.lease_s,
                "trained_share_of_slot_time": (seen.worked - seen.doubled)
                / (seconds * scenario.slots * scenario.replicas),
                "starts": seen.starts,
                "yields": seen.yields,
                "yields_while_training": seen.pushed_out,
                "displaced": {_pace(slow): count for slow, count in sorted(seen.displaced.items())},
                "displaced_lost_s": {_pace(slow): seconds for slow, seconds in sorted(seen.lost_s.items())},
                "checkpoints": {_pace(slow): count for slow, count in sorted(seen.published.items())},
                "deaths": self.deaths,
                "stores_refused": self.dht.refused,
                "verifications": self.verifier.count,
                "verifications_per_peer_s": self.verifier.count / (scenario.leases * scenario.lease_s * scenario.peers),
            },
        }


def _pace(slow: bool) -> str:
    return "slow" if slow else "usual"


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def plan_of(scenario: Scenario) -> OpenedPlan:
    """A plan with the scenario's slots and cadence."""
    organiser = Identity(b"o" * 32)
    table = (TensorSpec(name="w", dtype="F32", shape=(2,)),)
    spec = SlotSpec(recipe={}, files={"ema.safetensors": table})
    slots = (*map(str, range(scenario.slots)), "router")
    plan = Plan(
        name=f"simulation of {scenario.peers} peers",
        organiser=organiser.peer_id,
        created=int(START),
        clusters=scenario.slots,
        seed=scenario.seed,
        data={},
        expert=spec,
        router=spec,
        policy=Policy(
            lease_s=scenario.lease_s,
            checkpoint_every_s=scenario.checkpoint_every_s,
            first_checkpoint_grace_s=scenario.grace_s,
            replicas=scenario.replicas,
            checkpoint_cap_bytes=1 << 30,
        ),
        admission="open",
        verification=Verification(probe_seed=0, bars=dict.fromkeys(slots, Bars(resumable=9.0, assemblable=5.0))),
        files=(),
    )
    return open_plan(seal_plan(organiser, plan))
