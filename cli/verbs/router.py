"""`paris-swarm router report | rows`: how good a folder's router is; rows to train one where nobody shares data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paris_swarm.cli.folder_options import PlanOption, pinned_plan
from paris_swarm.cli.settings import DeviceOption, HomeOption, JsonOption, settings

if TYPE_CHECKING:
    from paris_swarm.cli.plan_folder import PlanFolder
    from paris_swarm.router.verify import VerifiedFolder

app = typer.Typer(
    help="The router: its accuracy and calibration, and rows to train one from the experts alone.",
    no_args_is_help=True,
)
FolderArgument = Annotated[Path, typer.Argument(help="Folder written by `assemble`.")]


@app.command("report")
def report(
    context: typer.Context,
    folder: FolderArgument,
    probe: Annotated[
        Path | None,
        typer.Option("--probe", metavar="ROWS", help="Judge by a `prepare`d folder instead of the plan's open half."),
    ] = None,
    sealed: Annotated[
        Path | None, typer.Option("--sealed", help="Judge by the sealed half: the file that the organiser published.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="PNG to write: accuracy and calibration by noise, and its bins.")
    ] = None,
    plan: PlanOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy and calibration of the router at each noise level, with the rows' captions and without any."""
    shared = settings(context, home, as_json)
    from dataclasses import asdict

    from paris_swarm.cli.exits import Usage
    from paris_swarm.cli.outputs import check_files
    from paris_swarm.cli.probing import load_slot, open_half, own_rows, sealed_half, union_of
    from paris_swarm.cli.router_views import report_table
    from paris_swarm.cli.tasks import ROUTER
    from paris_swarm.dht_schemas.files import atomic_write
    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.router.calibration import router_report
    from paris_swarm.router.calibration_picture import calibration_picture
    from paris_swarm.router.layout import weights_path
    from paris_swarm.router.png import png_bytes

    if probe is not None and sealed is not None:
        raise Usage("the router is judged by --probe ROWS or by --sealed FILE, not by both at once")
    check_files({"--picture": picture}, folder=folder)
    verified, plan_folder = _verified(folder, plan)
    _check_routed(folder, verified)
    if ROUTER in verified.lock.missing:
        raise Usage(
            f"{folder} has no router. To train one without anybody's data: paris-swarm router rows {folder} -o ROWS"
        )
    with shared.console.status("Asking the router ..."):
        if sealed is not None:
            rows = sealed_half(plan_folder, sealed)
        else:
            rows = own_rows(plan_folder, PreparedData.open(probe)) if probe is not None else open_half(plan_folder)
        union = union_of(rows)
        if union is None:
            raise Usage("a router is judged by rows of at least two clusters; these are all of one")
        model = load_slot(plan_folder, ROUTER, verified.path / weights_path(ROUTER))
        reports = {
            "with captions": router_report(model, union),
            "empty caption": router_report(model, union, captions="null"),
        }
    if picture is not None:
        atomic_write(picture, png_bytes(calibration_picture(reports)))
    if not shared.as_json:
        for name, found in reports.items():
            shared.console.print(report_table(name, found))
    whole = reports["with captions"]
    shared.answer(
        {
            "plan": verified.plan.plan_id,
            "rows": {"kind": rows.kind, "digest": rows.digest, "count": whole.rows},
            "reports": {found.captions: asdict(found) for found in reports.values()},
            "picture": None if picture is None else str(picture),
        },
        f"{whole.rows} rows ({rows.kind}); always naming the largest cluster is right in {whole.guess:.3f} of them."
        + ("" if picture is None else f" Picture: {picture}"),
    )


@app.command("rows")
def rows(
    context: typer.Context,
    folder: FolderArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of rows to write; an interrupted run goes on.")],
    count: Annotated[int, typer.Option(min=16, help="Rows of all clusters together.")] = 4096,
    steps: Annotated[int, typer.Option(min=1, help="Euler steps a picture.")] = 30,
    null_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share drawn with the empty caption, the rest with public probe ones.")
    ] = 0.25,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise: the same rows again on the same machine.")] = 0,
    device: DeviceOption = "auto",
    plan: PlanOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw labelled rows from every verified expert, to train a router where nobody has rows of all clusters.

    Train and announce it with `join --claim-router --data ROWS`; `audit router --data ROWS` trains it again.
    """
    shared = settings(context, home, as_json)
    from functools import partial

    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from paris_swarm.cli.exits import Incomplete
    from paris_swarm.cli.outputs import check_outside
    from paris_swarm.cli.probing import load_slot, open_half
    from paris_swarm.cli.settings import pick_device
    from paris_swarm.cli.tasks import ROUTER
    from paris_swarm.router.drawn_rows import Drawing, counts_by_share, draw_rows, planned_shares
    from paris_swarm.router.layout import weights_path

    check_outside(out, folder, "-o")
    verified, plan_folder = _verified(folder, plan)
    _check_routed(folder, verified)
    signed = verified.plan.plan
    clusters = [str(k) for k in range(signed.clusters)]
    if lacking := [slot for slot in clusters if slot in verified.lock.missing]:
        raise Incomplete(
            f"expert {', '.join(lacking)} is missing in {folder}, and a router needs rows of every cluster: wait for "
            "its checkpoint and assemble again"
        )
    drawing = Drawing(
        plan=verified.plan.plan_id,
        experts={slot.slot: slot.root for slot in verified.lock.slots if slot.slot != ROUTER},
        counts=counts_by_share(planned_shares(signed.data, signed.clusters), count),
        steps=steps,
        seed=seed,
        null_share=null_share,
    )
    columns = (TextColumn("drawing"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns, console=shared.console, transient=True) as bars:
        task = bars.add_task("drawing", total=sum(drawing.counts))
        for done in draw_rows(
            out,
            drawing,
            experts={
                slot: partial(load_slot, plan_folder, slot, verified.path / weights_path(slot)) for slot in clusters
            },
            captions=open_half(plan_folder).probes,
            data=signed.data,
            device=pick_device(device),
        ):
            bars.update(task, completed=done.done)
    shared.answer(
        {"folder": str(out), **drawing.note()},
        f"{sum(drawing.counts)} rows drawn by {len(clusters)} experts in {out}.\n"
        f"Next: paris-swarm join --claim-router --data {out} --exit-when-done",
    )


def _check_routed(folder: Path, verified: VerifiedFolder) -> None:
    """Raises Usage where there is nothing to route: a student, or any plan of one cluster."""
    from paris_swarm.cli.exits import Usage

    plan = verified.plan.plan
    if plan.clusters > 1:
        return
    kind = "a student, distilled into one model" if "distilled" in plan.data else "of a plan with one cluster"
    raise Usage(
        f"{folder} is {kind}: it draws every picture by itself, without a router, so there is none to judge or train"
    )


def _verified(folder: Path, plan: str | None) -> tuple[VerifiedFolder, PlanFolder]:
    from paris_swarm.cli.plan_folder import PlanFolder
    from paris_swarm.router.verify import verify_folder

    verified = verify_folder(folder, plan_id=pinned_plan(plan))
    return verified, PlanFolder(verified.path / "plan", verified.plan)
