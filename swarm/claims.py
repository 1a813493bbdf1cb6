"""Claim policy: (records seen, own state, now) -> claim | train | yield | wait. Pure: no clock, no network, no dice.

Two peers with the same records come to the same answer, so peers spread over slots and settle collisions without a
word to each other. A wrong answer here wastes work; it can never corrupt a result: that is what verification is for.

Rules (docs/architecture.md, "Claims"):
  C1  a claim is live until its lease ends, unless it was released (a zero lease);
  C2  a live claim protects its slot during the first-checkpoint grace, then only while its holder's newest announced
      checkpoint is younger than two cadences; a stale claim is shown and ignored;
  C3  a slot has room while fewer than ``replicas`` claims protect it and its target steps are not reached;
  C4  among slots with room: fewest live claims first, then rendezvous order of (plan, peer, slot);
  C5  a newcomer yields to any protecting claim it saw before its own; claims of one settling window are ordered by
      rendezvous order, the highest weight stays;
  C6  two settled claims on one slot (a healed partition): the one with a fresh checkpoint stays, then rendezvous order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from blake3 import blake3

from paris_swarm.dht_schemas.plan import Policy
from paris_swarm.dht_schemas.records import Claim

ROUTER = "router"


def rendezvous_weight(plan_id: str, peer: str, slot: str) -> int:
    """64-bit weight of a (plan, peer, slot): highest wins (highest-random-weight hashing)."""
    return int.from_bytes(blake3(f"{plan_id}|{peer}|{slot}".encode()).digest(length=8), "big")


def rendezvous_order(plan_id: str, peer: str, slots: Iterable[str]) -> list[str]:
    """Slots in the order in which this peer prefers them."""
    return sorted(slots, key=lambda slot: rendezvous_weight(plan_id, peer, slot), reverse=True)


@dataclass(frozen=True)
class SlotView:
    """One slot as seen from here.

    claims: newest verified claim of each peer, lapsed and released ones included.
    first_seen: when this peer first saw each claimant on this slot (Unix s).
    checkpoint_at: when each author's newest announced checkpoint of this slot was made (Unix s).
    step: steps of the slot's current checkpoint, 0 without one.
    """

    slot: str
    claims: Mapping[str, Claim] = field(default_factory=dict)
    first_seen: Mapping[str, float] = field(default_factory=dict)
    checkpoint_at: Mapping[str, float] = field(default_factory=dict)
    step: int = 0

    def live(self, now: float) -> dict[str, Claim]:
        """Claims whose lease runs (C1)."""
        return {peer: claim for peer, claim in self.claims.items() if not claim.released and claim.until > now}

    def fresh(self, peer: str, now: float, policy: Policy) -> bool:
        """Whether the peer's newest checkpoint of this slot is younger than two cadences."""
        made = self.checkpoint_at.get(peer)
        return made is not None and now - made < 2 * policy.checkpoint_every_s

    def protecting(self, now: float, policy: Policy) -> dict[str, Claim]:
        """Live claims that keep the slot (C2)."""
        return {
            peer: claim
            for peer, claim in self.live(now).items()
            if now - self.first_seen.get(peer, now) < policy.first_checkpoint_grace_s or self.fresh(peer, now, policy)
        }


@dataclass(frozen=True)
class Take:
    """Claim this slot, then settle before training."""

    slot: str


@dataclass(frozen=True)
class Keep:
    """Go on with the slot held: train it, renew the lease."""

    slot: str


@dataclass(frozen=True)
class Yield:
    """Give the slot back: another peer has the better right to it."""

    slot: str
    to: str
    why: str


@dataclass(frozen=True)
class Wait:
    """Write nothing; look again after the next lease interval."""

    why: str


Action = Take | Keep | Yield | Wait


def choose(
    plan_id: str,
    peer: str,
    slots: Mapping[str, SlotView],
    *,
    policy: Policy,
    target_steps: Mapping[str, int],
    now: float,
    wanted: str | None = None,
) -> Take | Wait:
    """What a peer without a slot does (C3, C4).

    Args:
        slots: the slots considered, by name.
        target_steps: steps after which a slot is finished.
        wanted: the one slot asked for (`--claim-cluster N`), or None for any.
    """
    considered = {name: view for name, view in slots.items() if wanted is None or name == wanted}
    unfinished = {name: view for name, view in considered.items() if view.step < target_steps[name]}
    if not unfinished:
        return Wait("finished")
    room: list[tuple[int, int, str]] = []
    for name, view in unfinished.items():
        others = [other for other in view.protecting(now, policy) if other != peer]
        if len(others) < policy.replicas:
            crowd = sum(1 for other in view.live(now) if other != peer)
            room.append((crowd, -rendezvous_weight(plan_id, peer, name), name))
    if not room:
        return Wait("held")
    return Take(min(room)[2])


def review(
    plan_id: str,
    peer: str,
    view: SlotView,
    *,
    policy: Policy,
    claimed_at: float,
    settled: bool,
    now: float,
) -> Keep | Yield:
    """What a peer that holds ``view.slot`` does when it looks again (C5, C6).

    Args:
        claimed_at: when this peer first claimed the slot (Unix s).
        settled: False during the settling window after the first claim, before training starts.
    """
    rivals = {other: claim for other, claim in view.protecting(now, policy).items() if other != peer}
    if len(rivals) < policy.replicas:
        return Keep(view.slot)

    # Once training has begun, a rival without a fresh checkpoint is a newcomer, and newcomers yield: a key ground to
    # win the rendezvous order cannot push a working peer out by merely claiming.
    if settled:
        rivals = {other: claim for other, claim in rivals.items() if view.fresh(other, now, policy)}

    def right(candidate: str) -> tuple[int, int, int]:
        earlier = int(not settled and candidate != peer and view.first_seen.get(candidate, now) < claimed_at)
        fresh = int(view.fresh(candidate, now, policy))
        return earlier, fresh, rendezvous_weight(plan_id, candidate, view.slot)

    better = sorted((other for other in rivals if right(other) > right(peer)), key=right, reverse=True)
    if len(better) < policy.replicas:
        return Keep(view.slot)
    why = "it was there first" if right(better[0])[0] else "rendezvous order"
    return Yield(view.slot, better[0], why)
