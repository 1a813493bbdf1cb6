import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.expert.synthetic import SyntheticData, small_probe, small_recipe, small_task

from paris_swarm.expert.checkpoint import CheckpointError
from paris_swarm.expert.rows import Rows
from paris_swarm.expert.task import build_expert
from paris_swarm.expert.training import CheckpointReport, TrainJob, train
from paris_swarm.expert.verify import (
    BAR_MARGIN,
    Probe,
    all_finite,
    assemblable_bar,
    expert_probe_loss,
    load_probe,
    nonfinite_tensors,
    probe_loss_of_file,
    probe_slots,
    resumable_bar,
    write_probe_set,
)


def probe_file(folder: Path, data: SyntheticData) -> Path:
    rows = np.arange(data.count - 8, data.count)
    path = folder / "probe.safetensors"
    write_probe_set(path, {"0": (data.pixels(rows), *data.states(rows))}, data.null_states, 2)
    return path


def test_the_announced_loss_can_be_recomputed_from_the_files_alone(tmp_path: Path) -> None:
    saved = [r for r in train(TrainJob(small_task(), tmp_path / "run")) if isinstance(r, CheckpointReport)][-1]
    probe = load_probe(probe_file(tmp_path, SyntheticData()), "0", seed=11)
    again = probe_loss_of_file(small_recipe(), saved.folder / "ema.safetensors", probe)
    assert again == pytest.approx(saved.probe_loss, rel=1e-5)


def test_another_probe_seed_is_another_probe(tmp_path: Path) -> None:
    path = probe_file(tmp_path, SyntheticData())
    one, other = (resumable_bar(small_recipe(), load_probe(path, "0", seed)) for seed in (1, 2))
    assert one != other


def test_a_missing_slot_and_a_wrong_file_are_named(tmp_path: Path) -> None:
    path = probe_file(tmp_path, SyntheticData())
    assert probe_slots(path) == ["0"]
    with pytest.raises(ValueError, match="slot 3"):
        load_probe(path, "3", 1)
    (tmp_path / "other").write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="fetch the plan's files again"):
        load_probe(tmp_path / "other", "0", 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_found_and_its_tensor_named(tmp_path: Path, bad: float) -> None:
    tensors = {"fine": torch.randn(50, 50), "spoilt": torch.randn(50, 50), "whole": torch.arange(9)}
    save_file(tensors, tmp_path / "fine.safetensors")
    tensors["spoilt"][49, 49] = bad
    save_file(tensors, tmp_path / "spoilt.safetensors")
    assert all_finite(tmp_path / "fine.safetensors")
    assert not all_finite(tmp_path / "spoilt.safetensors")
    assert list(nonfinite_tensors(tmp_path / "spoilt.safetensors")) == ["spoilt"]


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError):
        probe_loss_of_file(small_recipe(), tmp_path / "w.safetensors", small_probe(SyntheticData()))


def test_untrained_weights_do_not_meet_the_upper_bar_and_trained_ones_do(tmp_path: Path) -> None:
    data = SyntheticData()
    probe = small_probe(data)
    upper = assemblable_bar(Rows(data, np.arange(data.count - 8)), probe, 11)
    lower = resumable_bar(small_recipe(), probe)
    assert upper < lower
    task = small_task("residual", steps=400, batch=16, lr=3e-3)
    (saved,) = [r for r in train(TrainJob(task, tmp_path)) if isinstance(r, CheckpointReport)]
    assert saved.probe_loss < upper


# ---------------------------------------------------------------------------------------------------------------------
# one reproducible number
# ---------------------------------------------------------------------------------------------------------------------

SAME = 1e-6
"""Share by which the probe loss of the same weights may differ on one kind of machine; 1e-8 was measured."""


def stirred() -> torch.nn.Module:
    """An expert whose every weight matters."""
    model = build_expert(small_recipe())
    dice = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=dice))
    return model


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_threads_batches_and_global_generators_do_not_change_the_number() -> None:
    model, probe = stirred(), small_probe(SyntheticData())
    usual = expert_probe_loss(model, probe)
    for batch in (1, 3, 8, 1000):
        assert expert_probe_loss(model, probe, batch) == pytest.approx(usual, rel=SAME)
    for count in (2, 4):
        torch.set_num_threads(count)
        assert expert_probe_loss(model, probe) == pytest.approx(usual, rel=SAME)
    torch.manual_seed(123)
    torch.randn(7)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        assert expert_probe_loss(model, probe) == pytest.approx(usual, rel=SAME)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert expert_probe_loss(model, probe) == pytest.approx(usual, rel=SAME)
    assert torch.equal(torch.get_rng_state(), before), "nobody else's random numbers are used up"


def test_another_process_finds_the_same_number_in_the_files(tmp_path: Path) -> None:
    model = stirred()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    path = probe_file(tmp_path, SyntheticData())
    usual = expert_probe_loss(model, load_probe(path, "0", 11))
    code = (
        "import json, sys, torch; from pathlib import Path;"
        "from paris_swarm.expert.recipe import Recipe;"
        "from paris_swarm.expert.verify import load_probe, probe_loss_of_file;"
        "torch.manual_seed(5); torch.set_num_threads(2);"
        "recipe = Recipe.from_dict(json.loads(sys.argv[1]));"
        "print(repr(probe_loss_of_file(recipe, Path(sys.argv[2]), load_probe(Path(sys.argv[3]), '0', 11))))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, json.dumps(small_recipe().to_dict()), str(tmp_path / "weights.safetensors"), path],
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert float(said) == pytest.approx(usual, rel=SAME)


def test_the_times_are_part_of_the_number(tmp_path: Path) -> None:
    path = probe_file(tmp_path, SyntheticData())
    model = stirred()
    at = {times: expert_probe_loss(model, load_probe(path, "0", 11, times)) for times in ((0.2,), (0.8,), (0.2, 0.8))}
    assert at[(0.2, 0.8)] != at[(0.2,)] != at[(0.8,)]
    for bad in ((), (1.5,), (float("nan"),), (0.5,) * 65, ("0.5",)):
        with pytest.raises(ValueError, match="probe times"):
            load_probe(path, "0", 11, bad)


@pytest.mark.parametrize("name", ["pixels.0", "states.0", "lengths.0", "null_states"])
def test_a_probe_file_whose_tensors_do_not_fit_together_is_refused(tmp_path: Path, name: str) -> None:
    path = probe_file(tmp_path, SyntheticData())
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name][:-1].clone()}, path)
    with pytest.raises(ValueError, match="no probe set"):
        load_probe(path, "0", 11)


# ---------------------------------------------------------------------------------------------------------------------
# the bars
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "train"),
    [
        ({"output": "velocity"}, {}),
        ({"output": "data", "pooled_text": False}, {}),
        ({"output": "residual", "patch_skip": True, "adaln": "zero"}, {}),
        ({"output": "noise", "data_limit": 1.0}, {"loss": "noise"}),
        ({"output": "noise", "path": "cosine", "data_limit": 1.0, "patch_skip": True}, {"loss": "noise"}),
        ({"output": "data", "path": "cosine"}, {"loss": "data"}),
    ],
)
def test_the_lower_bar_is_the_untrained_networks_loss_though_none_is_built(
    model: dict[str, Any], train: dict[str, Any]
) -> None:
    """And rounding does not lift untrained weights over it."""
    small = small_recipe(**train)
    recipe = replace(small, model=replace(small.model, **model))
    probe = small_probe(SyntheticData())
    untrained = expert_probe_loss(build_expert(recipe), probe)
    assert resumable_bar(recipe, probe) == (1 - BAR_MARGIN) * untrained
    assert BAR_MARGIN > 100 * SAME


def test_the_upper_bar_is_fitted_on_training_rows_alone() -> None:
    """Other probe rows than the training rows' kind do not help the predictor, as they would if it had seen them."""
    data = SyntheticData()
    rows, probe = Rows(data, np.arange(data.count - 8)), small_probe(data)
    grey = Probe(torch.full_like(probe.x0, 0.9), probe.states, probe.mask, probe.null, probe.seed)
    fitted_on_it = Rows(Pale(data), np.arange(data.count))
    assert assemblable_bar(fitted_on_it, grey, 11) < 0.5 * assemblable_bar(rows, grey, 11)
    assert assemblable_bar(rows, replace(probe, seed=12), 11) != assemblable_bar(rows, probe, 11)


class Pale:
    """The same captions under pictures of one grey."""

    def __init__(self, data: SyntheticData) -> None:
        self.__dict__.update(data.__dict__)
        self.states = data.states

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        return np.full((len(rows), 8, 8, 3), 242, dtype=np.uint8)
