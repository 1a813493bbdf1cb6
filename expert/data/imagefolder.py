"""A person's own images: a folder in Hugging Face ImageFolder form.

The folder holds ``metadata.jsonl`` (one ``{"file_name": ..., "text": ...}`` a line) or ``metadata.csv`` (a header with
``file_name`` and ``text``), UTF-8. Whatever cannot be used is named with its reason: skipped and counted, or refused
when ``strict``. A picture is never half used.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Generator, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from paris_swarm.expert.data.pictures import MAX_IMAGE_BYTES, captioned, first_line
from paris_swarm.expert.data.shards import row_digest
from paris_swarm.expert.data.sources import Captioned, PrepareError, Skipped

METADATA = ("metadata.jsonl", "metadata.csv")
MAX_METADATA_BYTES = 1 << 30
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})


class ImageFolderSource:
    """The captioned images of ``folder`` at ``resolution`` pixels, centre-cropped, in the metadata's order.

    ``count`` stops after that many usable images. Raises PrepareError: no folder, no metadata or two, unreadable
    metadata, and with ``strict`` the first file that would be skipped.
    """

    def __init__(self, folder: str | Path, *, resolution: int, count: int | None = None, strict: bool = False) -> None:
        self._folder = Path(folder)
        self._resolution, self._count, self._strict = resolution, count, strict
        if not self._folder.is_dir():
            raise PrepareError(
                f"{folder} is not a folder with images: give 'dicebear', a folder with images and metadata.jsonl, "
                "parquet files, a saved dataset or webdataset tars"
            )
        found = [name for name in METADATA if (self._folder / name).is_file()]
        if not found:
            raise PrepareError(
                f"{folder} has no {METADATA[0]} or {METADATA[1]}: add one with a file_name and a text for each image "
                "(and it holds no parquet files, saved dataset or tars)"
            )
        if len(found) > 1:
            raise PrepareError(f"{folder} has both {found[0]} and {found[1]}: keep one of them")
        self._metadata = found[0]
        self._lines = list(_read_metadata(self._folder / self._metadata))
        named = {line["file_name"] for line in self._lines if isinstance(line, dict)}
        self._unnamed = sorted(
            path.relative_to(self._folder).as_posix()
            for path in self._folder.rglob("*")
            if path.suffix.lower() in _SUFFIXES and path.is_file()
        )
        self._unnamed = [name for name in self._unnamed if name not in named]

    def describe(self) -> dict[str, Any]:
        return {
            "source": {"kind": "imagefolder", "metadata": self._metadata},
            "licences": [{"what": "the images of the folder", "name": "not stated"}],
        }

    def total(self) -> int:
        return len(self._lines) + len(self._unnamed) if self._count is None else min(self._count, len(self._lines))

    def items(self) -> Generator[Captioned | Skipped, None, None]:
        taken: set[str] = set()
        seen: dict[bytes, str] = {}
        usable = 0
        for line in self._lines:
            item = line if isinstance(line, Skipped) else self._item(line["file_name"], line["text"], taken, seen)
            usable += isinstance(item, Captioned)
            yield self._allowed(item)
            if usable == self._count:
                return
        for name in self._unnamed:
            yield self._allowed(Skipped(name, f"has no line in {self._metadata}, so no caption"))

    def _allowed(self, item: Captioned | Skipped) -> Captioned | Skipped:
        if self._strict and isinstance(item, Skipped):
            raise PrepareError(f"{self._folder / item.file}: {item.why}; repair it, or run without --strict to skip it")
        return item

    def _item(self, name: str, text: str, taken: set[str], seen: dict[bytes, str]) -> Captioned | Skipped:
        if name in taken:
            return Skipped(name, f"is named twice in {self._metadata}")
        taken.add(name)
        path = self._folder / name
        if why := _outside(name) or _unusable(path, self._folder):
            return Skipped(name, why)
        item = captioned(name, path, text, self._resolution)
        if isinstance(item, Skipped):
            return item
        digest = row_digest(item.pixels, item.record["text"]).tobytes()
        if digest in seen:
            return Skipped(name, f"is the same picture with the same caption as {seen[digest]}")
        seen[digest] = name
        return item


def _read_metadata(path: Path) -> Iterator[dict[str, str] | Skipped]:
    """Every entry of the metadata file, or why a line is no entry. Raises PrepareError when it is unreadable whole."""
    if path.stat().st_size > MAX_METADATA_BYTES:
        raise PrepareError(
            f"{path} is larger than {MAX_METADATA_BYTES >> 30} GiB: split the images into several folders"
        )
    try:
        content = path.read_bytes().decode("utf-8-sig")  # some editors put a byte order mark in front
    except UnicodeDecodeError as error:
        raise PrepareError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise PrepareError(f"{path} cannot be read: {error.strerror}") from error
    entries = _jsonl_entries(content) if path.suffix == ".jsonl" else _csv_entries(content, path)
    for number, entry in entries:
        where = f"{path.name} line {number}"
        if isinstance(entry, str):
            yield Skipped(where, entry)
        elif not isinstance(entry.get("file_name"), str) or not entry["file_name"].strip():
            yield Skipped(where, "has no file_name")
        elif not isinstance(entry.get("text"), str | None):
            yield Skipped(where, "has a text that is not a string")
        else:
            yield {"file_name": entry["file_name"], "text": entry.get("text") or ""}


def _jsonl_entries(content: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"is not JSON ({first_line(error)})"
            continue
        yield number, entry if isinstance(entry, dict) else "is not a JSON object"


def _csv_entries(content: str, path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    reader = csv.DictReader(io.StringIO(content, newline=""))
    try:
        header = reader.fieldnames or []
        if not {"file_name", "text"} <= set(header):
            raise PrepareError(
                f"{path} must begin with a header line that names file_name and text; it has {list(header)}"
            )
        for row in reader:
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise PrepareError(f"{path} line {reader.line_num} is not CSV: {error}") from error


def _outside(name: str) -> str | None:
    """Why a file_name is no relative path inside the folder, or None."""
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    if "\0" in name or not name.isprintable():
        return "has a file_name with control characters"
    if posix.is_absolute() or windows.drive or windows.root:
        return "has an absolute path; name files relative to the folder"
    if ".." in posix.parts or ".." in windows.parts:
        return "has '..' in its path; name files inside the folder"
    return None


def _unusable(path: Path, folder: Path) -> str | None:
    """Why a named file cannot even be opened, or None."""
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return "is a link to outside the folder"
        if not path.exists():
            return "does not exist"
        if not path.is_file():
            return "is not a file"
        size = path.stat().st_size
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        return f"cannot be opened ({first_line(error)})"
    if size == 0:
        return "is empty (0 bytes)"
    if size > MAX_IMAGE_BYTES:
        return f"is larger than {MAX_IMAGE_BYTES >> 20} MiB"
    return None
