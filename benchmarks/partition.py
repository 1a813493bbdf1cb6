"""Rows per second and peak memory of the partition, ours against scikit-learn and faiss, on made features, in one run.

    python benchmarks/partition.py                 # 1,000,000 x 1024 numbers: 4 GB on disk, in a temporary folder
    python benchmarks/partition.py --rows 100000   # smaller
    python benchmarks/partition.py --json

Every contender divides the same memory-mapped features into 8 clusters and labels every row, in a process of its own:

    ours             router.partition: 1024 fine centroids, merged to 8 by Ward's criterion
    minibatch        sklearn MiniBatchKMeans(1024), then the same merge and labelling
    kmeans-flat      sklearn KMeans(8) on all rows: one stage, what public reproductions do
    faiss            faiss.Kmeans(1024, spherical, 25 rounds, its default of 256 rows a centroid), same merge and labels
                     (left out where faiss is not installed: pip install 'paris-swarm[bench]')

Seconds are of fitting and labelling; memory is the peak of what the process allocated (RssAnon, without the mapped
file) above what it had before; cosine is the mean cosine of a row with its centroid, nmi the agreement with the groups
that the features were made from.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from paris_swarm.router.partition import merge_fine, nearest, partition, unit_pieces, unit_rows

CLUSTERS = 8
FINE = 1024
SEED = 0
GROUPS, SUBGROUPS = 8, 32
BLOCK = 16384


# ---------------------------------------------------------------------------------------------------------------------
# the features
# ---------------------------------------------------------------------------------------------------------------------


def make_features(folder: Path, rows: int, width: int) -> None:
    """features.npy float32 [rows, width]: 8 groups of uneven size, each of 32 subgroups, and noise; groups.npy."""
    dice = np.random.default_rng(SEED)
    shares = np.linspace(3, 1, GROUPS)
    groups = dice.choice(GROUPS, rows, p=shares / shares.sum())
    subgroups = dice.integers(0, SUBGROUPS, rows)
    top = dice.standard_normal((GROUPS, width), dtype=np.float32) / np.sqrt(width)
    below = 0.8 * dice.standard_normal((GROUPS, SUBGROUPS, width), dtype=np.float32) / np.sqrt(width)
    out = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (rows, width))
    for start in range(0, rows, BLOCK):
        here = slice(start, min(start + BLOCK, rows))
        noise = 1.2 * dice.standard_normal((here.stop - start, width), dtype=np.float32) / np.sqrt(width)
        out[here] = 20 * (top[groups[here]] + below[groups[here], subgroups[here]] + noise)
    out.flush()
    np.save(folder / "groups.npy", groups)


# ---------------------------------------------------------------------------------------------------------------------
# the contenders: features -> labels and the centroids they are nearest to
# ---------------------------------------------------------------------------------------------------------------------


def ours(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = partition(features, CLUSTERS, seed=SEED)
    return found.labels, found.centroids


def minibatch(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(_fine(features), random_state=SEED, n_init=1, compute_labels=False).fit(features)
    return _merged(features, unit_rows(model.cluster_centers_))


def kmeans_flat(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.cluster import KMeans

    model = KMeans(CLUSTERS, random_state=SEED, n_init=1, max_iter=25).fit(features)
    return model.labels_.astype(np.int64), unit_rows(model.cluster_centers_)


def faiss_two_stage(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    fine = _fine(features)
    size = min(len(features), 256 * fine)
    rows = np.sort(np.random.default_rng(SEED).permutation(len(features))[:size])
    sample = unit_rows(features[rows])
    model = faiss.Kmeans(features.shape[1], fine, niter=25, spherical=True, seed=SEED)
    model.train(sample)
    return _merged(features, np.asarray(model.centroids))


def _fine(features: np.ndarray) -> int:
    return min(FINE, max(8 * CLUSTERS, len(features) // 64))


def _merged(features: np.ndarray, fine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sample = features[:: max(1, len(features) // (128 * len(fine)))]
    sizes = np.bincount(nearest(sample, fine), minlength=len(fine))
    coarse = merge_fine(fine[sizes > 0], sizes[sizes > 0], CLUSTERS)
    return nearest(features, coarse), coarse


CONTENDERS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "ours": ours,
    "minibatch": minibatch,
    "kmeans-flat": kmeans_flat,
    "faiss": faiss_two_stage,
}


# ---------------------------------------------------------------------------------------------------------------------
# measuring
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Yields a function: MiB of anonymous memory at the peak, above those at the beginning."""
    before, peak, ended = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: (max(peak[0], _anonymous()) - before) / 1024
    finally:
        ended.set()
        watcher.join()


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise RuntimeError("this kernel does not tell RssAnon")


def measure(name: str, folder: Path) -> dict[str, Any]:
    """What one contender did, in this process."""
    from sklearn.metrics import normalized_mutual_info_score

    features = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
    with peak_memory() as peak:
        start, cpu = time.perf_counter(), time.process_time()
        labels, centroids = CONTENDERS[name](features)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        memory = peak()
    cosines = 0.0
    for first, piece in unit_pieces(features):
        own = centroids[labels[first : first + len(piece)]]
        cosines += float(np.einsum("bf,bf->b", piece, own).sum(dtype=np.float64))
    groups = np.load(folder / "groups.npy", allow_pickle=False)
    return {
        "rows_per_s": round(len(features) / seconds, 1),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_mib": round(memory, 1),
        "cosine": round(cosines / len(features), 5),
        "nmi": round(float(normalized_mutual_info_score(groups, labels)), 4),
        "largest_share": round(float(np.bincount(labels).max() / len(labels)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--only", choices=list(CONTENDERS), action="append", help="may be given several times")
    parser.add_argument("--folder", type=Path, help="where the features go (default: a temporary folder, removed)")
    parser.add_argument("--limit", type=float, help="seconds after which a contender is stopped")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.folder)))
        return
    names = options.only or list(CONTENDERS)
    absent = [name for name in names if name == "faiss" and importlib.util.find_spec("faiss") is None]
    found: dict[str, Any] = {"rows": options.rows, "width": options.width, "clusters": CLUSTERS, "left_out": absent}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="partition-") as place:
        folder = Path(place)
        make_features(folder, options.rows, options.width)
        for name in (name for name in names if name not in absent):
            command = [sys.executable, __file__, "--one", name, "--folder", str(folder)]
            try:
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=options.limit)
                found[name] = json.loads(done.stdout)
            except subprocess.TimeoutExpired:
                found[name] = {"seconds_over": options.limit}
            if not options.json:
                print(f"{name:12} " + "  ".join(f"{key} {value}" for key, value in found[name].items()), flush=True)
    if options.json:
        print(json.dumps(found))
    elif absent:
        print("faiss is not installed: left out (pip install 'paris-swarm[bench]')")


if __name__ == "__main__":
    main()
