"""From an invite to a node of that swarm: start the transport, fetch and check the plan, join the DHT."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from paris_swarm.cli.exits import Usage
from paris_swarm.cli.plan_folder import PlanFolder, open_plan_folder
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.invite import Invite, peer_id_in
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.node import SwarmNode, fetch_plan

log = logging.getLogger(__name__)

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
CLOCK_WARNING_S = 1.0
CLOCK_LIMIT_S = 3.0


@dataclass(frozen=True)
class Connected:
    """A joined node and the plan it serves."""

    node: SwarmNode
    plan_folder: PlanFolder
    invite: Invite


def resolve_invite(text: str | None, home: Home) -> Invite:
    """The invite given, or that of the swarm this home joined last.

    Raises:
        Usage: none was given and this home has joined none.
        InviteError: it cannot be read.
    """
    if text is None:
        text = home.last_invite()
        if text is None:
            raise Usage(
                f"no INVITE was given and {home.path} has not joined a swarm yet: paste the line that starts "
                "with `paris:`, printed by `paris-swarm bootstrap`"
            )
    return Invite.parse(text)


@asynccontextmanager
async def connected(
    home: Home, invite: Invite, *, identity: Identity, listen: str = LOOPBACK, public: bool = False
) -> AsyncIterator[Connected]:
    """A full peer: serves files, stores records for others. The caller holds the home's lock.

    Raises:
        TransportError: nobody in the invite, or in the peer cache, could be reached.
        RecordError, Unverified: what came is not the plan the invite names.
    """
    from paris_swarm.swarm.hivemind_transport import HivemindTransport

    transport = await HivemindTransport.start(
        home.identity_path, seeds=seeds(home, invite), listen=listen, public=public
    )
    try:
        opened = await fetch_plan(transport, home, invite.plan_id, [peer_id_in(peer) for peer in seeds(home, invite)])
        plan_folder = open_plan_folder(home.swarm(invite.plan_id).plan_path, plan_id=invite.plan_id)
        node = SwarmNode(home, identity, transport, opened)
        await node.join()
        check_clock(await transport.clock_offset())
    except BaseException:
        await transport.close()
        raise
    try:
        yield Connected(node, plan_folder, invite)
    finally:
        await node.close()


@asynccontextmanager
async def observing(home: Home, invite: Invite) -> AsyncIterator[Connected]:
    """A node that only reads: a throw-away key, so that it can run beside a `join` of the same home.

    It stores nothing for others and is gone when the block ends; verified records and files stay in the home.
    """
    from paris_swarm.swarm.hivemind_transport import HivemindTransport

    scratch = Path(tempfile.mkdtemp(prefix="paris-swarm-observer-"))
    observer = Home(scratch)
    identity = observer.identity()
    try:
        transport = await HivemindTransport.start(observer.identity_path, seeds=seeds(home, invite), observer=True)
        try:
            opened = await fetch_plan(
                transport, home, invite.plan_id, [peer_id_in(peer) for peer in seeds(home, invite)]
            )
            plan_folder = open_plan_folder(home.swarm(invite.plan_id).plan_path, plan_id=invite.plan_id)
            node = SwarmNode(home, identity, transport, opened, observer=True)
            await node.join()
        except BaseException:
            await transport.close()
            raise
        try:
            yield Connected(node, plan_folder, invite)
        finally:
            await node.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_clock(offset: float | None) -> None:
    """Leases are judged by the clock: warn from one second off the median peer, refuse from three.

    Raises:
        Usage: this clock is three seconds off or more.
    """
    if offset is None or abs(offset) < CLOCK_WARNING_S:
        return
    said = f"this machine's clock is {abs(offset):.1f} s {'behind' if offset > 0 else 'ahead of'} its peers'"
    if abs(offset) >= CLOCK_LIMIT_S:
        raise Usage(f"{said}: claims would be refused or lapse early. Synchronise it (NTP), then join again")
    log.error("%s; synchronise it (NTP): from %.0f s on, claims are refused", said, CLOCK_LIMIT_S)


def seeds(home: Home, invite: Invite) -> list[str]:
    """Addresses to try: the invite's, then those of peers seen in earlier runs."""
    return list(dict.fromkeys([*invite.peers, *home.known_peers()]))
