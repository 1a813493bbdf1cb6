"""What a network takes is known before one is built, and what this machine cannot hold is refused (R-PLAN-5)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.expert.synthetic import SyntheticData, small_probe, small_recipe, small_task

from paris_swarm.expert import training
from paris_swarm.expert.audit import write_start
from paris_swarm.expert.memory import (
    TooLarge,
    check_training,
    forward_bytes,
    free_memory,
    free_ram,
    training_bytes,
)
from paris_swarm.expert.model import Expert, parameter_count
from paris_swarm.expert.recipe import DEMO, SIZES, ModelConfig, Recipe, TrainConfig, named_recipe
from paris_swarm.expert.rows import Rows
from paris_swarm.expert.step import StepSettings, TrainState
from paris_swarm.expert.task import ExpertTask, build_expert
from paris_swarm.expert.verify import probe_loss_of_file
from paris_swarm.router.model import Router
from paris_swarm.router.recipe import RouterConfig, RouterRecipe
from paris_swarm.router.task import build_router, router_probe_loss_of_file

CPU = torch.device("cpu")
HUGE = ModelConfig(hidden=16_384, depth=512, heads=16)
"""Within every bound of a recipe, and more than any machine has: 44 TB to train."""


# ---- how many numbers ------------------------------------------------------------------------------------------------


@given(
    heads=st.integers(1, 3),
    width=st.integers(1, 9),
    depth=st.integers(1, 3),
    patch=st.integers(1, 3),
    side=st.integers(1, 4),
    channels=st.integers(1, 4),
    ratio=st.sampled_from((0.5, 1.3, 2.7, 4.0)),
    text=st.integers(1, 20),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
@settings(max_examples=25, deadline=None)
def test_parameters_are_those_of_the_network_that_would_be_built(
    heads: int,
    width: int,
    depth: int,
    patch: int,
    side: int,
    channels: int,
    ratio: float,
    text: int,
    flags: tuple[bool, bool, bool],
) -> None:
    pooled, skip, zero = flags
    common: dict[str, Any] = {
        "channels": channels,
        "resolution": patch * side,
        "patch": patch,
        "hidden": heads * (width + 1),
        "depth": depth,
        "heads": heads,
        "mlp_ratio": ratio,
        "text_dim": text,
        "adaln": "zero" if zero else "single",
    }
    expert = ModelConfig(**common, text_tokens=3, pooled_text=pooled, patch_skip=skip)
    assert expert.parameters == parameter_count(Expert(expert))
    router = RouterConfig(**common, clusters=5, text="pooled" if pooled else "none")
    assert router.parameters == parameter_count(Router(router))


def test_the_published_sizes_have_the_published_numbers() -> None:
    assert round(SIZES["XL/2"].parameters / 1e6, 2) == 605.97
    assert round(SIZES["B/2"].parameters / 1e6, 1) == 118.6


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_takes_at_least_what_is_counted(optimizer: str) -> None:
    task = small_task(optimizer=optimizer)
    state = TrainState(task, CPU, settings=StepSettings(micro_batch=1))
    state.take_step(torch.float32)
    tensors = [*state.model.parameters(), *state.ema.parameters(), *state.optimiser.state().values()]
    tensors += [weight.grad for weight in state.model.parameters() if weight.grad is not None]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    model, train = task.recipe.model, task.recipe.train
    beside = 2 * train.batch * 3 * 8 * 8 * 4 + model.depth * model.tokens * model.hidden * 2
    counted = training_bytes(model, train, rows=1) - beside
    assert counted == held if optimizer == "adamw" else 0.8 * held < counted <= held
    assert training_bytes(model, train, rows=1, wide=True) > training_bytes(model, train, rows=2) > counted
    assert forward_bytes(model) > 4 * model.parameters


def test_a_large_networks_tables_are_read_without_building_it(monkeypatch: pytest.MonkeyPatch) -> None:
    built = training.checkpoint_tables(small_task(optimizer="muon"))
    monkeypatch.setattr(training, "BUILT_FOR_TABLES", 0)
    assert training.checkpoint_tables(small_task(optimizer="muon")) == built
    data = SyntheticData()
    large = named_recipe("XL/2").with_data(channels=3, resolution=8, text_dim=12, text_tokens=6)
    tables = training.checkpoint_tables(ExpertTask(large, Rows(data, torch.arange(20).numpy()), small_probe(data)))
    shapes = {name: shape for name, _, shape in tables["model.safetensors"]}
    assert shapes["layers.27.attn.in_proj_weight"] == (3456, 1152)
    assert len(tables["optimizer.safetensors"]) == 2 * len(shapes)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "changes", "word"),
    [
        ("model", {"hidden": 1_000_000, "heads": 1}, "model.hidden must be at most 16,384, got 1,000,000"),
        ("model", {"depth": 10**9}, "model.depth"),
        ("model", {"heads": 10**6, "hidden": 10**6}, "model.hidden"),
        ("model", {"mlp_ratio": 1e9}, "model.mlp_ratio"),
        ("model", {"mlp_ratio": 10**400}, "model.mlp_ratio"),
        ("model", {"resolution": 10**9, "patch": 10**9}, "model.resolution"),
        ("model", {"resolution": 8192, "patch": 1}, "67,108,864 tokens"),
        ("model", {"resolution": 8192, "patch": 8192}, "201,326,592 numbers"),
        ("model", {"channels": 10**6}, "model.channels"),
        ("model", {"text_dim": 10**9}, "model.text_dim"),
        ("model", {"text_tokens": 10**9}, "model.text_tokens"),
        ("train", {"batch": 10**9}, "train.batch"),
        ("train", {"muon_steps": 10**9}, "train.muon_steps"),
    ],
)
def test_a_recipe_beyond_all_bounds_is_refused_and_the_field_named(
    part: str, changes: dict[str, Any], word: str
) -> None:
    plain = DEMO.to_dict()
    plain[part].update(changes)
    with pytest.raises(ValueError, match=word):
        Recipe.from_dict(plain)


def test_a_router_beyond_all_bounds_is_refused() -> None:
    plain = RouterRecipe().to_dict()
    for name, value in (("clusters", 10**9), ("hidden", 999_999), ("depth", 10**6)):
        with pytest.raises(ValueError, match=f"router.{name} must be at most"):
            RouterRecipe.from_dict({**plain, "model": {**plain["model"], name: value}})


def test_what_this_machine_cannot_hold_is_refused_with_both_figures() -> None:
    """R-PLAN-5: a plan may be meant for larger machines; nothing is built to find that out."""
    data = SyntheticData()
    model = replace(small_recipe().model, hidden=16_384, depth=512, heads=16)
    task = ExpertTask(replace(small_recipe(), model=model), Rows(data, torch.arange(20).numpy()), small_probe(data))
    for attempt in (lambda: TrainState(task, CPU), lambda: build_expert(task.recipe)):
        with pytest.raises(TooLarge, match=rf"{model.parameters:,} parameters .* GB of memory, cpu has .* GB free"):
            attempt()
    router = RouterRecipe(model=RouterConfig(hidden=16_384, depth=512, heads=16))
    nowhere = Path("no.safetensors")
    for forward in (
        lambda: build_router(router),
        lambda: router_probe_loss_of_file(router, nowhere, None),  # type: ignore[arg-type]
        lambda: probe_loss_of_file(task.recipe, nowhere, small_probe(data)),
    ):
        with pytest.raises(TooLarge, match="one forward pass takes at least"):
            forward()


def test_a_batch_that_does_not_fit_is_refused_and_pieces_of_it_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, train = SIZES["S/2"], TrainConfig(batch=4096)
    monkeypatch.setattr("paris_swarm.expert.memory.free_ram", lambda: 4_000_000_000)
    with pytest.raises(TooLarge, match="slot 3 makes a network of 29,939,728 parameters"):
        check_training(model, train, CPU, what="slot 3")
    check_training(model, train, CPU, rows=32)
    assert training_bytes(HUGE, train) > 44e12


def test_where_no_batch_goes_through_a_network_none_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An author took a large batch in pieces on a larger machine: writing the start of its audit takes the weights."""
    task = small_task(batch=4096)
    room = training_bytes(task.recipe.model, task.recipe.train, rows=1)
    monkeypatch.setattr("paris_swarm.expert.memory.free_ram", lambda: room)
    with pytest.raises(TooLarge):
        TrainState(task, CPU)
    write_start(tmp_path / "start", task, 0, None)
    assert "model.safetensors" in training.checkpoint_tables(task)


# ---- what there is ---------------------------------------------------------------------------------------------------


def listed(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_free_memory_is_what_the_kernel_and_every_group_above_leave(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    listed(proc, meminfo="MemTotal: 32000 kB\nMemFree: 100 kB\nMemAvailable:   16000 kB\n")
    assert free_ram(proc, groups) == 16_000 * 1024
    listed(proc / "self", cgroup="0::/jobs/mine\n")
    listed(groups / "jobs" / "mine", memory__max="max\n", memory__current="5000000\n")
    assert free_ram(proc, groups) == 16_000 * 1024
    listed(
        groups / "jobs", memory__max="9000000\n", memory__current="5000000\n", memory__stat="inactive_file 1000000\n"
    )
    assert free_ram(proc, groups) == 5_000_000
    listed(proc / "self", cgroup="5:cpu:/x\n4:memory:/old\n")
    listed(groups / "memory" / "old", memory__limit_in_bytes="700000", memory__usage_in_bytes="900000")
    assert free_ram(proc, groups) == 0


def test_where_nothing_says_what_is_free_all_memory_counts(tmp_path: Path) -> None:
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert free_ram(tmp_path, tmp_path) == everything
    free = free_memory(CPU)
    assert free is not None and 0 < free <= everything
