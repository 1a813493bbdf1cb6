"""Fetching blobs and files from untrusted peers: every byte is hashed before it is used or written.

``fetch_files`` asks several peers at once, as scheduling.py decides. One that is gone, slow or without the file is left
and tried again later; one that sent bytes which do not match is named and never asked again by this node. A file whose
download is cut, by whatever, goes on where it was: the store keeps each verified chunk. Where streams end before a
chunk has come (relays let 128 KiB through a circuit) it is asked for in parts (parts.py), kept from stream to stream.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.manifest import FileEntry
from paris_swarm.swarm import wire
from paris_swarm.swarm.counters import Counters
from paris_swarm.swarm.door import Door, OpenDoor
from paris_swarm.swarm.fetch_session import BadChunk, Session
from paris_swarm.swarm.fetch_sources import Addresses, FetchSources, OnFault
from paris_swarm.swarm.file_download import FetchReport, FileDownload, MoreSources, OnProgress
from paris_swarm.swarm.parts import joined
from paris_swarm.swarm.scheduling import ChunkScheduler, FetchPolicy
from paris_swarm.swarm.sources import SourceBook
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.store_index import RootKind
from paris_swarm.swarm.transport import Stalled, Transport, TransportError

__all__ = ["BadChunk", "Counters", "FetchReport", "fetch_blob", "fetch_files"]

HURRY_S = 30.0
"""Within which a peer sends a blob (a manifest or a plan, at most 1 MiB) that others may have as well: 35 KB/s."""


async def fetch_blob(
    transport: Transport,
    peers: Iterable[str],
    digest: str,
    *,
    max_bytes: int,
    addresses: Addresses | None = None,
    counters: Counters | None = None,
    on_fault: OnFault | None = None,
    stall_s: float = 10.0,
    within_s: float = FetchPolicy.chunk_s,
    hurry_s: float = HURRY_S,
    door: Door | None = None,
    book: SourceBook | None = None,
) -> bytes:
    """Fetch a blob (a plan by plan id, a manifest by root) from the best of ``peers`` that has it.

    Args:
        max_bytes: refused when longer; at most one wire payload.
        addresses: multiaddrs to dial, by peer id, for peers that the network does not know yet.
        within_s: how long one peer may take over it, however much it trickles.
        hurry_s: the same while there are others to ask; whoever was too slow is asked again after them.
        door: what this node says of itself, and whom it will not ask.
        book: what this node knows of its sources; a liar is written down in it.

    Raises:
        BadChunk: nobody delivered, and at least one peer sent other bytes than the digest names.
        NoSource: nobody delivered.
        TurnedAway: nobody lets this node in.
    """
    book = book if book is not None else SourceBook()
    sources = FetchSources(transport, addresses or {}, on_fault, stall_s, door or OpenDoor(), book)
    what = f"blob {digest}"
    queue = deque((peer, min(hurry_s, within_s)) for peer in book.in_turn(peers) if book.of(peer).banned is None)
    while queue:
        peer, limit_s = queue.popleft()
        if not queue:
            limit_s = within_s  # there is nobody else
        try:
            parts = await _blob_parts(sources, peer, digest, min(max_bytes, wire.MAX_PAYLOAD), counters, limit_s)
            return await asyncio.to_thread(_opened_blob, peer, what, digest, parts)
        except _TooSlow as error:
            if limit_s < within_s:
                queue.append((peer, within_s))
            else:
                sources.note(peer, error)
        except (TransportError, RecordError) as error:
            sources.note(peer, error)
    raise sources.error(what)


class _TooSlow(Stalled):
    """A blob did not come in the time given."""


async def _blob_parts(
    sources: FetchSources, peer: str, digest: str, most: int, counters: Counters | None, within_s: float
) -> list[wire.Response]:
    """All of a blob from one peer. Raises as ``Session`` and ``open_stream``, and _TooSlow when it takes too long."""
    try:
        async with asyncio.timeout(within_s):
            return await _streamed_blob(sources, peer, digest, most, counters)
    except TimeoutError as error:
        raise _TooSlow(f"{peer} did not send blob {digest} within {within_s:g} s") from error


async def _streamed_blob(
    sources: FetchSources, peer: str, digest: str, most: int, counters: Counters | None
) -> list[wire.Response]:
    """The same over as many streams as it takes while each brings something."""
    parts: list[wire.Response] = []
    offset = 0
    while True:
        session: Session | None = None
        kept = len(parts)
        try:
            async with sources.session(peer, f"blob {digest}") as session:
                while True:
                    # One byte more than it may have: a longer one is refused by what its answer states.
                    asked = min(max(wire.PART, min(sources.book.of(peer).part, most + 1 - offset)), wire.MAX_PAYLOAD)
                    request = wire.Request(wire.RequestKind.BLOB, digest, offset=offset, length=asked)
                    await session.ask(request, 0, min(asked, most - offset))
                    response = await session.answer()
                    if response.status == wire.Status.NOT_HELD:
                        raise session.not_held()
                    if counters is not None:
                        counters.add("received", peer, "blob", wire=len(response.payload), logical=response.length)
                    parts.append(response)
                    offset += response.length
                    if response.length < asked or offset == most:
                        return parts
        except TransportError as error:
            shrunk = session is not None and sources.book.cut_short(peer, session.came)
            if not shrunk and len(parts) == kept:
                raise
            sources.resume(peer, error)


def _opened_blob(peer: str, what: str, digest: str, parts: list[wire.Response]) -> bytes:
    try:
        data = joined(parts)
    except wire.BadFrame as error:
        raise BadChunk(f"{what} from {peer}: {error.detail}", peer=peer) from error
    if blake3_hex(data) != digest:
        raise BadChunk(f"{what} from {peer}: the bytes have digest {blake3_hex(data)}", peer=peer)
    return bytes(data)


async def fetch_files(
    transport: Transport,
    store: ContentStore,
    peers: Iterable[str],
    root: str,
    entries: Sequence[FileEntry],
    names: Iterable[str] | None = None,
    *,
    kind: RootKind = "checkpoint",
    addresses: Addresses | None = None,
    on_progress: OnProgress | None = None,
    on_fault: OnFault | None = None,
    stall_s: float = 10.0,
    counters: Counters | None = None,
    door: Door | None = None,
    book: SourceBook | None = None,
    policy: FetchPolicy | None = None,
    patience_s: float = 0.0,
    more_sources: MoreSources | None = None,
    report: FetchReport | None = None,
    foreign: Callable[[], Collection[str]] = tuple,
) -> dict[str, Path]:
    """Fetch files of a root into the store from several peers at once, going on where an earlier fetch ended.

    Files already whole are hashed again and fetched anew when they were changed on disk. A file that another task or
    process is fetching into this store is waited for, not fetched twice.

    Args:
        entries: all files of the root, in the order of its manifest or plan, verified by the caller.
        names: the files wanted; all when None.
        stall_s: as in FetchPolicy; used when there is no ``policy``.
        patience_s: how long to go on trying when nobody delivers anything any more; 0: until everybody was tried.
        report: filled in as the download goes.
        foreign: roots of the store whose chunks are not taken over, those of other swarms; called in a thread.

    Returns:
        Where each wanted file lies, by name.

    Raises:
        BadChunk: somebody sent bytes that do not match, and nobody else has them.
        NoSource: nobody could deliver all of it. What came stays; another call goes on.
        TurnedAway: nobody lets this node in.
        InUse: the root is being deleted.
        OSError: no space, quota or permission; what came stays.
        ValueError: a name that is not among the entries.
    """
    wanted = {entry.name for entry in entries} if names is None else set(names)
    if unknown := wanted - {entry.name for entry in entries}:
        raise ValueError(f"{root} has no file named {', '.join(sorted(unknown))}")
    book = book if book is not None else SourceBook()
    policy = policy or FetchPolicy(stall_s=stall_s)
    sources = FetchSources(transport, addresses or {}, on_fault, policy.stall_s, door or OpenDoor(), book)
    use = store.use(root)
    try:
        await asyncio.to_thread(store.begin, root, entries, kind=kind)
        download = FileDownload(
            store,
            root,
            kind,
            {index: entry for index, entry in enumerate(entries) if entry.name in wanted},
            sources,
            ChunkScheduler({}, policy=policy, book=book),
            counters or Counters(),
            on_progress,
            report if report is not None else FetchReport(),
            foreign,
        )
        for peer in peers:
            download.scheduler.add_source(peer)
        try:
            await download.run(patience_s, more_sources)
        finally:
            await asyncio.to_thread(download.close)
        return {name: store.path(root, name) for name in sorted(wanted)}
    finally:
        sources.memory.clear()
        use.release()
