"""`paris-swarm evaluate DIR --data DATA`: how good an assembled model's pictures are, strategy by strategy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paris_swarm.cli.folder_options import (
    AllowMissingOption,
    FolderVaeOption,
    GuidanceOption,
    MemoryBudgetOption,
    PlanOption,
    SamplerOption,
    StepsOption,
    pinned_plan,
)
from paris_swarm.cli.settings import DeviceOption, HomeOption, JsonOption, settings
from paris_swarm.cli.sizes import parse_size

if TYPE_CHECKING:
    from paris_swarm.cli.evaluating import Asked, Judged
    from paris_swarm.router.evaluation.measure import Extractor
    from paris_swarm.router.evaluation.tables import Column
    from paris_swarm.router.folder import Assembled

SHOWN = 12
"""Pictures of each strategy in the side-by-side sheet."""


def evaluate(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder written by `assemble`.")],
    data: Annotated[Path, typer.Option("--data", help="Prepared rows to judge by; the plan's held-out rows if there.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for tables, sheet and pictures; what is there is not redrawn.")
    ] = Path("evaluation"),
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy",
            help="What to measure, as `sample --strategy` names it, or oracle (each caption's own cluster); may be "
            "given several times (default: all).",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Seeds of the noise; intervals are over them.")] = 3,
    pictures: Annotated[int, typer.Option(min=4, help="Captions drawn a strategy and seed (at most).")] = 256,
    sampler: SamplerOption = "euler",
    steps: StepsOption = 50,
    guidance: GuidanceOption = None,
    inception: Annotated[
        Path | None,
        typer.Option("--inception", help="Folder with the InceptionV3 weights of the published FID, as safetensors."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option("--features", help="The plan's image encoder, folder or hub name, where it is not built in."),
    ] = None,
    vae: FolderVaeOption = None,
    memory_budget: MemoryBudgetOption = None,
    allow_missing: AllowMissingOption = False,
    device: DeviceOption = "auto",
    plan: PlanOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify the folder, draw the held-out captions with every strategy, compare with real pictures.

    FID and KID in the features of the plan's image encoder (beside the floor of real against real: never compare them
    with published figures), improved precision and recall, the share of pictures in their caption's own cluster and
    with its background colour; FID as published where --inception has the weights.
    """
    shared = settings(context, home, as_json)
    from rich.progress import Progress

    from paris_swarm.cli.encoders import place_said
    from paris_swarm.cli.evaluating import FLOOR, Asked, Drawn, Evaluation, check_rows, choose_rows, default_strategies
    from paris_swarm.cli.exits import Usage
    from paris_swarm.cli.outputs import check_outside
    from paris_swarm.cli.plan_folder import PlanFolder
    from paris_swarm.cli.settings import pick_device
    from paris_swarm.dht_schemas.files import atomic_write
    from paris_swarm.expert.data.encoders import named_feature_encoder
    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.router.draw import DrawStep
    from paris_swarm.router.encoder_files import check_encoder
    from paris_swarm.router.evaluation.inception import FidInception
    from paris_swarm.router.evaluation.tables import columns, figures, interval_dict, markdown, over_seeds
    from paris_swarm.router.folder import open_folder
    from paris_swarm.router.layout import plan_guidance, pretty
    from paris_swarm.router.plan_facts import encoder_facts, picture_side
    from paris_swarm.router.samplers import named_sampler
    from paris_swarm.router.strategies import Strategy

    check_outside(out, folder, "-o")
    named_sampler(sampler)
    for name in strategy or ():
        Strategy.parse(name, None)
    where = pick_device(device)
    assembled = open_folder(
        folder,
        plan_id=pinned_plan(plan),
        device=where,
        allow_missing=allow_missing,
        memory_budget=None if memory_budget is None else parse_size(memory_budget, option="--memory-budget"),
        vae=vae,
    )
    opened = assembled.verified.plan
    plan_folder = PlanFolder(assembled.verified.path / "plan", opened)
    clusters = opened.plan.clusters
    asked = Asked(
        tuple(dict.fromkeys(strategy or default_strategies(clusters, assembled.missing))),
        seeds,
        pictures,
        sampler,
        steps,
        plan_guidance(opened) if guidance is None else guidance,
    )
    for name in asked.strategies:
        if Strategy.parse(name, clusters).kind == "oracle" and assembled.missing:
            raise Usage(f"--strategy oracle needs every expert; missing: {', '.join(assembled.missing)}")
    facts = opened.plan.data
    prepared = PreparedData.open(data)
    encoder_facts(facts, "text", "its text encoder")
    image_encoder = encoder_facts(facts, "features", "its image encoder")
    check_rows(plan_folder, prepared, picture_side(facts))
    extractor = named_feature_encoder(features or place_said(image_encoder), device=str(where))
    check_encoder(extractor, image_encoder, "image encoder")
    published: Extractor | None = None if inception is None else FidInception(inception)
    judged = choose_rows(plan_folder, prepared, pictures, keep_pixels=published is not None)
    with Progress(console=shared.console, transient=True) as bars:
        task = bars.add_task("real pictures", total=None)
        judge = Evaluation(
            assembled, plan_folder, prepared, judged, extractor, published, out, lambda text: shared.console.print(text)
        )
        floor = judge.floor()
        drawn: dict[str, list[Drawn]] = {}
        whole = len(asked.strategies) * seeds
        for name in asked.strategies:
            for seed in range(seeds):
                number = sum(map(len, drawn.values()))
                bars.update(task, description=f"{name}, seed {seed}", total=whole, completed=number)

                def on_step(done: DrawStep, number: int = number) -> None:
                    within = ((done.batch - 1) * done.steps + done.step) / (done.batches * done.steps)
                    bars.update(task, completed=number + within)

                drawn.setdefault(name, []).append(judge.measured(name, seed, asked, on_step))

    rows = {FLOOR: over_seeds([figures(floor)])}
    rows |= {name: over_seeds([figures(each.measures) for each in found]) for name, found in drawn.items()}
    shown = columns(extractor.name, extractor.size, published is not None)
    sheet = out / "pictures.png"
    _write_sheet(sheet, judged, {name: found[0] for name, found in drawn.items()}, assembled, asked)
    notes = _notes(judged, asked, extractor, published)
    report: dict[str, Any] = {
        "plan": assembled.plan_id,
        "assembly": assembled.digest,
        "data": str(data),
        "pictures": len(judged.rows),
        "real_pictures": len(judged.features),
        "held_out": judged.held_out,
        "extractor": {"name": extractor.name, "digest": image_encoder["digest"], "side": extractor.size},
        "published_extractor": None if published is None else {"name": published.name, "side": published.size},
        "sampler": sampler,
        "steps": steps,
        "guidance": asked.guidance,
        "missing": list(assembled.missing),
        "floor": figures(floor),
        "strategies": {
            name: {
                "experts_used": sum(each.experts_used for each in found) / len(found),
                "seeds": [each.measures.as_dict() for each in found],
                "over_seeds": interval_dict(rows[name]),
            }
            for name, found in drawn.items()
        },
        "sheet": str(sheet),
    }
    table = markdown(rows, shown)
    atomic_write(out / "evaluation.json", pretty(report))
    atomic_write(out / "evaluation.md", _page(table, notes, assembled, shown).encode())
    shared.answer(report, f"{table}\n" + "\n".join([*notes, f"Tables: {out}/evaluation.md and .json; sheet: {sheet}"]))


def _notes(judged: Judged, asked: Asked, extractor: Extractor, published: Extractor | None) -> list[str]:
    """What a reader of the table must know."""
    rows = "rows that the plan forbids to train on" if judged.held_out else "rows that somebody may have trained on"
    interval = f"± is the 95 % interval of the mean over {asked.seeds} seeds of the noise"
    notes = [
        f"{len(judged.rows)} pictures a strategy and seed, from captions of {rows}; "
        f"{interval if asked.seeds > 1 else 'one seed of the noise: no interval'}.",
        f"FID and KID are in the features of {extractor.name} at {extractor.size} px, against {len(judged.features)} "
        "other real pictures: read them against the first line, not against published figures.",
    ]
    if published is None:
        notes.append("FID as published is absent: its InceptionV3 weights were not given (--inception FOLDER).")
    return notes


def _page(table: str, notes: list[str], assembled: Assembled, shown: tuple[Column, ...]) -> str:
    heads = ", ".join(column.head for column in shown)
    return (
        f"# Evaluation of assembly {assembled.digest[:16]}\n\nPlan {assembled.plan_id}. Columns: {heads}.\n\n"
        f"{table}\n" + "\n".join(f"{note}  " for note in notes) + "\n\n![pictures side by side](pictures.png)\n"
    )


def _write_sheet(path: Path, judged: Judged, drawn: dict[str, Any], assembled: Assembled, asked: Asked) -> None:
    """One line of pictures for the real ones, then one a strategy in the order given, for the same captions."""
    import numpy as np

    from paris_swarm.router.png import Origin, provenance, write_grid

    count = len(judged.rows)
    chosen = np.linspace(0, count - 1, min(SHOWN, count)).astype(int)
    lines = [judged.prompts.pixels[chosen], *(found.images[chosen] for found in drawn.values())]
    captions = [str(judged.prompts.captions[place]["text"]) for place in chosen]
    origin = Origin(
        prompts=tuple(captions),
        seed=0,
        strategy=", ".join(["real", *drawn]),
        sampler=asked.sampler,
        steps=asked.steps,
        guidance=asked.guidance,
        plan_id=assembled.plan_id,
        assembly=assembled.digest,
        missing=assembled.missing,
    )
    side = lines[0].shape[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_grid(path, np.concatenate(lines), columns=len(chosen), text=provenance(origin), scale=max(1, 72 // side))
