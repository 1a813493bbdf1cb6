"""How a payload is packed: zstd on the bytes as they are, or on byte planes, whichever leaves less of a sample.

Byte planes: all first bytes of the elements of 2 or 4 bytes, then all second bytes, and so on; what does not fill an
element stays at the end as it is. Sign and exponent of trained weights sit in one byte and repeat themselves, the
mantissa is noise: planes leave 0.85 of fp32 weights and 0.69 of bf16, plain zstd 0.93 and 0.79, and the difference to
the parent checkpoint hardly less than planes (0.83, 0.65; docs/results/compression-2026-11.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import zstandard

Compress = Literal["auto", "never", "always"]
"""Whether chunks are packed before they are sent; auto: to peers so slow that it shortens the whole."""

WIDTHS = (1, 2, 4)
"""Bytes of an element; 1: no planes."""

_LEVEL = 1
_SAMPLE = 32 * 1024
_WORTHWHILE = 0.95
_PEERS = 1024


def pack(data: bytes | memoryview, width: int) -> bytes:
    """One zstd frame that states its content size, over the planes of ``data``."""
    raw = data if width == 1 else _planes(data, width)
    return zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(raw)


def unpack(payload: bytes | memoryview, width: int, length: int) -> bytes:
    """The ``length`` bytes that a frame stands for; never allocates more than twice that.

    Raises:
        ValueError: not one whole frame of exactly that content, whatever the frame itself states.
    """
    try:
        # The frame's own statement is checked first: zstandard allocates what the frame states.
        stated = zstandard.get_frame_parameters(payload).content_size
        if stated != length:
            raise ValueError(f"a zstd frame of {stated} bytes where {length} were declared")
        data: bytes = zstandard.ZstdDecompressor().decompress(payload, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"a payload that zstd cannot read: {error}") from error
    if len(data) != length:
        raise ValueError(f"a zstd frame of {len(data)} bytes where {length} were declared")
    return data if width == 1 else _elements(data, width)


def best_width(data: bytes | memoryview) -> int | None:
    """The width that packs a sample of ``data`` (its beginning, middle and end) best; None when none is worth it."""
    view = memoryview(data)
    if len(view) > 4 * _SAMPLE:
        middle = len(view) // 8 * 4
        view = memoryview(b"".join((view[:_SAMPLE], view[middle : middle + _SAMPLE], view[-_SAMPLE:])))
        # Each plane by itself: in a whole chunk they are longer than the blocks that zstd codes as one.
        sizes = {width: sum(len(pack(view[place::width].tobytes(), 1)) for place in range(width)) for width in WIDTHS}
    else:
        sizes = {width: len(pack(view, width)) for width in WIDTHS}
    width = min(WIDTHS, key=lambda width: sizes[width] * (1 + width / 200))  # the narrower when much the same
    return width if sizes[width] <= _WORTHWHILE * len(view) else None


@dataclass
class Compression:
    """Whether packing a chunk for a peer shortens its way, by what was measured while sending: pure, no clock.

    On a link of v bytes/s packing at u bytes/s (and unpacking as fast) pays when the share saved is more than 2 v / u:
    with planes, below about 35 MB/s (300 Mbit/s) for fp32 weights. Both rates shrink alike on a busy machine.
    """

    mode: Compress = "auto"
    _rates: dict[str, float] = field(default_factory=dict)
    _speed: float = 480e6
    _saved: float = 0.15

    def pays(self, peer: str) -> bool:
        """Whether to try to pack the next chunk for this peer."""
        if self.mode != "auto":
            return self.mode == "always"
        rate = self._rates.get(peer)
        return rate is not None and 2 * rate < self._saved * self._speed

    def sent(self, peer: str, size: int, seconds: float) -> None:
        """``size`` bytes took this long to go out; small ones say nothing of the link."""
        if size < 8 * _SAMPLE:
            return
        rate = size / max(seconds, 1e-9)
        self._rates[peer] = (self._rates.get(peer, rate) + rate) / 2
        if len(self._rates) > _PEERS:
            self._rates = {peer: self._rates[peer]}

    def packed(self, size: int, left: int, seconds: float) -> None:
        """Packing ``size`` bytes took this long and left so many. One file that does not shrink ends no trying."""
        if size >= 8 * _SAMPLE:
            self._speed = (self._speed + size / max(seconds, 1e-9)) / 2
            self._saved = max(0.05, (self._saved + 1 - left / size) / 2)


def _planes(data: bytes | memoryview, width: int) -> bytes:
    whole = len(data) // width * width
    view = memoryview(data)
    return b"".join([*(bytes(view[place:whole:width]) for place in range(width)), view[whole:]])


def _elements(planes: bytes, width: int) -> bytes:
    count = len(planes) // width
    data = bytearray(planes)
    for place in range(width):
        data[place : count * width : width] = planes[place * count : (place + 1) * count]
    return bytes(data)
