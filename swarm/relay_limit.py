"""What a libp2p relay lets through one circuit, by what it says itself when it is asked for a place (circuit relay v2).

The messages are protobuf behind a varint of their length (github.com/libp2p/specs, relay/circuit-v2.md): HopMessage has
type = 1, limit = 4 and status = 5; Limit has duration = 1 (seconds) and data = 2 (bytes).
"""

from __future__ import annotations

from collections.abc import Iterator

from paris_swarm.swarm.transport import Stream

HOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/hop"

_RESERVE = bytes([2, 8, 0])
_LONGEST = 4096
_STATUS_OK = 100
_TYPE, _LIMIT, _STATUS = 1, 4, 5
_HOP_STATUS = 2
_DATA = 2


async def circuit_bytes(stream: Stream) -> int | None:
    """Ask for a place on a stream of HOP_PROTOCOL: bytes that a circuit may carry in each direction; 0: no limit; None:
    no place.

    Raises:
        ValueError: not an answer to this.
        StreamClosed: none at all.
    """
    await stream.write(_RESERVE)
    size = shift = 0
    while True:
        byte = (await stream.read_exactly(1))[0]
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
        if shift > 14:
            raise ValueError("the answer is longer than any")
    if size > _LONGEST:
        raise ValueError(f"an answer of {size} bytes")
    return limit_in(await stream.read_exactly(size))


def limit_in(message: bytes) -> int | None:
    """The same of the answer's bytes. Raises ValueError."""
    fields = dict(_fields(message))
    if fields.get(_TYPE) != _HOP_STATUS:
        raise ValueError(f"a message of type {fields.get(_TYPE)!r}")
    if fields.get(_STATUS) != _STATUS_OK:
        return None
    limit = fields.get(_LIMIT, b"")
    data = dict(_fields(limit)).get(_DATA, 0) if isinstance(limit, bytes) else None
    if not isinstance(data, int):
        raise ValueError("a limit that is none")
    return data


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the varint and length-delimited fields of a protobuf message. Raises ValueError."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = 0
        for shift in range(0, 70, 7):
            if place == len(message):
                break
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number that does not end")

    while place < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        elif tag & 7 == 2:
            size = varint()
            if size > len(message) - place:
                raise ValueError("a field longer than its message")
            yield tag >> 3, message[place : place + size]
            place += size
        else:
            raise ValueError(f"a field of wire type {tag & 7}")
