"""What a root of the content store consists of, as its index file says: kind and file entries."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

from paris_swarm.dht_schemas.files import atomic_write_json, quarantine
from paris_swarm.dht_schemas.manifest import FileEntry

log = logging.getLogger(__name__)

RootKind = Literal["checkpoint", "plan"]
RootIndex = tuple[RootKind, tuple[FileEntry, ...]]

_KEPT = 16


class RootIndices:
    """Reads index files, and keeps the newest as read: one is asked for with every chunk that is served."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int, int], RootIndex]] = {}
        """Each with what tells whether the file was changed since; the newest last."""

    def read(self, path: Path) -> RootIndex | None:
        """None when there is no such file, or when it cannot be read, in which case it is set aside."""
        try:
            now = path.stat()
            state = (now.st_ino, now.st_size, now.st_mtime_ns)
            known = self._known.get(path)
            if known is not None and known[0] == state:
                return known[1]
            index: Any = json.loads(path.read_bytes())
            kind: RootKind = "plan" if index["kind"] == "plan" else "checkpoint"
            entries = tuple(
                FileEntry(name=f["name"], length=f["length"], chunks=tuple(f["chunks"])) for f in index["files"]
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s); set aside as %s", path, error, quarantine(path).name)
            return None
        self._known = {**dict(list(self._known.items())[-_KEPT:]), path: (state, (kind, entries))}
        return kind, entries

    def write(self, path: Path, index: RootIndex) -> None:
        """Raises OSError."""
        kind, entries = index
        files = [{"name": e.name, "length": e.length, "chunks": list(e.chunks)} for e in entries]
        atomic_write_json(path, {"v": 1, "kind": kind, "files": files})
