"""The folder that ``prepare`` writes and every later step reads: memory-mapped shards beside one ``manifest.json``.

    manifest.json            what is here: count, resolution, encoders, licences, what was skipped, file digests
    pixels-00000.npy         uint8   [n, H, W, 3]   sRGB
    states-00000.npy         float16 [n, L, D]      caption token states, zero behind each caption's own length
    lengths-00000.npy        int16   [n]            tokens of each caption
    features-00000.npy       float32 [n, F]         image features for the clustering
    digests-00000.npy        uint8   [n, 16]        what identifies a row: BLAKE3 of its pixels and its caption
    captions-00000.jsonl     {"text", "file", and where the source knows them "family", "attributes"}, one object a line
    null_states.npy          float16 [L, D]         the states of the empty caption ("unconditional")

Every shard but the last holds ``shard_rows`` rows. Nothing here is a pickle: ``np.load(..., allow_pickle=False)``.
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

VERSION = 1
MANIFEST = "manifest.json"
NULL_STATES = "null_states.npy"
SHARD_ROWS = 2048
DIGEST_BYTES = 16

_ARRAYS = {"pixels": np.uint8, "states": np.float16, "lengths": np.int16, "features": np.float32, "digests": np.uint8}


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
    _shards: dict[str, tuple[np.ndarray, ...]] = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> PreparedData:
        """Map the folder's arrays. Checks names, lengths, shapes and dtypes; with ``verify`` every file's digest too.

        Raises PreparedDataError.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
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
        side, wide = manifest["resolution"], manifest["features"]["dim"]
        tails = {
            "pixels": (side, side, manifest["channels"]),
            "states": (tokens, dim),
            "lengths": (),
            "features": (wide,),
            "digests": (DIGEST_BYTES,),
        }
        rows = manifest["shard_rows"]
        sizes = [min(rows, manifest["count"] - start) for start in range(0, manifest["count"], rows)]
        shards = {
            kind: tuple(
                _map_array(folder / shard_name(kind, index), (size, *tails[kind]), dtype)
                for index, size in enumerate(sizes)
            )
            for kind, dtype in _ARRAYS.items()
        }
        null_states = np.array(_map_array(folder / NULL_STATES, (tokens, dim), np.float16))
        return cls(folder, manifest, null_states, shards)

    @property
    def count(self) -> int:
        """How many rows there are."""
        return int(self.manifest["count"])

    @property
    def resolution(self) -> int:
        """Height and width of every image, in pixels."""
        return int(self.manifest["resolution"])

    @property
    def null_length(self) -> int:
        """Tokens of the empty caption."""
        return int(self.manifest["null_length"])

    @property
    def digests(self) -> np.ndarray:
        """uint8 [N, 16]: every row's identity, see ``row_digest``."""
        return np.concatenate(self._shards["digests"])

    def pixels(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [b, H, W, 3] of the given rows, in the given order. Raises IndexError."""
        return self._gather("pixels", rows)

    def states(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(float16 [b, L, D], int16 [b]): caption token states, how many of the L tokens count. Raises IndexError."""
        return self._gather("states", rows), self._gather("lengths", rows)

    def features(self) -> np.ndarray:
        """float32 [N, F]: the image features of all rows, as the encoder gave them (not normalised)."""
        return np.concatenate(self._shards["features"])

    def captions(self, rows: Sequence[int] | np.ndarray | None = None) -> list[dict[str, Any]]:
        """The caption records of the given rows (all of them when none are given). Raises IndexError."""
        wanted = self._checked(np.arange(self.count) if rows is None else rows)
        shard_rows = self.manifest["shard_rows"]
        lines = {
            index: (self.folder / shard_name("captions", index)).read_text(encoding="utf-8").split("\n")
            for index in sorted(set((wanted // shard_rows).tolist()))
        }
        return [json.loads(lines[row // shard_rows][row % shard_rows]) for row in wanted.tolist()]

    def _checked(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.count):
            raise IndexError(f"rows must be 0 to {self.count - 1}, got {wanted.min()} to {wanted.max()}")
        return wanted

    def _gather(self, kind: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = self._checked(rows)
        shards = self._shards[kind]
        out = np.empty((len(wanted), *shards[0].shape[1:]), dtype=shards[0].dtype)
        shard_of, row_in = np.divmod(wanted, self.manifest["shard_rows"])
        for index in np.unique(shard_of):
            here = shard_of == index
            out[here] = shards[index][row_in[here]]
        return out


def write_rows(folder: Path, kind: str, index: int, array: np.ndarray) -> None:
    """Write one shard of one kind. The bytes depend on the array alone."""
    write_array(folder / shard_name(kind, index), np.asarray(array, dtype=_ARRAYS[kind]))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file (format 1.0).

    Raises:
        OSError: with errno and path, where `np.save` on a full disk has neither.
    """
    array = np.ascontiguousarray(array)
    try:
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.reshape(-1).view(np.uint8).data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_captions(folder: Path, index: int, records: Iterable[dict[str, Any]]) -> None:
    """Write one shard of caption records, one JSON object a line, keys sorted."""
    lines = [json.dumps(record, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n" for record in records]
    (folder / shard_name("captions", index)).write_bytes("".join(lines).encode("utf-8"))


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PreparedDataError(f"{folder} is not a prepared folder: it has no {MANIFEST}; run prepare first") from None
    except (OSError, ValueError) as error:
        raise PreparedDataError(f"{path} cannot be read ({error}): prepare the data again") from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise PreparedDataError(f"{path} is not of version {VERSION}: prepare the data again with this release")
    try:
        numbers = (
            manifest["count"], manifest["resolution"], manifest["channels"], manifest["shard_rows"],
            manifest["text"]["tokens"], manifest["text"]["dim"], manifest["features"]["dim"], manifest["null_length"],
        )  # fmt: skip
        names = [(entry["name"], entry["length"], entry["digest"]) for entry in manifest["files"]]
    except (KeyError, TypeError) as error:
        raise PreparedDataError(f"{path} lacks {error}: prepare the data again") from error
    if not all(type(number) is int and number > 0 for number in numbers):
        raise PreparedDataError(f"{path} holds a size that is not a positive whole number: prepare the data again")
    if not all(isinstance(name, str) and Path(name).name == name for name, _, _ in names):
        raise PreparedDataError(f"{path} names a file outside its folder: refused")
    return manifest


def _map_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise PreparedDataError(f"{path} cannot be read ({error}): prepare the data again") from error
    if array.shape != shape or array.dtype != dtype:
        raise PreparedDataError(
            f"{path} holds {array.dtype} {list(array.shape)}, not {np.dtype(dtype)} {list(shape)}: "
            "prepare the data again"
        )
    return array
