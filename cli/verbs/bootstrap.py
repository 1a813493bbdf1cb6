"""`paris-swarm bootstrap PLAN`: a seed node with the same record validators as every peer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paris_swarm.cli.settings import HomeOption, JsonOption, settings


def bootstrap(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(help="Plan folder written by `init`.")],
    listen: Annotated[
        str, typer.Option(help="Multiaddr to listen on; the default stays on this machine.")
    ] = "/ip4/127.0.0.1/tcp/0",
    public: Annotated[
        bool, typer.Option("--public", help="Reach out through NAT: UPnP, relays, reachability checks.")
    ] = False,
    peer: Annotated[list[str] | None, typer.Option("--peer", help="Multiaddr of another seed to join.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a plan to newcomers and keep records alive; prints the invite. Runs until Ctrl-C."""
    shared = settings(context, home, as_json)
    import asyncio

    from paris_swarm.cli.lifetime import until_interrupted
    from paris_swarm.cli.plan_folder import open_plan_folder
    from paris_swarm.dht_schemas.invite import Invite
    from paris_swarm.swarm.hivemind_transport import HivemindTransport
    from paris_swarm.swarm.node import SwarmNode

    owner = shared.open_home()
    plan_folder = open_plan_folder(plan)

    async def serve() -> None:
        identity = owner.identity()
        transport = await HivemindTransport.start(owner.identity_path, seeds=peer or [], listen=listen, public=public)
        node = SwarmNode(owner, identity, transport, plan_folder.opened)
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
                "Peers join with: paris-swarm join INVITE --claim-cluster --data DATA   (Ctrl-C stops)",
            )
            await until_interrupted(node)
        finally:
            await node.close()

    with owner.locked():
        asyncio.run(serve())
