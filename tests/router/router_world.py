"""A made world for the router room's tests: three clusters told apart by colour and by caption, a plan, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import build_manifest, file_entry
from paris_swarm.dht_schemas.plan import (
    Bars,
    OpenedPlan,
    Plan,
    Policy,
    SlotSpec,
    TensorSpec,
    Verification,
    open_plan,
    seal_plan,
)
from paris_swarm.dht_schemas.records import Announcement, Holding
from paris_swarm.expert.recipe import ModelConfig, Recipe, TrainConfig
from paris_swarm.expert.rows import Rows, select_rows
from paris_swarm.expert.task import ExpertTask
from paris_swarm.expert.training import CheckpointReport, TrainJob, checkpoint_tables, train
from paris_swarm.expert.verify import load_probe, write_probe_set
from paris_swarm.router.folder_writing import SlotSource
from paris_swarm.router.recipe import RouterConfig, RouterRecipe
from paris_swarm.router.task import RouterTask, load_router_probe

K, TOKENS, DIM, PIXELS = 3, 5, 8, 8
COLOURS = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 230]])
CHECKPOINT_FILES = ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
ORGANISER, ASSEMBLER = Identity(b"o" * 32), Identity(b"a" * 32)
PEERS = {"0": Identity(b"0" * 32), "1": Identity(b"1" * 32), "2": Identity(b"2" * 32), "router": Identity(b"r" * 32)}


class LabelledData:
    """`rows.RowSource` in memory: the cluster decides the colour, and the caption's first token says the cluster."""

    def __init__(self, count: int = 240, spread: float = 60.0) -> None:
        draw = np.random.default_rng(3)
        self.count = count
        self.labels = draw.integers(0, K, count)
        pixels = COLOURS[self.labels][:, None, None] + draw.normal(0, spread, (count, PIXELS, PIXELS, 3))
        self._pixels = pixels.clip(0, 255).astype(np.uint8)
        self._states = draw.normal(0, 0.3, (count, TOKENS, DIM)).astype(np.float16)
        self._states[np.arange(count), 0, self.labels] += np.float16(3)
        self._lengths = draw.integers(2, TOKENS + 1, count).astype(np.int16)
        self.null_states = np.zeros((TOKENS, DIM), dtype=np.float16)
        self.null_states[0, -1] = 1
        self.manifest: dict[str, Any] = {"null_length": 1}
        self.digests = draw.integers(0, 256, (count, 16), dtype=np.uint8)

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        return self._pixels[rows]

    def states(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._states[rows], self._lengths[rows]

    @property
    def probe_rows(self) -> dict[str, np.ndarray]:
        """The last four rows of each cluster."""
        return {str(k): np.flatnonzero(self.labels == k)[-4:] for k in range(K)}

    @property
    def held_out(self) -> list[bytes]:
        return [self.digests[row].tobytes() for rows in self.probe_rows.values() for row in rows]


EXPERT_RECIPE = Recipe(
    ModelConfig(resolution=PIXELS, patch=4, hidden=16, depth=1, heads=2, text_dim=DIM, text_tokens=TOKENS),
    TrainConfig(steps=2, batch=4, warmup_steps=0, seed=1),
)
ROUTER_RECIPE = RouterRecipe(
    RouterConfig(clusters=K, resolution=PIXELS, patch=4, hidden=16, depth=1, heads=2, text_dim=DIM),
    TrainConfig(steps=2, batch=8, lr=3e-3, warmup_steps=0, t_sampling="uniform", t_uniform=0.0, ema=0.9, seed=1),
)


def write_probe(path: Path, data: LabelledData) -> None:
    slots = {slot: (data.pixels(rows), *data.states(rows)) for slot, rows in data.probe_rows.items()}
    write_probe_set(path, slots, data.null_states, 1)


def router_task(data: LabelledData, probe_path: Path, recipe: RouterRecipe = ROUTER_RECIPE) -> RouterTask:
    rows = Rows(data, select_rows(data, None, None, data.held_out))
    return RouterTask(recipe, rows, data.labels, load_router_probe(probe_path, K, 5))


def expert_task(data: LabelledData, probe_path: Path, slot: str) -> ExpertTask:
    rows = Rows(data, select_rows(data, data.labels, int(slot), data.held_out))
    return ExpertTask(EXPERT_RECIPE, rows, load_probe(probe_path, slot, 5))


def specs(task: ExpertTask | RouterTask) -> SlotSpec:
    tables = checkpoint_tables(task)
    return SlotSpec(
        recipe=task.recipe.to_dict(),
        files={
            name: tuple(TensorSpec(name=tensor, dtype=dtype, shape=shape) for tensor, dtype, shape in table)
            for name, table in tables.items()
        },
    )


@dataclass(frozen=True)
class World:
    """A signed plan with its folder, and one published checkpoint a slot."""

    plan: OpenedPlan
    plan_folder: Path
    checkpoints: dict[str, Path]
    sources: dict[str, SlotSource]

    def all_sources(self) -> list[SlotSource]:
        return [self.sources[slot] for slot in self.plan.plan.slots]

    def announce(self, slot: str, folder: Path, **changes: Any) -> SlotSource:
        """A signed announcement of the files in `folder`, with any of its fields changed."""
        manifest, data, root = build_manifest(folder, CHECKPOINT_FILES, slot, meta={"step": 2, "parent": None})
        fields: dict[str, Any] = {
            "plan": self.plan.plan_id,
            "slot": slot,
            "author": PEERS[slot].peer_id,
            "seq": 1,
            "step": 2,
            "parent": None,
            "root": root,
            "bytes": manifest.total_bytes,
            "probe_loss": 0.5,
        }
        announcement = Announcement(**{**fields, **changes}).seal(PEERS[slot])
        holding = Holding(
            plan=self.plan.plan_id,
            slot=slot,
            holder=PEERS[slot].peer_id,
            seq=1,
            until=2_000.0,
            announcement=announcement.decode(),
        ).seal(PEERS[slot])
        return SlotSource(announcement, data, folder / "ema.safetensors", holding)


def make_world(folder: Path, *, admission: str = "open", **said: Any) -> World:
    """said: further fields of the plan's `data`."""
    torch.set_num_threads(1)
    data = LabelledData()
    plan_folder = folder / "plan"
    plan_folder.mkdir(parents=True)
    probe = plan_folder / "probe.safetensors"
    write_probe(probe, data)
    (plan_folder / "centroids.npy").write_bytes(b"centroids stand for any other file of the plan")
    tasks: dict[str, ExpertTask | RouterTask] = {str(k): expert_task(data, probe, str(k)) for k in range(K)}
    tasks["router"] = router_task(data, probe)
    plan = Plan(
        name="three colours",
        organiser=ORGANISER.peer_id,
        created=1_000,
        clusters=K,
        seed=0,
        data={"source": "made", "licences": ["CC0"], **said},
        expert=specs(tasks["0"]),
        router=specs(tasks["router"]),
        policy=Policy(
            lease_s=60.0, checkpoint_every_s=10.0, first_checkpoint_grace_s=10.0, checkpoint_cap_bytes=10_000_000
        ),
        admission=admission,
        verification=Verification(
            probe_seed=5, bars={slot: Bars(resumable=2.0, assemblable=1.5) for slot in (*map(str, range(K)), "router")}
        ),
        files=tuple(file_entry(path) for path in sorted(plan_folder.iterdir())),
    )
    envelope = seal_plan(ORGANISER, plan)
    opened = open_plan(envelope)
    assert opened.plan_id == blake3_hex(envelope)
    world = World(opened, plan_folder, {}, {})
    for slot, task in tasks.items():
        reports = list(train(TrainJob(task, folder / "work" / slot, device="cpu", precision="fp32")))
        checkpoint = next(report for report in reports if isinstance(report, CheckpointReport)).folder
        world.checkpoints[slot] = checkpoint
        world.sources[slot] = world.announce(slot, checkpoint)
    return world


def prompts(count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Captions of the first rows: states float16 [count, TOKENS, DIM], lengths int16 [count]."""
    return LabelledData().states(np.arange(count))


def with_train(recipe: RouterRecipe, **changes: Any) -> RouterRecipe:
    return replace(recipe, train=replace(recipe.train, **changes))
