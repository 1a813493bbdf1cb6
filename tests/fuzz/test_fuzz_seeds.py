"""What fuzzing found stays found: every committed seed and every input that once was a fault, within its memory."""

from __future__ import annotations

import tracemalloc

import pytest
from fuzz_run import FAULTS, SEEDS, faults, memory_limit, stored
from fuzz_targets import TARGETS, Target


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_give_a_value_or_a_documented_refusal(name: str) -> None:
    target = TARGETS[name]
    results = [target.run(data) for data in (*target.seeds, *stored(name))]
    assert any(results), "no seed is accepted: the fuzzer would only ever see refusals"
    assert any(target.run(data) for data in target.seeds)
    for path in faults(name):
        target.run(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_an_input_costs_memory_in_proportion_to_its_bytes(name: str) -> None:
    target = TARGETS[name]
    largest = sorted((*target.seeds, *stored(name)), key=len)[-10:]
    for data in (*largest, *(seed + b" " * target.longest for seed in target.seeds), b"[" * target.longest):
        target.run(data)  # what is made once is not counted
        # The nodes of other tests may still run, and what their threads allocate meanwhile is counted too: an input
        # costs at most what it was ever seen to cost.
        peaks = [peak(target, data)]
        while peaks[-1] > memory_limit(len(data)) and len(peaks) < 5:
            peaks.append(peak(target, data))
        assert min(peaks) <= memory_limit(len(data))


def peak(target: Target, data: bytes) -> int:
    tracemalloc.start()
    try:
        target.run(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_seeds_are_of_targets_and_small() -> None:
    assert {path.stem for path in SEEDS.glob("*.json")} <= set(TARGETS)
    assert {path.name for path in FAULTS.glob("*") if path.is_dir()} <= set(TARGETS)
    assert sum(path.stat().st_size for path in SEEDS.rglob("*") if path.is_file()) < 1_000_000
