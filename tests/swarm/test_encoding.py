"""Packing payloads: nothing is lost, nothing longer than declared comes out, and it is done only where it pays."""

from __future__ import annotations

import random
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas.digest import CHUNK
from paris_swarm.swarm import wire
from paris_swarm.swarm.encoding import WIDTHS, Compression, best_width, pack, unpack
from paris_swarm.swarm.wire import BadFrame, Encoding, Response, Status

PACKED = {Encoding.ZSTD: 1, Encoding.PLANES_2: 2, Encoding.PLANES_4: 4}


def weights(count: int, kind: str) -> bytes:
    """Numbers as trained weights are: spread around zero. kind: f (fp32) or h (the upper half of each, as bf16)."""
    chance = random.Random(5)
    raw = struct.pack(f"<{count}f", *(chance.gauss(0, 0.02) for _ in range(count)))
    return raw if kind == "f" else b"".join(raw[at + 2 : at + 4] for at in range(0, len(raw), 4))


@given(st.binary(max_size=400), st.sampled_from(WIDTHS))
def test_what_is_packed_unpacks(data: bytes, width: int) -> None:
    assert unpack(pack(data, width), width, len(data)) == data


def test_planes_are_as_the_specification_says() -> None:
    """R-WIRE-8: byte k n + i of the content is byte i w + k; what fills no element stays in place."""
    content = zstandard.ZstdDecompressor().decompress(pack(b"abcdABCD!?", 4))
    assert content == b"aAbBcCdD!?"
    assert zstandard.ZstdDecompressor().decompress(pack(b"abABxyX", 2)) == b"aAxbByX"


@given(st.binary(max_size=200), st.sampled_from(WIDTHS), st.integers(0, 300))
def test_any_bytes_give_the_declared_length_or_an_error(payload: bytes, width: int, length: int) -> None:
    try:
        assert len(unpack(payload, width, length)) == length
    except ValueError:
        return


@pytest.mark.parametrize("encoding", list(PACKED))
@pytest.mark.parametrize("size", [CHUNK, 100_000_000])
def test_a_bomb_is_refused_by_what_it_states(encoding: Encoding, size: int) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(size))
    with pytest.raises(BadFrame, match="where 1000 were declared"):
        wire.decode_payload(Response(Status.OK, encoding, 1000, bomb))


@pytest.mark.parametrize("encoding", list(PACKED))
def test_a_frame_that_says_nothing_of_its_size_is_refused(encoding: Encoding) -> None:
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    with pytest.raises(BadFrame):
        wire.decode_payload(Response(Status.OK, encoding, 1000, frame))


@pytest.mark.parametrize(("kind", "encoding"), [("f", Encoding.PLANES_4), ("h", Encoding.PLANES_2)])
def test_weights_travel_in_planes_of_their_own_width(kind: str, encoding: Encoding) -> None:
    data = weights(400_000, kind)
    response = wire.encode_payload(data)
    assert response.encoding == encoding
    assert len(response.payload) < 0.9 * len(data)
    assert wire.decode_payload(response) == data


def test_text_travels_as_it_is_and_noise_not_at_all_packed() -> None:
    text = b"in cluster 4 a drawing of a voxel robot, " * 3000
    assert wire.encode_payload(text).encoding == Encoding.ZSTD
    assert best_width(random.Random(1).randbytes(CHUNK)) is None
    assert wire.encode_payload(text, compress=False).encoding == Encoding.RAW
    assert wire.encode_payload(b"").encoding == Encoding.RAW


def test_a_sample_that_promises_too_much_does_not_make_a_payload_longer() -> None:
    noise = random.Random(2).randbytes(1 << 20)
    ends = bytes(32 * 1024)
    data = ends + noise + ends  # what is looked at shrinks, what lies between does not
    assert best_width(data) is not None
    assert len(wire.encode_payload(data).payload) <= len(data)


# ---- whether it pays


def test_slow_peers_get_packed_chunks_and_fast_ones_do_not() -> None:
    compression = Compression()
    assert not compression.pays("new")
    compression.sent("modem", CHUNK, CHUNK / 1.25e6)
    compression.sent("neighbour", CHUNK, CHUNK / 500e6)
    assert compression.pays("modem")
    assert not compression.pays("neighbour")
    for _ in range(10):
        compression.packed(CHUNK, CHUNK, CHUNK / 480e6)  # what we hold does not shrink
    compression.sent("cable", CHUNK, CHUNK / 20e6)
    assert not compression.pays("cable")
    assert compression.pays("modem"), "a share saved however small is worth it on a link this slow"


def test_a_machine_too_busy_to_pack_does_not_take_itself_for_a_slow_link() -> None:
    compression = Compression()
    for _ in range(10):
        compression.sent("near", CHUNK, CHUNK / 20e6)
        compression.packed(CHUNK, int(0.85 * CHUNK), CHUNK / 40e6)
    assert not compression.pays("near")


def test_small_payloads_say_nothing_of_the_link() -> None:
    compression = Compression()
    compression.sent("peer", 500, 10.0)
    assert not compression.pays("peer")


def test_never_and_always_are_what_they_say() -> None:
    for mode, answer in (("never", False), ("always", True)):
        compression = Compression(mode)  # type: ignore[arg-type]
        compression.sent("peer", CHUNK, 100.0)
        assert compression.pays("peer") is answer
