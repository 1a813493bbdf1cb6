"""Content store: blobs and files named by the digest that commits to them, and half-fetched files that can go on.

    <folder>/blobs/<digest>             plan.json by plan id, manifests by root; at most one wire payload each
    <folder>/roots/<root>/index.json    kind and file entries: what ``chunk(root, file, chunk)`` means
    <folder>/roots/<root>/files/<name>  whole files only
    <folder>/roots/<root>/partial/<name>, maps/<name>
                                        a file being fetched, and one bit a chunk: which chunks it has
    <folder>/pins.json                  roots that ``delete`` refuses, with the reason
    <folder>/lock, in-use/<root>        locks between the processes that share the store (store_locks.py)

The store trusts no byte it reads back: a chunk is hashed before it is served, a chunk map is only a hint which chunks
of a partial file to hash when a download goes on. A file that fails its digest is set aside (``*.corrupt-N``), never
deleted. Everything here blocks: the event loop calls it through ``asyncio.to_thread``, but for ``use``, which is short
and must not be lost with a task that is cancelled while it waits for a thread.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from paris_swarm.dht_schemas.digest import CHUNK, blake3_hex
from paris_swarm.dht_schemas.errors import DigestMismatch
from paris_swarm.dht_schemas.files import atomic_write, atomic_write_json, quarantine
from paris_swarm.dht_schemas.manifest import FileEntry, check_file_name, check_unique_names, open_manifest
from paris_swarm.swarm.partial_file import PartialFile, read_map
from paris_swarm.swarm.store_index import RootIndex, RootIndices, RootKind
from paris_swarm.swarm.store_locks import InUse, Use, alone, unused
from paris_swarm.swarm.store_pins import read_pins
from paris_swarm.swarm.stored_files import bad_chunks, link

log = logging.getLogger(__name__)

MAX_BLOB = CHUNK
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredRoot:
    """One root as the store holds it. bytes: of whole files; total: of all files its index names."""

    root: str
    kind: RootKind
    bytes: int
    total: int
    complete: bool
    pinned: str | None


class ContentStore:
    """Blobs and files by digest, in one folder. Safe to use from several processes at once.

    Args:
        folder: made when missing.
        limit: bytes that the files in it may have together before it takes in more from others; None: no limit.
            Checkpoints trained here are links to the trainer's own files and always find room.

    Raises:
        OSError: no space or no permission; nothing already stored is lost.
    """

    def __init__(self, folder: Path, *, limit: int | None = None) -> None:
        self.folder = Path(folder)
        self.limit = limit
        for part in ("blobs", "roots", "in-use"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        self._being_fetched: weakref.WeakSet[PartialFile] = weakref.WeakSet()
        self._indices = RootIndices()

    # ---- blobs --------------------------------------------------------------

    def put_blob(self, data: bytes) -> str:
        """Store bytes under their BLAKE3 digest and return it (64 hex digits)."""
        if len(data) > MAX_BLOB:
            raise ValueError(f"a blob of {len(data)} bytes; the most is {MAX_BLOB}: store it as a file")
        digest = blake3_hex(data)
        path = self._blob_path(digest)
        if not path.exists() or path.read_bytes() != data:
            atomic_write(path, data)
        return digest

    def read_blob(self, digest: str) -> bytes | None:
        """A blob's bytes, or None when it is not here. Raises DigestMismatch (and sets it aside) when it is damaged."""
        path = self._blob_path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if blake3_hex(data) != digest:
            aside = quarantine(path)
            raise DigestMismatch(f"blob {digest} in {path.parent} was changed on disk; set aside as {aside.name}")
        return data

    # ---- whole files ----------------------------------------------------------

    def put_folder(self, manifest: bytes, folder: Path) -> str:
        """Take in a checkpoint: its manifest and the files it names, hard-linked (copied across file systems).

        Returns:
            The root: BLAKE3 of the manifest's bytes.

        Raises:
            DigestMismatch: a file of the folder is not what the manifest says.
        """
        root = blake3_hex(manifest)
        opened = open_manifest(manifest, root, cap_bytes=sys.maxsize)
        with self.use(root):
            self.put_files(root, opened.files, folder, kind="checkpoint")
            self.put_blob(manifest)
        return root

    def put_files(self, root: str, entries: Sequence[FileEntry], folder: Path, *, kind: RootKind) -> None:
        """Take in files under a root that commits to them in its own way (a plan id: the plan names its files)."""
        self.begin(root, entries, kind=kind)
        for entry in entries:
            target = self._file_path(root, entry.name)
            if bad_chunks(target, entry):
                link(Path(folder) / entry.name, target)
                bad = bad_chunks(target, entry)
                if bad:
                    target.unlink()
                    raise DigestMismatch(f"{Path(folder) / entry.name} is not what {root} says: {bad[0]}")

    def link_into(self, root: str, blob: bytes, blob_name: str, folder: Path) -> None:
        """Lay a whole root out as a folder: every file (hard-linked or copied), then ``blob`` as ``blob_name``.

        The blob comes last, so its presence says that the folder is complete.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for entry in self.entries(root):
            link(self.path(root, entry.name), folder / entry.name)
        atomic_write(folder / blob_name, blob)

    def path(self, root: str, name: str) -> Path:
        """Where a whole file lies. Raises FileNotFoundError when the store does not hold it whole."""
        for entry in self.entries(root):
            if entry.name == name and self._whole(root, entry):
                return self._file_path(root, name)
        raise FileNotFoundError(f"{name} of {root} is not in the content store {self.folder}")

    def has(self, root: str) -> bool:
        """Whether every file of the root is here in full length (``verify`` hashes them)."""
        index = self._index(root)
        return index is not None and all(self._whole(root, entry) for entry in index[1])

    def holds_some(self, root: str) -> bool:
        """Whether at least one file of a root is here in full length."""
        index = self._index(root)
        return index is not None and any(self._whole(root, entry) for entry in index[1])

    def holds_file(self, root: str, entry: FileEntry) -> bool:
        """Whether one file of a root is here in full length."""
        return self._whole(root, entry)

    def entries(self, root: str) -> tuple[FileEntry, ...]:
        """The root's files. Raises FileNotFoundError for a root never begun."""
        index = self._index(root)
        if index is None:
            raise FileNotFoundError(f"root {root} is not in the content store {self.folder}")
        return index[1]

    def kind(self, root: str) -> RootKind:
        """What the root stands for. Raises FileNotFoundError for a root never begun."""
        index = self._index(root)
        if index is None:
            raise FileNotFoundError(f"root {root} is not in the content store {self.folder}")
        return index[0]

    def missing(self, root: str) -> dict[str, tuple[int, ...]]:
        """Chunks not here yet, by file; partial files count by their maps. Raises FileNotFoundError as ``entries``."""
        absent: dict[str, tuple[int, ...]] = {}
        for entry in self.entries(root):
            if not self._whole(root, entry):
                held = read_map(self._map_path(root, entry.name), len(entry.chunks))
                absent[entry.name] = tuple(i for i in range(len(entry.chunks)) if i not in held)
        return absent

    def read_chunk(self, root: str, file: int, chunk: int) -> bytes | None:
        """One chunk of a whole file, hashed; None when it is not here.

        Raises:
            DigestMismatch: the file was changed on disk; it was set aside.
        """
        index = self._index(root)
        if index is None or file >= len(index[1]) or chunk >= len(index[1][file].chunks):
            return None
        return self.read_chunk_of(root, index[1][file], chunk)

    def read_chunk_of(self, root: str, entry: FileEntry, chunk: int) -> bytes | None:
        """The same of a file of which the entry is at hand."""
        path = self._file_path(root, entry.name)
        try:
            with open(path, "rb") as stored:
                stored.seek(chunk * CHUNK)
                data = stored.read(min(CHUNK, entry.length - chunk * CHUNK))
        except FileNotFoundError:
            return None
        if blake3_hex(data) != entry.chunks[chunk]:
            aside = quarantine(path)
            raise DigestMismatch(f"chunk {chunk} of {path} was changed on disk; the file was set aside as {aside.name}")
        return data

    def chunks_of_other_roots(
        self, root: str, digests: Set[str], *, foreign: Callable[[], Collection[str]] = tuple
    ) -> dict[str, tuple[str, FileEntry, int]]:
        """Where chunks of these digests lie in whole files of other roots: what ``read_chunk_of`` takes, by digest.

        ``foreign``: roots to leave out. Asked last: what came meanwhile was named there before it came. Reads every
        index once.
        """
        found: dict[str, dict[str, tuple[str, FileEntry, int]]] = {}
        for name in [path.name for path in (self.folder / "roots").iterdir()] if digests else []:
            index = self._index(name) if name != root and _DIGEST.fullmatch(name) else None
            for entry in index[1] if index is not None else ():
                shared = [(digest, chunk) for chunk, digest in enumerate(entry.chunks) if digest in digests]
                if shared and self._whole(name, entry):
                    found.setdefault(name, {}).update({digest: (name, entry, chunk) for digest, chunk in shared})
        left_out = foreign() if found else ()
        places: dict[str, tuple[str, FileEntry, int]] = {}
        for name, theirs in found.items():
            places.update(theirs if name not in left_out else {})
        return places

    def verify(self, root: str) -> list[str]:
        """Hash every whole file; the names of those that fail, which are set aside."""
        return [entry.name for entry in self.entries(root) if not self.verify_file(root, entry)]

    def verify_file(self, root: str, entry: FileEntry) -> bool:
        """Hash one file if it is here: True when it is right or absent, False when it failed and was set aside."""
        path = self._file_path(root, entry.name)
        if not path.exists():
            return True
        bad = bad_chunks(path, entry)
        if bad:
            log.warning("%s of %s: %s; set aside as %s", entry.name, root, bad[0], quarantine(path).name)
        return not bad

    # ---- fetching ---------------------------------------------------------------

    def begin(self, root: str, entries: Sequence[FileEntry], *, kind: RootKind) -> None:
        """Note what a root consists of, so that its files can come in; the caller has verified the entries.

        May be called again; other entries than before replace them (only one list can match the root).
        """
        check_unique_names(entries)
        for part in ("files", "partial", "maps"):
            (self._root_path(root) / part).mkdir(parents=True, exist_ok=True)
        if self._index(root) != (kind, tuple(entries)):
            self._indices.write(self._root_path(root) / "index.json", (kind, tuple(entries)))

    def open_partial(self, root: str, entry: FileEntry) -> PartialFile:
        """Go on with a file (or start it): hashes the chunks its map claims. Close it, or ``finish`` it.

        Raises:
            InUse: another task or process is fetching this file.
            OSError: no space on the disk (ENOSPC), or none below the store's limit (EDQUOT).
        """
        path = self._root_path(root) / "partial" / check_file_name(entry.name)
        if self.limit is not None:
            used = self.used_bytes()
            with contextlib.suppress(FileNotFoundError):
                used -= path.stat().st_size
            if used + entry.length > self.limit:
                raise OSError(
                    errno.EDQUOT,
                    f"{entry.name} has {entry.length} bytes, the content store holds {used} and may hold {self.limit}: "
                    "run `paris-swarm store gc`, or raise --store-limit",
                    str(self.folder),
                )
        partial = PartialFile(
            entry,
            partial=path,
            chunk_map=self._map_path(root, entry.name),
            final=self._file_path(root, entry.name),
            promised=sum(other.to_come for other in list(self._being_fetched) if other.path != path),
        )
        self._being_fetched.add(partial)
        return partial

    def use(self, root: str) -> Use:
        """Keep a root from being deleted, by this process or another, until the answer is released.

        Raises:
            InUse: it is being deleted at this moment.
        """
        return Use(self._in_use_path(root))

    def used_bytes(self) -> int:
        """Bytes of the files here: whole ones, those being fetched at their full length, what came of others."""
        found = 0
        for part in ("files", "partial"):
            for path in (self.folder / "roots").glob(f"*/{part}/*"):
                try:
                    found += path.stat().st_size
                except FileNotFoundError:
                    continue  # it was moved into place, or deleted, meanwhile
        return found

    # ---- keeping and letting go ---------------------------------------------------

    def roots(self) -> list[StoredRoot]:
        """Everything stored, by root."""
        pins = self.pins()
        found: list[StoredRoot] = []
        for path in sorted((self.folder / "roots").iterdir()):
            index = self._index(path.name) if _DIGEST.fullmatch(path.name) else None
            if index is not None:
                kind, entries = index
                whole = [entry for entry in entries if self._whole(path.name, entry)]
                found.append(
                    StoredRoot(
                        root=path.name,
                        kind=kind,
                        bytes=sum(entry.length for entry in whole),
                        total=sum(entry.length for entry in entries),
                        complete=len(whole) == len(entries),
                        pinned=pins.get(path.name),
                    )
                )
        return found

    def pins(self) -> dict[str, str]:
        """Pinned roots and why."""
        return read_pins(self.folder / "pins.json")

    def pin(self, root: str, reason: str) -> None:
        """Keep a root: ``delete`` refuses it until it is unpinned."""
        with alone(self.folder / "lock"):
            atomic_write_json(self.folder / "pins.json", {**self.pins(), _checked_digest(root): reason})

    def unpin(self, root: str) -> None:
        """Let a root go; no error when it was not pinned."""
        with alone(self.folder / "lock"):
            atomic_write_json(self.folder / "pins.json", {r: why for r, why in self.pins().items() if r != root})

    def delete(self, root: str, *, blob: bool = True) -> None:
        """Remove a root and its partial files, and its manifest too unless ``blob`` is False.

        Raises:
            ValueError: it is pinned.
            InUse: a task or a process is fetching, checking or laying out its files.
        """
        with alone(self.folder / "lock"), unused(self._in_use_path(root)):
            reason = self.pins().get(root)
            if reason is not None:
                raise ValueError(f"root {root} is pinned ({reason}): unpin it first")
            path = self._root_path(root)
            doomed = None
            if path.exists():
                # Renamed first: a half-deleted root must not look like one to serve or to go on with.
                doomed = Path(tempfile.mkdtemp(prefix="deleted-", dir=self.folder))
                os.replace(path, doomed / root)
            if blob:
                self._blob_path(root).unlink(missing_ok=True)
        if doomed is not None:
            shutil.rmtree(doomed)

    def in_use(self, root: str) -> bool:
        """Whether a task or a process is at work on a root's files right now."""
        try:
            with unused(self._in_use_path(root)):
                return False
        except InUse:
            return True

    # ---- inside ---------------------------------------------------------------------

    def _blob_path(self, digest: str) -> Path:
        return self.folder / "blobs" / _checked_digest(digest)

    def _in_use_path(self, root: str) -> Path:
        return self.folder / "in-use" / _checked_digest(root)

    def _root_path(self, root: str) -> Path:
        return self.folder / "roots" / _checked_digest(root)

    def _file_path(self, root: str, name: str) -> Path:
        return self._root_path(root) / "files" / check_file_name(name)

    def _map_path(self, root: str, name: str) -> Path:
        return self._root_path(root) / "maps" / check_file_name(name)

    def _whole(self, root: str, entry: FileEntry) -> bool:
        try:
            return self._file_path(root, entry.name).stat().st_size == entry.length
        except FileNotFoundError:
            return False

    def _index(self, root: str) -> RootIndex | None:
        return self._indices.read(self._root_path(root) / "index.json")


def _checked_digest(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r} is not a BLAKE3 digest (64 lower-case hex digits)")
    return digest
