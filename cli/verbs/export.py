"""`paris-swarm export DIR OUT --paris`: a verified folder in the layout of the released Paris weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paris_swarm.cli.folder_options import PlanOption, pinned_plan
from paris_swarm.cli.settings import HomeOption, JsonOption, settings


def export(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder written by `assemble`.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    paris: Annotated[bool, typer.Option("--paris", help="The layout of the released Paris weights.")] = False,
    extended: Annotated[
        bool,
        typer.Option("--extended", help="Write networks that the layout has no words for all the same, marked so."),
    ] = False,
    plan: PlanOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify the folder and write it in another layout, weights byte for byte.

    For diffusers nothing has to be exported: `DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)` reads an
    assembled folder as it is.
    """
    shared = settings(context, home, as_json)
    from paris_swarm.cli.exits import Usage

    if not paris:
        raise Usage("say which layout to write: --paris (diffusers reads the assembled folder as it is)")
    from paris_swarm.cli.outputs import check_outside
    from paris_swarm.router.folder import open_folder
    from paris_swarm.router.paris_layout import export_paris

    check_outside(out, folder, "OUT")
    model = open_folder(folder, plan_id=pinned_plan(plan), allow_missing=True)
    written = export_paris(model, out, extended=extended)
    shared.answer(
        {"folder": str(out), "layout": "paris", "files": written, "plan": model.plan_id, "assembly": model.digest},
        f"Wrote {len(written)} files in the released Paris layout to {out}.\n"
        "Signatures stay behind: say where it came from when you pass it on (config.json names plan and assembly).",
    )
