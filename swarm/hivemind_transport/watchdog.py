"""An empty routing table stays empty, as hivemind has it: this dials and pings the peers that are known, again."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError

from paris_swarm.dht_schemas.invite import peer_id_in
from paris_swarm.swarm.hivemind_transport.peer_addresses import PeerAddresses
from paris_swarm.swarm.hivemind_transport.record_node import RecordNode
from paris_swarm.swarm.transport import TransportDown

log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 60.0
"""Between two looks of a node that meets nobody."""


async def keep_connected(records: RecordNode, addresses: PeerAddresses, every_s: float) -> None:
    """Keep the routing table filled: at once when it is empty, now and then for known peers missing from it.

    Never returns. every_s: how often it looks, seconds.
    """
    pause, rounds = every_s, 0
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await records.alone.wait()
                await asyncio.sleep(min(1.0, every_s))
        records.alone.clear()
        rounds += 1
        try:
            met = records.met()
            if not met or rounds % 12 == 0:
                missing = {peer: address for peer, address in addresses.known.items() if peer not in met}
                await asyncio.gather(*map(addresses.connect, missing.values()), return_exceptions=True)
                await records.meet({*missing, *await addresses.connected()} - met)
            if met and rounds % 12 == 1:
                addresses.learn({peer_id_in(address): address for address in await addresses.listening()})
        except (TransportDown, P2PDaemonError) as error:
            log.warning("the network daemon does not answer: %s", error)
        pause = every_s if records.contacts() else min(2 * pause, _LONGEST_PAUSE_S)
