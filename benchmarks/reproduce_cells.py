"""What one worker of `benchmarks/reproduce.py` does: prepare the data once, train a part, draw and measure a cell."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from reproduce_grid import DENSE, ROUTER, Arm, Cell, Part, Scale, forward_flops, noise_seed, training_flops

from paris_swarm.dht_schemas.files import atomic_write
from paris_swarm.expert.checkpoint import load_weights
from paris_swarm.expert.data.encoders import EfficientNetLite0
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.rows import Rows, select_rows
from paris_swarm.expert.task import ExpertTask, Task, build_expert
from paris_swarm.expert.training import DoneReport, Report, StepReport, TrainJob, train
from paris_swarm.expert.verify import Probe, probe_from_rows
from paris_swarm.router.draw import draw
from paris_swarm.router.ensemble import Ensemble, Network, NullText
from paris_swarm.router.evaluation.measure import Prompts, Reference, measure
from paris_swarm.router.figures import background_accuracy
from paris_swarm.router.partition import partition
from paris_swarm.router.task import RouterProbe, RouterTask, build_router

PROBE_ROWS = 256
"""At most so many of the held-out rows decide the held-out losses."""


class OutOfTime(Exception):
    """The budget is spent: what was begun is kept on disk."""


def write_json(path: Path, value: Any) -> None:
    """Atomic, sorted, ends with a newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_array(path: Path, array: NDArray[Any]) -> None:
    """One .npy file, whole or not at all."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, stream.getvalue())


def make_partitions(data: PreparedData, scale: Scale, out: Path) -> None:
    """For every K the encoder's clusters and random shards of the same data, once for all seeds."""
    for clusters in scale.clusters:
        found = partition(data.features(), clusters, seed=scale.data_seed)
        random = np.random.Generator(np.random.PCG64([scale.data_seed, clusters])).permutation(data.count) % clusters
        write_array(out / "partitions" / f"encoder-{clusters}.npy", found.labels)
        write_array(out / "partitions" / f"centroids-{clusters}.npy", found.centroids)
        write_array(out / "partitions" / f"random-{clusters}.npy", random.astype(np.int64))


class World:
    """The data, its held-out rows and partitions, open for reading."""

    def __init__(self, scale: Scale, folder: Path, out: Path, say: Callable[[str], None]) -> None:
        self.scale, self.out, self.say = scale, out, say
        self.data = PreparedData.open(folder)
        if self.data.count <= scale.held_out:
            raise ValueError(f"{folder} holds {self.data.count} rows, more than {scale.held_out} are needed")
        self.held = np.arange(self.data.count - scale.held_out, self.data.count)
        self.digests = [row.tobytes() for row in np.asarray(self.data.digests)[self.held]]
        self._judge: _Judge | None = None

    def labels(self, arm: Arm) -> NDArray[np.int64]:
        """The cluster of every row."""
        if arm.partition == DENSE:
            return np.zeros(self.data.count, dtype=np.int64)
        found: NDArray[np.int64] = np.load(self.out / "partitions" / f"{arm.name}.npy", allow_pickle=False)
        return found

    def array(self, name: str) -> NDArray[Any]:
        """An array of the partitions folder."""
        found: NDArray[Any] = np.load(self.out / "partitions" / name, allow_pickle=False)
        return found

    def probe(self, arm: Arm, cluster: int) -> Probe:
        """Held-out rows of one cluster; where it has none, one held-out row of another stands in, so that training
        can be judged at all."""
        held = self.held[:PROBE_ROWS]
        own = held[self.labels(arm)[held] == cluster]
        return probe_from_rows(Rows(self.data, own if len(own) else held[:1]), seed=1)

    def task(self, part: Part) -> Task:
        """What is trained."""
        arm, manifest, labels = part.arm, self.data.manifest, self.labels(part.arm)
        if part.slot == ROUTER:
            rows = Rows(self.data, select_rows(self.data, None, None, self.digests))
            held = self.held[:PROBE_ROWS]
            probe = RouterProbe(probe_from_rows(Rows(self.data, held), seed=1), torch.from_numpy(labels[held]))
            return RouterTask(self.scale.router_recipe(arm.clusters, part.seed, manifest), rows, labels, probe)
        if arm.partition == DENSE:
            recipe = self.scale.dense_recipe(part.seed, manifest)
        else:
            recipe = self.scale.expert_recipe(arm.clusters, part.seed, manifest)
        cluster = int(part.slot)
        rows = Rows(self.data, select_rows(self.data, labels, cluster, self.digests))
        return ExpertTask(recipe, rows, self.probe(arm, cluster))

    @property
    def judge(self) -> _Judge:
        """Extractor and reference, made when first needed."""
        if self._judge is None:
            self._judge = _Judge.of(self)
        return self._judge


# ---------------------------------------------------------------------------------------------------------------------
# a part
# ---------------------------------------------------------------------------------------------------------------------


def train_part(world: World, part: Part, *, device: str, stop: Callable[[], bool]) -> None:
    """Trains `part` from where it was left, and says so in its `done.json`.

    Raises:
        OutOfTime: `stop` said so; a checkpoint is on disk.
    """
    task = world.task(part)
    folder = part.folder(world.out)
    report, loss = None, None
    begun, wall = time.process_time(), time.monotonic()
    precision = "fp32" if device == "cpu" else "auto"
    job = TrainJob(
        task,
        folder,
        checkpoint_every_s=120.0,
        keep=1,
        report_every_s=15.0,
        device=device,
        precision=precision,
        stop=stop,
    )
    for report in train(job):
        if isinstance(report, StepReport):
            loss = report.loss
            world.say(f"{part.arm.name} {part.slot} seed {part.seed}: {report.step}/{report.steps} loss {loss:.4f}")
    done = _ended(report)
    if done.stopped:
        raise OutOfTime
    recipe = task.recipe
    write_json(
        part.done(world.out),
        {
            "checkpoint": done.folder.name,
            "steps": done.steps,
            "batch": recipe.train.batch,
            "rows": task.rows_used().count,
            "loss": loss,
            "probe_loss": json.loads((done.folder / "state.json").read_text())["probe_loss"],
            "training_flops": training_flops(recipe),  # type: ignore[arg-type]
            "cpu_s_of_last_session": round(time.process_time() - begun, 1),
            "wall_s_of_last_session": round(time.monotonic() - wall, 1),
            "recipe": recipe.to_dict(),  # type: ignore[attr-defined]
        },
    )


def _ended(report: Report | None) -> DoneReport:
    assert isinstance(report, DoneReport)  # train() always ends with one
    return report


def weights(part: Part, out: Path) -> Path:
    """The EMA weights of a part that is done."""
    done = json.loads(part.done(out).read_text())
    return part.folder(out) / "checkpoints" / str(done["checkpoint"]) / "ema.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# a cell
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judge:
    """Real pictures that drawn ones are compared with: the training rows, and the held-out rows as the floor."""

    extractor: EfficientNetLite0
    reference: Reference
    prompts: Prompts
    centroids: NDArray[np.float32]

    @classmethod
    def of(cls, world: World) -> _Judge:
        """Clusters are those of the largest K's encoder partition, for every arm alike: what a picture shows does not
        depend on how the training rows were divided."""
        clusters = world.scale.clusters[0]
        data, held = world.data, world.held
        labels = world.array(f"encoder-{clusters}.npy")
        features = data.features()
        prompts = Prompts(labels[held], data.captions(held), data.pixels(held))
        reference = Reference(features[: len(features) - len(held)], len(held))
        return cls(EfficientNetLite0(), reference, prompts, world.array(f"centroids-{clusters}.npy"))


def measure_floor(world: World) -> dict[str, Any]:
    """Every figure of the real held-out pictures themselves: what a perfect model would get."""
    judge = world.judge
    real = measure(judge.prompts.pixels, judge.prompts, judge.reference, judge.centroids, judge.extractor)
    background = background_accuracy(judge.prompts.pixels, judge.prompts.pixels, judge.prompts.captions)
    return {**real.as_dict(), "attribute_accuracy": background.real, "pictures": len(judge.prompts.pixels)}


def network(world: World, part: Part, device: str) -> Network:
    """The trained network of a part, ready to draw."""
    recipe = world.task(part).recipe
    model = build_router(recipe) if part.slot == ROUTER else build_expert(recipe)  # type: ignore[arg-type]
    load_weights(model, weights(part, world.out))
    return model.to(device).eval()


def run_cell(world: World, cell: Cell, *, device: str, stop: Callable[[], bool]) -> None:
    """Draws a picture for every held-out caption (kept on disk), measures them, writes the cell.

    Raises:
        OutOfTime: `stop` said so between two batches.
    """
    begun = time.process_time()
    path = cell.pictures(world.out)
    facts_path = path.with_suffix(".json")
    if not (path.is_file() and facts_path.is_file()):
        images, facts = _draw(world, cell, device, stop)
        write_array(path, images)
        write_json(facts_path, facts)
    images, facts = np.load(path, allow_pickle=False), json.loads(facts_path.read_text())
    judge = world.judge
    found = measure(images, judge.prompts, judge.reference, judge.centroids, judge.extractor)
    parts = [json.loads(part.done(world.out).read_text()) for part in cell.needs()]
    value = {
        "arm": asdict(cell.arm),
        "seed": cell.seed,
        "strategy": cell.strategy,
        "measures": found.as_dict(),
        "training_flops": sum(part["training_flops"] for part in parts),
        "held_out_loss": _held_out_loss(world, cell),
        "cpu_s": round(time.process_time() - begun, 1),
        "scale": world.scale.name,
        "settings": world.scale.digest(),
        **facts,
    }
    write_json(cell.done(world.out), value)
    world.say(f"{cell.name}: FID {found.distances.fid:.0f}, cluster {found.cluster_accuracy:.2f}")


def _held_out_loss(world: World, cell: Cell) -> float:
    """Mean probe loss of the arm's experts, weighed by how many of the held-out rows are each one's."""
    labels = world.labels(cell.arm)[world.held[:PROBE_ROWS]]
    share = np.bincount(labels, minlength=cell.arm.clusters) / len(labels)
    losses = [
        json.loads(part.done(world.out).read_text())["probe_loss"] for part in cell.needs() if part.slot != ROUTER
    ]
    return float(np.dot(share, losses))


def _draw(world: World, cell: Cell, device: str, stop: Callable[[], bool]) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    scale, arm, data = world.scale, cell.arm, world.data
    parts = {part.slot: part for part in cell.needs()}
    null = NullText(torch.from_numpy(np.array(data.null_states)).float().to(device), data.null_length)
    experts = {k: (lambda part=parts[str(k)]: network(world, part, device)) for k in range(arm.clusters)}
    router = network(world, parts[ROUTER], device) if ROUTER in parts else None
    ensemble = Ensemble(arm.clusters, experts, router, null)
    states, lengths = data.states(world.held)

    def on_step(_: object) -> None:
        if stop():
            raise OutOfTime

    pictures = draw(
        ensemble,
        states,
        lengths,
        shape=(int(data.manifest["channels"]), scale.resolution, scale.resolution),
        strategy=cell.strategy,
        steps=scale.sampling_steps,
        guidance=scale.guidance,
        seed=noise_seed(cell),
        batch=64,
        labels=world.labels(arm)[world.held].tolist(),
        device=device,
        on_step=on_step,
    )
    used = float((pictures.weights > 0).sum(axis=2).mean())
    sides = 1 if scale.guidance in (0.0, 1.0) else 2
    recipe = world.task(parts["0"]).recipe
    flops = used * sides * forward_flops(recipe.model)  # type: ignore[attr-defined]
    if ROUTER in parts:
        flops += forward_flops(world.task(parts[ROUTER]).recipe.model)  # type: ignore[attr-defined]
    return pictures.images, {"experts_used": used, "step_flops": flops}
