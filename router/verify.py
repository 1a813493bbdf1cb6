"""Is an assembled folder what its lock, its authors and its organiser signed? Offline; no torch, no network, no clock.

Checked in this order: the lock's envelope; that the folder holds exactly the locked files, plain ones; length and
digest of each; the plan and its id; then for each slot its announcement (signature, plan, slot, admission), its
manifest (named by the announced root), its weights (chunk digests of the manifest's ema.safetensors), their header
(the plan's table), its config. The weights' values are judged by whoever assembles (expert.verify), not here.
What can be wrong is in folder_errors.py.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from paris_swarm.dht_schemas.canonical import parse_json
from paris_swarm.dht_schemas.dht_rules import check_announcement
from paris_swarm.dht_schemas.digest import CHUNK, blake3_hex
from paris_swarm.dht_schemas.errors import DigestMismatch, RecordError, WrongSlot, quoted
from paris_swarm.dht_schemas.header import header_length
from paris_swarm.dht_schemas.manifest import FileEntry
from paris_swarm.dht_schemas.plan import PLAN_FILE, OpenedPlan, open_plan
from paris_swarm.dht_schemas.records import Announcement, Holding
from paris_swarm.dht_schemas.trusted import TrustedSwarm
from paris_swarm.router.folder_errors import (
    ChangedFile,
    ExtraFile,
    FolderDamaged,
    FolderError,
    LockDisagrees,
    LockRefused,
    MissingFile,
    NotAssembled,
    NotPlainFile,
    OtherPlan,
    RecordRefused,
)
from paris_swarm.router.layout import (
    EMA_FILE,
    EXPERTS_CONFIG,
    MODEL_INDEX,
    announcement_path,
    bound_fields,
    config_path,
    experts_fields,
    holding_path,
    implied_paths,
    manifest_path,
    optional_paths,
    plan_file_path,
    required_paths,
    weights_path,
)
from paris_swarm.router.lock import LOCK_FILE, MAX_LOCK, Lock, LockedFile, LockedSlot, OpenedLock, open_lock

# ---------------------------------------------------------------------------------------------------------------------
# verify
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VerifiedFolder:
    """A folder that passed. `digest` is the assembly digest, BLAKE3 of lock.json."""

    path: Path
    lock: Lock
    digest: str
    plan: OpenedPlan

    def file(self, path: str) -> LockedFile:
        """The lock's entry of a file. Raises KeyError when the folder has none of that path."""
        for file in self.lock.files:
            if file.path == path:
                return file
        raise KeyError(path)

    def read(self, path: str) -> bytearray:
        """The bytes of a file, compared with the lock once more: what is used is what was verified. The caller's own.

        Raises:
            ChangedFile: it was changed since.
        """
        locked = self.file(path)
        data = bytearray(locked.length)
        with _open_plain(self.path / path) as stream:
            whole = stream.readinto(data) == locked.length and not stream.read(1)
        if not whole or blake3_hex(data) != locked.blake3:
            raise ChangedFile("changed since the folder was verified", where=path)
        return data


@dataclass(frozen=True)
class _Digests:
    length: int
    blake3: str
    chunks: tuple[str, ...]


def verify_folder(
    folder: str | os.PathLike[str],
    *,
    plan_id: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifiedFolder:
    """Checks an assembled folder; `plan_id` pins the plan it must be of. `on_progress` is told (bytes read, bytes).

    Raises:
        FolderError: what is wrong, and where. OSError: a file could not be read.
    """
    path = Path(folder)
    opened = _read_lock(path)
    found = _check_files(path, opened.lock, on_progress)
    plan = _check_plan(path, opened.lock, found, plan_id)
    _check_slots(path, opened.lock, plan, found)
    return VerifiedFolder(path, opened.lock, opened.digest, plan)


def _read_lock(folder: Path) -> OpenedLock:
    lock_path = folder / LOCK_FILE
    if not lock_path.is_file() or lock_path.is_symlink():
        if lock_path.is_symlink():
            raise NotPlainFile("a link", where=LOCK_FILE)
        if not folder.is_dir():
            raise NotAssembled(f"{folder} is no folder" if folder.exists() else f"{folder} is not there")
        if (folder / MODEL_INDEX).is_file():
            raise NotAssembled(
                f"{folder} has no {LOCK_FILE}: a diffusers model that nobody signed, for diffusers alone"
            )
        raise NotAssembled(f"{folder} has no {LOCK_FILE}")
    with _open_plain(lock_path) as stream:
        data = stream.read(MAX_LOCK + 1)
    try:
        return open_lock(data)
    except RecordError as error:
        raise LockRefused(str(error), where=LOCK_FILE) from error


def _check_files(folder: Path, lock: Lock, on_progress: Callable[[int, int], None] | None) -> dict[str, _Digests]:
    """Digests of every locked file, after checking that they are the locked ones and the only ones."""
    problems: list[FolderError] = []
    allowed_folders = {parent for file in lock.files for parent in _parents(file.path)}
    present: set[str] = set()
    for path, kind in _entries(folder, "", allowed_folders):
        if kind == "folder":
            if path not in allowed_folders:
                problems.append(ExtraFile("a folder that was not locked", where=quoted_path(path)))
        elif kind == "plain":
            present.add(path)
        else:
            problems.append(NotPlainFile(f"a {kind}", where=quoted_path(path)))
            present.add(path)
    locked = {file.path for file in lock.files}
    links = {problem.where for problem in problems}
    problems += [MissingFile("not there", where=path) for path in sorted(locked - present)]
    extra = sorted(present - locked - {LOCK_FILE})
    problems += [ExtraFile("was not locked", where=quoted_path(p)) for p in extra if quoted_path(p) not in links]

    total, done = sum(file.length for file in lock.files), 0
    found: dict[str, _Digests] = {}
    for file in lock.files:
        if file.path in present and file.path not in links:
            digests = _digests(folder / file.path)
            found[file.path] = digests
            if digests.length != file.length:
                problems.append(ChangedFile(f"has {digests.length} bytes, locked {file.length}", where=file.path))
            elif digests.blake3 != file.blake3:
                problems.append(ChangedFile("other bytes than were locked", where=file.path))
        done += file.length
        if on_progress is not None:
            on_progress(done, total)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        shown = "; ".join(f"{type(p).__name__} {p.where} ({p.what})" for p in problems[:10])
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        damaged = FolderDamaged(f"{shown}{more}", where="")
        damaged.problems = tuple(problems)
        raise damaged
    return found


def _check_plan(folder: Path, lock: Lock, found: dict[str, _Digests], plan_id: str | None) -> OpenedPlan:
    if plan_id is not None and lock.plan != plan_id:
        raise OtherPlan(f"of plan {lock.plan}, not {quoted(plan_id, 70)}", where=LOCK_FILE)
    if PLAN_FILE not in found:
        raise LockDisagrees("a folder without it is none", where=PLAN_FILE)
    with _refusals(PLAN_FILE):
        plan = open_plan((folder / PLAN_FILE).read_bytes(), plan_id=lock.plan)
    if plan.plan.organiser != lock.organiser:
        raise LockDisagrees(f"organiser {lock.organiser}, the plan says {plan.plan.organiser}", where=LOCK_FILE)
    named = {*(slot.slot for slot in lock.slots), *lock.missing}
    if named != set(plan.plan.slots):
        odd = sorted(named ^ set(plan.plan.slots))
        raise LockDisagrees(f"slot {odd[0]} is not accounted for as the plan has it", where=LOCK_FILE)
    entries = {entry.name: entry for entry in plan.plan.files}
    required = required_paths(lock.slots) | implied_paths(lock.slots, found)
    if lacking := sorted(required - found.keys()):
        raise LockDisagrees("not locked, though the folder needs it", where=lacking[0])
    if strange := sorted(found.keys() - required - optional_paths(lock.slots, entries)):
        raise ExtraFile("has no place in an assembled folder", where=strange[0])
    for name, entry in entries.items():
        if plan_file_path(name) in found:
            _check_entry(plan_file_path(name), found[plan_file_path(name)], entry)
    if EXPERTS_CONFIG in found:
        _check_json(folder, EXPERTS_CONFIG, experts_fields(plan, lock.slots))
    return plan


def _check_slots(folder: Path, lock: Lock, plan: OpenedPlan, found: dict[str, _Digests]) -> None:
    trusted = TrustedSwarm(plan)
    for slot in lock.slots:
        where = announcement_path(slot.slot)
        with _refusals(where):
            announcement = Announcement.open((folder / where).read_bytes()).record
            check_announcement(plan.plan, plan.plan_id, announcement)
        said = (slot.slot, slot.author, slot.root, slot.step, slot.probe_loss)
        a = announcement
        if said != (a.slot, a.author, a.root, a.step, a.probe_loss):
            raise LockDisagrees(f"slot {slot.slot} is locked as another checkpoint than was announced", where=where)
        bar = plan.plan.verification.bars[slot.slot].assemblable
        if slot.probe_loss >= bar:
            raise RecordRefused(f"announced probe loss {slot.probe_loss:.6g}, the bar is {bar:.6g}", where=where)
        where = manifest_path(slot.root)
        with _refusals(where):
            entry = trusted.feed_manifest(announcement, (folder / where).read_bytes()).entry(EMA_FILE)
        where = weights_path(slot.slot)
        _check_entry(where, found[where], entry)
        with _refusals(where):
            trusted.feed_header(slot.slot, EMA_FILE, _header(folder / where), entry.length)
        _check_config(folder, plan, slot)
        if holding_path(slot.slot) in found:
            _check_holding(folder, plan, slot)


def _check_entry(where: str, digests: _Digests, entry: FileEntry) -> None:
    if (digests.length, digests.chunks) != (entry.length, entry.chunks):
        cause = DigestMismatch(f"{where} is not the {entry.name} that was signed")
        raise RecordRefused(str(cause), where=where) from cause


def _check_config(folder: Path, plan: OpenedPlan, slot: LockedSlot) -> None:
    _check_json(folder, config_path(slot.slot), bound_fields(plan, slot))


def _check_json(folder: Path, where: str, wanted: Mapping[str, object]) -> None:
    """These fields of a JSON object are as they must be; what else it says is the assembler's."""
    with _refusals(where):
        config = parse_json((folder / where).read_bytes())
    for name, value in wanted.items():
        if not isinstance(config, dict) or config.get(name) != value:
            raise LockDisagrees(f"{name} is not that of the plan and the lock", where=where)


def _check_holding(folder: Path, plan: OpenedPlan, slot: LockedSlot) -> None:
    # A lease ends long before its folder does: who served the checkpoint is kept, when the lease ended is not judged.
    where = holding_path(slot.slot)
    with _refusals(where):
        holding = Holding.open((folder / where).read_bytes()).record
        if (holding.plan, holding.slot) != (plan.plan_id, slot.slot):
            raise WrongSlot(f"a holding of slot {holding.slot} in plan {holding.plan}")
    if holding.announcement.encode("utf-8") != (folder / announcement_path(slot.slot)).read_bytes():
        raise LockDisagrees("carries another announcement than the one beside it", where=where)


# ---------------------------------------------------------------------------------------------------------------------
# reading
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def _refusals(where: str) -> Iterator[None]:
    """Turns a refusal of bytes in the folder into one that says where they lie."""
    try:
        yield
    except FolderError:
        raise
    except RecordError as error:
        raise RecordRefused(str(error), where=where) from error


def quoted_path(path: str) -> str:
    """A path from somebody else's folder, fit for a terminal."""
    return path if path.isascii() and path.isprintable() and len(path) <= 256 else quoted(path, 120)


def _parents(path: str) -> Iterator[str]:
    names = path.split("/")[:-1]
    for count in range(1, len(names) + 1):
        yield "/".join(names[:count])


def _entries(folder: Path, prefix: str, known: Set[str]) -> Iterator[tuple[str, str]]:
    """(relative path, kind) of everything below a folder, links not followed; kind "folder", "plain" or what it is.

    Folders that are not `known` are named and not looked into: one is refused as a whole, however deep it goes.
    """
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        path = f"{prefix}{entry.name}"
        if entry.is_symlink():
            yield path, "link"
        elif entry.is_dir(follow_symlinks=False):
            yield path, "folder"
            if path in known:
                yield from _entries(folder / entry.name, f"{path}/", known)
        elif entry.is_file(follow_symlinks=False):
            yield path, "plain"
        else:
            yield path, "special file"


def _open_plain(path: Path) -> BinaryIO:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotPlainFile("not a plain file", where=path.name)
    return os.fdopen(descriptor, "rb")


def _digests(path: Path) -> _Digests:
    """Length, digest and chunk digests in one reading: these files are the largest on the machine."""
    whole, chunks, length = blake3(), [], 0
    with _open_plain(path) as stream:
        while piece := stream.read(CHUNK):
            whole.update(piece)
            chunks.append(blake3_hex(piece))
            length += len(piece)
    return _Digests(length, whole.hexdigest(), tuple(chunks))


def _header(path: Path) -> bytes:
    with _open_plain(path) as stream:
        first = stream.read(8)
        return bytes(first + stream.read(header_length(first)))
