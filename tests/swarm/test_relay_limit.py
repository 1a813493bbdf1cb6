"""What a relay says of its limits: read as libp2p writes it, and anything else refused."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.swarm.relay_limit import circuit_bytes, limit_in
from paris_swarm.swarm.transport import StreamClosed

AS_SHIPPED = bytes.fromhex("08021a02080122060878108080082864")
"""type 2, a reservation, 120 s and 131,072 bytes, status 100."""


class Answer:
    """A stream that has said its piece."""

    peer_id = "relay"

    def __init__(self, data: bytes) -> None:
        self.data, self.asked = data, b""

    async def read_exactly(self, size: int) -> bytes:
        if size > len(self.data):
            raise StreamClosed("the relay closed the stream")
        piece, self.data = self.data[:size], self.data[size:]
        return piece

    async def write(self, data: bytes | memoryview) -> None:
        self.asked += data

    async def close(self) -> None:
        return None


def answered(data: bytes) -> int | None:
    stream = Answer(data)
    limit = asyncio.run(circuit_bytes(stream))
    assert stream.asked == b"\x02\x08\x00", "RESERVE, behind its length"
    return limit


def test_the_limit_of_a_relay_as_shipped() -> None:
    assert answered(bytes([len(AS_SHIPPED)]) + AS_SHIPPED) == 128 * 1024


def test_a_long_answer_has_a_long_length() -> None:
    padded = AS_SHIPPED + b"\x32\x80\x02" + bytes(256)
    size = len(padded)
    assert answered(bytes([size & 0x7F | 0x80, size >> 7]) + padded) == 128 * 1024


def test_no_limit_and_no_place() -> None:
    assert limit_in(bytes.fromhex("08022864")) == 0
    assert limit_in(bytes.fromhex("080228c801")) is None


@pytest.mark.parametrize(
    "message",
    ["", "0800", "0802286422", "080228642203", "09", "ffffffffffffffffffffff", "08022864220410"],
    ids=["nothing", "a request", "no size", "cut", "another wire type", "endless", "a field cut"],
)
def test_what_is_no_answer_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        limit_in(bytes.fromhex(message))


@pytest.mark.parametrize("head", [b"\xff\xff\xff\x01", b"\xff\x7f"], ids=["no end", "16 KiB"])
def test_a_length_that_is_too_long_is_refused_before_anything_is_read(head: bytes) -> None:
    with pytest.raises(ValueError, match="answer"):
        answered(head + bytes(100_000))


@given(st.binary(max_size=60))
def test_rubbish_is_a_value_error_or_a_number(data: bytes) -> None:
    try:
        limit = limit_in(data)
    except ValueError:
        return
    assert limit is None or limit >= 0
