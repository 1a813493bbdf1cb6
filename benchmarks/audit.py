"""How far are forged checkpoints from an honest replay, and how far are honest ones on other hardware?

    nice -n 10 python benchmarks/audit.py DATA --json > audit.json
    nice -n 10 python benchmarks/audit.py DATA --out docs/results --stem audit-2026-11

DATA is a folder written by `paris-swarm prepare dicebear` (1,024 pictures of 24 pixels do). The demo's recipe on the
rows of one family: a parent at step 60 and 24 steps from there, trained honestly, on stand-ins for other hardware, and
forged in every way that an audit must tell apart. About four CPU minutes, one thread. `--json` prints every figure;
`--out` writes STEM.json and STEM.svg.

Other hardware is this processor with other kernels: torch's scalar ones with MKL's SSE ones, and MKL's most compatible.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from paris_swarm.expert.audit import MARGIN, Comparison, compare, write_start
from paris_swarm.expert.checkpoint import WEIGHT_FILES
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.provenance import environment
from paris_swarm.expert.recipe import named_recipe
from paris_swarm.expert.rows import Rows, RowSource, select_rows
from paris_swarm.expert.task import ExpertTask
from paris_swarm.expert.training import TrainJob, train
from paris_swarm.expert.verify import probe_from_rows

PARENT, STEPS, LOOKS = 60, 24, (6, 12, 18, 24)
TUNED = 12
"""Steps after which the forger trains five on the probe rows."""
SHORT = 6
"""Steps of the bf16 runs, which a CPU emulates slowly."""
HELD_OUT = 32
NOISE = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
"""Added to each tensor of an honest checkpoint, in units of the tensor's standard deviation."""
OTHER_KERNELS = {
    "SSE kernels": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
}


# ---- the task -------------------------------------------------------------------------------------------------------


class Changed:
    """Prepared data with pixels or captions of some rows taken from other rows: `RowSource`."""

    def __init__(
        self, data: PreparedData, *, pixels: NDArray[np.int64] | None, captions: NDArray[np.int64] | None
    ) -> None:
        self._data, self._pixels, self._captions = data, pixels, captions
        self.count, self.null_states, self.manifest, self.digests = (
            data.count, data.null_states, data.manifest, data.digests,
        )  # fmt: skip

    def pixels(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self._data.pixels(rows if self._pixels is None else self._pixels[rows])

    def states(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float16], NDArray[np.int16]]:
        return self._data.states(rows if self._captions is None else self._captions[rows])


@dataclass(frozen=True)
class World:
    """The data, and which family is the cluster."""

    data: PreparedData
    families: NDArray[np.str_]
    own: str

    def rows(self, family: str) -> NDArray[np.int64]:
        labels = (self.families == family).astype(np.int64)
        return select_rows(self.data, labels, 1)

    def task(
        self, *, source: RowSource | None = None, rows: NDArray[np.int64] | None = None, **changes: Any
    ) -> ExpertTask:
        text = self.data.manifest["text"]
        recipe = named_recipe("tiny").with_data(
            channels=3, resolution=self.data.resolution, text_dim=text["dim"], text_tokens=text["tokens"]
        )
        own = self.rows(self.own)
        probe = probe_from_rows(Rows(self.data, own[-HELD_OUT:]), seed=1)
        chosen = own[:-HELD_OUT] if rows is None else rows
        return ExpertTask(recipe.with_train(**changes), Rows(source or self.data, chosen), probe)


def open_world(folder: Path) -> World:
    data = PreparedData.open(folder)
    families = np.asarray([str(caption["family"]) for caption in data.captions()])
    return World(data, families, sorted(set(families.tolist()))[0])


def go(work: Path, task: ExpertTask, start: Path | None, until: int, precision: str = "fp32", threads: int = 1) -> None:
    """Trains to `until`, with a checkpoint every 6 steps, all kept."""
    torch.set_flush_denormal(True)  # as the trainer process does
    job = TrainJob(
        task, work, resume=start, until=until, checkpoint_every_steps=LOOKS[0], keep=99, threads=threads,
        precision=precision, report_every_s=1e9, device="cpu",
    )  # fmt: skip
    for _ in train(job):
        pass


def at(work: Path, steps: int) -> Path:
    return work / "checkpoints" / f"step-{PARENT + steps:08d}"


# ---- forging --------------------------------------------------------------------------------------------------------


def forged_runs(world: World, folder: Path, start: Path) -> dict[str, Path]:
    """Every forgery that takes training: name -> published checkpoint folder."""
    own = world.rows(world.own)[:-HELD_OUT]
    dice = np.random.default_rng(3)
    other_family = next(name for name in sorted(set(world.families.tolist())) if name != world.own)
    foreign = world.rows(other_family)
    swapped = np.arange(world.data.count)
    few = dice.choice(own, max(1, round(len(own) / 100)), replace=False)
    swapped[few] = dice.choice(foreign, len(few), replace=False)
    shuffled = np.arange(world.data.count)
    shuffled[own] = dice.permutation(own)
    tasks = {
        "another cluster's rows": world.task(rows=foreign),
        "shuffled captions": world.task(source=Changed(world.data, pixels=None, captions=shuffled)),
        "1 % of rows swapped": world.task(source=Changed(world.data, pixels=swapped, captions=swapped)),
        "another seed": world.task(seed=1),
        "learning rates x 1.01": world.task(
            lr=world.task().recipe.train.lr * 1.01, matrix_lr=world.task().recipe.train.matrix_lr * 1.01
        ),
    }
    found: dict[str, Path] = {}
    for name, task in tasks.items():
        begun = folder / f"start {name}"
        write_start(begun, task, PARENT, start)
        go(folder / name, task, begun, PARENT + STEPS)
        found[name] = at(folder / name, STEPS)
    for name, skipped in (("1 step of 24 skipped", 1), ("3 steps of 24 skipped", 3)):
        go(folder / name, world.task(), start, PARENT + STEPS - skipped)
        found[name] = at(folder / name, STEPS - skipped)
    held_out = world.task(rows=world.rows(world.own)[-HELD_OUT:])
    begun = folder / "start probe"
    write_start(begun, held_out, PARENT + TUNED, at(folder / "1 step of 24 skipped", TUNED))
    go(folder / "probe", held_out, begun, PARENT + TUNED + 5)
    tuned = folder / "tuned start"
    write_start(tuned, world.task(), PARENT + TUNED + 5, at(folder / "probe", TUNED + 5))
    go(folder / "tuned", world.task(), tuned, PARENT + STEPS)
    found["5 steps on the probe rows"] = at(folder / "tuned", STEPS)
    return found


def with_noise(folder: Path, honest: Path, scale: float) -> Path:
    """A copy of an honest checkpoint whose every tensor got noise of `scale` standard deviations."""
    forged = folder / f"noise {scale:g}"
    forged.mkdir()
    draw = torch.Generator().manual_seed(5)
    for name in WEIGHT_FILES:
        tensors = load_file(honest / name)
        for tensor in tensors.values():
            spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
            tensor += scale * spread * torch.randn(tensor.shape, generator=draw)
        save_file(tensors, forged / name)
    return forged


# ---- figures --------------------------------------------------------------------------------------------------------


def figures(found: Comparison) -> dict[str, Any]:
    """What the tables show of one comparison."""
    worst = [file.worst for file in found.files]
    return {
        "identical": found.identical,
        **{file.name.partition(".")[0]: file.relative for file in found.files},
        "noise": {file.name.partition(".")[0]: file.relative_noise for file in found.files},
        "times_noise": max(file.distance / file.noise for file in found.files if file.noise),
        "worst": max((item for item in worst if item is not None), default=None),
        "same hardware": found.verdict(must_be_identical=True),
        "other hardware": found.verdict(must_be_identical=False),
    }


def measure(data: Path, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    begun = time.process_time()
    world = open_world(data)
    say("parent")
    go(folder / "parent", world.task(), None, PARENT)
    start = folder / "start"
    write_start(start, world.task(), PARENT, at(folder / "parent", 0))

    def run(name: str, precision: str = "fp32", steps: int = STEPS, threads: int = 1) -> Path:
        say(name)
        go(folder / name, world.task(), start, PARENT + steps, precision, threads)
        return folder / name

    def elsewhere(name: str, precision: str = "fp32", steps: int = STEPS) -> Path:
        """The same in a process that uses other kernels."""
        work = folder / f"{name} {precision}"
        say(work.name)
        arguments = ["--one", str(work), str(start), precision, str(PARENT + steps)]
        subprocess.run(
            [sys.executable, __file__, str(data), *arguments], check=True, env={**os.environ, **OTHER_KERNELS[name]}
        )
        return work

    published, again, exact = run("published"), run("again"), run("float64", "fp64")
    honest = {"again": again, "2 threads": run("2 threads", threads=2)}
    honest |= {name: elsewhere(name) for name in OTHER_KERNELS}
    growth = {
        steps: figures(compare(start, at(honest["SSE kernels"], steps), at(published, steps), at(exact, steps)))
        for steps in LOOKS
    }

    def judged(path: Path) -> dict[str, Any]:
        return figures(compare(start, path, at(again, STEPS), at(exact, STEPS)))

    half, half_sse = run("bf16", "bf16", SHORT), elsewhere("SSE kernels", "bf16", SHORT)
    result: dict[str, Any] = {
        "environment": environment(torch.device("cpu"), torch.float32).model_dump(),
        "parent_step": PARENT,
        "steps": STEPS,
        "rows": len(world.rows(world.own)) - HELD_OUT,
        "margin": MARGIN,
        "honest": {name: judged(at(work, STEPS)) for name, work in honest.items()},
        "growth": growth,
        "bf16": {
            "honest, SSE kernels": figures(compare(start, at(half_sse, SHORT), at(half, SHORT), at(published, SHORT))),
            "claimed, trained in fp32": figures(
                compare(start, at(published, SHORT), at(half, SHORT), at(published, SHORT))
            ),
            "fp32 claimed, trained in bf16": figures(
                compare(start, at(half, SHORT), at(again, SHORT), at(exact, SHORT))
            ),
        },
    }
    say("forgeries")
    forged = {"the parent again": start, **forged_runs(world, folder, start)}
    result["forged"] = {name: judged(path) for name, path in forged.items()}
    result["noise"] = {f"{scale:g}": judged(with_noise(folder, at(published, STEPS), scale)) for scale in NOISE}
    result["cpu_seconds"] = round(time.process_time() - begun + children_seconds(), 1)
    return result


def children_seconds() -> float:
    spent = os.times()
    return spent.children_user + spent.children_system


# ---- the plot -------------------------------------------------------------------------------------------------------


def plot(result: dict[str, Any]) -> str:
    """An SVG: the model's distance over the way trained, on a log scale; the band is what rounding explains."""
    bars = [(name, "honest", one) for name, one in result["honest"].items()]
    bars += [(name, "forged", one) for name, one in result["forged"].items()]
    bars += [(f"noise of {scale} std", "forged", one) for scale, one in result["noise"].items()]
    left, width, height, low, high = 190, 520, 20, -9.0, 1.0

    def x(value: float) -> float:
        return left + width * (min(max(np.log10(max(value, 1e-30)), low), high) - low) / (high - low)

    noise = result["honest"]["SSE kernels"]["noise"]["model"]
    total = height * len(bars) + 60
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" height="{total}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{left + width + 30}" height="{total}" fill="white"/>',
        f'<rect x="{left}" y="20" width="{x(MARGIN * noise) - left:.1f}" height="{height * len(bars)}" '
        'fill="#dfe9df"/>',
        f'<text x="{x(MARGIN * noise) - 4:.1f}" y="14" text-anchor="end" fill="#446644">explained by rounding</text>',
        f'<line x1="{x(noise):.1f}" x2="{x(noise):.1f}" y1="20" y2="{20 + height * len(bars)}" stroke="#446644" '
        'stroke-dasharray="3 3"/>',
    ]
    for power in range(int(low), int(high) + 1):
        place = x(10.0**power)
        out.append(f'<line x1="{place:.1f}" x2="{place:.1f}" y1="20" y2="{total - 36}" stroke="#eeeeee"/>')
        out.append(f'<text x="{place:.1f}" y="{total - 22}" text-anchor="middle">1e{power}</text>')
    for index, (name, kind, one) in enumerate(bars):
        y = 20 + height * index + height / 2
        colour = "#2a6f97" if kind == "honest" else "#b23a48"
        out.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
        if one["identical"]:
            out.append(f'<text x="{left + 4}" y="{y + 4:.1f}" fill="{colour}">identical</text>')
        else:
            out.append(f'<circle cx="{x(one["model"]):.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>')
    out.append(
        f'<text x="{left + width / 2}" y="{total - 6}" text-anchor="middle">'
        "|published - replayed| / |replayed - parent|, model.safetensors</text>"
    )
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of prepared data")
    parser.add_argument("--json", action="store_true", help="print the figures")
    parser.add_argument("--out", type=Path, help="folder for STEM.json and STEM.svg")
    parser.add_argument("--stem", default="audit")
    parser.add_argument("--one", nargs=4, metavar=("WORK", "START", "PRECISION", "UNTIL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        work, start, precision, until = arguments.one
        go(Path(work), open_world(arguments.data).task(), Path(start), int(until), precision)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="audit-"))
    try:
        result = measure(arguments.data, folder, lambda what: print(what, file=sys.stderr, flush=True))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = json.dumps(result, indent=2) + "\n"
    if arguments.out:
        (arguments.out / f"{arguments.stem}.json").write_text(text)
        (arguments.out / f"{arguments.stem}.svg").write_text(plot(result))
    if arguments.json or not arguments.out:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
