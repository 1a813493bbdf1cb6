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


def test_progress_reaches_the_end(photo_folder, encoders, tmp_path):
    said: list[tuple[str, int, int]] = []
    prepare(
        photo_folder(6), tmp_path / "data", resolution=16, shard_rows=4,
        on_progress=lambda *step: said.append(step), **encoders,
    )  # fmt: skip
    assert said == [("images", done, 6) for done in range(1, 7)]


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
        ({"version": 3}, "version 2"),
        ({"count": 12}, "do not have 12 rows"),
        ({"count": 12, "shards": [4, 4, 4]}, "holds uint8"),
        ({"shards": [4, 4, "3"]}, "no number"),
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
    with pytest.raises(PreparedDataError, match="holds object"):
        PreparedData.open(prepared)


@pytest.mark.parametrize("change", [{"count": 10**18, "shard_rows": 1}, {"count": 10**12, "shard_rows": 2}])
def test_a_count_that_no_disk_could_hold_is_refused_before_it_takes_memory(prepared, change):
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["shards"]  # as version 1 wrote it
    path.write_text(json.dumps({**manifest, "version": 1, **change}))
    with pytest.raises(PreparedDataError, match="and names only"):
        PreparedData.open(prepared)


@pytest.mark.parametrize("change", [{"text": {"tokens": 10**12}}, {"null_length": 10}])
def test_captions_longer_than_any_stored_are_refused(prepared, change):
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text())
    text = {**manifest["text"], **change.get("text", {})}
    path.write_text(json.dumps({**manifest, **change, "text": text}))
    with pytest.raises(PreparedDataError, match="tokens"):
        PreparedData.open(prepared)


def test_an_array_that_says_more_than_its_file_holds_is_refused(prepared):
    path, manifest = prepared / "null_states.npy", json.loads((prepared / "manifest.json").read_text())
    tokens, length = 10**12, path.stat().st_size
    write_header = np.lib.format.write_array_header_1_0
    with open(path, "r+b") as stream:
        write_header(stream, {"descr": "<f2", "fortran_order": False, "shape": (tokens, 4)})
    assert path.stat().st_size == length
    manifest["text"]["tokens"] = tokens
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PreparedDataError, match=r"null_states.npy cannot be read .*too few"):
        PreparedData.open(prepared)


@pytest.mark.parametrize("length", [0, -1, 300])
def test_a_caption_of_an_impossible_length_is_refused_when_it_is_read(prepared, length):
    path = prepared / "lengths-00001.npy"
    lengths = np.load(path)
    lengths[2] = length
    np.save(path, lengths)
    data = PreparedData.open(prepared)
    data.states([0, 5])
    with pytest.raises(PreparedDataError, match=f"row 6 has a caption of {length} tokens"):
        data.states([0, 6])
