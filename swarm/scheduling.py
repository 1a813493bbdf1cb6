"""Which chunk to ask of which peer: the part of a download that decides. Pure: no I/O, no clock, no randomness.

A chunk is wanted, asked (of one peer; near the end of two), checking (it came and is being hashed and written), saved.
The driver (file_download.py) tells what happened; the scheduler answers what to ask next:

  - the rarest chunk first, then the order of the file; a fast peer gets more because it comes back for more
  - a few requests in flight on each stream, fewer near the end, so that the last chunks lie with nobody in a queue
  - when nothing is wanted any more, an idle peer takes over what a slower one was asked for, if it will be sooner:
    the first copy wins, the other is dropped and counted
  - a peer that fails is left for a while, longer each time; one that lied is never asked again
  - a peer whose streams end early, each having brought something, is limited, not faulty (a relay lets so many bytes
    through a circuit): it is asked again at once, for the rest of the chunk it began, which others leave to it while
    there is anything else to do
  - a peer slower than a minimum rate is left while another one could do its work; the only one is kept as long as
    whole chunks come, however seldom, within a bound
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Mapping

from paris_swarm.swarm.asked_source import AskedSource, Chunk, FetchPolicy
from paris_swarm.swarm.sources import SourceBook

__all__ = ["Chunk", "ChunkScheduler", "FetchPolicy"]

_SPARE = 3
"""Streams in a row that may bring nothing after one that brought parts: a circuit that ends takes some with it."""


class ChunkScheduler:
    """The chunks of one download and the peers that may have them.

    Args:
        sizes: bytes of every chunk still to come.
        book: what earlier downloads learned about peers; changed by this one.
    """

    def __init__(
        self, sizes: Mapping[Chunk, int], *, policy: FetchPolicy | None = None, book: SourceBook | None = None
    ) -> None:
        self.policy = policy or FetchPolicy()
        self.book = book or SourceBook()
        self._sizes = dict(sizes)
        self._wanted: list[Chunk] = sorted(sizes)
        self._checking: dict[Chunk, str] = {}
        self._saved: set[Chunk] = set()
        self._sources: dict[str, AskedSource] = {}
        self.duplicate_bytes = 0
        """Bytes of chunks that came whole although another copy had won."""

    # ---- what there is to do -------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether every chunk is saved."""
        return len(self._saved) == len(self._sizes)

    @property
    def missing(self) -> int:
        """How many chunks are not saved yet."""
        return len(self._sizes) - len(self._saved)

    def add_chunks(self, sizes: Mapping[Chunk, int]) -> None:
        """More chunks to fetch; those already known are left as they are."""
        for chunk, size in sizes.items():
            if chunk not in self._sizes:
                self._sizes[chunk] = size
                bisect.insort(self._wanted, chunk)

    def add_source(self, peer: str, holds: Collection[Chunk] | None = None) -> bool:
        """A peer that may be asked; ``holds``: which chunks it has, None when that is not known (all, then).

        Returns:
            Whether it is new. A banned peer is kept in the books and never asked.
        """
        known = self._sources.get(peer)
        chunks = None if holds is None else frozenset(holds)
        if known is not None:
            known.holds = chunks if holds is not None else known.holds
            return False
        self._sources[peer] = AskedSource(chunks)
        return True

    def ready(self, now: float) -> list[str]:
        """Peers to open a stream to now, in their turn; at most as many as may still be engaged."""
        room = self.policy.sources - sum(source.engaged for source in self._sources.values())
        able = [
            peer
            for peer, source in self._sources.items()
            if not source.engaged and source.retry_at <= now and self._useful(peer, source)
        ]
        return self.book.in_turn(able)[: max(0, room)]

    def next_retry(self, now: float) -> float | None:
        """Seconds until a peer that failed may be tried again; None when there is none to wait for."""
        waits = [
            source.retry_at - now
            for peer, source in self._sources.items()
            if not source.engaged and self._useful(peer, source)
        ]
        return max(0.0, min(waits)) if waits else None

    @property
    def exhausted(self) -> bool:
        """Whether nobody is being asked, and everybody has been since the last chunk was saved."""
        return (
            not self.done
            and not self._checking
            and not any(source.engaged for source in self._sources.values())
            and all(
                source.spent_at == len(self._saved) or not self._useful(peer, source)
                for peer, source in self._sources.items()
            )
        )

    @property
    def fruitless(self) -> bool:
        """Whether everybody was left since the last chunk was saved, whoever is being asked again by now."""
        return not self.done and all(
            source.left_at == len(self._saved) or not self._useful(peer, source)
            for peer, source in self._sources.items()
        )

    def _useful(self, peer: str, source: AskedSource) -> bool:
        if self.book.of(peer).banned is not None:
            return False
        if source.holds is None:
            return not self.done
        return any(chunk not in self._saved for chunk in source.holds if chunk in self._sizes)

    # ---- asking ----------------------------------------------------------------

    def engage(self, peer: str, now: float) -> None:
        """A stream to this peer is being opened. What it said it lacks is forgotten: it may have it by now."""
        source = self._sources[peer]
        source.engaged, source.fruitful, source.progressed = True, False, False
        source.lacks.clear()
        if not source.resumed:
            self._begin_window(source, now)

    def _begin_window(self, source: AskedSource, now: float) -> None:
        source.last_at = source.window_at = now
        source.window_bytes = 0

    def take(self, peer: str, now: float) -> Chunk | None:
        """What to ask of this peer now; None when its pipeline is full or there is nothing for it."""
        source = self._sources[peer]
        if not source.engaged or self.book.of(peer).banned is not None or len(source.asked) >= self._depth():
            return None
        chunk = self._continued(source) or self._rarest(source)
        if chunk is not None:
            self._wanted.remove(chunk)
        else:
            chunk = self._overdue(peer, source, now)
        if chunk is None:
            return None
        if not source.asked and not source.resumed:
            self._begin_window(source, now)
        source.resumed = False
        source.asked[chunk] = now
        return chunk

    def idle(self, peer: str) -> bool:
        """Whether this peer owes us nothing."""
        return not self._sources[peer].asked

    def useless(self, peer: str) -> bool:
        """Whether no chunk still to come is one that this peer may hold, after what it said on this stream."""
        source = self._sources[peer]
        open_chunks = (chunk for chunk in self._sizes if chunk not in self._saved)
        return not any(source.may_hold(chunk) for chunk in open_chunks)

    def _depth(self) -> int:
        engaged = sum(source.engaged for source in self._sources.values())
        if engaged <= 1:
            return self.policy.pipeline
        return max(1, min(self.policy.pipeline, math.ceil(len(self._wanted) / engaged)))

    def _continued(self, source: AskedSource) -> Chunk | None:
        """The chunk of which this peer brought a part, when nobody else has been asked for it meanwhile."""
        if source.begun is None or not source.may_hold(source.begun):
            return None
        place = bisect.bisect_left(self._wanted, source.begun)
        return source.begun if self._wanted[place : place + 1] == [source.begun] else None

    def _rarest(self, source: AskedSource) -> Chunk | None:
        theirs = {other.begun for other in self._sources.values() if other.begun is not None}
        engaged = [other for other in self._sources.values() if other.engaged]
        alike = all(other.holds is None and not other.lacks for other in engaged)
        wanted = self._wanted if alike else [chunk for chunk in self._wanted if source.may_hold(chunk)]
        if theirs:
            wanted = [chunk for chunk in wanted if chunk not in theirs] or wanted
        if alike:
            return wanted[0] if wanted else None
        return min(wanted, key=lambda chunk: (sum(other.may_hold(chunk) for other in engaged), chunk), default=None)

    def _overdue(self, peer: str, source: AskedSource, now: float) -> Chunk | None:
        """A chunk asked of one other peer that this one, having nothing else to do, is likely to bring sooner."""
        if source.asked:
            return None
        found: list[tuple[float, Chunk]] = []
        for other, owner in self._sources.items():
            if other == peer:
                continue
            queued = 0
            for chunk in owner.asked:
                queued += self._sizes[chunk]
                if chunk in self._saved or chunk in self._checking or not source.may_hold(chunk):
                    continue
                if sum(chunk in any_source.asked for any_source in self._sources.values()) > 1:
                    continue
                if self._time_for(peer, self._sizes[chunk]) < (due := self._due(other, owner, queued, now)) or (
                    due == math.inf and now - owner.last_at >= self.policy.late_s
                ):
                    found.append((due, chunk))
        return max(found, key=lambda pair: (pair[0], -pair[1][0], -pair[1][1]))[1] if found else None

    def _time_for(self, peer: str, size: int) -> float:
        rate = self.book.of(peer).rate
        return math.inf if rate is None else size / rate

    def _due(self, peer: str, source: AskedSource, queued: int, now: float) -> float:
        """Seconds until this peer should have sent ``queued`` bytes; infinite when unknown, or when it is late."""
        expected, waited = self._time_for(peer, queued), now - source.last_at
        if expected < math.inf and waited > 2 * expected + self.policy.late_s:
            return math.inf
        return max(0.0, expected - waited)

    # ---- what happened -----------------------------------------------------------

    def arriving(self, peer: str, size: int, now: float) -> None:
        """Some bytes of an answer came."""
        self._sources[peer].window_bytes += size

    def too_slow(self, peer: str, now: float) -> str:
        """Why this peer is to be left, in words: it brought no whole chunk for ``chunk_s``, or it sent less than the
        minimum rate over a window while another could do its work. Empty: it is not.
        """
        source, policy = self._sources[peer], self.policy
        if not source.asked:
            return ""
        if now - source.last_at >= policy.chunk_s:
            return f"brought no whole chunk within {policy.chunk_s:g} s"
        if now - source.window_at < policy.rate_window_s:
            return ""
        slow = source.window_bytes < policy.min_rate * (now - source.window_at)
        source.window_at, source.window_bytes = now, 0
        if slow and any(self._could_replace(other, now) for other in self._sources if other != peer):
            return f"sent less than {policy.min_rate:g} bytes/s while others could do better"
        return ""

    def _could_replace(self, peer: str, now: float) -> bool:
        source = self._sources[peer]
        if not self._useful(peer, source):
            return False
        return source.fruitful if source.engaged else source.retry_at <= now and source.failures == 0

    def owes(self, peer: str, chunk: Chunk) -> bool:
        """Whether this peer was asked for the chunk and has not brought all of it."""
        return chunk in self._sources[peer].asked

    def here(self, chunk: Chunk) -> bool:
        """Whether another copy came whole: what is still to come of this one is not worth asking for."""
        return chunk in self._saved or chunk in self._checking

    def give_up(self, peer: str, chunk: Chunk) -> None:
        """This peer is not asked for the rest of a chunk that another one brought."""
        self._sources[peer].asked.pop(chunk, None)

    def part(self, peer: str, chunk: Chunk) -> None:
        """One part of a chunk came, and others are to come."""
        source = self._sources[peer]
        source.progressed = True
        if source.begun != chunk:
            source.begun, source.begun_at = chunk, source.asked[chunk]

    def delivered(self, peer: str, chunk: Chunk, now: float) -> bool:
        """A whole answer came: True when it is to be checked and saved, False when another copy won. ValueError when
        this peer was not asked for it.
        """
        source = self._sources[peer]
        if chunk not in source.asked:
            raise ValueError(f"chunk {chunk} was not asked of {peer}")
        asked_at = source.asked.pop(chunk)
        began = max(asked_at, source.last_at)
        if source.begun == chunk:  # over several streams, perhaps
            began, source.begun = max(source.begun_at, source.last_at), None
        self.book.delivered(peer, self._sizes[chunk], now - began)
        source.last_at = now
        if chunk in self._saved or chunk in self._checking:
            source.fruitful = True
            self.duplicate_bytes += self._sizes[chunk]
            return False
        self._checking[chunk] = peer
        return True

    def saved(self, peer: str, chunk: Chunk) -> None:
        """The chunk that ``delivered`` let through is verified and written."""
        del self._checking[chunk]
        self._saved.add(chunk)
        self._sources[peer].fruitful = True
        for source in self._sources.values():
            if source.begun == chunk:
                source.begun = None

    def refused(self, peer: str, chunk: Chunk, why: str) -> None:
        """It was not what it should be: the peer is banned, the chunk wanted again."""
        del self._checking[chunk]
        self._want(chunk)
        self.ban(peer, why)

    def unsaved(self, chunk: Chunk) -> None:
        """It could not be written (no fault of the peer's): wanted again."""
        del self._checking[chunk]
        self._want(chunk)

    def not_held(self, peer: str, chunk: Chunk) -> None:
        """The peer does not hold this chunk, hence not this file, for now."""
        source = self._sources[peer]
        source.asked.pop(chunk, None)
        source.lacks.add(chunk[0])
        self._want(chunk)

    def failed(self, peer: str, now: float, came: int = 0) -> bool:
        """The stream ended, after ``came`` bytes, or never opened; tried again after a pause, at once when it had been
        of use.

        Returns:
            Whether the peer is merely limited: parts came, or smaller ones may from now on, or came over the stream
            before the last few. It is no worse for that, unless it is too slow over all its streams
            (the minimum rate).
        """
        source = self._sources[peer]
        slow = self.too_slow(peer, now)
        shrunk = self.book.cut_short(peer, came)
        self._release(source)
        if (source.progressed or (shrunk and not source.fruitful)) and not slow:
            source.resumed, source.failures, source.retry_at, source.spent_at = True, 0, now, -1
            source.spare = _SPARE if source.progressed else 0
            return True
        if source.spare > 0 and not slow:
            source.spare -= 1
            source.resumed, source.retry_at, source.spent_at = True, now + self.policy.backoff_s, -1
            return True
        self.book.failed(peer)
        source.resumed, source.begun, source.spare, source.left_at = False, None, 0, len(self._saved)
        if source.fruitful and not slow:
            source.failures, source.retry_at = 0, now
        else:
            source.failures += 1
            pause = self.policy.backoff_s * 2.0 ** min(source.failures - 1, 32)
            source.retry_at = now + min(pause, self.policy.backoff_max_s)
            source.spent_at = len(self._saved)
        return False

    def slow(self, peer: str, now: float) -> None:
        """The peer was left for its slowness: like a failure, and never tried again at once."""
        source = self._sources[peer]
        source.fruitful = source.progressed = False
        source.spare = 0
        self.failed(peer, now)

    def leave(self, peer: str) -> None:
        """Our own doing: the stream was closed with no blame on anybody."""
        self._release(self._sources[peer])

    def ban(self, peer: str, why: str) -> None:
        """Never ask this peer again, in this download or a later one."""
        self.book.ban(peer, why)
        self._sources[peer].begun = None
        self._release(self._sources[peer])

    def drop(self, peer: str) -> None:
        """Leave this peer out for the rest of this download; it is not accused of anything."""
        source = self._sources[peer]
        self._release(source)
        source.begun = None
        source.holds = frozenset()

    def _release(self, source: AskedSource) -> None:
        source.engaged = False
        asked, source.asked = source.asked, {}
        for chunk in asked:
            self._want(chunk)

    def _want(self, chunk: Chunk) -> None:
        """Wanted again, unless it is saved, being checked, or still asked of somebody."""
        if chunk in self._saved or chunk in self._checking:
            return
        if any(chunk in source.asked for source in self._sources.values()):
            return
        place = bisect.bisect_left(self._wanted, chunk)
        if place == len(self._wanted) or self._wanted[place] != chunk:
            self._wanted.insert(place, chunk)
