"""Trees that are deeper than anyone means, and links that lead in a circle: an answer, never a stack overflow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from paris_swarm.expert.data.classfolders import ClassFolderSource, class_folders
from paris_swarm.expert.data.folders import MAX_DEPTH, files_below, folders
from paris_swarm.expert.data.imagefolder import ImageFolderSource
from paris_swarm.expert.data.sources import PrepareError
from paris_swarm.expert.data.tables import parquet_files
from paris_swarm.expert.data.tars import tar_files


def nest(top: Path, levels: int) -> Path:
    """The innermost of so many folders, each in the one before."""
    deep = top.joinpath(*["d"] * levels)
    deep.mkdir(parents=True)
    return deep


READERS: dict[str, Callable[[Path], object]] = {
    "classes": lambda place: ClassFolderSource(place, resolution=8),
    "class folders": class_folders,
    "imagefolder": lambda place: ImageFolderSource(place, resolution=8),
    "parquet": parquet_files,
    "tars": tar_files,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_tree_that_is_too_deep_is_named(tmp_path: Path, reader: str) -> None:
    if reader == "imagefolder":
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "one"}\n')
    nest(tmp_path, MAX_DEPTH + 6)
    with pytest.raises(PrepareError, match=f"more than {MAX_DEPTH} deep, below d/d/d/"):
        READERS[reader](tmp_path)


def test_pictures_at_the_bound_are_found(tmp_path: Path) -> None:
    deep = nest(tmp_path, MAX_DEPTH)
    for place in (deep, tmp_path / "d"):
        Image.new("RGB", (8, 8)).save(place / "1.png")
    source = ClassFolderSource(tmp_path, resolution=8)
    assert [item.record["file"] for item in source.items() if hasattr(item, "record")] == [
        "d/1.png",
        "/".join(["d"] * MAX_DEPTH) + "/1.png",
    ]


def test_folders_come_by_name_each_before_what_is_in_it(tmp_path: Path) -> None:
    for name in ("b/x", "a/y/z", "a.b", ".hidden/c", "a/x"):
        (tmp_path / name).mkdir(parents=True)
    assert list(folders(tmp_path, hidden=False)) == ["", "a", "a/x", "a/y", "a/y/z", "a.b", "b", "b/x"]
    assert set(folders(tmp_path)) - set(folders(tmp_path, hidden=False)) == {".hidden", ".hidden/c"}


def test_links_are_no_way_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "cat" / "round.tar").symlink_to("round.tar")
    assert list(folders(tmp_path)) == ["", "cat"]
    assert files_below(tmp_path, ".tar") == []
    assert ClassFolderSource(tmp_path, resolution=8).total() == 1
