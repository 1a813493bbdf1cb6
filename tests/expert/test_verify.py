from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.expert.synthetic import SyntheticData, small_probe, small_recipe, small_task

from paris_swarm.expert.checkpoint import CheckpointError
from paris_swarm.expert.rows import Rows
from paris_swarm.expert.training import CheckpointReport, TrainJob, train
from paris_swarm.expert.verify import (
    all_finite,
    assemblable_bar,
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
