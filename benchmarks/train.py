"""Images per second of one training step, ours against diffusers' PixArtTransformer2DModel, in one run.

    python benchmarks/train.py                    # both sizes, fp32 and (where the hardware multiplies it) bf16, eager
    python benchmarks/train.py --compile          # compiled against compiled as well
    python benchmarks/train.py --json             # {"vs_diffusers", "loader_share", "detail"}

One step on either side: forward, backward, gradient clipping, AdamW and EMA, batch 16, captions of 77 x 768. Ours is
what ships: `TrainState.take_step` on rows that are memory-mapped from disk, loader, noising and caption dropout
included. Theirs is diffusers' documented training step (torch.optim.AdamW, `diffusers.training_utils.EMAModel`,
autocast for bf16) on a batch that is already in memory. Steps alternate, medians are compared: a busy machine slows
both sides. `vs_diffusers` is the smallest ratio of all settings that ran, `loader_share` the largest share of our steps
that went into fetching rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paris_swarm.expert.recipe import ModelConfig, Recipe, TrainConfig
from paris_swarm.expert.rows import Rows
from paris_swarm.expert.task import ExpertTask
from paris_swarm.expert.training import TrainState, pick_precision
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
        self.state = TrainState(task, torch.device("cpu"))
        self.precision = precision
        if compiled:
            self.state.model.compile()
        self.loading = 0.0
        fetch = task.batch

        def timed(step: int) -> Any:
            start = time.perf_counter()
            batch = fetch(step)
            self.loading += time.perf_counter() - start
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


def compare(setting: Setting, precision: torch.dtype, compiled: bool, steps: int) -> dict[str, Any]:
    """Median seconds a step of both sides, steps alternating after two that are not counted."""
    with tempfile.TemporaryDirectory(prefix="paris-train-") as folder:
        data = RowsOnDisk(Path(folder), setting.resolution, ROWS if setting.hidden > 64 else 64)
        sides = SimpleNamespace(
            ours=Ours(setting, data, precision, compiled), theirs=Theirs(setting, precision, compiled)
        )
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(steps + 2):
            if number == 2:
                sides.ours.loading = 0.0
            for name in ("ours", "theirs"):
                start = time.perf_counter()
                getattr(sides, name).step()
                if number >= 2:
                    seconds[name].append(time.perf_counter() - start)
        ours, theirs = (statistics.median(seconds[name]) for name in ("ours", "theirs"))
        return {
            "setting": setting.name,
            "precision": str(precision).removeprefix("torch."),
            "compiled": compiled,
            "ours_images_per_s": round(BATCH / ours, 3),
            "theirs_images_per_s": round(BATCH / theirs, 3),
            "ratio": round(theirs / ours, 3),
            "loader_share": round(sides.ours.loading / sum(seconds["ours"]), 5),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=sorted(SETTINGS), default=["small", "large"])
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=None, help="default: what is native"
    )
    parser.add_argument("--compile", action="store_true", help="compiled against compiled beside eager against eager")
    parser.add_argument("--steps", type=int, default=5, help="counted steps a side")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    native = pick_precision("auto", torch.device("cpu")) is torch.bfloat16
    precisions = arguments.precisions or (["fp32", "bf16"] if native else ["fp32"])
    rows: list[dict[str, Any]] = []
    for name in arguments.settings:
        for precision in precisions:
            for compiled in (False, True) if arguments.compile else (False,):
                dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
                row = compare(SETTINGS[name], dtype, compiled, arguments.steps)
                rows.append(row)
                if not arguments.json:
                    print(
                        f"{row['setting']:30} {row['precision']:9} {'compiled' if compiled else 'eager':9} "
                        f"ours {row['ours_images_per_s']:8.2f} img/s  "
                        f"diffusers {row['theirs_images_per_s']:8.2f} img/s  "
                        f"ratio {row['ratio']:.2f}  loader {100 * row['loader_share']:.2f} %",
                        flush=True,
                    )
    answer = {
        "vs_diffusers": min(row["ratio"] for row in rows),
        "loader_share": max(row["loader_share"] for row in rows),
        "detail": rows,
    }
    if arguments.json:
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
