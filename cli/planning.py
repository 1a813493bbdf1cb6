"""From prepared data to a signed plan folder: partition, held-out rows, recipes, bars, signature (`init`)."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from paris_swarm.cli import plan_folder as files
from paris_swarm.cli.tasks import data_facts
from paris_swarm.dht_schemas.digest import blake3_hex, digest_file
from paris_swarm.dht_schemas.files import atomic_write
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import file_entry
from paris_swarm.dht_schemas.plan import Bars, Plan, Policy, SlotSpec, TensorSpec, Verification, seal_plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.expert.recipe import Recipe
    from paris_swarm.expert.task import Task
    from paris_swarm.router.partition import ClusterReport
    from paris_swarm.router.recipe import RouterRecipe

PROBE_ROWS = 32
PROBE_SHARE = 8
"""Each half of the probe set takes at most PROBE_ROWS rows of a cluster, and at most one row in PROBE_SHARE."""


@dataclass(frozen=True)
class PlanOptions:
    """What the organiser decides. ``steps`` and ``router_steps`` None keep the named recipe's."""

    name: str
    clusters: int
    seed: int
    recipe: str
    router_recipe: str
    steps: int | None
    router_steps: int | None
    batch: int | None
    lease_s: float
    checkpoint_every_s: float
    grace_s: float
    replicas: int
    guidance: float
    created: int
    admission: Literal["open", "invited"] = "open"


@dataclass(frozen=True)
class PlanReport:
    """A plan was written to ``folder``; the sealed half of the probe set lies at ``sealed``."""

    folder: Path
    plan_id: str
    partition: ClusterReport
    bars: dict[str, Bars]
    sealed: Path


def write_plan(
    data: PreparedData,
    folder: Path,
    identity: Identity,
    options: PlanOptions,
    *,
    sealed_folder: Callable[[str], Path],
    say: Callable[[str], None] = lambda _text: None,
) -> PlanReport:
    """Partition the data and write the signed plan folder, whole or not at all.

    Args:
        sealed_folder: plan id -> where the organiser keeps the sealed half of the probe set.
        say: told what is being done.

    Raises:
        ValueError: the folder is not empty, or the data cannot make this many clusters.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: choose another with -o (a plan is never overwritten)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        report = _write(data, draft, folder, identity, options, sealed_folder, say)
        if folder.exists():
            folder.rmdir()
        for path in draft.iterdir():
            path.chmod(0o644)
        draft.chmod(0o755)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return report


def _write(
    data: PreparedData,
    draft: Path,
    folder: Path,
    identity: Identity,
    options: PlanOptions,
    sealed_folder: Callable[[str], Path],
    say: Callable[[str], None],
) -> PlanReport:
    import numpy as np
    from safetensors.numpy import save_file

    from paris_swarm.expert.verify import PROBE_TIMES
    from paris_swarm.router.partition import cluster_report, example_grid, partition

    say("clustering the features")
    found = partition(data.features(), options.clusters, seed=options.seed)
    report = cluster_report(data.features(), found, captions=data.captions(), seed=options.seed)
    grids = [f"cluster-{cluster}.png" for cluster in range(options.clusters)]
    for name, rows in zip(grids, report.examples, strict=True):
        atomic_write(draft / name, example_grid(data.pixels(rows)))

    say("choosing the probe set")
    open_rows, sealed_rows = choose_probe_rows(data, found.labels, options.clusters, options.seed)
    held = np.concatenate([*open_rows.values(), *sealed_rows.values()])
    digests = np.unique(np.asarray(data.digests)[held], axis=0)
    save_file({"centroids": found.centroids}, draft / files.CENTROIDS_FILE)
    save_file({"digests": np.ascontiguousarray(digests)}, draft / files.HELD_OUT_FILE)
    atomic_write(draft / files.PROBE_FILE, probe_bytes(data, open_rows))
    sealed_bytes = probe_bytes(data, sealed_rows)
    sealed_draft = draft / "sealed.safetensors"
    sealed_draft.write_bytes(sealed_bytes)

    say("computing the bars of the probe set")
    forbidden = [row.tobytes() for row in digests]
    specs, recipes = _specs(data, draft / files.PROBE_FILE, found.labels, forbidden, options)
    bars, sealed_bars = (
        compute_bars(data, path, found.labels, forbidden, recipes, options.seed)
        for path in (draft / files.PROBE_FILE, sealed_draft)
    )
    sealed_draft.unlink()
    names = [files.CENTROIDS_FILE, files.HELD_OUT_FILE, files.PROBE_FILE, *grids]
    plan = Plan.model_validate(
        {
            "name": options.name,
            "organiser": identity.peer_id,
            "created": options.created,
            "clusters": options.clusters,
            "seed": options.seed,
            "data": {**data_facts(data), "partition": partition_dict(report)},
            "expert": specs["expert"].model_dump(),
            "router": specs["router"].model_dump(),
            "policy": Policy(
                lease_s=options.lease_s,
                checkpoint_every_s=options.checkpoint_every_s,
                first_checkpoint_grace_s=options.grace_s,
                replicas=options.replicas,
                checkpoint_cap_bytes=_checkpoint_cap(specs),
            ).model_dump(),
            "sampling": {"guidance": options.guidance},
            "admission": options.admission,
            "router_slot": "open",
            "verification": {
                **Verification(probe_seed=options.seed, bars=bars).model_dump(),
                "probe_times": list(PROBE_TIMES),
                "sealed_probe": blake3_hex(sealed_bytes),
                "sealed_bars": {slot: pair.model_dump() for slot, pair in sealed_bars.items()},
            },
            "files": [file_entry(draft / name).model_dump() for name in sorted(names)],
        }
    )
    envelope = seal_plan(identity, plan)
    atomic_write(draft / files.PLAN_FILE, envelope)
    plan_id = digest_file(draft / files.PLAN_FILE)
    sealed_path = sealed_folder(plan_id) / "sealed-probe.safetensors"
    atomic_write(sealed_path, sealed_bytes, mode=0o600)
    return PlanReport(folder, plan_id, report, bars, sealed_path)


def partition_dict(report: ClusterReport) -> dict[str, Any]:
    """The cluster report as plain JSON values, without the example rows."""
    value = {key: item for key, item in asdict(report).items() if key != "examples"}
    return cast(dict[str, Any], json.loads(json.dumps(value)))


def choose_probe_rows(
    data: PreparedData, labels: NDArray[np.int64], clusters: int, seed: int
) -> tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.int64]]]:
    """Rows of the open and of the sealed half of the probe set, by slot; no picture with its caption is in both.

    Raises:
        ValueError: a cluster is too small to hold rows out of.
    """
    import numpy as np

    dice = np.random.Generator(np.random.Philox(key=[seed, 0x70726F6265]))
    digests = np.asarray(data.digests)
    halves: tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.int64]]] = ({}, {})
    for cluster in range(clusters):
        rows = np.flatnonzero(labels == cluster)
        _, first = np.unique(digests[rows], axis=0, return_index=True)
        unique = rows[np.sort(first)]
        take = min(PROBE_ROWS, len(unique) // PROBE_SHARE)
        if take < 1:
            raise ValueError(
                f"cluster {cluster} has only {len(unique)} different rows, at least {PROBE_SHARE} are needed to hold "
                "probe rows out: ask for fewer clusters, or prepare more images"
            )
        chosen = dice.permutation(unique)[: 2 * take]
        halves[0][str(cluster)] = np.sort(chosen[:take])
        halves[1][str(cluster)] = np.sort(chosen[take:])
    return halves


def probe_bytes(data: PreparedData, chosen: dict[str, NDArray[np.int64]]) -> bytes:
    """The probe file of these rows, by slot: the same rows give the same bytes."""
    import numpy as np

    from paris_swarm.expert.verify import probe_set_bytes

    parts = {slot: (data.pixels(rows), *data.states(rows)) for slot, rows in chosen.items()}
    return probe_set_bytes(parts, np.asarray(data.null_states), int(data.manifest["null_length"]))


def _specs(
    data: PreparedData, probe_path: Path, labels: NDArray[np.int64], held_out: list[bytes], options: PlanOptions
) -> tuple[dict[str, SlotSpec], tuple[Recipe, RouterRecipe]]:
    """Recipes fitted to the data, and the tensor tables of their checkpoints."""
    from paris_swarm.expert.recipe import named_recipe
    from paris_swarm.expert.rows import Rows, select_rows
    from paris_swarm.expert.task import ExpertTask
    from paris_swarm.expert.verify import load_probe
    from paris_swarm.router.recipe import named_router_recipe
    from paris_swarm.router.task import RouterTask, load_router_probe

    manifest = data.manifest
    shape = {"channels": manifest["channels"], "resolution": data.resolution, "text_dim": manifest["text"]["dim"]}
    recipe = named_recipe(options.recipe).with_data(**shape, text_tokens=manifest["text"]["tokens"])
    recipe = recipe.with_train(seed=options.seed, **_given(steps=options.steps, batch=options.batch))
    router = named_router_recipe(options.router_recipe).with_data(**shape, clusters=options.clusters)
    router = router.with_train(seed=options.seed, **_given(steps=options.router_steps))
    rows, rows_of_all = (Rows(data, select_rows(data, labels, cluster, held_out)) for cluster in (0, None))
    expert_task = ExpertTask(recipe, rows, load_probe(probe_path, "0", options.seed))
    union = load_router_probe(probe_path, options.clusters, options.seed)
    router_task = RouterTask(router, rows_of_all, labels, union)
    tables = {"expert": _spec(expert_task, recipe.to_dict()), "router": _spec(router_task, router.to_dict())}
    return tables, (recipe, router)


def compute_bars(
    data: PreparedData,
    probe_path: Path,
    labels: NDArray[np.int64],
    held_out: list[bytes],
    recipes: tuple[Recipe, RouterRecipe],
    seed: int,
) -> dict[str, Bars]:
    """The two bars of every slot on the rows of a probe file; the scalar predictors are fitted on training rows."""
    from paris_swarm.expert.rows import Rows, select_rows
    from paris_swarm.expert.verify import assemblable_bar, load_probe, resumable_bar
    from paris_swarm.router.task import load_router_probe, router_assemblable_bar, router_resumable_bar

    recipe, router = recipes
    clusters = router.model.clusters
    bars: dict[str, Bars] = {}
    for cluster in range(clusters):
        probe = load_probe(probe_path, str(cluster), seed)
        rows = Rows(data, select_rows(data, labels, cluster, held_out))
        bars[str(cluster)] = Bars(
            resumable=resumable_bar(recipe, probe), assemblable=assemblable_bar(rows, probe, seed)
        )
    union = load_router_probe(probe_path, clusters, seed)
    bars["router"] = Bars(resumable=router_resumable_bar(router, union), assemblable=router_assemblable_bar(union))
    return bars


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _spec(task: Task, recipe: dict[str, Any]) -> SlotSpec:
    from paris_swarm.expert.training import checkpoint_tables

    return SlotSpec(
        recipe=recipe,
        files={
            name: tuple(
                TensorSpec.model_validate({"name": tensor, "dtype": dtype, "shape": tuple(shape)})
                for tensor, dtype, shape in table
            )
            for name, table in checkpoint_tables(task).items()
        },
    )


def _checkpoint_cap(specs: dict[str, SlotSpec]) -> int:
    """Twice the largest checkpoint, and room for headers: what a peer may ask others to download."""
    largest = max(sum(tensor.nbytes for table in spec.files.values() for tensor in table) for spec in specs.values())
    return 2 * largest + (1 << 24)
