"""What a node knows of the peers it downloads from: how fast, how reliable, and who lied. Pure: the caller gives time.

One book lasts as long as the node: what a peer did in one download decides how it is used in the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest

from paris_swarm.dht_schemas.digest import CHUNK
from paris_swarm.swarm.wire import PART

_PARTS_A_STREAM = 8
"""Parts to fit into what a stream was seen to carry: what the end of one costs is half a part on average."""
_KEPT = 4096
"""Peers, banned and not, that a book keeps of either sort when there are many: keys cost nothing, nodes run for months.
"""
_NEW_WEIGHT = 0.3
"""Weight of the newest sample in the running averages of speed and success."""


@dataclass
class SourceRecord:
    """One peer. rate: bytes/s while it owed us something, None before the first chunk; success: 0 to 1.

    part: bytes to ask of it in one request; less than a chunk while its streams end before a chunk has come.
    """

    rate: float | None = None
    success: float = 1.0
    chunks: int = 0
    part: int = CHUNK
    banned: str | None = None

    @property
    def score(self) -> float:
        """Success times speed; infinite for a peer not tried yet."""
        return math.inf if self.rate is None and self.success == 1.0 else self.success * (self.rate or 1.0)


@dataclass
class SourceBook:
    """Every peer this node asked for bytes, by peer id."""

    records: dict[str, SourceRecord] = field(default_factory=dict)

    def of(self, peer: str) -> SourceRecord:
        """The record of a peer, made when there is none."""
        record = self.records.get(peer)
        if record is None:
            if len(self.records) >= 4 * _KEPT:
                self._forget()
            record = self.records[peer] = SourceRecord()
        return record

    def _forget(self) -> None:
        """Keep those that lied last, and those that brought most: what never brought anything comes back as it was."""
        liars = [peer for peer, record in self.records.items() if record.banned is not None][-_KEPT:]
        others = [peer for peer, record in self.records.items() if record.banned is None]
        others = sorted(others, key=lambda peer: self.records[peer].chunks)[-_KEPT:]
        kept = {*liars, *others}
        self.records = {peer: record for peer, record in self.records.items() if peer in kept}

    def in_turn(self, peers: Iterable[str]) -> list[str]:
        """Peers in the order in which to ask them: the best of those that brought something and one that was never
        asked in turn. Many keys that were never asked must not keep one that is known to be good waiting.
        """
        ranked = sorted(dict.fromkeys(peers), key=lambda peer: -self.of(peer).score)
        known = [peer for peer in ranked if self.of(peer).rate is not None]
        others = [peer for peer in ranked if self.of(peer).rate is None]
        pairs = zip_longest(known, others)
        return [peer for pair in pairs for peer in pair if peer is not None]

    def delivered(self, peer: str, size: int, seconds: float) -> None:
        """A chunk of ``size`` bytes came ``seconds`` after it was due."""
        record = self.of(peer)
        sample = size / max(seconds, 1e-6)
        record.rate = sample if record.rate is None else (1 - _NEW_WEIGHT) * record.rate + _NEW_WEIGHT * sample
        record.success = (1 - _NEW_WEIGHT) * record.success + _NEW_WEIGHT
        record.chunks += 1

    def failed(self, peer: str) -> None:
        """A stream to this peer ended before everything asked for had come."""
        record = self.of(peer)
        record.success *= 1 - _NEW_WEIGHT

    def cut_short(self, peer: str, came: int) -> bool:
        """A stream to this peer ended after ``came`` bytes: ask for parts that fit. Whether they got smaller."""
        record = self.of(peer)
        part = min(CHUNK, max(PART, came // _PARTS_A_STREAM // PART * PART))
        if came < PART or part >= record.part:
            return False
        record.part = part
        return True

    def came_whole(self, peer: str) -> None:
        """A chunk came from its beginning to its end over one stream: larger parts may come through, too."""
        record = self.of(peer)
        record.part = min(CHUNK, 2 * record.part)

    def ban(self, peer: str, why: str) -> None:
        """Never ask this peer again: it sent bytes that are not what it was asked for."""
        record = self.of(peer)
        if record.banned is None:
            record.banned = why

    def banned(self) -> dict[str, str]:
        """Who lied, and how."""
        return {peer: record.banned for peer, record in self.records.items() if record.banned is not None}
