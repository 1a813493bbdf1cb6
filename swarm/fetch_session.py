"""One stream to one source, as its client: requests out, answers in, bounded in time; see wire.py for the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.swarm import wire
from paris_swarm.swarm.door import Door, greet_server
from paris_swarm.swarm.limits import MIN_PIECE, PIECE
from paris_swarm.swarm.transport import Busy, NotHeld, Stalled, Stream

_FAST_S = 0.25
_SLOW_S = 1.0


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


class Session:
    """A stream that speaks the file protocol.

    Args:
        what: what is fetched, for messages.
        arriving: called with the number of bytes whenever some came.

    Attributes:
        cut: bytes that came of an answer that has not come whole.
        came: bytes that came in all, since the greeting.
    """

    def __init__(
        self, peer: str, what: str, stream: Stream, stall_s: float, *, arriving: Callable[[int], None] | None = None
    ) -> None:
        self._peer, self._what, self._stream, self._stall_s = peer, what, stream, stall_s
        self._reader = wire.ResponseReader()
        self._arriving = arriving or (lambda _size: None)
        self._piece = PIECE // 4
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
        responses: list[wire.Response] = []
        clock = asyncio.get_running_loop().time
        try:
            while not responses:
                began = clock()
                async with asyncio.timeout(self._stall_s):
                    data = await self._stream.read_exactly(min(self._reader.wants, self._piece))
                took = clock() - began
                # Small pieces from a slow peer: it is not to look stalled while bytes trickle in.
                if took > _SLOW_S:
                    self._piece = max(MIN_PIECE, self._piece // 2)
                elif took < _FAST_S and len(data) == self._piece:
                    self._piece = min(PIECE, self._piece * 2)
                self.cut += len(data)
                self.came += len(data)
                self._arriving(len(data))
                responses = self._reader.receive(data)
        except TimeoutError as error:
            raise Stalled(f"{self._peer} sent nothing for {self._stall_s:g} s") from error
        except wire.BadFrame as error:
            raise BadChunk(f"{self._what} from {self._peer}: {error.detail}", peer=self._peer) from error
        self.cut = 0
        if responses[0].status == wire.Status.BUSY:
            raise Busy(f"{self._peer} serves as many streams as it can")
        if responses[0].status == wire.Status.DAMAGED:
            raise DamagedCopy(f"{self._what} from {self._peer}: its own copy was changed on disk", peer=self._peer)
        return responses[0]

    def not_held(self) -> NotHeld:
        """The error for a peer that has nothing (more) to give."""
        return NotHeld(f"{self._peer} does not hold {self._what}")
