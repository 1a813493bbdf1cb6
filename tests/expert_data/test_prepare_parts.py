"""Parts of a preparation, made apart and joined: the very bytes of one run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.expert_data.plain_encoders import MeanColour, WordEncoder, picture
from tests.expert_data.test_prepare import contents

from paris_swarm.expert.data.parts import merge
from paris_swarm.expert.data.prepare import Part, PrepareReport, prepare
from paris_swarm.expert.data.shard_maker import OnlyRows
from paris_swarm.expert.data.shards import PreparedData, PreparedDataError
from paris_swarm.expert.data.sources import PrepareError


def run(source: Path | str, out: Path, **options: object) -> PrepareReport:
    encoders = {"text_encoder": WordEncoder(), "feature_encoder": MeanColour()}
    return prepare(source, out, **{"resolution": 16, "shard_rows": 4, **encoders, **options})


def parts(source: Path | str, folder: Path, of: int, **options: object) -> Path:
    for index in range(of, 0, -1):  # in any order
        run(source, folder, part=Part(index, of), **options)
    return folder


@pytest.fixture
def source(photo_folder: Callable[..., Path]) -> Path:
    """20 pictures, faults between them, and copies of the first rows in the last shards."""
    folder = photo_folder(20, extra=({"file_name": "gone.png", "text": "x"},))
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines.insert(6, json.dumps({"file_name": "also gone.png", "text": "x"}))
    for number, place in ((1, 18), (2, 19), (19, 22)):
        picture(number).save(folder / f"copy-{number}.png")
        lines.insert(place, json.dumps({"file_name": f"copy-{number}.png", "text": f"picture number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("of", [1, 2, 3, 6, 9])
def test_joined_parts_are_the_bytes_of_one_run(source: Path, tmp_path: Path, of: int) -> None:
    whole = run(source, tmp_path / "whole")
    joined = merge(parts(source, tmp_path / "parts", of), tmp_path / "joined")
    assert contents(joined.folder) == contents(whole.folder)
    assert (joined.count, joined.skipped_count) == (whole.count, whole.skipped_count) == (20, 5)
    shutil.rmtree(tmp_path / "parts")
    assert PreparedData.open(joined.folder, verify=True).count == 20


def test_parts_of_what_a_plan_keeps_are_joined_too(source: Path, tmp_path: Path) -> None:
    only = OnlyRows(lambda features, digests, records: features[:, 0] > np.float32(127.4), {"cluster": "1"})
    whole = run(source, tmp_path / "whole", only=only)
    assert 0 < whole.count < 20
    joined = merge(parts(source, tmp_path / "parts", 4, only=only), tmp_path / "joined")
    assert contents(joined.folder) == contents(whole.folder)


def test_drawn_pictures_may_be_made_in_parts(tmp_path: Path) -> None:
    options = {"count": 30, "seed": 3, "families": ["rings", "clay"], "shard_rows": 8}
    whole = run("dicebear", tmp_path / "whole", **options)
    joined = merge(parts("dicebear", tmp_path / "parts", 3, **options), tmp_path / "joined")
    assert contents(joined.folder) == contents(whole.folder)


def test_a_part_without_rows_is_a_part(photo_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = photo_folder(4, extra=tuple({"file_name": f"gone-{k}.png", "text": "x"} for k in range(8)))
    whole = run(folder, tmp_path / "whole")
    joined = merge(parts(folder, tmp_path / "parts", 3), tmp_path / "joined")
    assert contents(joined.folder) == contents(whole.folder)
    with pytest.raises(PreparedDataError, match="positive whole number"):
        PreparedData.open(tmp_path / "parts" / Part(2, 3).folder)
    for number in range(4):
        (folder / f"{number}.png").unlink()
    nothing = parts(folder, tmp_path / "none", 2)
    with pytest.raises(PrepareError, match="no usable image in any of the 2 parts: 12 skipped"):
        merge(nothing, tmp_path / "nothing")


def test_what_does_not_belong_together_is_refused(source: Path, tmp_path: Path) -> None:
    folder = parts(source, tmp_path / "parts", 3)
    second = folder / Part(2, 3).folder
    aside = second.rename(tmp_path / "second")
    with pytest.raises(PrepareError, match=r"lacks part 2/3"):
        merge(folder, tmp_path / "joined")
    run(source, folder, part=Part(2, 3), resolution=8)
    with pytest.raises(PrepareError, match="resolution is 8, not 16"):
        merge(folder, tmp_path / "joined")
    shutil.rmtree(second)
    aside.rename(second)
    run(source, folder / "a whole")
    with pytest.raises(PrepareError, match="is a whole, not a part"):
        merge(folder, tmp_path / "joined")
    shutil.rmtree(folder / "a whole")
    with pytest.raises(PrepareError, match="no finished part"):
        merge(source, tmp_path / "joined")
    with pytest.raises(PrepareError, match="choose another OUT"):
        merge(folder, source)
    assert not (tmp_path / "joined").exists()
    assert merge(folder, tmp_path / "joined").count == 20


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "-1/4", "1/0"])
def test_parts_have_numbers_from_one(text: str) -> None:
    with pytest.raises(PrepareError, match="part"):
        Part.parse(text)


def test_a_part_takes_no_count_of_somebody_elses_pictures(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="leave the count out"):
        run(source, tmp_path / "parts", part=Part.parse("1/2"), count=10)


def rewritten(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "part",
    [
        {"index": 1},
        {"index": "1", "of": 1, "first_shard": 0, "total": 23, "skipped_in": []},
        {"index": 1, "of": 10**12, "first_shard": 0, "total": 23, "skipped_in": [0] * 5},
        {"index": 1, "of": 1, "first_shard": 0, "total": 23, "skipped_in": []},
        [],
    ],
)
def test_a_part_whose_manifest_makes_no_sense_is_refused(source: Path, tmp_path: Path, part: object) -> None:
    folder = parts(source, tmp_path / "parts", 1)
    rewritten(folder / Part(1, 1).folder, part=part)
    with pytest.raises((PrepareError, PreparedDataError), match="part"):
        merge(folder, tmp_path / "joined")


def test_a_damaged_part_is_refused(source: Path, tmp_path: Path) -> None:
    folder = parts(source, tmp_path / "parts", 2)
    path = folder / Part(2, 2).folder / "pixels-00000.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PreparedDataError, match=r"pixels-00000\.npy has"):
        merge(folder, tmp_path / "joined")
    path.unlink()
    with pytest.raises(PreparedDataError, match="is missing"):
        merge(folder, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
