"""What compressing checkpoints on the wire is worth: ratio and speed both ways, on checkpoints really trained here.

    python benchmarks/compression.py RUN/checkpoints          # every checkpoint folder of one run, oldest first
    python benchmarks/compression.py RUN/checkpoints --json

Files are cut into the chunks that travel (4 MiB). Codings: zstd at levels 1, 3, 9 on the bytes as they are; on byte
planes (all first bytes of the elements, then all second bytes, ...); on byte planes of the difference to the parent
checkpoint at the same place (as integers, or by XOR). bf16 is the EMA file cast: training here keeps fp32.

A coding pays on a link when sending what is left and coding and decoding it, one after the other on one core, takes
less time than sending the bytes as they are; in a pipeline, when it is not the slowest stage. Both are printed.
Also: how many chunks of a checkpoint are those of its parent, bit for bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from paris_swarm.dht_schemas.digest import CHUNK, chunk_digests

LINKS = {"10 Mbit/s": 1.25, "100 Mbit/s": 12.5, "1 Gbit/s": 125.0, "loopback": 500.0}
"""MB/s."""
FILES = ("ema", "model", "optimizer")


@dataclass(frozen=True)
class Coding:
    """level: zstd's. planes: bytes grouped by their place in the element. delta to the parent: None, "-" or "^"."""

    level: int
    planes: bool = False
    delta: str | None = None

    @property
    def name(self) -> str:
        return (
            {None: "", "-": "difference, ", "^": "XOR, "}[self.delta]
            + ("planes, " if self.planes else "")
            + f"zstd {self.level}"
        )


CODINGS = [
    *(Coding(level) for level in (1, 3, 9)),
    *(Coding(level, planes=True) for level in (1, 3, 9)),
    *(Coding(level, planes=True, delta=delta) for delta in ("-", "^") for level in (1, 3)),
]


def encode(data: np.ndarray[Any, Any], parent: np.ndarray[Any, Any] | None, coding: Coding) -> bytes:
    """data: unsigned integers, one an element."""
    if coding.delta is not None:
        assert parent is not None
        data = data - parent if coding.delta == "-" else data ^ parent
    raw = np.ascontiguousarray(data.view(np.uint8).reshape(len(data), -1).T) if coding.planes else data
    return zstandard.ZstdCompressor(level=coding.level).compress(raw)


def decode(
    packed: bytes, dtype: np.dtype[Any], parent: np.ndarray[Any, Any] | None, coding: Coding
) -> np.ndarray[Any, Any]:
    raw = np.frombuffer(zstandard.ZstdDecompressor().decompress(packed), dtype=np.uint8)
    if coding.planes:
        raw = np.ascontiguousarray(raw.reshape(dtype.itemsize, -1).T).reshape(-1)
    data = raw.view(dtype)
    if coding.delta is not None:
        assert parent is not None
        data = data + parent if coding.delta == "-" else data ^ parent
    return data


def elements(path: Path, *, bf16: bool) -> np.ndarray[Any, Any]:
    """The whole file, header and all, as unsigned integers of the element's size; what does not fill one is cut off."""
    raw = np.fromfile(path, dtype=np.uint8)
    words = raw[: len(raw) // 4 * 4].view(np.uint32)
    if not bf16:
        return words
    start = (8 + int.from_bytes(raw[:8].tobytes(), "little")) // 4
    tensors = words[start:]
    return ((tensors + 0x7FFF + (tensors >> 16 & 1)) >> 16).astype(np.uint16)  # round to nearest, ties to even


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.process_time()
    return work(), time.process_time() - begun


def measure(folders: list[Path]) -> list[dict[str, Any]]:
    """One row for every kind of file and coding: over all pairs of a checkpoint and its parent."""
    rows = []
    for kind in (*FILES, "ema as bf16"):
        name = kind.split()[0] + ".safetensors"
        loaded = [elements(folder / name, bf16="bf16" in kind) for folder in folders]
        for coding in CODINGS:
            plain = packed = 0
            seconds = [0.0, 0.0]
            for parent, child in itertools.pairwise(loaded):
                step = CHUNK // child.dtype.itemsize
                for at in range(0, len(child), step):
                    chunk, before = child[at : at + step], parent[at : at + step]
                    coded, took = timed(lambda: encode(chunk, before, coding))  # noqa: B023 - called at once
                    back, took_back = timed(lambda: decode(coded, chunk.dtype, before, coding))  # noqa: B023
                    if not np.array_equal(back, chunk):
                        raise SystemExit(f"{coding.name} does not give back what it took")
                    plain, packed = plain + chunk.nbytes, packed + len(coded)
                    seconds = [seconds[0] + took, seconds[1] + took_back]
            up, down = (plain / 1e6 / max(value, 1e-9) for value in seconds)
            kept = packed / plain
            rows.append(
                {
                    "file": kind,
                    "coding": coding.name,
                    "kept": round(kept, 4),
                    "encode_mb_s": round(up),
                    "decode_mb_s": round(down),
                    "gain_in_turn": {
                        link: round((1 / speed) / (kept / speed + 1 / up + 1 / down), 2)
                        for link, speed in LINKS.items()
                    },
                    "gain_in_pipeline": {
                        link: round(min(speed / kept, up, down) / speed, 2) for link, speed in LINKS.items()
                    },
                }
            )
    return rows


def shared(folders: list[Path]) -> dict[str, str]:
    """By file: chunks that a checkpoint has in common with the one before, of all chunks."""
    found = {}
    for name in FILES:
        digests = [chunk_digests(folder / f"{name}.safetensors") for folder in folders]
        same = sum(len(set(one) & set(other)) for one, other in itertools.pairwise(digests))
        found[name] = f"{same} of {sum(map(len, digests[1:]))}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, help="folder of checkpoint folders (step-00000100, ...)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    folders = sorted(path for path in arguments.checkpoints.iterdir() if path.name.startswith("step-"))
    if len(folders) < 2:
        parser.error("at least two checkpoints")
    result = {"checkpoints": len(folders), "chunks in common": shared(folders), "codings": measure(folders)}
    if arguments.json:
        print(json.dumps(result, indent=2))
        return 0
    print("chunks in common with the parent:", result["chunks in common"])
    print("| file | coding | kept | encode MB/s | decode MB/s | " + " | ".join(LINKS) + " |")
    print("|---|---|---|---|---|" + "---|" * len(LINKS))
    for row in measure_rows(result):
        print(row)
    return 0


def measure_rows(result: dict[str, Any]) -> list[str]:
    """The table's lines; gains as `in turn / in a pipeline`."""
    return [
        f"| {row['file']} | {row['coding']} | {row['kept']:.3f} | {row['encode_mb_s']} | {row['decode_mb_s']} | "
        + " | ".join(f"{row['gain_in_turn'][link]:.2f} / {row['gain_in_pipeline'][link]:.2f}" for link in LINKS)
        + " |"
        for row in result["codings"]
    ]


if __name__ == "__main__":
    sys.exit(main())
