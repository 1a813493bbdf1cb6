"""From an invite to a node of that swarm: start the transport, fetch and check the plan, join the DHT."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paris_swarm.cli.exits import Usage
from paris_swarm.cli.plan_folder import PlanFolder, open_plan_folder
from paris_swarm.cli.settings import LOOPBACK
from paris_swarm.dht_schemas.admission import PeerLists, seal_delegation
from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.invite import Invite, peer_id_in
from paris_swarm.dht_schemas.records import MAX_LEASE_S
from paris_swarm.swarm.downloads import fetch_plan
from paris_swarm.swarm.greeting import NewcomerDoor, greet_peer
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.restarting import RestartingTransport
from paris_swarm.swarm.serving import ServingLimits
from paris_swarm.swarm.transport import Transport, TransportError

log = logging.getLogger(__name__)

CLOCK_WARNING_S = 1.0
CLOCK_LIMIT_S = 3.0
NEWS_FROM = 8
"""Peers that an observer greets for news."""


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


def take_token(home: Home, invite: Invite) -> str | None:
    """The admission token for this home's peer: the invite's, kept in the home from then on, or the one kept before.

    Raises:
        Usage: the invite was made for another peer id.
    """
    swarm = home.swarm(invite.plan_id)
    if invite.token is None:
        return swarm.token()
    own = home.identity().peer_id
    if invite.made_for != own:
        raise Usage(
            f"this invite was made for {invite.made_for}, but {home.path} is {own}: ask the organiser for one made "
            "with `paris-swarm invite` for your peer id, or choose the other home with --home"
        )
    swarm.store_token(invite.token)
    return invite.token


@dataclass(frozen=True)
class Roads:
    """How files travel. direct, direct_port: as HivemindTransport.start; compress: as encoding.Compress."""

    direct: bool = True
    direct_port: int = 0
    compress: Literal["auto", "never", "always"] = "auto"


@asynccontextmanager
async def connected(
    home: Home,
    invite: Invite,
    *,
    identity: Identity,
    listen: str = LOOPBACK,
    announce: Sequence[str] = (),
    public: bool = False,
    lists: PeerLists | None = None,
    upload_limit: float | None = None,
    store_limit: int | None = None,
    roads: Roads | None = None,
) -> AsyncIterator[Connected]:
    """A full peer: serves files, stores records for others. The caller holds the home's lock.

    Args:
        listen, announce, public: as ``start_transport``.
        upload_limit: bytes/s sent to all others together. store_limit: bytes, as in ContentStore.

    Raises:
        TransportError: nobody in the invite, or in the peer cache, could be reached.
        RecordError, Unverified: what came is not the plan the invite names.
        Usage: the invite was made for another peer.
    """
    door = NewcomerDoor(invite.plan_id, token=take_token(home, invite), lists=lists)
    roads = roads or Roads()
    transport = await start_transport(
        home.identity_path, seeds(home, invite), listen=listen, announce=announce, public=public, roads=roads
    )
    try:
        opened = await fetch_plan(
            transport,
            home,
            invite.plan_id,
            [peer_id_in(peer) for peer in seeds(home, invite)],
            door=door,
            store_limit=store_limit,
        )
        plan_folder = open_plan_folder(home.swarm(invite.plan_id).plan_path, plan_id=invite.plan_id)
        serving = ServingLimits(upload=upload_limit, compress=roads.compress)
        node = SwarmNode(home, identity, transport, opened, lists=lists, serving=serving, store_limit=store_limit)
        await node.join()
        check_clock(await transport.clock_offset())
    except BaseException:
        await transport.close()
        raise
    try:
        yield Connected(node, plan_folder, invite)
    finally:
        await node.close()


async def start_transport(
    identity_path: Path,
    seed_addresses: Sequence[str],
    *,
    listen: str = LOOPBACK,
    announce: Sequence[str] = (),
    public: bool = False,
    relay: bool = False,
    roads: Roads | None = None,
) -> RestartingTransport:
    """The network daemon of a peer that stays: started again, on the same port, when it dies.

    Args:
        announce: addresses, as ``announced`` checked them, that others are told instead of those listened on.
        relay: with ``public``: carry the streams of peers that nobody can dial; this one can be dialled.

    Raises:
        TransportDown: it did not start.
        ValueError: an address that cannot be listened on or dialled.
    """
    from paris_swarm.swarm.hivemind_transport import HivemindTransport

    async def launch(port: int | None, more_seeds: Sequence[str]) -> Transport:
        where = listen if port is None else re.sub(r"/(tcp|udp)/0(?=/|$)", rf"/\1/{port}", listen)
        every = list(dict.fromkeys([*seed_addresses, *more_seeds]))
        return await HivemindTransport.start(
            identity_path,
            seeds=every,
            listen=where,
            announce=announce,
            public=public,
            reachability="public" if public and relay else None,
            direct=roads.direct if roads else True,
            direct_port=roads.direct_port if roads else 0,
        )

    return await RestartingTransport.start(launch)


def announced(addresses: Sequence[str] | None) -> tuple[str, ...]:
    """What `--announce` said, checked: multiaddrs with a host and a TCP port that somebody can dial.

    Raises:
        Usage: one is not.
    """
    from multiaddr import Multiaddr
    from multiaddr.exceptions import Error as MultiaddrError

    checked = []
    for address in addresses or ():
        why = "an address such as /ip4/203.0.113.5/tcp/31337 or /dns4/peer.example.org/tcp/31337 is wanted"
        try:
            parts = [(protocol.name, value) for protocol, value in Multiaddr(address).items()]
        except (MultiaddrError, ValueError, LookupError) as error:
            raise Usage(f"--announce {address} cannot be read ({error}): {why}") from error
        names = [name for name, _value in parts]
        if len(parts) != 2 or names[0] not in ("ip4", "ip6", "dns", "dns4", "dns6") or names[1] != "tcp":
            raise Usage(f"--announce {address}: {why}")
        if parts[1][1] == "0" or parts[0][1] in ("0.0.0.0", "::"):
            raise Usage(f"--announce {address}: nobody can dial that; {why}")
        checked.append(str(Multiaddr(address)))
    return tuple(checked)


def warn_of_loopback(listen: str, peers: Sequence[str]) -> None:
    """Say so where this peer would listen on its own machine alone although its swarm's seeds are all elsewhere."""
    on_loopback = re.compile(r"/(ip4/127\.|ip6/::1/|dns[46]?/localhost/)")
    if peers and on_loopback.match(listen) and not any(map(on_loopback.match, peers)):
        log.error(
            "listening on this machine only (%s): nobody elsewhere can fetch what this peer trains or holds. Give "
            "--listen /ip4/0.0.0.0/tcp/31337, and --public behind a router that nobody opened a port in",
            listen,
        )


@asynccontextmanager
async def observing(
    home: Home, invite: Invite, *, store_limit: int | None = None, direct: bool = True
) -> AsyncIterator[Connected]:
    """A node that only reads: a throw-away key, so that it can run beside a `join` of the same home.

    It stores nothing for others and is gone when the block ends; verified records and files stay in the home. In a
    closed swarm it reads in the name of the home's peer, who lends it its admission.

    Raises:
        TransportError, RecordError, Unverified, Usage: as ``connected``; also when the home's peer was revoked.
    """
    from paris_swarm.swarm.hivemind_transport import HivemindTransport

    scratch = Path(tempfile.mkdtemp(prefix="paris-swarm-observer-"))
    observer = Home(scratch)
    identity = observer.identity()
    token = take_token(home, invite)
    delegate = None
    if token is not None:
        lender = home.identity(create=False)

        def delegate() -> str:
            return seal_delegation(lender, invite.plan_id, identity.peer_id, time.time() + MAX_LEASE_S)

    door = NewcomerDoor(invite.plan_id, token=token, delegate=delegate)
    try:
        transport = await HivemindTransport.start(
            observer.identity_path, seeds=seeds(home, invite), observer=True, direct=direct
        )
        try:
            opened = await fetch_plan(
                transport,
                home,
                invite.plan_id,
                [peer_id_in(peer) for peer in seeds(home, invite)],
                door=door,
                store_limit=store_limit,
            )
            plan_folder = open_plan_folder(home.swarm(invite.plan_id).plan_path, plan_id=invite.plan_id)
            node = SwarmNode(
                home, identity, transport, opened, observer=True, delegate=delegate, store_limit=store_limit
            )
            await node.join()
            await hear_news(node, [peer_id_in(peer) for peer in invite.peers])
            if token is not None:
                node.trusted.check_signer(home.identity(create=False).peer_id)
        except BaseException:
            await transport.close()
            raise
        try:
            yield Connected(node, plan_folder, invite)
        finally:
            await node.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


async def hear_news(node: SwarmNode, peers: Iterable[str]) -> list[str]:
    """Greet these peers, and everybody connected, for the organiser's newest notice; returns who greeted back."""
    wanted = {*peers, *await node.transport.connected_peers()} - {node.transport.peer_id}
    heard: list[str] = []
    for peer in sorted(wanted)[:NEWS_FROM]:
        try:
            await greet_peer(node.transport, peer, node.door, stall_s=5.0)
            heard.append(peer)
        except (TransportError, RecordError) as error:
            log.info("no news from %s: %s", peer, error)
    return heard


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
