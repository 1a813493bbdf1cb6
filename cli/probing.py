"""Probe losses of weights that lie on disk: no network, no keys, only the plan and rows that nobody trained on.

Three kinds of rows: the **open** half of the plan's probe set; its **sealed** half, once the organiser has published
that file (the plan names its digest); an assembler's **own** rows, sorted into clusters by the plan's centroids. The
bars of both halves stand in the plan; for own rows they are computed here in the same way, the scalar predictor fitted
on the open half, because the training rows are not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paris_swarm.cli.exits import Unverified, Usage
from paris_swarm.cli.plan_folder import PlanFolder
from paris_swarm.cli.row_labels import router_allowance, row_labels
from paris_swarm.cli.tasks import ROUTER, check_data, expert_recipe
from paris_swarm.dht_schemas.digest import blake3_hex, digest_file
from paris_swarm.dht_schemas.plan import Bars

if TYPE_CHECKING:
    from torch import nn

    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.expert.verify import Probe
    from paris_swarm.router.task import RouterProbe

Kind = Literal["open", "sealed", "own"]

OWN_ROWS = 128
"""At most so many of an assembler's own rows a cluster, those with the smallest digests."""
FIT_ROWS = 16
"""A scalar predictor fitted on fewer rows says nothing about others: own rows are then judged by the resumable bar."""


@dataclass(frozen=True)
class ProbeRows:
    """Rows to judge by: `probes` by cluster slot (a cluster without rows is absent), `digest` of the file or the set.

    `held_out`, of own rows only: how many of each cluster's rows the plan forbids to train on. Of the others nobody can
    know whether they were trained on.
    """

    kind: Kind
    digest: str
    probes: Mapping[str, Probe]
    held_out: Mapping[str, int] | None = None

    def count(self, slot: str) -> int:
        """Rows of a cluster slot, or of all for the router."""
        if slot == ROUTER:
            return sum(len(probe) for probe in self.probes.values())
        return len(self.probes[slot]) if slot in self.probes else 0

    def count_held_out(self, slot: str) -> int | None:
        """How many of `count` the plan forbids to train on."""
        if self.held_out is None:
            return None
        return sum(self.held_out.values()) if slot == ROUTER else self.held_out.get(slot, 0)


# ---- rows -----------------------------------------------------------------------------------------------------------


def open_half(plan_folder: PlanFolder, slot: str = ROUTER) -> ProbeRows:
    """The rows that travel with the plan: those of one cluster slot, or all of them for the router."""
    return _from_file(plan_folder, plan_folder.probe_path, "open", digest_file(plan_folder.probe_path), slot)


def sealed_half(plan_folder: PlanFolder, path: Path) -> ProbeRows:
    """The organiser's published file of sealed rows, compared with the digest in the plan.

    Raises:
        Usage: there is no such file, or the plan names no sealed half.
        Unverified: it is not the file whose digest the plan has named since before anyone trained.
    """
    if not path.is_file():
        raise Usage(f"{path} is no file: name the sealed half of the probe set, as the organiser published it")
    if plan_folder.sealed_probe is None:
        raise Usage(f"the plan {plan_folder.plan_id[:12]} names no sealed half: no file can be compared with it")
    digest = digest_file(path)
    if digest != plan_folder.sealed_probe:
        raise Unverified(
            f"{path} is not the sealed half of this plan's probe set: its digest is {digest[:16]}..., the plan names "
            f"{plan_folder.sealed_probe[:16]}..."
        )
    return _from_file(plan_folder, path, "sealed", digest)


def _from_file(plan_folder: PlanFolder, path: Path, kind: Kind, digest: str, slot: str = ROUTER) -> ProbeRows:
    from paris_swarm.expert.verify import load_probe

    plan = plan_folder.opened.plan
    seed, times = plan.verification.probe_seed, plan_folder.probe_times
    slots = [slot] if slot != ROUTER else [str(k) for k in range(plan.clusters)]
    return ProbeRows(kind, digest, {name: load_probe(path, name, seed, times) for name in slots})


def own_rows(plan_folder: PlanFolder, data: PreparedData) -> ProbeRows:
    """Rows of a prepared folder, each in the cluster of its nearest centroid, at most OWN_ROWS a cluster.

    Raises:
        ValueError: prepared otherwise than the plan asks for.
        Usage: the plan's centroids or its list of held-out rows are not at hand.
    """
    import numpy as np
    import torch

    from paris_swarm.expert.flow import to_pixels
    from paris_swarm.expert.rows import mask_of
    from paris_swarm.expert.verify import Probe

    check_data(plan_folder, data)
    try:
        labels, forbidden = row_labels(plan_folder, data), set(plan_folder.held_out())
    except FileNotFoundError as error:
        raise Usage(f"{error.filename} is not there: rows cannot be sorted into clusters without it") from error
    plan = plan_folder.opened.plan
    digests = np.asarray(data.digests)
    null = torch.from_numpy(np.array(data.null_states)).float()
    null_text = (null[None], mask_of(torch.tensor([int(data.manifest["null_length"])]), null.shape[0]))
    probes: dict[str, Probe] = {}
    held_out: dict[str, int] = {}
    names: list[bytes] = []
    for cluster in range(plan.clusters):
        rows = np.flatnonzero(labels == cluster)
        if not len(rows):
            continue
        rows = np.array(sorted(rows.tolist(), key=lambda row: digests[row].tobytes())[:OWN_ROWS], dtype=np.int64)
        states, lengths = data.states(rows)
        chosen = [digests[row].tobytes() for row in rows]
        probes[str(cluster)] = Probe(
            x0=to_pixels(torch.from_numpy(np.array(data.pixels(rows)))),
            states=torch.from_numpy(np.array(states)).float(),
            mask=mask_of(torch.from_numpy(np.array(lengths)), states.shape[1]),
            null=null_text,
            seed=plan.verification.probe_seed,
            times=plan_folder.probe_times,
        )
        held_out[str(cluster)] = sum(digest in forbidden for digest in chosen)
        names += [f"{cluster}:".encode() + digest for digest in chosen]
    return ProbeRows("own", blake3_hex(b"".join(names)), probes, held_out)


# ---- losses ---------------------------------------------------------------------------------------------------------


def load_slot(plan_folder: PlanFolder, slot: str, weights: Path) -> nn.Module:
    """The network of a slot with the weights of a safetensors file.

    Raises:
        CheckpointError: the tensors are not those of the recipe.
        TooLarge: this machine has no memory for the recipe's network.
    """
    from paris_swarm.expert.checkpoint import load_weights
    from paris_swarm.expert.task import build_expert
    from paris_swarm.expert.verify import BATCH
    from paris_swarm.router.recipe import RouterRecipe
    from paris_swarm.router.task import build_router

    plan = plan_folder.opened.plan
    model: nn.Module
    if slot == ROUTER:
        model = build_router(RouterRecipe.from_dict(plan.router.recipe), BATCH)
    else:
        model = build_expert(expert_recipe(plan, slot), BATCH)
    load_weights(model, weights)
    return model


def slot_loss(model: nn.Module, slot: str, rows: ProbeRows) -> float | None:
    """Probe loss of a slot's network on `rows`; None where the slot has no rows (the router needs two clusters)."""
    if slot == ROUTER:
        from paris_swarm.router.task import router_probe_loss

        probe = union_of(rows)
        return None if probe is None else router_probe_loss(model, probe)
    from paris_swarm.expert.verify import expert_probe_loss

    return expert_probe_loss(model, rows.probes[slot]) if slot in rows.probes else None


def union_of(rows: ProbeRows) -> RouterProbe | None:
    """The rows of all clusters together, by which a router is judged; None where they are of fewer than two."""
    from paris_swarm.router.task import join_probes

    if len(rows.probes) < 2:
        return None
    probes = list(rows.probes.values())
    return join_probes(probes, probes[0].seed, [int(slot) for slot in rows.probes])


def bars_on(plan_folder: PlanFolder, rows: ProbeRows, fitted_on: ProbeRows) -> dict[str, Bars]:
    """The two bars of every slot that has rows: the plan's for its two halves, else computed in the same way, the
    scalar predictor fitted on `fitted_on` (the open half), which must not be `rows`.

    Raises:
        StartRefused: start weights that the plan names are not at hand.
    """
    plan = plan_folder.opened.plan
    if pinned := _pinned_bars(plan_folder, rows.kind):
        return pinned
    from paris_swarm.expert.verify import resumable_bar, scalar_bar
    from paris_swarm.router.recipe import RouterRecipe
    from paris_swarm.router.task import router_assemblable_bar, router_resumable_bar

    recipes = {slot: expert_recipe(plan, slot) for slot in rows.probes}
    bars = {
        slot: Bars(
            resumable=resumable_bar(recipes[slot], probe, plan_folder.start_weights(recipes[slot])),
            assemblable=scalar_bar(fitted_on.probes[slot].x0, probe, plan.verification.probe_seed),
        )
        for slot, probe in rows.probes.items()
    }
    union = union_of(rows)
    if union is not None:
        router = RouterRecipe.from_dict(plan.router.recipe)
        allowance = router_allowance(plan.data)
        bars[ROUTER] = Bars(
            resumable=allowance * router_resumable_bar(router, union),
            assemblable=allowance * router_assemblable_bar(union),
        )
    return bars


def _pinned_bars(plan_folder: PlanFolder, kind: Kind) -> dict[str, Bars]:
    """The bars that the plan has for rows of this kind; empty where it has none, or not those of every slot."""
    plan = plan_folder.opened.plan
    if kind == "open":
        return dict(plan.verification.bars)
    sealed = plan_folder.sealed_bars if kind == "sealed" else {}
    return sealed if set(sealed) == set(plan.slots) else {}


# ---- judging --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeFigure:
    """One slot on one kind of rows. `announced`: by the author, on the open half; by the assembler, on the rows that
    decided between checkpoints. `problem` says why it fails.
    """

    slot: str
    rows: Kind
    count: int
    held_out: int | None
    announced: float | None
    measured: float | None
    resumable: float
    assemblable: float
    problem: str | None


@dataclass(frozen=True)
class ProbeReport:
    """Figures of every slot on every kind of rows; `cross`[k][j] is expert k's loss on the open half's rows of cluster
    j, None where the expert is missing.
    """

    figures: tuple[ProbeFigure, ...]
    cross: tuple[tuple[float | None, ...], ...] | None
    bars: tuple[float, ...]
    """The assemblable bar of every cluster."""

    @property
    def problems(self) -> list[str]:
        return [f"slot {figure.slot}: {figure.problem}" for figure in self.figures if figure.problem]


def judge_slots(
    plan_folder: PlanFolder,
    weights: Mapping[str, Path],
    announced: Mapping[str, float],
    more: Sequence[ProbeRows] = (),
    *,
    recorded: Mapping[str, Mapping[str, float]] | None = None,
    cross: bool = False,
) -> ProbeReport:
    """Probe losses of the weights of some slots on the open half and on `more` rows.

    A slot fails where a value is not finite, where a loss is not the announced one within the plan's tolerance, or
    where it is not below the assemblable bar of its rows (the resumable one, for an expert on rows that are not the
    plan's while the open half has fewer than FIT_ROWS). recorded: digest of rows -> slot -> loss, as the lock has it.
    """
    from paris_swarm.expert.verify import expert_probe_loss, nonfinite_tensors

    plan = plan_folder.opened.plan
    open_rows = open_half(plan_folder)
    kinds = [(rows, bars_on(plan_folder, rows, open_rows)) for rows in (open_rows, *more)]
    pinned = {rows.kind for rows, _bars in kinds if _pinned_bars(plan_folder, rows.kind)}
    figures: list[ProbeFigure] = []
    table: list[list[float | None]] = [[None] * plan.clusters for _ in range(plan.clusters)]
    for slot, path in weights.items():
        bad = next(nonfinite_tensors(path), None)
        model = None if bad is not None else load_slot(plan_folder, slot, path)
        for rows, bars in kinds:
            if slot not in bars:
                continue
            said = announced[slot] if rows.kind == "open" else (recorded or {}).get(rows.digest, {}).get(slot)
            measured = slot_loss(model, slot, rows) if model is not None else None
            fair = rows.kind in pinned or slot == ROUTER or open_rows.count(slot) >= FIT_ROWS
            problem = (
                f"{bad} in {path.name} holds NaN or infinity"
                if bad is not None
                else _problem(plan.verification.tolerance, rows.kind, said, measured, bars[slot], fair)
            )
            figures.append(
                ProbeFigure(
                    slot=slot,
                    rows=rows.kind,
                    count=rows.count(slot),
                    held_out=rows.count_held_out(slot),
                    announced=said,
                    measured=_finite(measured),
                    resumable=bars[slot].resumable,
                    assemblable=bars[slot].assemblable,
                    problem=problem,
                )
            )
        if cross and slot != ROUTER and model is not None:
            table[int(slot)] = [_finite(expert_probe_loss(model, probe)) for probe in open_rows.probes.values()]
    return ProbeReport(
        tuple(figures),
        tuple(map(tuple, table)) if cross else None,
        tuple(plan.verification.bars[str(k)].assemblable for k in range(plan.clusters)),
    )


def _problem(
    tolerance: float, kind: Kind, announced: float | None, measured: float | None, bars: Bars, fair: bool
) -> str | None:
    # The comparisons of TrustedSwarm.feed_probe (SPEC R-VAL-1 to R-VAL-3), for rows of any kind.
    on = {"open": "the open half", "sealed": "the sealed half", "own": "your own rows"}[kind]
    if _finite(measured) is None or measured is None:
        return f"the probe loss on {on} is not finite [R-VAL-1]"
    if announced is not None and abs(measured - announced) > tolerance * abs(announced):
        return f"announced {announced:.6g}, measured {measured:.6g} on {on}, more than {tolerance:.2%} apart [R-VAL-2]"
    name, bar = ("assemblable", bars.assemblable) if fair else ("resumable", bars.resumable)
    if measured >= bar:
        return f"measured {measured:.6g} on {on}, the {name} bar is {bar:.6g} [R-VAL-3]"
    return None


def _finite(value: float | None) -> float | None:
    import math

    return value if value is not None and math.isfinite(value) else None


def report_dict(report: ProbeReport) -> dict[str, Any]:
    """The report as plain JSON values."""
    from dataclasses import asdict

    cross = None if report.cross is None else [list(row) for row in report.cross]
    return {"figures": [asdict(figure) for figure in report.figures], "cross": cross, "problems": report.problems}
