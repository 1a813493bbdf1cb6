"""The files of one download on this disk: what is here already, what lies under other roots, chunks as they come.

Everything here blocks and runs in threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from paris_swarm.dht_schemas.errors import DigestMismatch
from paris_swarm.dht_schemas.manifest import FileEntry
from paris_swarm.swarm import wire
from paris_swarm.swarm.fetch_session import BadChunk
from paris_swarm.swarm.partial_file import PartialFile
from paris_swarm.swarm.parts import joined
from paris_swarm.swarm.store import ContentStore

log = logging.getLogger(__name__)


def open_wanted(
    store: ContentStore, root: str, entry: FileEntry, foreign: Callable[[], Collection[str]]
) -> tuple[PartialFile | None, int]:
    """The file to fill, None when it is whole and right: one with no chunks to come becomes whole here. And how many
    bytes of it came from other roots of the store: checkpoints of one expert share what training did not change.

    Raises InUse, OSError.

    Args:
        foreign: roots that are none of this download's business. What is written here is served under ``root``: whoever
            knows the digests of a closed swarm's chunks could ask for them in another one (R-GRT-7).
    """
    store.verify_file(root, entry)
    if store.holds_file(root, entry):
        return None, 0
    partial = store.open_partial(root, entry)
    try:
        if store.holds_file(root, entry):  # whoever fetched it finished between the two looks
            partial.discard()
            return None, 0
        reused = _fill_from_other_roots(store, root, partial, foreign)
        if partial.complete:
            partial.finish()
            return None, reused
    except BaseException:
        partial.close()
        raise
    return partial, reused


def _fill_from_other_roots(
    store: ContentStore, root: str, partial: PartialFile, foreign: Callable[[], Collection[str]]
) -> int:
    """Write the chunks that lie in the store under another root; returns how many bytes."""
    missing = partial.missing
    known = store.chunks_of_other_roots(root, {partial.entry.chunks[index] for index in missing}, foreign=foreign)
    reused = 0
    for index in missing:
        if (place := known.get(partial.entry.chunks[index])) is None:
            continue
        try:
            data = store.read_chunk(*place)
        except (DigestMismatch, OSError) as error:  # it is fetched, then
            log.warning("%s", error)
            continue
        if data is not None:
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
