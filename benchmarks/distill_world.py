"""What `benchmarks/distill.py` starts from: trained experts with their router, rows to learn by, and a judge.

Two places can have them: the folder of `benchmarks/router.py` (four experts) and that of a finished `reproduce.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from reproduce_cells import World, network, weights
from reproduce_grid import DENSE, ROUTER, SCALES, Arm, Part, training_flops

from paris_swarm.dht_schemas.digest import digest_file
from paris_swarm.expert.checkpoint import newest_whole
from paris_swarm.expert.data.encoders import EfficientNetLite0
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.recipe import Recipe, named_recipe
from paris_swarm.expert.rows import Rows, select_rows
from paris_swarm.expert.verify import Probe
from paris_swarm.router.ensemble import Network, NullText
from paris_swarm.router.evaluation.measure import Prompts, Reference
from paris_swarm.router.recipe import RouterRecipe, named_router_recipe

PROBE_ROWS = 256
"""At most so many held-out rows decide the held-out losses."""


@dataclass(frozen=True)
class Setting:
    """One ensemble with its data. labels int64 [N]: each row's cluster; held_labels [P]: each held-out row's.

    dense: the recipe of the dense model of the same training FLOPs; dense_weights: its EMA weights where it is trained
    already, None: distill.py trains it. states, lengths: the held-out captions; probe: held-out rows for the losses.
    """

    name: str
    data: PreparedData
    rows: Rows
    labels: NDArray[np.int64]
    expert: Recipe
    router_recipe: RouterRecipe
    dense: Recipe
    dense_weights: Path | None
    loaders: Mapping[int, Callable[[], Network]]
    roots: Mapping[str, str]
    router: Network
    null: NullText
    states: NDArray[np.float16]
    lengths: NDArray[np.int16]
    held_labels: NDArray[np.int64]
    probe: Probe
    extractor: EfficientNetLite0
    reference: Reference
    prompts: Prompts
    centroids: NDArray[np.float32]

    @property
    def clusters(self) -> int:
        return len(self.loaders)

    @property
    def ensemble_flops(self) -> float:
        """Training FLOPs of the experts and the router."""
        return self.clusters * training_flops(self.expert) + training_flops(self.router_recipe)


def dense_recipe(expert: Recipe, router: RouterRecipe, clusters: int) -> Recipe:
    """The experts' recipe with the batch of all of them, and steps for what the router costs on top."""
    extra = training_flops(router) / (clusters * training_flops(expert))
    return expert.with_train(batch=expert.train.batch * clusters, steps=round(expert.train.steps * (1 + extra)))


def of_router_benchmark(data: Path, fresh: Path, work: Path, *, steps: int = 320, router_steps: int = 400) -> Setting:
    """The experts and the caption-aware router of `benchmarks/router.py DATA FRESH --work WORK`, trained here where
    they are not; judged by FRESH, which none of them has seen."""
    from router import CLUSTERS, experts_of, router_of, uncut, world_of  # noqa: TID251 (the file beside this one)

    world = world_of(PreparedData.open(data), PreparedData.open(fresh), 0)
    text = world.data.manifest["text"]
    shape = {"channels": 3, "resolution": world.data.resolution, "text_dim": text["dim"]}
    expert = named_recipe("tiny").with_data(**shape, text_tokens=text["tokens"]).with_train(steps=steps, seed=0)
    router_recipe = named_router_recipe("tiny").with_data(**shape, clusters=CLUSTERS)
    router_recipe = router_recipe.with_train(steps=router_steps, seed=0)
    networks = experts_of(world, expert, work, 0)
    every = select_rows(world.data, None, None, world.held)
    router = router_of(world.data, every, world.labels, router_recipe, world.open["0"], work / "router-pooled")
    held = np.arange(world.fresh.count)
    states, lengths = world.fresh.states(held)
    captions = world.fresh.captions(held)
    return Setting(
        name="Four families of DiceBear",
        data=world.data,
        rows=Rows(world.data, every),
        labels=world.labels,
        expert=expert,
        router_recipe=router_recipe,
        dense=dense_recipe(expert, router_recipe, CLUSTERS),
        dense_weights=None,
        loaders={k: (lambda k=k: networks[str(k)]) for k in range(CLUSTERS)},
        roots={slot: _digest(work / f"expert-{slot}") for slot in networks},
        router=router,
        null=NullText(torch.from_numpy(np.array(world.fresh.null_states)).float(), world.fresh.null_length),
        states=np.asarray(states),
        lengths=np.asarray(lengths),
        held_labels=world.fresh_labels.astype(np.int64),
        probe=uncut(world.fresh, held[:PROBE_ROWS], 1),
        extractor=EfficientNetLite0(),
        reference=Reference(np.asarray(world.data.features()), world.fresh.count),
        prompts=Prompts(world.fresh_labels.astype(np.int64), captions, world.fresh.pixels(held)),
        centroids=world.centroids,
    )


def _digest(work: Path) -> str:
    folder = newest_whole(work)[0]
    assert folder is not None  # it was loaded from there
    return digest_file(folder / "ema.safetensors")


def of_reproduction(grid: Path, scale_name: str, seed: int, device: str, say: Callable[[str], None]) -> Setting:
    """The encoder clusters' experts, router and dense model of one seed of a finished `reproduce.py GRID`, only read.

    Raises:
        SystemExit: a part is not trained yet; it is named.
    """
    scale = SCALES[scale_name]
    where = grid / "data.json"
    folder = Path(json.loads(where.read_text())["folder"]) if where.is_file() else grid / "data"
    world = World(scale, folder, grid, say)
    clusters = scale.clusters[0]
    arm = Arm("encoder", clusters)
    parts = [Part(arm, seed, str(k)) for k in range(clusters)]
    router, dense = Part(arm, seed, ROUTER), Part(Arm(DENSE, 1), seed, "0")
    for part in (*parts, router, dense):
        if not part.done(grid).is_file():
            raise SystemExit(f"{part.done(grid)} is not there: let reproduce.py finish this seed first")
    judge, data = world.judge, world.data
    states, lengths = data.states(world.held)
    return Setting(
        name=f"Scale {scale.name} of the reproduction",
        data=data,
        rows=Rows(data, select_rows(data, None, None, world.digests)),
        labels=world.labels(arm),
        expert=scale.expert_recipe(clusters, seed, data.manifest),
        router_recipe=scale.router_recipe(clusters, seed, data.manifest),
        dense=scale.dense_recipe(seed, data.manifest),
        dense_weights=weights(dense, grid),
        loaders={k: (lambda part=part: network(world, part, device)) for k, part in enumerate(parts)},
        roots={part.slot: digest_file(weights(part, grid)) for part in parts},
        router=network(world, router, device),
        null=NullText(torch.from_numpy(np.array(data.null_states)).float().to(device), data.null_length),
        states=np.asarray(states),
        lengths=np.asarray(lengths),
        held_labels=judge.prompts.clusters,
        probe=world.probe(Arm(DENSE, 1), 0),
        extractor=judge.extractor,
        reference=judge.reference,
        prompts=judge.prompts,
        centroids=judge.centroids,
    )


def student_recipe(setting: Setting, seed: int) -> Recipe:
    """The dense model's network and rates, an expert's steps, a quarter of the dense batch (DDM, section 4.6)."""
    train = setting.dense.train
    small = replace(train, batch=max(1, train.batch // 4), steps=setting.expert.train.steps, seed=seed)
    return replace(setting.dense, train=small)
