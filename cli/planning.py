"""From prepared data to a signed plan folder: partition, held-out rows, recipes, bars, signature (`init`)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paris_swarm.cli import plan_folder as files
from paris_swarm.cli.exits import Usage
from paris_swarm.cli.partitioning import check_report_folder, find_partition, partition_facts, write_report
from paris_swarm.cli.row_labels import all_captions, router_allowance
from paris_swarm.cli.tasks import data_facts
from paris_swarm.cli.variants import START_IN_PLAN, no_fit, parse_slots, slot_recipes, slot_specs
from paris_swarm.dht_schemas.digest import blake3_hex, digest_file
from paris_swarm.dht_schemas.files import atomic_write
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import file_entry
from paris_swarm.dht_schemas.plan import Bars, Plan, Policy, SlotSpec, TensorSpec, Verification, seal_plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from paris_swarm.dht_schemas.plan import ExpertVariant
    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.expert.recipe import Recipe
    from paris_swarm.expert.task import Task
    from paris_swarm.router.cluster_report import ClusterReport
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
    partition: str = "clusters"
    class_key: str | None = None
    balance: float | None = None
    slots: tuple[str, ...] = ()
    """What slots differ in, as ``init --slot`` takes it."""
    start_from: Path | None = None
    """Start weights of the experts, a file or a folder."""


@dataclass(frozen=True)
class PlanReport:
    """A plan was written to ``folder``; the sealed half of the probe set lies at ``sealed``."""

    folder: Path
    plan_id: str
    partition: ClusterReport
    bars: dict[str, Bars]
    sealed: Path
    kinds: dict[str, dict[str, str]]
    """Size, objective and precision of every cluster slot."""
    to_bring: tuple[str, ...]
    """Start weights that are too large to travel with the plan."""


def write_plan(
    data: PreparedData,
    folder: Path,
    identity: Identity,
    options: PlanOptions,
    *,
    sealed_folder: Callable[[str], Path],
    say: Callable[[str], None] = lambda _text: None,
    report_folder: Path | None = None,
) -> PlanReport:
    """Partition the data and write the signed plan folder, whole or not at all.

    Args:
        sealed_folder: plan id -> where the organiser keeps the sealed half of the probe set.
        say: told what is being done.
        report_folder: where the cluster report goes, None for nowhere.

    Raises:
        ValueError: a folder holds other things, or the data cannot make this many clusters, or was drawn by experts.
    """
    if data.manifest.get("drawn") is not None:
        raise ValueError(
            f"the rows in {data.folder} were drawn by the experts of a plan (`router rows`): they train that plan's "
            "router and nothing else; make a plan from a folder that `prepare` wrote"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: choose another with -o (a plan is never overwritten)")
    if report_folder is not None:
        if folder.absolute() in (report_folder.absolute(), *report_folder.absolute().parents):
            raise ValueError(f"{report_folder} lies in the plan's folder: choose another place with --report")
        check_report_folder(report_folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        report = _write(data, draft, folder, identity, options, sealed_folder, say, report_folder)
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
    report_folder: Path | None,
) -> PlanReport:
    import numpy as np
    from safetensors.numpy import save_file

    from paris_swarm.expert.settings import describe
    from paris_swarm.expert.verify import PROBE_TIMES
    from paris_swarm.router.cluster_report import cluster_report, example_grid

    settings = parse_slots(options.slots, options.clusters)
    recipes, start_files = slot_recipes(_base_recipe(data, options), settings, options.start_from)

    say("clustering the features")
    found = find_partition(
        data,
        options.clusters,
        seed=options.seed,
        method=options.partition,
        class_key=options.class_key,
        balance=options.balance,
    )
    report = cluster_report(data.features(), found, captions=all_captions(data), seed=options.seed)
    grids = {f"cluster-{k}.png": example_grid(data.thumbnails(rows)) for k, rows in enumerate(report.examples)}
    for name, png in grids.items():
        atomic_write(draft / name, png)

    say("choosing the probe set")
    open_rows, sealed_rows = choose_probe_rows(data, found.labels, options.clusters, options.seed)
    held = np.concatenate([*open_rows.values(), *sealed_rows.values()])
    digests = np.unique(np.asarray(data.digests)[held], axis=0)
    centroids = {"centroids": found.centroids} | ({} if found.biases is None else {"biases": found.biases})
    save_file(centroids, draft / files.CENTROIDS_FILE)
    save_file({"digests": np.ascontiguousarray(digests)}, draft / files.HELD_OUT_FILE)
    atomic_write(draft / files.PROBE_FILE, probe_bytes(data, open_rows))
    sealed_bytes = probe_bytes(data, sealed_rows)
    sealed_draft = draft / "sealed.safetensors"
    sealed_draft.write_bytes(sealed_bytes)

    say("computing the bars of the probe set")
    forbidden = [row.tobytes() for row in digests]
    carried, to_bring = _carry_starts(draft, start_files)
    expert, variants, router = _specs(data, draft / files.PROBE_FILE, found.labels, forbidden, options, recipes)
    allowance = router_allowance({"partition": {"method": found.method}})
    bars, sealed_bars = (
        compute_bars(
            data, path, found.labels, forbidden, (recipes, router[1]), options.seed, allowance, start_files=start_files
        )
        for path in (draft / files.PROBE_FILE, sealed_draft)
    )
    sealed_draft.unlink()
    names = [files.CENTROIDS_FILE, files.HELD_OUT_FILE, files.PROBE_FILE, *grids, *carried]
    plan = Plan.model_validate(
        {
            "name": options.name,
            "organiser": identity.peer_id,
            "created": options.created,
            "clusters": options.clusters,
            "seed": options.seed,
            "data": {**data_facts(data), "partition": partition_facts(found, report, options.balance)},
            "expert": expert.model_dump(),
            **({"variants": [variant.model_dump() for variant in variants]} if variants else {}),
            "router": router[0].model_dump(),
            "policy": Policy(
                lease_s=options.lease_s,
                checkpoint_every_s=options.checkpoint_every_s,
                first_checkpoint_grace_s=options.grace_s,
                replicas=options.replicas,
                checkpoint_cap_bytes=_checkpoint_cap(expert, *variants, router[0]),
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
    if report_folder is not None:  # last: an `init` that is refused leaves nothing behind
        write_report(report_folder, data, report, title=options.name, grids=list(grids.values()))
    kinds = {slot: describe(recipe) for slot, recipe in recipes.items()}
    return PlanReport(folder, plan_id, report, bars, sealed_path, kinds, tuple(to_bring))


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


def _data_shape(data: PreparedData) -> dict[str, int]:
    manifest = data.manifest
    return {"channels": manifest["channels"], "resolution": data.resolution, "text_dim": manifest["text"]["dim"]}


def _base_recipe(data: PreparedData, options: PlanOptions) -> Recipe:
    """The named recipe fitted to the data: what every slot has but for its own settings.

    Raises:
        Usage: its patches do not divide the pictures; recipes and resolutions that fit are named.
    """
    from paris_swarm.expert.recipe import named_recipe

    named = named_recipe(options.recipe)
    if data.resolution % named.model.patch:
        raise Usage(no_fit(options.recipe, named.model.patch, data))
    recipe = named.with_data(**_data_shape(data), text_tokens=data.manifest["text"]["tokens"])
    return recipe.with_train(seed=options.seed, **_given(steps=options.steps, batch=options.batch))


def _carry_starts(draft: Path, start_files: Mapping[str, Path]) -> tuple[list[str], list[str]]:
    """Put start weights into the plan folder: (names of those there, names of those too large for it)."""
    carried, to_bring = [], []
    for digest, path in start_files.items():
        if path.stat().st_size > START_IN_PLAN:
            to_bring.append(path.name)
            continue
        carried.append(files.start_name(digest))
        shutil.copyfile(path, draft / files.start_name(digest))
    return carried, to_bring


def _specs(
    data: PreparedData,
    probe_path: Path,
    labels: NDArray[np.int64],
    held_out: list[bytes],
    options: PlanOptions,
    recipes: Mapping[str, Recipe],
) -> tuple[SlotSpec, tuple[ExpertVariant, ...], tuple[SlotSpec, RouterRecipe]]:
    """The experts' recipes with the tensor tables of their checkpoints, and the router's with its recipe."""
    from paris_swarm.expert.rows import Rows, select_rows
    from paris_swarm.expert.task import ExpertTask
    from paris_swarm.expert.verify import load_probe
    from paris_swarm.router.recipe import named_router_recipe
    from paris_swarm.router.task import RouterTask, load_router_probe

    router = named_router_recipe(options.router_recipe).with_data(**_data_shape(data), clusters=options.clusters)
    router = router.with_train(seed=options.seed, **_given(steps=options.router_steps))
    rows, rows_of_all = (Rows(data, select_rows(data, labels, cluster, held_out)) for cluster in (0, None))
    probe = load_probe(probe_path, "0", options.seed)
    expert, variants = slot_specs(recipes, lambda recipe: _spec(ExpertTask(recipe, rows, probe), recipe.to_dict()))
    union = load_router_probe(probe_path, options.clusters, options.seed)
    router_task = RouterTask(router, rows_of_all, labels, union)
    return expert, variants, (_spec(router_task, router.to_dict()), router)


def compute_bars(
    data: PreparedData,
    probe_path: Path,
    labels: NDArray[np.int64],
    held_out: list[bytes],
    recipes: tuple[Mapping[str, Recipe], RouterRecipe],
    seed: int,
    allowance: float = 1.0,
    *,
    start_files: Mapping[str, Path],
) -> dict[str, Bars]:
    """The two bars of every slot on the rows of a probe file; the scalar predictors are fitted on training rows.

    recipes: every cluster slot's, and the router's. allowance: what the router's bars are multiplied by
    (`row_labels.router_allowance`). start_files: the file of each start weights that a recipe names, by digest.

    Raises:
        NotADiT: start weights do not fit the recipe. StartRefused: they are not at hand.
    """
    from paris_swarm.expert.rows import Rows, select_rows
    from paris_swarm.expert.verify import assemblable_bar, load_probe, resumable_bar
    from paris_swarm.router.task import load_router_probe, router_assemblable_bar, router_resumable_bar

    experts, router = recipes
    clusters = router.model.clusters
    bars: dict[str, Bars] = {}
    for cluster in range(clusters):
        probe = load_probe(probe_path, str(cluster), seed)
        rows = Rows(data, select_rows(data, labels, cluster, held_out))
        recipe = experts[str(cluster)]
        start = start_files.get(recipe.start.digest) if recipe.start is not None else None
        bars[str(cluster)] = Bars(
            resumable=resumable_bar(recipe, probe, start), assemblable=assemblable_bar(rows, probe, seed)
        )
    union = load_router_probe(probe_path, clusters, seed)
    bars["router"] = Bars(
        resumable=allowance * router_resumable_bar(router, union),
        assemblable=allowance * router_assemblable_bar(union),
    )
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


def _checkpoint_cap(*specs: SlotSpec) -> int:
    """Twice the largest checkpoint, and room for headers: what a peer may ask others to download."""
    largest = max(sum(tensor.nbytes for table in spec.files.values() for tensor in table) for spec in specs)
    return 2 * largest + (1 << 24)
