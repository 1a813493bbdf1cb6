"""The folders below a folder, without recursion: a tree may be as deep as its maker liked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from paris_swarm.expert.data.sources import PrepareError

MAX_DEPTH = 64
"""Levels below the folder that is prepared."""


def folders(place: Path, *, hidden: bool = True) -> Iterator[str]:
    """``place`` ("") and the folders below it as relative paths, a folder before what is in it, neighbours by name.

    Links to folders are not followed, so none of them leads in a circle; hidden: whether names that begin with a dot
    count. Raises PrepareError: deeper than MAX_DEPTH. OSError.
    """
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        yield prefix
        with os.scandir(place / prefix) as entries:
            below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        if below and prefix.count("/") + bool(prefix) >= MAX_DEPTH:
            raise PrepareError(
                f"folders in {place} lie more than {MAX_DEPTH} deep, below {'/'.join(prefix.split('/')[:3])}/...: move "
                "the pictures up, or give a folder further down"
            )
        names = sorted((name for name in below if hidden or not name.startswith(".")), reverse=True)
        waiting += [f"{prefix}/{name}" if prefix else name for name in names]


def files_below(place: Path, suffix: str) -> list[Path]:
    """The files below ``place`` whose names end in ``suffix``, sorted; links to files count, links to folders do not.

    Raises PrepareError: deeper than MAX_DEPTH. OSError.
    """
    found: list[Path] = []
    for prefix in folders(place):
        with os.scandir(place / prefix) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(suffix) and is_file(entry)]
        found += [place / prefix / name for name in names]
    return sorted(found)


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link to one; a link that leads to itself is none."""
    try:
        return entry.is_file()
    except OSError:
        return False
