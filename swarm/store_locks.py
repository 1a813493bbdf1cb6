"""Locks between processes that share one content store: a join, an assemble and a gc of one home at once.

``flock`` on files of the store's folder: the kernel lets go of a lock when its process dies, so none is ever stale. Two
opens conflict within one process as well as between two.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class InUse(Exception):
    """Another task or process is at work on these bytes: try again when it is done."""


def lock_descriptor(descriptor: int) -> bool:
    """Take the exclusive lock of an open file without waiting; False when somebody else has one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock_descriptor(descriptor: int) -> None:
    """Let go of an open file's lock, whatever duplicates of the descriptor there are; no error when it had none."""
    with contextlib.suppress(OSError):  # closing all of them does the same
        fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock at ``path`` exclusively, waiting for it: for changes that take milliseconds."""
    with _open_lock(path) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def unused(path: Path) -> Iterator[None]:
    """Hold the lock at ``path`` exclusively. Raises InUse when anybody holds it."""
    with _open_lock(path) as descriptor:
        if not lock_descriptor(descriptor):
            raise InUse(f"{path.name} is in use")
        yield


class Use:
    """A share in the lock at ``path``, until ``release``: nobody deletes what it stands for meanwhile.

    Raises:
        InUse: it is being deleted at this moment.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise InUse(f"{path.name} is being deleted; run the same command again") from error
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let go; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Use:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


@contextlib.contextmanager
def _open_lock(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
