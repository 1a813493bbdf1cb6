"""Checkpoints and plans fetched from their holders, every byte verified before it is used.

`fetching` knows chunks and streams; here is what a swarm adds: what a manifest must say, what the header of a weights
file must hold, who else holds a root by now.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from pathlib import Path

from paris_swarm.dht_schemas.manifest import FileEntry, Manifest, open_manifest
from paris_swarm.dht_schemas.plan import MAX_PLAN, OpenedPlan, open_plan
from paris_swarm.swarm.door import Door
from paris_swarm.swarm.fetching import fetch_blob, fetch_files
from paris_swarm.swarm.home import Home, SwarmHome
from paris_swarm.swarm.own_checkpoints import OwnCheckpoints
from paris_swarm.swarm.serving import Counters
from paris_swarm.swarm.sightings import Candidate, Sightings
from paris_swarm.swarm.sources import SourceBook
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.transport import Transport, TransportError, TurnedAway

log = logging.getLogger(__name__)

MAX_MANIFEST = 1 << 20
"""Bytes of a manifest (R-MAN-3)."""
_MAX_HEADER = 4 << 20
"""Bytes of a weights file's header (R-HDR-1)."""

Progress = Callable[[int, int], None]


class Downloads:
    """Fetches for one node.

    Args:
        look: reads slots from the DHT once more; raises TransportError.
        refuse: shows to people who was banned.
        foreign: roots in the store that are other swarms': nothing of theirs goes into a checkpoint of this one.
    """

    def __init__(
        self,
        transport: Transport,
        files: SwarmHome,
        store: ContentStore,
        sightings: Sightings,
        own: OwnCheckpoints,
        *,
        door: Door,
        book: SourceBook,
        counters: Counters,
        clock: Callable[[], float],
        look: Callable[[Iterable[str]], Awaitable[None]],
        refuse: Callable[[str], None],
        foreign: Callable[[], Collection[str]],
    ) -> None:
        self._transport, self._files, self._store, self._own = transport, files, store, own
        self._sightings, self._trusted = sightings, sightings.trusted
        self._door, self._book, self._counters = door, book, counters
        self._clock, self._look, self._refuse, self._foreign = clock, look, refuse, foreign

    async def fetch_manifest(self, candidate: Candidate) -> tuple[Manifest, bytes]:
        """Fetch and check the manifest that a candidate's root commits to.

        Raises:
            RecordError: the bytes do not match the announcement.
            TransportError: no holder could be reached.
        """
        data = await self._manifest_bytes(candidate.announcement.root, candidate.holders)
        return self._trusted.feed_manifest(candidate.announcement, data), data

    async def fetch_checkpoint(
        self,
        candidate: Candidate,
        *,
        names: Iterable[str] | None = None,
        on_progress: Progress | None = None,
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
        data = await self._manifest_bytes(root, holders)
        manifest = open_manifest(data, root, cap_bytes=self._trusted.plan.policy.checkpoint_cap_bytes)
        self._files.note_root(root)  # before it lies in the store, where other swarms of this home would serve it
        self._store.put_blob(data)
        return manifest

    async def fetch_by_root(self, root: str, holders: Iterable[str], *, on_progress: Progress | None = None) -> Path:
        """Download a checkpoint that has no announcement of its own, such as a parent; as `fetch_checkpoint`."""
        sources = list(holders)
        manifest = await self.manifest_by_root(root, sources)
        data = self._own.own_blob(root)
        assert data is not None, "manifest_by_root keeps the manifest"
        return await self._take_files(sources, root, manifest, data, None, on_progress)

    async def _manifest_bytes(self, root: str, holders: Iterable[str]) -> bytes:
        data = self._own.own_blob(root)
        if data is not None:
            return data
        return await fetch_blob(
            self._transport,
            self._others(holders),
            root,
            max_bytes=MAX_MANIFEST,
            counters=self._counters,
            door=self._door,
            book=self._book,
            on_fault=self._note_fault,
        )

    async def _take_files(
        self,
        holders: Iterable[str],
        root: str,
        manifest: Manifest,
        data: bytes,
        names: Iterable[str] | None,
        on_progress: Progress | None,
    ) -> Path:
        chosen = None if names is None else set(names)
        wanted = [entry for entry in manifest.files if chosen is None or entry.name in chosen]
        await self._fetch(holders, root, data, manifest.files, wanted, on_progress)
        for entry in wanted:
            if entry.name.endswith(".safetensors"):
                path = self._store.path(root, entry.name)
                with open(path, "rb") as file:
                    head = file.read(8)
                    size = min(int.from_bytes(head, "little"), _MAX_HEADER)
                    self._trusted.feed_header(manifest.slot, entry.name, head + file.read(size), entry.length)
        return self._store.path(root, wanted[0].name).parent

    async def _fetch(
        self,
        holders: Iterable[str],
        root: str,
        blob: bytes,
        entries: Iterable[FileEntry],
        wanted: Iterable[FileEntry],
        on_progress: Progress | None,
    ) -> None:
        self._files.note_root(root)
        self._store.put_blob(blob)
        self._own.use(root)
        await fetch_files(
            self._transport,
            self._store,
            self._others(holders),
            root,
            list(entries),
            names=[entry.name for entry in wanted],
            on_progress=on_progress,
            counters=self._counters,
            door=self._door,
            book=self._book,
            on_fault=self._note_fault,
            more_sources=lambda: self._holders_now(root),
            foreign=self._foreign,
        )

    async def _holders_now(self, root: str) -> list[str]:
        """Who holds a root by now: asked when a download finds nobody else."""
        slots = [
            slot
            for slot, held in self._trusted.holdings.items()
            if any(announcement.root == root for _holding, announcement in held.values())
        ]
        try:
            await self._look(slots)
        except TransportError as error:
            log.info("cannot look for further holders: %s", error)
        return self._others(
            holder
            for slot in slots
            for found in self._sightings.candidates(slot, self._clock())
            if found.announcement.root == root
            for holder in found.holders
        )

    def _note_fault(self, peer: str, error: Exception) -> None:
        """Show who was banned; whoever is only away is no news."""
        if self._book.of(peer).banned is not None:
            self._refuse(f"{peer} sent wrong bytes and is not asked again: {error}")

    def _others(self, holders: Iterable[str]) -> list[str]:
        return [holder for holder in holders if holder != self._transport.peer_id]


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
        transport,
        store,
        peers,
        plan_id,
        list(opened.plan.files),
        kind="plan",
        counters=counters,
        door=door,
        foreign=lambda: home.foreign_roots(plan_id),
    )
    store.link_into(plan_id, data, "plan.json", swarm.plan_path)
    return opened
