"""`paris-swarm assemble INVITE -o DIR`: discover, download, verify, write the folder and its signed lock."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paris_swarm.cli.folder_options import TextEncoderFromOption, WrittenTextEncoderOption, WrittenVaeOption
from paris_swarm.cli.settings import (
    LOOPBACK,
    AnnounceOption,
    CompressOption,
    DirectOption,
    DirectPortOption,
    HomeOption,
    JsonOption,
    ListenOption,
    StoreLimitOption,
    UploadOption,
    settings,
)

if TYPE_CHECKING:
    from paris_swarm.cli.plan_folder import PlanFolder
    from paris_swarm.cli.probing import ProbeRows


def assemble(
    context: typer.Context,
    invite: Annotated[str | None, typer.Argument(help="Invite; without one, the swarm last joined.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("model"),
    allow_missing: Annotated[
        bool,
        typer.Option("--allow-missing", help="Write the folder although experts are missing (they are named in it)."),
    ] = False,
    probe: Annotated[
        Path | None,
        typer.Option(
            "--probe", metavar="ROWS", help="A `prepare`d folder: its rows decide between checkpoints of one slot."
        ),
    ] = None,
    sealed: Annotated[
        Path | None,
        typer.Option("--sealed", help="The sealed half that the organiser published: it decides between checkpoints."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace an assembled folder that is already there.")
    ] = False,
    text_encoder: WrittenTextEncoderOption = True,
    text_encoder_from: TextEncoderFromOption = None,
    vae: WrittenVaeOption = None,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve", help="Fetch whole checkpoints (a successor needs them) and serve them to others until Ctrl-C."
        ),
    ] = False,
    listen: ListenOption = LOOPBACK,
    announce: AnnounceOption = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --serve: reach out through NAT, as `join` does.")
    ] = False,
    upload_limit: UploadOption = None,
    store_limit: StoreLimitOption = None,
    direct: DirectOption = True,
    direct_port: DirectPortOption = 0,
    compress: CompressOption = "auto",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take the best checkpoint of every slot that verifies: signatures, chunks, header, finite values, probe loss.

    Where a slot has several, the announced probe loss decides, which must agree with the one measured here; with
    --probe or --sealed the loss on those rows, and the lock says so.

    What was taken is kept in this home, and whatever process of this home is online (`join`, `bootstrap`, or this one
    with --serve) serves it to others, so that a checkpoint outlives its author. `store gc --copies` ends that.
    """
    shared = settings(context, home, as_json)
    import asyncio
    import contextlib
    import time

    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from paris_swarm.cli.assembling import deciding_record, gather_slots
    from paris_swarm.cli.connect import Roads, announced, connected, observing, resolve_invite, warn_of_loopback
    from paris_swarm.cli.encoders import folder_encoders
    from paris_swarm.cli.exits import Incomplete, Usage
    from paris_swarm.cli.lifetime import until_interrupted
    from paris_swarm.cli.sizes import parse_limits
    from paris_swarm.cli.views import short, size
    from paris_swarm.router.folder_writing import check_target, write_folder
    from paris_swarm.router.layout import needed_slots
    from paris_swarm.swarm.home import HomeBusy

    if probe is not None and sealed is not None:
        raise Usage("either --probe or --sealed decides between checkpoints, not both")
    check_target(out, replace)
    upload, limit = parse_limits(upload_limit, store_limit)
    owner = shared.open_home()
    wanted = resolve_invite(invite, owner)
    identity = owner.identity()

    async def run(*, as_peer: bool) -> None:
        if as_peer:
            warn_of_loopback(listen, wanted.peers)
        async with (
            connected(
                owner,
                wanted,
                identity=identity,
                listen=listen,
                announce=announced(announce),
                public=public,
                upload_limit=upload,
                store_limit=limit,
                roads=Roads(direct, direct_port, compress),
            )
            if as_peer
            else observing(owner, wanted, store_limit=limit, direct=direct)
        ) as here:
            deciding = await asyncio.to_thread(_deciding_rows, here.plan_folder, probe, sealed)
            columns = (TextColumn("{task.description:<24}"), BarColumn(), DownloadColumn())
            with Progress(*columns, console=shared.console) as bars:
                gathered = await gather_slots(here, bars, deciding, whole=serve)
            for refusal in gathered.refused:
                shared.console.print(f"Refused: {refusal}", markup=False, style="yellow")
            plan = here.plan_folder.opened.plan
            absent = [slot for slot in plan.slots if slot not in gathered.slots]
            missing = list(needed_slots(here.plan_folder.opened, absent))
            if missing and not allow_missing:
                raise Incomplete(
                    f"no verified checkpoint yet for slot {', '.join(missing)} of {', '.join(plan.slots)}; "
                    "wait for more checkpoints, or pass --allow-missing"
                    + ("" if missing != ["router"] else " and train one from the experts: `paris-swarm router rows`")
                )
            text, vae_found, notes = await asyncio.to_thread(
                folder_encoders, here.plan_folder.opened, text_encoder_from, vae, with_text=text_encoder
            )
            for note in notes:
                shared.console.print(note, markup=False, style="yellow")
            verified = await asyncio.to_thread(
                write_folder,
                out,
                identity=identity,
                plan=here.plan_folder.opened,
                plan_folder=here.plan_folder.path,
                slots=[found.source for found in gathered.slots.values()],
                created=int(time.time()),
                deciding=deciding_record(gathered, deciding) if deciding is not None else None,
                replace=replace,
                text_encoder=text,
                vae=vae_found,
            )
            for found in gathered.slots.values():
                await here.node.keep_copy(found.announcement.slot, found.source.announcement)
            received = here.node.counters.total("received", "checkpoint").wire
            lines = [
                f"slot {slot:<6} {short(found.announcement.author)}  step {found.announcement.step:<6} "
                f"probe {found.probe_loss:.4f}  {found.announcement.root[:12]}"
                + _decided(found.deciding_loss, len(gathered.rivals.get(slot, ())))
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
                            "deciding_loss": found.deciding_loss,
                            "rivals": max(0, len(gathered.rivals.get(slot, ())) - 1),
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

            if as_peer:
                shared.answer(
                    {"event": "serving", "peer": identity.peer_id}, "Serving these checkpoints (Ctrl-C stops)."
                )
                await until_interrupted(here.node)

    with contextlib.ExitStack() as stack:
        as_peer = serve
        if serve:
            try:
                stack.enter_context(owner.locked())
            except HomeBusy:
                as_peer = False
                shared.console.print(
                    "Another process of this home is online: it serves what is assembled here.", markup=False
                )
        asyncio.run(run(as_peer=as_peer))


def _deciding_rows(plan_folder: PlanFolder, probe: Path | None, sealed: Path | None) -> ProbeRows | None:
    from paris_swarm.cli.probing import own_rows, sealed_half
    from paris_swarm.expert.data.shards import PreparedData

    if sealed is not None:
        return sealed_half(plan_folder, sealed)
    return own_rows(plan_folder, PreparedData.open(probe)) if probe is not None else None


def _decided(loss: float | None, rivals: int) -> str:
    return "" if loss is None else f"  best of {rivals} on the deciding rows: {loss:.4f}"
