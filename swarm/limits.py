"""How fast this node sends files, and whose turn it is: token buckets and a queue that is fair by bytes.

``UploadQueue`` is pure (the caller gives time); ``UploadGate`` puts it on the event loop. A server asks the gate before
it writes each piece. One piece a peer is on its way at a time, however many streams the peer opened, and under a limit
the peer that has been given the fewest bytes goes next: round robin by bytes, not by requests or streams.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

PIECE = 256 * 1024
"""Bytes per write and per read: with 4 MiB chunks the fastest through p2pd."""
MIN_PIECE = 4 * 1024
_PIECES_A_SECOND = 16
_FORGET_AFTER = 256


@dataclass
class TokenBucket:
    """Bytes that may pass: ``rate`` a second, at most ``burst`` saved up. A piece may overdraw it; the next one waits.

    Args:
        rate: bytes/s; infinite: no limit.
        burst: bytes.
    """

    rate: float
    burst: float
    _level: float = field(init=False)
    _at: float = field(init=False, default=-math.inf)

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"a limit of {self.rate:g} bytes/s lets nothing pass; leave the limit out for none")
        self._level = self.burst

    def wait(self, now: float) -> float:
        """Seconds until the next piece may pass; 0: now."""
        if math.isinf(self.rate):
            return 0.0
        self._refill(now)
        # Less than a byte of debt is none: rounding must not make a wait too short to pass.
        return -self._level / self.rate if self._level < -1.0 else 0.0

    def take(self, size: int, now: float) -> None:
        """Let ``size`` bytes pass."""
        if not math.isinf(self.rate):
            self._refill(now)
            self._level -= size

    def _refill(self, now: float) -> None:
        if now > self._at:
            gained = 0.0 if math.isinf(self._at) else (now - self._at) * self.rate
            self._level = min(self.burst, self._level + gained)
            self._at = now


@dataclass
class _Line:
    """One peer's waiting pieces. given: bytes it was let through, as the queue counts turns."""

    bucket: TokenBucket
    pieces: deque[tuple[object, int]] = field(default_factory=deque)
    given: float = 0.0
    sending: bool = False


class UploadQueue:
    """Who may write the next piece.

    Args:
        total: bytes/s for all peers together; infinite: no limit.
        per_peer: bytes/s for each peer.
    """

    def __init__(self, *, total: float = math.inf, per_peer: float = math.inf) -> None:
        self.piece = _piece(min(total, per_peer))
        self._total = TokenBucket(total, self.piece)
        self._per_peer = per_peer
        TokenBucket(per_peer, self.piece)  # says now what is wrong with it
        self._lines: dict[str, _Line] = {}
        self._turn = 0.0

    def add(self, peer: str, ticket: object, size: int) -> None:
        """A piece of ``size`` bytes waits for its turn."""
        line = self._lines.get(peer)
        if line is None:
            line = self._lines[peer] = _Line(TokenBucket(self._per_peer, self.piece))
        if not line.pieces and not line.sending:
            # Who has been away does not come back with a claim on all the turns it did not use.
            line.given = max(line.given, self._turn)
        line.pieces.append((ticket, size))

    def cancel(self, peer: str, ticket: object) -> None:
        """This piece is not to be sent any more; no error when it had its turn."""
        line = self._lines.get(peer)
        if line is not None:
            line.pieces = deque(item for item in line.pieces if item[0] is not ticket)

    def sent(self, peer: str) -> None:
        """The piece this peer was given its turn for is on its way: its next one may follow."""
        self._lines[peer].sending = False
        if len(self._lines) > _FORGET_AFTER:
            self._lines = {name: line for name, line in self._lines.items() if line.pieces or line.sending}

    def next(self, now: float) -> tuple[object | None, float]:
        """(ticket whose turn it is, 0) or (None, seconds until there may be one; infinite: not before something
        happens).
        """
        waiting = [(name, line) for name, line in self._lines.items() if line.pieces and not line.sending]
        if not waiting:
            return None, math.inf
        total_wait = self._total.wait(now)
        if total_wait > 0:
            return None, total_wait
        ready = [(name, line) for name, line in waiting if line.bucket.wait(now) <= 0]
        if not ready:
            return None, min(line.bucket.wait(now) for _, line in waiting)
        _name, line = min(ready, key=lambda item: item[1].given)
        ticket, size = line.pieces.popleft()
        self._turn = line.given
        line.given += size
        line.sending = True
        line.bucket.take(size, now)
        self._total.take(size, now)
        return ticket, 0.0


def _piece(rate: float) -> int:
    """Small enough that a limited peer gets a piece many times a second: nobody must look stalled for being limited."""
    return PIECE if math.isinf(rate) else int(min(PIECE, max(MIN_PIECE, rate / _PIECES_A_SECOND)))


class UploadGate:
    """The upload queue of one node on its event loop.

    Args:
        total: bytes/s for all peers together; None: no limit.
        per_peer: bytes/s for each peer; None: no limit.
        clock: seconds, of the loop when None.
    """

    def __init__(
        self, *, total: float | None = None, per_peer: float | None = None, clock: Callable[[], float] | None = None
    ) -> None:
        self._queue = UploadQueue(
            total=math.inf if total is None else total, per_peer=math.inf if per_peer is None else per_peer
        )
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None

    @property
    def piece(self) -> int:
        """Bytes to write at a time."""
        return self._queue.piece

    @asynccontextmanager
    async def turn(self, peer: str, size: int) -> AsyncIterator[None]:
        """Wait until ``size`` bytes may go to ``peer``; inside, write them."""
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.add(peer, ticket, size)
        self._let_through()
        try:
            await ticket
        except asyncio.CancelledError:
            self._queue.cancel(peer, ticket)
            if ticket.done() and not ticket.cancelled():  # its turn came at the very moment it was given up
                self._queue.sent(peer)
                self._let_through()
            raise
        try:
            yield
        finally:
            self._queue.sent(peer)
            self._let_through()

    def _let_through(self) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while True:
            ticket, wait = self._queue.next(self._clock() if self._clock else loop.time())
            if ticket is None:
                if not math.isinf(wait):
                    self._timer = loop.call_later(wait, self._let_through)
                return
            assert isinstance(ticket, asyncio.Future)
            ticket.set_result(None)

    def close(self) -> None:
        """Forget the timer; pieces that wait are given up by their own streams."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
