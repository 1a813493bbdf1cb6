"""Images per second of one training step, ours against diffusers' PixArtTransformer2DModel, in one run.

    python benchmarks/train.py                                  # every cell that the hardware does natively
    python benchmarks/train.py --cell small/fp32/shipped        # one of them
    python benchmarks/train.py --json                           # {"vs_diffusers", "loader_share", "detail"}

A cell is SIZE/PRECISION/HOW. Sizes: small (d=384, depth 12, 64 tokens), large (d=768, depth 12, 256 tokens). HOW:
"eager" and "compiled" treat both sides alike; "shipped" is our trainer process as `join` starts it (its allocator
settings, flushed subnormals) against diffusers' documented step in a plain process.

One step on either side: forward, backward, gradient clipping, AdamW and EMA, batch 16, captions of 77 x 768. Ours is
`TrainState.take_step` on rows that are memory-mapped from disk, loader, noising and caption dropout included. Theirs
is diffusers' documented training step (torch.optim.AdamW, `diffusers.training_utils.EMAModel`, autocast for bf16) on a
batch that is already in memory. Each side has a process of its own; they take turns of a few steps, so a busy machine
slows both, and medians are compared. The first step of a turn does not count: a virtual machine that gives idle memory
back to its host makes the side that waited fault its own in again. `vs_diffusers` is the smallest ratio of the
"shipped" cells that ran (of all, where none of them did), `loader_share` the largest share of our steps that went into
fetching rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paris_swarm.expert.recipe import ModelConfig, Recipe, TrainConfig
from paris_swarm.expert.rows import Rows
from paris_swarm.expert.task import ExpertTask
from paris_swarm.expert.training import StepSettings, TrainState, pick_precision
from paris_swarm.expert.verify import probe_from_rows

BATCH = 16
TOKENS, WIDTH = 77, 768
ROWS = 5_000


@dataclass(frozen=True)
class Setting:
    """One network: width, depth, heads; resolution in latent cells (patch 2)."""

    name: str
    hidden: int
    depth: int
    heads: int
    resolution: int

    def model(self) -> ModelConfig:
        return ModelConfig(
            channels=3,
            resolution=self.resolution,
            patch=2,
            hidden=self.hidden,
            depth=self.depth,
            heads=self.heads,
            text_dim=WIDTH,
            text_tokens=TOKENS,
            pooled_text=False,
        )


SETTINGS = {
    "small": Setting("d=384, depth 12, 64 tokens", 384, 12, 6, 16),
    "large": Setting("d=768, depth 12, 256 tokens", 768, 12, 12, 32),
    "smoke": Setting("d=64, depth 2, 16 tokens", 64, 2, 2, 8),
}
HOWS = ("shipped", "eager", "compiled")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RowsOnDisk:
    """Rows written once and memory-mapped, more than `Rows` would hold in memory."""

    def __init__(self, folder: Path, resolution: int, count: int) -> None:
        draw = np.random.default_rng(0)
        self.count = count
        np.save(folder / "pixels.npy", draw.integers(0, 256, (count, resolution, resolution, 3), dtype=np.uint8))
        states = np.lib.format.open_memmap(folder / "states.npy", "w+", np.float16, (count, TOKENS, WIDTH))
        block = draw.standard_normal((256, TOKENS, WIDTH)).astype(np.float16)
        for start in range(0, count, len(block)):
            states[start : start + len(block)] = block[: min(len(block), count - start)]
        states.flush()
        self._pixels = np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False)
        self._states = np.load(folder / "states.npy", mmap_mode="r", allow_pickle=False)
        self._lengths = draw.integers(8, TOKENS, count).astype(np.int16)
        self._lengths[0] = TOKENS
        self.null_states = np.zeros((TOKENS, WIDTH), dtype=np.float16)
        self.manifest: dict[str, Any] = {"null_length": 2}
        self.digests = draw.integers(0, 256, (count, 16), dtype=np.uint8)

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._pixels[rows])

    def states(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self._states[rows]), self._lengths[rows]


class Ours:
    """The step that ships."""

    def __init__(self, setting: Setting, data: RowsOnDisk, precision: torch.dtype, compiled: bool) -> None:
        config = TrainConfig(steps=10_000, batch=BATCH, optimizer="adamw", lr=1e-4, t_sampling="uniform", ema=0.9999)
        probe = probe_from_rows(Rows(data, np.arange(4)), seed=0)
        task = ExpertTask(Recipe(setting.model(), config), Rows(data, np.arange(4, data.count)), probe)
        self.state = TrainState(task, torch.device("cpu"), settings=StepSettings(compiled=compiled))
        self.precision = precision
        self.loading = 0.0
        self.clock: Callable[[], float] = time.perf_counter
        fetch = task.batch

        def timed(step: int) -> Any:
            start = self.clock()
            batch = fetch(step)
            self.loading += self.clock() - start
            return batch

        task.batch = timed  # type: ignore[method-assign]

    def step(self) -> None:
        float(self.state.take_step(self.precision))


class Theirs:
    """diffusers' own network and documented training step."""

    def __init__(self, setting: Setting, precision: torch.dtype, compiled: bool) -> None:
        from diffusers import PixArtTransformer2DModel
        from diffusers.training_utils import EMAModel

        self.model = PixArtTransformer2DModel(
            num_attention_heads=setting.heads,
            attention_head_dim=setting.hidden // setting.heads,
            in_channels=3,
            out_channels=3,
            num_layers=setting.depth,
            cross_attention_dim=setting.hidden,
            sample_size=setting.resolution,
            patch_size=2,
            caption_channels=WIDTH,
            use_additional_conditions=False,
        )
        self.precision = precision
        self.ema = EMAModel(self.model.parameters(), decay=0.9999)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.network: Callable[..., Any] = torch.compile(self.model) if compiled else self.model
        draw = torch.Generator().manual_seed(0)
        side = setting.resolution
        self.x0 = torch.rand(BATCH, 3, side, side, generator=draw) * 2 - 1
        self.states = torch.randn(BATCH, TOKENS, WIDTH, generator=draw)
        self.mask = torch.arange(TOKENS)[None] < torch.randint(8, TOKENS, (BATCH, 1), generator=draw)
        self.no_size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}

    def step(self) -> None:
        noise = torch.randn_like(self.x0)
        t = torch.rand(BATCH)
        x = torch.lerp(self.x0, noise, t[:, None, None, None])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision is torch.bfloat16):
            said = self.network(
                x,
                encoder_hidden_states=self.states,
                timestep=t * 999.0,
                added_cond_kwargs=self.no_size,
                encoder_attention_mask=self.mask,
                return_dict=False,
            )[0]
            loss = torch.nn.functional.mse_loss(said.float(), noise - self.x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# a process a side
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What is compared."""

    size: str
    precision: str
    how: str

    @classmethod
    def read(cls, text: str) -> Cell:
        parts = text.split("/")
        if len(parts) != 3 or parts[0] not in SETTINGS or parts[1] not in PRECISIONS or parts[2] not in HOWS:
            raise argparse.ArgumentTypeError(f"{text!r} is not SIZE/PRECISION/HOW, such as small/fp32/shipped")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.size}/{self.precision}/{self.how}"


def worker(side: str, cell: Cell, threads: int, clock: Callable[[], float]) -> None:
    """One side: a step for every line on standard input, its seconds and those spent on rows as the answer."""
    torch.set_num_threads(threads)
    setting, precision, compiled = SETTINGS[cell.size], PRECISIONS[cell.precision], cell.how == "compiled"
    if cell.how == "shipped" and side == "ours":
        torch.set_flush_denormal(True)  # as cli/train_child.py does
    with tempfile.TemporaryDirectory(prefix="paris-train-") as folder:
        if side == "ours":
            data = RowsOnDisk(Path(folder), setting.resolution, ROWS if setting.hidden > 64 else 64)
            taken: Ours | Theirs = Ours(setting, data, precision, compiled)
            taken.clock = clock
        else:
            taken = Theirs(setting, precision, compiled)
        print(json.dumps({"ready": True}), flush=True)
        for _ in sys.stdin:
            loading = getattr(taken, "loading", 0.0)
            start = clock()
            taken.step()
            seconds = clock() - start
            print(json.dumps({"seconds": seconds, "loading": getattr(taken, "loading", 0.0) - loading}), flush=True)


@contextmanager
def side_process(side: str, cell: Cell, threads: int, cpu_seconds: bool) -> Iterator[Callable[[], dict[str, float]]]:
    """A worker; the function it gives takes one step."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if cell.how == "shipped" and side == "ours":
        from paris_swarm.cli.trainer import allocator_settings

        environment |= allocator_settings()
    command = [sys.executable, __file__, "--worker", side, "--cell", str(cell), "--threads", str(threads)]
    command += ["--cpu-seconds"] if cpu_seconds else []
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def answer() -> dict[str, float]:
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {side} ended with code {process.wait()}")
        said: dict[str, float] = json.loads(line)
        return said

    def step() -> dict[str, float]:
        stdin.write("step\n")
        stdin.flush()
        return answer()

    answer()
    try:
        yield step
    finally:
        stdin.close()
        process.wait()


def compare(cell: Cell, steps: int, turn: int, threads: int, cpu_seconds: bool) -> dict[str, Any]:
    """Median seconds a step of both sides, in turns of so many counted ``steps`` behind one that is not."""
    taken: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    with (
        side_process("ours", cell, threads, cpu_seconds) as ours,
        side_process("theirs", cell, threads, cpu_seconds) as theirs,
    ):
        sides = {"ours": ours, "theirs": theirs}
        for step in sides.values():
            step()  # allocates, and compiles where it is asked to
        for begun in range(0, steps, turn):
            for side, step in sides.items():
                step()
                taken[side] += [step() for _ in range(min(turn, steps - begun))]
    own, other = ([one["seconds"] for one in taken[side]] for side in sides)
    return {
        "cell": str(cell),
        "setting": SETTINGS[cell.size].name,
        "ours_images_per_s": round(BATCH / statistics.median(own), 3),
        "theirs_images_per_s": round(BATCH / statistics.median(other), 3),
        "ratio": round(statistics.median(other) / statistics.median(own), 3),
        "ratios": [round(b / a, 3) for a, b in zip(own, other, strict=True)],
        "loader_share": round(sum(one["loading"] for one in taken["ours"]) / sum(own), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", action="append", type=Cell.read, help="SIZE/PRECISION/HOW; may be given again")
    parser.add_argument("--steps", type=int, default=5, help="counted steps a side")
    parser.add_argument("--turn", type=int, default=3, help="counted steps of one side before the other's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="CPU seconds instead of seconds: for a busy machine, with --threads 1",
    )
    parser.add_argument("--worker", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.worker:
        clock = time.process_time if arguments.cpu_seconds else time.perf_counter
        worker(arguments.worker, arguments.cell[0], arguments.threads, clock)
        return
    native = pick_precision("auto", torch.device("cpu")) is torch.bfloat16
    precisions = ("fp32", "bf16") if native else ("fp32",)
    cells = arguments.cell or [
        Cell(size, precision, how) for how in HOWS for size in ("small", "large") for precision in precisions
    ]
    rows: list[dict[str, Any]] = []
    empty: dict[str, str] = {}
    for cell in cells:
        try:
            row = compare(cell, arguments.steps, arguments.turn, arguments.threads, arguments.cpu_seconds)
        except (RuntimeError, BrokenPipeError) as error:  # a side died: no compiler, no memory; its words are above
            empty[str(cell)] = str(error)
            print(f"{cell!s:22} no figure: {error}", file=sys.stderr, flush=True)
            continue
        rows.append(row)
        print(
            f"{row['cell']:22} ours {row['ours_images_per_s']:8.2f} img/s  "
            f"diffusers {row['theirs_images_per_s']:8.2f} img/s  "
            f"ratio {row['ratio']:.2f}  loader {100 * row['loader_share']:.2f} %",
            file=sys.stderr if arguments.json else sys.stdout,
            flush=True,
        )
    if not rows:
        sys.exit("no cell has a figure")
    judged = [row for row in rows if row["cell"].endswith("/shipped")] or rows
    answer = {
        "vs_diffusers": min(row["ratio"] for row in judged),
        "loader_share": max(row["loader_share"] for row in rows),
        "detail": rows,
        "empty": empty,
    }
    if arguments.json:
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
