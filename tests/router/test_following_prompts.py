"""Words that decide the cluster: a router that is blind to them sends a prompt anywhere, one that reads them does not.

Routers are trained here, on pictures whose colour follows from the caption; each expert knows one colour, exactly.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from router_world import COLOURS, PIXELS, ROUTER_RECIPE, K, LabelledData, router_task, with_train, write_probe
from torch import Tensor

from paris_swarm.expert.checkpoint import load_weights
from paris_swarm.expert.training import DoneReport, TrainJob, train
from paris_swarm.router.draw import Pictures, draw
from paris_swarm.router.ensemble import Ensemble, Network, NullText
from paris_swarm.router.task import build_router

torch.set_num_threads(1)
PROMPTS = 48


def painter(k: int) -> Network:
    """The exact flow to one colour."""
    goal = torch.from_numpy(COLOURS[k] / 127.5 - 1).float()[None, :, None, None]

    def velocity(x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        return (x - goal) / t[:, None, None, None]

    return velocity


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Pictures]]:
    """Pictures of 48 prompts by router and strategy."""
    data, folder = LabelledData(), tmp_path_factory.mktemp("routers")
    write_probe(folder / "probe.safetensors", data)
    null = NullText(torch.from_numpy(data.null_states).float(), 1)
    states, lengths = data.states(np.arange(PROMPTS))
    found: dict[str, dict[str, Pictures]] = {}
    for text in ("pooled", "none"):
        recipe = with_train(replace(ROUTER_RECIPE, model=replace(ROUTER_RECIPE.model, text=text)), steps=220, batch=32)
        task = router_task(data, folder / "probe.safetensors", recipe)
        job = TrainJob(task, Path(folder / text), device="cpu", precision="fp32")
        done = next(report for report in train(job) if isinstance(report, DoneReport))
        router = build_router(recipe)
        load_weights(router, done.folder / "ema.safetensors")
        router.eval()
        ensemble = Ensemble(K, {k: lambda k=k: painter(k) for k in range(K)}, router, null)  # type: ignore[misc]
        found[text] = {
            strategy: draw(ensemble, states, lengths, shape=(3, PIXELS, PIXELS), strategy=strategy, steps=10, seed=1)
            for strategy in ("top-1", "full")
        }
    return found


def hits(pictures: Pictures) -> float:
    labels = LabelledData().labels[:PROMPTS]
    colours = pictures.images.reshape(PROMPTS, -1, 3).mean(1)
    nearest = np.square(colours[:, None] - COLOURS[None]).sum(2).argmin(1)
    return float((nearest == labels).mean())


@pytest.mark.parametrize("strategy", ["top-1", "full"])
def test_a_router_that_reads_the_caption_follows_the_prompt(
    drawn: dict[str, dict[str, Pictures]], strategy: str
) -> None:
    assert hits(drawn["pooled"][strategy]) > 0.85


@pytest.mark.parametrize("strategy", ["top-1", "full"])
def test_a_blind_router_cannot(drawn: dict[str, dict[str, Pictures]], strategy: str) -> None:
    """At t = 1 the noise says nothing about the cluster, and every later step follows from what the first drew."""
    assert hits(drawn["none"][strategy]) < 0.6
