"""`paris-swarm audit ROOT --data DATA`: train the steps between a checkpoint and its parent again, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paris_swarm.cli.settings import DeviceOption, HomeOption, JsonOption, settings


def audit(
    context: typer.Context,
    root: Annotated[
        str, typer.Argument(help="Root of a checkpoint, the beginning of one, or a slot: its best checkpoint now.")
    ],
    data: Annotated[Path, typer.Option(help="The author's rows: a folder written by `prepare`.")],
    invite: Annotated[str | None, typer.Argument(help="Invite; without one, the swarm last joined.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Assembled folder whose announcements say who made the checkpoint.")
    ] = None,
    start_from: Annotated[
        list[Path] | None,
        typer.Option(
            "--start-from", exists=True, dir_okay=False, help="Start weights that the plan names but does not hold."
        ),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what this home holds.")] = False,
    device: DeviceOption = "auto",
    threads: Annotated[int, typer.Option(min=0, help="torch threads; 0: as many as the author used.")] = 0,
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep the replayed checkpoints on disk.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Was it trained as its author says? Code 0: reproduced; 4: not explained, and what differs; 5: not decided (made
    by another version of the code, silent about how it was trained, or not held any more), which vouches for nothing.

    It costs the training of the steps in between, and up to three times as much where bits differ.
    """
    shared = settings(context, home, as_json)
    import asyncio

    from paris_swarm.cli import exits
    from paris_swarm.cli.audit_run import AuditOptions, run_audit
    from paris_swarm.cli.connect import resolve_invite

    owner = shared.open_home()
    options = AuditOptions(
        root=root.lower(),
        data=data,
        model=model,
        offline=offline,
        device=device,
        threads=threads,
        keep_work=keep_work,
        start_from=tuple(path.absolute() for path in start_from or ()),
    )
    found = asyncio.run(run_audit(shared, owner, resolve_invite(invite, owner), options))
    shared.answer(found.as_dict(), found.text())
    if found.exit_code != exits.OK:
        raise typer.Exit(found.exit_code)
