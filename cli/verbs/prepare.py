"""`paris-swarm prepare SOURCE OUT`: captioned images -> memory-mapped shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paris_swarm.cli.exits import Usage
from paris_swarm.cli.own_cluster import wanted_rows
from paris_swarm.cli.settings import HomeOption, JsonOption, settings

DEFAULT_RESOLUTION = 24


def prepare(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="`dicebear` (embedded, CC0); a folder in Hugging Face ImageFolder form (images and metadata.jsonl or "
            "metadata.csv with file_name and text); parquet files; a folder saved by `datasets`; webdataset tars."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    resolution: Annotated[
        int | None, typer.Option(min=8, max=1024, help="Side of the square pictures (default: 24, or the plan's).")
    ] = None,
    plan: Annotated[
        str | None, typer.Option("--plan", help="Plan folder or INVITE: prepare as that plan asks; with --cluster.")
    ] = None,
    cluster: Annotated[
        int | None, typer.Option("--cluster", min=0, help="Keep only the rows of this cluster of --plan.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=8, help="How many pictures (default: 4096 drawn ones, or all of a folder).")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that draw and threads that encode (default: one a core).")
    ] = None,
    family: Annotated[
        list[str] | None, typer.Option("--family", help="DiceBear style to draw; may be given several times.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawn attributes.")] = 0,
    image_column: Annotated[
        str | None, typer.Option(help="Column of image bytes in a table (default: image, jpg, png, ...).")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of captions in a table (default: text, caption, prompt, ...).")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a folder with a broken row instead of skipping it.")
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn captioned images into shards: pixels, caption token states, features, captions, digests, licences.

    The same input gives the same bytes. Rows that cannot be used are skipped, counted and named.
    """
    shared = settings(context, home, as_json)
    import os

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from paris_swarm.expert.data.dicebear import DEFAULT_FAMILIES
    from paris_swarm.expert.data.prepare import prepare as run
    from paris_swarm.expert.data.shards import PreparedData

    side, only = resolution or DEFAULT_RESOLUTION, None
    if plan is not None:
        side, only = wanted_rows(shared.open_home(), plan, cluster, resolution)
    elif cluster is not None:
        raise Usage("--cluster says which rows of a plan to keep: give --plan too")
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=shared.console) as bars:
        tasks = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        report = run(
            source,
            out,
            resolution=side,
            only=only,
            count=count,
            families=family or DEFAULT_FAMILIES,
            image_column=image_column,
            text_column=text_column,
            workers=workers or os.cpu_count() or 1,
            seed=seed,
            strict=strict,
            on_progress=on_progress,
        )
    facts = PreparedData.open(out).manifest
    seconds = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in report.seconds.items())
    licences = "; ".join(f"{item['what']}: {item['name']}" for item in facts["licences"]) or "no licence stated"
    lines = [f"{report.count} rows in {out}, {report.resolution} px ({seconds}). {licences}."]
    if report.skipped:
        lines.append(f"{len(report.skipped)} rows skipped:")
        lines += [f"  {item.file}: {item.why}" for item in report.skipped[:20]]
        if len(report.skipped) > 20:
            lines.append(f"  ... and {len(report.skipped) - 20} more, all named in {out / 'manifest.json'}")
    if kept := facts.get("kept"):
        lines.append(f"Kept the rows of cluster {kept['cluster']}, {report.count} of {kept['of']} looked at.")
        lines.append(f"Next: paris-swarm join --claim-cluster {kept['cluster']} --data {out}")
    else:
        lines.append(f"Next: paris-swarm init {out} -o plan")
    answer = {name: facts[name] for name in ("count", "resolution", "licences", "text", "features", "skipped")}
    shared.answer({"folder": str(out), **answer, "seconds": report.seconds}, "\n".join(lines))
