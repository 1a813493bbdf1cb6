"""What only the organiser does: admit peers, and say what holds in the running swarm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from paris_swarm.cli.exits import Usage
from paris_swarm.cli.plan_folder import PlanFolder, open_plan_folder
from paris_swarm.dht_schemas.errors import InviteError
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.invite import Invite
from paris_swarm.dht_schemas.notice import Notice, State, seal_notice
from paris_swarm.dht_schemas.trusted import TrustedSwarm
from paris_swarm.swarm.home import Home


def organised_plan(home: Home, folder: Path) -> tuple[PlanFolder, Identity]:
    """The plan in ``folder`` and the key that signed it.

    Raises:
        Usage: this home's key did not sign the plan.
    """
    plan_folder = open_plan_folder(folder)
    identity = home.identity(create=False)
    organiser = plan_folder.opened.plan.organiser
    if identity.peer_id != organiser:
        raise Usage(
            f"the plan in {folder} was signed by {organiser}, but {home.path} is {identity.peer_id}: only its "
            "organiser can do this; choose the home that ran `init` with --home"
        )
    return plan_folder, identity


def peers_to_join_through(home: Home, plan_id: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """Multiaddrs for an invite: those given, or those of this home's last bootstrap of the plan."""
    if given:
        return tuple(given)
    last = home.last_invite()
    if last is None:
        return ()
    try:
        remembered = Invite.parse(last)
    except InviteError:
        return ()
    return remembered.peers if remembered.plan_id == plan_id else ()


def next_notice(
    trusted: TrustedSwarm,
    identity: Identity,
    *,
    revoke: Iterable[str],
    restore: Iterable[str],
    state: State | None,
    message: str | None,
) -> bytes:
    """The envelope of the notice after the newest one that ``trusted`` knows: what it said, with these changes.

    Raises:
        Usage: a peer to restore is not revoked, or the organiser is to be revoked.
        ValueError: the message or a peer id cannot stand in a notice, or it would grow too large.
    """
    standing = trusted.standing
    restored = set(restore)
    if strange := restored - standing.revoked:
        raise Usage(f"{min(strange)} is not revoked: there is nothing to restore")
    revoked = (standing.revoked | set(revoke)) - restored
    if trusted.plan.organiser in revoked:
        raise Usage("the organiser cannot revoke its own key: whoever holds it can sign the opposite")
    if message is None:
        # What was said of another state says nothing of this one.
        message = standing.message[:500] if state in (None, standing.state) else ""
    notice = Notice(
        plan=trusted.plan_id,
        number=standing.number + 1,
        state=state or standing.state,
        revoked=tuple(sorted(revoked)),
        message=message,
    )
    return seal_notice(identity, notice)
