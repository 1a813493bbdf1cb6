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
  C6  two settled claims on one slot (a healed partition): the one with a fresh checkpoint stays, then rendezvous order;
  C7  of a peer's live claims on cluster slots only ``slots_per_key`` count, those it prefers most (C4's order); the
      others are shown and ignored (R-REC-10);
  C8  a peer that has begun to train while its claim still settles, and finds a rival it had not seen, yields to the one
      whose claim tells of more steps, before C5's order: who was there longer. No two yield to each other, for what is
      seen of a rival is never ahead of what the rival says;
  C9  a bare claim (no fresh checkpoint of its holder on that slot) protects nothing where its holder was found to be
      idle, by this reader and for a while (R-REC-13): it let a grace run out; it stood for a whole lease beside
      ``replicas`` claims with fresh checkpoints that were there before it, to which it should have yielded; or it
      claims far more slots than a key may. A fresh checkpoint protects its holder whatever was found.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from blake3 import blake3

from paris_swarm.dht_schemas.plan import Policy
from paris_swarm.dht_schemas.records import Claim

ROUTER = "router"


def rendezvous_weight(plan_id: str, peer: str, slot: str) -> int:
    """64-bit weight of a (plan, peer, slot): highest wins (highest-random-weight hashing)."""
    return int.from_bytes(blake3(f"{plan_id}|{peer}|{slot}".encode()).digest(length=8), "big")


def beyond_allowance(plan_id: str, peer: str, slots: Collection[str], slots_per_key: int) -> frozenset[str]:
    """Of the cluster slots a peer has live claims on, those that do not count (C7).

    Rendezvous order, because it is the same for every reader and not the claimant's to choose: an order by sequence
    would turn with each renewal, and whoever squats every slot could always make the one just looked at count. A
    reader that knows only some of the claims counts at least those of them that a reader of all counts.
    """
    cluster_slots = [slot for slot in slots if slot != ROUTER]
    return frozenset(rendezvous_order(plan_id, peer, cluster_slots)[slots_per_key:])


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
    beyond: peers whose claim on this slot does not count, because they claim too many (C7).
    idle: peers whose claim protects nothing without a fresh checkpoint (C9).
    """

    slot: str
    claims: Mapping[str, Claim] = field(default_factory=dict)
    first_seen: Mapping[str, float] = field(default_factory=dict)
    checkpoint_at: Mapping[str, float] = field(default_factory=dict)
    step: int = 0
    beyond: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()

    def live(self, now: float) -> dict[str, Claim]:
        """Claims whose lease runs (C1)."""
        return {peer: claim for peer, claim in self.claims.items() if not claim.released and claim.until > now}

    def fresh(self, peer: str, now: float, policy: Policy) -> bool:
        """Whether the peer's newest checkpoint of this slot is younger than two cadences."""
        made = self.checkpoint_at.get(peer)
        return made is not None and now - made < 2 * policy.checkpoint_every_s

    def protecting(self, now: float, policy: Policy) -> dict[str, Claim]:
        """Live claims that keep the slot (C2, C7, C9)."""
        return {
            peer: claim
            for peer, claim in self.live(now).items()
            if peer not in self.beyond and (self._in_grace(peer, now, policy) or self.fresh(peer, now, policy))
        }

    def _in_grace(self, peer: str, now: float, policy: Policy) -> bool:
        return peer not in self.idle and now - self.first_seen.get(peer, now) < policy.first_checkpoint_grace_s

    def room_at(self, now: float, policy: Policy) -> float:
        """When there will be room if nothing more is said: the earliest time at which fewer than ``replicas`` of the
        claims that protect the slot now still do (Unix s); ``now`` when there is room already.
        """
        kept = 2 * policy.checkpoint_every_s

        def grace_ends(peer: str) -> float:
            waits = -math.inf if peer in self.idle else policy.first_checkpoint_grace_s
            return self.first_seen.get(peer, now) + waits

        ends = sorted(
            min(claim.until, max(grace_ends(peer), self.checkpoint_at.get(peer, -math.inf) + kept))
            for peer, claim in self.protecting(now, policy).items()
        )
        return ends[len(ends) - policy.replicas] if len(ends) >= policy.replicas else now


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
            uncounted = view.beyond | view.idle | {peer}
            crowd = sum(1 for other in view.live(now) if other not in uncounted)
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
    training: bool = True,
) -> Keep | Yield:
    """What a peer that holds ``view.slot`` does when it looks again (C5, C6, C8).

    Args:
        claimed_at: when this peer first claimed the slot (Unix s).
        settled: False until the claim has settled: in the window after it was made, and at its first renewals.
        training: whether training has begun.
    """
    rivals = {other: claim for other, claim in view.protecting(now, policy).items() if other != peer}
    if len(rivals) < policy.replicas:
        return Keep(view.slot)

    # Once training has begun, a rival without a fresh checkpoint is a newcomer, and newcomers yield: a key ground to
    # win the rendezvous order cannot push a working peer out by merely claiming.
    if settled:
        rivals = {other: claim for other, claim in rivals.items() if view.fresh(other, now, policy)}

    def right(candidate: str) -> tuple[int, int, int, int]:
        earlier = int(not settled and candidate != peer and view.first_seen.get(candidate, now) < claimed_at)
        fresh = int(view.fresh(candidate, now, policy))
        said = view.claims.get(candidate)
        steps = said.progress.step if said is not None and training and not settled else 0
        return earlier, fresh, steps, rendezvous_weight(plan_id, candidate, view.slot)

    better = sorted((other for other in rivals if right(other) > right(peer)), key=right, reverse=True)
    if len(better) < policy.replicas:
        return Keep(view.slot)
    theirs, ours = right(better[0]), right(peer)
    why = "it was there first" if theirs[0] else "it trained longer" if theirs[:3] > ours[:3] else "rendezvous order"
    return Yield(view.slot, better[0], why)
