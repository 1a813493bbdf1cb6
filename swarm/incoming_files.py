"""The files of one download on this disk: what is here already, what lies under other roots, chunks as they come.

Everything here blocks and runs in threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable

from paris_swarm.dht_schemas.errors import DigestMismatch
from paris_swarm.dht_schemas.manifest import FileEntry
from paris_swarm.swarm import wire
from paris_swarm.swarm.fetch_session import BadChunk
from paris_swarm.swarm.partial_file import PartialFile
from paris_swarm.swarm.parts import joined
from paris_swarm.swarm.store import ContentStore

log = logging.getLogger(__name__)


class OtherRoots:
    """Where chunks of a download lie in the store already, under other roots: checkpoints of one expert share what
    training did not change. Every index of the store is read for it, so once a download, when a file first asks.

    Args:
        root: what is being downloaded. wanted: its files that are.
        foreign: roots that are none of this download's business. What is written here is served under ``root``: whoever
            knows the digests of a closed swarm's chunks could ask for them in another one (R-GRT-7).
    """

    def __init__(
        self, store: ContentStore, root: str, wanted: Iterable[FileEntry], foreign: Callable[[], Collection[str]]
    ) -> None:
        self._store, self._root, self._foreign = store, root, foreign
        self._digests = frozenset(digest for entry in wanted for digest in entry.chunks)
        self._places: dict[str, tuple[str, FileEntry, int]] | None = None

    def read(self, digest: str) -> bytes | None:
        """The chunk of this digest; None when it is not here, or cannot be read: it is fetched, then."""
        if self._places is None:
            self._places = self._store.chunks_of_other_roots(self._root, self._digests, foreign=self._foreign)
        if (place := self._places.get(digest)) is None:
            return None
        try:
            return self._store.read_chunk_of(*place)
        except (DigestMismatch, OSError) as error:
            log.warning("%s", error)
            return None


def open_wanted(
    store: ContentStore, root: str, entry: FileEntry, elsewhere: OtherRoots
) -> tuple[PartialFile | None, int]:
    """The file to fill, None when it is whole and right: one with no chunks to come becomes whole here. And how many
    bytes of it came from other roots of the store. Raises InUse, OSError.
    """
    store.verify_file(root, entry)
    if store.holds_file(root, entry):
        return None, 0
    partial = store.open_partial(root, entry)
    try:
        if store.holds_file(root, entry):  # whoever fetched it finished between the two looks
            partial.discard()
            return None, 0
        reused = _fill(partial, elsewhere)
        if partial.complete:
            partial.finish()
            return None, reused
    except BaseException:
        partial.close()
        raise
    return partial, reused


def _fill(partial: PartialFile, elsewhere: OtherRoots) -> int:
    """Write the chunks that lie in the store under another root; returns how many bytes."""
    reused = 0
    for index in partial.missing:
        if (data := elsewhere.read(partial.entry.chunks[index])) is not None:
            partial.write(index, data)
            reused += len(data)
    return reused


def save_chunk(peer: str, partial: PartialFile, chunk: int, parts: list[wire.Response]) -> None:
    """Decode, hash, write; move the file into place after its last chunk."""
    what = f"chunk {chunk} of {partial.entry.name}"
    try:
        partial.write(chunk, joined(parts))
    except (wire.BadFrame, DigestMismatch) as error:
        raise BadChunk(f"{what} from {peer}: {error.detail}", peer=peer) from error
    if partial.complete:
        partial.finish()
