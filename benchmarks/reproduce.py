"""The papers' claim on data that anyone can draw: K experts and a router against one dense model of the same FLOPs.

    python benchmarks/reproduce.py OUT                          # scale "small": 90 minutes on two cores
    python benchmarks/reproduce.py OUT --rates                  # learning rates, the same on both sides, beforehand
    python benchmarks/reproduce.py OUT --budget-minutes 30      # as far as half an hour reaches; run again to go on
    python benchmarks/reproduce.py OUT --scale full --device cuda --workers 1
    python benchmarks/reproduce.py OUT --scale small --data DIR # rows of another prepared folder (examples/emoji.py)
    python benchmarks/reproduce.py OUT --report docs/results/reproduce-2026-11.md    # only write the tables

Everything lies in OUT: data, partitions, trained parts, pictures, and one JSON file a cell (cells/). What is there is
never done again; a worker that is killed loses at most the two minutes since its last checkpoint. Both sides have the
same network, schedule, EMA and optimiser; the same rates were tried on both (reproduce_grid.py has every value).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from reproduce_cells import OutOfTime, World, make_partitions, measure_floor, run_cell, train_part, write_json
from reproduce_grid import SCALES, Cell, Part, Scale, work

if TYPE_CHECKING:
    from paris_swarm.expert.data.shards import PreparedData

POLL_S = 1.0
FLOOR = "floor.json"
DATA = "data.json"
"""Where the rows lie and what they are: not among the settings, for a folder may move."""


def say(text: str) -> None:
    """One line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} [{os.getpid()}] {text}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# before the workers
# ---------------------------------------------------------------------------------------------------------------------


def settle(scale: Scale, out: Path, data: Path | None) -> Path:
    """The prepared folder, with partitions beside it; makes what is missing.

    Raises:
        ValueError: OUT holds results of other settings or of other data.
    """
    from paris_swarm.expert.data.prepare import prepare
    from paris_swarm.expert.data.shards import PreparedData

    folder = data if data is not None else out / "data"
    out.mkdir(parents=True, exist_ok=True)
    if data is None and not (folder / "manifest.json").is_file():
        say(f"preparing {scale.rows} pictures of {scale.resolution} px in {folder}")
        prepare(
            "dicebear",
            folder,
            resolution=scale.resolution,
            count=scale.rows,
            seed=scale.data_seed,
            families=scale.families,
            workers=os.cpu_count() or 1,
        )
    prepared = PreparedData.open(folder)
    if prepared.resolution != scale.resolution:
        raise ValueError(f"{folder} was prepared at {prepared.resolution} px, the scale needs {scale.resolution}")
    files = sorted((entry["name"], entry["digest"]) for entry in prepared.manifest["files"])
    settings = json.loads(json.dumps({"scale": asdict(scale), "data": files}))
    path = out / "settings.json"
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise ValueError(f"{out} holds results of other settings or of other data: choose another folder")
    if not path.is_file():
        say("dividing the rows")
        make_partitions(prepared, scale, out)
        write_json(path, settings)
    write_json(out / DATA, {"folder": str(folder.resolve()), "count": prepared.count, "source": source_name(prepared)})
    return folder


def source_name(prepared: PreparedData) -> str:
    """What people call the data: the source's kind, and the folder's name where that is all there is."""
    kind = str(prepared.manifest["source"]["kind"])
    return "DiceBear" if kind == "dicebear" else f"{kind} ({prepared.folder.resolve().name})"


# ---------------------------------------------------------------------------------------------------------------------
# workers
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def own(out: Path, name: str) -> Iterator[bool]:
    """Whether this process alone may work on `name`; the kernel gives it free again when the process ends."""
    path = out / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def lock_name(item: Part | Cell) -> str:
    return item.name if isinstance(item, Cell) else f"{item.arm.name}-{item.slot}-seed-{item.seed}"


def run_worker(scale: Scale, data: Path, out: Path, device: str, deadline: float) -> None:
    """Takes what can be done and nobody else does, until all is done or the time is up."""
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    torch.set_num_threads(1)
    world = World(scale, data, out, say)

    def stop() -> bool:
        return ended or time.monotonic() >= deadline

    while not stop():
        left = [item for item in work(scale) if not item.done(out).exists()]
        if not left:
            return
        try:
            if not any(attempt(world, item, device, stop) for item in left):
                time.sleep(POLL_S)  # what is left waits for what other workers have in hand
        except OutOfTime:
            return


def attempt(world: World, item: Part | Cell, device: str, stop: object) -> bool:
    """Does `item` if everything it needs is there and no other worker has it; whether it was done here."""
    out = world.out
    if isinstance(item, Cell) and any(not part.done(out).exists() for part in item.needs()):
        return False
    with own(out, lock_name(item)) as mine:
        if not mine or item.done(out).exists():
            return False
        if isinstance(item, Part):
            train_part(world, item, device=device, stop=stop)  # type: ignore[arg-type]
        else:
            with own(out, FLOOR):
                if not (out / FLOOR).is_file():
                    write_json(out / FLOOR, measure_floor(world))
            run_cell(world, item, device=device, stop=stop)  # type: ignore[arg-type]
        return True


def run(scale: Scale, data: Path, out: Path, *, workers: int, device: str, budget_s: float | None) -> bool:
    """Runs the workers; whether everything is done.

    Raises:
        RuntimeError: a worker failed; its own error stands above.
    """
    deadline = float("inf") if budget_s is None else time.monotonic() + budget_s
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=run_worker, args=(scale, data, out, device, deadline)) for _ in range(workers)]
    for process in running:
        process.start()
    forward = lambda *_: [process.terminate() for process in running]  # noqa: E731 (SIGTERM: they end at a checkpoint)
    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the workers answer it
    for process in running:
        process.join()
    if any(process.exitcode for process in running):
        raise RuntimeError(f"a worker failed: exit codes {[process.exitcode for process in running]}")
    everything = list(work(scale))
    done = sum(item.done(out).exists() for item in everything)
    say(f"{done} of {len(everything)} parts and cells are done" + ("" if done == len(everything) else "; run again"))
    return done == len(everything)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of everything that is made")
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    parser.add_argument("--data", type=Path, help="prepared folder to use (default: DiceBear, prepared in OUT)")
    parser.add_argument("--budget-minutes", type=float, help="stop at a checkpoint after this long")
    parser.add_argument("--workers", type=int, default=2, help="processes, one torch thread each (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    parser.add_argument("--rates", action="store_true", help="only try the learning rates, the same on both sides")
    parser.add_argument("--report", type=Path, help="write the tables of what is done here, and train nothing")
    arguments = parser.parse_args()
    scale = SCALES[arguments.scale]
    if arguments.report:
        from reproduce_report import write_report  # beside this file

        write_report(scale, arguments.out, arguments.report)
        return 0
    os.nice(10)
    begun = time.monotonic()
    folder = settle(scale, arguments.out, arguments.data)
    if arguments.rates:
        from reproduce_rates import run as run_rates  # beside this file

        run_rates(scale, folder, arguments.out, workers=arguments.workers, own=own, say=say)
        return 0
    budget = None if arguments.budget_minutes is None else arguments.budget_minutes * 60 - (time.monotonic() - begun)
    run(scale, folder, arguments.out, workers=arguments.workers, device=arguments.device, budget_s=budget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
