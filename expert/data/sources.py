"""What a source of captioned images is: numbered items, each an image or the reason why it is none."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from blake3 import blake3


class PrepareError(ValueError):
    """The images cannot be prepared; the message says which file or argument is wrong and what to do."""


@dataclass(frozen=True)
class Captioned:
    """One image, uint8 [H, W, 3] sRGB, and its caption record: {"text", "file", maybe "family" and "attributes"}."""

    pixels: np.ndarray
    record: dict[str, Any]


@dataclass(frozen=True)
class Skipped:
    """One file that was left out, and why, in words for the person whose file it is."""

    file: str
    why: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", writable_name(self.file))


def writable_name(name: str) -> str:
    """A file's name as a caption record or a manifest can hold it: what is no UTF-8 in it becomes an escape."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


class Source(Protocol):
    """A set of captioned images at one resolution: items 0 to ``total()`` - 1, always the same in the same order.

    Item i depends on nothing but the source and i, so that work can be cut into ranges of items and taken up anywhere.
    What must be known of all items before it takes a few bytes each, never their pictures.
    """

    def describe(self) -> dict[str, Any]:
        """{"source": {...}, "licences": [...]} and, where colours have names, "palette": {name: [r, g, b]}."""

    def fingerprint(self) -> str:
        """A text that differs when the source was changed: file names, sizes, times. For this machine only."""

    def total(self) -> int:
        """How many items there are, those included that turn out to be skipped."""

    def items(self, start: int = 0) -> Generator[Captioned | Skipped, None, None]:
        """The items from number ``start`` on. Closing the generator ends every process it started."""


def files_fingerprint(files: Iterable[Path]) -> str:
    """A text that differs when one of these files was replaced or changed: names, sizes and times."""
    hasher = blake3()
    for path in files:
        stat = path.stat()
        hasher.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))
    return hasher.hexdigest()
