"""The folder that ``prepare`` writes and every later step reads: memory-mapped shards beside one ``manifest.json``.

    manifest.json            what is here: count, resolution, encoders, licences, what was skipped, file digests
    pixels-00000.npy         uint8   [n, H, W, 3]   sRGB
    states-00000.npy         float16 [n, L, D]      caption token states, zero behind each caption's own length
    lengths-00000.npy        int16   [n]            tokens of each caption
    features-00000.npy       float32 [n, F]         image features for the clustering
    digests-00000.npy        uint8   [n, 16]        what identifies a row: BLAKE3 of its pixels and its caption
    captions-00000.jsonl     {"text", "file", and where the source knows it "class", "family", "attributes"}, one a line
    null_states.npy          float16 [L, D]         the states of the empty caption ("unconditional")

Where a VAE stands between pictures and model, two kinds take the place of pixels:

    latents-00000.npy        float16 [n, h, w, C]   what the VAE makes of a picture, at unit scale
    thumbnails-00000.npy     uint8   [n, s, s, 3]   small pictures, for people to look at

A shard holds the usable rows among so many neighbouring items of the source, so its number of rows varies; the manifest
lists them, and a shard without rows has no files. L is each shard's own longest caption. Nothing here is a pickle:
``np.load(..., allow_pickle=False)``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from paris_swarm.dht_schemas.digest import digest_file
from paris_swarm.expert.data.sharded_rows import ShardedRows, array_header, write_array

VERSION = 2
_READ = (1, 2)
"""Version 1 had no list of shard sizes, no latents, and one L for all shards."""
MANIFEST = "manifest.json"
NULL_STATES = "null_states.npy"
SHARD_ROWS = 2048
DIGEST_BYTES = 16

_ARRAYS = {
    "pixels": np.uint8,
    "latents": np.float16,
    "thumbnails": np.uint8,
    "states": np.float16,
    "lengths": np.int16,
    "features": np.float32,
    "digests": np.uint8,
}


class PreparedDataError(ValueError):
    """The prepared folder is missing, incomplete or damaged; the message says which file. Run ``prepare`` again."""


def row_digest(pixels: np.ndarray, text: str) -> np.ndarray:
    """uint8 [16]: the identity of one row, from its uint8 [H, W, 3] pixels and its caption.

    The shape goes first so that no two rows of different sizes can share the same bytes.
    """
    hasher = blake3(np.asarray(pixels.shape, dtype="<u4").tobytes())
    hasher.update(np.ascontiguousarray(pixels).tobytes())
    hasher.update(text.encode("utf-8"))
    return np.frombuffer(hasher.digest(length=DIGEST_BYTES), dtype=np.uint8)


def shard_name(kind: str, index: int) -> str:
    """The file of one shard: ``pixels-00003.npy``, ``captions-00003.jsonl``."""
    return f"{kind}-{index:05d}.{'jsonl' if kind == 'captions' else 'npy'}"


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder, open for reading. Rows are numbered 0 to ``count`` - 1 across the shards.

    ``manifest`` is the parsed ``manifest.json``; ``null_states`` is float16 [L, D], of which the first
    ``null_length`` tokens count.
    """

    folder: Path
    manifest: dict[str, Any]
    null_states: np.ndarray
    _shards: dict[str, ShardedRows] = field(repr=False)
    _sizes: tuple[int, ...] = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> PreparedData:
        """Find the folder's arrays. Checks names, lengths, shapes and dtypes; with ``verify`` every file's digest too.

        Raises PreparedDataError.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        for entry in manifest["files"]:
            path = folder / entry["name"]
            if not path.is_file():
                raise PreparedDataError(f"{path} is missing: prepare the data again")
            if path.stat().st_size != entry["length"]:
                raise PreparedDataError(
                    f"{path} has {path.stat().st_size} bytes, not {entry['length']}: prepare the data again"
                )
            if verify and digest_file(path) != entry["digest"]:
                raise PreparedDataError(f"{path} does not match its digest in {MANIFEST}: prepare the data again")
        tokens, dim = manifest["text"]["tokens"], manifest["text"]["dim"]
        sizes = shard_sizes(manifest)
        shards, extents = {}, [0]
        for kind, tail in row_shapes(manifest).items():
            files = [(folder / shard_name(kind, number), rows) for number, rows in enumerate(sizes) if rows]
            padded = kind == "states"
            for path, rows in files:
                found = _check_array(path, (rows, *tail), _ARRAYS[kind], padded=padded)
                extents += found[1:2] if padded else ()
            shards[kind] = ShardedRows(files, tail, _ARRAYS[kind], padded=padded)
        null_tokens, _ = _check_array(folder / NULL_STATES, (tokens, dim), np.float16, padded=True, axis=0)
        if tokens > max(null_tokens, *extents) or manifest["null_length"] > null_tokens:
            raise PreparedDataError(
                f"{folder / MANIFEST} says captions of {tokens} tokens and an empty one of {manifest['null_length']}; "
                f"the longest stored have {max(extents)} and {null_tokens}: prepare the data again"
            )
        null_states = np.zeros((tokens, dim), dtype=np.float16)
        stored = np.load(folder / NULL_STATES, allow_pickle=False)
        null_states[: len(stored)] = stored
        return cls(folder, manifest, null_states, shards, sizes)

    @property
    def count(self) -> int:
        """How many rows there are."""
        return int(self.manifest["count"])

    @property
    def resolution(self) -> int:
        """Height and width of what a model learns to draw: pixels, or latent cells."""
        return int(self.manifest["resolution"])

    @property
    def null_length(self) -> int:
        """Tokens of the empty caption."""
        return int(self.manifest["null_length"])

    @property
    def digests(self) -> np.ndarray:
        """uint8 [N, 16]: every row's identity, see ``row_digest``."""
        return np.asarray(self._shards["digests"])

    def pixels(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """What a model learns to draw, of the given rows in the given order: uint8 [b, H, W, 3], or where a VAE stands
        in between float16 [b, h, w, C], its latents at unit scale. Raises IndexError.
        """
        return self._shards["latents" if "latents" in self._shards else "pixels"][self._checked(rows)]

    def thumbnails(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Pictures for people, uint8 [b, s, s, 3]: the pixels themselves where they are stored. Raises IndexError."""
        return self._shards["thumbnails" if "thumbnails" in self._shards else "pixels"][self._checked(rows)]

    def states(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(float16 [b, L, D], int16 [b]): caption token states, how many of the L tokens count (1 to L).

        Raises IndexError; PreparedDataError: a length that is none.
        """
        wanted = self._checked(rows)
        states, lengths = self._shards["states"][wanted], self._shards["lengths"][wanted]
        odd = np.flatnonzero((lengths < 1) | (lengths > states.shape[1]))
        if len(odd):
            raise PreparedDataError(
                f"{self.folder}: row {wanted[odd[0]]} has a caption of {lengths[odd[0]]} tokens, not 1 to "
                f"{states.shape[1]}: prepare the data again"
            )
        return states, lengths

    def features(self) -> ShardedRows:
        """float32 [N, F], read as it is indexed: the image features of all rows, as the encoder gave them (not
        normalised).
        """
        return self._shards["features"]

    def captions(self, rows: Sequence[int] | np.ndarray | None = None) -> list[dict[str, Any]]:
        """The caption records of the given rows (all of them when none are given). Raises IndexError."""
        wanted = self._checked(np.arange(self.count) if rows is None else rows)
        ends = np.cumsum(self._sizes, dtype=np.int64)
        shard_of = np.searchsorted(ends, wanted, side="right")
        records: list[dict[str, Any]] = [{}] * len(wanted)
        for number in np.unique(shard_of).tolist():
            lines = (self.folder / shard_name("captions", number)).read_text(encoding="utf-8").split("\n")
            start = int(ends[number]) - self._sizes[number]
            for place in np.flatnonzero(shard_of == number).tolist():
                records[place] = json.loads(lines[wanted[place] - start])
        return records

    def _checked(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.count):
            raise IndexError(f"rows must be 0 to {self.count - 1}, got {wanted.min()} to {wanted.max()}")
        return wanted


def shard_sizes(manifest: dict[str, Any]) -> tuple[int, ...]:
    """Rows of each shard; without a list of them all but the last have ``shard_rows``."""
    if "shards" not in manifest:
        rows = manifest["shard_rows"]
        return tuple(min(rows, manifest["count"] - start) for start in range(0, manifest["count"], rows))
    return tuple(manifest["shards"])


def row_shapes(manifest: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The kinds of arrays that a folder has, and the shape of a row of each."""
    side, channels = manifest["resolution"], manifest["channels"]
    latents = manifest.get("latents")
    shapes: dict[str, tuple[int, ...]] = {}
    if latents is None:
        shapes["pixels"] = (side, side, channels)
    else:
        shapes["latents"] = (side, side, channels)
        shapes["thumbnails"] = (latents["thumbnail"], latents["thumbnail"], 3)
    return shapes | {
        "states": (manifest["text"]["tokens"], manifest["text"]["dim"]),
        "lengths": (),
        "features": (manifest["features"]["dim"],),
        "digests": (DIGEST_BYTES,),
    }


def write_rows(folder: Path, kind: str, index: int, array: np.ndarray) -> None:
    """Write one shard of one kind. The bytes depend on the array alone."""
    write_array(folder / shard_name(kind, index), np.asarray(array, dtype=_ARRAYS[kind]))


def write_captions(folder: Path, index: int, records: Iterable[dict[str, Any]]) -> None:
    """Write one shard of caption records, one JSON object a line, keys sorted."""
    lines = [json.dumps(record, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n" for record in records]
    (folder / shard_name("captions", index)).write_bytes("".join(lines).encode("utf-8"))


def read_captions(folder: Path, index: int) -> list[dict[str, Any]]:
    """The caption records of one shard."""
    lines = (folder / shard_name("captions", index)).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def kinds() -> tuple[str, ...]:
    """Every kind of file that a shard may have."""
    return (*_ARRAYS, "captions")


def read_manifest(folder: Path, *, empty: bool = False) -> dict[str, Any]:
    """The checked manifest of a prepared folder; with ``empty`` it may have no rows. Raises PreparedDataError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PreparedDataError(f"{folder} is not a prepared folder: it has no {MANIFEST}; run prepare first") from None
    except (OSError, ValueError) as error:
        raise PreparedDataError(f"{path} cannot be read ({error}): prepare the data again") from error
    if not isinstance(manifest, dict) or manifest.get("version") not in _READ:
        raise PreparedDataError(f"{path} is not of version {VERSION}: prepare the data again with this release")
    try:
        numbers = [
            1 if empty and manifest["count"] == 0 else manifest["count"], manifest["null_length"],
            manifest["resolution"], manifest["channels"],
            manifest["text"]["tokens"], manifest["text"]["dim"], manifest["features"]["dim"],
        ]  # fmt: skip
        if "shards" not in manifest:
            numbers.append(manifest["shard_rows"])
        elif not all(type(rows) is int and rows >= 0 for rows in manifest["shards"]):
            raise PreparedDataError(f"{path} has a shard whose size is no number: prepare the data again")
        if manifest.get("latents") is not None:
            numbers.append(manifest["latents"]["thumbnail"])
        names = [(entry["name"], entry["length"], entry["digest"]) for entry in manifest["files"]]
    except (KeyError, TypeError) as error:
        raise PreparedDataError(f"{path} lacks {error}: prepare the data again") from error
    if not all(type(number) is int and number > 0 for number in numbers):
        raise PreparedDataError(f"{path} holds a size that is not a positive whole number: prepare the data again")
    if "shards" not in manifest and -(-manifest["count"] // manifest["shard_rows"]) > len(names):
        raise PreparedDataError(
            f"{path} says {manifest['count']} rows in shards of {manifest['shard_rows']}, and names only "
            f"{len(names)} files: prepare the data again"
        )
    if sum(shard_sizes(manifest)) != manifest["count"]:
        raise PreparedDataError(f"{path}: its shards do not have {manifest['count']} rows: prepare the data again")
    if not all(isinstance(name, str) and Path(name).name == name for name, _, _ in names):
        raise PreparedDataError(f"{path} names a file outside its folder: refused")
    return manifest


def _check_array(
    path: Path, shape: tuple[int, ...], dtype: type, *, padded: bool = False, axis: int = 1
) -> tuple[int, ...]:
    """The shape that a file holds. Raise PreparedDataError unless it is this; with ``padded`` its extent along ``axis``
    may be smaller.
    """
    try:
        found, kind = array_header(path)
    except (OSError, ValueError) as error:
        raise PreparedDataError(f"{path} cannot be read ({error}): prepare the data again") from error
    fits = len(found) == len(shape) and kind == dtype
    for place, (have, want) in enumerate(zip(found, shape, strict=False)):
        fits &= 0 < have <= want if padded and place == axis else have == want
    if not fits:
        raise PreparedDataError(
            f"{path} holds {kind} {list(found)}, not {np.dtype(dtype)} {list(shape)}: prepare the data again"
        )
    return found
