"""`paris-swarm invite PEER_ID --plan PLAN`: admit a peer to a closed swarm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paris_swarm.cli.exits import Usage
from paris_swarm.cli.settings import HomeOption, JsonOption, settings


def invite(
    context: typer.Context,
    peer_id: Annotated[str, typer.Argument(help="Peer id, as `paris-swarm identity show` prints it.")],
    plan: Annotated[Path, typer.Option("--plan", help="Plan folder written by `init`.")],
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Multiaddr of a peer to join through (default: those of the last bootstrap)."),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign an admission token and print the peer's own invite; no other peer can use it. The organiser's home signs."""
    shared = settings(context, home, as_json)
    from paris_swarm.cli.organising import organised_plan, peers_to_join_through
    from paris_swarm.dht_schemas.admission import seal_token
    from paris_swarm.dht_schemas.errors import RecordError
    from paris_swarm.dht_schemas.identity import public_key_bytes
    from paris_swarm.dht_schemas.invite import Invite

    owner = shared.open_home()
    plan_folder, identity = organised_plan(owner, plan)
    try:
        public_key_bytes(peer_id)
    except RecordError as error:
        raise Usage(f"{error.detail}; the peer prints its own with `paris-swarm identity show`") from error
    token = seal_token(identity, plan_folder.plan_id, peer_id)
    link = Invite(plan_folder.plan_id, peers_to_join_through(owner, plan_folder.plan_id, peer), token)
    closed = plan_folder.opened.plan.admission == "invited"
    shared.answer(
        {"invite": str(link), "peer": peer_id, "plan": link.plan_id, "token": token, "peers": list(link.peers)},
        "\n".join(
            [
                *([] if closed else ["The plan is open: everybody may join, with or without an invite of their own."]),
                *([] if link.peers else ["No address of a peer is in it: run `bootstrap` first, or pass --peer."]),
                f"Invite for {peer_id}, of no use to anybody else:",
                "",
                str(link),
            ]
        ),
    )
