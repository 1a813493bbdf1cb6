"""`paris-swarm join INVITE --claim-cluster [auto|N] --data DATA`: be a peer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from paris_swarm.cli.exits import Usage
from paris_swarm.cli.settings import (
    LOOPBACK,
    AllowOption,
    AnnounceOption,
    BlockOption,
    CompileOption,
    CompressOption,
    DeterministicOption,
    DeviceOption,
    DirectOption,
    DirectPortOption,
    HomeOption,
    JsonOption,
    ListenOption,
    MetricsOption,
    MicroBatchOption,
    ProcessesOption,
    RecomputeOption,
    StoreLimitOption,
    UploadOption,
    settings,
)

CLAIM = "--claim-cluster"


class JoinCommand(TyperCommand):
    """`--claim-cluster` alone means auto: a word that is neither `auto` nor a number is not its value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_auto(args))


def with_auto(arguments: Sequence[str]) -> list[str]:
    """The command line with `auto` written out after a bare `--claim-cluster`."""
    out: list[str] = []
    rest = list(arguments)
    for index, word in enumerate(rest):
        out.append(word)
        if word == "--":
            return [*out, *rest[index + 1 :]]
        if word == CLAIM:
            following = rest[index + 1] if index + 1 < len(rest) else ""
            if following != "auto" and not (following.isascii() and following.isdigit()):
                out.append("auto")
    return out


def join(
    context: typer.Context,
    invite: Annotated[str | None, typer.Argument(help="Invite; without one, the swarm last joined.")] = None,
    claim_cluster: Annotated[
        str | None,
        typer.Option(
            CLAIM,
            metavar="[auto|N]",
            help="Train cluster N; with `auto`, or nothing, whichever needs a peer, one after another.",
        ),
    ] = None,
    claim_router: Annotated[
        bool, typer.Option("--claim-router", help="Train the router too (needs rows of all clusters).")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Folder written by `prepare`.")] = None,
    device: DeviceOption = "auto",
    threads: Annotated[int, typer.Option(min=0, help="torch threads of each trainer; 0 leaves torch's choice.")] = 0,
    micro_batch: MicroBatchOption = 0,
    recompute: RecomputeOption = False,
    compiled: CompileOption = False,
    processes: ProcessesOption = 1,
    deterministic: DeterministicOption = False,
    metrics: MetricsOption = "none",
    listen: ListenOption = LOOPBACK,
    announce: AnnounceOption = None,
    public: Annotated[
        bool, typer.Option("--public", help="Reach out through NAT: UPnP, relays, reachability checks.")
    ] = False,
    keep_checkpoints: Annotated[
        int,
        typer.Option(min=2, help="Own published checkpoints to go on serving; an audit needs one and its parent."),
    ] = 2,
    start_from: Annotated[
        list[Path] | None,
        typer.Option(
            "--start-from", exists=True, dir_okay=False, help="Start weights that the plan names but does not hold."
        ),
    ] = None,
    exit_when_done: Annotated[
        bool, typer.Option("--exit-when-done", help="End once nothing is left to train, instead of serving on.")
    ] = False,
    upload_limit: UploadOption = None,
    store_limit: StoreLimitOption = None,
    direct: DirectOption = True,
    direct_port: DirectPortOption = 0,
    compress: CompressOption = "auto",
    allow: AllowOption = None,
    block: BlockOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the plan, claim, train, checkpoint, publish, serve. Ctrl-C gives the slot back after a last checkpoint."""
    shared = settings(context, home, as_json)
    import asyncio

    from paris_swarm.cli.connect import Roads, announced, resolve_invite
    from paris_swarm.cli.own_cluster import claimed_cluster
    from paris_swarm.cli.peer_session import SessionOptions, run_session
    from paris_swarm.cli.sizes import parse_limits
    from paris_swarm.cli.trainer import TrainerChoices

    upload, store = parse_limits(upload_limit, store_limit)
    owner = shared.open_home()
    wanted = resolve_invite(invite, owner)
    if (claim_cluster is not None or claim_router) and data is None:
        raise Usage("training needs --data DATA: a folder written by `paris-swarm prepare`")
    if claim_cluster is not None and claim_cluster != "auto":
        if not (claim_cluster.isascii() and claim_cluster.isdigit()):
            raise Usage(f"{CLAIM} {claim_cluster}: a cluster's number, auto, or nothing")
        claim_cluster = str(int(claim_cluster))
    claim_cluster = claimed_cluster(claim_cluster, data, wanted.plan_id)
    options = SessionOptions(
        invite=wanted,
        cluster=claim_cluster,
        router=claim_router,
        data=data.absolute() if data is not None else None,
        device=device,
        threads=threads,
        listen=listen,
        announce=announced(announce),
        public=public,
        exit_when_done=exit_when_done,
        lists=owner.peer_lists(allow, block),
        keep_checkpoints=keep_checkpoints,
        upload_limit=upload,
        store_limit=store,
        roads=Roads(direct, direct_port, compress),
        trainer=TrainerChoices(micro_batch, recompute, compiled, processes, deterministic, metrics),
        start_from=tuple(path.absolute() for path in start_from or ()),
    )
    with owner.locked():
        asyncio.run(run_session(shared, owner, options))
