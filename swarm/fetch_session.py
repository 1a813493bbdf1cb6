"""One stream to one source, as its client: requests out, answers in, bounded in time; see wire.py for the protocol."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Callable

from paris_swarm.dht_schemas.digest import CHUNK
from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.swarm import wire
from paris_swarm.swarm.door import Door, greet_server
from paris_swarm.swarm.limits import MIN_PIECE
from paris_swarm.swarm.transport import Busy, NotHeld, Stalled, Stream

_SPARE_CHUNKS = 4


class BadChunk(RecordError):
    """A peer sent bytes that do not match their digest: they were dropped and the peer is not asked again.

    peer: who sent them.
    """

    rule = "R-WIRE-2"

    def __init__(self, detail: str, *, rule: str | None = None, peer: str = "") -> None:
        super().__init__(detail, rule=rule)
        self.peer = peer


class DamagedCopy(BadChunk):
    """A peer said that its own copy was changed on disk: nobody lied, but it cannot be asked for these files."""


class SpareMemory:
    """Memory of chunks that are written and done with: the next ones come into it. Fresh pages for each chunk would
    cost more than its digest, and chunks between small objects on the heap would leave holes in it.
    """

    def __init__(self) -> None:
        self._spare: list[memoryview] = []

    def take(self, size: int) -> memoryview:
        """Memory of ``size`` bytes, with anything in it."""
        if size != CHUNK:
            return memoryview(bytearray(size))
        return self._spare.pop() if self._spare else memoryview(mmap.mmap(-1, CHUNK))

    def give_back(self, payload: bytes | memoryview) -> None:
        """Nobody reads this payload any more."""
        if isinstance(payload, memoryview) and len(payload) == CHUNK and len(self._spare) < _SPARE_CHUNKS:
            self._spare.append(payload)

    def clear(self) -> None:
        """Let go of it: the download is over."""
        self._spare.clear()


class Session:
    """A stream that speaks the file protocol.

    Args:
        what: what is fetched, for messages.
        arriving: called with the number of bytes whenever some came.
        memory: where payloads come into; fresh memory when None.

    Attributes:
        cut: bytes that came of an answer that has not come whole.
        came: bytes that came in all, since the greeting.
    """

    def __init__(
        self,
        peer: str,
        what: str,
        stream: Stream,
        stall_s: float,
        *,
        arriving: Callable[[int], None] | None = None,
        memory: SpareMemory | None = None,
    ) -> None:
        self._peer, self._what, self._stream, self._stall_s = peer, what, stream, stall_s
        self._reader = wire.ResponseReader((memory or SpareMemory()).take)
        self._arriving = arriving or (lambda _size: None)
        self.cut = self.came = 0

    async def greet(self, door: Door) -> None:
        """Greet before anything is asked. Raises as door.greet_server, and BadChunk for a broken protocol."""
        try:
            await greet_server(self._stream, self._reader, door, stall_s=self._stall_s)
        except wire.BadFrame as error:
            raise BadChunk(f"{self._what} from {self._peer}: {error.detail}", peer=self._peer) from error

    async def ask(self, request: wire.Request, least: int, most: int) -> None:
        """Send a request whose answer decodes to ``least`` to ``most`` bytes. Raises Stalled, StreamClosed."""
        self._reader.expect(least, most)
        try:
            async with asyncio.timeout(self._stall_s):
                await self._stream.write(request.to_bytes())
        except TimeoutError as error:
            raise Stalled(f"{self._peer} took nothing for {self._stall_s:g} s") from error

    async def answer(self) -> wire.Response:
        """The next response in order, of status OK or NOT_HELD.

        Raises:
            BadChunk: the peer breaks the protocol; DamagedCopy: it says that its copy is damaged.
            Busy, Stalled, StreamClosed: no bytes from this one.
        """
        clock = asyncio.get_running_loop().time
        alive_at, since = clock(), 0
        try:
            async with asyncio.timeout_at(alive_at + self._stall_s) as limit:
                while True:
                    size, responses = await self._receive()
                    self.cut += size
                    self.came += size
                    self._arriving(size)
                    if responses:
                        break
                    # A trickle is not to look stalled, nor single bytes alive. The timer is not set anew for each read.
                    since += size
                    if since >= MIN_PIECE and (now := clock()) - alive_at > self._stall_s / 64:
                        alive_at, since = now, 0
                        limit.reschedule(now + self._stall_s)
        except TimeoutError as error:
            raise Stalled(f"{self._peer} sent nothing to speak of for {self._stall_s:g} s") from error
        except wire.BadFrame as error:
            raise BadChunk(f"{self._what} from {self._peer}: {error.detail}", peer=self._peer) from error
        self.cut = 0
        if responses[0].status == wire.Status.BUSY:
            raise Busy(f"{self._peer} serves as many streams as it can")
        if responses[0].status == wire.Status.DAMAGED:
            raise DamagedCopy(f"{self._what} from {self._peer}: its own copy was changed on disk", peer=self._peer)
        return responses[0]

    async def _receive(self) -> tuple[int, list[wire.Response]]:
        """What came: how many bytes, and the response that they complete."""
        if space := self._reader.space:
            size = await self._stream.read_into(space)
            return size, self._reader.filled(size)
        data = await self._stream.read_exactly(self._reader.wants)
        return len(data), self._reader.receive(data)

    def not_held(self) -> NotHeld:
        """The error for a peer that has nothing (more) to give."""
        return NotHeld(f"{self._peer} does not hold {self._what}")
