"""One file being fetched: verified chunks in any order, and a map of them that survives the process.

A chunk is hashed before it is written, and its bit in the map is set after: a process killed at any moment loses the
chunks in flight and nothing else. The map is a hint: a download that goes on hashes what it claims.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import threading
from pathlib import Path

from paris_swarm.dht_schemas.digest import CHUNK, blake3_hex
from paris_swarm.dht_schemas.errors import DigestMismatch
from paris_swarm.dht_schemas.manifest import FileEntry
from paris_swarm.swarm.store_locks import InUse, lock_descriptor, unlock_descriptor

log = logging.getLogger(__name__)

_KEEP_SIZE_AND_PUNCH = 0x01 | 0x02
"""FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE of Linux's fallocate(2), which Python's os does not have."""

SYNC_BYTES = 32 * 1024 * 1024
"""Bytes written to a file before they are sent on their way to the disk."""


class PartialFile:
    """One file being fetched: chunks in any order, each hashed before it is written.

    Attributes:
        entry: what the file has to become.
        path: where it grows.
    """

    def __init__(self, entry: FileEntry, *, partial: Path, chunk_map: Path, final: Path, promised: int = 0) -> None:
        """``promised``: bytes that other files on this disk still have to take in.

        Raises:
            InUse: another task or process is fetching this file.
            OSError: no space (ENOSPC) or no permission.
        """
        self.entry = entry
        self.path = partial
        self._map_path, self._final = chunk_map, final
        self._lock = threading.Lock()
        self._held: set[int] = set()
        self._finished = False
        self._ours = False
        """Locked, and its chunks known: what is beyond them may be given back."""
        self._unsynced = 0
        self._flushing: threading.Thread | None = None
        self._flush_error: OSError | None = None
        self._map_fd = -1
        self._fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            # The lock is on the file itself; whoever had it may have moved the file into place meanwhile.
            if not lock_descriptor(self._fd) or not _is_still(self._fd, partial):
                raise InUse(f"{entry.name} is being fetched by another task or process of this home")
            # No space is said now, not after an hour: asked for first, for all files together, then reserved.
            needed = promised + entry.length - 512 * os.fstat(self._fd).st_blocks
            space = os.fstatvfs(self._fd)
            if needed > (free := space.f_bavail * space.f_frsize):
                raise OSError(
                    errno.ENOSPC, f"No space left on device: {needed} bytes to come, {free} free", str(partial)
                )
            if entry.length and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, entry.length)
            os.ftruncate(self._fd, entry.length)
            claimed = read_map(chunk_map, len(entry.chunks))
            for index in sorted(claimed):
                if blake3_hex(self._read(index)) == entry.chunks[index]:
                    self._held.add(index)
            if self._held != claimed:
                log.warning("%s: %d chunks changed on disk", partial, len(claimed) - len(self._held))
            self._map_fd = os.open(chunk_map, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            size = -(-len(entry.chunks) // 8)
            os.ftruncate(self._map_fd, size)
            for place in range(size):
                self._write_map(place)
            self._ours = True
        except BaseException:
            self.close()
            raise

    @property
    def complete(self) -> bool:
        """Whether every chunk is here; ``finish`` then makes the file whole."""
        return len(self._held) == len(self.entry.chunks)

    @property
    def missing(self) -> list[int]:
        """Indices of chunks still to come, ascending."""
        return [index for index in range(len(self.entry.chunks)) if index not in self._held]

    @property
    def to_come(self) -> int:
        """Bytes that this file still has to take in; 0 once it is closed."""
        return 0 if self._fd < 0 else sum(self.size(index) for index in self.missing)

    def size(self, index: int) -> int:
        """Bytes of one chunk; only the last one may be shorter than CHUNK."""
        return min(CHUNK, self.entry.length - index * CHUNK)

    def write(self, index: int, data: bytes | memoryview) -> None:
        """Hash a chunk and write it.

        Raises:
            DigestMismatch: it is not this chunk; nothing was written.
            OSError: it could not be written, or what came before did not reach the disk.
        """
        if len(data) != self.size(index) or blake3_hex(data) != self.entry.chunks[index]:
            raise DigestMismatch(f"chunk {index} of {self.entry.name} does not match its digest")
        view, offset = memoryview(data), index * CHUNK
        # Locked whole: a close from another thread must not hand this descriptor's number to another file meanwhile.
        with self._lock:
            if self._fd < 0:
                raise ValueError(f"{self.entry.name} was closed")
            while len(view):
                written = os.pwrite(self._fd, view, offset)
                view, offset = view[written:], offset + written
            self._held.add(index)
            self._write_map(index // 8)
            self._unsynced += len(data)
            behind = self._flush_behind()
        if behind is not None:  # the disk is slower than the source: what is not written yet stays bounded
            behind.join()

    def _flush_behind(self) -> threading.Thread | None:
        """Write out what came and give its memory back, so that a download of any size goes through the same few
        megabytes. Fresh memory for each page cost a virtual machine 3 to 5 s of CPU a GiB, this 0.4 s
        (docs/results/transfer-2026-11.md); and the last flush is short.

        It takes as long as two chunks take to come, so a thread of its own does it. Returns one to wait for.
        """
        if self._flush_error is not None:
            raise self._flush_error
        if self._unsynced < SYNC_BYTES or not hasattr(os, "posix_fadvise"):
            return None
        if self._flushing is not None and self._flushing.is_alive():
            return self._flushing if self._unsynced >= 2 * SYNC_BYTES else None
        self._unsynced = 0
        # A descriptor of its own: a close meanwhile must not hand its number to another file.
        self._flushing = threading.Thread(target=self._flush, args=(os.dup(self._fd),), name="flush")
        self._flushing.start()
        return None

    def _flush(self, descriptor: int) -> None:
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:  # an fsync after this one would not tell it again
            self._flush_error = error
        finally:
            os.close(descriptor)

    def finish(self) -> Path:
        """Make the file whole: flush, move into place, drop the map. Raises ValueError while chunks are missing."""
        if self.missing:
            raise ValueError(f"{self.entry.name} still misses {len(self.missing)} chunks")
        with self._lock:  # the last chunks may come at once, from several threads
            if not self._finished:
                if self._flushing is not None:
                    self._flushing.join()
                if self._flush_error is not None:
                    raise self._flush_error
                os.fsync(self._fd)
                os.replace(self.path, self._final)
                self._map_path.unlink(missing_ok=True)
                self._finished = True
        self.close()
        return self._final

    def discard(self) -> None:
        """Remove what was begun: somebody else made the file whole meanwhile."""
        self.path.unlink(missing_ok=True)
        self._map_path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go of the file; what was written stays for the next time, and may still be on its way to the disk. Space
        that was reserved and not come to use is given back: sources that name large files and send none would fill
        the disk with it.
        """
        with self._lock:
            if self._fd >= 0 and self._ours and not self._finished:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, max((index * CHUNK + self.size(index) for index in self._held), default=0))
                    for index in self.missing:
                        _punch(self._fd, index * CHUNK, self.size(index))
            # A flush under way has a duplicate, and would keep the lock for as long as the disk takes. It need not: it
            # writes nothing that is not in the file already.
            if self._fd >= 0:
                unlock_descriptor(self._fd)
            for descriptor in (self._fd, self._map_fd):
                if descriptor >= 0:
                    os.close(descriptor)
            self._fd = self._map_fd = -1

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self, index: int) -> bytes:
        return os.pread(self._fd, self.size(index), index * CHUNK)

    def _write_map(self, place: int) -> None:
        """Write one byte of the map, in place: no moment at which a killed process leaves less than there was.

        Not synced: after a power cut the map may claim too much or too little, and both are found out by hashing.
        """
        bits = sum(1 << bit for bit in range(8) if 8 * place + bit in self._held)
        os.pwrite(self._map_fd, bytes([bits]), place)


def read_map(path: Path, chunks: int) -> set[int]:
    """The chunks that a map claims, of the first ``chunks``; none when there is no map."""
    try:
        bits = path.read_bytes()
    except FileNotFoundError:
        return set()
    return {index for index in range(min(chunks, 8 * len(bits))) if bits[index // 8] >> index % 8 & 1}


def _punch(descriptor: int, start: int, length: int) -> None:
    """Give a range's blocks back to the disk, where kernel and file system can; it reads as zeros then."""
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is not None:
        fallocate(descriptor, _KEEP_SIZE_AND_PUNCH, ctypes.c_int64(start), ctypes.c_int64(length))


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
