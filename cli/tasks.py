"""From a plan, a slot and prepared data to a training task. Runs in the trainer process and at `init`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from paris_swarm.cli.plan_folder import PlanFolder

if TYPE_CHECKING:
    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.expert.task import Task

ROUTER = "router"


def check_data(plan_folder: PlanFolder, data: PreparedData) -> None:
    """Refuse data prepared otherwise than the plan asks for.

    Raises:
        ValueError: names the first property that differs and both values.
    """
    asked = _pinned(plan_folder.opened.plan.data)
    for name, found in _pinned(data_facts(data)).items():
        if asked[name] != found:
            raise ValueError(
                f"the data in {data.folder} has {name} {found}, the plan asks for {asked[name]}: "
                "run `paris-swarm prepare` again with the plan's settings"
            )


def _pinned(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for two people's rows to train one expert; how long captions are may differ."""
    pinned = {name: facts.get(name) for name in ("resolution", "channels")}
    for part, names in (("text", ("name", "digest", "dim")), ("features", ("name", "digest", "dim", "size"))):
        pinned |= {f"{part} encoder {name}": facts.get(part, {}).get(name) for name in names}
    return pinned


def data_facts(data: PreparedData) -> dict[str, Any]:
    """What a plan pins about prepared data: encoders, sizes, licences."""
    manifest = data.manifest
    return {
        "source": manifest["source"],
        "licences": manifest["licences"],
        "count": data.count,
        "resolution": data.resolution,
        "channels": manifest["channels"],
        "text": manifest["text"],
        "features": manifest["features"],
    }


def build_task(plan_folder: PlanFolder, data: PreparedData, slot: str) -> Task:
    """The training task of a slot on this data.

    Raises:
        ValueError: the data does not fit the plan, or has no rows for the slot.
    """
    from paris_swarm.expert.recipe import Recipe
    from paris_swarm.expert.rows import Rows, select_rows
    from paris_swarm.expert.task import ExpertTask
    from paris_swarm.expert.verify import load_probe
    from paris_swarm.router.partition import nearest
    from paris_swarm.router.recipe import RouterRecipe
    from paris_swarm.router.task import RouterTask, load_router_probe

    check_data(plan_folder, data)
    plan = plan_folder.opened.plan
    labels = nearest(data.features(), plan_folder.centroids())
    held_out = plan_folder.held_out()
    seed, times = plan.verification.probe_seed, plan_folder.probe_times
    recipe = plan.slot_spec(slot).recipe
    if slot == ROUTER:
        rows = select_rows(data, None, None, held_out)
        present = set(labels[rows].tolist())
        lacking = [str(k) for k in range(plan.clusters) if k not in present]
        if lacking:
            raise ValueError(f"the router needs rows of every cluster; {data.folder} has none of {', '.join(lacking)}")
        union = load_router_probe(plan_folder.probe_path, plan.clusters, seed, times)
        return RouterTask(RouterRecipe.from_dict(recipe), Rows(data, rows), labels, union)
    rows = select_rows(data, labels, int(slot), held_out)
    probe = load_probe(plan_folder.probe_path, slot, seed, times)
    return ExpertTask(Recipe.from_dict(recipe), Rows(data, rows), probe)


def target_steps(plan_folder: PlanFolder) -> dict[str, int]:
    """Steps after which each slot is finished, by slot name."""
    plan = plan_folder.opened.plan
    return {slot: int(plan.slot_spec(slot).recipe["train"]["steps"]) for slot in plan.slots}
