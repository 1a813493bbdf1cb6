"""The tables of `benchmarks/reproduce.py`: ours beside the papers', what agrees, and which cells are empty."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from reproduce_grid import DENSE, Arm, Cell, Scale, arms, work
from reproduce_rates import table as rates_table

from paris_swarm.dht_schemas.files import atomic_write
from paris_swarm.expert.recipe import TrainConfig
from paris_swarm.router.evaluation.intervals import Interval
from paris_swarm.router.evaluation.tables import Column, columns, markdown
from paris_swarm.router.png import write_grid

DDM = {
    "dense": 12.81, "oracle": 10.46, "full": 10.52, "top-1": 9.84, "top-2": 10.31, "top-3": 10.37,
    "threshold-0.01": 10.46, "threshold-0.05": 10.37, "threshold-0.1": 10.15, "sample": 157.0,
}  # fmt: skip
"""FID of arXiv 2501.05450, Table 1: ImageNet, DiT-XL/2, K = 8."""
PARIS = {"dense": 29.64, "top-1": 30.60, "top-2": 22.60, "full": 47.89}
"""FID-50K of the lab's page on arXiv 2510.03434: LAION-Art, DiT-B/2, K = 8."""
SHOWN = 12

Figures = dict[str, float | None]


def read_cells(scale: Scale, out: Path) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """Finished cells: (arm, strategy) -> seed -> what the cell says; empty for those that are not.

    Raises:
        ValueError: two cells were made with different settings.
    """
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    settings: dict[str, Path] = {}
    for item in work(scale):
        if not isinstance(item, Cell):
            continue
        row = found.setdefault((item.arm.name, item.strategy), {})
        path = item.done(out)
        if path.is_file():
            cell = json.loads(path.read_text())
            settings.setdefault(cell["settings"], path)
            if len(settings) > 1:
                raise ValueError(f"made with different settings: {', '.join(map(str, settings.values()))}")
            row[item.seed] = cell
    return found


def figures(cell: dict[str, Any]) -> Figures:
    """The figures of a cell by column key."""
    found = cell["measures"]
    return {
        **found["distances"],
        "cluster_accuracy": found["cluster_accuracy"],
        "attribute_accuracy": found["attribute_accuracy"],
        "held_out_loss": cell["held_out_loss"],
        "step_gflops": cell["step_flops"] / 1e9,
        "experts_used": cell["experts_used"],
        "training_tflops": cell["training_flops"] / 1e12,
    }


def intervals(cells: Sequence[dict[str, Any]]) -> dict[str, Interval | None]:
    """Each figure over seeds; all dashes where no seed is done."""
    values = [figures(cell) for cell in cells]
    keys = values[0] if values else {}
    return {
        key: None if any(value[key] is None for value in values) else Interval.of([float(v[key] or 0) for v in values])
        for key in keys
    }


def own_columns() -> tuple[Column, ...]:
    """GFLOPs of a step, experts used, then the metrics."""
    metrics = columns("efficientnet-lite0", 80, published=False)
    return (
        Column("step_gflops", "GFLOPs a step", digits=3),
        Column("experts_used", "experts a step"),
        *metrics,
        Column("held_out_loss", "held-out loss", digits=4),
    )


# ---------------------------------------------------------------------------------------------------------------------
# what agrees
# ---------------------------------------------------------------------------------------------------------------------


def difference(first: dict[int, Any], second: dict[int, Any], key: str) -> Interval | None:
    """first - second over the seeds that both have, seed by seed; None where they share none."""
    shared = sorted(set(first) & set(second))
    pairs = [(figures(first[seed])[key], figures(second[seed])[key]) for seed in shared]
    values = [a - b for a, b in pairs if a is not None and b is not None]
    return Interval.of(values) if values else None


def word(found: Interval | None, expected: int) -> str:
    """ "agrees" or "contradicts" where the interval of the difference leaves out 0, else "not decided".

    expected: -1 where the papers say that the first is lower, 1 where they say higher, 0 where they disagree.
    """
    if found is None:
        return "empty"
    sign = 0 if found.half is None or abs(found.mean) <= found.half else (1 if found.mean > 0 else -1)
    if sign == 0:
        return "not decided"
    if expected == 0:
        return "lower" if sign < 0 else "higher"
    return "agrees" if sign == expected else "contradicts"


def claims(cells: dict[tuple[str, str], dict[int, dict[str, Any]]], clusters: int) -> list[tuple[str, str, str, str]]:
    """(what the papers say, FID difference, KID difference x 1000, word on FID and on KID), one row a claim."""
    own, random = f"encoder-{clusters}", f"random-{clusters}"
    asked = [
        ("Top-1 beats the dense model of the same FLOPs (DDM yes: 9.84 to 12.81; Paris no: 30.60 to 29.64)",
         (own, "top-1"), (DENSE, "top-1"), 0),
        ("Top-2 beats the dense model (DDM 10.31, Paris 22.60: both yes)", (own, "top-2"), (DENSE, "top-1"), -1),
        ("Full beats the dense model (DDM yes: 10.52; Paris no: 47.89)", (own, "full"), (DENSE, "top-1"), 0),
        ("Full is worse than Top-1 (both yes)", (own, "full"), (own, "top-1"), 1),
        ("Top-2 against Top-1 (DDM slightly worse, Paris much better)", (own, "top-2"), (own, "top-1"), 0),
        ("Sample is broken (DDM 157)", (own, "sample"), (own, "top-1"), 1),
        ("Random shards are worse than encoder clusters, Top-1 (DDM Fig. 4c)", (random, "top-1"), (own, "top-1"), 1),
        ("Random shards are worse than encoder clusters, Full", (random, "full"), (own, "full"), 1),
    ]  # fmt: skip
    rows = []
    for text, first, second, expected in asked:
        fid, kid = (difference(cells.get(first, {}), cells.get(second, {}), key) for key in ("fid", "kid"))
        scaled = None if kid is None else Interval(kid.mean * 1000, None if kid.half is None else kid.half * 1000, 0)
        said = " / ".join(dict.fromkeys([word(fid, expected), word(kid, expected)]))
        rows.append((text, fid.text(1) if fid else "-", scaled.text(1) if scaled else "-", said))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# the page
# ---------------------------------------------------------------------------------------------------------------------


def settings_lines(scale: Scale, out: Path) -> list[str]:
    """What was run, in sentences."""
    model, train = scale.model, scale.train
    source, count = data_of(scale, out)[:2]
    families = f" in {len(scale.families)} families" if source == "DiceBear" else ""
    return [
        f"Scale `{scale.name}`: {count} {source} pictures of {scale.resolution} px{families}, "
        f"{scale.held_out} of them held out (prompts, and the floor); networks of width {model.hidden}, depth "
        f"{model.depth}, patch {model.patch}; {train.steps} steps, {rates(train)}, schedule "
        f"{train.schedule}, EMA {train.ema}; dense batch {scale.dense_batch}, an expert's batch that / K; router of "
        f"width {scale.router.model.hidden}, {scale.router.train.steps} steps of {scale.router.train.batch}; pictures "
        f"by {scale.sampling_steps} Euler steps, guidance {scale.guidance:g}. Same optimiser, schedule and EMA on both "
        f"sides; experts take these rates times {scale.expert_rates:g}, the dense model times {scale.dense_rates:g}; "
        "the dense model takes more steps for what the router costs. One partition for all seeds; a seed "
        "decides initial weights, the order of rows and the noise.",
    ]


def data_of(scale: Scale, out: Path) -> tuple[str, int, Path | None]:
    """What the rows are called, how many there are, and where they lie (None where they are not at hand)."""
    if (out / "data.json").is_file():
        said = json.loads((out / "data.json").read_text())
        folder = Path(said["folder"])
        return str(said["source"]), int(said["count"]), folder if folder.is_dir() else None
    if (out / "data").is_dir():
        return "DiceBear", json.loads((out / "data" / "manifest.json").read_text())["count"], out / "data"
    return "DiceBear", scale.rows, None


def rates(train: TrainConfig) -> str:
    """The optimiser and its learning rates, before a side's factor."""
    if train.optimizer == "muon":
        return f"Muon at {train.matrix_lr:g} on the layers' matrices and AdamW at {train.lr:g} on the rest"
    return f"{train.optimizer} at {train.lr:g}"


def tables(scale: Scale, out: Path, doc: Path) -> str:
    """The generated part of the page: everything below the line that says so."""
    cells = read_cells(scale, out)
    floor_path = out / "floor.json"
    parts: list[str] = settings_lines(scale, out)
    if floor_path.is_file() and json.loads(floor_path.read_text())["attribute_accuracy"] is None:
        parts.append("No caption of these rows names a background colour that is seen in them: that column is empty.")
    if tried := rates_table(scale, out):
        parts += ["### Rates tried on both sides: held-out loss of short runs", tried]
    for arm in arms(scale):
        rows: dict[str, Any] = {}
        if floor_path.is_file():
            floor = json.loads(floor_path.read_text())
            flat = {**floor["distances"], **{k: floor[k] for k in ("cluster_accuracy", "attribute_accuracy")}}
            rows["real held-out pictures"] = {
                key: None if value is None else Interval.of([value]) for key, value in flat.items()
            }
        for strategy in arm.strategies(scale):
            row = cells[(arm.name, strategy)]
            done = f" ({len(row)} of {len(scale.seeds)} seeds)" if len(row) < len(scale.seeds) else ""
            rows[("dense" if arm.name == DENSE else strategy) + done] = intervals(list(row.values())) if row else {}
        parts += [f"### {heading(arm)}", training_line(arm, scale, out), markdown(rows, own_columns())]
    for clusters in scale.clusters:
        parts += [f"### What agrees, K = {clusters}", _claims_table(claims(cells, clusters))]
    parts += ["### Beside the papers", beside(scale, cells)]
    if sheet(scale, out, doc.with_suffix(".png")):
        parts.append(f"![real, dense, and each arm]({doc.with_suffix('.png').name})")
    parts += ["### Empty cells", empty_cells(scale, cells)]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def empty_cells(scale: Scale, cells: dict[tuple[str, str], dict[int, dict[str, Any]]]) -> str:
    """What is not done, seed by seed: a seed without any cell is one word, not a list."""
    missing = {seed: [" ".join(name) for name, row in cells.items() if seed not in row] for seed in scale.seeds}
    lines = [
        f"Seed {seed}: {'all of it' if len(names) == len(cells) else ', '.join(names)}."
        for seed, names in missing.items()
        if names
    ]
    return "\n".join(lines) or "None of this scale."


def heading(arm: Arm) -> str:
    if arm.name == DENSE:
        return "One dense model on all rows"
    return f"{arm.clusters} experts on {'encoder clusters' if arm.partition == 'encoder' else 'random shards'}"


def training_line(arm: Arm, scale: Scale, out: Path) -> str:
    """Training FLOPs of the first seed that is done, and the size of the parts' row sets."""
    from reproduce_grid import Part

    for seed in scale.seeds:
        parts = [Part(arm, seed, slot).done(out) for slot in arm.parts]
        if all(path.is_file() for path in parts):
            said = [json.loads(path.read_text()) for path in parts]
            rows = sorted(part["rows"] for part in said[: arm.clusters])
            total = sum(part["training_flops"] for part in said) / 1e12
            size = f"{rows[0]}" if rows[0] == rows[-1] else f"{rows[0]} to {rows[-1]}"
            return f"{total:.1f} training TFLOPs; {size} rows a model; {said[0]['steps']} steps of {said[0]['batch']}."
    return "Not trained yet."


def _claims_table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| the papers | FID difference | KID difference x1000 | here |", "|---|---|---|---|"]
    lines += [f"| {text} | {fid} | {kid} | {said} |" for text, fid, kid, said in rows]
    note = (
        'Differences are first minus second, seed by seed, with the 95 % interval of the mean; "not decided" where it '
        "holds 0, and where FID and KID say different things both are given."
    )
    return "\n".join(lines) + "\n\n" + note


def beside(scale: Scale, cells: dict[tuple[str, str], dict[int, dict[str, Any]]]) -> str:
    """FID over the dense model's FID, ours and the papers': ratios, for the extractors differ."""
    clusters = 8 if 8 in scale.clusters else scale.clusters[0]
    dense = cells[(DENSE, "top-1")]
    lines = [
        f"| FID / dense FID | DDM, ImageNet | Paris, LAION-Art | encoder, K = {clusters} | random, K = {clusters} |",
        "|---|---|---|---|---|",
    ]
    for strategy in arms(scale)[1].strategies(scale):
        shown = [f"{paper[strategy] / paper['dense']:.2f}" if strategy in paper else "-" for paper in (DDM, PARIS)]
        for partition in ("encoder", "random"):
            row = cells.get((f"{partition}-{clusters}", strategy), {})
            ratios = [fid(row[seed]) / fid(dense[seed]) for seed in sorted(set(row) & set(dense))]
            shown.append(Interval.of(ratios).text(2) if ratios else "-")
        lines.append(f"| {strategy} | {' | '.join(shown)} |")
    return "\n".join(lines)


def fid(cell: dict[str, Any]) -> float:
    return float(cell["measures"]["distances"]["fid"])


def sheet(scale: Scale, out: Path, path: Path) -> bool:
    """Pictures side by side for the same captions: real, dense, Top-1 of every arm; whether there was anything."""
    from paris_swarm.expert.data.shards import PreparedData

    found = [Cell(arm, scale.seeds[0], "top-1").pictures(out) for arm in arms(scale)]
    drawn = [np.load(each, allow_pickle=False) for each in found if each.is_file()]
    folder = data_of(scale, out)[2]
    if not drawn or folder is None:
        return False
    data = PreparedData.open(folder)
    held = np.arange(data.count - scale.held_out, data.count)
    chosen = np.linspace(0, scale.held_out - 1, min(SHOWN, scale.held_out)).astype(int)
    rows = [data.pixels(held[chosen]), *(images[chosen] for images in drawn)]
    names = ["real", *(arm.name for arm, each in zip(arms(scale), found, strict=True) if each.is_file())]
    write_grid(
        path,
        np.concatenate(rows),
        columns=len(chosen),
        scale=max(1, 72 // scale.resolution),
        text={"rows": ", ".join(names), "scale": scale.name},
    )
    return True


MARK = "<!-- generated by benchmarks/reproduce.py --report; what stands above this line is written by hand -->"


def write_report(scale: Scale, out: Path, doc: Path) -> None:
    """Replaces what stands below MARK in `doc`; a page without that line is all written by hand, and stays above it.

    Raises:
        ValueError: OUT holds cells of different settings.
    """
    above = doc.read_text().partition(MARK)[0].rstrip() if doc.is_file() else "# The claim, reproduced"
    doc.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(doc, f"{above}\n\n{MARK}\n\n{tables(scale, out, doc)}".encode())
