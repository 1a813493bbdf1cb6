import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paris_swarm.expert.checkpoint import (
    CheckpointError,
    CheckpointState,
    load_weights,
    newest_whole,
    prune,
    read_state,
    save_checkpoint,
    tensor_table,
)

FILES = ("ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json")


def write(work: Path, step: int) -> Path:
    state = CheckpointState(step, 100, 3, "ab" * 32, None, 0.5, (0.7, 0.6))
    tensors = {"weight": torch.full((4, 2), float(step))}
    return save_checkpoint(work, state, ema=tensors, model=tensors, optimizer={"momentum.weight": tensors["weight"]})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert read_state(folder) == CheckpointState(7, 100, 3, "ab" * 32, None, 0.5, (0.7, 0.6))
    assert newest_whole(tmp_path) == (folder, ())
    assert [path.name for path in folder.parent.iterdir()] == ["step-00000007"]


def test_the_newest_by_step_wins(tmp_path: Path) -> None:
    write(tmp_path, 900)
    newest = write(tmp_path, 1000)
    write(tmp_path, 20)
    assert newest_whole(tmp_path)[0] == newest


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_torn_checkpoint_is_set_aside_and_named(tmp_path: Path, name: str, damage: str) -> None:
    good, torn = write(tmp_path, 1), write(tmp_path, 2)
    path = torn / name
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[3] ^= 0x40
        path.write_bytes(data)
    else:
        path.unlink()
    found, reports = newest_whole(tmp_path)
    assert found == good
    assert len(reports) == 1
    assert name in reports[0].reason or "state.json" in reports[0].reason
    assert ".corrupt-" in reports[0].folder.name and reports[0].folder.is_dir()
    assert newest_whole(tmp_path) == (good, ())


def test_the_leftover_of_a_killed_write_is_no_checkpoint(tmp_path: Path) -> None:
    good = write(tmp_path, 1)
    leftover = good.with_name(".step-00000002.partial-123")
    leftover.mkdir()
    (leftover / "ema.safetensors").write_bytes(b"half")
    assert newest_whole(tmp_path) == (good, ())
    assert not leftover.exists()


def test_a_failing_write_leaves_nothing_under_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paris_swarm.expert.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 5)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_prune_keeps_the_newest_and_the_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000000.corrupt-1").mkdir()
    prune(tmp_path, 2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000000.corrupt-1", "step-00000002", "step-00000003"]


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"weight": torch.zeros(2, 3)}, "missing"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "extra": torch.zeros(1)}, "extra"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "weight is"),
        ({"weight": torch.zeros(2, 3).half(), "bias": torch.zeros(2)}, "float16"),
    ],
)
def test_weights_load_strictly(tmp_path: Path, tensors: dict[str, torch.Tensor], word: str) -> None:
    model = torch.nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=word):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_rubbish_is_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\x80\x04rubbish" * 9)
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        load_weights(torch.nn.Linear(3, 2), tmp_path / "w.safetensors")


def test_another_format_is_refused_with_advice(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    record = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(CheckpointError, match="update"):
        read_state(folder)


def test_the_table_is_sorted_and_uses_safetensors_names(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    assert tensor_table(load_file(folder / "ema.safetensors")) == [("weight", "F32", (4, 2))]
