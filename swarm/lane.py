"""The decisions of one lane of a peer, without I/O: when it looks at which slots, claims, settles, renews, yields.

`Lane.decide()` is a generator: it asks for one thing at a time (`Look`, `Claim`, `Release`, `Start`, `Stop`, `Rest`)
and is told what came of it (`Report`). It knows no clock, no network and no trainer; `peer.Peer` carries its requests
out on asyncio, and `simulation` on a virtual clock with ten thousand peers. Whom a slot belongs to is decided by
`claims`.

Who looks when (docs/architecture.md, "Claims"):
  L1  a slot's **heirs** are the standing-by peers whose rendezvous weight for it lies in the top ``HEIRS`` / spare,
      where spare = peers of the swarm less the claims its slots can hold: about ``HEIRS`` a slot, however many there
      are;
  L2  an heir looks when the slot may next have room, which a claim itself says (its lease end), not on a timer; heirs
      come one after the other, highest weight first, spread over a sixth of a lease;
  L3  a peer also looks at one slot at random now and then, the more seldom the more peers stand by, so that together
      they look at each slot about once a lease: no slot is forgotten when its heirs are gone;
  L4  a peer that joins looks at the slots it is an heir of, ``CONSIDERED_AT_ONCE`` at a time, until one has room;
  L5  where a bare claim (no checkpoint behind it) holds a slot, it looks once at a few other slots, those first that
      the claimant prefers: a key that squats some has one claim that counts (C7), one that squats many none (C9).
A claim settles a moment after it is made, and again at its first ``PROBATION`` renewals, when training has begun:
records that were late or lost the first time are seen then. After that no claim alone can push it out (C5, C6, C8).
So what a slot's key is read does not grow with the swarm, and what a peer reads does not either.
"""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_left
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from paris_swarm.dht_schemas.plan import Policy
from paris_swarm.swarm.claims import Keep, SlotView, Take, Wait, Yield, choose, rendezvous_weight, review

CONSIDERED_AT_ONCE = 8
HEIRS = 8
"""Expected heirs of a slot: all of them gone, or none ever there, with probability e^-8."""
MOST_WATCHED = 64
"""Slots that one peer standing by watches, where peers to spare are few."""
SUSPECTED = 4
"""Slots looked at to find out whether a claimant without a checkpoint claims more than its key may."""
PROBATION = 2
"""Renewals at which a claim still settles."""
SELDOM_LEASES = 64.0
"""However many peers there seem to be, each looks at some slot about this often (leases): estimates can be stale."""

Phase = Literal["looking", "waiting", "settling", "fetching", "training", "finished", "left", "failed"]


# ---- what a lane asks for, and what it is told -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """Read these slots' records; the report carries their views, or None when the swarm cannot be reached."""

    slots: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """Sign and store a claim on the slot: the first one, or its renewal."""

    slot: str


@dataclass(frozen=True, slots=True)
class Release:
    """Give the slot back."""

    slot: str
    yielded: Yield | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Begin training the slot. Reported at once; a later report says ``ended`` when the trainer came to its end."""

    slot: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the trainer; reported when it has ended and its last checkpoint is published."""

    slot: str


@dataclass(frozen=True, slots=True)
class Rest:
    """Nothing to do for ``seconds``; reported earlier when the peer is leaving or the trainer ended.

    held: the peer stands by, and other peers' claims are what it waits for.
    """

    seconds: float
    phase: Phase
    slot: str | None = None
    note: str = ""
    held: bool = False


Request = Look | Claim | Release | Start | Stop | Rest


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a request.

    now: Unix seconds. peers: estimated peers of the swarm, this one included. ended, after a `Rest` or `Stop`: None
    while a trainer runs or none was started; "" when it came to its end, otherwise why it failed.
    """

    now: float
    peers: int
    views: Mapping[str, SlotView] | None = None
    leaving: bool = False
    ended: str | None = None


Asking = Generator[Request, Report, None]


# ---- the lane ----------------------------------------------------------------------------------------------------


class Lane:
    """One lane: any of ``slots``, or only the one ``wanted``.

    Args:
        slots: the slots this lane may train.
        target_steps: steps after which a slot is finished, by slot.
        dice: jitter, and the slots looked at by chance (L3).
    """

    def __init__(
        self,
        plan_id: str,
        peer: str,
        slots: Sequence[str],
        *,
        wanted: str | None,
        policy: Policy,
        target_steps: Mapping[str, int],
        dice: random.Random,
    ) -> None:
        self._plan_id = plan_id
        self._peer = peer
        self._slots = tuple(slots)
        self._wanted = wanted
        self._policy = policy
        self._target_steps = target_steps
        self._dice = dice
        ranked = sorted((self._rank(slot), slot) for slot in (slots if wanted is None else (wanted,)))
        self._order = tuple(slot for _, slot in ranked)
        """The slots, this peer's first choice first."""
        self._ranks = array("d", (rank for rank, _ in ranked))
        """For each of them the share of all peers that are expected to prefer it more."""
        self._squats: dict[tuple[str, str], str] = {}
        """(slot, bare claimant) -> another slot that it was seen to claim and prefers; "": none was found."""
        self._told = Report(0.0, 1)

    def decide(self) -> Asking:
        """The lane's life. Send a `Report` for every `Request`; ends when the peer leaves."""
        lease = self._policy.lease_s
        yield from self._ask(Rest(self._dice.uniform(0, min(1.0, lease / 20)), "looking"))
        while not self._told.leaving:
            slot = yield from self._find_room()
            if slot is not None:
                claimed_at = self._told.now
                if (yield from self._settle(slot, claimed_at)):
                    yield from self._hold(slot, claimed_at)

    def _ask(self, request: Request) -> Generator[Request, Report, Report]:
        self._told = yield request
        return self._told

    # ---- standing by -------------------------------------------------------------

    def _find_room(self) -> Generator[Request, Report, str | None]:
        """Look until a slot has room (L1 to L4); None when the peer leaves."""
        lease = self._policy.lease_s
        due: dict[str, float] = {}
        finished: set[str] = set()
        idle = "every slot looked at is held; standing by"
        stroll_at = self._told.now + self._stroll_s() * self._dice.random()
        while not self._told.leaving:
            now = self._told.now
            heir_of = self._heir_of(self._told.peers)
            stroll_at = min(stroll_at, now + 1.5 * self._stroll_s())  # the swarm may have shrunk meanwhile
            batch = [slot for slot in heir_of if due.get(slot, 0.0) <= now][:CONSIDERED_AT_ONCE]
            if not batch and finished and len(finished) == len(due) < len(self._order):
                # All it looked at is finished: whether the swarm is, only the next ones can tell.
                batch = [slot for slot in self._order if slot not in due][:CONSIDERED_AT_ONCE]
            if not batch and now >= stroll_at:
                stroll_at = now + self._stroll_s() * self._dice.uniform(0.5, 1.5)
                if len(heir_of) < len(self._order) or len(heir_of) > MOST_WATCHED:
                    batch = [self._dice.choice(self._order)]
            if not batch:
                wake = min([stroll_at, now + lease, *(due[slot] for slot in heir_of)])
                done = len(finished) == len(self._order)
                phase: Phase = "finished" if done else "waiting"
                yield from self._ask(Rest(max(0.01, wake - now), phase, note="" if done else idle, held=not done))
                continue
            told = yield from self._look(*batch)
            found = self._choose(told)
            if not isinstance(found, Take) and (others := self._suspects(told)):
                told = yield from self._look(*batch, *others)
                found = self._choose(told)
            if isinstance(found, Take):
                return found.slot
            if told.views is None:
                yield from self._ask(Rest(lease / 3, "waiting", note="swarm not reachable"))
                continue
            for slot in batch:
                view = told.views[slot]
                over = view.step >= self._target_steps[slot]
                (finished.add if over else finished.discard)(slot)
                due[slot] = told.now + lease if over else self._next_look(slot, view, told)
            for slot in list(due)[MOST_WATCHED:]:
                due[slot] = math.inf
        return None

    def _choose(self, told: Report) -> Take | Wait:
        return choose(
            self._plan_id,
            self._peer,
            told.views or {},
            policy=self._policy,
            target_steps=self._target_steps,
            now=told.now,
            wanted=self._wanted,
        )

    def _spare(self, peers: int) -> int:
        """Peers that can only stand by, as far as one can tell: at least one, this one."""
        return max(1, peers - len(self._order) * self._policy.replicas)

    def _heir_of(self, peers: int) -> tuple[str, ...]:
        """The slots this peer is an heir of, first choice first (L1)."""
        if self._wanted is not None:
            return self._order  # asked for by a person: watched, however many others do
        return self._order[: bisect_left(self._ranks, HEIRS / self._spare(peers))]

    def _rank(self, slot: str) -> float:
        return 1 - rendezvous_weight(self._plan_id, self._peer, slot) / 2**64

    def _next_look(self, slot: str, view: SlotView, told: Report) -> float:
        """When an heir looks again (L2)."""
        sixth = self._policy.lease_s / 6
        share = 1.0 if self._wanted is not None else HEIRS / self._spare(told.peers)
        turn = min(1.0, self._rank(slot) / min(1.0, share))
        return max(view.room_at(told.now, self._policy), told.now + sixth) + turn * sixth

    def _stroll_s(self) -> float:
        """Mean seconds between two looks at a slot by chance (L3)."""
        a_slot = self._spare(self._told.peers) / len(self._order)
        return self._policy.lease_s * min(SELDOM_LEASES, max(1 / 16, a_slot))

    # ---- finding squatters out (L5) ------------------------------------------------

    def _look(self, *slots: str) -> Generator[Request, Report, Report]:
        """Look at slots, and again at what gave their squatters away: what was seen there lapses like any claim."""
        known = {proof for (slot, _), proof in self._squats.items() if slot in slots and proof}
        told = yield from self._ask(Look(tuple(dict.fromkeys((*slots, *sorted(known))))))
        live = {slot: view.live(told.now).keys() for slot, view in (told.views or {}).items()}
        for (slot, claimant), proof in list(self._squats.items()):
            if any(name in live and claimant not in live[name] for name in (slot, proof)):
                del self._squats[(slot, claimant)]
            elif slot in live and claimant in (told.views or {})[slot].idle:
                self._squats[(slot, claimant)] = ""  # no proof needs to be looked at again
            elif not proof and slot in slots:
                proofs = (name for name in live if claimant in live[name] and self._prefers(claimant, name, slot))
                self._squats[(slot, claimant)] = next(proofs, "")
        return told

    def _suspects(self, told: Report) -> tuple[str, ...]:
        """Slots to look at because a bare claim, with no checkpoint behind it, holds a slot looked at; none twice for
        one claimant of a slot.
        """
        found: dict[str, None] = {}
        for name, view in (told.views or {}).items():
            for claimant in view.protecting(told.now, self._policy):
                if (name, claimant) in self._squats or view.fresh(claimant, told.now, self._policy):
                    continue
                self._squats[(name, claimant)] = ""
                tries = self._dice.sample(self._slots, min(4 * SUSPECTED, len(self._slots)))
                tries.sort(key=lambda slot: self._prefers(claimant, name, slot))  # those it prefers come first
                found.update(dict.fromkeys([slot for slot in tries if slot != name][:SUSPECTED]))
        return tuple(found)

    def _prefers(self, claimant: str, this: str, that: str) -> bool:
        return rendezvous_weight(self._plan_id, claimant, this) > rendezvous_weight(self._plan_id, claimant, that)

    # ---- holding -------------------------------------------------------------------

    def _settle(self, slot: str, claimed_at: float) -> Generator[Request, Report, bool]:
        """Claim, let the claim settle, look again; False when another peer has the better right (C5)."""
        yield from self._ask(Claim(slot))
        yield from self._ask(Rest(settle_s(self._policy), "settling", slot=slot))
        if self._told.leaving:
            yield from self._ask(Release(slot))
            return False
        return (yield from self._still_mine(slot, claimed_at, settled=False, training=False))

    def _still_mine(
        self, slot: str, claimed_at: float, *, settled: bool, training: bool = True
    ) -> Generator[Request, Report, bool]:
        told = yield from self._look(slot)
        verdict: Keep | Yield = self._review(told, slot, claimed_at, settled=settled, training=training)
        if isinstance(verdict, Yield) and (others := self._suspects(told)):
            told = yield from self._look(slot, *others)
            verdict = self._review(told, slot, claimed_at, settled=settled, training=training)
        if isinstance(verdict, Keep):
            return True
        yield from self._ask(Release(slot, verdict))
        return False

    def _review(self, told: Report, slot: str, claimed_at: float, *, settled: bool, training: bool) -> Keep | Yield:
        if told.views is None:
            return Keep(slot)  # training goes on while the network is away
        return review(
            self._plan_id,
            self._peer,
            told.views[slot],
            policy=self._policy,
            claimed_at=claimed_at,
            settled=settled,
            training=training,
            now=told.now,
        )

    def _hold(self, slot: str, claimed_at: float) -> Generator[Request, Report, None]:
        """Train and renew until the trainer ends, the slot is lost (C6), or the peer leaves."""
        lease = self._policy.lease_s
        yield from self._ask(Start(slot))
        renewals = 0
        while True:
            told = yield from self._ask(Rest(lease / 3, "training", slot=slot))
            if told.leaving or told.ended is not None:
                yield from self._ask(Stop(slot))
                failure = told.ended
                yield from self._ask(Release(slot))
                if failure and not self._told.leaving:
                    yield from self._ask(Rest(lease, "failed", note=failure))
                return
            if not (yield from self._still_mine(slot, claimed_at, settled=renewals >= PROBATION)):
                yield from self._ask(Stop(slot))
                return
            renewals += 1
            yield from self._ask(Claim(slot))


def settle_s(policy: Policy) -> float:
    """Seconds between a claim and the look that settles it."""
    return min(3.0, policy.lease_s / 6)
