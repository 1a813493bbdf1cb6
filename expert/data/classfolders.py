"""Pictures in folders of classes, without any metadata: `cat/1.png`, `dog/2.png`, as image classifiers keep them.

The folder a picture lies in is its class, and the class's name is its caption, for nothing else is known of it.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

from blake3 import blake3

from paris_swarm.expert.data.folders import folders
from paris_swarm.expert.data.imagefolder import is_image_file, unusable
from paris_swarm.expert.data.pictures import captioned, class_caption, class_name
from paris_swarm.expert.data.sources import NOT_STATED, Captioned, PrepareError, Skipped

_TEXTS = frozenset({".txt", ".caption", ".json"})


class ClassFolderSource:
    """The pictures in the folders below ``folder`` at ``resolution`` pixels, folder by folder, by name.

    Only one folder's names are in memory at a time. Image files in ``folder`` itself have no class: they are skipped.
    Raises PrepareError: no picture in any folder below, or texts beside the pictures, which are no classes then.
    """

    def __init__(self, folder: str | Path, *, resolution: int) -> None:
        self._folder = Path(folder)
        self._resolution = resolution
        self._counts = []
        for prefix in folders(self._folder, hidden=False):
            names = _image_names(self._folder / prefix)
            if texts := _texts_beside(self._folder / prefix, names):
                raise PrepareError(
                    f"{self._folder / prefix} has {texts[0]} beside a picture: captions are read from metadata.jsonl "
                    f"or metadata.csv in {folder}, or from tars; write one of these"
                )
            self._counts.append((prefix, len(names)))
        if not any(count for prefix, count in self._counts if prefix):
            raise PrepareError(f"{folder} has no folder with pictures below it: name each class's folder after it")

    def describe(self) -> dict[str, Any]:
        return {
            "source": {"kind": "imagefolder", "captions": "names of the folders"},
            "licences": [{"what": "the images of the folder", "name": NOT_STATED}],
        }

    def fingerprint(self) -> str:
        hasher = blake3()
        for prefix, count in self._counts:
            changed = (self._folder / prefix).stat().st_mtime_ns
            hasher.update(f"{prefix}\0{count}\0{changed}\n".encode("utf-8", "surrogatepass"))
        return hasher.hexdigest()

    def total(self) -> int:
        return sum(count for _, count in self._counts)

    def items(self, start: int = 0) -> Generator[Captioned | Skipped, None, None]:
        for prefix, count in self._counts:
            if start >= count:
                start -= count
                continue
            names = _image_names(self._folder / prefix)
            if len(names) != count:
                raise PrepareError(f"{self._folder / prefix} had {count} pictures, now {len(names)}: run prepare again")
            for name in names[start:]:
                yield self._item(prefix, name)
            start = 0

    def _item(self, prefix: str, name: str) -> Captioned | Skipped:
        shown = f"{prefix}/{name}" if prefix else name
        if not prefix:
            return Skipped(shown, "lies in no folder of a class, so it has no caption")
        category = class_name(prefix.rpartition("/")[2])
        if category is None:
            return Skipped(shown, "lies in a folder whose name cannot be a class's")
        path = self._folder / prefix / name
        if why := unusable(path, self._folder):
            return Skipped(shown, why)
        return captioned(shown, path, class_caption(category), self._resolution, category)


def class_folders(place: Path) -> bool:
    """Whether any folder below ``place`` has a picture in it."""
    return place.is_dir() and any(_image_names(place / prefix) for prefix in folders(place, hidden=False) if prefix)


def _texts_beside(folder: Path, names: list[str]) -> list[str]:
    """Files of the pictures' own names that hold text, "17.txt" beside "17.jpg"."""
    stems = {os.path.splitext(name)[0] for name in names}
    with os.scandir(folder) as entries:
        parts = ((entry.name, *os.path.splitext(entry.name)) for entry in entries)
        return sorted(name for name, stem, suffix in parts if suffix.lower() in _TEXTS and stem in stems)


def _image_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_image_file(entry))
