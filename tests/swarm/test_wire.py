"""The file protocol without I/O: every message whole, byte by byte, and with rubbish behind it."""

from __future__ import annotations

import contextlib
import os
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas.digest import CHUNK
from paris_swarm.swarm import wire
from paris_swarm.swarm.wire import (
    BadFrame,
    Encoding,
    Request,
    RequestKind,
    RequestReader,
    Response,
    ResponseReader,
    Status,
)

DIGEST = "ab" * 32
ZEROS = wire.encode_payload(bytes(100_000))

requests = st.one_of(
    st.builds(lambda d: Request(RequestKind.BLOB, d.hex()), st.binary(min_size=32, max_size=32)),
    st.builds(
        lambda d, file, chunk, part, length: Request(RequestKind.CHUNK, d.hex(), file, chunk, part * wire.PART, length),
        st.binary(min_size=32, max_size=32),
        st.integers(0, 65535),
        st.integers(0, 2**32 - 1),
        st.integers(0, CHUNK // wire.PART - 1),
        st.integers(wire.PART, CHUNK),
    ),
)
responses = st.one_of(
    st.sampled_from([Response(Status.NOT_HELD), Response(Status.BUSY), Response(Status.DAMAGED)]),
    st.builds(wire.encode_payload, st.binary(max_size=300)),
    st.builds(lambda n: wire.encode_payload(bytes(n)), st.integers(0, 5000)),
)


def written(response: Response) -> bytes:
    return response.header() + response.payload


def listening(count: int, least: int = 0, most: int = wire.MAX_PAYLOAD) -> ResponseReader:
    reader = ResponseReader()
    for _ in range(count):
        reader.expect(least, most)
    return reader


# ---- whole, and cut anywhere


@given(st.lists(requests, max_size=5), st.integers(1, 60))
def test_requests_come_out_however_they_are_cut(sent: list[Request], piece: int) -> None:
    data = wire.OPENING + b"".join(request.to_bytes() for request in sent)
    whole, cut = RequestReader(), RequestReader()
    assert whole.receive(data) == sent
    got = [request for start in range(0, len(data), piece) for request in cut.receive(data[start : start + piece])]
    assert got == sent


@given(st.lists(responses, max_size=5), st.integers(1, 200))
def test_responses_come_out_however_they_are_cut(sent: list[Response], piece: int) -> None:
    data = wire.OPENING + b"".join(map(written, sent))
    assert listening(len(sent)).receive(data) == sent
    cut = listening(len(sent))
    got = [response for start in range(0, len(data), piece) for response in cut.receive(data[start : start + piece])]
    assert got == sent


@given(st.lists(responses, max_size=4))
def test_a_reader_that_reads_what_it_wants_never_reads_too_much(sent: list[Response]) -> None:
    data = memoryview(wire.OPENING + b"".join(map(written, sent)))
    reader, got = listening(len(sent)), []
    while reader.wants:
        assert reader.wants <= wire.MAX_PAYLOAD
        piece, data = data[: reader.wants], data[reader.wants :]
        got += reader.receive(piece)
        if not data:
            break
    assert got == sent
    assert not data


def test_byte_by_byte() -> None:
    reader = RequestReader()
    request = Request(RequestKind.CHUNK, DIGEST, 7, 70000)
    data = wire.OPENING + request.to_bytes()
    got = [out for byte in data[:-1] for out in reader.receive(bytes([byte]))]
    assert got == []
    assert reader.wants == 1
    assert reader.receive(data[-1:]) == [request]
    assert reader.wants == wire.REQUEST_SIZE


# ---- rubbish


@given(st.binary(min_size=1, max_size=200))
def test_rubbish_instead_of_a_hello_is_refused_within_eight_bytes(data: bytes) -> None:
    if data[:8] == wire.OPENING[: len(data[:8])]:
        return
    for reader in (RequestReader(), listening(1)):
        if len(data) < 8:
            reader.receive(data)
            data = data + bytes(8)
        with pytest.raises(BadFrame):
            reader.receive(data)


@given(st.binary(max_size=400))
def test_rubbish_after_a_hello_yields_requests_or_a_bad_frame_and_nothing_else(data: bytes) -> None:
    reader = RequestReader()
    try:
        for request in reader.receive(wire.OPENING + data):
            assert request.to_bytes() in data
    except BadFrame:
        with pytest.raises(BadFrame):
            reader.receive(b"")


@given(st.binary(max_size=400))
def test_rubbish_after_a_hello_yields_responses_or_a_bad_frame_and_nothing_else(data: bytes) -> None:
    reader = listening(3, 0, 64)
    with contextlib.suppress(BadFrame):
        for response in reader.receive(wire.OPENING + data):
            with contextlib.suppress(BadFrame):
                assert len(wire.decode_payload(response)) == response.length <= 64


def test_an_error_is_final() -> None:
    reader = RequestReader()
    with pytest.raises(BadFrame):
        reader.receive(b"GET / HTTP/1.1\r\n")
    with pytest.raises(BadFrame):
        reader.receive(wire.OPENING)


def test_another_version_is_named() -> None:
    with pytest.raises(BadFrame, match="version 1"):
        RequestReader().receive(struct.pack(">4sHH", wire.MAGIC, 1, 0))


@pytest.mark.parametrize(
    "request_bytes",
    [
        struct.pack(">BBHIII32s", 0, 0, 0, 0, 0, CHUNK, bytes(32)),
        struct.pack(">BBHIII32s", 3, 0, 0, 0, 0, CHUNK, bytes(32)),
        struct.pack(">BBHIII32s", 2, 1, 0, 0, 0, CHUNK, bytes(32)),
        struct.pack(">BBHIII32s", 1, 0, 1, 0, 0, CHUNK, bytes(32)),
        struct.pack(">BBHIII32s", 1, 0, 0, 1, 0, CHUNK, bytes(32)),
    ],
    ids=["kind 0", "kind 3", "reserved", "blob with a file", "blob with a chunk"],
)
def test_requests_nobody_may_send(request_bytes: bytes) -> None:
    with pytest.raises(BadFrame):
        RequestReader().receive(wire.OPENING + request_bytes)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack(">BBHII", 9, 0, 0, 0, 0),
        struct.pack(">BBHII", 0, 4, 0, 10, 9),
        struct.pack(">BBHII", 0, 0, 1, 10, 10),
        struct.pack(">BBHII", 1, 0, 0, 10, 0),
        struct.pack(">BBHII", 1, 0, 0, 0, 10),
        struct.pack(">BBHII", 0, 0, 0, 10, 9),
        struct.pack(">BBHII", 0, 0, 0, 10, 11),
        struct.pack(">BBHII", 0, 1, 0, 10, 10),
        struct.pack(">BBHII", 0, 1, 0, 10, 0),
        struct.pack(">BBHII", 0, 0, 0, 21, 21),
        struct.pack(">BBHII", 0, 0, 0, 9, 9),
        struct.pack(">BBHII", 0, 0, 0, 2**32 - 1, 2**32 - 1),
        struct.pack(">BBHII", 0, 1, 0, 20, 2**32 - 1),
    ],
    ids=[
        "status 9", "encoding 4", "reserved", "absent with a length", "absent with a payload", "raw too short",
        "raw too long", "zstd no smaller", "zstd empty", "longer than asked", "shorter than asked", "4 GiB",
        "4 GiB zstd",
    ],
)  # fmt: skip
def test_responses_nobody_may_send_are_refused_at_the_header(header: bytes) -> None:
    reader = listening(1, 10, 20)
    with pytest.raises(BadFrame):
        reader.receive(wire.OPENING + header)


def test_a_response_nobody_asked_for_is_refused() -> None:
    reader = listening(1)
    answer = written(Response(Status.NOT_HELD))
    assert len(reader.receive(wire.OPENING + answer)) == 1
    assert reader.wants == 0
    with pytest.raises(BadFrame, match="nobody asked"):
        reader.receive(answer)


def test_callers_mistakes_are_value_errors() -> None:
    with pytest.raises(ValueError, match="no such request"):
        Request(RequestKind.CHUNK, DIGEST, 1 << 16, 0).to_bytes()
    with pytest.raises(ValueError, match="no such request"):
        Request(RequestKind.BLOB, "ab").to_bytes()
    with pytest.raises(ValueError, match="cannot be expected"):
        ResponseReader().expect(0, CHUNK + 1)
    with pytest.raises(ValueError, match="do not fit"):
        wire.encode_payload(bytes(CHUNK + 1))


# ---- payloads


@given(st.one_of(st.binary(max_size=2000), st.integers(0, 300_000).map(bytes)))
def test_what_is_encoded_decodes_and_is_never_longer(data: bytes) -> None:
    response = wire.encode_payload(data)
    assert wire.decode_payload(response) == data
    assert len(response.payload) <= len(data)
    assert response.length == len(data)


def test_only_what_gets_a_twentieth_smaller_is_compressed() -> None:
    assert ZEROS.encoding == Encoding.ZSTD
    noise = os.urandom(100_000)
    assert wire.encode_payload(noise).encoding == Encoding.RAW
    assert wire.encode_payload(noise + bytes(4_000)).encoding == Encoding.RAW
    assert wire.encode_payload(noise + bytes(20_000)).encoding == Encoding.ZSTD


def zstd(data: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


@pytest.mark.parametrize(
    ("length", "payload"),
    [
        (1000, zstd(bytes(CHUNK))),
        (CHUNK, zstd(bytes(1000))),
        (1000, zstd(bytes(10_000_000))),
        (1000, zstd(bytes(1000), write_content_size=False)),
        (1000, zstd(bytes(1000))[:-1]),
        (1000, zstd(bytes(1000)) + b"x"),
        (1000, zstd(bytes(1000)) + zstd(bytes(1000))),
        (1000, b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstd(bytes(1000))),
        (1000, b"junk"),
        (1000, b""),
    ],
    ids=[
        "bomb", "shorter", "large bomb", "no content size", "cut", "extra byte", "two frames", "skippable frame",
        "junk", "empty",
    ],
)  # fmt: skip
def test_frames_that_are_not_what_was_declared(length: int, payload: bytes) -> None:
    with pytest.raises(BadFrame):
        wire.decode_payload(Response(Status.OK, Encoding.ZSTD, length, payload))


@given(st.integers(0, len(ZEROS.payload) - 1), st.integers(1, 255))
def test_a_damaged_frame_decodes_to_its_declared_length_or_not_at_all(index: int, mask: int) -> None:
    payload = bytearray(ZEROS.payload)
    payload[index] ^= mask
    with contextlib.suppress(BadFrame):
        assert len(wire.decode_payload(Response(Status.OK, Encoding.ZSTD, ZEROS.length, bytes(payload)))) == 100_000
