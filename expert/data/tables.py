"""Captioned images in tables: parquet files with image bytes, and folders saved by Hugging Face `datasets`.

Read row group by row group, never whole. The image column holds bytes, or Hugging Face's struct of bytes and path. A
column of class numbers whose names the table knows (Hugging Face's ClassLabel) counts as text: where there is no other,
the names are the captions.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from paris_swarm.expert.data.folders import files_below
from paris_swarm.expert.data.pictures import CLASSES, captioned, class_caption, class_name, first_line
from paris_swarm.expert.data.sources import NOT_STATED, Captioned, PrepareError, Skipped, files_fingerprint

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
TEXT_COLUMNS = ("text", "caption", "prompt", "txt", "description", "top_caption")
_ROWS_AT_ONCE = 256


class TableSource:
    """The captioned images of parquet files or of a `datasets` folder at ``resolution`` pixels, in the tables' order.

    image_column, text_column, class_column: their names, or None to take the first known one; a class is not needed.

    Raises PrepareError: nothing there, unreadable, no such column; pyarrow or datasets is not installed.
    """

    def __init__(
        self,
        place: Path,
        *,
        resolution: int,
        image_column: str | None = None,
        text_column: str | None = None,
        class_column: str | None = None,
    ) -> None:
        self._resolution = resolution
        self._table: _Parquet | _SavedDataset
        if is_saved_dataset(place):
            self._table = _SavedDataset(place)
        else:
            self._table = _Parquet(parquet_files(place))
        self._image = _column(self._table.columns, image_column, IMAGE_COLUMNS, "image", place)
        known = next((name for name in CLASSES if name in self._table.columns), None)
        if class_column is not None:
            known = _column(self._table.columns, class_column, (), "class", place)
        self._class = known
        texts = (*TEXT_COLUMNS, known) if known is not None and known in self._table.class_names else TEXT_COLUMNS
        self._text = _column(self._table.columns, text_column, texts, "text", place)

    def describe(self) -> dict[str, Any]:
        """The manifest's fields about this source."""
        source = {"kind": self._table.kind, "image_column": self._image, "text_column": self._text}
        if self._class is not None:
            source["class_column"] = self._class
        return {"source": source, "licences": self._table.licences()}

    def fingerprint(self) -> str:
        return self._table.fingerprint()

    def total(self) -> int:
        """Rows of the table."""
        return self._table.rows

    def items(self, start: int = 0) -> Generator[Captioned | Skipped, None, None]:
        """The rows from number ``start`` on, unusable ones named in their place."""
        wanted = list(dict.fromkeys(name for name in (self._image, self._text, self._class) if name is not None))
        for name, record in self._table.read(wanted, start):
            text = self._named(self._text, record[self._text])
            if self._text in self._table.class_names and isinstance(text, str):
                text = class_caption(text)
            category = None if self._class is None else class_name(self._named(self._class, record[self._class]))
            yield self._item(name, record[self._image], text, category)

    def _named(self, column: str, value: object) -> object:
        """A class number's name, where the table knows it."""
        names = self._table.class_names.get(column, ())
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else value

    def _item(self, name: str, image: object, text: object, category: str | None) -> Captioned | Skipped:
        if isinstance(image, dict):
            image = image.get("bytes")
        if not isinstance(image, bytes):
            return Skipped(name, "holds no image bytes (a path alone is not followed)")
        if not isinstance(text, str | None):
            return Skipped(name, "has a caption that is not text")
        return captioned(name, image, text, self._resolution, category)


def is_saved_dataset(place: Path) -> bool:
    """Whether ``place`` is a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (place / "state.json").is_file() or (place / "dataset_dict.json").is_file()


def parquet_files(place: Path) -> list[Path]:
    """The parquet files at ``place`` (a file or a folder, searched through), by name."""
    if place.is_file():
        return [place] if place.suffix == ".parquet" else []
    return files_below(place, ".parquet") if place.is_dir() else []


class _Parquet:
    kind = "parquet"

    def __init__(self, files: Sequence[Path]) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise PrepareError("parquet files are read by pyarrow: pip install 'paris-swarm[tables]'") from error
        self._open = parquet.ParquetFile
        self._files = list(files)
        self._counts: list[int] = []
        self.columns: list[str] = []
        self.class_names: dict[str, list[str]] = {}
        for number, path in enumerate(self._files):
            with self._opened(path) as table:
                names = list(table.schema_arrow.names)
                classes = _class_names(table.schema_arrow.metadata)
                self._counts.append(table.metadata.num_rows)
            if number and names != self.columns:
                raise PrepareError(f"{path} has the columns {names}, {self._files[0].name} has {self.columns}: one set")
            if number and classes != self.class_names:
                raise PrepareError(f"{path} names its classes otherwise than {self._files[0].name}: one set of names")
            self.columns, self.class_names = names, classes
        self.rows = sum(self._counts)

    def _opened(self, path: Path) -> Any:
        try:
            return self._open(path)
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
            raise PrepareError(f"{path} is no readable parquet file ({first_line(error)})") from error

    def licences(self) -> list[dict[str, str]]:
        return [{"what": "the images of the parquet files", "name": NOT_STATED}]

    def fingerprint(self) -> str:
        return files_fingerprint(self._files)

    def read(self, columns: list[str], start: int) -> Iterator[tuple[str, dict[str, object]]]:
        for path, rows in zip(self._files, self._counts, strict=True):
            if start >= rows:
                start -= rows
                continue
            with self._opened(path) as table:
                groups, row = _groups_from(table.metadata, start)
                try:
                    for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=columns):
                        skipped = min(max(0, start - row), batch.num_rows)
                        row += skipped
                        for record in batch.slice(skipped).to_pylist():
                            yield f"{path.name} row {row}", record
                            row += 1
                except (OSError, ValueError) as error:
                    raise PrepareError(f"{path} is damaged after row {row} ({first_line(error)})") from error
            start = 0


def _class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """The names of the columns' classes, which Hugging Face's data sets write into a parquet file's schema."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        found = {column: said["names"] for column, said in features.items() if said.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {
        column: names
        for column, names in found.items()
        if isinstance(names, list) and all(isinstance(name, str) for name in names)
    }


def _groups_from(metadata: Any, row: int) -> tuple[list[int], int]:
    """(the row groups that hold ``row`` and what follows, the number of the first row in them)."""
    before = 0
    for number in range(metadata.num_row_groups):
        rows = metadata.row_group(number).num_rows
        if row < before + rows:
            return list(range(number, metadata.num_row_groups)), before
        before += rows
    return [], before


class _SavedDataset:
    kind = "datasets"

    def __init__(self, place: Path) -> None:
        try:
            import datasets
        except ImportError as error:
            raise PrepareError("a saved dataset is read by `datasets`: pip install 'paris-swarm[tables]'") from error
        try:
            found = datasets.load_from_disk(str(place))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PrepareError(f"{place} is no readable saved dataset ({first_line(error)})") from error
        if isinstance(found, datasets.DatasetDict):
            if "train" not in found and len(found) != 1:
                raise PrepareError(f"{place} holds the splits {sorted(found)}: give the folder of one of them")
            self._split = "train" if "train" in found else next(iter(found))
            found = found[self._split]
        else:
            self._split = ""
        # Bytes as stored: decoding is ours, bounded and with an error that names the row.
        for name, feature in found.features.items():
            if isinstance(feature, datasets.Image):
                found = found.cast_column(name, datasets.Image(decode=False))
        labels = (
            (name, feature) for name, feature in found.features.items() if isinstance(feature, datasets.ClassLabel)
        )
        self.class_names = {name: [str(each) for each in feature.names or ()] for name, feature in labels}
        self._data = found
        self.rows = len(found)
        self.columns = list(found.column_names)
        self._licence = (found.info.license or "").strip() if found.info is not None else ""

    def licences(self) -> list[dict[str, str]]:
        return [{"what": "the images of the dataset", "name": self._licence[:200] or NOT_STATED}]

    def fingerprint(self) -> str:
        return str(self._data._fingerprint)

    def read(self, columns: list[str], start: int) -> Iterator[tuple[str, dict[str, object]]]:
        part = f"{self._split} " if self._split else ""
        rows = self._data.select_columns(columns).select(range(start, self.rows))
        for row, record in enumerate(rows, start=start):
            yield f"{part}row {row}", record


def _column(names: Sequence[str], asked: str | None, known: Sequence[str], what: str, place: Path) -> str:
    if asked is not None:
        if asked not in names:
            raise PrepareError(f"{place} has no column {asked!r}; there are: {', '.join(names)}")
        return asked
    for name in known:
        if name in names:
            return name
    raise PrepareError(
        f"{place} has no known {what} column; there are: {', '.join(names) or 'none'}. Name it with --{what}-column"
    )
