"""A lane's decisions, step by step: requests out, reports in, no clock and no network."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

import pytest

from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.plan import Policy
from paris_swarm.dht_schemas.records import Claim as ClaimRecord
from paris_swarm.dht_schemas.records import Progress
from paris_swarm.swarm.claims import SlotView, rendezvous_order, rendezvous_weight
from paris_swarm.swarm.lane import HEIRS, PROBATION, Claim, Lane, Look, Release, Report, Request, Rest, Start, Stop

NOW = 1_800_000_000.0
PLAN = "a" * 64
POLICY = Policy(lease_s=60, checkpoint_every_s=100, first_checkpoint_grace_s=240, checkpoint_cap_bytes=1000)
ME, RIVAL, THIRD = (Identity(bytes([n]) * 32).peer_id for n in (1, 2, 3))


def claim(peer: str, slot: str, until: float) -> ClaimRecord:
    progress = Progress(step=0, steps=9, loss=None, images_per_s=0.0, device="cpu")
    return ClaimRecord(plan=PLAN, slot=slot, peer=peer, seq=1, until=until, progress=progress)


def view(
    slot: str, *peers: str, until: float = NOW + 50, seen: float = NOW - 500, made: float | None = None
) -> SlotView:
    return SlotView(
        slot,
        claims={peer: claim(peer, slot, until) for peer in peers},
        first_seen=dict.fromkeys(peers, seen),
        checkpoint_at={} if made is None else dict.fromkeys(peers, made),
    )


def weight(peer: str) -> int:
    return rendezvous_weight(PLAN, peer, "0")


class Driven:
    """A lane under a clock that the test moves; ``see`` is what the DHT holds."""

    def __init__(
        self, slots: Sequence[str], see: Callable[[str, float], SlotView], *, peers: int = 2, wanted: str | None = None
    ) -> None:
        self.now, self.peers, self.see = NOW, peers, see
        self.leaving, self.away, self.ended = False, False, None
        self.asked: list[tuple[float, Request]] = []
        lane = Lane(
            PLAN,
            ME,
            slots,
            wanted=wanted,
            policy=POLICY,
            target_steps=dict.fromkeys(slots, 9),
            dice=random.Random(1),
        )
        self.decisions = lane.decide()
        self.request: Request | None = next(self.decisions)

    def step(self) -> Request | None:
        """Carry the present request out; returns the next one."""
        views = None
        match self.request:
            case Look(slots) if not self.away:
                views = {slot: self.see(slot, self.now) for slot in slots}
            case Rest(seconds):
                self.now += 0.0 if self.leaving or self.ended is not None else seconds
        report = Report(self.now, self.peers, views=views, leaving=self.leaving, ended=self.ended)
        try:
            self.request = self.decisions.send(report)
        except StopIteration:
            self.request = None
        else:
            self.asked.append((self.now, self.request))
        return self.request

    def until(self, kind: type, limit: int = 500) -> Request:
        for _ in range(limit):
            if isinstance(self.step(), kind):
                assert self.request is not None
                return self.request
        raise AssertionError(f"never asked for {kind.__name__}: {self.asked[-5:]}")

    def kinds(self) -> list[str]:
        return [type(request).__name__ for _, request in self.asked]


def test_an_empty_swarm_is_claimed_settled_trained_and_renewed_at_a_third_of_the_lease() -> None:
    driven = Driven(("0", "1"), lambda slot, now: view(slot))
    driven.until(Start)
    assert driven.kinds() == ["Look", "Claim", "Rest", "Look", "Start"]
    begun = driven.now
    assert isinstance(driven.until(Claim), Claim)
    assert driven.now == begun + POLICY.lease_s / 3


def test_a_held_slot_is_looked_at_again_when_its_lease_ends_not_before() -> None:
    driven = Driven(
        ("0",), lambda slot, now: view(slot, RIVAL, until=NOW + 50 if now < NOW + 50 else NOW + 110, made=NOW)
    )
    for expected in (NOW, NOW + 50, NOW + 110):
        driven.until(Look)
        assert expected <= driven.now <= expected + POLICY.lease_s / 6 + 1
        assert "Claim" not in driven.kinds()


def test_of_a_thousand_peers_only_about_as_many_as_heirs_look_at_a_slot() -> None:
    looked = 0
    for n in range(1000):
        lane = Lane(
            PLAN,
            Identity(n.to_bytes(32, "big")).peer_id,
            ("0",),
            wanted=None,
            policy=POLICY,
            target_steps={"0": 9},
            dice=random.Random(n),
        )
        decisions = lane.decide()
        next(decisions)
        looked += isinstance(decisions.send(Report(NOW, 1000)), Look)
    assert 0 < looked <= 3 * HEIRS


def test_a_slot_asked_for_by_name_is_looked_at_however_many_peers_there_are() -> None:
    driven = Driven(("0", "1"), lambda slot, now: view(slot, RIVAL, made=now), peers=10_000, wanted="1")
    assert driven.until(Look) == Look(("1",))


def test_surplus_peers_rest_and_still_look_now_and_then() -> None:
    driven = Driven(("0",), lambda slot, now: view(slot, RIVAL, until=now + 50, made=now), peers=100_000)
    driven.until(Look, limit=5000)
    first = driven.now
    driven.until(Look, limit=5000)
    assert driven.now - first > 10 * POLICY.lease_s
    driven.peers = 2  # everybody left: it is an heir now
    before = driven.now
    driven.until(Look)
    assert driven.now - before <= POLICY.lease_s


def test_a_peer_that_joins_goes_through_all_slots_eight_at_a_time_where_peers_are_few() -> None:
    slots = tuple(map(str, range(20)))
    driven = Driven(slots, lambda slot, now: view(slot, RIVAL, until=now + 50, made=now), peers=20)
    driven.until(Rest)
    looks = [request for _, request in driven.asked if isinstance(request, Look)]
    assert [len(look.slots) for look in looks] == [8, 8, 4]
    assert [slot for look in looks for slot in look.slots] == rendezvous_order(PLAN, ME, slots)


def test_training_goes_on_while_the_swarm_cannot_be_reached() -> None:
    driven = Driven(("0",), lambda slot, now: view(slot))
    driven.until(Start)
    driven.away = True
    for _ in range(5):
        assert isinstance(driven.until(Claim), Claim)
    assert "Release" not in driven.kinds()


def test_a_rival_that_was_not_seen_when_the_claim_settled_is_settled_with_at_the_first_renewals() -> None:
    """Both claims were late or lost: without a second settling both would train until the first checkpoint."""
    wins = max((ME, RIVAL), key=weight)
    driven = Driven(("0",), lambda slot, now: view(slot))
    driven.until(Start)
    driven.see = lambda slot, now: view(slot, RIVAL, until=now + 50, seen=now)
    for _ in range(PROBATION):
        request = driven.until(Claim if wins == ME else Release)
        if wins == RIVAL:
            assert isinstance(request, Release)
            assert isinstance(driven.step(), Stop)
            return
    assert "Release" not in driven.kinds()


def test_after_its_first_renewals_no_bare_claim_pushes_a_peer_out() -> None:
    driven = Driven(("0",), lambda slot, now: view(slot))
    driven.until(Start)
    for _ in range(PROBATION):
        driven.until(Claim)
    strong = max((Identity(bytes([n]) * 32).peer_id for n in range(4, 40)), key=weight)
    assert weight(strong) > weight(ME)
    driven.see = lambda slot, now: view(slot, strong, until=now + 50, seen=now)
    for _ in range(20):
        driven.until(Claim)
    assert "Release" not in driven.kinds()


@pytest.mark.parametrize("failure", ["", "out of memory"])
def test_a_trainer_that_ends_gives_the_slot_back(failure: str) -> None:
    driven = Driven(("0",), lambda slot, now: view(slot))
    driven.until(Start)
    driven.step()
    driven.ended = failure
    driven.until(Release)
    assert driven.kinds()[-2:] == ["Stop", "Release"]
    driven.ended = None
    following = driven.step()
    assert (isinstance(following, Rest) and following.phase == "failed") == bool(failure)


@pytest.mark.parametrize("moment", [Rest, Start])
def test_whoever_leaves_gives_back_what_it_claimed(moment: type) -> None:
    driven = Driven(("0",), lambda slot, now: view(slot))
    driven.until(Claim)
    driven.until(moment)
    driven.leaving = True
    while driven.request is not None:
        driven.step()
    assert driven.kinds()[-1] == "Release"


def test_a_squatter_of_many_slots_is_found_out_by_looking_at_what_it_prefers() -> None:
    """It claims every slot; the peer stands before the one it wants least, and reads the claim it wants most."""
    slots = tuple(map(str, range(8)))
    wanted = rendezvous_order(PLAN, THIRD, slots)[-1]

    def see(slot: str, now: float) -> SlotView:
        return view(slot, THIRD, until=now + 50, seen=now)

    driven = Driven(slots, see, wanted=wanted)
    driven.until(Look)
    second = driven.until(Look)
    assert isinstance(second, Look)
    assert second.slots[0] == wanted and len(second.slots) > 1
    driven.until(Rest)
    third = driven.until(Look)
    assert isinstance(third, Look) and len(third.slots) == 2, "one proof is enough from then on"


def test_before_a_newcomer_yields_to_a_bare_claim_it_looks_whether_the_claimant_squats() -> None:
    """Whoever says it trained longest would win (C8): it costs nothing to say so on every slot at once."""
    assert weight(THIRD) > weight(ME), "by the rendezvous order it would be yielded to"
    slots = tuple(map(str, range(8)))
    squatted: set[str] = set()

    def see(slot: str, now: float) -> SlotView:
        if not squatted:
            return view(slot)
        found_out = squatted >= {"idle"}
        seen = view(slot, THIRD, until=now + 50, seen=now)
        return dataclasses.replace(seen, idle=frozenset({THIRD} if found_out else ()))

    driven = Driven(slots, see, wanted="0")
    driven.until(Start)
    squatted.add("claimed")
    driven.until(Look)
    more = driven.step()
    assert isinstance(more, Look) and more.slots[0] == "0" and len(more.slots) == 5
    squatted.add("idle")  # what a reader of five claims knows
    assert isinstance(driven.step(), Claim), "it goes on"
