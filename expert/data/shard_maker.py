"""One shard: a range of a source's items decoded, encoded, sifted and written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paris_swarm.expert.data import shards
from paris_swarm.expert.data.encoders import FeatureEncoder, LatentEncoder, TextEncoder
from paris_swarm.expert.data.pictures import SeenNumbers
from paris_swarm.expert.data.published import THUMBNAIL
from paris_swarm.expert.data.sources import Captioned, PrepareError, Skipped, Source
from paris_swarm.expert.data.unfinished import ShardRecord, file_entry

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total) with the stage "images", in items of the source."""

_TEXTS = 64  # captions an encoding task takes; part of what makes the bytes the same everywhere
_IMAGES = 64  # items whose pictures are encoded together, likewise
AGAIN = "is the same picture with the same caption as one before it"
"""Why a duplicate is skipped."""


@dataclass(frozen=True)
class Encoders:
    """Captions to states, pictures to features, and where there is a VAE pictures to latents."""

    text: TextEncoder
    features: FeatureEncoder
    vae: LatentEncoder | None = None


@dataclass(frozen=True)
class OnlyRows:
    """Which rows to keep, judged before anything is written about them.

    keeps: (features float32 [b, F], row digests uint8 [b, 16], caption records) -> bool [b]; note: what the manifest
    says about it, under "kept".
    """

    keeps: Callable[[np.ndarray, np.ndarray, Sequence[Mapping[str, Any]]], np.ndarray]
    note: dict[str, Any]


@dataclass
class _Row:
    """A usable picture's record and identity; ``first``: whether it is the first of its kind (None: not asked yet)."""

    record: dict[str, Any]
    digest: bytes
    first: bool | None


@dataclass(frozen=True)
class _Encoded:
    """What became of neighbouring pictures: which are kept, bool [b], and of those the arrays by kind, [kept, ...]."""

    keep: np.ndarray
    arrays: dict[str, np.ndarray]


class ShardMaker:
    """Makes shards in ``folder``. Everything about a row but whether it came before follows from its shard's items.

    Duplicates are therefore encoded with the rest and dropped when the shard is written: what is written of the others
    is the same whether their twin was in an earlier shard, in another part or nowhere.
    """

    def __init__(
        self, folder: Path, encoders: Encoders, only: OnlyRows | None, *, strict: bool = False, workers: int = 1
    ) -> None:
        self._folder, self._encoders, self._only = folder, encoders, only
        self._strict, self._workers = strict, workers
        self._seen = SeenNumbers()
        self._pool: ThreadPoolExecutor | None = None
        self.seconds = {"images": 0.0, "features": 0.0, "captions": 0.0, "files": 0.0}

    def remember(self, folder: Path, records: Sequence[ShardRecord]) -> None:
        """The rows of shards that are finished already, so that their duplicates are known."""
        for record in records:
            if record.rows:
                path = folder / shards.shard_name("digests", record.number)
                for digest in np.load(path, allow_pickle=False):
                    self._seen.add(digest.tobytes())

    def write_null(self, path: Path) -> int:
        """Write the empty caption's states, float16 [n, D], and give n."""
        states, lengths = self._encoders.text.encode([""])
        length = int(lengths[0])
        shards.write_array(path, states[0, :length])
        return length

    @contextmanager
    def reading(self, source: Source, *, start: int) -> Iterator[Iterator[Captioned | Skipped]]:
        """The source's items from ``start`` on, while a pool of threads stands ready to encode.

        Each thread computes alone: two images side by side are faster than two threads on one image, and the result
        does not depend on how many there are. torch's thread count is put back afterwards.
        """
        before = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            with closing(source.items(start)) as items:
                yield items
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
            torch.set_num_threads(before)

    def make(
        self,
        number: int,
        items: Iterator[Captioned | Skipped],
        size: int,
        limit: int | None,
        progress: Callable[[int], None],
    ) -> ShardRecord:
        """Shard ``number`` of the next ``size`` items, or of so many that ``limit`` of them are usable.

        Raises PrepareError: strict, and an item is not usable; or the source has fewer items than it said.
        """
        broken: list[Skipped] = []
        rows: list[_Row] = []
        pictures: list[np.ndarray] = []
        encoding: list[Future[_Encoded]] = []
        usable = read = 0
        ended = False
        with self._timed("images"):
            while read < size and not ended:
                item = next(items, None)
                if item is None:
                    raise PrepareError(f"the source ended {size - read} items early: was it changed meanwhile?")
                read += 1
                if isinstance(item, Skipped):
                    broken.append(self._allowed(item))
                else:
                    digest = shards.row_digest(item.pixels, item.record["text"]).tobytes()
                    rows.append(_Row(item.record, digest, self._seen.add(digest) if self._only is None else None))
                    usable += rows[-1].first is not False
                    ended = usable == limit
                    pictures.append(item.pixels)
                if pictures and (read % _IMAGES == 0 or read == size or ended):
                    encoding.append(self._encode_later(np.stack(pictures), rows[-len(pictures) :]))
                    pictures = []
                    if len(encoding) > 2 * self._workers:  # so that pictures do not pile up before the encoders
                        encoding[-2 * self._workers].result()
                progress(read)
        with self._timed("features"):
            kept, arrays = _collected(rows, [task.result() for task in encoding])
        for row in kept:
            if row.first is None:
                row.first = self._seen.add(row.digest)
        again = [self._allowed(Skipped(row.record["file"], AGAIN)) for row in kept if not row.first]
        tokens, files = self._write(number, kept, arrays)
        return ShardRecord(
            number=number,
            rows=len(kept) - len(again),
            looked_at=len(rows),
            usable=usable,
            tokens=tokens,
            skipped=(*broken, *again),
            files=files,
            last=ended,
        )

    def _allowed(self, item: Skipped) -> Skipped:
        if self._strict:
            raise PrepareError(f"{item.file}: {item.why}; repair it, or run without --strict to skip it")
        return item

    def _encode_later(self, pictures: np.ndarray, rows: list[_Row]) -> Future[_Encoded]:
        assert self._pool is not None
        return self._pool.submit(self._encode, pictures, rows)

    def _encode(self, pictures: np.ndarray, rows: list[_Row]) -> _Encoded:
        """pictures: uint8 [b, H, W, 3] of these rows."""
        features = self._encoders.features.encode(pictures)  # [b, F]
        keep = np.ones(len(pictures), dtype=bool)
        if self._only is not None:
            digests = np.stack([np.frombuffer(row.digest, dtype=np.uint8) for row in rows])
            keep = self._only.keeps(features, digests, [row.record for row in rows])
        pictures = pictures[keep]
        arrays = {"features": features[keep]}
        if self._encoders.vae is None:
            arrays["pixels"] = pictures
        elif len(pictures):
            arrays["latents"] = self._encoders.vae.encode(pictures)  # [b, h, w, C]
            arrays["thumbnails"] = _thumbnails(pictures)  # [b, s, s, 3]
        return _Encoded(keep, arrays)

    def _write(
        self, number: int, kept: list[_Row], arrays: dict[str, np.ndarray]
    ) -> tuple[int, tuple[dict[str, Any], ...]]:
        """Write the rows that are the first of their kind; the longest caption's tokens, and the files."""
        first = np.array([bool(row.first) for row in kept], dtype=bool)
        if not first.any():
            return 0, ()
        with self._timed("captions"):
            states, lengths = self._states([row.record["text"] for row in kept])
        with self._timed("files"):
            tokens = int(lengths[first].max())
            digests = [np.frombuffer(row.digest, dtype=np.uint8) for row in kept]
            arrays = arrays | {"states": states[:, :tokens], "lengths": lengths, "digests": np.stack(digests)}
            for kind, array in arrays.items():
                shards.write_rows(self._folder, kind, number, array[first])
            shards.write_captions(self._folder, number, (row.record for row in kept if row.first))
            names = [shards.shard_name(kind, number) for kind in (*arrays, "captions")]
            return tokens, tuple(file_entry(self._folder / name) for name in names)

    def _states(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(float16 [n, L, D], int16 [n]): each different caption is encoded once, those of like length together."""
        assert self._pool is not None
        distinct = sorted(set(texts))
        counts = dict(zip(distinct, self._encoders.text.lengths(distinct).tolist(), strict=True))
        distinct.sort(key=lambda text: (counts[text], text))
        longest = max(counts.values())
        parts = [distinct[place : place + _TEXTS] for place in range(0, len(distinct), _TEXTS)]
        encoded = list(self._pool.map(lambda part: self._encoders.text.encode(part, longest)[0], parts))
        states = np.concatenate(encoded)
        place_of = {text: place for place, text in enumerate(distinct)}
        lengths = np.array([counts[text] for text in texts], dtype=np.int16)
        return states[[place_of[text] for text in texts]], lengths

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start


def _collected(rows: list[_Row], encoded: list[_Encoded]) -> tuple[list[_Row], dict[str, np.ndarray]]:
    """The kept rows, and their arrays."""
    if not rows:
        return [], {}
    keep = np.concatenate([part.keep for part in encoded])
    kinds = dict.fromkeys(kind for part in encoded for kind in part.arrays)
    arrays = {kind: np.concatenate([part.arrays[kind] for part in encoded if kind in part.arrays]) for kind in kinds}
    return [row for row, kept in zip(rows, keep.tolist(), strict=True) if kept], arrays


def _thumbnails(pictures: np.ndarray) -> np.ndarray:
    """uint8 [b, s, s, 3] of uint8 [b, H, W, 3]."""
    from PIL import Image

    size = (THUMBNAIL, THUMBNAIL)
    return np.stack([np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX)) for picture in pictures])
