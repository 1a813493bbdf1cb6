"""Claims beyond slots_per_key do not count, and no honest peer that moves is mistaken for a squatter (R-REC-10)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from test_peer_life import make_plan

from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.records import Progress
from paris_swarm.swarm.claims import ROUTER, beyond_allowance, rendezvous_order
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.memory import MemoryNetwork, MemoryTransport
from paris_swarm.swarm.node import SwarmNode

SLOTS = st.sets(st.integers(0, 40).map(str), max_size=12)
PROGRESS = Progress(step=0, steps=4, loss=None, images_per_s=0.0, device="cpu")


@given(SLOTS, st.integers(1, 4), st.booleans())
def test_exactly_the_allowance_counts_and_the_router_is_beside_it(slots: set[str], most: int, router: bool) -> None:
    claimed = slots | ({ROUTER} if router else set())
    beyond = beyond_allowance("plan", "peer", claimed, most)
    assert ROUTER not in beyond
    assert len(slots - beyond) == min(most, len(slots))


@given(SLOTS, SLOTS, st.integers(1, 4))
def test_who_knows_fewer_claims_counts_none_less(known: set[str], unknown: set[str], most: int) -> None:
    assert beyond_allowance("plan", "peer", known, most) <= beyond_allowance("plan", "peer", known | unknown, most)


def test_a_peer_that_moved_is_read_again_before_it_is_taken_for_a_squatter(tmp_path: Path) -> None:
    opened, network = make_plan(lease_s=60.0), MemoryNetwork(seed=0)

    async def node(name: str) -> SwarmNode:
        home = Home(tmp_path / name)
        identity = home.identity()
        transport = await MemoryTransport.start(network, identity.peer_id, [], observer=False)
        return SwarmNode(home, identity, transport, opened)

    async def scenario() -> None:
        mover, reader = await node("mover"), await node("reader")
        await reader.transport.connect((await mover.transport.addresses())[0])
        await mover.join()
        await reader.join()
        peer = mover.identity.peer_id
        preferred, other = rendezvous_order(opened.plan_id, peer, ["0", "1"])
        await mover.publish_claim(preferred, PROGRESS)
        await reader.refresh([preferred])
        await mover.publish_claim(preferred, PROGRESS, released=True)
        await mover.publish_claim(other, PROGRESS)
        await reader.refresh([other])  # what it knows of the first slot is older than the move
        assert peer in reader.slot_view(other).protecting(time.time(), opened.plan.policy)
        assert peer not in reader.slot_view(preferred).live(time.time())
        await asyncio.gather(mover.close(), reader.close())

    asyncio.run(scenario())


def test_a_claim_that_does_not_count_is_still_shown(tmp_path: Path) -> None:
    opened, network = make_plan(lease_s=60.0), MemoryNetwork(seed=0)

    async def scenario() -> None:
        home = Home(tmp_path / "squatter")
        home.write_identity(Identity(b"s" * 32))
        transport = await MemoryTransport.start(network, home.identity().peer_id, [], observer=False)
        squatter = SwarmNode(home, home.identity(), transport, opened)
        await squatter.join()
        for slot in ("0", "1"):
            await squatter.publish_claim(slot, PROGRESS)
        views = [squatter.slot_view(slot) for slot in ("0", "1")]
        peer = squatter.identity.peer_id
        assert [peer in view.live(time.time()) for view in views] == [True, True]
        assert sum(peer in view.protecting(time.time(), opened.plan.policy) for view in views) == 1
        await squatter.close()

    asyncio.run(scenario())
