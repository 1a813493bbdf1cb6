"""Captioned images in tables: parquet files with image bytes, and folders saved by Hugging Face `datasets`.

Read row group by row group, never whole. The image column holds bytes, or Hugging Face's struct of bytes and path.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from paris_swarm.expert.data.pictures import captioned, first_line
from paris_swarm.expert.data.sources import Captioned, PrepareError, Skipped, files_fingerprint

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
TEXT_COLUMNS = ("text", "caption", "prompt", "txt", "description", "top_caption")
_ROWS_AT_ONCE = 256


class TableSource:
    """The captioned images of parquet files or of a `datasets` folder at ``resolution`` pixels, in the tables' order.

    image_column, text_column: their names, or None to take the first known one.

    Raises PrepareError: nothing there, unreadable, no such column; pyarrow or datasets is not installed.
    """

    def __init__(
        self, place: Path, *, resolution: int, image_column: str | None = None, text_column: str | None = None
    ) -> None:
        self._resolution = resolution
        self._table: _Parquet | _SavedDataset
        if is_saved_dataset(place):
            self._table = _SavedDataset(place)
        else:
            self._table = _Parquet(parquet_files(place))
        self._image = _column(self._table.columns, image_column, IMAGE_COLUMNS, "image", place)
        self._text = _column(self._table.columns, text_column, TEXT_COLUMNS, "text", place)

    def describe(self) -> dict[str, Any]:
        """The manifest's fields about this source."""
        return {
            "source": {"kind": self._table.kind, "image_column": self._image, "text_column": self._text},
            "licences": self._table.licences(),
        }

    def fingerprint(self) -> str:
        return self._table.fingerprint()

    def total(self) -> int:
        """Rows of the table."""
        return self._table.rows

    def items(self, start: int = 0) -> Generator[Captioned | Skipped, None, None]:
        """The rows from number ``start`` on, unusable ones named in their place."""
        for name, image, text in self._table.read(self._image, self._text, start):
            yield self._item(name, image, text)

    def _item(self, name: str, image: object, text: object) -> Captioned | Skipped:
        if isinstance(image, dict):
            image = image.get("bytes")
        if not isinstance(image, bytes):
            return Skipped(name, "holds no image bytes (a path alone is not followed)")
        if not isinstance(text, str | None):
            return Skipped(name, "has a caption that is not text")
        return captioned(name, image, text, self._resolution)


def is_saved_dataset(place: Path) -> bool:
    """Whether ``place`` is a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (place / "state.json").is_file() or (place / "dataset_dict.json").is_file()


def parquet_files(place: Path) -> list[Path]:
    """The parquet files at ``place`` (a file or a folder, searched through), by name."""
    if place.is_file():
        return [place] if place.suffix == ".parquet" else []
    return sorted(path for path in place.rglob("*.parquet") if path.is_file()) if place.is_dir() else []


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
        for number, path in enumerate(self._files):
            with self._opened(path) as table:
                names = list(table.schema_arrow.names)
                self._counts.append(table.metadata.num_rows)
            if number and names != self.columns:
                raise PrepareError(f"{path} has the columns {names}, {self._files[0].name} has {self.columns}: one set")
            self.columns = names
        self.rows = sum(self._counts)

    def _opened(self, path: Path) -> Any:
        try:
            return self._open(path)
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
            raise PrepareError(f"{path} is no readable parquet file ({first_line(error)})") from error

    def licences(self) -> list[dict[str, str]]:
        return [{"what": "the images of the parquet files", "name": "not stated"}]

    def fingerprint(self) -> str:
        return files_fingerprint(self._files)

    def read(self, image: str, text: str, start: int) -> Iterator[tuple[str, object, object]]:
        for path, rows in zip(self._files, self._counts, strict=True):
            if start >= rows:
                start -= rows
                continue
            with self._opened(path) as table:
                groups, row = _groups_from(table.metadata, start)
                try:
                    for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=[image, text]):
                        skipped = min(max(0, start - row), batch.num_rows)
                        row += skipped
                        for record in batch.slice(skipped).to_pylist():
                            yield f"{path.name} row {row}", record[image], record[text]
                            row += 1
                except (OSError, ValueError) as error:
                    raise PrepareError(f"{path} is damaged after row {row} ({first_line(error)})") from error
            start = 0


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
        self._data = found
        self.rows = len(found)
        self.columns = list(found.column_names)
        self._licence = (found.info.license or "").strip() if found.info is not None else ""

    def licences(self) -> list[dict[str, str]]:
        return [{"what": "the images of the dataset", "name": self._licence[:200] or "not stated"}]

    def fingerprint(self) -> str:
        return str(self._data._fingerprint)

    def read(self, image: str, text: str, start: int) -> Iterator[tuple[str, object, object]]:
        part = f"{self._split} " if self._split else ""
        rows = self._data.select_columns([image, text]).select(range(start, self.rows))
        for row, record in enumerate(rows, start=start):
            yield f"{part}row {row}", record[image], record[text]


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
