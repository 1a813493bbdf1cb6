"""One dense student against the ensemble it learned from and the dense model of the same training FLOPs.

    python benchmarks/distill.py OUT --router DATA FRESH WORK    # experts of `benchmarks/router.py`, trained if need be
    python benchmarks/distill.py OUT --grid GRID --scale small --seed 0    # those of a finished `reproduce.py GRID`
    ... --report docs/results/distill-2026-11.md   # only write the tables: of OUT, or of OUT/seed-0, OUT/seed-1, ...

The students have the dense model's network and rates, an expert's steps and a quarter of the dense batch (Decentralized
Diffusion Models, section 4.6). "direct" is their control: the same network, steps and batch, taught by the pictures
instead of the experts. Everything lies in OUT and is never done again; a run that is killed loses a minute at most.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distill_report import write_report
from distill_world import Setting, of_reproduction, of_router_benchmark, student_recipe
from reproduce import say
from reproduce_cells import write_array, write_json
from reproduce_grid import forward_flops, training_flops

from paris_swarm.expert.checkpoint import load_weights
from paris_swarm.expert.flow import velocity_target
from paris_swarm.expert.recipe import Recipe
from paris_swarm.expert.task import ExpertTask, Task, build_expert
from paris_swarm.expert.training import DoneReport, StepReport, TrainJob, train
from paris_swarm.router.distill import DistillRecipe, DistillTask
from paris_swarm.router.draw import draw
from paris_swarm.router.ensemble import Ensemble, Network
from paris_swarm.router.evaluation.measure import measure
from paris_swarm.router.resident import Resident

EXPERTS, DENSE = "experts", "dense"
MODELS = ("fresh", "direct", DENSE, "mean", "long")
"""What is trained here: a student, the control, the dense model, a student that starts from the experts' mean."""
STUDENTS = ("fresh", "mean", "long")
SAMPLING_STEPS, FEW = 20, (1, 2, 4, 8)
"""Euler steps a picture."""
GUIDANCE = 1.0


@dataclass(frozen=True)
class Figure:
    """One set of pictures: of a model with a strategy, by `steps` Euler steps."""

    model: str
    strategy: str
    steps: int

    def place(self, out: Path, what: str) -> Path:
        name = f"{self.model}-{self.strategy}-{self.steps}"
        return out / what / (name + (".npy" if what == "pictures" else ".json"))


def wanted() -> list[Figure]:
    """Every figure, the full number of steps first."""
    whole = [(EXPERTS, "top-1"), (EXPERTS, "full"), (EXPERTS, "oracle"), *((model, "top-1") for model in MODELS)]
    few = [(EXPERTS, "top-1"), ("fresh", "top-1"), ("long", "top-1"), (DENSE, "top-1")]
    return [
        *(Figure(*each, SAMPLING_STEPS) for each in whole),
        *(Figure(*each, count) for count in FEW for each in few),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------------------------------


def recipe_of(setting: Setting, model: str, seed: int) -> Recipe:
    """ "long": as many steps as cost what the dense model cost, the teachers' forward passes counted."""
    if model == DENSE:
        return setting.dense
    recipe, dense = student_recipe(setting, seed), setting.dense.train
    if model == "long":
        return recipe.with_train(steps=round(dense.steps * dense.batch * 3 / (4 * recipe.train.batch)))
    return recipe


def task_of(setting: Setting, model: str, seed: int) -> Task:
    """What is trained, on every row but the held-out ones."""
    recipe = recipe_of(setting, model, seed)
    if model in (DENSE, "direct"):
        return ExpertTask(recipe, setting.rows, setting.probe)
    asked = DistillRecipe(recipe, setting.roots, "mean" if model == "mean" else "fresh")
    return DistillTask(asked, setting.rows, setting.labels, Resident(setting.loaders).get, setting.probe)


def train_model(setting: Setting, model: str, seed: int, out: Path, device: str, stop: Callable[[], bool]) -> bool:
    """Trains, or goes on, and writes done.json; False where `stop` said so first."""
    begun, loss = time.process_time(), float("nan")
    folder = out / "trained" / model
    precision = "fp32" if device == "cpu" else "auto"
    done: Any = None
    for done in train(
        TrainJob(
            task_of(setting, model, seed), folder, checkpoint_every_s=60.0, keep=1, report_every_s=15.0,
            device=device, precision=precision, stop=stop,
        )
    ):  # fmt: skip
        if isinstance(done, StepReport):
            loss = done.loss
            say(f"{model}: {done.step}/{done.steps} loss {loss:.4f}")
    assert isinstance(done, DoneReport)
    if done.stopped:
        return False
    recipe = recipe_of(setting, model, seed)
    taught = forward_flops(recipe.model) * recipe.train.steps * recipe.train.batch if model in STUDENTS else 0
    write_json(
        folder / "done.json",
        {
            "checkpoint": done.folder.name,
            "loss": loss,
            "training_flops": training_flops(recipe) + taught,
            "cpu_s_of_last_session": round(time.process_time() - begun, 1),
            "recipe": recipe.to_dict(),
        },
    )
    return True


# ---------------------------------------------------------------------------------------------------------------------
# figures
# ---------------------------------------------------------------------------------------------------------------------


def ensemble_of(setting: Setting, model: str, seed: int, out: Path, device: str) -> tuple[Ensemble, float]:
    """The model, and its training FLOPs."""
    if model == EXPERTS:
        return Ensemble(setting.clusters, setting.loaders, setting.router, setting.null), setting.ensemble_flops
    recipe = recipe_of(setting, model, seed)
    if model == DENSE and setting.dense_weights is not None:
        path, flops = setting.dense_weights, training_flops(recipe)
    else:
        about = json.loads((out / "trained" / model / "done.json").read_text())
        path = out / "trained" / model / "checkpoints" / about["checkpoint"] / "ema.safetensors"
        flops = about["training_flops"]
    network = build_expert(recipe)
    load_weights(network, path)
    loader = partial(_same, network.to(device).eval())
    return Ensemble(1, {0: loader}, None, setting.null), flops


def _same(network: Network) -> Network:
    return network


@torch.no_grad()
def held_out_loss(setting: Setting, ensemble: Ensemble, strategy: str, device: str) -> float:
    """Mean squared velocity error on held-out rows, for what the strategy makes of the experts."""
    probe = setting.probe
    total = 0.0
    for rows, x, t, noise in probe.noised():
        parts = [part.to(device) for part in (x, t, probe.states[rows], probe.mask[rows])]
        labels = torch.from_numpy(setting.held_labels[: len(probe)][rows]).to(device)
        decision = ensemble.route(*parts, strategy=strategy, labels=labels)
        said = ensemble.velocity(*parts, decision).cpu()
        total += float((said - velocity_target(probe.x0[rows], noise)).double().square().sum())
    return total / (probe.x0.numel() * len(probe.times))


def make_figure(setting: Setting, figure: Figure, seed: int, out: Path, device: str) -> None:
    """Draws a picture for every held-out caption (kept), and measures them beside real ones."""
    ensemble, training = ensemble_of(setting, figure.model, seed, out, device)
    path = figure.place(out, "pictures")
    if not path.is_file():
        model = setting.dense.model
        pictures = draw(
            ensemble,
            setting.states,
            setting.lengths,
            shape=(model.channels, model.resolution, model.resolution),
            strategy=figure.strategy,
            steps=figure.steps,
            guidance=GUIDANCE,
            seed=1_000 + seed,
            batch=64,
            labels=setting.held_labels.tolist(),
            device=device,
        )
        write_array(path, pictures.images)
    images = np.load(path, allow_pickle=False)
    found = measure(images, setting.prompts, setting.reference, setting.centroids, setting.extractor)
    loss = held_out_loss(setting, ensemble, figure.strategy, device) if figure.steps == SAMPLING_STEPS else None
    write_json(figure.place(out, "figures"), {**found.as_dict(), "held_out_loss": loss, "training_flops": training})
    say(f"{figure.model} {figure.strategy}, {figure.steps} steps: FID {found.distances.fid:.0f}")


def write_floor(setting: Setting, out: Path) -> None:
    """The figures of the real held-out pictures, and what the page says about the run."""
    real = measure(setting.prompts.pixels, setting.prompts, setting.reference, setting.centroids, setting.extractor)
    write_json(out / "floor.json", real.as_dict())
    student, dense, expert = student_recipe(setting, 0).train, setting.dense.train, setting.expert.train
    about = {
        "name": setting.name, "rows": len(setting.rows), "held_out": len(setting.prompts.clusters),
        "resolution": setting.data.resolution, "clusters": setting.clusters, "hidden": setting.dense.model.hidden,
        "depth": setting.dense.model.depth, "expert": [expert.steps, expert.batch],
        "dense": [dense.steps, dense.batch], "student": [student.steps, student.batch],
        "sampling_steps": SAMPLING_STEPS, "guidance": GUIDANCE,
    }  # fmt: skip
    write_json(out / "about.json", about)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of everything that is made")
    parser.add_argument("--router", type=Path, nargs=3, metavar=("DATA", "FRESH", "WORK"), help="of router.py")
    parser.add_argument("--grid", type=Path, help="folder of a finished reproduce.py, only read")
    parser.add_argument("--scale", default="small", help="the grid's (default: small)")
    parser.add_argument("--seed", type=int, default=0, help="the grid's training seed, and the students'")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS, help="several runs may share the work")
    parser.add_argument("--budget-minutes", type=float, help="stop at a checkpoint after this long; run again to go on")
    parser.add_argument("--report", type=Path, help="write the tables of what is done here, and train nothing")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if arguments.report:
        write_report(out, wanted(), arguments.report)
        return 0
    if (arguments.router is None) == (arguments.grid is None):
        parser.error("say where the experts are: --router DATA FRESH WORK, or --grid GRID")
    deadline = float("inf") if arguments.budget_minutes is None else time.monotonic() + arguments.budget_minutes * 60

    def stop() -> bool:
        return time.monotonic() >= deadline

    os.nice(10)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if arguments.router:
        setting = of_router_benchmark(*arguments.router)
    else:
        setting = of_reproduction(arguments.grid, arguments.scale, arguments.seed, arguments.device, say)
    write_floor(setting, out)
    for model in arguments.models:
        there = (out / "trained" / model / "done.json").is_file()
        there = there or (model == DENSE and setting.dense_weights is not None)
        if not there and not train_model(setting, model, arguments.seed, out, arguments.device, stop):
            return 0
        for figure in wanted():  # so that what is trained first is also seen first
            ready = figure.model == model or (figure.model == EXPERTS and model == MODELS[0])
            if ready and not figure.place(out, "figures").is_file():
                if stop():
                    return 0
                make_figure(setting, figure, arguments.seed, out, arguments.device)
    say("everything is done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
