"""A small swarm of real nodes on loopback, and what its attackers run.

Honest nodes are `SwarmNode`s on `HivemindTransport`s. The `Rogue` is a node of plain hivemind without any validator.
Every scenario of a test runs on one loop in one thread, so that the nodes are started once for all tests.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2P, PeerID
from hivemind.utils import MSGPackSerializer
from hivemind.utils.timed_storage import ValueWithExpiration
from safetensors.numpy import save

from paris_swarm.dht_schemas import (
    Announcement,
    Bars,
    Claim,
    Holding,
    Identity,
    OpenedPlan,
    Plan,
    Policy,
    Progress,
    SlotSpec,
    TensorSpec,
    Verification,
    open_plan,
    payload_type,
    seal,
    seal_plan,
)
from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.dht_rules import checkpoint_key, claim_key
from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.swarm.hivemind_transport import MAX_SUBKEYS, HivemindTransport
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.sightings import Candidate
from paris_swarm.swarm.transport import TransportError

T = TypeVar("T")
pack = MSGPackSerializer.dumps

WEIGHTS = "ema.safetensors"
HONEST_WEIGHTS = save({"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, dtype=np.float32)})
PROGRESS = Progress(step=5, steps=100, loss=0.25, images_per_s=46.5, device="cpu")
ORGANISER = Identity(b"o" * 32)


def small_plan(*, clusters: int = 256, bar: float = 1.0, **changes: Any) -> OpenedPlan:
    """A plan whose checkpoints are one file of two small tensors."""
    table = [TensorSpec(name="w", dtype="F32", shape=(2, 3)), TensorSpec(name="b", dtype="F32", shape=(3,))]
    spec = SlotSpec(recipe={"train": {"steps": 100}}, files={WEIGHTS: table})
    policy = {"lease_s": 120.0, "checkpoint_every_s": 45.0, "first_checkpoint_grace_s": 60.0}
    policy |= {name: changes.pop(name) for name in list(changes) if name in Policy.model_fields}
    bars = Bars(resumable=bar, assemblable=bar / 2)
    plan = Plan(
        name="attacked",
        organiser=ORGANISER.peer_id,
        created=1_790_000_000,
        clusters=clusters,
        seed=7,
        data={"licence": "CC0-1.0"},
        expert=spec,
        router=spec,
        policy=Policy(**policy, checkpoint_cap_bytes=10_000_000),
        verification=Verification(probe_seed=3, bars=dict.fromkeys([*map(str, range(clusters)), "router"], bars)),
        **{"admission": "open", **changes},
    )
    return open_plan(seal_plan(ORGANISER, plan))


class LoopThread:
    """One event loop for the whole folder."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], *, limit_s: float = 60.0) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(limit_s):
                return await work

        return asyncio.run_coroutine_threadsafe(bounded(), self.loop).result()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


# ---- what attackers run --------------------------------------------------------------------------------------------


def dictionary(items: Sequence[tuple[object, bytes, float]]) -> DictionaryDHTValue:
    """A dictionary as an attacker sends it: (subkey, packed value, expiration), nothing checked."""
    crafted = DictionaryDHTValue()
    crafted.packb = lambda: pack([None, math.inf, [list(item) for item in items]])
    return crafted


class Rogue:
    """A node of plain hivemind, without any validator. It is part of the swarm's DHT and may lie when asked."""

    def __init__(self, node: DHTNode, p2p: P2P) -> None:
        self.node, self._p2p = node, p2p
        self._truth = node.protocol.storage.get

    @classmethod
    async def start(cls, *targets: SwarmNode, names_peers: bool = True) -> Rogue:
        """
        Args:
            names_peers: whether its daemon answers libp2p's own searches. That is a table beside hivemind's: a daemon
                in it tells newcomers of everybody it knows, whatever the node above it hides.
        """
        seeds = [address for target in targets for address in await target.transport.addresses()]
        p2p = await P2P.create(
            initial_peers=seeds,
            dht_mode="server" if names_peers else "client",
            auto_nat=False,
            nat_port_map=False,
            use_relay=False,
            startup_timeout=60,
        )
        rogue = cls(await DHTNode.create(p2p=p2p, cache_nearest=0), p2p)
        for target in targets:
            assert await rogue.node.protocol.call_ping(PeerID.from_base58(target.transport.peer_id)) is not None
        return rogue

    @property
    def peer_id(self) -> str:
        return str(self.node.peer_id.to_base58())

    async def addresses(self) -> list[str]:
        """Full multiaddrs to dial this node at."""
        return [
            f"{address}/p2p/{self.peer_id}" if "/p2p/" not in str(address) else str(address)
            for address in await self._p2p.get_visible_maddrs()
        ]

    async def offer(
        self, target: SwarmNode, key: str, subkey: object, value: object, expiration: float, *, packed: bool = True
    ) -> bool | None:
        """Ask one node to store one record, past all politeness; None: it did not answer."""
        data = pack(value) if packed else value
        peer = PeerID.from_base58(target.transport.peer_id)
        answer = await self.node.protocol.call_store(peer, [DHTID.generate(key)], [data], [expiration], [subkey])
        return None if answer is None else bool(answer[0])

    async def offer_many(self, target: SwarmNode, key: str, records: Sequence[tuple[str, bytes, float]]) -> int:
        """Offer records in one request; how many were taken."""
        peer, place = PeerID.from_base58(target.transport.peer_id), DHTID.generate(key)
        answer = await self.node.protocol.call_store(
            peer,
            [place] * len(records),
            [pack(value) for _subkey, value, _until in records],
            [until for _subkey, _value, until in records],
            [subkey for subkey, _value, _until in records],
        )
        assert answer is not None
        return sum(map(bool, answer))

    @contextmanager
    def answering(self, items: Sequence[tuple[object, bytes, float]]) -> Iterator[None]:
        """Answer every question about records with this dictionary, for as long as the block lasts."""
        self.node.protocol.storage.get = lambda _key: ValueWithExpiration(dictionary(items), math.inf)
        try:
            yield
        finally:
            self.node.protocol.storage.get = self._truth

    async def meet(self, *readers: SwarmNode) -> None:
        """Make sure that readers ask this node."""
        for reader in readers:
            node = reader.transport._records.node  # type: ignore[attr-defined]
            node.blacklist.clear()
            assert await node.protocol.call_ping(self.node.peer_id) is not None
        await asyncio.sleep(0)

    async def stop(self) -> None:
        reader = self._p2p._reader_task
        await self._p2p.shutdown()
        await asyncio.gather(reader, return_exceptions=True)


def forge(identity: Identity, kind: str, payload: Any) -> bytes:
    """An envelope whose signature is right, whatever its payload says."""
    return seal(identity, payload_type(kind), payload if isinstance(payload, bytes) else canonical_json(payload))


# ---- the honest ----------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """Where one attack is played: a slot that nobody else uses, and alice's honest claim on it."""

    arena: Arena
    slot: str
    claim: Claim
    envelope: bytes

    @property
    def key(self) -> str:
        return claim_key(self.arena.opened.plan_id, self.slot)

    @property
    def ckpt_key(self) -> str:
        return checkpoint_key(self.arena.opened.plan_id, self.slot)

    async def renew(self) -> None:
        """Alice renews her claim: from now on that one is the truth."""
        self.claim = await self.arena.alice.publish_claim(self.slot, PROGRESS)
        envelope = self.arena.alice.files.ledger.last("claim", self.slot)
        assert envelope is not None
        self.envelope = envelope


class Arena:
    """Alice trains, bob is another full peer, carol only reads. ``mallory`` is a key in the wrong hands."""

    def __init__(self, thread: LoopThread, folder: Path, opened: OpenedPlan) -> None:
        self.thread, self.folder, self.opened = thread, folder, opened
        self.mallory = Identity.generate()
        self.alice: SwarmNode
        self.bob: SwarmNode
        self.carol: SwarmNode
        self.rogue: Rogue
        self._nodes: list[SwarmNode] = []
        self._slots = iter(range(opened.plan.clusters))

    def run(self, work: Coroutine[Any, Any, T], *, limit_s: float = 60.0) -> T:
        return self.thread.run(work, limit_s=limit_s)

    async def open(self, *, max_subkeys: int = MAX_SUBKEYS, alice: Identity | None = None) -> Arena:
        self.alice = await self.node("alice", identity=alice, max_subkeys=max_subkeys)
        self.bob = await self.node("bob", self.alice, max_subkeys=max_subkeys)
        self.carol = await self.node("carol", self.alice, self.bob, observer=True)
        self.rogue = await Rogue.start(self.alice, self.bob)
        await self.rogue.meet(self.alice, self.bob, self.carol)
        return self

    async def node(
        self,
        name: str,
        *seeds: SwarmNode | str,
        identity: Identity | None = None,
        observer: bool = False,
        max_subkeys: int = MAX_SUBKEYS,
        clock: Callable[[], float] = time.time,
        join: bool = True,
    ) -> SwarmNode:
        """A node that knows only the seeds."""
        home = Home(self.folder / name)
        if identity is not None:
            home.write_identity(identity)
        identity = home.identity()
        addresses = [
            address
            for seed in seeds
            for address in ([seed] if isinstance(seed, str) else await seed.transport.addresses())
        ]
        transport = await HivemindTransport.start(
            home.identity_path, addresses, observer=observer, watch_s=1.0, max_subkeys=max_subkeys
        )
        node = SwarmNode(home, identity, transport, self.opened, observer=observer, clock=clock)
        self._nodes.append(node)
        if join:
            await node.join()
        return node

    async def close_nodes(self, *nodes: SwarmNode) -> None:
        await asyncio.gather(*(node.close() for node in nodes))
        self._nodes = [node for node in self._nodes if node not in nodes]

    async def close(self) -> None:
        await self.rogue.stop()
        await self.close_nodes(*self._nodes)

    def next_slot(self) -> str:
        return str(next(self._slots))

    async def raise_curtain(self) -> Stage:
        """A fresh slot, and alice's claim on it."""
        slot = self.next_slot()
        claim = await self.alice.publish_claim(slot, PROGRESS)
        envelope = self.alice.files.ledger.last("claim", slot)
        assert envelope is not None
        stage = Stage(self, slot, claim, envelope)
        await self.check_honest_claim(stage)
        return stage

    async def drop_curtain(self, stage: Stage) -> None:
        await self.alice.publish_claim(stage.slot, PROGRESS, released=True)

    async def check_honest_claim(self, stage: Stage) -> None:
        """Bob, and carol who keeps no records of others, read alice's claim as she wrote it."""
        for reader in (self.bob, self.carol):
            found = await reader.transport.get(stage.key)
            assert found.get(self.alice.identity.peer_id) == (stage.envelope, stage.claim.until), reader.home.path.name
            await reader.refresh([stage.slot])
            assert reader.trusted.claims[stage.slot][self.alice.identity.peer_id].seq == stage.claim.seq

    # ---- records of any key

    def claim(self, slot: str, identity: Identity | None = None, **changes: Any) -> Claim:
        identity = identity or self.mallory
        now = time.time()
        values: dict[str, Any] = {
            "plan": self.opened.plan_id,
            "slot": slot,
            "peer": identity.peer_id,
            "seq": int(now * 1000),
            "until": now + 60.25,
            "progress": PROGRESS,
        }
        return Claim(**{**values, **changes})

    def announcement(self, slot: str, identity: Identity | None = None, **changes: Any) -> Announcement:
        values: dict[str, Any] = {
            "plan": self.opened.plan_id,
            "slot": slot,
            "author": (identity or self.mallory).peer_id,
            "seq": int(time.time() * 1000),
            "step": 50,
            "parent": None,
            "root": "b" * 64,
            "bytes": 1000,
            "probe_loss": 0.25,
        }
        return Announcement(**{**values, **changes})

    def holding(self, slot: str, announcement: bytes, identity: Identity | None = None, **changes: Any) -> Holding:
        now = time.time()
        values: dict[str, Any] = {
            "plan": self.opened.plan_id,
            "slot": slot,
            "holder": (identity or self.mallory).peer_id,
            "seq": int(now * 1000),
            "until": now + 60.25,
            "announcement": announcement.decode(),
        }
        return Holding(**{**values, **changes})

    # ---- checkpoints

    async def publish(
        self,
        node: SwarmNode,
        slot: str,
        files: Mapping[str, bytes] | None = None,
        *,
        step: int = 50,
        probe_loss: float = 0.25,
        **lies: Any,
    ) -> Announcement:
        """Put files into a node's store and announce them, truthfully or not."""
        folder = self.folder / f"checkpoint-{time.monotonic_ns()}"
        folder.mkdir()
        for name, data in (files or {WEIGHTS: HONEST_WEIGHTS, "state.json": b"{}"}).items():
            (folder / name).write_bytes(data)
        names = sorted(path.name for path in folder.iterdir())
        manifest, data, root = build_manifest(folder, names, slot, meta={"step": step, "parent": None})
        node.store.put_folder(data, folder)
        said = {"step": step, "root": root, "parent": None, "total_bytes": manifest.total_bytes} | lies
        return await node.announce(slot, probe_loss=probe_loss, **said)


async def best_verified(
    node: SwarmNode, slot: str, check: Callable[[Candidate, Path], None] | None = None
) -> tuple[Candidate | None, list[Exception]]:
    """What a successor does: the first candidate that verifies, and why each one before it was refused."""
    refusals: list[Exception] = []
    for candidate in node.candidates(slot):
        try:
            folder = await node.fetch_checkpoint(candidate)
            if check is not None:
                check(candidate, folder)
            return candidate, refusals
        except (RecordError, TransportError) as error:
            node.doubt(candidate, error)
            refusals.append(error)
    return None, refusals
