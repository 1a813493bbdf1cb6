"""The folder of a run that has not ended: a finished shard stays finished, whatever kills the process.

It lies beside the output under a hidden name made from the run's settings, so the same command finds it again and
another command cannot mistake it for its own. A shard counts from the moment its record is there; the record is written
last, once the shard's files are on disk. When all is done the records go and the folder takes the output's name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from paris_swarm.dht_schemas.digest import blake3_hex, digest_file
from paris_swarm.dht_schemas.files import atomic_write_json
from paris_swarm.expert.data.shards import MANIFEST
from paris_swarm.expert.data.sources import PrepareError, Skipped

SETTINGS = "unfinished.json"
_LOCK = "unfinished.lock"


@dataclass(frozen=True)
class ShardRecord:
    """What one finished shard holds.

    rows: usable and kept; looked_at: usable images before any choice, usable: those that count towards a limit;
    skipped: (broken ones in the source's order, then duplicates), all of them; tokens: its longest caption;
    files: {"name", "length", "digest"} of each; last: whether the run ends with it.
    """

    number: int
    rows: int
    looked_at: int
    usable: int
    tokens: int
    skipped: tuple[Skipped, ...]
    files: tuple[Mapping[str, Any], ...]
    last: bool


class UnfinishedFolder:
    """A run's folder. Nothing is touched before `take`; ``records`` are the shards that an earlier run finished.

    `take` belongs inside the ``try`` whose ``finally`` calls `leave`: whatever moment the run is cut short at, a folder
    without a finished shard goes, and one that is another process's stays.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        name = blake3_hex(json.dumps(settings, sort_keys=True).encode())[:12]
        self._out = out
        self._settings = dict(settings)
        self._lock: IO[bytes] | None = None
        self._held = False
        self.path = out.parent / f".{out.name[:100]}.{name}.partial"
        self.records: list[ShardRecord] = []

    def take(self) -> None:
        """Make the folder or find it again, and hold it alone.

        Raises PrepareError: another process works on it. OSError.
        """
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(exist_ok=True)
        self._lock = open(self.path / _LOCK, "ab")  # noqa: SIM115 (held until the run ends)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            why = f"another prepare with the same settings is writing {self._out}: wait for it"
            raise PrepareError(why) from error
        self._held = True
        self.records = list(self._read_records())
        if not (self.path / SETTINGS).exists() and not self.whole:
            atomic_write_json(self.path / SETTINGS, self._settings)

    @property
    def whole(self) -> bool:
        """Whether everything is there and only the last rename is missing."""
        return (self.path / MANIFEST).is_file()

    def commit(self, record: ShardRecord) -> None:
        """From here on this shard is finished."""
        atomic_write_json(self._record(record.number), asdict(record))
        self.records.append(record)

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest: all is there but the output's name."""
        atomic_write_json(self.path / MANIFEST, dict(manifest))

    def put_in_place(self) -> None:
        """Rename a whole folder to the output's name; a previous output is set aside first, then removed."""
        manifest = json.loads((self.path / MANIFEST).read_text("utf-8"))
        kept = {MANIFEST, *(entry["name"] for entry in manifest["files"])}
        for path in self.path.iterdir():  # records, and what a killed write left
            if path.name not in kept:
                path.unlink()
        put_in_place(self.path, self._out)
        self._let_go()

    def leave(self) -> None:
        """Let go of the folder; it goes with whatever is in it where no shard was finished."""
        if not self._held:  # refused, or cut short on the way: nothing in it is ours
            with contextlib.suppress(OSError):
                self.path.rmdir()
        elif not self.whole and not any(self.path.glob("shard-*.json")):  # as on disk: reading them may be cut short
            shutil.rmtree(self.path, ignore_errors=True)
        self._let_go()

    def discard(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._let_go()

    def others(self) -> list[Path]:
        """Unfinished folders of the same output with other settings."""
        found = self.path.parent.glob(f".{self._out.name[:100]}.????????????.partial")
        return sorted(path for path in found if path != self.path)

    def _let_go(self) -> None:
        self._held = False
        if self._lock is not None:
            self._lock.close()

    def _record(self, number: int) -> Path:
        return self.path / f"shard-{number:05d}.json"

    def _read_records(self) -> Iterator[ShardRecord]:
        """The finished shards from the first on; one that is damaged ends them and is done again."""
        number = 0
        while True:
            try:
                said = json.loads(self._record(number).read_text("utf-8"))
                said["skipped"] = tuple(Skipped(**each) for each in said["skipped"])
                said["files"] = tuple(said["files"])
                record = ShardRecord(**said)
                lengths = [(self.path / each["name"]).stat().st_size == each["length"] for each in record.files]
            except (OSError, ValueError, KeyError, TypeError):
                return
            if record.number != number or not all(lengths):
                return
            yield record
            number += 1


def file_entry(path: Path) -> dict[str, Any]:
    """{"name", "length", "digest"} of a file, once it is on disk."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
    return {"name": path.name, "length": path.stat().st_size, "digest": digest_file(path)}


def put_in_place(folder: Path, out: Path) -> None:
    """Rename ``folder`` to ``out``; a previous output is set aside first and removed when the new one stands."""
    old = _set_aside(out)
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        with contextlib.suppress(OSError):
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(out: Path) -> None:
    """Undo or finish what `put_in_place` was killed in: a previous output that was set aside comes back or goes."""
    old = _set_aside(out)
    if old.exists() and out.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(out)


def _set_aside(out: Path) -> Path:
    return out.parent / f".{out.name[:100]}.replaced"
