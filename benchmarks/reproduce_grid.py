"""What `benchmarks/reproduce.py` runs: scales, arms, the parts to train and the cells to measure, and their FLOPs.

An arm is one way to spend the training budget: one dense model, or K experts and a router over a partition. Every arm
of a seed gets the same training FLOPs: an expert's batch is the dense batch / K, so K experts see as many images as
the dense model in the same number of steps, and the dense model takes more steps for what the router costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.expert.model import Expert
from paris_swarm.expert.recipe import DEMO, ModelConfig, Recipe, TrainConfig, recipe_digest
from paris_swarm.router.model import Router
from paris_swarm.router.recipe import DEMO as ROUTER_TINY
from paris_swarm.router.recipe import RouterRecipe

DENSE = "dense"
ROUTER = "router"
STRATEGIES = (
    "top-1", "top-2", "top-3", "full", "oracle", "adaptive",
    "threshold-0.01", "threshold-0.05", "threshold-0.1", "sample", "nucleus-0.9",
)  # fmt: skip
FAMILIES = ("landscape", "planets", "sprouts", "voxel-bot", "critters", "moods", "pixel-art", "rings")

# ---------------------------------------------------------------------------------------------------------------------
# scales
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """One size of the experiment. Lengths in pixels; `rows` of the data, the last `held_out` of them never trained on;
    `steps` of every expert, `router_steps` of a router; `sampling_steps` Euler steps a picture. `expert_rates` and
    `dense_rates` multiply the learning rates of `train`, as `reproduce.py OUT --rates` found them on either side.
    """

    name: str
    resolution: int
    rows: int
    held_out: int
    model: ModelConfig
    train: TrainConfig
    router: RouterRecipe
    dense_batch: int
    clusters: tuple[int, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    strategies: tuple[str, ...] = STRATEGIES
    sampling_steps: int = 20
    guidance: float = 1.0
    expert_rates: float = 1.0
    dense_rates: float = 1.0
    data_seed: int = 0
    families: tuple[str, ...] = field(default=FAMILIES)

    def digest(self) -> str:
        """BLAKE3 of every value: results of two digests are never mixed in one folder."""
        return recipe_digest(asdict(self))

    def expert_recipe(self, clusters: int, seed: int, data: dict[str, Any]) -> Recipe:
        """An expert's recipe: the dense batch / K. `data` is the manifest of the prepared data.

        Raises:
            ValueError: K does not divide the dense batch.
        """
        if self.dense_batch % clusters:
            raise ValueError(f"the dense batch {self.dense_batch} cannot be shared by {clusters} experts")
        train = replace(faster(self.train, self.expert_rates), batch=self.dense_batch // clusters, seed=seed)
        recipe = Recipe(self.model, train)
        text = data["text"]
        return recipe.with_data(
            channels=data["channels"], resolution=self.resolution, text_dim=text["dim"], text_tokens=text["tokens"]
        )

    def router_recipe(self, clusters: int, seed: int, data: dict[str, Any]) -> RouterRecipe:
        """A router's recipe for K clusters."""
        fitted = self.router.with_data(
            clusters=clusters, channels=data["channels"], resolution=self.resolution, text_dim=data["text"]["dim"]
        )
        return fitted.with_train(seed=seed)

    def dense_recipe(self, seed: int, data: dict[str, Any]) -> Recipe:
        """The dense model: the experts' network, rates and schedule, the whole batch, and steps for the router's
        FLOPs on top (the router's cost hardly depends on K: that of the first K is taken)."""
        clusters = self.clusters[0]
        expert, router = self.expert_recipe(clusters, seed, data), self.router_recipe(clusters, seed, data)
        extra = training_flops(router) / (clusters * training_flops(expert))
        steps = round(expert.train.steps * (1 + extra))
        own = faster(replace(self.train, seed=seed), self.dense_rates)
        return replace(expert, train=replace(own, batch=self.dense_batch, steps=steps))


def faster(train: TrainConfig, factor: float) -> TrainConfig:
    """`train` with both of its learning rates times `factor`."""
    return replace(train, lr=train.lr * factor, matrix_lr=train.matrix_lr * factor)


SCALES: dict[str, Scale] = {
    "small": Scale(
        name="small",
        resolution=24,
        rows=6144,
        held_out=384,
        model=ModelConfig(resolution=24, patch=6, hidden=192, depth=4, heads=3, output="residual", patch_skip=True),
        train=replace(DEMO.train, steps=400),
        router=ROUTER_TINY,
        dense_batch=256,
        # dense_rates stays 1: twice the rates won the short trial and diverged in the whole run (see docs/results)
        clusters=(8,),
        strategies=("top-1", "top-2", "top-3", "full", "oracle", "adaptive", "threshold-0.05", "sample", "nucleus-0.9"),
    ),
    "full": Scale(
        name="full",
        resolution=32,
        rows=65_536,
        held_out=4096,
        model=ModelConfig(resolution=32, patch=2, hidden=384, depth=12, heads=6, output="residual", patch_skip=True),
        train=TrainConfig(steps=20_000, optimizer="adamw", lr=3e-4, ema=0.999),
        router=replace(
            ROUTER_TINY,
            model=replace(ROUTER_TINY.model, patch=4, hidden=192, depth=4, heads=3),
            train=replace(ROUTER_TINY.train, steps=5_000, batch=256, lr=3e-4),
        ),
        dense_batch=256,
        clusters=(4, 8, 16),
        sampling_steps=50,
    ),
    "toy": Scale(
        name="toy",
        resolution=8,
        rows=96,
        held_out=16,
        model=ModelConfig(resolution=8, patch=4, hidden=16, depth=1, heads=1),
        train=TrainConfig(steps=4, warmup_steps=1),
        router=replace(
            ROUTER_TINY,
            model=replace(ROUTER_TINY.model, hidden=16, depth=1, heads=1, patch=4),
            train=replace(ROUTER_TINY.train, steps=4, batch=8),
        ),
        dense_batch=8,
        clusters=(2,),
        seeds=(0, 1),
        strategies=("top-1", "full"),
        sampling_steps=2,
        families=("planets", "rings"),
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# arms, parts, cells
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One dense model (`clusters` 1), or K experts over the "encoder" clusters or over "random" shards."""

    partition: str
    clusters: int

    @property
    def name(self) -> str:
        return DENSE if self.partition == DENSE else f"{self.partition}-{self.clusters}"

    @property
    def parts(self) -> tuple[str, ...]:
        """What is trained for it: "0" to "K-1" and "router", or "0" alone."""
        numbers = tuple(str(k) for k in range(self.clusters))
        return numbers if self.partition == DENSE else (*numbers, ROUTER)

    def strategies(self, scale: Scale) -> tuple[str, ...]:
        """A dense model has nothing to choose: its one strategy is top-1 of one."""
        if self.partition == DENSE:
            return ("top-1",)
        return tuple(name for name in scale.strategies if not name.startswith("top-") or int(name[4:]) <= self.clusters)


def arms(scale: Scale) -> tuple[Arm, ...]:
    """The dense model, then for every K encoder clusters and random shards."""
    both = (Arm(partition, clusters) for clusters in scale.clusters for partition in ("encoder", "random"))
    return (Arm(DENSE, 1), *both)


@dataclass(frozen=True)
class Part:
    """One network to train."""

    arm: Arm
    seed: int
    slot: str

    def folder(self, out: Path) -> Path:
        return out / "parts" / f"seed-{self.seed}" / self.arm.name / self.slot

    def done(self, out: Path) -> Path:
        """Written once it is trained."""
        return self.folder(out) / "done.json"


@dataclass(frozen=True)
class Cell:
    """One figure of the table: an arm drawn with a strategy from one seed."""

    arm: Arm
    seed: int
    strategy: str

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.strategy}-seed-{self.seed}"

    def done(self, out: Path) -> Path:
        """Written once it is measured."""
        return out / "cells" / f"{self.name}.json"

    def pictures(self, out: Path) -> Path:
        """What was drawn, kept: uint8 [P, H, W, 3]."""
        return out / "pictures" / f"{self.name}.npy"

    def needs(self) -> Iterator[Part]:
        return (Part(self.arm, self.seed, slot) for slot in self.arm.parts)


def work(scale: Scale) -> Iterator[Part | Cell]:
    """Everything there is to do, seed by seed, so that what is finished early can be compared."""
    for seed in scale.seeds:
        for arm in arms(scale):
            yield from (Part(arm, seed, slot) for slot in arm.parts)
        for arm in arms(scale):
            yield from (Cell(arm, seed, strategy) for strategy in arm.strategies(scale))


def noise_seed(cell: Cell) -> int:
    """The seed of a cell's starting noise: the same for all arms and strategies of a training seed."""
    return int(blake3_hex(f"reproduce pictures {cell.seed}".encode())[:8], 16)


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def forward_flops(config: Any) -> int:
    """Multiply-adds, counted twice, of one forward pass of one picture, captions at full length: matrix products only
    (torch's counter), for a `ModelConfig` or a `RouterConfig`. FLOPs are per picture: batching changes none.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    expert = isinstance(config, ModelConfig)
    tokens = config.text_tokens if expert else 1
    network: nn.Module = Expert(config) if expert else Router(config)
    x = torch.zeros(1, config.channels, config.resolution, config.resolution)
    states, mask = torch.zeros(1, tokens, config.text_dim), torch.ones(1, tokens, dtype=torch.bool)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(x, torch.zeros(1), states, mask)
    return int(counter.get_total_flops())


def training_flops(recipe: Recipe | RouterRecipe) -> float:
    """FLOPs of a training run: forward, and twice that backward, of every image. The optimiser's are not counted."""
    return 3.0 * forward_flops(recipe.model) * recipe.train.steps * recipe.train.batch
