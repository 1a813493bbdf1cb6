"""Bytes of files that crossed the wire, per peer and direction: exactly the payloads, no headers.

Three kinds: ``checkpoint`` (chunks of model files), ``plan`` (chunks of a plan's files) and ``blob`` (plan.json,
manifests). What a transport carries besides is records and headers; totals come from the kernel, not from here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

Kind = Literal["checkpoint", "plan", "blob"]
Direction = Literal["sent", "received"]

MOST_PEERS = 4096
"""Peers of a direction that are counted one by one: keys cost nothing, and whoever asks for one blob is counted."""
OTHERS = "others"
"""All further ones together, in place of a peer id."""


@dataclass
class Tally:
    """One peer, one direction, one kind. wire: bytes as sent (compressed); logical: bytes they stand for."""

    count: int = 0
    wire: int = 0
    logical: int = 0


@dataclass
class Counters:
    """Totals since the start of this process; direction -> peer id -> kind -> Tally."""

    sent: dict[str, dict[str, Tally]] = field(default_factory=dict)
    received: dict[str, dict[str, Tally]] = field(default_factory=dict)

    def add(self, direction: Direction, peer: str, kind: Kind, *, wire: int, logical: int) -> None:
        """Count one payload that was written to, or read from, the stream in full."""
        table = self.sent if direction == "sent" else self.received
        if peer not in table and len(table) > 2 * MOST_PEERS:
            _fold(table)
        tally = table.setdefault(peer, {}).setdefault(kind, Tally())
        tally.count += 1
        tally.wire += wire
        tally.logical += logical

    def total(self, direction: Direction, kind: Kind) -> Tally:
        """Sum over all peers."""
        tallies = [kinds[kind] for kinds in getattr(self, direction).values() if kind in kinds]
        return Tally(
            count=sum(tally.count for tally in tallies),
            wire=sum(tally.wire for tally in tallies),
            logical=sum(tally.logical for tally in tallies),
        )

    def as_dict(self) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
        """The same as plain JSON objects: {"sent": {peer: {kind: {"count", "wire", "logical"}}}, "received": ...}."""
        return {
            direction: {peer: {kind: asdict(tally) for kind, tally in kinds.items()} for peer, kinds in table.items()}
            for direction, table in (("sent", self.sent), ("received", self.received))
        }


def _fold(table: dict[str, dict[str, Tally]]) -> None:
    """Count those with the fewest bytes as one; sums stay what they are."""
    size = {peer: sum(tally.wire for tally in kinds.values()) for peer, kinds in table.items() if peer != OTHERS}
    others = table.setdefault(OTHERS, {})
    for peer in sorted(size, key=size.__getitem__)[:-MOST_PEERS]:
        for kind, tally in table.pop(peer).items():
            sum_of = others.setdefault(kind, Tally())
            sum_of.count += tally.count
            sum_of.wire += tally.wire
            sum_of.logical += tally.logical
