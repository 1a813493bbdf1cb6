"""Training XL/2 on one GPU: images a second, MFU and memory at each setting, and whether a 24 GB card can do it.

    python benchmarks/gpu.py                          # XL/2 on the CUDA card, results into docs/results/
    python benchmarks/gpu.py --device cpu --tiny      # the same code on a small network, nothing written

MFU is the floating-point operations of the step's matrix products (counted by torch, recomputation not among them)
over the time it took, as a share of the rate that this card reaches in a large bf16 matrix product, measured in the
same run. Peak memory is torch's own count of what was allocated at once. Settings that do not fit are said to.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paris_swarm.expert.devices import pick_device, pick_precision
from paris_swarm.expert.provenance import chip
from paris_swarm.expert.recipe import SIZES, ModelConfig, named_recipe
from paris_swarm.expert.rows import Rows
from paris_swarm.expert.step import StepSettings, TrainState, count_flops
from paris_swarm.expert.task import ExpertTask
from paris_swarm.expert.verify import probe_from_rows

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
GIB = 1 << 30
SMALL_CARD = 24
"""GiB of the card that must be able to train XL/2."""
TINY = ModelConfig(4, 8, 2, 64, 2, 2, 4.0, 32, 16, pooled_text=False)


@dataclass(frozen=True)
class Setting:
    """Rows a batch and how its step is taken."""

    batch: int
    settings: StepSettings

    @property
    def name(self) -> str:
        parts = [f"batch {self.batch}"]
        if self.settings.micro_batch:
            parts.append(f"micro-batch {self.settings.micro_batch}")
        parts += [word for word in ("recompute", "compiled") if getattr(self.settings, word)]
        return ", ".join(parts)


class LatentRows:
    """Made latents and captions in memory, as many as a few batches need."""

    def __init__(self, model: ModelConfig, count: int) -> None:
        draw = np.random.default_rng(0)
        self.count = count
        shape = (count, model.resolution, model.resolution, model.channels)
        self._pixels = draw.integers(0, 256, shape, dtype=np.uint8)
        self._states = draw.standard_normal((count, model.text_tokens, model.text_dim)).astype(np.float16)
        self._lengths = np.full(count, model.text_tokens, dtype=np.int16)  # CLIP's states are used padded
        self.null_states = np.zeros((model.text_tokens, model.text_dim), dtype=np.float16)
        self.manifest: dict[str, Any] = {"null_length": model.text_tokens}
        self.digests = draw.integers(0, 256, (count, 16), dtype=np.uint8)

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        return self._pixels[rows]

    def states(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._states[rows], self._lengths[rows]


def wait_for(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, precision: torch.dtype, size: int) -> float:
    """Operations a second of square matrix products of `size`: the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=precision) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        wait_for(device)
        start = time.perf_counter()
        a @ b
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure(
    setting: Setting, model: ModelConfig, device: torch.device, precision: torch.dtype, steps: int, rate: float
) -> dict[str, Any]:
    """One setting's figures, or why it does not run."""
    recipe = replace(named_recipe("XL/2"), model=model).with_train(batch=setting.batch)
    data = LatentRows(model, 2 * setting.batch)
    task = ExpertTask(recipe, Rows(data, np.arange(data.count)), probe_from_rows(Rows(data, np.arange(2)), 0))
    row: dict[str, Any] = {"setting": setting.name, "batch": setting.batch}
    try:
        plain = replace(setting.settings, recompute=False, compiled=False, micro_batch=1)
        one = TrainState(
            ExpertTask(recipe.with_train(batch=1), Rows(data, np.arange(4)), task._probe), device, settings=plain
        )
        flops = count_flops(one, precision) * setting.batch
        del one
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        state = TrainState(task, device, settings=setting.settings)
        seconds = []
        for number in range(steps + 3):
            wait_for(device)
            start = time.perf_counter()
            loss = state.take_step(precision)
            wait_for(device)
            if number >= 3:
                seconds.append(time.perf_counter() - start)
        assert torch.isfinite(loss), "the loss is not finite"
    except torch.OutOfMemoryError:
        return {**row, "fits": False}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    middle = statistics.median(seconds)
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
    return {
        **row,
        "fits": True,
        "images_per_s": round(setting.batch / middle, 2),
        "seconds_a_step": round(middle, 4),
        "flops_a_step": flops,
        "mfu": round(flops / middle / rate, 4),
        "peak_gib": None if peak is None else round(peak, 2),
    }


def settings_of(tiny: bool) -> list[Setting]:
    """What is measured: growing batches, plain, recomputing and compiled; then what a 24 GB card can hold."""
    sizes = (4,) if tiny else (8, 16, 32, 64, 128, 256)
    plain = [Setting(batch, StepSettings()) for batch in sizes]
    again = [Setting(batch, StepSettings(recompute=True)) for batch in sizes]
    compiled = [] if tiny else [Setting(batch, StepSettings(compiled=True)) for batch in sizes]
    small = Setting(4, StepSettings(2, True)) if tiny else Setting(32, StepSettings(8, True))
    return [*plain, *again, *compiled, small]


def report(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The figures as a Markdown page."""
    lines = [
        f"# Training {facts['network']} on {facts['chip']}",
        "",
        f"{facts['date']}, torch {facts['torch']}, {facts['precision']}; `{facts['command']}`. "
        f"Measured matrix rate: {facts['matrix_rate'] / 1e12:.1f} TFLOP/s.",
        "",
        "| setting | images/s | s a step | MFU | peak GiB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if not row["fits"]:
            lines.append(f"| {row['setting']} | does not fit | | | |")
            continue
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        lines.append(
            f"| {row['setting']} | {row['images_per_s']} | {row['seconds_a_step']} "
            f"| {100 * row['mfu']:.1f} % | {peak} |"
        )
    fitting = [
        row for row in rows if row["fits"] and row["peak_gib"] is not None and row["peak_gib"] < SMALL_CARD - 1.5
    ]
    if fitting:
        best = max(fitting, key=lambda row: row["images_per_s"])
        lines += ["", f"A {SMALL_CARD} GB card: {best['setting']}, peak {best['peak_gib']} GiB."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small network, to see the code run; nothing is written")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    precision = torch.float32 if arguments.tiny else pick_precision("bf16", device)
    model = TINY if arguments.tiny else SIZES["XL/2"]
    rate = matrix_rate(device, precision, 256 if arguments.tiny else 8192)
    rows = []
    for setting in settings_of(arguments.tiny):
        rows.append(measure(setting, model, device, precision, arguments.steps, rate))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    facts = {
        "network": "a small network" if arguments.tiny else "XL/2",
        "chip": chip(device),
        "host": platform.platform(),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": str(torch.__version__),
        "precision": str(precision).removeprefix("torch."),
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "matrix_rate": rate,
    }
    page = report(rows, facts)
    if not arguments.tiny:
        name = f"gpu-{facts['date'][:7]}"
        (arguments.out / f"{name}.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
        (arguments.out / f"{name}.md").write_text(page)
    print(json.dumps({**facts, "rows": rows}) if arguments.json else page)


if __name__ == "__main__":
    main()
