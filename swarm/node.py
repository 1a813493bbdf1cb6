"""A node of one swarm: transport, verified records, content store, and the timers that keep records alive.

Everything here runs on one asyncio loop. DHT presence is never truth (a rejected store can evict a newer record early,
lost replicas are not repaired): verified records are kept in memory and on disk, ordered by sequence, and what this
node signed is stored again on a timer, at a third of its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from paris_swarm.dht_schemas import records
from paris_swarm.dht_schemas.admission import PeerLists
from paris_swarm.dht_schemas.dht_rules import check_store, checkpoint_key, claim_key
from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.errors import (
    Equivocation,
    MalformedRecord,
    NotFinite,
    ProbeFailed,
    RecordError,
    RecordTooLarge,
    Rollback,
)
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import FileEntry, Manifest, open_manifest
from paris_swarm.dht_schemas.plan import MAX_PLAN, OpenedPlan, open_plan
from paris_swarm.dht_schemas.records import Announcement, Claim, Holding, Progress
from paris_swarm.dht_schemas.trusted import TrustedSwarm
from paris_swarm.swarm.claims import ROUTER, SlotView, beyond_allowance
from paris_swarm.swarm.door import Door
from paris_swarm.swarm.fetching import fetch_blob, fetch_files
from paris_swarm.swarm.greeting import Delegate, SwarmDoor, greet_peer
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.serving import Counters, ServingLimits, serve_files
from paris_swarm.swarm.sources import SourceBook
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.store_locks import InUse, Use
from paris_swarm.swarm.transport import Transport, TransportError, TurnedAway

log = logging.getLogger(__name__)

Clock = Callable[[], float]

_REFUSED_FOR_GOOD = (MalformedRecord, RecordTooLarge, NotFinite, ProbeFailed)
"""What a checkpoint is itself to blame for. Other bytes than its own, or a closed door, are the fault of a holder:
whoever could make an honest checkpoint count as refused by serving rubbish in its name would be rid of it.
"""

MAX_LIVE = 1024
"""Claims, and holdings, of one slot that a reader keeps; beyond that only those it knows there renew (R-DHT-8)."""
MAX_REFUSALS = 256
"""Refusals kept for people, the newest."""


@dataclass(frozen=True)
class Candidate:
    """An announced checkpoint of a slot and who holds it now."""

    slot: str
    announcement: Announcement
    envelope: bytes
    holders: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Names the announcement. Its root does not: anyone may announce somebody else's root, with lies about it."""
        return blake3_hex(self.envelope)


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
        self._serving = serving
        self._uses: dict[str, Use] = {}
        lists = lists or PeerLists()
        self.trusted = TrustedSwarm(
            opened,
            highest=self.files.ledger.highest(),
            lists=replace(lists, always=lists.always | {opened.plan.organiser, identity.peer_id}),
        )
        self._dice = dice or random.Random()
        self.door = SwarmDoor(
            self.trusted,
            token=self.files.token(),
            clock=clock,
            dice=self._dice,
            delegate=delegate,
            on_news=self._keep_news,
            serves=self._serves,
        )
        self.first_seen: dict[tuple[str, str], float] = {}
        self.last_seen: dict[str, float] = {}
        self.refused: list[str] = []
        self._published = self.files.published()
        self._doubted: dict[str, float] = {}
        self._suspected: dict[tuple[str, str], float] = {}
        """(slot, author) -> until (Unix s) when what the author announces there keeps nobody from it; R-REC-11."""
        self._claimed: dict[str, set[str]] = {}
        self._standing_logged = self.trusted.standing
        self._proofs_kept: set[str] = set()
        self._credited: dict[str, tuple[str, float]] = {}
        """root -> (the author credited with it, when it was first seen here); R-REC-11."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._recall()

    # ---- joining ------------------------------------------------------------

    async def join(self) -> None:
        """Serve files, join the DHT with this plan's validator, and keep what this node holds announced."""
        if not self.observer:
            self.transport.serve(serve_files(self.store, self.counters, limits=self._serving, door=self.door))
        await self.transport.join_dht(self._check, reserved=(self.plan.organiser,))
        if not self.observer:
            self._finish_interrupted_announcements()
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

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self.observer:
            self.write_traffic()
        for use in self._uses.values():
            use.release()
        await self.transport.close()

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- reading ------------------------------------------------------------

    async def refresh(self, slots: Iterable[str]) -> None:
        """Read the slots' records from the DHT and keep every one that verifies.

        Whoever then claims more slots than a key may hold has the others read as well: an honest peer has moved, and
        its old claim is released by now.
        """
        slots = list(slots)
        await self._read([(slot, key) for slot in slots for key in (claim_key, checkpoint_key)])
        if doubtful := {other for peer in self._claimants(slots) for other in self._too_many(peer)} - set(slots):
            await self._read([(slot, claim_key) for slot in sorted(doubtful)])
        now = self.clock()
        self.trusted.expire(now)
        self.files.ledger.remember(self.trusted.highest)
        for pair in [pair for pair in self.first_seen if not self._is_claiming(*pair, now)]:
            del self.first_seen[pair]  # a claimant that went away starts anew when it comes back
        self._credit_authors()
        self._forget_absent(now)

    def _forget_absent(self, now: float) -> None:
        """Keep nothing about peers of whom no record is left: keys cost nothing, and a node runs for months."""
        present = {peer for claims in self.trusted.claims.values() for peer in claims}
        present |= {holder for holdings in self.trusted.holdings.values() for holder in holdings}
        self.last_seen = {peer: seen for peer, seen in self.last_seen.items() if peer in present}
        self._claimed = {peer: slots for peer, slots in self._claimed.items() if peer in present}
        self._suspected = {author: until for author, until in self._suspected.items() if until > now}
        self._doubted = {digest: until for digest, until in self._doubted.items() if until > now}

    # ---- trust --------------------------------------------------------------

    def _recall(self) -> None:
        """What was proven and what the organiser said in earlier runs: read from disk, verified like anybody's word."""
        for first, second in self.files.proofs():
            try:
                if (proof := self.trusted.feed_own_proof(first, second)) is not None:
                    self._proofs_kept.add(proof.signer)
            except RecordError as error:
                log.warning("a proof kept in %s does not hold: %s", self.files.path, error)
        for envelope in self.files.notices():
            try:
                self.trusted.feed_notice(envelope)
            except RecordError as error:
                log.warning("a notice kept in %s does not hold: %s", self.files.path, error)

    def reload_notices(self) -> None:
        """Take in what `paris-swarm notice` wrote beside this process."""
        known = self.trusted.notices
        with self.files.notices_locked():
            for envelope in self.files.notices():
                with contextlib.suppress(Rollback):
                    self.trusted.feed_notice(envelope)
        if self.trusted.notices != known:
            self._keep_news()

    def _keep_news(self) -> None:
        """Notices and proofs on disk before anything follows from them; whoever is out has its streams closed."""
        with self.files.notices_locked():
            for envelope in self.files.notices():
                with contextlib.suppress(RecordError):
                    self.trusted.feed_notice(envelope)  # never an older one over a newer one
            if notices := [notice.sealed.envelope for notice in self.trusted.notices]:
                self.files.write_notices(notices)
        self._keep_proofs()
        standing = self.trusted.standing
        if standing.number and standing != self._standing_logged:
            self._standing_logged = standing
            self.files.log_event(
                {
                    "event": "notice",
                    "number": standing.number,
                    "state": standing.state,
                    "revoked": sorted(standing.revoked),
                    "message": standing.message,
                    "time": self.clock(),
                }
            )
        self.door.close_unwelcome()

    def _keep_proofs(self) -> None:
        for signer in self._proofs_kept - self.trusted.outlaws:
            self._proofs_kept.discard(signer)
            self.files.drop_proof(signer)  # others made it give way: there is room for a bounded number (R-SET-7)
        for proof in self.trusted.proofs:
            if proof.signer in self.trusted.notable and proof.signer not in self._proofs_kept:
                self._proofs_kept.add(proof.signer)
                if self.files.keep_proof(proof.signer, proof.first, proof.second):
                    self.files.log_event(
                        {
                            "event": "equivocation",
                            "peer": proof.signer,
                            "kind": proof.kind,
                            "slot": proof.slot,
                            "seq": proof.seq,
                            "time": self.clock(),
                        }
                    )

    @property
    def halted(self) -> str:
        """Why nobody trains now, for people; empty while the swarm runs."""
        standing = self.trusted.standing
        if standing.state == "running":
            return ""
        return f"the organiser {standing.state} the swarm" + (f": {standing.message}" if standing.message else "")

    def check_own(self) -> None:
        """Whether this peer still counts in the swarm. Raises Revoked, or Equivocation: two homes run on its key."""
        self.trusted.check_signer(self.identity.peer_id)

    def _serves(self, digest: str) -> bool:
        """Only this swarm's files: the store may hold those of a closed one (SPEC.md, R-GRT-7). Runs in a thread."""
        return digest == self.plan_id or digest not in self.home.foreign_roots(self.plan_id)

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
        """Greet one random peer of those known: from live records, or connected. Returns its id; None without any.

        Raises:
            TransportError: it could not be reached, or turned this node away.
            RecordError: this node wants nothing from it.
        """
        peers = {peer for claims in self.trusted.claims.values() for peer in claims}
        peers |= {holder for holdings in self.trusted.holdings.values() for holder in holdings}
        peers |= set(await self.transport.connected_peers())
        peers -= {self.transport.peer_id, self.identity.peer_id}
        welcome = [peer for peer in sorted(peers) if self.door.welcomes(peer)]
        if not welcome:
            return None
        chosen = self._dice.choice(welcome)
        await greet_peer(self.transport, chosen, self.door)
        return chosen

    # ---- reading, continued -------------------------------------------------

    async def _read(self, keys: list[tuple[str, Callable[[str, str], str]]]) -> None:
        found = await asyncio.gather(*(self.transport.get(key(self.plan_id, slot)) for slot, key in keys))
        for (slot, key), records_found in zip(keys, found, strict=True):
            for subkey, (value, _until) in records_found.items():
                if not self._has_room(slot, subkey, claims=key is claim_key):
                    continue
                try:
                    if key is claim_key:
                        claim = self.trusted.feed_claim(value, self.clock())
                        self._claimed.setdefault(claim.peer, set()).add(slot)
                        self.first_seen.setdefault((slot, claim.peer), self.clock())
                        self._note_seen(claim.peer, claim.seq)
                    else:
                        holding, _announcement = self.trusted.feed_holding(value, self.clock())
                        self._note_seen(holding.holder, holding.seq)
                except Rollback as error:
                    log.debug("%s", error)  # replicas lag behind one another: an older record is no alarm
                except RecordError as error:
                    self._refuse(f"{key(self.plan_id, slot)} from {subkey}: {error}")
                    if isinstance(error, Equivocation):
                        self._keep_news()

    def _has_room(self, slot: str, peer: str, *, claims: bool) -> bool:
        """Whether a record of this peer is worth judging: a full slot has room for those known there (R-DHT-8)."""
        known: Mapping[str, object] = (self.trusted.claims if claims else self.trusted.holdings)[slot]
        return len(known) < MAX_LIVE or peer in known or peer == self.plan.organiser

    def _note_seen(self, peer: str, seq: int) -> None:
        # A sequence from the future makes nobody younger than now (R-SET-8).
        self.last_seen[peer] = max(self.last_seen.get(peer, 0.0), min(seq / 1000, self.clock()))

    def _claimants(self, slots: Iterable[str]) -> set[str]:
        return {peer for slot in slots if slot != ROUTER for peer in self.trusted.claims.get(slot, {})}

    def _too_many(self, peer: str) -> set[str]:
        """The cluster slots a peer has live claims on, when they are more than a key may hold; otherwise nothing."""
        now = self.clock()
        live = {slot for slot in self._claimed.get(peer, ()) if slot != ROUTER and self._is_claiming(slot, peer, now)}
        return live if len(live) > self.plan.policy.slots_per_key else set()

    def _credit_authors(self) -> None:
        """Credit each root to the author seen with it first, in one reading to the earlier sequence, and from then on.

        Otherwise announcing a rival's root as one's own, or one's only root again and again, or once with a sequence
        from the future, would keep an idle claim alive, and could even push a working rival out.
        """
        held = [announcement for slot in self.trusted.holdings.values() for _holding, announcement in slot.values()]
        roots = {announcement.root for announcement in held}
        self._credited = {root: credit for root, credit in self._credited.items() if root in roots}
        now = self.clock()
        for announcement in sorted(held, key=lambda item: (item.seq, item.author)):
            self._credited.setdefault(announcement.root, (announcement.author, now))

    def _is_credited(self, announcement: Announcement) -> bool:
        return self._credited.get(announcement.root, (announcement.author,))[0] == announcement.author

    def _is_claiming(self, slot: str, peer: str, now: float) -> bool:
        claim = self.trusted.claims.get(slot, {}).get(peer)
        return claim is not None and not claim.released and claim.until > now

    def _refuse(self, what: str) -> None:
        log.info("refused: %s", what)
        if what not in self.refused[-64:]:
            self.refused.append(what)
            del self.refused[:-MAX_REFUSALS]
            self.files.log_event({"event": "refused", "what": what, "time": self.clock()})

    def doubt(self, candidate: Candidate, why: Exception) -> None:
        """Leave an announcement out of account: for good when what it announces was refused, for two leases when
        nobody served it, or somebody served other bytes.

        For two leases and the time that a claim may run, nothing else that its author announces for this slot keeps
        anybody from the slot either: one key could announce rubbish faster than anyone can refute it (R-REC-11).
        """
        now, lease = self.clock(), self.plan.policy.lease_s
        self._doubted[candidate.digest] = math.inf if isinstance(why, _REFUSED_FOR_GOOD) else now + 2 * lease
        author = candidate.announcement.author
        if author != self.identity.peer_id:
            self._suspected[(candidate.slot, author)] = now + 2 * lease + records.MAX_LEASE_S
        root = candidate.announcement.root
        self.files.log_event({"event": "refused", "root": root, "what": str(why), "time": self.clock()})

    def _is_doubted(self, holding: Holding) -> bool:
        return bool(self._doubted) and self._doubted.get(blake3_hex(holding.announcement.encode()), 0.0) > self.clock()

    def candidates(self, slot: str) -> list[Candidate]:
        """Announced checkpoints of a slot that someone holds now, best announced probe loss first, ties by root, then
        by who announced it first. Announcements of one root are candidates of their own, and share its holders.
        """
        now = self.clock()
        held = [entry for entry in self.trusted.holdings.get(slot, {}).values() if entry[0].until > now]
        holders: dict[str, list[str]] = {}
        announced: dict[bytes, Announcement] = {}
        for holding, announcement in held:
            holders.setdefault(announcement.root, []).append(holding.holder)
            if not self._is_doubted(holding):
                announced.setdefault(holding.announcement.encode(), announcement)

        def order(candidate: Candidate) -> tuple[float, str, bool, int, str]:
            found = candidate.announcement
            return found.probe_loss, found.root, not self._is_credited(found), found.seq, found.author

        return sorted(
            (Candidate(slot, found, envelope, tuple(holders[found.root])) for envelope, found in announced.items()),
            key=order,
        )

    def slot_view(self, slot: str, *, believed: Container[str] | None = None) -> SlotView:
        """The slot as the claim policy sees it. ``believed``: digests of announcements; of other peers' checkpoints
        only these are taken for work then.
        """
        made: dict[str, float] = {}
        step, now = 0, self.clock()
        for holding, announcement in self.trusted.holdings.get(slot, {}).values():
            if self._is_doubted(holding) or self._suspected.get((slot, announcement.author), 0.0) > now:
                continue
            step = max(step, announcement.step)
            if self._is_credited(announcement) and (
                believed is None
                or announcement.author == self.identity.peer_id
                or blake3_hex(holding.announcement.encode()) in believed
            ):
                at = min(announcement.seq / 1000, self._credited.get(announcement.root, ("", math.inf))[1])
                made[announcement.author] = max(made.get(announcement.author, 0.0), at)
        claims = dict(self.trusted.claims.get(slot, {}))
        return SlotView(
            slot=slot,
            claims=claims,
            first_seen={peer: seen for (of, peer), seen in self.first_seen.items() if of == slot},
            checkpoint_at=made,
            step=step,
            beyond=frozenset(
                peer
                for peer in (claims if slot != ROUTER else ())
                if (live := self._too_many(peer))
                and slot in beyond_allowance(self.plan_id, peer, live, self.plan.policy.slots_per_key)
            ),
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
            token=self.door.token,
        )
        envelope = claim.seal(self.identity)
        self.files.ledger.record("claim", slot, seq, envelope)
        self.trusted.feed_claim(envelope, now)
        self._claimed.setdefault(claim.peer, set()).add(slot)
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
            token=self.door.token,
        )
        envelope = announcement.seal(self.identity)
        ledger.record("checkpoint", slot, announcement.seq, envelope)
        await self.hold(slot, envelope)
        return announcement

    async def hold(self, slot: str, author_envelope: bytes) -> None:
        """Say that this node holds and serves an announced checkpoint (its own or another author's)."""
        self.files.note_root(Announcement.open(author_envelope).record.root)
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
            token=self.door.token,
        )
        envelope = holding.seal(self.identity)
        self.files.ledger.record("holding", slot, holding.seq, envelope)
        self.trusted.feed_holding(envelope, now)
        self._credit_authors()
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

    def stored_manifest(self, root: str) -> Manifest | None:
        """The manifest of a checkpoint that this home holds, or once held; None when it is not here."""
        data = self._own_blob(root)
        return None if data is None else open_manifest(data, root, cap_bytes=self.plan.policy.checkpoint_cap_bytes)

    def stored_step(self, root: str | None) -> int | None:
        """The step of a stored checkpoint, 0 for None (fresh weights); None when its manifest is not here."""
        if root is None:
            return 0
        manifest = self.stored_manifest(root)
        return None if manifest is None else manifest.step

    def grown_from(self, slot: str, step: int, origin: str | None) -> str | None:
        """Root of the published checkpoint that our local one of ``slot`` at ``step`` continues.

        ``origin`` is the root that its run began from (None: fresh weights). What we published since then, up to that
        step, lies in between; after a crash the newest local checkpoint may be older than the newest published.
        """
        root, found = self.last_root(slot), None
        while root is not None:
            manifest = self.stored_manifest(root)
            if manifest is None:
                break
            if found is None and manifest.step <= step:
                found = root
            if root == origin:
                return found
            root = manifest.parent
        return found if origin is None and root is None else origin

    def forget_older(self, slot: str, root: str, *, keep: int) -> None:
        """Drop the files of all but the newest ``keep`` of our own published checkpoints of a slot from the store.

        Their manifests stay: they are small, and the chain of parents can only be followed through them.
        """
        roots = list(dict.fromkeys([*self._published.get(slot, []), root]))
        for old in roots[:-keep]:
            if use := self._uses.pop(old, None):
                use.release()
            try:
                self.store.delete(old, blob=False)
            except (InUse, ValueError) as error:  # another process is at work on it, or somebody pinned it
                log.info("kept %s: %s", old[:12], error)
        self._published[slot] = roots[-keep:]
        self.files.keep_published(self._published)

    async def _store(self, key: str, envelope: bytes, until: float) -> None:
        try:
            await self.transport.store(key, self.identity.peer_id, envelope, until)
        except TransportError as error:
            # Training goes on while the network is away; the timer stores it again.
            log.warning("could not store %s: %s", key, error)

    async def _send_again(self) -> None:
        """What was signed last and still counts, the very same bytes: a crash may have come before they were sent."""
        for kind, key in ((Claim, claim_key), (Holding, checkpoint_key)):
            for envelope in self.files.ledger.signed(kind.KIND):
                record = kind.open(envelope).record
                if record.until > self.clock():
                    await self._store(key(self.plan_id, record.slot), envelope, record.until)

    async def _keep_alive(self) -> None:
        """Send what a crash may have kept back; then, every third of a lease, re-announce holdings, remember peers,
        write the byte counters.
        """
        await self._send_again()
        while True:
            try:
                for slot, envelope in self._to_announce().items():
                    await self._renew_if_counted(slot, envelope)
                self.home.remember_peers(await self.transport.known_addresses())
                self.write_traffic()
            except (TransportError, RecordError, OSError) as error:
                log.warning("re-announcing failed: %s", error)
            await asyncio.sleep(self.plan.policy.lease_s / 3)

    async def _renew_if_counted(self, slot: str, envelope: bytes) -> None:
        """Renew one holding. What counts no longer (its author was revoked, or equivocated) is left to lapse: it must
        not keep the holdings of other slots from being renewed.
        """
        try:
            self.trusted.check_signer(Announcement.open(envelope).record.author)
            await self._renew_holding(slot, envelope)
        except RecordError as error:
            log.info("the checkpoint held for slot %s is not announced again: %s", slot, error)

    def _to_announce(self) -> dict[str, bytes]:
        """What this home holds, one checkpoint a slot: what its peer trained or took over, and else what an `assemble`
        of the same home, perhaps another process, left here for others.
        """
        copies = {
            slot: envelope
            for slot, envelope in self.files.copies().items()
            if self.store.holds_some(Announcement.open(envelope).record.root)
        }
        return {**copies, **self.files.held()}

    async def keep_copy(self, slot: str, author_envelope: bytes) -> None:
        """Keep a verified checkpoint for others; announced now unless this node only observes."""
        self.files.keep_copy(slot, author_envelope)
        if not self.observer and slot not in self.files.held():
            await self._renew_holding(slot, author_envelope)

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
                self.transport,
                self._others(candidate.holders),
                root,
                max_bytes=1 << 20,
                counters=self.counters,
                door=self.door,
                book=self.book,
                on_fault=self._note_fault,
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
        return await self._take_files(candidate.holders, root, manifest, data, names, on_progress)

    async def manifest_by_root(self, root: str, holders: Iterable[str]) -> Manifest:
        """A manifest that something already verified names (an announcement, or a manifest that names its parent).

        Raises:
            RecordError: it is no manifest of this plan.
            TransportError: none of ``holders`` has it.
        """
        data = self._own_blob(root)
        if data is None:
            data = await fetch_blob(
                self.transport,
                self._others(holders),
                root,
                max_bytes=1 << 20,
                counters=self.counters,
                door=self.door,
                book=self.book,
                on_fault=self._note_fault,
            )
        manifest = open_manifest(data, root, cap_bytes=self.plan.policy.checkpoint_cap_bytes)
        self.files.note_root(root)  # before it lies in the store, where other swarms of this home would serve it
        self.store.put_blob(data)
        return manifest

    async def fetch_by_root(
        self, root: str, holders: Iterable[str], *, on_progress: Callable[[int, int], None] | None = None
    ) -> Path:
        """Download a checkpoint that has no announcement of its own, such as a parent; as `fetch_checkpoint`."""
        sources = list(holders)
        manifest = await self.manifest_by_root(root, sources)
        data = self._own_blob(root)
        assert data is not None, "manifest_by_root keeps the manifest"
        return await self._take_files(sources, root, manifest, data, None, on_progress)

    async def _take_files(
        self,
        holders: Iterable[str],
        root: str,
        manifest: Manifest,
        data: bytes,
        names: Iterable[str] | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> Path:
        chosen = None if names is None else set(names)
        wanted = [entry for entry in manifest.files if chosen is None or entry.name in chosen]
        await self._fetch(holders, root, data, manifest.files, wanted, on_progress)
        for entry in wanted:
            if entry.name.endswith(".safetensors"):
                path = self.store.path(root, entry.name)
                with open(path, "rb") as file:
                    head = file.read(8)
                    size = min(int.from_bytes(head, "little"), 4 << 20)
                    self.trusted.feed_header(manifest.slot, entry.name, head + file.read(size), entry.length)
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
        self.files.note_root(root)
        self.store.put_blob(blob)
        if root not in self._uses:  # until this node is closed: what is fetched here is still to be checked and used
            self._uses[root] = self.store.use(root)
        await fetch_files(
            self.transport,
            self.store,
            self._others(holders),
            root,
            list(entries),
            names=[entry.name for entry in wanted],
            on_progress=on_progress,
            counters=self.counters,
            door=self.door,
            book=self.book,
            on_fault=self._note_fault,
            more_sources=lambda: self._holders_now(root),
        )

    async def _holders_now(self, root: str) -> list[str]:
        """Who holds a root by now: asked when a download finds nobody else."""
        slots = [
            slot
            for slot, held in self.trusted.holdings.items()
            if any(announcement.root == root for _holding, announcement in held.values())
        ]
        try:
            await self.refresh(slots)
        except TransportError as error:
            log.info("cannot look for further holders: %s", error)
        return self._others(
            holder
            for slot in slots
            for found in self.candidates(slot)
            if found.announcement.root == root
            for holder in found.holders
        )

    def _note_fault(self, peer: str, error: Exception) -> None:
        """Show who was banned; whoever is only away is no news."""
        if self.book.of(peer).banned is not None:
            self._refuse(f"{peer} sent wrong bytes and is not asked again: {error}")

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
    transport: Transport,
    home: Home,
    plan_id: str,
    peers: Iterable[str],
    *,
    counters: Counters | None = None,
    door: Door | None = None,
    store_limit: int | None = None,
) -> OpenedPlan:
    """Fetch a plan and its files from ``peers`` (peer ids) unless the home has them already.

    Its organiser decides how large its files are; ``store_limit`` (bytes, as in ContentStore) bounds them.

    Raises:
        RecordError: what came is not that plan.
        TransportError: nobody could be reached, or nobody has it.
        OSError: no space on the disk, or none below the limit.
    """
    store = ContentStore(home.store_path, limit=store_limit)
    swarm = home.swarm(plan_id)
    if (swarm.plan_path / "plan.json").exists():
        return open_plan((swarm.plan_path / "plan.json").read_bytes(), plan_id=plan_id)
    peers = list(peers)
    try:
        data = await fetch_blob(transport, peers, plan_id, max_bytes=MAX_PLAN, counters=counters, door=door)
    except TurnedAway as error:
        raise TurnedAway(f"plan {plan_id}: {error}") from error
    opened = open_plan(data, plan_id=plan_id)
    store.put_blob(data)
    await fetch_files(
        transport, store, peers, plan_id, list(opened.plan.files), kind="plan", counters=counters, door=door
    )
    store.link_into(plan_id, data, "plan.json", swarm.plan_path)
    return opened
