"""A node of one swarm: transport, verified records, content store, and the timers that keep records alive.

Everything here runs on one asyncio loop. DHT presence is never truth (a rejected store can evict a newer record early,
lost replicas are not repaired): verified records are kept in memory and on disk, ordered by sequence, and what this
node signed is stored again on a timer, at a third of its lease.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from paris_swarm.dht_schemas import records
from paris_swarm.dht_schemas.dht_rules import check_store, checkpoint_key, claim_key
from paris_swarm.dht_schemas.errors import RecordError, Rollback
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import FileEntry, Manifest
from paris_swarm.dht_schemas.plan import MAX_PLAN, OpenedPlan, open_plan
from paris_swarm.dht_schemas.records import Announcement, Claim, Holding, Progress
from paris_swarm.dht_schemas.trusted import TrustedSwarm
from paris_swarm.swarm.claims import SlotView
from paris_swarm.swarm.fetching import fetch_blob, fetch_files
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.serving import Counters, serve_files
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.transport import Transport, TransportError

log = logging.getLogger(__name__)

Clock = Callable[[], float]


@dataclass(frozen=True)
class Candidate:
    """An announced checkpoint of a slot and who holds it now."""

    slot: str
    announcement: Announcement
    envelope: bytes
    holders: tuple[str, ...]


class SwarmNode:
    """One peer's view of one swarm, and its voice in it.

    Args:
        home: the home folder this node acts for (already locked by the caller where it must be).
        identity: signs what this node says; equals the transport's peer id except for observers.
        transport: started (streams work), not yet part of the DHT.
        observer: reads only: announces nothing, serves nothing, and keeps its own ledger, since it may run beside the
            process that speaks as this home's peer.
        clock: Unix seconds.
    """

    def __init__(
        self,
        home: Home,
        identity: Identity,
        transport: Transport,
        opened: OpenedPlan,
        *,
        observer: bool = False,
        clock: Clock = time.time,
    ) -> None:
        self.home = home
        self.identity = identity
        self.transport = transport
        self.plan = opened.plan
        self.plan_id = opened.plan_id
        self.clock = clock
        self.observer = observer
        self.files = home.swarm(opened.plan_id, ledger="observer.json" if observer else "ledger.json")
        self.store = ContentStore(home.store_path)
        self.counters = Counters()
        self.trusted = TrustedSwarm(opened, highest=self.files.ledger.highest())
        self.first_seen: dict[tuple[str, str], float] = {}
        self.last_seen: dict[str, float] = {}
        self.refused: list[str] = []
        self._published: dict[str, list[str]] = {}
        self._doubted: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- joining ------------------------------------------------------------

    async def join(self) -> None:
        """Serve files, join the DHT with this plan's validator, and keep what this node holds announced."""
        if not self.observer:
            self.transport.serve(serve_files(self.store, self.counters))
        await self.transport.join_dht(self._check)
        if not self.observer:
            self._finish_interrupted_announcements()
            self._spawn(self._keep_alive())

    def _check(self, dht_id: bytes, subkey: str | None, value: object, expiration: float) -> None:
        check_store(
            {self.plan_id: self.plan},
            dht_id=dht_id,
            subkey=subkey,
            value=value,
            expiration=expiration,
            now=self.clock(),
        )

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self.observer:
            self.write_traffic()
        await self.transport.close()

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- reading ------------------------------------------------------------

    async def refresh(self, slots: Iterable[str]) -> None:
        """Read the slots' records from the DHT and keep every one that verifies."""
        keys = [(slot, key) for slot in slots for key in (claim_key, checkpoint_key)]
        found = await asyncio.gather(*(self.transport.get(key(self.plan_id, slot)) for slot, key in keys))
        for (slot, key), records_found in zip(keys, found, strict=True):
            for subkey, (value, _until) in records_found.items():
                try:
                    if key is claim_key:
                        claim = self.trusted.feed_claim(value, self.clock())
                        self.first_seen.setdefault((slot, claim.peer), self.clock())
                        self.last_seen[claim.peer] = max(self.last_seen.get(claim.peer, 0.0), claim.seq / 1000)
                    else:
                        holding, _announcement = self.trusted.feed_holding(value, self.clock())
                        self.last_seen[holding.holder] = max(
                            self.last_seen.get(holding.holder, 0.0), holding.seq / 1000
                        )
                except Rollback as error:
                    log.debug("%s", error)  # replicas lag behind one another: an older record is no alarm
                except RecordError as error:
                    self._refuse(f"{key(self.plan_id, slot)} from {subkey}: {error}")
        self.files.ledger.remember(self.trusted.highest)
        now = self.clock()
        for pair in [pair for pair in self.first_seen if not self._is_claiming(*pair, now)]:
            del self.first_seen[pair]  # a claimant that went away starts anew when it comes back

    def _is_claiming(self, slot: str, peer: str, now: float) -> bool:
        claim = self.trusted.claims.get(slot, {}).get(peer)
        return claim is not None and not claim.released and claim.until > now

    def _refuse(self, what: str) -> None:
        log.info("refused: %s", what)
        if what not in self.refused[-64:]:
            self.refused.append(what)
            self.files.log_event({"event": "refused", "what": what, "time": self.clock()})

    def doubt(self, root: str, why: Exception) -> None:
        """Leave a checkpoint out of account: for good when it was refused, for two leases when nobody served it."""
        forever = isinstance(why, RecordError)
        self._doubted[root] = math.inf if forever else self.clock() + 2 * self.plan.policy.lease_s
        self.files.log_event({"event": "refused", "root": root, "what": str(why), "time": self.clock()})

    def _is_doubted(self, root: str) -> bool:
        return self._doubted.get(root, 0.0) > self.clock()

    def candidates(self, slot: str) -> list[Candidate]:
        """Announced checkpoints of a slot that someone holds now, best announced probe loss first, ties by root."""
        now = self.clock()
        by_root: dict[str, tuple[Announcement, bytes, list[str]]] = {}
        for holding, announcement in self.trusted.holdings.get(slot, {}).values():
            if holding.until > now and not self._is_doubted(announcement.root):
                entry = by_root.setdefault(announcement.root, (announcement, holding.announcement.encode(), []))
                entry[2].append(holding.holder)
        order = sorted(by_root.values(), key=lambda entry: (entry[0].probe_loss, entry[0].root))
        return [Candidate(slot, announcement, envelope, tuple(holders)) for announcement, envelope, holders in order]

    def slot_view(self, slot: str) -> SlotView:
        """The slot as the claim policy sees it."""
        made: dict[str, float] = {}
        step = 0
        for _holding, announcement in self.trusted.holdings.get(slot, {}).values():
            if self._is_doubted(announcement.root):
                continue
            made[announcement.author] = max(made.get(announcement.author, 0.0), announcement.seq / 1000)
            step = max(step, announcement.step)
        return SlotView(
            slot=slot,
            claims=dict(self.trusted.claims.get(slot, {})),
            first_seen={peer: seen for (of, peer), seen in self.first_seen.items() if of == slot},
            checkpoint_at=made,
            step=step,
        )

    # ---- speaking -------------------------------------------------------------

    async def publish_claim(self, slot: str, progress: Progress, *, released: bool = False) -> Claim:
        """Claim or renew a slot for one lease; ``released`` gives it back at once."""
        now = self.clock()
        own = self.trusted.claims.get(slot, {}).get(self.identity.peer_id)
        seq = self.files.ledger.next_sequence("claim", slot, now=now, seen=own.seq if own else 0)
        claim = Claim(
            plan=self.plan_id,
            slot=slot,
            peer=self.identity.peer_id,
            seq=seq,
            until=now + self.plan.policy.lease_s,
            released=released,
            progress=progress,
        )
        envelope = claim.seal(self.identity)
        self.files.ledger.record("claim", slot, seq, envelope)
        self.trusted.feed_claim(envelope, now)
        self.first_seen.setdefault((slot, claim.peer), now)
        await self._store(claim_key(self.plan_id, slot), envelope, claim.until)
        return claim

    async def announce(
        self, slot: str, *, step: int, root: str, parent: str | None, total_bytes: int, probe_loss: float
    ) -> Announcement:
        """Sign a checkpoint of ours, write it down, and announce that we hold it."""
        now = self.clock()
        ledger = self.files.ledger
        announcement = Announcement(
            plan=self.plan_id,
            slot=slot,
            author=self.identity.peer_id,
            seq=ledger.next_sequence("checkpoint", slot, now=now),
            step=step,
            parent=parent,
            root=root,
            bytes=total_bytes,
            probe_loss=probe_loss,
        )
        envelope = announcement.seal(self.identity)
        ledger.record("checkpoint", slot, announcement.seq, envelope)
        await self.hold(slot, envelope)
        return announcement

    async def hold(self, slot: str, author_envelope: bytes) -> None:
        """Say that this node holds and serves an announced checkpoint (its own or another author's)."""
        self.files.hold(slot, author_envelope)
        await self._renew_holding(slot, author_envelope)

    async def _renew_holding(self, slot: str, author_envelope: bytes) -> None:
        now = self.clock()
        holding = Holding(
            plan=self.plan_id,
            slot=slot,
            holder=self.identity.peer_id,
            seq=self.files.ledger.next_sequence("holding", slot, now=now),
            until=now + min(2 * self.plan.policy.lease_s, records.MAX_LEASE_S),
            announcement=author_envelope.decode("utf-8"),
        )
        envelope = holding.seal(self.identity)
        self.files.ledger.record("holding", slot, holding.seq, envelope)
        self.trusted.feed_holding(envelope, now)
        await self._store(checkpoint_key(self.plan_id, slot), envelope, holding.until)

    def _finish_interrupted_announcements(self) -> None:
        """Announcements signed before a crash: the very same bytes are sent again, never new ones in their place."""
        held = self.files.held()
        for envelope in self.files.ledger.signed("checkpoint"):
            announcement = Announcement.open(envelope).record
            if announcement.slot not in held and self.store.has(announcement.root):
                self.files.hold(announcement.slot, envelope)

    def last_root(self, slot: str) -> str | None:
        """Root of the checkpoint of ``slot`` this peer published last, if any."""
        envelope = self.files.ledger.last("checkpoint", slot)
        return Announcement.open(envelope).record.root if envelope else None

    def forget_older(self, slot: str, root: str, *, keep: int) -> None:
        """Drop all but the newest ``keep`` of our own published checkpoints of a slot from the store."""
        roots = [*self._published.get(slot, []), root]
        for old in roots[:-keep]:
            self.store.delete(old)
        self._published[slot] = roots[-keep:]

    async def _store(self, key: str, envelope: bytes, until: float) -> None:
        try:
            await self.transport.store(key, self.identity.peer_id, envelope, until)
        except TransportError as error:
            # Training goes on while the network is away; the timer stores it again.
            log.warning("could not store %s: %s", key, error)

    async def _keep_alive(self) -> None:
        """Re-announce holdings, remember peers, write the byte counters: every third of a lease."""
        while True:
            try:
                for slot, envelope in self.files.held().items():
                    await self._renew_holding(slot, envelope)
                self.home.remember_peers(await self.transport.known_addresses())
                self.write_traffic()
            except (TransportError, RecordError, OSError) as error:
                log.warning("re-announcing failed: %s", error)
            await asyncio.sleep(self.plan.policy.lease_s / 3)

    def write_traffic(self) -> None:
        """Bytes of files served and fetched so far, per peer, into the swarm's folder."""
        self.files.write_traffic(self.counters.as_dict())

    # ---- files ------------------------------------------------------------------

    async def fetch_manifest(self, candidate: Candidate) -> tuple[Manifest, bytes]:
        """Fetch and check the manifest that a candidate's root commits to.

        Raises:
            RecordError: the bytes do not match the announcement.
            TransportError: no holder could be reached.
        """
        root = candidate.announcement.root
        data = self._own_blob(root)
        if data is None:
            data = await fetch_blob(
                self.transport, self._others(candidate.holders), root, max_bytes=1 << 20, counters=self.counters
            )
        return self.trusted.feed_manifest(candidate.announcement, data), data

    async def fetch_checkpoint(
        self,
        candidate: Candidate,
        *,
        names: Iterable[str] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Download a candidate's files into the content store, every chunk verified; returns their folder."""
        manifest, data = await self.fetch_manifest(candidate)
        root = candidate.announcement.root
        wanted = [entry for entry in manifest.files if names is None or entry.name in set(names)]
        await self._fetch(candidate.holders, root, data, manifest.files, wanted, on_progress)
        for entry in wanted:
            if entry.name.endswith(".safetensors"):
                path = self.store.path(root, entry.name)
                with open(path, "rb") as file:
                    head = file.read(8)
                    size = min(int.from_bytes(head, "little"), 4 << 20)
                    self.trusted.feed_header(candidate.slot, entry.name, head + file.read(size), entry.length)
        return self.store.path(root, wanted[0].name).parent

    async def _fetch(
        self,
        holders: Iterable[str],
        root: str,
        blob: bytes,
        entries: Iterable[FileEntry],
        wanted: Iterable[FileEntry],
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.store.put_blob(blob)
        await fetch_files(
            self.transport,
            self.store,
            self._others(holders),
            root,
            list(entries),
            names=[entry.name for entry in wanted],
            on_progress=on_progress,
            counters=self.counters,
        )

    def _own_blob(self, digest: str) -> bytes | None:
        """From our own store: a copy held here must do when every other holder is gone."""
        try:
            return self.store.read_blob(digest)
        except RecordError as error:  # changed on disk and set aside: as good as absent
            log.warning("%s", error)
            return None

    def _others(self, holders: Iterable[str]) -> list[str]:
        return [holder for holder in holders if holder != self.transport.peer_id]


async def fetch_plan(
    transport: Transport, home: Home, plan_id: str, peers: Iterable[str], *, counters: Counters | None = None
) -> OpenedPlan:
    """Fetch a plan and its files from ``peers`` (peer ids) unless the home has them already.

    Raises:
        RecordError: what came is not that plan.
        TransportError: nobody could be reached, or nobody has it.
    """
    store = ContentStore(home.store_path)
    swarm = home.swarm(plan_id)
    if (swarm.plan_path / "plan.json").exists():
        return open_plan((swarm.plan_path / "plan.json").read_bytes(), plan_id=plan_id)
    peers = list(peers)
    data = await fetch_blob(transport, peers, plan_id, max_bytes=MAX_PLAN, counters=counters)
    opened = open_plan(data, plan_id=plan_id)
    store.put_blob(data)
    await fetch_files(transport, store, peers, plan_id, list(opened.plan.files), kind="plan", counters=counters)
    store.link_into(plan_id, data, "plan.json", swarm.plan_path)
    return opened
