"""Train the expert of one cluster with a recipe and print what it costs and what its pictures are worth, as JSON.

    python benchmarks/recipe.py DATA --family landscape --cpu-seconds 120 --set model.hidden=128 --set train.batch=16

DATA is a folder written by `paris-swarm prepare dicebear`. Rows are taken by family, so that figures of different
recipes compare whatever the partition. The label is the oracle's: no router takes part. Runs resume: a work folder
(`--work`) that holds checkpoints of the same recipe is continued, and its CPU seconds are those of the last session.

Figures: cluster = share of drawn pictures nearest to their own family's mean feature; background = share that show the
background colour their caption names; each beside the same figure of the real held-out pictures. CPU seconds are those
of this process with one torch thread: half a core for six minutes is 180.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paris_swarm.expert.checkpoint import load_weights
from paris_swarm.expert.data.encoders import EfficientNetLite0
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.flow import from_pixels
from paris_swarm.expert.model import Expert, parameter_count, seeded
from paris_swarm.expert.recipe import Recipe, named_recipe
from paris_swarm.expert.rows import Rows
from paris_swarm.expert.task import ExpertTask
from paris_swarm.expert.training import CheckpointReport, DoneReport, StepReport, TrainJob, TrainState, train
from paris_swarm.expert.verify import assemblable_bar, probe_from_rows, resumable_bar
from paris_swarm.router.figures import background_accuracy, cluster_accuracy
from paris_swarm.router.samplers import euler, picture_noise

HELD_OUT = 64
"""The last rows of a family: the first half of them is the probe, all of them give prompts."""


def changed(recipe: Recipe, settings: list[str]) -> Recipe:
    """The recipe with `part.field=value` settings applied; raises ValueError for a field that does not exist."""
    for setting in settings:
        path, _, text = setting.partition("=")
        part, _, name = path.partition(".")
        if part not in ("model", "train") or name not in {item.name for item in fields(getattr(recipe, part))}:
            raise ValueError(f"--set {setting}: no such field; write model.NAME=VALUE or train.NAME=VALUE")
        kind = type(getattr(getattr(recipe, part), name))
        value: Any = text.lower() in ("1", "true", "yes") if kind is bool else kind(text)
        recipe = replace(recipe, **{part: replace(getattr(recipe, part), **{name: value})})
    return recipe


def seconds_per_step(task: ExpertTask, steps: int = 10) -> float:
    """Median CPU seconds of a step, optimiser and EMA included, after three steps of warming up."""
    state = TrainState(task, torch.device("cpu"))
    took = []
    for _ in range(steps + 3):
        begun = time.process_time()
        state.take_step(torch.float32)
        took.append(time.process_time() - begun)
    return float(np.median(took[3:]))


@torch.no_grad()
def drawn(model: Expert, rows: Rows, count: int, guidance: float, steps: int, seed: int) -> np.ndarray:
    """uint8 [count, H, W, 3]: pictures of the first `count` captions of `rows`."""
    batch = rows.batch(np.arange(count))
    null_states, null_mask = (
        part[:, : batch.states.shape[1]].expand(count, *([-1] * (part.ndim - 1))) for part in rows.null
    )
    states, mask = torch.cat([batch.states, null_states]), torch.cat([batch.mask, null_mask])

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        told, free = model(torch.cat([x, x]), torch.cat([t, t]), states, mask).chunk(2)
        return free + guidance * (told - free)

    return from_pixels(euler(velocity, picture_noise(seed, range(count), batch.x0.shape[1:]), steps)).numpy()


def save_sheet(path: Path, rows: list[np.ndarray], scale: int = 4) -> None:
    """A PNG with one row of pictures for each array, pixels drawn `scale` by `scale`."""
    from PIL import Image

    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST).save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of prepared data")
    parser.add_argument("--family", default="landscape", help="which rows (default: landscape)")
    parser.add_argument("--recipe", default="tiny", help="named recipe to start from (default: tiny)")
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE", help="change one field")
    parser.add_argument("--cpu-seconds", type=float, help="choose train.steps so that a run takes this long")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 2.5])
    parser.add_argument("--sampling-steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--work", type=Path, help="folder for checkpoints (default: a temporary one)")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet: real pictures, then one row a guidance")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    data = PreparedData.open(arguments.data)
    captions = data.captions()
    families = [str(caption["family"]) for caption in captions]
    names = sorted(set(families))
    if arguments.family not in names:
        parser.error(f"no family {arguments.family!r}; there are {', '.join(names)}")
    own = np.flatnonzero(np.asarray(families) == arguments.family)
    held = Rows(data, own[-HELD_OUT:])
    rows, probe = Rows(data, own[:-HELD_OUT]), probe_from_rows(Rows(data, own[-HELD_OUT : -HELD_OUT // 2]), seed=1)

    text = data.manifest["text"]
    recipe = changed(named_recipe(arguments.recipe), arguments.set).with_data(
        channels=3, resolution=data.resolution, text_dim=text["dim"], text_tokens=text["tokens"]
    )
    step_s = seconds_per_step(ExpertTask(recipe, rows, probe))
    if arguments.cpu_seconds:
        recipe = recipe.with_train(steps=max(1, round(arguments.cpu_seconds / step_s)))

    work = arguments.work or Path(tempfile.mkdtemp(prefix="recipe-"))
    loss, folder, probe_loss = float("nan"), work, float("nan")
    begun = time.process_time()
    job = TrainJob(ExpertTask(recipe, rows, probe), work, checkpoint_every_s=60.0, report_every_s=5.0, precision="fp32")
    for report in train(job):
        if isinstance(report, StepReport):
            loss = report.loss
            print(f"{report.step}/{report.steps} loss {loss:.4f} {report.images_per_s:.0f} images/s", file=sys.stderr)
        elif isinstance(report, CheckpointReport):
            probe_loss = report.probe_loss
        elif isinstance(report, DoneReport):
            folder = report.folder
    cpu_seconds = time.process_time() - begun

    model = seeded(Expert, recipe.model, 0)
    assert isinstance(model, Expert)
    load_weights(model, folder / "ema.safetensors")
    encoder = EfficientNetLite0()
    features = np.asarray(data.features())
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    centroids = np.stack([unit[np.asarray(families) == name].mean(axis=0) for name in names])
    count = min(arguments.prompts, HELD_OUT)
    real = data.pixels(held.rows[:count])
    label = np.full(count, names.index(arguments.family))
    told = [captions[row] for row in held.rows[:count].tolist()]
    figures: dict[str, Any] = {"real": {"cluster": cluster_accuracy(real, label, centroids, encoder)}}
    sheet = [real[:16]]
    for guidance in arguments.guidance:
        images = drawn(model, held, count, guidance, arguments.sampling_steps, seed=7)
        background = background_accuracy(images, real, told)
        figures["real"]["background"] = background.real
        figures[f"guidance {guidance:g}"] = {
            "cluster": cluster_accuracy(images, label, centroids, encoder),
            "background": background.drawn,
        }
        sheet.append(images[:16])
    if arguments.sheet:
        save_sheet(arguments.sheet, sheet)
    result = {
        "family": arguments.family,
        "recipe": recipe.to_dict(),
        "parameters": parameter_count(model),
        "steps": recipe.train.steps,
        "cpu_seconds": round(cpu_seconds, 1),
        "cpu_seconds_per_step": round(step_s, 4),
        "images_per_cpu_second": round(recipe.train.batch / step_s, 1),
        "loss": loss,
        "probe_loss": probe_loss,
        "bars": {"resumable": resumable_bar(recipe, probe), "assemblable": assemblable_bar(rows, probe, 1)},
        "figures": figures,
    }
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
