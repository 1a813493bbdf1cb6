"""`paris-swarm bootstrap PLAN`: a seed node with the same record validators as every peer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paris_swarm.cli.exits import Usage
from paris_swarm.cli.settings import (
    LOOPBACK,
    AllowOption,
    AnnounceOption,
    BlockOption,
    CompressOption,
    DirectOption,
    DirectPortOption,
    HomeOption,
    JsonOption,
    ListenOption,
    UploadOption,
    settings,
)


def bootstrap(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(help="Plan folder written by `init`.")],
    listen: ListenOption = LOOPBACK,
    announce: AnnounceOption = None,
    public: Annotated[
        bool,
        typer.Option(
            "--public",
            help="This machine can be reached (a port mapped by UPnP if need be): relay for those that cannot.",
        ),
    ] = False,
    peer: Annotated[list[str] | None, typer.Option("--peer", help="Multiaddr of another seed to join.")] = None,
    upload_limit: UploadOption = None,
    direct: DirectOption = True,
    direct_port: DirectPortOption = 0,
    compress: CompressOption = "auto",
    allow: AllowOption = None,
    block: BlockOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a plan to newcomers and keep records alive; prints the invite. Runs until Ctrl-C."""
    shared = settings(context, home, as_json)
    import asyncio

    from paris_swarm.cli.connect import Roads, announced, start_transport
    from paris_swarm.cli.lifetime import until_interrupted
    from paris_swarm.cli.plan_folder import open_plan_folder
    from paris_swarm.cli.sizes import parse_limits
    from paris_swarm.dht_schemas.admission import seal_token
    from paris_swarm.dht_schemas.invite import Invite
    from paris_swarm.swarm.node import SwarmNode
    from paris_swarm.swarm.serving import ServingLimits

    upload, _no_store_limit = parse_limits(upload_limit, None)
    owner = shared.open_home()
    plan_folder = open_plan_folder(plan)
    lists = owner.peer_lists(allow, block)
    invited = plan_folder.opened.plan.admission == "invited"

    def admit(peer_id: str) -> None:
        """The organiser's own token, for `status` beside this; another peer needs one it was given."""
        swarm = owner.swarm(plan_folder.plan_id)
        if peer_id == plan_folder.opened.plan.organiser:
            swarm.store_token(seal_token(owner.identity(), plan_folder.plan_id, peer_id))
        elif swarm.token() is None:
            raise Usage(
                f"the swarm is for invited peers and {owner.path} has no admission: join once with an invite made for "
                f"{peer_id}, or give --home the organiser's"
            )

    async def serve() -> None:
        identity = owner.identity()
        if invited:
            admit(identity.peer_id)
        transport = await start_transport(
            owner.identity_path,
            peer or [],
            listen=listen,
            announce=announced(announce),
            public=public,
            relay=True,
            roads=Roads(direct, direct_port, compress),
        )
        node = SwarmNode(
            owner,
            identity,
            transport,
            plan_folder.opened,
            lists=lists,
            serving=ServingLimits(upload=upload, compress=compress),
        )
        try:
            await asyncio.to_thread(
                node.store.put_files, plan_folder.plan_id, plan_folder.opened.plan.files, plan_folder.path, kind="plan"
            )
            node.store.put_blob(plan_folder.opened.envelope)
            await node.join()
            invite = Invite(plan_folder.plan_id, tuple(await transport.addresses()))
            owner.remember_invite(str(invite))
            shared.answer(
                {"event": "ready", "invite": str(invite), "peer": identity.peer_id, "plan": plan_folder.plan_id},
                f"Serving plan {plan_folder.opened.plan.name!r}. Invite:\n\n{invite}\n\n"
                "Peers join with: paris-swarm join INVITE --claim-cluster --data DATA   (Ctrl-C stops)"
                + (
                    f"\nOnly invited ones get in: paris-swarm invite PEER_ID --plan {plan} prints a peer's own invite"
                    if invited
                    else ""
                ),
            )
            await until_interrupted(node)
        finally:
            await node.close()

    with owner.locked():
        asyncio.run(serve())
