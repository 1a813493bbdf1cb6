"""What in a content store nobody needs any more, and letting it go: only on request, only what is named first.

Kept, whatever happens: roots that are pinned, that this home announces or serves (its own checkpoints, its copies, the
plans of its swarms), that a task or process is at work on, and that came in a moment ago. Manifests are never let go:
they are small, and the history of a checkpoint can only be followed through them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.store_locks import InUse

GRACE_S = 600.0
"""Age, in seconds, below which a root is left alone: a process may be about to announce it."""


@dataclass(frozen=True)
class Garbage:
    """One thing to let go. bytes: what its files hold; freed: of these, what no link elsewhere keeps on the disk."""

    kind: Literal["root", "damaged", "half-deleted"]
    name: str
    bytes: int
    freed: int
    why: str


def kept_roots(home: Home) -> dict[str, str]:
    """Roots that a home keeps for its swarms, and why. Says nothing about pins, which are the store's."""
    kept: dict[str, str] = {}
    for plan_id in home.swarm_ids():
        swarm = home.swarm(plan_id)
        kept[plan_id] = "plan of a swarm of this home"
        reasons = (
            ("copy for others", list(swarm.copies().values())),
            ("announced", list(swarm.held().values())),
            ("last own checkpoint", swarm.ledger.signed("checkpoint")),
        )
        for why, envelopes in reasons:
            for envelope in envelopes:
                try:
                    announcement = Announcement.open(envelope).record
                except RecordError:
                    continue  # damaged on disk: it names nothing that could be kept
                kept[announcement.root] = f"{why}, slot {announcement.slot}"
    return kept


def find_garbage(store: ContentStore, kept: Mapping[str, str], *, now: float) -> list[Garbage]:
    """What ``collect`` would let go, largest first.

    Args:
        now: Unix seconds, against the time at which a root came in.
    """
    found: list[Garbage] = []
    for stored in store.roots():
        folder = store.folder / "roots" / stored.root
        if stored.root in kept or stored.pinned is not None or store.in_use(stored.root):
            continue
        if now - _came_in(folder) < GRACE_S:
            continue
        why = "nobody in this home needs it" if stored.complete else "a download that was not finished"
        found.append(Garbage("root", stored.root, *_sizes(folder), why))
    for path in sorted((store.folder / "roots").glob("*/**/*.corrupt-*")):
        if path.is_file() and not any(item.name == path.relative_to(store.folder / "roots").parts[0] for item in found):
            found.append(
                Garbage("damaged", str(path.relative_to(store.folder)), *_sizes(path), "changed on disk, set aside")
            )
    for path in sorted(store.folder.glob("deleted-*")):
        found.append(Garbage("half-deleted", path.name, *_sizes(path), "left by a deletion that was cut short"))
    return sorted(found, key=lambda item: -item.bytes)


def collect(store: ContentStore, garbage: list[Garbage]) -> tuple[list[Garbage], dict[str, str]]:
    """Let these go; returns what went, and what stayed after all and why (pinned or taken into use meanwhile)."""
    gone: list[Garbage] = []
    stayed: dict[str, str] = {}
    for item in garbage:
        path = store.folder / item.name
        try:
            if item.kind == "root":
                store.delete(item.name, blob=False)
            elif item.kind == "damaged":
                path.unlink(missing_ok=True)
            else:
                shutil.rmtree(path, ignore_errors=True)
        except (InUse, ValueError) as error:
            stayed[item.name] = str(error)
            continue
        gone.append(item)
    return gone, stayed


def _came_in(folder: Path) -> float:
    try:
        return (folder / "index.json").stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _sizes(path: Path) -> tuple[int, int]:
    """(bytes, bytes that the disk gets back): a hard link elsewhere keeps a file's blocks; a sparse file has few."""
    total = freed = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file() and not file.is_symlink():
            status = file.stat()
            total += status.st_size
            freed += 512 * status.st_blocks if status.st_nlink == 1 else 0
    return total, freed
