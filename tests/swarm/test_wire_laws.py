"""Laws of the file protocol's frames: read from the bytes alone, as another implementation would write them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.swarm import wire
from paris_swarm.swarm.wire import BadFrame, RequestReader, ResponseReader

HELLO = b"PSWF" + struct.pack(">HH", 3, 0)
EMPTY = HELLO + bytes(8)
WHOLE = 4 * 1024 * 1024
DIGESTS = st.binary(min_size=32, max_size=32)


def opening(payload: bytes, verdict: int = 0) -> bytes:
    return HELLO + struct.pack(">BBHI", verdict, 0, 0, len(payload)) + payload


@given(st.binary(max_size=300), st.integers(0, 1), st.integers(1, 40))
def test_a_greeting_is_read_from_its_bytes_and_written_as_them(payload: bytes, verdict: int, step: int) -> None:
    """R-WIRE-3, R-WIRE-9"""
    data = opening(payload, verdict)
    for reader in (RequestReader(), ResponseReader()):
        for start in range(0, len(data), step):
            assert reader.greeting is None
            assert reader.receive(data[start : start + step]) == []
        assert reader.greeting is not None
        assert reader.greeting.to_bytes() == data
        assert (reader.greeting.payload, int(reader.greeting.verdict)) == (payload, verdict)


@pytest.mark.parametrize("length", [131_073, 2**32 - 1])
def test_a_greeting_that_is_too_long_is_refused_before_it_comes(length: int) -> None:
    """R-WIRE-9"""
    with pytest.raises(BadFrame):
        RequestReader().receive(HELLO + struct.pack(">BBHI", 0, 0, 0, length))


@given(DIGESTS, st.integers(0, 65535), st.integers(0, 2**32 - 1))
def test_a_chunk_is_asked_for_in_forty_eight_bytes(digest: bytes, file: int, chunk: int) -> None:
    """R-WIRE-5"""
    data = struct.pack(">BBHIII32s", 2, 0, file, chunk, 0, WHOLE, digest)
    (request,) = RequestReader().receive(EMPTY + data)
    assert (request.digest, request.file, request.chunk) == (digest.hex(), file, chunk)
    assert request.to_bytes() == data


OFFSETS = st.one_of(st.integers(0, 300).map(lambda n: n * 16_384), st.integers(0, 2**32 - 1))
LENGTHS = st.one_of(st.integers(16_000, 17_000), st.integers(WHOLE - 9, WHOLE + 9), st.integers(0, 2**32 - 1))


@given(st.integers(1, 2), OFFSETS, LENGTHS)
def test_a_part_begins_at_a_multiple_of_the_least_and_is_no_less(kind: int, offset: int, length: int) -> None:
    """R-WIRE-10"""
    data = struct.pack(">BBHIII32s", kind, 0, 0, 0, offset, length, bytes(32))
    if offset % 16_384 == 0 and offset < WHOLE and 16_384 <= length <= WHOLE:
        (request,) = RequestReader().receive(EMPTY + data)
        assert (request.offset, request.length) == (offset, length)
        assert request.to_bytes() == data
    else:
        with pytest.raises(BadFrame) as caught:
            RequestReader().receive(EMPTY + data)
        assert caught.value.rule == "R-WIRE-10"
        with pytest.raises(ValueError, match="no such request"):
            wire.Request(wire.RequestKind(kind), "ab" * 32, offset=offset, length=length).to_bytes()


@given(DIGESTS, st.integers(0, 65535), st.integers(0, 2**32 - 1))
def test_a_blob_has_neither_file_nor_chunk(digest: bytes, file: int, chunk: int) -> None:
    """R-WIRE-4"""
    data = struct.pack(">BBHIII32s", 1, 0, file, chunk, 0, WHOLE, digest)
    if file or chunk:
        with pytest.raises(BadFrame):
            RequestReader().receive(EMPTY + data)
    else:
        assert RequestReader().receive(EMPTY + data)[0].to_bytes() == data


@given(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=4))
def test_answers_come_in_order_and_one_more_is_an_error(blobs: list[bytes]) -> None:
    """R-WIRE-6"""
    reader = ResponseReader()
    for blob in blobs:
        reader.expect(len(blob), len(blob))
    data = EMPTY + b"".join(struct.pack(">BBHII", 0, 0, 0, len(blob), len(blob)) + blob for blob in blobs)
    assert [wire.decode_payload(response) for response in reader.receive(data)] == blobs
    assert reader.wants == 0
    with pytest.raises(BadFrame):
        reader.receive(b"\x00")


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 3), st.integers(0, 3))
def test_only_an_ok_carries_anything(status: int, encoding: int, length: int, size: int) -> None:
    """R-WIRE-7"""
    reader = ResponseReader()
    reader.expect(0, 3)
    data = EMPTY + struct.pack(">BBHII", status, encoding, 0, length, size) + b"abc"[:size]
    empty_refusal = status in (1, 2, 3) and (encoding, length, size) == (0, 0, 0)
    raw = status == 0 and encoding == 0 and length == size
    packed = status == 0 and encoding in (1, 2, 3) and 0 < size < length
    if empty_refusal or raw or packed:
        assert len(reader.receive(data)) == 1
    else:
        with pytest.raises(BadFrame):
            reader.receive(data)


@given(st.integers(257, 60_000), st.integers(0, 2), st.binary(max_size=3), st.integers(-1, 1))
def test_zstd_is_one_frame_of_the_stated_size(count: int, cut: int, tail: bytes, off: int) -> None:
    """R-WIRE-8"""
    frame = b"\x28\xb5\x2f\xfd\x60" + struct.pack("<H", count - 256) + (count << 3 | 3).to_bytes(3, "little") + b"z"
    payload = frame[: len(frame) - cut] + tail
    response = wire.Response(wire.Status.OK, wire.Encoding.ZSTD, count + off, payload)
    if payload[: len(frame)] == frame and payload == frame and off == 0:
        assert wire.decode_payload(response) == b"z" * count
    elif len(payload) == len(frame) and cut and off == 0 and payload[:-1] == frame[:-1]:
        assert len(wire.decode_payload(response)) == count  # the cut byte was put back, with another value
    else:
        with pytest.raises(BadFrame):
            wire.decode_payload(response)


@given(st.data())
def test_any_changed_byte_of_a_hello_is_refused(data: st.DataObject) -> None:
    """R-WIRE-1, R-WIRE-3"""
    place = data.draw(st.integers(0, len(HELLO) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != HELLO[place]))
    changed = HELLO[:place] + bytes([value]) + HELLO[place + 1 :]
    for reader in (RequestReader(), ResponseReader()):
        with pytest.raises(BadFrame):
            reader.receive(changed)
