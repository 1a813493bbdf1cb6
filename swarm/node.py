"""A node of one swarm: one peer's view of it and its voice in it, and the timers that keep both alive.

Everything here runs on one asyncio loop. What the parts do:

  sightings.py        records read and verified, as the claim policy sees them (pure)
  news.py             notices and proofs: heard, kept, passed on
  announcing.py       claims, announcements and holdings: signed, kept, sent, sent again
  own_checkpoints.py  what this home published, and which of it the store still needs
  downloads.py        manifests, checkpoints and plans from their holders
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Container, Iterable
from dataclasses import replace
from pathlib import Path

from paris_swarm.dht_schemas.admission import PeerLists
from paris_swarm.dht_schemas.dht_rules import check_store, checkpoint_key, claim_key
from paris_swarm.dht_schemas.errors import Equivocation, RecordError, Rollback
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import Manifest
from paris_swarm.dht_schemas.plan import OpenedPlan
from paris_swarm.dht_schemas.records import Announcement, Claim, Progress
from paris_swarm.dht_schemas.trusted import TrustedSwarm
from paris_swarm.swarm.announcing import Announcer
from paris_swarm.swarm.claims import SlotView
from paris_swarm.swarm.downloads import Downloads
from paris_swarm.swarm.file_download import OnProgress
from paris_swarm.swarm.greeting import Delegate
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.news import News
from paris_swarm.swarm.own_checkpoints import OwnCheckpoints
from paris_swarm.swarm.serving import Counters, ServingLimits, serve_files
from paris_swarm.swarm.sightings import Candidate, Sightings
from paris_swarm.swarm.sources import SourceBook
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.transport import Transport, TransportError

log = logging.getLogger(__name__)

Clock = Callable[[], float]

MAX_REFUSALS = 256
"""Refusals kept for people, the newest."""


class SwarmNode:
    """One peer's view of one swarm, and its voice in it.

    Args:
        home: the home folder this node acts for (already locked by the caller where it must be).
        identity: signs what this node says; equals the transport's peer id except for observers.
        transport: started (streams work), not yet part of the DHT.
        observer: reads only: announces nothing, serves nothing, and keeps its own ledger, since it may run beside the
            process that speaks as this home's peer.
        clock: Unix seconds.
        dice: chooses whom to greet, and which news to tell.
        lists: whom this node alone allows and blocks.
        delegate: an observer's: makes the delegation by which it reads in a peer's name (SPEC.md, R-ADM-3).
        serving: limits of what this node sends.
        store_limit: bytes that the content store may hold before it takes in more from others.
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
        dice: random.Random | None = None,
        lists: PeerLists | None = None,
        delegate: Delegate | None = None,
        serving: ServingLimits | None = None,
        store_limit: int | None = None,
    ) -> None:
        self.home = home
        self.identity = identity
        self.transport = transport
        self.plan = opened.plan
        self.plan_id = opened.plan_id
        self.clock = clock
        self.observer = observer
        self.files = home.swarm(opened.plan_id, ledger="observer.json" if observer else "ledger.json")
        self.store = ContentStore(home.store_path, limit=store_limit)
        self.counters = Counters()
        self.book = SourceBook()
        """What this node knows of the peers it downloads from; whoever sent wrong bytes is banned in it."""
        self.refused: list[str] = []
        self._serving = serving
        self._tasks: set[asyncio.Task[None]] = set()
        lists = lists or PeerLists()
        self.trusted = TrustedSwarm(
            opened,
            highest=self.files.ledger.highest(),
            lists=replace(lists, always=lists.always | {opened.plan.organiser, identity.peer_id}),
        )
        self.sightings = Sightings(self.trusted, identity.peer_id)
        self.news = News(
            self.trusted,
            self.files,
            clock=clock,
            dice=dice or random.Random(),
            delegate=delegate,
            serves=self._serves,
        )
        self.door = self.news.door
        self.own = OwnCheckpoints(self.files, self.store, opened.plan.policy.checkpoint_cap_bytes)
        self.voice = Announcer(identity, transport, self.files, self.store, self.sightings, self.door, clock)
        self.downloads = Downloads(
            transport,
            self.files,
            self.store,
            self.sightings,
            self.own,
            door=self.door,
            book=self.book,
            counters=self.counters,
            clock=clock,
            look=self.refresh,
            refuse=self._refuse,
            foreign=lambda: self.home.foreign_roots(self.plan_id),
        )

    # ---- joining and leaving ------------------------------------------------

    async def join(self) -> None:
        """Serve files, join the DHT with this plan's validator, and keep what this node holds announced."""
        if not self.observer:
            self.transport.serve(serve_files(self.store, self.counters, limits=self._serving, door=self.door))
        await self.transport.join_dht(self._check, reserved=(self.plan.organiser,))
        if not self.observer:
            self.voice.finish_interrupted()
            self._spawn(self._keep_alive())
            self._spawn(self._gossip())

    def _check(self, dht_id: bytes, subkey: str | None, value: object, expiration: float) -> None:
        check_store(
            {self.plan_id: self.plan},
            dht_id=dht_id,
            subkey=subkey,
            value=value,
            expiration=expiration,
            now=self.clock(),
            check_signer=self.trusted.check_signer,
        )

    def _serves(self, digest: str) -> bool:
        """Only this swarm's files: the store may hold those of a closed one (SPEC.md, R-GRT-7). Runs in a thread."""
        return digest == self.plan_id or digest not in self.home.foreign_roots(self.plan_id)

    async def close(self) -> None:
        """Stop the timers, write down what was counted, leave the network."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self.observer:
            self.write_traffic()
        self.own.release()
        await self.transport.close()

    # ---- timers ---------------------------------------------------------------

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep_alive(self) -> None:
        """Send what a crash may have kept back; then, every third of a lease, re-announce the holdings that are due,
        remember peers, write the byte counters.
        """
        await self.voice.send_again()
        while True:
            try:
                await self.voice.renew_due()
                self.home.remember_peers(await self.transport.known_addresses())
                self.write_traffic()
            except (TransportError, RecordError, OSError) as error:
                log.warning("re-announcing failed: %s", error)
            await asyncio.sleep(self.plan.policy.lease_s / 3)

    async def _gossip(self) -> None:
        """Greet one random peer, now and every third of a lease (SPEC.md, R-GRT-6)."""
        while True:
            try:
                self.reload_notices()
                await self.gossip()
            except (TransportError, RecordError, OSError) as error:
                log.debug("no news: %s", error)
            await asyncio.sleep(self.plan.policy.lease_s / 3)

    async def gossip(self) -> str | None:
        """Greet one random peer (`News.exchange`)."""
        return await self.news.exchange(self.transport, self.identity.peer_id)

    def write_traffic(self) -> None:
        """Bytes of files served and fetched so far, per peer, into the swarm's folder."""
        self.files.write_traffic(self.counters.as_dict())

    # ---- reading --------------------------------------------------------------

    async def refresh(self, slots: Iterable[str]) -> None:
        """Read the slots' records from the DHT and keep every one that verifies.

        Whoever then claims more slots than a key may hold has the others read as well: an honest peer has moved, and
        its old claim is released by now.
        """
        slots = list(slots)
        await self._read([(slot, key) for slot in slots for key in (claim_key, checkpoint_key)])
        if doubtful := self.sightings.to_read_again(slots, self.clock()):
            await self._read([(slot, claim_key) for slot in sorted(doubtful)])
        now = self.clock()
        self.trusted.expire(now)
        try:
            self.files.ledger.remember(self.trusted.highest)
        except OSError as error:  # it is kept in memory, and written with the next look that can
            log.warning("what was seen of others could not be written down: %s", error)
        self.sightings.settle(self.plan.slots, now, read=frozenset(slots))
        self.sightings.forget_absent(now)

    async def _read(self, keys: list[tuple[str, Callable[[str, str], str]]]) -> None:
        found = await asyncio.gather(*(self.transport.get(key(self.plan_id, slot)) for slot, key in keys))
        for (slot, key), records_found in zip(keys, found, strict=True):
            claims = key is claim_key
            for subkey, (value, _until) in records_found.items():
                if not self.sightings.has_room(slot, subkey, claims=claims):
                    continue
                try:
                    if claims:
                        self.sightings.feed_claim(value, self.clock())
                    else:
                        self.sightings.feed_holding(value, self.clock())
                except Rollback as error:
                    log.debug("%s", error)  # replicas lag behind one another: an older record is no alarm
                except RecordError as error:
                    self._refuse(f"{key(self.plan_id, slot)} from {subkey}: {error}")
                    if isinstance(error, Equivocation):
                        self.news.keep()

    def _refuse(self, what: str) -> None:
        log.info("refused: %s", what)
        if what not in self.refused[-64:]:
            self.refused.append(what)
            del self.refused[:-MAX_REFUSALS]
            self.files.log_event({"event": "refused", "what": what, "time": self.clock()})

    # ---- what was seen --------------------------------------------------------

    def slot_view(self, slot: str, *, believed: Container[str] | None = None) -> SlotView:
        """The slot as the claim policy sees it now (`Sightings.slot_view`)."""
        return self.sightings.slot_view(slot, self.clock(), believed=believed)

    def candidates(self, slot: str) -> list[Candidate]:
        """Announced checkpoints of a slot that someone holds now, the best first (`Sightings.candidates`)."""
        return self.sightings.candidates(slot, self.clock())

    @property
    def last_seen(self) -> dict[str, float]:
        """peer -> newest time known of it (Unix s)."""
        return self.sightings.last_seen

    def doubt(self, candidate: Candidate, why: Exception) -> bool:
        """Leave an announcement out of account, and for a while all its author says of this slot (R-REC-11). Returns
        whether for good.
        """
        root = candidate.announcement.root
        self.files.log_event({"event": "refused", "root": root, "what": str(why), "time": self.clock()})
        return self.sightings.doubt(candidate, why, self.clock())

    @property
    def halted(self) -> str:
        """Why nobody trains now, for people; empty while the swarm runs."""
        return self.news.halted

    def check_own(self) -> None:
        """Whether this peer still counts in the swarm. Raises Revoked, or Equivocation: two homes run on its key."""
        self.trusted.check_signer(self.identity.peer_id)

    # ---- what its parts do for callers ---------------------------------------

    async def publish_claim(self, slot: str, progress: Progress, *, released: bool = False) -> Claim:
        """`Announcer.publish_claim`"""
        return await self.voice.publish_claim(slot, progress, released=released)

    async def announce(
        self, slot: str, *, step: int, root: str, parent: str | None, total_bytes: int, probe_loss: float
    ) -> Announcement:
        """`Announcer.announce`"""
        return await self.voice.announce(
            slot, step=step, root=root, parent=parent, total_bytes=total_bytes, probe_loss=probe_loss
        )

    async def hold(self, slot: str, author_envelope: bytes) -> None:
        """`Announcer.hold`"""
        await self.voice.hold(slot, author_envelope)

    async def keep_copy(self, slot: str, author_envelope: bytes) -> None:
        """Keep a verified checkpoint for others; announced now unless this node only observes."""
        await self.voice.keep_copy(slot, author_envelope, announced=not self.observer)

    async def fetch_manifest(self, candidate: Candidate) -> tuple[Manifest, bytes]:
        """`Downloads.fetch_manifest`"""
        return await self.downloads.fetch_manifest(candidate)

    async def fetch_checkpoint(
        self, candidate: Candidate, *, names: Iterable[str] | None = None, on_progress: OnProgress | None = None
    ) -> Path:
        """`Downloads.fetch_checkpoint`"""
        return await self.downloads.fetch_checkpoint(candidate, names=names, on_progress=on_progress)

    async def manifest_by_root(self, root: str, holders: Iterable[str]) -> Manifest:
        """`Downloads.manifest_by_root`"""
        return await self.downloads.manifest_by_root(root, holders)

    async def fetch_by_root(self, root: str, holders: Iterable[str], *, on_progress: OnProgress | None = None) -> Path:
        """`Downloads.fetch_by_root`"""
        return await self.downloads.fetch_by_root(root, holders, on_progress=on_progress)

    def last_root(self, slot: str) -> str | None:
        """`OwnCheckpoints.last_root`"""
        return self.own.last_root(slot)

    def stored_manifest(self, root: str) -> Manifest | None:
        """`OwnCheckpoints.stored_manifest`"""
        return self.own.stored_manifest(root)

    def stored_step(self, root: str | None) -> int | None:
        """`OwnCheckpoints.stored_step`"""
        return self.own.stored_step(root)

    def grown_from(self, slot: str, step: int, origin: str | None) -> str | None:
        """`OwnCheckpoints.grown_from`"""
        return self.own.grown_from(slot, step, origin)

    def forget_older(self, slot: str, root: str, *, keep: int) -> None:
        """`OwnCheckpoints.forget_older`"""
        self.own.forget_older(slot, root, keep=keep)

    def reload_notices(self) -> None:
        """`News.reload_notices`"""
        self.news.reload_notices()
