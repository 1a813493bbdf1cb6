"""From a plan, a slot and prepared data to a training task. Runs in the trainer process and at `init`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paris_swarm.cli.plan_folder import PlanFolder
from paris_swarm.cli.row_labels import row_labels

if TYPE_CHECKING:
    from paris_swarm.dht_schemas.plan import Plan
    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.expert.recipe import Recipe
    from paris_swarm.expert.task import Task

ROUTER = "router"


def check_data(plan_folder: PlanFolder, data: PreparedData, *, slot: str | None = None) -> None:
    """Refuse data prepared otherwise than the plan asks for; rows drawn from its experts are good for its router only.

    Raises:
        ValueError: names the first property that differs and both values.
    """
    drawn = data.manifest.get("drawn")
    if drawn is not None and (slot != ROUTER or drawn.get("plan") != plan_folder.plan_id):
        raise ValueError(
            f"the rows in {data.folder} were drawn by experts of plan {str(drawn.get('plan'))[:12]}: they train that "
            "plan's router (`join --claim-router`) and nothing else"
        )
    asked = _pinned(plan_folder.opened.plan.data)
    for name, found in _pinned(data_facts(data)).items():
        if asked[name] != found:
            raise ValueError(
                f"the data in {data.folder} has {name} {found}, the plan asks for {str(asked[name])[:100]}: "
                "run `paris-swarm prepare` again with the plan's settings"
            )


def _pinned(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for two people's rows to train one expert; how long captions are may differ."""

    def of(part: str) -> Mapping[str, Any]:
        said = facts.get(part)  # of a plan that another program signed: anything
        return said if isinstance(said, Mapping) else {}

    pinned = {name: facts.get(name) for name in ("resolution", "channels")}
    for part, names in (("text", ("name", "digest", "dim")), ("features", ("name", "digest", "dim", "size"))):
        pinned |= {f"{part} encoder {name}": of(part).get(name) for name in names}
    latents = of("latents")
    return pinned | {f"VAE {name}": latents.get(name) for name in ("name", "digest", "scale", "shift", "pixels")}


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
        **({"latents": manifest["latents"]} if manifest.get("latents") else {}),
    }


def build_task(plan_folder: PlanFolder, data: PreparedData, slot: str) -> Task:
    """The training task of a slot on this data.

    Raises:
        ValueError: the data does not fit the plan, or has no rows for the slot.
    """
    from paris_swarm.expert.rows import Rows, select_rows
    from paris_swarm.expert.task import ExpertTask
    from paris_swarm.expert.verify import load_probe
    from paris_swarm.router.drawn_rows import DRAWN, drawn_labels
    from paris_swarm.router.recipe import RouterRecipe
    from paris_swarm.router.task import RouterTask, load_router_probe

    check_data(plan_folder, data, slot=slot)
    plan = plan_folder.opened.plan
    labels = drawn_labels(data.manifest)
    if labels is None:
        labels = row_labels(plan_folder, data)
    held_out = plan_folder.held_out()
    seed, times = plan.verification.probe_seed, plan_folder.probe_times
    if slot == ROUTER:
        rows = select_rows(data, None, None, held_out)
        present = set(labels[rows].tolist())
        lacking = [str(k) for k in range(plan.clusters) if k not in present]
        if lacking:
            raise ValueError(f"the router needs rows of every cluster; {data.folder} has none of {', '.join(lacking)}")
        union = load_router_probe(plan_folder.probe_path, plan.clusters, seed, times)
        drawn_by = data.manifest[DRAWN]["experts"] if DRAWN in data.manifest else None
        return RouterTask(RouterRecipe.from_dict(plan.router.recipe), Rows(data, rows), labels, union, drawn_by)
    rows = select_rows(data, labels, int(slot), held_out)
    probe = load_probe(plan_folder.probe_path, slot, seed, times)
    recipe = expert_recipe(plan, slot)
    return ExpertTask(recipe, Rows(data, rows), probe, plan_folder.start_weights(recipe))


def expert_recipe(plan: Plan, slot: str) -> Recipe:
    """What the plan says of a cluster slot. Raises ValueError: no such slot, or a recipe this version cannot read."""
    from paris_swarm.expert.recipe import Recipe

    return Recipe.from_dict(plan.slot_spec(slot).recipe)


def start_files(plan_folder: PlanFolder, recipes: Iterable[Recipe]) -> dict[str, Path]:
    """The files of start weights that are at hand, by the digest that a recipe names; their bytes are not read."""
    found = {recipe.start.digest: plan_folder.start_weights(recipe) for recipe in recipes if recipe.start is not None}
    return {digest: path for digest, path in found.items() if path is not None}


def check_starts(plan_folder: PlanFolder, slots: Iterable[str]) -> None:
    """Refuse to train a cluster slot of which the start weights are not at hand, or are not the plan's.

    Raises:
        StartRefused: which file is needed, or that it holds other bytes.
    """
    from paris_swarm.expert.pretrained import check_start, missing_start

    checked: set[str] = set()
    for slot in slots:
        recipe = expert_recipe(plan_folder.opened.plan, slot)
        if recipe.start is None or recipe.start.digest in checked:
            continue
        path = plan_folder.start_weights(recipe)
        if path is None:
            raise missing_start(recipe.start)
        check_start(path, recipe.start)
        checked.add(recipe.start.digest)


def check_recipes(plan_folder: PlanFolder) -> None:
    """Refuse a plan of which a recipe, whatever slot's, cannot be read here: a peer checks the weights of all slots.

    Raises:
        ValueError: an unknown field, or a value beyond its bounds (R-PLAN-5); it is named.
    """
    from paris_swarm.expert.recipe import Recipe
    from paris_swarm.router.recipe import RouterRecipe

    plan = plan_folder.opened.plan
    try:
        for spec in (plan.expert, *plan.variants):
            Recipe.from_dict(spec.recipe)
        RouterRecipe.from_dict(plan.router.recipe)
    except ValueError as error:
        raise ValueError(f"the plan {plan_folder.plan_id[:12]} cannot be used: {error}") from error


def check_memory(plan_folder: PlanFolder, slots: Sequence[str], device: str, micro_batch: int, processes: int) -> None:
    """Refuse slots whose training this machine has no memory for, before one is claimed.

    Raises:
        TooLarge: which slot, what it takes and what there is; of several slots, which fit.
    """
    import torch

    from paris_swarm.expert.memory import TooLarge, check_training
    from paris_swarm.router.recipe import RouterRecipe

    plan = plan_folder.opened.plan
    refused: dict[str, TooLarge] = {}
    for slot in slots:
        recipe = RouterRecipe.from_dict(plan.router.recipe) if slot == ROUTER else expert_recipe(plan, slot)
        own = recipe.train.batch // processes
        try:
            rows = min(micro_batch or own, own)
            check_training(recipe.model, recipe.train, torch.device(device), rows=rows, what=f"slot {slot} of the plan")
        except TooLarge as error:
            refused[slot] = error
    if refused:
        fitting = [slot for slot in slots if slot not in refused]
        first = next(iter(refused.values()))
        raise TooLarge(f"{first}; what fits here: slot {', '.join(fitting)}") if fitting else first


def target_steps(plan_folder: PlanFolder) -> dict[str, int]:
    """Steps after which each slot is finished, by slot name."""
    plan = plan_folder.opened.plan
    return {slot: int(plan.slot_spec(slot).recipe["train"]["steps"]) for slot in plan.slots}
