"""`paris-swarm verify DIR`: check an assembled folder offline, against its signed lock."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paris_swarm.cli.settings import HomeOption, JsonOption, settings


def verify(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder written by `assemble`.")],
    plan: Annotated[str | None, typer.Option("--plan", help="Plan id (or invite) that it must be of.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every envelope, digest and header again, without a network. What was changed is named, and the exit code is 4."""
    shared = settings(context, home, as_json)
    from paris_swarm.dht_schemas.invite import Invite
    from paris_swarm.router.verify import verify_folder

    pinned = Invite.parse(plan).plan_id if plan is not None and plan.startswith("paris:") else plan
    lock = verify_folder(folder, plan_id=pinned).lock
    missing = f" Missing: {', '.join(lock.missing)}." if lock.missing else ""
    shared.answer(
        {
            "ok": True,
            "plan": lock.plan,
            "organiser": lock.organiser,
            "assembler": lock.assembler,
            "slots": [slot.model_dump() for slot in lock.slots],
            "missing": list(lock.missing),
        },
        f"Verified: {folder}\nPlan      {lock.plan}\nOrganiser {lock.organiser}\nAssembler {lock.assembler}\n"
        f"{len(lock.slots)} checkpoints, every file as signed.{missing}",
    )
