"""How many steps fit into the minutes asked for: measured on this machine, a few real steps on one thread."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paris_swarm.cli.demo.story import DemoOptions

SHARED_CORES = 0.86
"""Four one-thread trainers side by side on two cores do 86 % of the work that they would do one after another."""
MEASURED_STEPS = 6
FEWEST_STEPS = 40
CHECKPOINTS = 4


@dataclass(frozen=True)
class Pace:
    """Steps of each expert and of the router, threads of each trainer, seconds between checkpoints."""

    steps: int
    router_steps: int
    threads: int
    checkpoint_every_s: float
    explanation: str


def choose_pace(options: DemoOptions, data_folder: Path) -> Pace:
    """Measure a step of an expert and of the router, and divide the time of all cores among the trainers."""
    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.expert.recipe import named_recipe
    from paris_swarm.expert.training import pick_device
    from paris_swarm.router.recipe import named_router_recipe

    data = PreparedData.open(data_folder)
    device = pick_device(options.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    trainers = min(options.peers, options.clusters)
    threads = max(1, cores // trainers)
    router_steps = named_router_recipe("tiny").train.steps
    expert_s = _seconds_a_step(data, named_recipe("tiny"), threads, device)
    router_s = _seconds_a_step(data, named_router_recipe("tiny"), threads, device)
    together = SHARED_CORES * min(1.0, cores / (trainers * threads)) if device.type == "cpu" else 1 / trainers
    rounds = -(-options.clusters // trainers)
    budget = options.minutes * 60 / rounds - router_steps * router_s / (together * trainers)
    fits = int(budget * together / expert_s)
    # A multiple of 20 reads better and changes nothing.
    steps = options.steps if options.steps is not None else max(FEWEST_STEPS, fits // 20 * 20)
    return Pace(
        steps=steps,
        router_steps=min(router_steps, max(FEWEST_STEPS, steps)) if options.steps is not None else router_steps,
        threads=threads,
        checkpoint_every_s=max(10.0, round(options.minutes * 60 / CHECKPOINTS)),
        explanation=f"A step takes {expert_s * 1000:.0f} ms on {threads} thread(s) of {device.type}; "
        f"{trainers} trainers on {cores} cores: {steps} steps an expert, {router_steps} for the router.",
    )


def _seconds_a_step(data: object, recipe: object, threads: int, device: object) -> float:
    """Median time of a step, alone on this machine, after a first one that does not count."""
    from typing import Any, cast

    import numpy as np
    import torch

    from paris_swarm.expert.recipe import Recipe
    from paris_swarm.expert.rows import Rows
    from paris_swarm.expert.task import ExpertTask
    from paris_swarm.expert.training import TrainState, pick_precision
    from paris_swarm.expert.verify import probe_from_rows
    from paris_swarm.router.task import RouterTask, join_probes

    prepared = cast(Any, data)
    rows = Rows(prepared, np.arange(min(prepared.count, 512)))
    probe = probe_from_rows(Rows(prepared, np.arange(2)), 0)
    manifest = prepared.manifest
    shape = {
        "channels": manifest["channels"],
        "resolution": prepared.resolution,
        "text_dim": manifest["text"]["dim"],
    }
    task: Any
    if isinstance(recipe, Recipe):
        task = ExpertTask(recipe.with_data(**shape, text_tokens=manifest["text"]["tokens"]), rows, probe)
    else:
        router = cast(Any, recipe).with_data(**shape, clusters=2)
        labels = np.arange(prepared.count) % 2
        task = RouterTask(router, rows, labels, join_probes([probe, probe], 0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        state = TrainState(task, cast(Any, device))
        precision = pick_precision("auto", cast(Any, device))
        times = []
        for _ in range(MEASURED_STEPS):
            begun = time.perf_counter()
            float(state.take_step(precision))
            times.append(time.perf_counter() - begun)
    finally:
        torch.set_num_threads(before)
    return sorted(times[1:])[len(times[1:]) // 2]
