"""Files of the content store as they lie on this disk: hashed chunk by chunk, linked in and out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from paris_swarm.dht_schemas.digest import CHUNK, blake3_hex
from paris_swarm.dht_schemas.manifest import FileEntry


def bad_chunks(path: Path, entry: FileEntry) -> list[str]:
    """What is wrong with a file, in words; empty when every chunk matches."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return ["the file is missing"]
    if size != entry.length:
        return [f"it has {size} bytes, not {entry.length}"]
    return [
        f"chunk {index} does not match its digest"
        for index, data in enumerate(_chunks(path))
        if blake3_hex(data) != entry.chunks[index]
    ]


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            yield data


def link(source: Path, target: Path) -> None:
    """Put ``source`` at ``target``, replacing what is there: hard link, or a copy where that is not possible."""
    if target.exists() and os.path.samefile(source, target):
        return
    temporary = target.with_name(f".{target.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, temporary, follow_symlinks=True)
    os.replace(temporary, target)
