"""The claim policy: laws that hold for any records, and the cases design names."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.plan import Policy
from paris_swarm.dht_schemas.records import Claim, Progress
from paris_swarm.swarm.claims import (
    Keep,
    SlotView,
    Take,
    Wait,
    Yield,
    choose,
    rendezvous_order,
    rendezvous_weight,
    review,
)

NOW = 1_800_000_000.0
PLAN = "a" * 64
POLICY = Policy(lease_s=60, checkpoint_every_s=100, first_checkpoint_grace_s=150, checkpoint_cap_bytes=1000)
PEERS = [Identity(bytes([n]) * 32).peer_id for n in range(1, 9)]
SLOTS = ("0", "1", "2", "3")
STEPS = dict.fromkeys(SLOTS, 1000)


def claim(peer: str, slot: str = "0", *, until: float = NOW + 30, released: bool = False, step: int = 0) -> Claim:
    return Claim(
        plan=PLAN,
        slot=slot,
        peer=peer,
        seq=1,
        until=until,
        released=released,
        progress=Progress(step=step, steps=1000, loss=None, images_per_s=0.0, device="cpu"),
    )


def view(*peers: str, slot: str = "0", seen: float = NOW - 10, step: int = 0, made: dict[str, float] | None = None):
    return SlotView(
        slot,
        claims={peer: claim(peer, slot) for peer in peers},
        first_seen=dict.fromkeys(peers, seen),
        checkpoint_at=made or {},
        step=step,
    )


def pick(me: str, views: dict[str, SlotView], wanted: str | None = None) -> Take | Wait:
    return choose(PLAN, me, views, policy=POLICY, target_steps=STEPS, now=NOW, wanted=wanted)


def look(me: str, at: SlotView, *, claimed_at: float = NOW - 5, settled: bool = False) -> Keep | Yield:
    return review(PLAN, me, at, policy=POLICY, claimed_at=claimed_at, settled=settled, now=NOW)


# ---- choosing -------------------------------------------------------------------------------------------------------


def test_an_empty_swarm_spreads_peers_without_a_word() -> None:
    taken: dict[str, list[str]] = {slot: [] for slot in SLOTS}
    for me in PEERS[:4]:
        answer = pick(me, {slot: view(*taken[slot], slot=slot) for slot in SLOTS})
        assert isinstance(answer, Take)
        taken[answer.slot].append(me)
    assert all(len(peers) == 1 for peers in taken.values())


def test_a_full_swarm_makes_the_next_peer_stand_by() -> None:
    views = {slot: view(PEERS[n], slot=slot) for n, slot in enumerate(SLOTS)}
    assert pick(PEERS[5], views) == Wait("held")


def test_a_lapsed_or_released_claim_frees_its_slot() -> None:
    for gone in (claim(PEERS[0], until=NOW - 1), claim(PEERS[0], released=True)):
        views = {slot: view(PEERS[n], slot=slot) for n, slot in enumerate(SLOTS)}
        views["0"] = SlotView("0", claims={PEERS[0]: gone}, first_seen={PEERS[0]: NOW - 10})
        assert pick(PEERS[5], views) == Take("0")


def test_an_idle_key_cannot_sit_on_a_slot_beyond_its_grace() -> None:
    views = {slot: view(PEERS[n], slot=slot) for n, slot in enumerate(SLOTS)}
    views["2"] = view(PEERS[2], slot="2", seen=NOW - POLICY.first_checkpoint_grace_s - 1)
    assert pick(PEERS[5], views) == Take("2")
    # The same claim with a checkpoint younger than two cadences still holds.
    views["2"] = view(PEERS[2], slot="2", seen=NOW - 1e6, made={PEERS[2]: NOW - 150})
    assert pick(PEERS[5], views) == Wait("held")


def test_a_finished_slot_is_not_trained_again() -> None:
    views = {slot: view(slot=slot, step=1000) for slot in SLOTS}
    assert pick(PEERS[0], views) == Wait("finished")
    views["3"] = view(slot="3", step=999)
    assert pick(PEERS[0], views) == Take("3")


def test_a_wish_for_one_cluster_is_kept_even_when_others_are_emptier() -> None:
    assert pick(PEERS[0], {slot: view(slot=slot) for slot in SLOTS}, wanted="3") == Take("3")
    views = {slot: view(slot=slot) for slot in SLOTS} | {"3": view(PEERS[1], slot="3")}
    assert pick(PEERS[0], views, wanted="3") == Wait("held")


@given(st.permutations(SLOTS), st.sampled_from(PEERS))
def test_the_order_in_which_slots_are_read_does_not_matter(order: list[str], me: str) -> None:
    views = {slot: view(slot=slot) for slot in order}
    assert pick(me, views) == Take(rendezvous_order(PLAN, me, SLOTS)[0])


# ---- idle keys (C9) -------------------------------------------------------------------------------------------------

peers = st.sets(st.sampled_from(PEERS))


@given(st.sets(st.sampled_from(PEERS), min_size=1), peers, peers, st.integers(1, 4), st.floats(0, 1e4))
def test_whoever_is_found_idle_loses_the_grace_and_nothing_else(
    claimants: set[str], published: set[str], idle: set[str], replicas: int, age: float
) -> None:
    policy = POLICY.model_copy(update={"replicas": replicas})
    made = dict.fromkeys(sorted(published), NOW - 5)
    trusted = view(*sorted(claimants), seen=NOW - age, made=made)
    found_out = dataclasses.replace(trusted, idle=frozenset(idle))
    before, after = trusted.protecting(NOW, policy), found_out.protecting(NOW, policy)
    assert before.keys() - after.keys() <= idle - published, "a checkpoint protects whoever made it"
    assert after.keys() <= before.keys()
    assert after.keys() >= before.keys() - idle
    # What the view promises is what comes: there is room then, if nobody says anything more.
    opens = found_out.room_at(NOW, policy)
    assert len(found_out.protecting(max(opens, NOW) + 1e-6, policy)) < replicas


def test_claims_of_idle_keys_do_not_make_a_slot_look_crowded() -> None:
    views = {slot: view(slot=slot) for slot in SLOTS}
    favourite = rendezvous_order(PLAN, PEERS[0], SLOTS)[0]
    squatted = view(*PEERS[1:5], slot=favourite)
    views[favourite] = dataclasses.replace(squatted, idle=frozenset(PEERS[1:5]))
    assert pick(PEERS[0], views) == Take(favourite)


# ---- settling -------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(PEERS), min_size=1, unique=True))
def test_of_simultaneous_claims_exactly_one_stays(peers: list[str]) -> None:
    at = view(*peers, seen=NOW - 2)
    kept = [me for me in peers if isinstance(look(me, at, claimed_at=NOW - 3), Keep)]
    assert kept == [max(peers, key=lambda peer: rendezvous_weight(PLAN, peer, "0"))]


def test_a_newcomer_yields_to_a_claim_it_saw_first_whatever_the_rendezvous_order() -> None:
    for holder, newcomer in ((PEERS[0], PEERS[1]), (PEERS[1], PEERS[0])):
        at = SlotView(
            "0",
            claims={peer: claim(peer) for peer in (holder, newcomer)},
            first_seen={holder: NOW - 20, newcomer: NOW - 3},
        )
        assert look(newcomer, at, claimed_at=NOW - 3) == Yield("0", holder, "it was there first")


def test_a_working_peer_is_not_pushed_out_by_a_bare_claim() -> None:
    weights = sorted(PEERS[:2], key=lambda peer: rendezvous_weight(PLAN, peer, "0"))
    worker, rival = weights[0], weights[1]  # the rival wins the rendezvous order
    at = view(worker, rival)
    assert look(worker, at, settled=True) == Keep("0")


def test_after_a_healed_partition_a_fresh_checkpoint_decides_then_the_order() -> None:
    low, high = sorted(PEERS[:2], key=lambda peer: rendezvous_weight(PLAN, peer, "0"))
    at = view(low, high, made={low: NOW - 20})
    assert look(low, at, settled=True) == Keep("0")
    at = view(low, high, made={low: NOW - 20, high: NOW - 30})
    assert look(low, at, settled=True) == Yield("0", high, "rendezvous order")
    assert look(high, at, settled=True) == Keep("0")


@given(
    st.sets(st.sampled_from(PEERS), min_size=1),
    st.sets(st.sampled_from(PEERS)),
    st.booleans(),
    st.integers(min_value=1, max_value=4),
)
def test_somebody_always_keeps_a_claimed_slot(
    peers: set[str], published: set[str], settled: bool, replicas: int
) -> None:
    policy = POLICY.model_copy(update={"replicas": replicas})
    at = view(*sorted(peers), seen=NOW - 2, made=dict.fromkeys(sorted(published), NOW - 5))
    verdicts = [
        review(PLAN, me, at, policy=policy, claimed_at=NOW - 3, settled=settled, now=NOW) for me in sorted(peers)
    ]
    assert sum(isinstance(verdict, Keep) for verdict in verdicts) >= min(replicas, len(peers))
