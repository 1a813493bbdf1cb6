"""`paris-swarm prepare SOURCE OUT`: captioned images -> memory-mapped shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paris_swarm.cli.encoders import chosen_encoders, encoders_there
from paris_swarm.cli.exits import Usage
from paris_swarm.cli.settings import DeviceOption, HomeOption, JsonOption, Settings, pick_device, settings

if TYPE_CHECKING:
    from paris_swarm.expert.data.prepare import Part, PrepareReport

DEFAULT_RESOLUTION = 24


def prepare(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="`dicebear` (embedded, CC0); a folder in Hugging Face ImageFolder form (images and metadata.jsonl or "
            "metadata.csv with file_name and text), or a folder of images for each class; parquet files; a folder "
            "saved by `datasets`; webdataset tars."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    resolution: Annotated[
        int | None, typer.Option(min=8, max=1024, help="Side of the square pictures (default: 24, or the plan's).")
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan", help="Plan folder or INVITE: prepare as that plan asks (with --cluster, one cluster of it)."
        ),
    ] = None,
    cluster: Annotated[
        int | None, typer.Option("--cluster", min=0, help="Keep only the rows of this cluster of --plan.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=8, help="How many pictures (default: 4096 drawn ones, or all of a folder).")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that draw and threads that encode (default: one a core); with --ray cores a part takes "
            "(default: 1).",
        ),
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
    class_column: Annotated[
        str | None,
        typer.Option(
            help="Column or metadata field of a picture's class, for `init --partition class` (default: class, label, "
            "cls, ..., else the name of its folder)."
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--licence", help="Licence of your pictures, for plan and model card: CC-BY-4.0, or words (200 characters)."
        ),
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option("--origin", help="Where your pictures come from: a page's address, or words (500 characters)."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a folder with a broken row instead of skipping it.")
    ] = False,
    vae: Annotated[
        str | None,
        typer.Option(
            "--vae", help="Learn latents of this AutoencoderKL: a folder, or a hub name (stabilityai/sd-vae-ft-mse)."
        ),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option("--text-encoder", help="minilm (default), or a CLIPTextModel: a folder or a hub name."),
    ] = None,
    feature_encoder: Annotated[
        str | None,
        typer.Option(
            "--feature-encoder", help="efficientnet-lite0 (default), or a Dinov2Model: a folder or a hub name."
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="I/N", help="Make part I of N only, in a folder of its own under OUT."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="SOURCE is a folder of parts 1/N to N/N: join them to OUT.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Make the parts on a Ray cluster and join them: HOST:PORT, auto, or local for this machine's cores "
            "(--workers: cores a part takes; with --device cuda each takes a GPU).",
        ),
    ] = None,
    parts: Annotated[
        int | None, typer.Option("--parts", min=1, help="With --ray: how many parts (default: a shard each, to 128).")
    ] = None,
    device: DeviceOption = "auto",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn captioned images into shards: pixels or latents, caption states, features, captions, digests, licences.

    The same input gives the same bytes. Rows that cannot be used are skipped, counted and named. A run that was killed
    goes on where it was when the same command is given again.
    """
    shared = settings(context, home, as_json)
    import os
    from functools import partial

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from paris_swarm.cli.own_cluster import wanted_rows
    from paris_swarm.expert.data.dicebear import DEFAULT_FAMILIES
    from paris_swarm.expert.data.on_ray import RayOptions, prepare_on_ray
    from paris_swarm.expert.data.parts import merge as join_parts
    from paris_swarm.expert.data.prepare import Part
    from paris_swarm.expert.data.prepare import prepare as run

    if merge:
        if part is not None or plan is not None or count is not None:
            raise Usage("--merge joins finished parts: it takes no --part, --plan or --count")
        if ray is not None:
            raise Usage("--ray joins its own parts: it takes no --merge")
        if licence is not None or origin is not None:
            raise Usage("--merge keeps what the parts say: give --licence and --origin when the parts are made")
        _say(shared, join_parts(source, out), None)
        return
    if ray is not None and part is not None:
        raise Usage("--ray makes all parts: leave --part out (--parts says how many)")
    if ray is None and parts is not None:
        raise Usage("--parts says how many parts --ray makes: give --ray, or --part I/N for one part here")
    side, only, asked = resolution or DEFAULT_RESOLUTION, None, None
    if plan is not None:
        side, only, asked = wanted_rows(shared.open_home(), plan, cluster, resolution)
    elif cluster is not None:
        raise Usage("--cluster says which rows of a plan to keep: give --plan too")
    wanted = None if part is None else Part.parse(part)
    named = (text_encoder, feature_encoder, vae)
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=shared.console) as bars:
        tasks = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        options: dict[str, Any] = {
            "resolution": side,
            "only": only,
            "count": count,
            "families": list(family or DEFAULT_FAMILIES),
            "image_column": image_column,
            "text_column": text_column,
            "class_column": class_column,
            "licence": licence,
            "origin": origin,
            "seed": seed,
            "strict": strict,
        }
        if ray is not None:
            where = RayOptions(ray, parts, cores=workers or 1, gpus=1 if device == "cuda" else 0)
            loading = partial(encoders_there, *named, device=device, asked=asked)
            about = {"encoders": list(named), "device": device}
            report = prepare_on_ray(source, out, loading, where, about=about, on_progress=on_progress, **options)
        else:
            encoders = chosen_encoders(*named, device=pick_device(device), asked=asked)
            report = run(
                source,
                out,
                workers=workers or os.cpu_count() or 1,
                text_encoder=encoders.text,
                feature_encoder=encoders.features,
                vae=encoders.vae,
                part=wanted,
                on_progress=on_progress,
                **options,
            )
    _say(shared, report, wanted)


def _say(shared: Settings, report: PrepareReport, part: Part | None) -> None:
    import json

    from paris_swarm.expert.data.shards import MANIFEST
    from paris_swarm.expert.data.sources import NOT_STATED

    facts = json.loads((report.folder / MANIFEST).read_bytes())
    seconds = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in report.seconds.items())
    licences = "; ".join(f"{item['what']}: {item['name']}" for item in facts["licences"]) or "no licence stated"
    lines = [f"{report.count} rows in {report.folder}, {report.resolution} px ({seconds or 'joined'}). {licences}."]
    named = facts["source"]
    if named.get("origin"):
        lines.append(f"They come from: {named['origin']}.")
    if any(item["name"] == NOT_STATED for item in facts["licences"]):
        lines.append("If these rows are for a plan of yours, say their licence with --licence, and --origin.")
    if named.get("captions"):
        lines.append(f"There is no metadata: the captions are the {named['captions']}.")
    elif named.get("text_column") and named.get("text_column") == named.get("class_column"):
        lines.append(f"There is no text column: the captions are the names in {named['class_column']!r}.")
    if report.resumed:
        lines.append(f"An earlier run had finished {report.resumed} shards of it.")
    if report.skipped:
        lines.append(f"{report.skipped_count} rows skipped:")
        lines += [f"  {item.file}: {item.why}" for item in report.skipped[:20]]
        if report.skipped_count > 20:
            where = report.folder / MANIFEST
            lines.append(
                f"  ... and {report.skipped_count - 20} more, the first {len(report.skipped)} named in {where}"
            )
    lines += [f"An unfinished run with other settings lies in {path}: remove it if you do not want to go on with it."
              for path in report.unfinished]  # fmt: skip
    if kept := facts.get("kept"):
        lines.append(f"Kept the rows of cluster {kept['cluster']}, {report.count} of {kept['of']} looked at.")
    if part is not None:
        lines.append(
            f"Next, when all {part.of} parts are there: paris-swarm prepare {report.folder.parent} OUT --merge"
        )
    elif kept:
        lines.append(f"Next: paris-swarm join --claim-cluster {kept['cluster']} --data {report.folder}")
    else:
        lines.append(f"Next: paris-swarm init {report.folder} -o plan")
    names = ("count", "resolution", "source", "licences", "text", "features", "latents", "skipped", "skipped_count")
    answer = {name: facts[name] for name in names if name in facts}
    shared.answer({"folder": str(report.folder), **answer, "seconds": report.seconds}, "\n".join(lines))
