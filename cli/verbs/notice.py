"""`paris-swarm notice PLAN`: what the organiser says to the whole swarm. Pause, resume, end, revoke, restore."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paris_swarm.cli.exits import Usage
from paris_swarm.cli.settings import HomeOption, JsonOption, settings

if TYPE_CHECKING:
    from paris_swarm.dht_schemas.notice import Standing, State


def notice(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(help="Plan folder written by `init`.")],
    revoke: Annotated[list[str] | None, typer.Option("--revoke", help="Peer id that no longer counts.")] = None,
    restore: Annotated[list[str] | None, typer.Option("--restore", help="Peer id that counts again.")] = None,
    pause: Annotated[bool, typer.Option("--pause", help="Peers stop training and keep serving.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Peers train again.")] = False,
    end: Annotated[bool, typer.Option("--end", help="Peers stop training for good and keep serving.")] = False,
    message: Annotated[str | None, typer.Option("--message", help="Shown by every peer; 500 characters.")] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Multiaddr of a peer to tell (default: those of the last bootstrap)."),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign the next notice and tell every peer that can be reached; they tell the others. Without options: show it.

    A notice says everything that holds: what is not changed here stays as it is. A bootstrap or join that runs on this
    home takes it up by itself.
    """
    shared = settings(context, home, as_json)
    import asyncio

    from paris_swarm.cli.connect import hear_news, observing
    from paris_swarm.cli.organising import next_notice, organised_plan, peers_to_join_through
    from paris_swarm.dht_schemas.errors import RecordError
    from paris_swarm.dht_schemas.invite import Invite, peer_id_in
    from paris_swarm.dht_schemas.trusted import TrustedSwarm
    from paris_swarm.swarm.transport import TransportError

    if pause + resume + end > 1:
        raise Usage("--pause, --resume and --end exclude one another")
    state: State | None = "paused" if pause else "running" if resume else "ended" if end else None
    owner = shared.open_home()
    plan_folder, identity = organised_plan(owner, plan)
    swarm = owner.swarm(plan_folder.plan_id)
    trusted = TrustedSwarm(plan_folder.opened)

    def recall() -> None:
        for envelope in swarm.notices():
            trusted.feed_notice(envelope)

    asked = any((revoke, restore, state, message is not None))
    invite = Invite(plan_folder.plan_id, peers_to_join_through(owner, plan_folder.plan_id, peer))

    def sign() -> None:
        """The number follows the highest on disk, where a higher one that peers know was put just before."""
        with swarm.notices_locked():
            recall()
            trusted.feed_notice(
                next_notice(trusted, identity, revoke=revoke or (), restore=restore or (), state=state, message=message)
            )
            swarm.write_notices(kept.sealed.envelope for kept in trusted.notices)

    async def tell() -> list[str]:
        if not invite.peers:
            if asked:
                sign()
            return []
        signed = False
        try:
            async with observing(owner, invite) as here:
                if asked:
                    sign()
                    signed = True
                here.node.reload_notices()
                return await hear_news(here.node, [peer_id_in(address) for address in invite.peers])
        except (TransportError, RecordError) as error:
            shared.console.print(f"Nobody could be told now: {error}", markup=False, style="yellow")
            if asked and not signed:
                sign()
            return []

    told = asyncio.run(tell())
    recall()
    standing = trusted.standing
    shared.answer(
        {"plan": plan_folder.plan_id, "told": told, "notice": _report(standing)},
        _text(standing, told if asked else None),
    )


def _report(standing: Standing) -> dict[str, Any] | None:
    if not standing.number:
        return None
    return {
        "number": standing.number,
        "state": standing.state,
        "revoked": sorted(standing.revoked),
        "message": standing.message,
        "contradicted": standing.contradicted,
    }


def _text(standing: Standing, told: list[str] | None) -> str:
    if not standing.number:
        return "No notice yet: the swarm is running, nobody is revoked."
    lines = [f"Notice {standing.number}: the swarm is {standing.state}."]
    if standing.message:
        lines.append(f"Message: {standing.message}")
    lines += [f"Revoked: {peer}" for peer in sorted(standing.revoked)]
    if standing.contradicted:
        lines.append("Two different notices bear this number: sign another one to end that.")
    if told is not None:
        lines.append(
            f"Told {len(told)} peers; they tell the others within a few leases."
            if told
            else "Nobody was told yet: a `bootstrap` or `join` on this home takes it up, or run this again."
        )
    return "\n".join(lines)
