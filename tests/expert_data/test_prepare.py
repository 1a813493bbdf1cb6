from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from paris_swarm.expert.data.prepare import prepare
from paris_swarm.expert.data.shards import PreparedData, PreparedDataError, row_digest
from paris_swarm.expert.data.sources import PrepareError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def prepared(photo_folder, encoders, tmp_path) -> Path:
    prepare(photo_folder(11), tmp_path / "data", resolution=16, shard_rows=4, **encoders)
    return tmp_path / "data"


def test_rows_come_back_across_shards_in_any_order(prepared, encoders):
    data = PreparedData.open(prepared, verify=True)
    assert (data.count, data.resolution) == (11, 16)
    rows = [10, 0, 4, 3, 4]
    everything = data.pixels(range(11))
    assert np.array_equal(data.pixels(rows), everything[rows])
    texts = [record["text"] for record in data.captions(rows)]
    assert texts == [f"picture number {row}" for row in rows]
    states, lengths = data.states(rows)
    expected, expected_lengths = encoders["text_encoder"].encode(texts, states.shape[1])
    assert states.dtype == np.float16
    assert np.array_equal(states, expected)
    assert np.array_equal(lengths, expected_lengths)
    assert np.array_equal(data.features(), encoders["feature_encoder"].encode(everything))
    for row, digest in zip(rows, data.digests[rows], strict=True):
        assert np.array_equal(digest, row_digest(everything[row], f"picture number {row}"))
    assert data.null_states.shape == states.shape[1:]
    assert data.null_length == 2
    assert data.pixels([]).shape == (0, 16, 16, 3)
    assert len(data.captions()) == 11


@pytest.mark.parametrize("rows", [[11], [-1], [0, 99]])
def test_rows_outside_are_refused(prepared, rows):
    data = PreparedData.open(prepared)
    for read in (data.pixels, data.states, data.captions):
        with pytest.raises(IndexError, match="0 to 10"):
            read(rows)


def test_two_runs_write_the_same_bytes(photo_folder, encoders, tmp_path):
    folder = photo_folder(9)
    for name, workers in (("one", 1), ("two", 3)):
        prepare(folder, tmp_path / name, resolution=16, shard_rows=4, workers=workers, **encoders)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_two_processes_with_the_real_encoders_write_the_same_bytes(tmp_path):
    script = (
        "import sys, torch; from paris_swarm.expert.data.prepare import prepare\n"
        "threads, workers = map(int, sys.argv[2:]); torch.set_num_threads(threads)\n"
        "prepare('dicebear', sys.argv[1], resolution=16, count=72, seed=5, families=['landscape', 'voxel-bot'],"
        " shard_rows=50, workers=workers)"
    )
    for name, threads, workers in (("one", "1", "1"), ("two", "2", "2")):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", script, str(tmp_path / name), threads, workers]
        subprocess.run(command, check=True, env=environment)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    data = PreparedData.open(tmp_path / "one", verify=True)
    assert data.count == 72
    assert data.manifest["features"]["dim"] == 1280
    assert data.manifest["text"]["dim"] == 384
    assert {licence["name"] for licence in data.manifest["licences"]} == {"CC0 1.0"}
    assert len(np.unique(data.digests, axis=0)) == 72


def test_what_was_skipped_is_in_the_report_and_the_manifest(photo_folder, encoders, tmp_path):
    folder = photo_folder(3, extra=({"file_name": "gone.png", "text": "x"},))
    report = prepare(folder, tmp_path / "data", resolution=16, **encoders)
    assert [(item.file, item.why) for item in report.skipped] == [("gone.png", "does not exist")]
    assert PreparedData.open(report.folder).manifest["skipped"] == [{"file": "gone.png", "why": "does not exist"}]
    assert str(tmp_path) not in (report.folder / "manifest.json").read_text()


def test_progress_reaches_the_end_of_every_stage(photo_folder, encoders, tmp_path):
    last: dict[str, tuple[int, int]] = {}

    def note(stage: str, done: int, total: int) -> None:
        assert last.get(stage, (0, total))[0] < done <= total
        last[stage] = (done, total)

    report = prepare(photo_folder(6), tmp_path / "data", resolution=16, shard_rows=4, on_progress=note, **encoders)
    assert {stage: done == total for stage, (done, total) in last.items()} == dict.fromkeys(report.seconds, True)


def test_nothing_is_left_when_no_image_is_usable(photo_folder, encoders, tmp_path):
    folder = photo_folder(0, extra=({"file_name": "gone.png", "text": "x"},))
    with pytest.raises(PrepareError, match=r"no usable image: 1 skipped \(gone\.png does not exist\)"):
        prepare(folder, tmp_path / "data", resolution=16, **encoders)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_previous_output_is_replaced_whole(prepared, encoders, tmp_path):
    report = prepare(tmp_path / "photos", prepared, resolution=16, count=2, **encoders)
    assert PreparedData.open(prepared, verify=True).count == report.count == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "photos"]


def test_a_failed_run_leaves_the_previous_output(prepared, tmp_path, encoders):
    before = contents(prepared)

    class Failing:
        name, digest, dim, size = "failing", "2" * 64, 6, 8

        def encode(self, images):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        prepare(tmp_path / "photos", prepared, resolution=16, **{**encoders, "feature_encoder": Failing()})
    assert contents(prepared) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "photos"]


@pytest.mark.parametrize("kind", ["foreign", "stray", "file", "link"])
def test_other_peoples_files_are_never_replaced(prepared, encoders, tmp_path, kind):
    out = prepared
    if kind == "foreign":
        out = tmp_path / "photos"
    elif kind == "stray":
        (prepared / "my-notes.txt").write_text("keep")
    elif kind == "file":
        (out := tmp_path / "file").write_text("keep")
    else:
        (out := tmp_path / "link").symlink_to(prepared)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(PrepareError, match="choose another OUT"):
        prepare(tmp_path / "photos", out, resolution=16, **encoders)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("options", [{"resolution": 4}, {"resolution": 9999}, {"count": 0}, {"workers": 0}])
def test_bad_arguments_are_refused(options, tmp_path):
    with pytest.raises(PrepareError, match="must be"):
        prepare("dicebear", tmp_path / "data", **options)


def test_the_callers_thread_count_is_put_back(photo_folder, encoders, tmp_path):
    before = torch.get_num_threads()
    prepare(photo_folder(2), tmp_path / "data", resolution=16, **encoders)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", ["pixels-00001.npy", "states-00000.npy", "captions-00002.jsonl", "null_states.npy"])
def test_damage_is_found_and_named(prepared, name):
    whole = (prepared / name).read_bytes()
    flipped = bytearray(whole)
    flipped[-2] ^= 1
    (prepared / name).write_bytes(flipped)
    with pytest.raises(PreparedDataError, match=f"{name} does not match its digest"):
        PreparedData.open(prepared, verify=True)
    (prepared / name).write_bytes(whole[:-1])
    with pytest.raises(PreparedDataError, match=f"{name} has {len(whole) - 1} bytes"):
        PreparedData.open(prepared)
    (prepared / name).unlink()
    with pytest.raises(PreparedDataError, match=f"{name} is missing"):
        PreparedData.open(prepared)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 1"),
        ({"count": 12}, "holds uint8"),
        ({"count": "11"}, "not a positive whole number"),
        ({"count": True}, "not a positive whole number"),
        ({"text": {}}, "lacks 'tokens'"),
        ({"files": [{"name": "../photos/0.png", "length": 1, "digest": ""}]}, "outside its folder"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(prepared, change, words):
    path = prepared / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PreparedDataError, match=words):
        PreparedData.open(prepared)


def test_no_manifest_and_no_json_are_refused(prepared, tmp_path):
    with pytest.raises(PreparedDataError, match="run prepare first"):
        PreparedData.open(tmp_path)
    (prepared / "manifest.json").write_bytes(b"\xff{")
    with pytest.raises(PreparedDataError, match="cannot be read"):
        PreparedData.open(prepared)


def test_a_pickle_in_an_array_file_is_never_opened(prepared):
    path = prepared / "pixels-00000.npy"
    length = path.stat().st_size
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with open(path, "ab") as stream:
        stream.write(bytes(length - path.stat().st_size))
    with pytest.raises(PreparedDataError, match="cannot be read"):
        PreparedData.open(prepared)
