"""Memory of `prepare` by the number of rows: made parquet rows and a made metadata.jsonl, encoders that cost nothing.

    python benchmarks/prepare.py [--rows 300000] [--json]

The encoders are stand-ins (their memory does not depend on how many rows there are), all else is what `prepare` runs.
Resident memory is read as rows go by; the slope over the second half of the run is what a row costs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paris_swarm.expert.data.imagefolder import ImageFolderSource
from paris_swarm.expert.data.prepare import prepare
from paris_swarm.expert.data.shards import PreparedData

LAION = 11_000_000
"""Rows that Paris was trained on (arXiv 2510.03434)."""
SAMPLES = 60
"""Resident memory is read so many times in a run."""


class LengthStates:
    """Captions to states of four numbers: what a text encoder costs is not the question here."""

    name, digest, dim = "lengths", "0" * 64, 4

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([min(2 + text.count(" "), 16) for text in texts], dtype=np.int16)

    def encode(self, texts: Sequence[str], tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        lengths = self.lengths(texts)
        states = np.zeros((len(texts), tokens or int(lengths.max()), self.dim), dtype=np.float16)
        for row, length in enumerate(lengths):
            states[row, :length] = 1
        return states, lengths


class MeanColour:
    """Pictures to their mean colour."""

    name, digest, dim, size = "mean-colour", "1" * 64, 3, 8

    def encode(self, images: np.ndarray) -> np.ndarray:
        return images.mean((1, 2)).astype(np.float32)


def resident() -> float:
    """This process's resident memory, MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def write_parquet(folder: Path, rows: int) -> None:
    """Files of 50,000 rows: an 8-pixel PNG of random colours and a caption, no two the same."""
    import pyarrow
    import pyarrow.parquet as parquet
    from PIL import Image

    dice = np.random.default_rng(0)
    for start in range(0, rows, 50_000):
        count = min(50_000, rows - start)
        images = []
        for pixels in dice.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8):
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "png", compress_level=0)
            images.append(stream.getvalue())
        texts = [f"picture number {start + row} of many others" for row in range(count)]
        table = pyarrow.table({"image": images, "text": texts})
        parquet.write_table(table, folder / f"{start:09d}.parquet", row_group_size=1000)


def slope(samples: list[tuple[int, float]]) -> float:
    """MiB for each 100,000 rows, fitted on the second half."""
    late = samples[len(samples) // 2 :]
    rows, memory = np.array(late, dtype=np.float64).T
    return float(np.polyfit(rows, memory, 1)[0] * 100_000)


def measure_prepare(room: Path, rows: int) -> dict[str, object]:
    """`prepare` of parquet rows, and opening what it wrote."""
    (room / "tables").mkdir()
    write_parquet(room / "tables", rows)
    samples: list[tuple[int, float]] = []

    def note(_stage: str, done: int, _total: int) -> None:
        if done % (rows // SAMPLES) == 0:
            samples.append((done, resident()))

    start = time.perf_counter()
    options = {"text_encoder": LengthStates(), "feature_encoder": MeanColour(), "on_progress": note}
    report = prepare(room / "tables", room / "data", resolution=8, **options)
    seconds = time.perf_counter() - start
    before = resident()
    start = time.perf_counter()
    data = PreparedData.open(room / "data")
    opened = time.perf_counter() - start
    dice = np.random.default_rng(1)
    for _ in range(100):
        wanted = dice.integers(0, data.count, 64)
        data.pixels(wanted), data.states(wanted)
    found = slope(samples)
    return {
        "rows": report.count,
        "rows_per_second": round(report.count / seconds),
        "mib_at": {str(done): round(memory) for done, memory in samples[9::10]},
        "mib_per_100k_rows": round(found, 2),
        "mib_at_11m_rows": round(samples[-1][1] + found * (LAION - rows) / 100_000),
        "shards": len(data.manifest["shards"]),
        "open_seconds": round(opened, 2),
        "open_and_100_batches_mib": round(resident() - before, 1),
    }


def measure_metadata(room: Path, rows: int) -> dict[str, object]:
    """Reading a metadata.jsonl of `rows` lines whose pictures are not there."""
    folder = room / "pictures"
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as stream:
        for row in range(rows):
            stream.write(json.dumps({"file_name": f"{row:09d}.jpg", "text": f"picture number {row} of many"}) + "\n")
    before = resident()
    source = ImageFolderSource(folder, resolution=8)
    samples = []
    for number, _item in enumerate(source.items(), start=1):
        if number % (rows // SAMPLES) == 0:
            samples.append((number, resident()))
    return {
        "lines": source.total(),
        "mib": round(resident() - before, 1),
        "mib_per_100k_lines": round(slope(samples), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {"prepare": measure_prepare(Path(folder), asked.rows)}
        found["metadata"] = measure_metadata(Path(folder), asked.rows)
    print(json.dumps(found, indent=None if asked.json else 2))


if __name__ == "__main__":
    main()
