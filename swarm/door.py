"""Who is let in to a node's streams: the one question that serving and fetching ask before they exchange any file.

``OpenDoor`` lets everybody in and says nothing; `greeting.SwarmDoor` decides by a plan, its admission, the organiser's
notices, proofs of equivocation and this node's own lists.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.swarm import wire
from paris_swarm.swarm.transport import Stalled, Stream, TurnedAway

GREETING_S = 10.0
"""How long a server waits for a greeting: who has not greeted may not hold a stream for long."""


class Door(Protocol):
    """Judges peers by their greetings, and speaks this node's own. Bytes in, verdict out: no I/O."""

    def greeting(self) -> bytes:
        """What this node says of itself to a peer that it lets in; at most wire.MAX_GREETING bytes."""

    def admit(self, peer_id: str, greeting: bytes) -> None:
        """Take a peer's greeting. Raises RecordError when the peer is not let in."""

    def refusal(self, peer_id: str) -> bytes:
        """What this node says to a peer that it turns away."""

    def check(self, peer_id: str) -> None:
        """Whether a peer let in before still is. Raises RecordError when it is not."""

    def serves(self, digest: str) -> bool:
        """Whether what lies in the store under this digest is for the peers of this swarm."""

    def enter(self, peer_id: str, stream: Stream) -> None:
        """A stream with a peer that was let in is open: it is to be closed when the peer no longer is welcome."""

    def leave(self, peer_id: str, stream: Stream) -> None:
        """That stream ended."""


class OpenDoor:
    """Everybody is let in, and nothing is said."""

    def greeting(self) -> bytes:
        return b""

    def admit(self, peer_id: str, greeting: bytes) -> None:
        return None

    def refusal(self, peer_id: str) -> bytes:
        return b""

    def check(self, peer_id: str) -> None:
        return None

    def serves(self, digest: str) -> bool:
        return True

    def enter(self, peer_id: str, stream: Stream) -> None:
        return None

    def leave(self, peer_id: str, stream: Stream) -> None:
        return None


async def greet_server(stream: Stream, reader: wire.ResponseReader, door: Door, *, stall_s: float) -> None:
    """Open a stream as its client: our greeting, then the server's, judged.

    Raises:
        TurnedAway: the server does not let this node in.
        RecordError: this node wants nothing from that server, or it does not speak the protocol (wire.BadFrame).
        Stalled, StreamClosed: no greeting came.
    """
    door.check(stream.peer_id)
    try:
        async with asyncio.timeout(stall_s):
            await stream.write(wire.GreetingFrame(door.greeting()).to_bytes())
            frame = await _read_greeting(stream, reader)
    except TimeoutError as error:
        raise Stalled(f"{stream.peer_id} did not greet within {stall_s:g} s") from error
    if frame.verdict is not wire.Verdict.WELCOME:
        with contextlib.suppress(RecordError):
            door.admit(stream.peer_id, frame.payload)  # it may say why: the organiser's notice
        raise TurnedAway(f"{stream.peer_id} does not let this node in; {TURNED_AWAY}")
    door.admit(stream.peer_id, frame.payload)


TURNED_AWAY = (
    "it serves another swarm, or the swarm is for invited peers, or this peer was revoked or blocked: ask the "
    "organiser for an invite made for your peer id (`paris-swarm identity show`)"
)


async def greet_client(
    stream: Stream, reader: wire.RequestReader, door: Door, *, stall_s: float, greeting_s: float = GREETING_S
) -> bool:
    """Open a stream as its server: the client's greeting, judged, then ours. False: the client was turned away.

    True: it has entered ``door``, and the caller lets it leave. It enters before anything else can happen: what the
    door knows of a peer with no stream is forgotten when many others greet.

    Raises:
        wire.BadFrame: the client does not speak the protocol.
        Stalled, StreamClosed: it sent or took nothing.
    """
    try:
        async with asyncio.timeout(greeting_s):
            frame = await _read_greeting(stream, reader)
    except TimeoutError as error:
        raise Stalled(f"{stream.peer_id} did not greet within {greeting_s:g} s") from error
    try:
        door.check(stream.peer_id)
        door.admit(stream.peer_id, frame.payload)
        answer = wire.GreetingFrame(door.greeting())
    except wire.BadFrame:
        raise
    except RecordError:
        answer = wire.GreetingFrame(door.refusal(stream.peer_id), wire.Verdict.NOT_ADMITTED)
    welcome = answer.verdict is wire.Verdict.WELCOME
    if welcome:
        door.enter(stream.peer_id, stream)
    try:
        async with asyncio.timeout(stall_s):
            await stream.write(answer.to_bytes())
    except BaseException as error:
        if welcome:
            door.leave(stream.peer_id, stream)
        if isinstance(error, TimeoutError):
            raise Stalled(f"{stream.peer_id} took nothing for {stall_s:g} s") from error
        raise
    return welcome


async def _read_greeting(stream: Stream, reader: wire.RequestReader | wire.ResponseReader) -> wire.GreetingFrame:
    while reader.greeting is None:
        reader.receive(await stream.read_exactly(reader.wants))
    return reader.greeting
