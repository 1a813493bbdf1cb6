"""Room below a store's limit, taken for all files of a download at once, by making them as long as they will be.

The length of a file that is being fetched says how much room it takes, so what one process took every other one counts,
and after a crash it is counted as long as the file lies there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from paris_swarm.dht_schemas.digest import CHUNK
from paris_swarm.dht_schemas.manifest import FileEntry
from paris_swarm.swarm.partial_file import read_map
from paris_swarm.swarm.store_locks import lock_descriptor


def bytes_at(path: Path) -> int:
    """Length of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def check_room(what: str, needed: int, used: int, limit: int, folder: Path) -> None:
    """Raise OSError (EDQUOT) where ``needed`` bytes more than the ``used`` ones exceed the limit of the store there."""
    if used + needed > limit:
        raise OSError(
            errno.EDQUOT,
            f"{what} {needed} bytes, the content store holds {used} and may hold {limit}: "
            "run `paris-swarm store gc`, or raise --store-limit",
            str(folder),
        )


def take_room(partials: Iterable[tuple[Path, FileEntry]]) -> None:
    """Make files as long as they will be; no blocks are allocated, and what came of them stays."""
    for path, entry in partials:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(descriptor, entry.length)
        finally:
            os.close(descriptor)


def give_room_back(path: Path, chunk_map: Path, entry: FileEntry) -> None:
    """Leave of a file that nobody is fetching what came of it: room that was taken and never used would stay taken."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if lock_descriptor(descriptor):
            came = max(read_map(chunk_map, len(entry.chunks)), default=-1)
            os.ftruncate(descriptor, min(entry.length, (came + 1) * CHUNK))
    finally:
        os.close(descriptor)
