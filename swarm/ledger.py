"""What a key has signed, and the highest sequences seen of others, on disk.

ledger.json   last sequence and the very bytes signed, per (kind, slot); a few entries a slot, replaced whole
ledger.seen   highest sequence seen of others, one JSON line for each change; written anew when most lines are outdated

A signed statement is written and fsynced *before* its first send, so that an honest crash can only ever repeat the same
bytes: two payloads under one sequence would be a proof of equivocation (R-REC-9).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paris_swarm.dht_schemas.files import atomic_write, atomic_write_json, quarantine

Author = tuple[str, str, str]
"""(signer, kind, slot)."""
SPARE_LINES = 1024
"""Outdated lines of ledger.seen that are left in it, beside as many as there are authors."""


class Ledger:
    """The ledger at ``path``, and the file beside it with what was seen."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen_path = path.with_suffix(".seen")
        stored = read_json(path)
        if not isinstance(stored, dict):
            stored = {}
        self._signed: dict[str, dict[str, Any]] = dict(stored.get("signed", {}))
        self._earlier: dict[str, list[Any]] = dict(stored.get("seen", {}))
        """What a version before ledger.seen kept in ledger.json: left there until it stands in the new file."""
        self._written: dict[Author, tuple[int, str]] = {}
        """What the lines of ledger.seen say."""
        self._lines = 0
        self._damaged = False
        self._read_seen()

    def next_sequence(self, kind: str, slot: str, *, now: float, seen: int = 0) -> int:
        """max(last signed + 1, highest own sequence seen in the DHT + 1, Unix milliseconds)."""
        last = int(self._signed.get(f"{kind}/{slot}", {}).get("seq", 0))
        return max(last + 1, seen + 1, int(now * 1000))

    def record(self, kind: str, slot: str, seq: int, envelope: bytes) -> None:
        """Write a signed statement down, fsynced, before it is sent."""
        self._signed[f"{kind}/{slot}"] = {"seq": seq, "envelope": envelope.decode("utf-8")}
        self._write_signed()

    def last(self, kind: str, slot: str) -> bytes | None:
        """The bytes last signed for (kind, slot): after a crash these are sent again, unchanged."""
        entry = self._signed.get(f"{kind}/{slot}")
        return str(entry["envelope"]).encode() if entry else None

    def signed(self, kind: str) -> list[bytes]:
        """The envelopes last signed of a kind, one a slot."""
        return [str(entry["envelope"]).encode() for key, entry in self._signed.items() if key.split("/", 1)[0] == kind]

    def _write_signed(self) -> None:
        atomic_write_json(self._path, {"signed": self._signed} | ({"seen": self._earlier} if self._earlier else {}))

    # ---- what was seen of others ------------------------------------------------

    def highest(self) -> dict[Author, tuple[int, str]]:
        """Highest (sequence, payload digest) seen for each (signer, kind, slot)."""
        found = dict(self._written)
        for key, (seq, digest) in self._earlier.items():
            signer, kind, slot = key.split("/", 2)
            found[signer, kind, slot] = max(found.get((signer, kind, slot), (0, "")), (int(seq), str(digest)))
        return found

    def remember(self, highest: Mapping[Author, tuple[int, str]]) -> None:
        """Write down what changed since the last time: the cost is that of the news, not of all that is known."""
        changed = {author: said for author, said in highest.items() if self._written.get(author) != said}
        if self._damaged or self._lines + len(changed) > 2 * len(highest) + SPARE_LINES:
            if self._damaged and self._seen_path.exists():
                quarantine(self._seen_path, keep=True)  # it is all there is until the new one is in its place
            atomic_write(self._seen_path, _as_lines(highest))
            self._written, self._lines, self._damaged = dict(highest), len(highest), False
        elif changed:
            self._damaged = True  # until all of it is written: nothing is appended to half a line
            with open(self._seen_path, "ab") as seen:
                seen.write(_as_lines(changed))
                seen.flush()
                os.fsync(seen.fileno())
            self._damaged = False
            self._written.update(changed)
            self._lines += len(changed)
        if self._earlier:
            self._earlier = {}
            self._write_signed()

    def _read_seen(self) -> None:
        """A crash while a line was written leaves half of it at the end: what stands before counts. That file is set
        aside when it is written anew, as is one with other damage.
        """
        if not self._seen_path.exists():
            return
        *lines, tail = self._seen_path.read_bytes().split(b"\n")
        self._damaged = tail != b""
        for line in lines:
            try:
                signer, kind, slot, seq, digest = json.loads(line)
                author, said = (str(signer), str(kind), str(slot)), (int(seq), str(digest))
            except (ValueError, TypeError):
                self._damaged = True
                continue
            self._lines += 1
            if author not in self._written or said[0] > self._written[author][0]:  # several observers write one file
                self._written[author] = said


def _as_lines(highest: Mapping[Author, tuple[int, str]]) -> bytes:
    return b"".join(json.dumps([*author, *said]).encode() + b"\n" for author, said in highest.items())


def read_json(path: Path) -> Any:
    """The file's JSON, or None when there is none; a torn or foreign file is moved aside, never deleted."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        quarantine(path)
        return None
