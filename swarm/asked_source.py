"""What a download's scheduler knows of each peer it asks, and how it treats them: values only, no decisions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Chunk = tuple[int, int]
"""(index of the file in its manifest or plan, index of the chunk)."""


@dataclass(frozen=True)
class FetchPolicy:
    """How a download treats its sources.

    Args:
        pipeline: chunk requests in flight on one stream; keeps it busy while a chunk is hashed and written.
        sources: peers asked at once; further ones are used when these fail.
        stall_s: a peer that sends nothing for so long is left.
        min_rate: bytes/s over ``rate_window_s`` below which a peer is left while others could do its work.
        chunk_s: a peer that brings no whole chunk for so long, over all its streams, is left even when it is the only
            one: a trickle, or parts that never make a chunk, must not hold a download for ever. 900 s are
            4.7 KB/s.
        backoff_s: pause after a failure without any progress; doubles with each further one up to ``backoff_max_s``.
        late_s: silence after which a peer whose speed is unknown is taken to be late.
    """

    pipeline: int = 3
    sources: int = 8
    stall_s: float = 10.0
    min_rate: float = 32 * 1024
    rate_window_s: float = 15.0
    chunk_s: float = 900.0
    backoff_s: float = 0.5
    backoff_max_s: float = 30.0
    late_s: float = 1.0


@dataclass
class AskedSource:
    """One peer as this download sees it. asked: chunk -> when it was asked, oldest first.

    On the stream that is open: fruitful: a chunk was saved; progressed: parts of one came. resumed: the stream follows
    on one that ended early, and its time counts on. begun: the chunk that parts came of, first asked at begun_at.
    spare: streams in a row that may still bring nothing. left_at: chunks that were saved when it was last left for a
    fault; spent_at: the same, until a stream is of use again.
    """

    holds: frozenset[Chunk] | None
    asked: dict[Chunk, float] = field(default_factory=dict)
    lacks: set[int] = field(default_factory=set)
    engaged: bool = False
    fruitful: bool = False
    progressed: bool = False
    resumed: bool = False
    begun: Chunk | None = None
    begun_at: float = 0.0
    spare: int = 0
    failures: int = 0
    spent_at: int = -1
    left_at: int = -1
    retry_at: float = -math.inf
    last_at: float = -math.inf
    window_at: float = 0.0
    window_bytes: int = 0

    def may_hold(self, chunk: Chunk) -> bool:
        return chunk[0] not in self.lacks and (self.holds is None or chunk in self.holds)
