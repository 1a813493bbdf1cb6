"""`paris-swarm verify DIR`: check an assembled folder offline, against its signed lock; `--probe`: its quality too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from paris_swarm.cli.exits import Unverified, Usage
from paris_swarm.cli.folder_options import PlanOption, pinned_plan
from paris_swarm.cli.settings import HomeOption, JsonOption, Settings, settings

if TYPE_CHECKING:
    from paris_swarm.cli.probing import ProbeReport
    from paris_swarm.router.verify import VerifiedFolder

PROBE = "--probe"
OPEN = "open"
"""The value of a bare `--probe`: the plan's open half and nothing else."""


class VerifyCommand(TyperCommand):
    """`--probe` alone judges by the plan's open half; a folder after it adds own rows, unless it is the only folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_open(args))


def with_open(arguments: Sequence[str]) -> list[str]:
    """The command line with `open` written out after a `--probe` that no word follows."""
    out: list[str] = []
    for index, word in enumerate(arguments):
        out.append(word)
        if word == "--":
            return [*out, *arguments[index + 1 :]]
        if word == PROBE and (index + 1 == len(arguments) or arguments[index + 1].startswith("-")):
            out.append(OPEN)
    return out


def verify(
    context: typer.Context,
    folder: Annotated[
        Path | None, typer.Argument(help="Folder written by `assemble`; with --probe, a plan folder does too.")
    ] = None,
    plan: PlanOption = None,
    probe: Annotated[
        str | None,
        typer.Option(
            PROBE,
            metavar="[ROWS]",
            help="Compute every probe loss again; with ROWS, a `prepare`d folder, on rows of your own too. "
            "Of a plan folder: its bars.",
        ),
    ] = None,
    sealed: Annotated[
        Path | None,
        typer.Option("--sealed", help="Judge by the sealed half too: the file that the organiser published."),
    ] = None,
    cross: Annotated[bool, typer.Option("--cross", help="Every expert on every cluster's probe rows.")] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="PNG to write the table of --cross to, as a heat map.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="The organiser's data, to check the bars of a plan folder by.")
    ] = None,
    start_from: Annotated[
        list[Path] | None,
        typer.Option(
            "--start-from", exists=True, dir_okay=False, help="Start weights that the plan names but does not hold."
        ),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every envelope, digest and header again, without a network. What was changed is named, and the exit code is 4.

    With --probe the probe loss of every expert and of the router is computed again, and compared with what its author
    announced and with the plan's bars.
    """
    shared = settings(context, home, as_json)

    if folder is None and probe not in (None, OPEN):
        folder, probe = Path(str(probe)), OPEN  # `verify --probe FOLDER`
    if folder is None:
        raise Usage("name the FOLDER to verify: one that `paris-swarm assemble` wrote")
    if probe is None and (sealed is not None or cross or picture is not None or data is not None):
        probe = OPEN  # each of these asks for probe losses
    own = Path(probe) if probe not in (None, OPEN) else None
    pinned = pinned_plan(plan)
    if probe is not None and (folder / "plan.json").is_file() and not (folder / "lock.json").exists():
        if sealed is not None or own is not None or cross or picture is not None:
            raise Usage(f"{folder} is a plan folder: it has bars to check (--data DATA), but no weights to judge")
        _verify_plan(shared, folder, pinned, data, tuple(start_from or ()))
        return
    if data is not None:
        raise Usage("--data checks the bars of a plan folder; to judge weights by your own rows write --probe ROWS")
    brought = tuple(start_from or ())
    cross = cross or picture is not None
    _verify_assembled(shared, folder, pinned, probe is not None, own, sealed, cross, picture, brought)


def _verify_assembled(
    shared: Settings,
    folder: Path,
    pinned: str | None,
    probe: bool,
    own: Path | None,
    sealed: Path | None,
    cross: bool,
    picture: Path | None,
    brought: tuple[Path, ...],
) -> None:
    from paris_swarm.cli.outputs import check_files
    from paris_swarm.router.diffusers_folder import code_here
    from paris_swarm.router.layout import needed_slots
    from paris_swarm.router.verify import verify_folder

    check_files({"--picture": picture}, folder=folder)
    verified = verify_folder(folder, plan_id=pinned)
    lock = verified.lock
    needed = needed_slots(verified.plan, lock.missing)
    missing = f" Missing: {', '.join(needed)}." if needed else ""
    code = code_here(verified)
    report: dict[str, Any] = {
        "ok": True,
        "plan": lock.plan,
        "organiser": lock.organiser,
        "assembler": lock.assembler,
        "slots": [slot.model_dump() for slot in lock.slots],
        "missing": list(needed),
        "own_code": code,
    }
    text = (
        f"Verified: {folder}\nPlan      {lock.plan}\nOrganiser {lock.organiser}\nAssembler {lock.assembler}\n"
        f"{len(lock.slots)} checkpoints, every file as signed.{missing}"
    )
    if strange := [path for path, own in code.items() if not own]:
        shared.console.print(
            f"{' and '.join(strange)}: not what this release of paris-swarm writes, so another release's or the "
            "assembler's own. diffusers runs it when told to trust remote code; `sample` never does.",
            markup=False,
            style="yellow",
            soft_wrap=True,
        )
    if not probe:
        shared.answer(report, text)
        return
    from paris_swarm.cli.probing import report_dict

    judged = _judge(shared, verified, own, sealed, cross, brought)
    _show(shared, judged, picture)
    if judged.problems:
        text = f"Every file of {folder} is as signed.{missing}"
    else:
        text += " Every probe loss is as announced and below the bar."
    shared.answer(report | {"ok": not judged.problems, "probe": report_dict(judged)}, text)
    if judged.problems:
        raise Unverified(f"{folder}: {'; '.join(judged.problems)}")


def _judge(
    shared: Settings,
    verified: VerifiedFolder,
    own: Path | None,
    sealed: Path | None,
    cross: bool,
    brought: tuple[Path, ...],
) -> ProbeReport:
    from paris_swarm.cli.plan_folder import PlanFolder
    from paris_swarm.cli.probing import judge_slots, own_rows, sealed_half
    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.router.layout import weights_path

    plan_folder = PlanFolder(verified.path / "plan", verified.plan, brought)
    with shared.console.status("Computing probe losses ..."):
        more = [sealed_half(plan_folder, sealed)] if sealed is not None else []
        more += [own_rows(plan_folder, PreparedData.open(own))] if own is not None else []
        slots, deciding = verified.lock.slots, verified.lock.deciding
        recorded = {}
        if deciding is not None:
            recorded = {deciding.digest: {slot: rivals[0].loss for slot, rivals in deciding.measured.items()}}
        return judge_slots(
            plan_folder,
            {slot.slot: verified.path / weights_path(slot.slot) for slot in slots},
            {slot.slot: slot.probe_loss for slot in slots},
            more,
            recorded=recorded,
            cross=cross,
        )


def _show(shared: Settings, judged: ProbeReport, picture: Path | None) -> None:
    from paris_swarm.cli.probe_views import CROSS_NOTE, cross_picture, cross_table, probe_table
    from paris_swarm.dht_schemas.files import atomic_write
    from paris_swarm.router.png import png_bytes

    if not shared.as_json:
        shared.console.print(probe_table(judged))
        for figure in judged.figures:
            if figure.held_out is not None and figure.held_out < figure.count and figure.slot != "router":
                free = figure.count - figure.held_out
                shared.console.print(
                    f"Slot {figure.slot}: {free} of your {figure.count} rows are not held out by the plan: "
                    "if they are in its data, its author has trained on them.",
                    style="yellow",
                    soft_wrap=True,
                )
    if judged.cross is None:
        return
    if not shared.as_json:
        shared.console.print(cross_table(judged.cross, judged.bars))
        shared.console.print(CROSS_NOTE)
    if picture is not None:
        atomic_write(picture, png_bytes(cross_picture(judged.cross, judged.bars)))


def _verify_plan(
    shared: Settings, folder: Path, pinned: str | None, data: Path | None, brought: tuple[Path, ...]
) -> None:
    from dataclasses import replace

    from paris_swarm.cli.baselines import audit_baselines, baselines_dict
    from paris_swarm.cli.plan_folder import open_plan_folder
    from paris_swarm.cli.probe_views import baseline_lines, baseline_table
    from paris_swarm.expert.data.shards import PreparedData

    plan_folder = replace(open_plan_folder(folder, plan_id=pinned), brought=brought)
    with shared.console.status("Computing the bars again ...") as status:
        found = audit_baselines(
            plan_folder,
            PreparedData.open(data) if data is not None else None,
            say=lambda text: status.update(f"{text[0].upper()}{text[1:]} ..."),
        )
    if not shared.as_json:
        shared.console.print(baseline_table(found))
    shared.answer(
        {"ok": not found.problems, "plan": plan_folder.plan_id, "baselines": baselines_dict(found)},
        "\n".join([f"Plan {plan_folder.plan_id}, every file as signed.", *baseline_lines(found)]),
    )
    if found.problems:
        raise Unverified(f"the plan in {folder}: {'; '.join(found.problems)}")
