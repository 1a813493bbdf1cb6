"""Chunks in parts, for peers whose streams end before a whole chunk has come: what to ask for, and what was kept.

A relay of libp2p lets 128 KiB through a circuit; a chunk has 4 MiB. It is asked for in parts that fit (sources.py says
how long), several at a time on one stream, and the parts that came are kept until the last one is here, over as many
streams as it takes. All parts of a chunk are of one peer: when its digest does not match, there is one to blame.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from paris_swarm.swarm import wire
from paris_swarm.swarm.scheduling import Chunk

IN_FLIGHT = 16
"""Parts asked for and not here yet, on one stream: a round trip must not cost more than they take."""


@dataclass(frozen=True)
class Part:
    """``length`` bytes of a chunk from ``offset`` on. first: of those asked for on this stream. last: of the chunk."""

    chunk: Chunk
    offset: int
    length: int
    first: bool
    last: bool

    def request(self, root: str) -> wire.Request:
        """The request for it; one that goes to the end of the chunk is answered with what there is."""
        asked = wire.MAX_PAYLOAD if self.last else self.length
        return wire.Request(wire.RequestKind.CHUNK, root, *self.chunk, offset=self.offset, length=asked)


def parts_of(chunk: Chunk, size: int, kept: int, length: int) -> list[Part]:
    """What is still to come of a chunk of ``size`` bytes of which ``kept`` are here, in parts of ``length``."""
    return [
        Part(chunk, offset, min(length, size - offset), offset == kept, offset + length >= size)
        for offset in range(kept, size, length)
    ]


def joined(parts: list[wire.Response]) -> bytes | memoryview:
    """The bytes that the parts stand for. Raises wire.BadFrame."""
    if len(parts) == 1:
        return wire.decode_payload(parts[0])
    return b"".join(map(wire.decode_payload, parts))


@dataclass
class _Begun:
    parts: list[wire.Response] = field(default_factory=list)
    length: int = 0
    streams: int = 0


class BegunChunks:
    """Which parts of which chunks are here, by peer, from the beginning of each chunk on.

    Attributes:
        dropped: bytes of parts that came to nothing.
    """

    def __init__(self, most: int) -> None:
        """``most``: peers without a stream whose parts are kept."""
        self._most = most
        self._begun: dict[tuple[str, Chunk], _Begun] = {}
        self.dropped = 0

    def length(self, peer: str, chunk: Chunk) -> int:
        """Bytes of a chunk that are here from this peer."""
        begun = self._begun.get((peer, chunk))
        return 0 if begun is None else begun.length

    def keep(self, peer: str, part: Part, response: wire.Response) -> bool:
        """A part came that is not the last one. False: it had come before."""
        begun = self._begun.setdefault((peer, part.chunk), _Begun())
        if part.offset != begun.length:
            self.dropped += response.length
            return False
        begun.parts.append(response)
        begun.length += response.length
        begun.streams += part.first
        return True

    def complete(self, peer: str, part: Part, response: wire.Response) -> tuple[list[wire.Response], bool]:
        """The last part came: all parts, and whether they came over one stream."""
        begun = self._begun.pop((peer, part.chunk), None) or _Begun()
        return [*begun.parts, response], begun.streams + part.first == 1

    def forget(self, chunk: Chunk) -> None:
        """The chunk is saved."""
        for key in [key for key in self._begun if key[1] == chunk]:
            self._drop(key)

    def ended(self, peer: str, connected: Collection[str]) -> None:
        """A stream to ``peer`` ended: keep what it last brought a part of; forget those who have long been away."""
        for key in [key for key in self._begun if key[0] == peer][:-1]:
            self._drop(key)
        away = [key for key in self._begun if key[0] not in connected]
        for key in away[: max(0, len(away) - self._most)]:
            self._drop(key)

    def _drop(self, key: tuple[str, Chunk]) -> None:
        self.dropped += self._begun.pop(key).length
