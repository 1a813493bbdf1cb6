"""Audit of a plan's probe set and bars: anyone with the recipe, and for all of it the data, can compute them again.

An organiser could pick probe rows that flatter, or write down bars that nobody can beat or anybody can. Compared here:
the resumable bars and the router's (they need nothing but the plan folder); with the data, the assemblable bars of the
experts, and whether the probe rows are those that the plan's seed draws and nobody may train on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from paris_swarm.cli.plan_folder import PlanFolder
from paris_swarm.cli.probing import open_half
from paris_swarm.cli.row_labels import router_allowance, row_labels
from paris_swarm.cli.tasks import ROUTER, check_data, data_facts, expert_recipe, start_files
from paris_swarm.dht_schemas.digest import blake3_hex

if TYPE_CHECKING:
    from paris_swarm.expert.data.shards import PreparedData


@dataclass(frozen=True)
class BarFigure:
    """One bar of the plan beside the one computed here; `problem` says how they disagree."""

    slot: str
    bar: str
    planned: float
    computed: float
    problem: str | None


@dataclass(frozen=True)
class Baselines:
    """What the audit found. `drawn_by_seed`: whether each half of the probe set is what the plan's seed draws from this
    data, None where it could not be compared. `unknown_rows`: probe rows that are no held-out row of their cluster.
    """

    bars: tuple[BarFigure, ...]
    drawn_by_seed: dict[str, bool | None]
    unknown_rows: dict[str, int]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def audit_baselines(
    plan_folder: PlanFolder, data: PreparedData | None, say: Callable[[str], None] = lambda _text: None
) -> Baselines:
    """Compute the plan's bars again, and with `data` check the probe set itself.

    Raises:
        ValueError: the data was prepared otherwise than the plan asks for.
    """
    say("computing the resumable bars")
    figures = _bars_without_data(plan_folder)
    drawn: dict[str, bool | None] = {"open": None, "sealed": None}
    unknown: dict[str, int] = {}
    problems: list[str] = []
    notes: list[str] = []
    if absent := _absent_starts(plan_folder):
        notes.append(
            f"the resumable bars of slot {', '.join(absent)} were not checked: pass --start-from, the start weights"
        )
    if data is None:
        notes.append("the experts' assemblable bars and the choice of probe rows were not checked: pass --data DATA")
    else:
        check_data(plan_folder, data)
        same = _same_source(plan_folder, data)
        say("looking for the probe rows in the data")
        unknown, drawn = _probe_rows(plan_folder, data)
        say("computing the assemblable bars")
        fitted = _assemblable(plan_folder, data)
        if same:
            figures += fitted
            if drawn["sealed"] and not absent:
                say("computing the bars of the sealed half")
                figures += _sealed_bars(plan_folder, data)
            problems += [
                f"{count} probe row(s) of slot {slot} are no held-out rows of that cluster"
                for slot, count in unknown.items()
                if count
            ]
            problems += [
                f"the {half} half of the probe set is not what the plan's seed draws from this data"
                for half, found in drawn.items()
                if found is False
            ]
        else:
            notes.append(
                "this is not the organiser's data (another source or number of rows): the assemblable bars below are "
                "those of your rows, and how the probe rows were chosen cannot be judged"
            )
            figures += [BarFigure(f.slot, f.bar, f.planned, f.computed, None) for f in fitted]
    problems = [f"slot {figure.slot}: {figure.problem}" for figure in figures if figure.problem] + problems
    return Baselines(tuple(figures), drawn, unknown, tuple(problems), tuple(notes))


def baselines_dict(found: Baselines) -> dict[str, Any]:
    """The audit as plain JSON values."""
    return asdict(found) | {"bars": [asdict(figure) for figure in found.bars]}


def _figure(plan_folder: PlanFolder, slot: str, bar: str, computed: float) -> BarFigure:
    planned = float(getattr(plan_folder.opened.plan.verification.bars[slot], bar))
    return _compared(plan_folder, slot, bar, planned, computed)


def _compared(plan_folder: PlanFolder, slot: str, bar: str, planned: float, computed: float) -> BarFigure:
    problem = None
    if abs(planned - computed) > plan_folder.opened.plan.verification.tolerance * abs(computed):
        problem = f"the plan's {bar} bar is {planned:.6g}, computed {computed:.6g}, more than the tolerance apart"
    return BarFigure(slot, bar, planned, computed, problem)


def _bars_without_data(plan_folder: PlanFolder) -> list[BarFigure]:
    from paris_swarm.expert.verify import resumable_bar
    from paris_swarm.router.recipe import RouterRecipe
    from paris_swarm.router.task import join_probes, router_assemblable_bar, router_resumable_bar

    plan = plan_folder.opened.plan
    rows = open_half(plan_folder)
    found = []
    for slot, probe in rows.probes.items():
        recipe = expert_recipe(plan, slot)
        start = plan_folder.start_weights(recipe)
        if recipe.start is None or start is not None:
            found.append(_figure(plan_folder, slot, "resumable", resumable_bar(recipe, probe, start)))
    union = join_probes(list(rows.probes.values()), plan.verification.probe_seed)
    router = RouterRecipe.from_dict(plan.router.recipe)
    allowance = router_allowance(plan.data)
    found.append(_figure(plan_folder, ROUTER, "resumable", allowance * router_resumable_bar(router, union)))
    found.append(_figure(plan_folder, ROUTER, "assemblable", allowance * router_assemblable_bar(union)))
    return found


def _assemblable(plan_folder: PlanFolder, data: PreparedData) -> list[BarFigure]:
    from paris_swarm.expert.rows import Rows, select_rows
    from paris_swarm.expert.verify import assemblable_bar

    seed = plan_folder.opened.plan.verification.probe_seed
    labels = row_labels(plan_folder, data)
    held_out = plan_folder.held_out()
    found = []
    for slot, probe in open_half(plan_folder).probes.items():
        rows = Rows(data, select_rows(data, labels, int(slot), held_out))
        found.append(_figure(plan_folder, slot, "assemblable", assemblable_bar(rows, probe, seed)))
    return found


def _sealed_bars(plan_folder: PlanFolder, data: PreparedData) -> list[BarFigure]:
    """The bars of the sealed half, which this data can draw again."""
    import tempfile
    from pathlib import Path

    from paris_swarm.cli.planning import choose_probe_rows, compute_bars, probe_bytes
    from paris_swarm.router.recipe import RouterRecipe

    plan, planned = plan_folder.opened.plan, plan_folder.sealed_bars
    seed = plan.verification.probe_seed
    labels = row_labels(plan_folder, data)
    experts = {str(k): expert_recipe(plan, str(k)) for k in range(plan.clusters)}
    recipes = experts, RouterRecipe.from_dict(plan.router.recipe)
    starts = start_files(plan_folder, experts.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sealed.safetensors"
        path.write_bytes(probe_bytes(data, choose_probe_rows(data, labels, plan.clusters, seed)[1]))
        computed = compute_bars(
            data, path, labels, plan_folder.held_out(), recipes, seed, router_allowance(plan.data), start_files=starts
        )
    return [
        _compared(plan_folder, slot, f"sealed {bar}", float(getattr(planned[slot], bar)), float(getattr(bars, bar)))
        for slot, bars in computed.items()
        if slot in planned
        for bar in ("resumable", "assemblable")
    ]


def _absent_starts(plan_folder: PlanFolder) -> list[str]:
    """Slots whose start weights neither travel with the plan nor were given."""
    plan = plan_folder.opened.plan
    recipes = {str(k): expert_recipe(plan, str(k)) for k in range(plan.clusters)}
    return [slot for slot, recipe in recipes.items() if recipe.start and plan_folder.start_weights(recipe) is None]


def _same_source(plan_folder: PlanFolder, data: PreparedData) -> bool:
    facts, planned = data_facts(data), plan_folder.opened.plan.data
    return all(planned.get(name) == facts[name] for name in ("source", "count"))


def _probe_rows(plan_folder: PlanFolder, data: PreparedData) -> tuple[dict[str, int], dict[str, bool | None]]:
    """How many probe rows of each slot are no held-out rows of its cluster in the data; whether the halves are drawn
    as `init` draws them.
    """
    import numpy as np
    from safetensors.numpy import load, load_file

    from paris_swarm.cli.planning import choose_probe_rows, probe_bytes

    plan = plan_folder.opened.plan
    labels = row_labels(plan_folder, data)
    forbidden = set(plan_folder.held_out())
    digests = np.asarray(data.digests)
    held = np.array([row for row in range(data.count) if digests[row].tobytes() in forbidden], dtype=np.int64)
    pixels, (states, _) = data.pixels(held), data.states(held)
    known = {
        (int(labels[row]), pixels[index].tobytes(), states[index].tobytes()) for index, row in enumerate(held.tolist())
    }
    probe = load_file(plan_folder.probe_path)
    unknown = {
        str(k): sum(
            (k, picture.tobytes(), text.tobytes()) not in known
            for picture, text in zip(probe[f"pixels.{k}"], probe[f"states.{k}"], strict=True)
        )
        for k in range(plan.clusters)
    }
    try:
        halves = choose_probe_rows(data, labels, plan.clusters, plan.verification.probe_seed)
    except ValueError:  # clusters too small here: other data than the organiser's
        return unknown, {"open": None, "sealed": None}
    as_drawn = load(probe_bytes(data, halves[0]))
    drawn_open = as_drawn.keys() == probe.keys() and all(np.array_equal(as_drawn[key], probe[key]) for key in probe)
    sealed = None
    if plan_folder.sealed_probe is not None:
        sealed = blake3_hex(probe_bytes(data, halves[1])) == plan_folder.sealed_probe
    return unknown, {"open": drawn_open, "sealed": sealed}
