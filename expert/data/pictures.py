"""One captioned picture from anywhere: decoded within bounds, its caption cleaned, or why it cannot be used.

Shared by every source of people's own images; a picture is never half used, and whatever Pillow makes of damaged bytes
becomes one sentence about one file.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np

from paris_swarm.expert.data.sources import Captioned, Skipped, writable_name

MAX_IMAGE_BYTES = 1 << 28
MAX_PIXELS = 100_000_000
"""A larger picture is skipped before it is decoded: a few kilobytes can unpack to gigabytes."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "QOI")
"""What is decoded, whatever a file is called. Pillow knows more, and starts Ghostscript for PostScript."""

# Everything Pillow's decoders raise on damaged input, as seen by feeding them damaged input.
BROKEN = (
    OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, AttributeError, MemoryError,
    struct.error, zlib.error,
)  # fmt: skip

CLASSES = ("class", "label", "cls", "class_name", "category")
"""What a class is called in tables and metadata; the first that is there."""
MAX_CLASS = 200

_RECENT = 1 << 16


class SeenNumbers:
    """Which of many 64-bit digests came before: 8 bytes each, so eleven million take 90 MB.

    Two different things are taken for one with a probability of about n^2 / 2^65, 3e-6 for eleven million.
    """

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def __contains__(self, digest: bytes) -> bool:
        """Whether a digest (its first 8 bytes) was added before."""
        value = int.from_bytes(digest[:8], "big")
        place = int(np.searchsorted(self._sorted, np.uint64(value)))
        return value in self._recent or (place < len(self._sorted) and int(self._sorted[place]) == value)

    def add(self, digest: bytes) -> bool:
        """Remember a digest by its first 8 bytes; False when it was here before."""
        if digest in self:
            return False
        self._recent.add(int.from_bytes(digest[:8], "big"))
        if len(self._recent) >= _RECENT:
            fresh = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, fresh]))
            self._recent.clear()
        return True


def captioned(
    name: str, image: Path | bytes, text: str | None, resolution: int, category: str | None = None
) -> Captioned | Skipped:
    """The picture in a file or in bytes with its caption, at ``resolution`` pixels; or why it cannot be used.

    name: what it is called in the source, for the record and for people. category: its class (`class_name`), None
    where it has none.
    """
    cleaned = " ".join((text or "").split())
    if not cleaned:
        return Skipped(name, "has no caption")
    try:
        cleaned.encode("utf-8")
    except UnicodeEncodeError:
        return Skipped(name, "has a caption that is not valid Unicode")
    if isinstance(image, bytes):
        if not image:
            return Skipped(name, "is empty (0 bytes)")
        if len(image) > MAX_IMAGE_BYTES:
            return Skipped(name, f"is larger than {MAX_IMAGE_BYTES >> 20} MiB")
    try:
        pixels = decode(image, resolution)
    except BROKEN as error:
        return Skipped(name, f"cannot be decoded as an image ({first_line(error)})")
    record = {"text": cleaned, "file": writable_name(name)}
    return Captioned(pixels, record if category is None else record | {"class": category})


def class_name(value: object) -> str | None:
    """A class as caption records hold it, from a folder's name, a column's value or the bytes of a .cls member.

    None where it is none: empty, longer than `MAX_CLASS` characters, no valid Unicode, neither text nor a number from 0
    (-1 is what Hugging Face's data sets say for "not labelled").
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace").removeprefix("\ufeff")
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        value = str(value)
    if not isinstance(value, str):
        return None
    name = " ".join(value.split())
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return name if 0 < len(name) <= MAX_CLASS else None


def class_caption(name: str) -> str:
    """The caption of a picture of which nothing but its class is known: "golden_retriever" -> "golden retriever"."""
    return name.replace("_", " ")


def decode(image: Path | bytes, resolution: int) -> np.ndarray:
    """uint8 [resolution, resolution, 3]: upright, on white where it is transparent, centre-cropped, Lanczos.

    Raises one of `BROKEN`.
    """
    from PIL import Image, ImageOps

    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every build
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own size warning; MAX_PIXELS decides
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=formats) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise ValueError(f"{opened.width} x {opened.height} pixels is too large")
                opened.load()
                picture = ImageOps.exif_transpose(opened)
        except Image.DecompressionBombError:
            raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS} pixels is too large") from None
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits a channel, which Pillow would clip to white
        values = np.asarray(picture, dtype=np.float64)
        picture = Image.fromarray((values / max(values.max(), 1.0) * 255).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    picture = picture.resize(
        (resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side), reducing_gap=3.0
    )
    return np.array(picture, dtype=np.uint8)


def first_line(error: BaseException) -> str:
    """An error's own words, short, with no path of this machine in them."""
    words = str(error).strip().split("\n")[0]
    if isinstance(error, OSError) and error.strerror:
        words = error.strerror
    if words.startswith("cannot identify image file"):
        words = "no known image format"
    return (words or type(error).__name__)[:160]
