"""Nodes of one closed (or open) swarm on the network in memory, with an organiser whose key the test holds."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

from worlds import run

from paris_swarm.dht_schemas.admission import PeerLists, seal_token
from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.notice import Notice, State, seal_notice
from paris_swarm.dht_schemas.plan import (
    Bars,
    OpenedPlan,
    Plan,
    Policy,
    SlotSpec,
    TensorSpec,
    Verification,
    open_plan,
    seal_plan,
)
from paris_swarm.dht_schemas.records import Progress
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.memory import MemoryNetwork, MemoryTransport
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.transport import TransportError

ORGANISER = Identity(b"o" * 32)
PROGRESS = Progress(step=0, steps=10, loss=None, images_per_s=0.0, device="cpu")
LEASE_S = 600.0
"""So long that no timer of a node fires during a test: what happens is what the test does."""


def closed_plan(**changes: object) -> OpenedPlan:
    spec = SlotSpec(recipe={}, files={"ema.safetensors": (TensorSpec(name="w", dtype="F32", shape=(2,)),)})
    values: dict[str, object] = {
        "name": "closed",
        "organiser": ORGANISER.peer_id,
        "created": 1,
        "clusters": 2,
        "seed": 0,
        "data": {},
        "expert": spec,
        "router": spec,
        "policy": Policy(
            lease_s=LEASE_S, checkpoint_every_s=60, first_checkpoint_grace_s=60, checkpoint_cap_bytes=1 << 20
        ),
        "admission": "invited",
        "verification": Verification(
            probe_seed=0, bars={slot: Bars(resumable=9.0, assemblable=5.0) for slot in ("0", "1", "router")}
        ),
        "files": (),
    }
    return open_plan(seal_plan(ORGANISER, Plan.model_validate({**values, **changes})))


class Closed:
    """One swarm and its nodes; the first node is the organiser's."""

    def __init__(self, folder: Path, plan: OpenedPlan | None = None) -> None:
        self.folder = folder
        self.opened = plan or closed_plan()
        self.network = MemoryNetwork(seed=0)
        self.nodes: list[SwarmNode] = []

    @property
    def plan_id(self) -> str:
        return self.opened.plan_id

    def home(self, name: str) -> Home:
        home = Home(self.folder / name)
        if name == "organiser" and not home.identity_path.exists():
            home.write_identity(ORGANISER)
        return home

    def invite(self, name: str) -> str:
        """Admit the peer of a home; returns the token."""
        token = seal_token(ORGANISER, self.plan_id, self.home(name).identity().peer_id)
        self.home(name).swarm(self.plan_id).store_token(token)
        return token

    async def transport(self, peer_id: str, *, observer: bool = False) -> MemoryTransport:
        seeds = [address for node in self.nodes[:1] for address in await node.transport.addresses()]
        return await MemoryTransport.start(self.network, peer_id, seeds, observer=observer)

    async def node(
        self, name: str, *, lists: PeerLists | None = None, join: bool = True, clock: Callable[[], float] | None = None
    ) -> SwarmNode:
        home = self.home(name)
        identity = home.identity()
        options = {} if clock is None else {"clock": clock}
        node = SwarmNode(
            home,
            identity,
            await self.transport(identity.peer_id),
            self.opened,
            dice=random.Random(name),
            lists=lists,
            **options,  # type: ignore[arg-type]
        )
        node.store.put_blob(self.opened.envelope)
        self.nodes.append(node)
        if join:
            await node.join()
        return node

    async def close(self, *nodes: SwarmNode) -> None:
        for node in nodes or tuple(self.nodes):
            await node.close()
            self.nodes.remove(node)

    def notice(self, number: int, *revoked: SwarmNode, state: State = "running", message: str = "") -> bytes:
        keys = tuple(sorted(node.identity.peer_id for node in revoked))
        said = Notice(plan=self.plan_id, number=number, state=state, revoked=keys, message=message)
        return seal_notice(ORGANISER, said)


def closed(tmp_path: Path, story: Callable[[Closed], Awaitable[None]], plan: OpenedPlan | None = None) -> None:
    """Run a story in a swarm, and end every node after it."""

    async def bounded() -> None:
        swarm = Closed(tmp_path, plan)
        try:
            await story(swarm)
        finally:
            await swarm.close()

    run(bounded())


async def rounds_until(swarm: Closed, done: Callable[[SwarmNode], bool], *, at_most: int) -> int:
    """Gossip rounds, one greeting a node each, until every node is done."""
    for count in range(at_most):
        if all(done(node) for node in swarm.nodes):
            return count
        for node in list(swarm.nodes):
            with contextlib.suppress(TransportError, RecordError):
                await node.gossip()
        await asyncio.sleep(0)
    missing = sum(not done(node) for node in swarm.nodes)
    raise AssertionError(f"{missing} of {len(swarm.nodes)} nodes have not heard after {at_most} rounds")
