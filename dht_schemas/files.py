"""Writing files so that a crash leaves the old file or the new one, never half of one; setting damaged files aside."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path


def atomic_write(path: str | os.PathLike[str], data: bytes, *, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data``: a temporary file beside it, fsync, rename, fsync of the folder.

    ``mode`` holds from the first moment the bytes are on disk (less the process's umask), so a key is never readable
    by others. The folder must exist. Raises OSError (no space, no permission); the old file is then still whole.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def atomic_write_json(path: str | os.PathLike[str], obj: object, *, mode: int = 0o644) -> None:
    """``atomic_write`` of ``obj`` as indented JSON for people to read. Raises ValueError for NaN, infinity or what
    JSON cannot hold.
    """
    try:
        text = json.dumps(obj, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    atomic_write(path, (text + "\n").encode("utf-8"), mode=mode)


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or a folder's list of names, is on disk. Raises OSError, also where a file system cannot."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def quarantine(path: str | os.PathLike[str], *, keep: bool = False) -> Path:
    """Rename a damaged file or folder to ``<name>.corrupt-N`` (the first free N) and return the new path. Nothing is
    deleted. ``keep``: a file stays under its own name, too, until it is replaced (where the file system has links).
    """
    source = Path(path)
    number = 1
    while True:
        target = source.with_name(f"{source.name}.corrupt-{number}")
        if not os.path.lexists(target):
            if not keep or not _linked(source, target):
                os.rename(source, target)
            _sync_folder(source.parent)
            return target
        number += 1


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut, where the file system knows how."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        return  # some network file systems refuse to open folders; the rename itself has happened
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # the same file systems refuse to sync them
    finally:
        os.close(descriptor)
