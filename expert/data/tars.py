"""Captioned images in tar archives, in webdataset's layout: `000017.jpg` beside `000017.txt` or `000017.json`.

Archives are read front to back, one member at a time: nothing is unpacked to disk and no name inside one is ever used
as a path. Members of one sample must follow one another, as webdataset writes them.
"""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Generator, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from paris_swarm.expert.data.folders import files_below
from paris_swarm.expert.data.pictures import CLASSES, MAX_IMAGE_BYTES, captioned, class_name, first_line
from paris_swarm.expert.data.sources import NOT_STATED, Captioned, PrepareError, Skipped, files_fingerprint

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
TEXTS = ("txt", "text", "caption")
JSON_FIELDS = ("caption", "text", "prompt")
MAX_TEXT_BYTES = 1 << 20

_Sample = dict[str, bytes | str]


class TarSource:
    """The captioned images of one .tar or of all .tar files of a folder, by name, at ``resolution`` pixels.

    The caption is the .txt member, or the .json member's "caption", "text" or "prompt"; the class, where there is one,
    the .cls member or the .json member's.

    Raises PrepareError: no archive, or an unreadable one.
    """

    def __init__(self, place: Path, *, resolution: int, class_column: str | None = None) -> None:
        """class_column: the .json field that names a picture's class, None for the first known one."""
        self._class_fields = CLASSES if class_column is None else (class_column,)
        self._files = tar_files(place)
        self._resolution = resolution
        if not self._files:
            raise PrepareError(f"{place} is no .tar file and holds none")
        self._counts: list[int] | None = None

    def describe(self) -> dict[str, Any]:
        """The manifest's fields about this source."""
        return {
            "source": {"kind": "webdataset", "archives": len(self._files)},
            "licences": [{"what": "the images of the archives", "name": NOT_STATED}],
        }

    def fingerprint(self) -> str:
        return files_fingerprint(self._files)

    def total(self) -> int:
        """Samples of the archives, those without an image included; counted by a walk over the headers."""
        return sum(self._samples_of_each())

    def items(self, start: int = 0) -> Generator[Captioned | Skipped, None, None]:
        """The samples from number ``start`` on, unusable ones named in their place."""
        counts = self._samples_of_each() if start else [1] * len(self._files)
        for path, count in zip(self._files, counts, strict=True):
            if start >= count:
                start -= count
                continue
            for key, sample in _samples(path, start):
                yield self._item(f"{path.name} {key}", sample)
            start = 0

    def _samples_of_each(self) -> list[int]:
        if self._counts is None:
            self._counts = [sum(1 for _ in groupby(_keys(path))) for path in self._files]
        return self._counts

    def _item(self, name: str, sample: _Sample) -> Captioned | Skipped:
        image = next((sample[kind] for kind in IMAGES if kind in sample), None)
        if image is None:
            return Skipped(name, "has no image member")
        if isinstance(image, str):
            return Skipped(name, image)
        return captioned(name, image, _caption(sample), self._resolution, self._class_of(sample))

    def _class_of(self, sample: _Sample) -> str | None:
        """The .cls member, else the .json member's class."""
        if isinstance(value := sample.get("cls"), bytes):
            return class_name(value)
        record = _record(sample)
        return next((class_name(record[field]) for field in self._class_fields if field in record), None)


def tar_files(place: Path) -> list[Path]:
    """The .tar files at ``place`` (a file or a folder, searched through), by name."""
    if place.is_file():
        return [place] if place.suffix == ".tar" else []
    return files_below(place, ".tar") if place.is_dir() else []


def _caption(sample: _Sample) -> str:
    for kind in TEXTS:
        value = sample.get(kind)
        if isinstance(value, bytes):
            return value.decode("utf-8", errors="replace").removeprefix("\ufeff")
    record = _record(sample)
    return next((record[field] for field in JSON_FIELDS if isinstance(record.get(field), str)), "")


def _record(sample: _Sample) -> dict[str, Any]:
    """What the .json member says; nothing where it says nothing that can be read."""
    value = sample.get("json")
    try:
        record = json.loads(value) if isinstance(value, bytes) else {}
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _samples(path: Path, start: int) -> Iterator[tuple[str, _Sample]]:
    """(key, members by extension) of neighbouring members with one key, from sample number ``start`` on; a str says
    why a member was not read.
    """
    key, sample, number = "", {}, -1
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # else tarfile keeps a record of every member
                stem, kind = _split(member.name)
                if not member.isfile() or not kind:
                    continue
                if stem != key or number < 0:
                    if sample:
                        yield key, sample
                    key, sample, number = stem, {}, number + 1
                if number >= start:
                    sample[kind] = _member(archive, member, kind)
        if sample:
            yield key, sample
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise PrepareError(
            f"{path} is no readable tar archive, or damaged behind {key or 'its start'!r} ({first_line(error)})"
        ) from error


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, kind: str) -> bytes | str:
    limit = MAX_IMAGE_BYTES if kind in IMAGES else MAX_TEXT_BYTES
    if kind not in (*IMAGES, *TEXTS, "json", "cls"):
        return ""
    if member.size > limit:
        return f"is larger than {limit >> 20} MiB"
    stream = archive.extractfile(member)
    data = stream.read(limit + 1) if stream is not None else b""
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name} is cut short")
    return data


def _keys(path: Path) -> Iterator[str]:
    """The key of every member that belongs to a sample."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []
                key, kind = _split(member.name)
                if member.isfile() and kind:
                    yield key
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise PrepareError(f"{path} is no readable tar archive ({first_line(error)})") from error


def _split(name: str) -> tuple[str, str]:
    """("shard/000017", "jpg") of "shard/000017.jpg": the key ends at the first dot of the last part, in lower case."""
    match = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", name, re.DOTALL)
    return (match[1], match[2].lower()) if match else (name, "")
