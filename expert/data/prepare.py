"""``prepare``: captioned images in, the shard folder of ``expert/data/shards.py`` out.

The same input gives the same bytes, whatever the number of workers. The folder appears whole or not at all: everything
is written to a temporary folder beside it, which is renamed at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paris_swarm.dht_schemas.digest import digest_file
from paris_swarm.dht_schemas.files import atomic_write_json
from paris_swarm.expert.data import shards
from paris_swarm.expert.data.dicebear import DEFAULT_FAMILIES, DiceBearSource
from paris_swarm.expert.data.encoders import (
    EfficientNetLite0,
    FeatureEncoder,
    MiniLMTextEncoder,
    TextEncoder,
    encoder_record,
)
from paris_swarm.expert.data.imagefolder import METADATA, ImageFolderSource
from paris_swarm.expert.data.sources import Captioned, PrepareError, Skipped, Source
from paris_swarm.expert.data.tables import TableSource, is_saved_dataset, parquet_files
from paris_swarm.expert.data.tars import TarSource, tar_files

DICEBEAR = "dicebear"
DEFAULT_COUNT = 4096
MAX_RESOLUTION = 1024

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total); stages are "images", "captions", "features", "files"."""

_TEXTS = 64  # captions an encoding task takes; part of what makes the bytes the same everywhere
_IMAGES = 256
_KNOWN_TEXTS = 16384  # captions whose states are kept for the next shard


@dataclass(frozen=True)
class PrepareReport:
    """What ``prepare`` did. ``seconds`` holds each stage's time, ``skipped`` every file left out with its reason."""

    folder: Path
    count: int
    resolution: int
    skipped: tuple[Skipped, ...]
    text_tokens: int
    distinct_captions: int
    bytes: int
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OnlyRows:
    """Which rows to keep, judged by their features before anything is written about them.

    keeps: features float32 [b, F] -> bool [b]; note: what the manifest says about it, under "kept".
    """

    keeps: Callable[[np.ndarray], np.ndarray]
    note: dict[str, Any]


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    resolution: int = 24,
    count: int | None = None,
    seed: int = 0,
    strict: bool = False,
    families: Sequence[str] = DEFAULT_FAMILIES,
    image_column: str | None = None,
    text_column: str | None = None,
    workers: int = 1,
    text_encoder: TextEncoder | None = None,
    feature_encoder: FeatureEncoder | None = None,
    shard_rows: int = shards.SHARD_ROWS,
    only: OnlyRows | None = None,
    on_progress: Progress | None = None,
) -> PrepareReport:
    """Write the images of ``source`` to the folder ``out``.

    ``source``: "dicebear"; a folder in ImageFolder form; parquet files or a folder saved by `datasets`, whose columns
    may be named; or webdataset tars. ``count`` defaults to 4096 drawn images, or to all there are. ``seed`` and
    ``families`` are for "dicebear"; ``strict`` refuses a source with a row that would be skipped. ``workers``
    processes draw and as many threads encode (with more than one, call from under ``if __name__ == "__main__"``). A
    previous output of ``prepare`` at ``out`` is replaced, anything else there is refused. ``only`` keeps some rows:
    what is not kept costs its decoding and its features, and leaves nothing on disk.

    Raises PrepareError (what is wrong with the source, an argument or ``out``), EncoderError (an encoder is not
    installed or not the pinned one), OSError (no space, no permission).
    """
    if not 8 <= resolution <= MAX_RESOLUTION:
        raise PrepareError(f"resolution must be 8 to {MAX_RESOLUTION} pixels, got {resolution}")
    if count is not None and count < 1:
        raise PrepareError(f"count must be at least 1, got {count}")
    if shard_rows < 1 or workers < 1:
        raise PrepareError(f"shard_rows and workers must be at least 1, got {shard_rows} and {workers}")
    out = Path(out)
    _check_out(out)
    images: Source
    if str(source) == DICEBEAR:
        images = DiceBearSource(
            count=count or DEFAULT_COUNT, resolution=resolution, seed=seed, families=families, workers=workers
        )
    else:
        images = own_images(
            Path(source),
            resolution=resolution,
            count=count,
            strict=strict,
            image_column=image_column,
            text_column=text_column,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}.", suffix=".tmp", dir=out.parent))
    try:
        folder.chmod(0o755)  # mkdtemp's 0700 would follow the folder to its final name
        work = _Preparation(folder, images, resolution, shard_rows, workers, on_progress or _silent, only)
        report = work.run(text_encoder, feature_encoder)
        _put_in_place(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return PrepareReport(folder=out, **report)


def own_images(
    place: Path,
    *,
    resolution: int,
    count: int | None = None,
    strict: bool = False,
    image_column: str | None = None,
    text_column: str | None = None,
) -> Source:
    """The source that fits what lies at ``place``: metadata beside images, a saved dataset, parquet files or tars.

    Raises PrepareError: nothing there that is known, or column names for a source without columns.
    """
    named = image_column is not None or text_column is not None
    table = is_saved_dataset(place) or bool(parquet_files(place))
    if any((place / name).is_file() for name in METADATA) or not (table or tar_files(place)):
        if named:
            raise PrepareError(f"{place} has no columns to name: --image-column and --text-column are for tables")
        return ImageFolderSource(place, resolution=resolution, count=count, strict=strict)
    if table:
        return TableSource(
            place,
            resolution=resolution,
            count=count,
            strict=strict,
            image_column=image_column,
            text_column=text_column,
        )
    if named:
        raise PrepareError(f"{place} has no columns to name: --image-column and --text-column are for tables")
    return TarSource(place, resolution=resolution, count=count, strict=strict)


class _Preparation:
    """One run: images, then captions, then features, then the manifest, each stage shard by shard."""

    def __init__(
        self,
        folder: Path,
        source: Source,
        resolution: int,
        shard_rows: int,
        workers: int,
        progress: Progress,
        only: OnlyRows | None,
    ) -> None:
        self._folder, self._source, self._resolution = folder, source, resolution
        self._shard_rows, self._workers, self._progress, self._only = shard_rows, workers, progress, only
        self._looked_at = 0
        self._texts: list[str] = []
        self._skipped: list[Skipped] = []
        self._seconds: dict[str, float] = {}

    def run(self, text_encoder: TextEncoder | None, feature_encoder: FeatureEncoder | None) -> dict[str, Any]:
        with self._timed("images"):
            if self._only is not None:
                feature_encoder = feature_encoder or EfficientNetLite0()
            self._images(feature_encoder)
        if self._only is not None and self._looked_at and not self._texts:
            raise PrepareError(f"none of the {self._looked_at} usable images is one of those to keep")
        if not self._texts:
            reasons = "; ".join(f"{item.file} {item.why}" for item in self._skipped[:3])
            raise PrepareError(f"no usable image: {len(self._skipped)} skipped ({reasons or 'the source is empty'})")
        with _one_torch_thread_each(self._workers) as pool:
            with self._timed("captions"):
                text_encoder = text_encoder or MiniLMTextEncoder()
                tokens, null_length = self._captions(text_encoder, pool)
            with self._timed("features"):
                feature_encoder = feature_encoder or EfficientNetLite0()
                self._features(feature_encoder, pool)
        with self._timed("files"):
            size = self._manifest(text_encoder, feature_encoder, tokens, null_length)
        return {
            "count": len(self._texts),
            "resolution": self._resolution,
            "skipped": tuple(self._skipped),
            "text_tokens": tokens,
            "distinct_captions": len(set(self._texts)),
            "bytes": size,
            "seconds": self._seconds,
        }

    def _images(self, encoder: FeatureEncoder | None) -> None:
        total = self._source.total()
        rows: list[Captioned] = []
        waiting: list[Captioned] = []
        with closing(self._source.items()) as items:
            for number, item in enumerate(items, start=1):
                if isinstance(item, Skipped):
                    self._skipped.append(item)
                elif self._only is None or encoder is None:
                    rows.append(item)
                else:
                    waiting.append(item)
                    if len(waiting) == _IMAGES:
                        rows += self._kept(waiting, encoder, self._only)
                        waiting = []
                while len(rows) >= self._shard_rows:
                    self._write_images(rows[: self._shard_rows])
                    rows = rows[self._shard_rows :]
                self._progress("images", number, max(total, number))
        if waiting and encoder is not None and self._only is not None:
            rows += self._kept(waiting, encoder, self._only)
        for start in range(0, len(rows), self._shard_rows):
            self._write_images(rows[start : start + self._shard_rows])

    def _kept(self, waiting: list[Captioned], encoder: FeatureEncoder, only: OnlyRows) -> list[Captioned]:
        self._looked_at += len(waiting)
        keeps = only.keeps(encoder.encode(np.stack([item.pixels for item in waiting])))
        return [item for item, keep in zip(waiting, keeps.tolist(), strict=True) if keep]

    def _write_images(self, rows: list[Captioned]) -> None:
        index = len(self._texts) // self._shard_rows
        texts = [row.record["text"] for row in rows]
        digests = [shards.row_digest(row.pixels, text) for row, text in zip(rows, texts, strict=True)]
        shards.write_rows(self._folder, "pixels", index, np.stack([row.pixels for row in rows]))
        shards.write_rows(self._folder, "digests", index, np.stack(digests))
        shards.write_captions(self._folder, index, (row.record for row in rows))
        self._texts.extend(texts)

    def _captions(self, encoder: TextEncoder, pool: ThreadPoolExecutor) -> tuple[int, int]:
        distinct = list(dict.fromkeys(self._texts))
        lengths = dict(zip(distinct, encoder.lengths(distinct).tolist(), strict=True))
        null_states, null_lengths = encoder.encode([""])
        tokens = max(max(lengths.values()), null_states.shape[1])
        null_states, null_lengths = encoder.encode([""], tokens)
        shards.write_array(self._folder / shards.NULL_STATES, null_states[0])
        known: dict[str, np.ndarray] = {}
        done = 0
        for index, start in enumerate(range(0, len(self._texts), self._shard_rows)):
            texts = self._texts[start : start + self._shard_rows]
            fresh = sorted({text for text in texts if text not in known}, key=lambda text: (lengths[text], text))
            parts = [fresh[place : place + _TEXTS] for place in range(0, len(fresh), _TEXTS)]
            if len(known) + len(fresh) > _KNOWN_TEXTS:
                known = {text: known[text] for text in set(texts) & known.keys()}
            encoded = pool.map(lambda part: encoder.encode(part, tokens), parts)
            for part, (states, _) in zip(parts, encoded, strict=True):
                known.update(zip(part, states, strict=True))
                done += len(part)
                self._progress("captions", min(done, len(distinct)), len(distinct))
            shards.write_rows(self._folder, "states", index, np.stack([known[text] for text in texts]))
            shards.write_rows(self._folder, "lengths", index, np.array([lengths[text] for text in texts]))
        return tokens, int(null_lengths[0])

    def _features(self, encoder: FeatureEncoder, pool: ThreadPoolExecutor) -> None:
        done = 0
        for index, _ in enumerate(range(0, len(self._texts), self._shard_rows)):
            pixels = np.load(self._folder / shards.shard_name("pixels", index), mmap_mode="r", allow_pickle=False)
            parts = [pixels[place : place + _IMAGES] for place in range(0, len(pixels), _IMAGES)]
            features = []
            for part in pool.map(encoder.encode, parts):
                features.append(part)
                done += len(part)
                self._progress("features", done, len(self._texts))
            shards.write_rows(self._folder, "features", index, np.concatenate(features))

    def _manifest(
        self, text_encoder: TextEncoder, feature_encoder: FeatureEncoder, tokens: int, null_length: int
    ) -> int:
        paths = sorted(self._folder.iterdir())
        entries = []
        for number, path in enumerate(paths, start=1):
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
            entries.append({"name": path.name, "length": path.stat().st_size, "digest": digest_file(path)})
            self._progress("files", number, len(paths))
        manifest = {
            "version": shards.VERSION,
            "count": len(self._texts),
            "resolution": self._resolution,
            "channels": 3,
            "shard_rows": self._shard_rows,
            "text": encoder_record(text_encoder, tokens=tokens),
            "features": encoder_record(feature_encoder, size=feature_encoder.size),
            "null_length": null_length,
            "skipped": [{"file": item.file, "why": item.why} for item in self._skipped],
            "files": entries,
            **self._source.describe(),
        }
        if self._only is not None:
            manifest["kept"] = {**self._only.note, "of": self._looked_at}
        atomic_write_json(self._folder / shards.MANIFEST, manifest)
        return sum(entry["length"] for entry in entries)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[stage] = time.perf_counter() - start


@contextmanager
def _one_torch_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads each compute alone: two images side by side are faster than two threads on one image, and
    the result does not depend on how many there are. torch's thread count is put back afterwards.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def _check_out(out: Path) -> None:
    """Raise PrepareError unless ``out`` is free: absent, empty, or a previous output with nothing else in it."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise PrepareError(f"{out} is not a folder: choose another OUT")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    try:
        manifest = json.loads((out / shards.MANIFEST).read_text(encoding="utf-8"))
        own = {entry["name"] for entry in manifest["files"]} | {shards.MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        raise PrepareError(
            f"{out} is not empty and was not written by prepare: choose another OUT or move its files away"
        ) from None
    if stray := sorted(names - own):
        raise PrepareError(
            f"{out} also holds {stray[0]}, which prepare did not write: move it away or choose another OUT"
        )


def _put_in_place(folder: Path, out: Path) -> None:
    """Rename ``folder`` to ``out``; a previous output is set aside first and removed when the new one stands."""
    if not out.exists():
        folder.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}.", suffix=".old", dir=out.parent))
    out.rename(old / "data")
    try:
        folder.rename(out)
    except OSError:
        (old / "data").rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _silent(stage: str, done: int, total: int) -> None:
    """The progress callback when nobody listens."""
