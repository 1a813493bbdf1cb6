"""`paris-swarm assemble INVITE -o DIR`: discover, download, verify, write the folder and its signed lock."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paris_swarm.cli.settings import HomeOption, JsonOption, settings


def assemble(
    context: typer.Context,
    invite: Annotated[str | None, typer.Argument(help="Invite; without one, the swarm last joined.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("model"),
    allow_missing: Annotated[
        bool,
        typer.Option("--allow-missing", help="Write the folder although experts are missing (they are named in it)."),
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace an assembled folder that is already there.")
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take the best checkpoint of every slot that verifies: signatures, chunks, header, finite values, probe loss."""
    shared = settings(context, home, as_json)
    import asyncio
    import time

    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from paris_swarm.cli.assembling import gather_slots
    from paris_swarm.cli.connect import observing, resolve_invite
    from paris_swarm.cli.exits import Incomplete
    from paris_swarm.cli.views import short, size
    from paris_swarm.router.folder import write_folder

    owner = shared.open_home()
    wanted = resolve_invite(invite, owner)
    identity = owner.identity()

    async def run() -> None:
        async with observing(owner, wanted) as here:
            columns = (TextColumn("{task.description:<24}"), BarColumn(), DownloadColumn())
            with Progress(*columns, console=shared.console) as bars:
                gathered = await gather_slots(here, bars)
            for refusal in gathered.refused:
                shared.console.print(f"Refused: {refusal}", markup=False, style="yellow")
            plan = here.plan_folder.opened.plan
            missing = [slot for slot in plan.slots if slot not in gathered.slots]
            if missing and not allow_missing:
                raise Incomplete(
                    f"no verified checkpoint yet for slot {', '.join(missing)} of {', '.join(plan.slots)}; "
                    "wait for more checkpoints, or pass --allow-missing"
                )
            verified = await asyncio.to_thread(
                write_folder,
                out,
                identity=identity,
                plan=here.plan_folder.opened,
                plan_folder=here.plan_folder.path,
                slots=[found.source for found in gathered.slots.values()],
                created=int(time.time()),
                replace=replace,
            )
            received = here.node.counters.total("received", "checkpoint").wire
            lines = [
                f"slot {slot:<6} {short(found.announcement.author)}  step {found.announcement.step:<6} "
                f"probe {found.probe_loss:.4f}  {found.announcement.root[:12]}"
                for slot, found in gathered.slots.items()
            ]
            shared.answer(
                {
                    "folder": str(out),
                    "digest": verified.digest,
                    "plan": here.plan_folder.plan_id,
                    "missing": missing,
                    "refused": gathered.refused,
                    "bytes": received,
                    "slots": [
                        {
                            "slot": slot,
                            "peer": found.announcement.author,
                            "root": found.announcement.root,
                            "step": found.announcement.step,
                            "probe_loss": found.probe_loss,
                        }
                        for slot, found in gathered.slots.items()
                    ],
                },
                "\n".join(
                    [
                        *lines,
                        f"Assembled {out} from {len(gathered.slots)} verified checkpoints ({size(received)} fetched)"
                        + (f"; missing: {', '.join(missing)}" if missing else "")
                        + ".",
                        f"Next: paris-swarm sample {out} --prompt '...' -o picture.png",
                    ]
                ),
            )

    asyncio.run(run())
