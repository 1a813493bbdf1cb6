"""A person's own images: a folder in Hugging Face ImageFolder form.

The folder holds ``metadata.jsonl`` (one ``{"file_name": ..., "text": ...}`` a line) or ``metadata.csv`` (a header with
``file_name`` and ``text``), UTF-8. The metadata is read line by line, never whole. Whatever cannot be used is named
with its reason; a picture is never half used. A picture's class is what its line says under one of `CLASSES`, else the
name of the folder it lies in below this one, as Hugging Face has it. Folders of classes without metadata:
classfolders.py.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from blake3 import blake3

from paris_swarm.expert.data.folders import folders, is_file
from paris_swarm.expert.data.pictures import CLASSES, MAX_IMAGE_BYTES, SeenNumbers, captioned, class_name, first_line
from paris_swarm.expert.data.sources import NOT_STATED, Captioned, PrepareError, Skipped, files_fingerprint

METADATA = ("metadata.jsonl", "metadata.csv")
MAX_LINE_BYTES = 1 << 20
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})


class ImageFolderSource:
    """The captioned images of ``folder`` at ``resolution`` pixels, centre-cropped, in the metadata's order.

    Image files that the metadata does not name come behind them as skipped items. Raises PrepareError: no folder, no
    metadata or two, metadata that is not UTF-8 or no CSV.
    """

    def __init__(self, folder: str | Path, *, resolution: int, class_column: str | None = None) -> None:
        """class_column: the metadata's field that names a picture's class, None for the first known one."""
        self._folder = Path(folder)
        self._resolution = resolution
        self._class_fields = CLASSES if class_column is None else (class_column,)
        if not self._folder.is_dir():
            raise PrepareError(
                f"{folder} is not a folder with images: give 'dicebear', a folder with images and metadata.jsonl, "
                "parquet files, a saved dataset or webdataset tars"
            )
        found = [name for name in METADATA if (self._folder / name).is_file()]
        if not found:
            raise PrepareError(
                f"{folder} has no {METADATA[0]} or {METADATA[1]}: add one with a file_name and a text for each image "
                "(and it holds no folders of classes with images, parquet files, saved dataset or tars)"
            )
        if len(found) > 1:
            raise PrepareError(f"{folder} has both {found[0]} and {found[1]}: keep one of them")
        self._metadata = self._folder / found[0]
        self._lines, named = 0, SeenNumbers()
        for entry in _read_metadata(self._metadata, self._class_fields):
            self._lines += 1
            if isinstance(entry, dict):
                named.add(_number(entry["file_name"]))
        self._unnamed = sorted(name for name in _image_files(self._folder) if _number(name) not in named)

    def describe(self) -> dict[str, Any]:
        return {
            "source": {"kind": "imagefolder", "metadata": self._metadata.name},
            "licences": [{"what": "the images of the folder", "name": NOT_STATED}],
        }

    def fingerprint(self) -> str:
        return files_fingerprint([self._metadata])

    def total(self) -> int:
        return self._lines + len(self._unnamed)

    def items(self, start: int = 0) -> Generator[Captioned | Skipped, None, None]:
        taken = SeenNumbers()
        for number, line in enumerate(_read_metadata(self._metadata, self._class_fields)):
            again = isinstance(line, dict) and not taken.add(_number(line["file_name"]))
            if number < start:
                continue
            if isinstance(line, Skipped):
                yield line
            elif again:
                yield Skipped(line["file_name"], f"is named twice in {self._metadata.name}")
            else:
                yield self._item(line["file_name"], line["text"], line.get("class"))
        for name in self._unnamed[max(0, start - self._lines) :]:
            yield Skipped(name, f"has no line in {self._metadata.name}, so no caption")

    def _item(self, name: str, text: str, category: str | None) -> Captioned | Skipped:
        path = self._folder / name
        if why := _outside(name) or unusable(path, self._folder):
            return Skipped(name, why)
        return captioned(name, path, text, self._resolution, category or class_name(PurePosixPath(name).parent.name))


def _number(name: str) -> bytes:
    """What `SeenNumbers` remembers of a file name."""
    return blake3(name.encode("utf-8", "surrogatepass")).digest(length=8)


def is_image_file(entry: os.DirEntry[str]) -> bool:
    """Whether it looks like an image file, by its name."""
    return os.path.splitext(entry.name)[1].lower() in _SUFFIXES and is_file(entry)


def _image_files(folder: Path) -> Iterator[str]:
    """Relative paths of everything below that looks like an image file; links to folders are not followed."""
    for prefix in folders(folder):
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                if is_image_file(entry):
                    yield f"{prefix}/{entry.name}" if prefix else entry.name


def _read_metadata(path: Path, class_fields: Sequence[str]) -> Iterator[dict[str, str] | Skipped]:
    """Every entry of the metadata file, or why a line is no entry. Raises PrepareError when it is unreadable whole."""
    try:
        for number, entry in _jsonl_entries(path) if path.suffix == ".jsonl" else _csv_entries(path):
            where = f"{path.name} line {number}"
            if isinstance(entry, str):
                yield Skipped(where, entry)
            elif not isinstance(entry.get("file_name"), str) or not entry["file_name"].strip():
                yield Skipped(where, "has no file_name")
            elif not isinstance(entry.get("text"), str | None):
                yield Skipped(where, "has a text that is not a string")
            else:
                line = {"file_name": entry["file_name"], "text": entry.get("text") or ""}
                category = next((class_name(entry[name]) for name in class_fields if name in entry), None)
                yield line if category is None else line | {"class": category}
    except UnicodeDecodeError as error:
        raise PrepareError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8") from error
    except OSError as error:
        raise PrepareError(f"{path} cannot be read: {error.strerror}") from error


def _jsonl_entries(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with open(path, "rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # some editors put a byte order mark in front
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_LINE_BYTES + 1)
                yield number, f"is longer than {MAX_LINE_BYTES >> 20} MiB"
                continue
            text = line.decode("utf-8")
            if not text.strip():
                continue
            try:
                entry = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield number, f"is not JSON ({first_line(error)})"
                continue
            yield number, entry if isinstance(entry, dict) else "is not a JSON object"


def _csv_entries(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
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


def unusable(path: Path, folder: Path) -> str | None:
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
