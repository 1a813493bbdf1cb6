"""The claim policy at work: whole swarms on a virtual clock, with the lane, policy and record rules that ship."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_swarm.dht_schemas.errors import BadSignature
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.records import Claim, Progress, SignedRecord
from paris_swarm.swarm.simulation.measures import Measures, percentile
from paris_swarm.swarm.simulation.scenario import Scenario, Simulation
from paris_swarm.swarm.simulation.verifying import Verifier
from paris_swarm.swarm.simulation.world import Faults

USUAL = Faults(loss=0.01, duplicate=0.01, absent=0.01)
TINY = {"lease_s": 60.0, "checkpoint_every_s": 90.0, "grace_s": 180.0}
"""Few envelopes to sign, so that many small swarms can be played."""


def play(scenario: Scenario) -> dict[str, Any]:
    return Simulation(scenario).run()


# ---- the targets, at a size that a test can afford -------------------------------------------------------------------


def test_a_hundred_peers_on_sixteen_slots_meet_the_targets() -> None:
    scenario = Scenario(100, 16, seed=1, leases=14, life_leases=12, faults=replace(USUAL, loss=0.05), skew_s=1.0)
    figures = play(scenario)
    detail = figures["detail"]
    assert figures["duplicate_work"] < 0.01
    assert detail["orphans"] >= 8
    assert figures["orphan_leases_p99"] < 2
    assert figures["all_held_s"] < scenario.lease_s / 2
    assert detail["trained_share_of_slot_time"] > 0.85
    # A peer at work says 2 and reads 2 keys a third of a lease; nobody does much more on the average.
    assert figures["records_per_peer_s"] < 4 / (scenario.lease_s / 3)


def test_what_a_peer_reads_and_what_a_key_is_read_do_not_grow_with_the_peers_standing_by() -> None:
    small, large = (
        play(Scenario(peers, 4, seed=2, leases=6, life_leases=1e6, faults=USUAL, join_within_s=60.0))
        for peers in (40, 400)
    )
    assert large["records_per_peer_s"] < 0.5 * small["records_per_peer_s"]
    # Ten times the peers: heirs are as many as before, and chance looks once a lease.
    assert large["detail"]["reads_per_slot_key_s"] < 2 * small["detail"]["reads_per_slot_key_s"]


def test_the_same_seed_gives_the_same_swarm_and_another_seed_another() -> None:
    scenario = Scenario(12, 4, seed=5, leases=5, life_leases=4, faults=Faults(loss=0.1, duplicate=0.1), liars=0.2)
    assert play(scenario) == play(scenario)
    assert play(scenario) != play(replace(scenario, seed=6))


def test_liars_are_refused_and_the_honest_go_on() -> None:
    faults = replace(USUAL, early_eviction=True)
    figures = play(Scenario(60, 6, seed=3, leases=12, life_leases=30, liars=0.15, faults=faults))
    assert figures["detail"]["stores_refused"] > 100
    assert figures["duplicate_work"] < 0.02
    assert figures["detail"]["trained_share_of_slot_time"] > 0.8


def test_squatters_keep_no_slot_and_are_not_read_for_ever() -> None:
    scenario = Scenario(60, 8, seed=2, leases=10, life_leases=12, liars=0.15, kinds=("squatter",), faults=USUAL)
    figures, honest = play(scenario), play(replace(scenario, liars=0.0))
    assert figures["detail"]["orphans"] >= 3
    assert figures["detail"]["untrained_leases_p99"] < 2, "what an honest peer left an honest one trains"
    assert figures["all_held_s"] < scenario.lease_s / 2
    assert figures["duplicate_work"] < 0.01
    assert figures["detail"]["reads_per_slot_key_s"] < 6 * honest["detail"]["reads_per_slot_key_s"]


def test_an_idle_key_keeps_a_slot_for_one_grace_and_the_slow_are_not_starved() -> None:
    """Who is slower than the grace shares its slot from then on, and is not displaced before it has published."""
    scenario = Scenario(12, 3, seed=4, leases=16, life_leases=1e6, liars=0.25, kinds=("idle",), slow=0.5, faults=USUAL)
    simulation = Simulation(scenario)
    figures = simulation.run()
    assert figures["all_held_s"] <= scenario.grace_s + 2 * scenario.lease_s
    assert figures["detail"]["checkpoints"].get("slow", 0) > 0


# ---- laws, on small random swarms ------------------------------------------------------------------------------------

seeds = st.integers(0, 10**6)


@settings(max_examples=12)
@given(seeds, st.integers(2, 9), st.integers(1, 3), st.integers(1, 2))
def test_on_a_perfect_network_a_slot_has_its_trainers_and_no_more(
    seed: int, peers: int, slots: int, replicas: int
) -> None:
    simulation = Simulation(
        Scenario(peers, slots, seed=seed, leases=6, life_leases=1e6, replicas=replicas, **TINY)  # type: ignore[arg-type]
    )
    figures = simulation.run()
    assert figures["duplicate_work"] == 0
    trained = sum(len(trainers) for trainers in simulation.measures.trainers.values())
    assert trained == min(peers, slots * replicas)
    # No livelock: whoever wants a slot claims a few times and is done.
    assert figures["detail"]["yields"] <= 3 * peers * slots


@settings(max_examples=8)
@given(seeds)
def test_a_slot_given_back_is_taken_again(seed: int) -> None:
    figures = play(
        Scenario(5, 2, seed=seed, leases=14, life_leases=6, leaving=1.0, **TINY)  # type: ignore[arg-type]
    )
    detail = figures["detail"]
    assert detail["orphans"] == 0
    assert detail["given_back"] == 0 or detail["given_back_leases_p99"] < 1.5


@settings(max_examples=8)
@given(seeds, st.integers(6, 10))
def test_a_partition_heals_to_one_trainer(seed: int, peers: int) -> None:
    simulation = Simulation(
        Scenario(peers, 2, seed=seed, leases=14, life_leases=1e6, parted=(3, 9), **TINY)  # type: ignore[arg-type]
    )
    figures = simulation.run()
    assert figures["detail"]["heal_leases"] is not None
    assert figures["detail"]["heal_leases"] < 3.5  # at the latest when the second side's first checkpoint is out
    assert all(len(trainers) == 1 for trainers in simulation.measures.trainers.values())


# ---- the instruments -------------------------------------------------------------------------------------------------


def test_duplicate_work_counts_trainers_beyond_the_plan_and_only_after_two_leases() -> None:
    seen = Measures(("0", "1"), replicas=1, lease_s=10, start=0.0, counted_from=20.0)
    seen.begins("0", "a", 0.0)
    seen.begins("0", "b", 10.0)  # beyond, from 20 on: ten seconds
    seen.ends("0", "b", 30.0)
    assert seen.all_held_at is None
    seen.begins("1", "c", 40.0)
    assert seen.all_held_at == 40.0
    seen.ends("1", "c", 50.0, died=True)
    seen.holds("1", 65.0)
    seen.begins("1", "d", 65.0)
    seen.close(70.0)
    assert (seen.worked, seen.doubled) == (50 + 10 + 10 + 5, 10)
    assert seen.orphans == [(50.0, 1.5)]


def test_a_slot_nobody_took_counts_at_the_end() -> None:
    seen = Measures(("0",), replicas=1, lease_s=10, start=0.0, counted_from=0.0)
    seen.begins("0", "a", 0.0)
    seen.ends("0", "a", 10.0, died=True)
    seen.close(60.0)
    assert seen.orphans == [(10.0, 5.0)]


def test_percentile_is_the_nearest_rank() -> None:
    assert percentile([], 0.99) is None
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([float(n) for n in range(1, 101)], 0.99) == 99.0
    assert percentile([float(n) for n in range(1, 101)], 0.5) == 50.0


def test_remembered_verification_still_refuses_and_is_over_after_the_block() -> None:
    signer = Identity(b"s" * 32)
    progress = Progress(step=0, steps=1, loss=None, images_per_s=0.0, device="cpu")
    good = Claim(plan="0" * 64, slot="0", peer=signer.peer_id, seq=1, until=1.0, progress=progress).seal(signer)
    sealed = json.loads(good)
    sealed["signatures"][0]["sig"] = "A" * 86 + "=="
    forged = json.dumps(sealed, separators=(",", ":")).encode()
    real = SignedRecord.__dict__["open"]
    verifier = Verifier({})
    with verifier.memoised():
        for _ in range(3):
            assert Claim.open(good).record.seq == 1
            with pytest.raises(BadSignature):
                Claim.open(forged)
        elsewhere = threading.Thread(target=Claim.open, args=(good,))  # a real node's, say
        elsewhere.start()
        elsewhere.join()
    assert verifier.count == 6
    assert SignedRecord.__dict__["open"] is real


def test_the_benchmark_prints_one_json_object_with_the_four_figures_first() -> None:
    program = Path(__file__).parents[2] / "benchmarks" / "claims.py"
    command = [sys.executable, str(program), "--peers", "4", "--slots", "2", "--leases", "4", "--seed", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert list(figures) == ["duplicate_work", "orphan_leases_p99", "records_per_peer_s", "all_held_s", "detail"]
    assert figures["duplicate_work"] == 0
    assert figures["all_held_s"] < 60
