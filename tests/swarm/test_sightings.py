"""What a reader makes of the records it reads: who is found to be idle, whose work a checkpoint is, for how long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas.errors import ProbeFailed
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.records import MAX_LEASE_S, Announcement, Claim, Holding, Progress
from paris_swarm.dht_schemas.trusted import TrustedSwarm
from paris_swarm.swarm.claims import rendezvous_order
from paris_swarm.swarm.sightings import SQUATTED, Sightings
from paris_swarm.swarm.simulation.scenario import Scenario, plan_of

NOW = 1_800_000_000.0
OPENED = plan_of(Scenario(0, 12, lease_s=60.0, checkpoint_every_s=120.0, grace_s=240.0))
POLICY = OPENED.plan.policy
SLOTS = tuple(slot for slot in OPENED.plan.slots if slot != "router")
READER, HONEST, OTHER, THIEF = (Identity(bytes([n]) * 32) for n in (1, 2, 3, 4))
HORIZON_S = 2 * POLICY.lease_s + MAX_LEASE_S


class Reader:
    """A reader whose clock the test moves, and peers that say what the test tells them."""

    def __init__(self) -> None:
        self.now = NOW
        self.seen = Sightings(TrustedSwarm(OPENED), READER.peer_id)
        self._seq = 0

    def _next(self) -> int:
        self._seq += 1
        return int(NOW * 1000) + self._seq

    def claims(self, who: Identity, *slots: str, released: bool = False) -> None:
        progress = Progress(step=0, steps=9, loss=None, images_per_s=0.0, device="cpu")
        for slot in slots:
            claim = Claim(
                plan=OPENED.plan_id,
                slot=slot,
                peer=who.peer_id,
                seq=self._next(),
                until=self.now + POLICY.lease_s,
                released=released,
                progress=progress,
            )
            self.seen.feed_claim(claim.seal(who), self.now)

    def publishes(
        self, who: Identity, slot: str, root: str, *, holder: Identity | None = None, seq: int | None = None
    ) -> None:
        announcement = Announcement(
            plan=OPENED.plan_id,
            slot=slot,
            author=who.peer_id,
            seq=int(self.now * 1000) + self._next() % 1000 if seq is None else seq,
            step=1,
            parent=None,
            root=root * 64,
            bytes=1,
            probe_loss=1.0,
        )
        holding = Holding(
            plan=OPENED.plan_id,
            slot=slot,
            holder=(holder or who).peer_id,
            seq=self._next(),
            until=self.now + 2 * POLICY.lease_s,
            announcement=announcement.seal(who).decode(),
        )
        self.seen.feed_holding(holding.seal(holder or who), self.now)

    def settles(self, *read: str) -> None:
        self.seen.trusted.expire(self.now)
        self.seen.settle(SLOTS, self.now, read=read or SLOTS)
        self.seen.forget_absent(self.now)

    def protects(self, who: Identity, slot: str) -> bool:
        return who.peer_id in self.seen.slot_view(slot, self.now).protecting(self.now, POLICY)


def favourites(who: Identity) -> list[str]:
    return rendezvous_order(OPENED.plan_id, who.peer_id, SLOTS)


@given(st.integers(1, len(SLOTS)))
def test_a_key_has_one_slot_if_it_claims_a_few_and_none_if_it_claims_many(many: int) -> None:
    reader = Reader()
    reader.claims(OTHER, *SLOTS[:many])
    reader.settles()
    protected = [slot for slot in SLOTS if reader.protects(OTHER, slot)]
    if many > POLICY.slots_per_key + SQUATTED:
        assert protected == []
    else:
        assert protected == [slot for slot in favourites(OTHER) if slot in SLOTS[:many]][:1]


def test_who_moved_often_and_released_its_slots_is_no_squatter() -> None:
    reader = Reader()
    for slot in SLOTS[:-1]:
        reader.claims(HONEST, slot)
        reader.claims(HONEST, slot, released=True)
    reader.claims(HONEST, SLOTS[-1])
    assert reader.seen.to_read_again([SLOTS[-1]], reader.now) == set()
    reader.settles()
    assert reader.protects(HONEST, SLOTS[-1])


def test_a_squatter_is_read_again_once_and_then_no_more() -> None:
    reader = Reader()
    reader.claims(OTHER, *SLOTS)
    assert reader.seen.to_read_again(["0"], reader.now) == set(SLOTS) - {"0"}
    reader.settles()
    assert reader.seen.to_read_again(["0"], reader.now) == set()
    reader.publishes(OTHER, "0", "a")  # now something could follow from it
    reader.settles()
    assert reader.seen.to_read_again(["0"], reader.now) == set(SLOTS) - {"0"}
    assert [slot for slot in SLOTS if reader.protects(OTHER, slot)] in ([], ["0"])


def test_a_grace_wasted_on_one_slot_is_none_on_the_next() -> None:
    """Otherwise one idle key keeps slot after slot for a grace each."""
    reader = Reader()
    first, second = favourites(OTHER)[:2]
    while reader.now < NOW + POLICY.first_checkpoint_grace_s:
        reader.claims(OTHER, first)
        reader.settles()
        assert reader.protects(OTHER, first)
        reader.now += POLICY.lease_s / 2
    reader.settles()
    reader.claims(OTHER, first, released=True)
    reader.claims(OTHER, second)
    reader.settles()
    assert not reader.protects(OTHER, second)
    # The first checkpoint redeems it, on any slot, however late.
    reader.publishes(OTHER, second, "b")
    reader.settles()
    assert reader.protects(OTHER, second)


def test_what_was_found_is_forgotten_again() -> None:
    reader = Reader()
    reader.claims(OTHER, *SLOTS)
    reader.settles()
    reader.now += HORIZON_S + 1
    reader.settles()  # it had gone
    reader.claims(OTHER, SLOTS[0])
    reader.settles()
    assert reader.protects(OTHER, SLOTS[0])


@pytest.mark.parametrize("first", [True, False], ids=["stood there first", "came later"])
def test_a_bare_claim_that_stays_beside_one_at_work_inherits_nothing(first: bool) -> None:
    """An honest peer would have yielded: it waits for the other to die, to keep the slot from its heirs."""
    reader = Reader()
    said = [(HONEST, OTHER), (OTHER, HONEST)][first]
    for who in said:
        reader.claims(who, "0")
    reader.publishes(HONEST, "0", "a")
    reader.settles()
    reader.now += POLICY.lease_s / 2
    for who in said:
        reader.claims(who, "0")
    reader.settles()
    assert reader.protects(OTHER, "0"), "half a lease: it may not have seen it yet"
    reader.now += POLICY.lease_s / 2
    for who in said:
        reader.claims(who, "0")
    reader.settles()
    assert not reader.protects(OTHER, "0")
    assert reader.protects(HONEST, "0")
    reader.now += POLICY.lease_s - 1
    reader.claims(OTHER, "0")
    reader.now += 2  # the one at work is dead
    reader.settles()
    assert reader.seen.slot_view("0", reader.now).protecting(reader.now, POLICY) == {}


def test_rubbish_announced_beside_a_newcomer_does_not_cost_it_its_grace() -> None:
    """Nobody yields to who came later. Otherwise one key, with rubbish for a lease, lets a second peer in beside it."""
    reader = Reader()
    reader.claims(HONEST, "0")
    reader.settles()
    while reader.now < NOW + 2 * POLICY.lease_s:
        reader.now += POLICY.lease_s / 4
        reader.claims(HONEST, "0")
        reader.claims(OTHER, "0")
        reader.publishes(OTHER, "0", f"{int(reader.now - NOW) % 10}")
        reader.settles()
    reader.claims(OTHER, "0", released=True)
    reader.settles()
    assert reader.seen.slot_view("0", reader.now).protecting(reader.now, POLICY).keys() == {HONEST.peer_id}
    reader.now = NOW + POLICY.first_checkpoint_grace_s
    reader.claims(HONEST, "0")
    reader.settles()
    assert not reader.protects(HONEST, "0"), "its grace is as long as everybody's"


def test_what_was_found_beside_rubbish_is_taken_back_when_that_is_refuted() -> None:
    """The newcomer had refuted it before, and took the slot: a reader that had not could not know."""
    reader = Reader()
    reader.claims(OTHER, "0")
    reader.publishes(OTHER, "0", "a")
    for _ in range(3):
        reader.claims(HONEST, "0")
        reader.claims(OTHER, "0")
        reader.settles()
        reader.now += POLICY.lease_s / 2
    reader.claims(HONEST, "0")
    reader.settles()
    assert not reader.protects(HONEST, "0")
    rubbish = reader.seen.candidates("0", reader.now)[0]
    reader.seen.doubt(rubbish, ProbeFailed("rubbish"), reader.now)
    assert reader.protects(HONEST, "0")
    reader.now += POLICY.lease_s / 2
    reader.claims(HONEST, "0")
    reader.claims(OTHER, "0")
    reader.publishes(OTHER, "0", "b")
    reader.settles()
    assert reader.protects(HONEST, "0")


def test_what_a_wasted_grace_showed_is_not_taken_back() -> None:
    reader = Reader()
    while reader.now <= NOW + POLICY.first_checkpoint_grace_s:
        reader.claims(OTHER, "0")
        reader.publishes(OTHER, "0", f"{int(reader.now - NOW) // 30}")
        reader.claims(THIEF, "0")
        reader.settles()
        reader.now += POLICY.lease_s / 2
    reader.seen.doubt(reader.seen.candidates("0", reader.now)[0], ProbeFailed("rubbish"), reader.now)
    reader.claims(THIEF, "0", released=True)
    reader.settles()
    reader.claims(THIEF, "1")
    reader.settles()
    assert not reader.protects(THIEF, "1")


def test_nobody_is_found_idle_on_a_slot_whose_checkpoints_were_not_read() -> None:
    """Who claims many slots has their claims read again, and nothing else (R-REC-10): a reader that knows of no
    checkpoint there has not seen that there is none.
    """
    reader = Reader()
    while reader.now <= NOW + 2 * POLICY.first_checkpoint_grace_s:
        reader.claims(HONEST, "0")
        reader.settles("1")
        reader.now += POLICY.lease_s / 2
    reader.claims(HONEST, "0", released=True)
    reader.claims(HONEST, "2")
    reader.settles("2")
    assert reader.protects(HONEST, "2")


def test_two_bare_claims_side_by_side_are_both_honest_for_all_one_knows() -> None:
    """Before a first checkpoint nobody can tell who should have yielded: standing by drives nobody out."""
    reader = Reader()
    for _ in range(6):
        reader.claims(HONEST, "0")
        reader.claims(OTHER, "0")
        reader.settles()
        reader.now += POLICY.lease_s / 2
    assert reader.protects(HONEST, "0") and reader.protects(OTHER, "0")


def test_nobody_is_suspicious_of_itself() -> None:
    reader = Reader()
    for _ in range(12):
        reader.claims(READER, *SLOTS)
        reader.settles()
        reader.now += POLICY.lease_s / 2
    assert READER.peer_id not in reader.seen.slot_view("0", reader.now).idle


def test_a_checkpoint_that_was_refused_redeems_nobody() -> None:
    reader = Reader()
    reader.claims(OTHER, *SLOTS)
    reader.publishes(OTHER, favourites(OTHER)[0], "a")
    reader.settles()
    slot = favourites(OTHER)[0]
    assert reader.protects(OTHER, slot)
    reader.seen.doubt(reader.seen.candidates(slot, reader.now)[0], ProbeFailed("rubbish", rule="R-VAL-3"), reader.now)
    reader.publishes(OTHER, slot, "b")
    reader.settles()
    assert not reader.protects(OTHER, slot)


def test_a_root_is_credited_to_whom_it_was_seen_with_first() -> None:
    reader = Reader()
    reader.claims(HONEST, "0")
    reader.publishes(HONEST, "0", "a")
    reader.settles()
    reader.now += 1
    reader.publishes(THIEF, "0", "a", seq=1)
    reader.settles()
    assert reader.seen.slot_view("0", reader.now).checkpoint_at.keys() == {HONEST.peer_id}
    found = reader.seen.candidates("0", reader.now)
    assert [one.announcement.author for one in found] == [HONEST.peer_id, THIEF.peer_id]
    assert {one.holders for one in found} == {(HONEST.peer_id, THIEF.peer_id)}
