"""What a source of captioned images is: an iterator of images, with whatever had to be skipped named among them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


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


class Source(Protocol):
    """A set of captioned images at one resolution, always in the same order."""

    def describe(self) -> dict[str, Any]:
        """{"source": {...}, "licences": [...]} and, where colours have names, "palette": {name: [r, g, b]}."""

    def total(self) -> int:
        """How many items ``items`` will yield, skipped ones included."""

    def items(self) -> Generator[Captioned | Skipped, None, None]:
        """The images, in order. Closing the generator ends every process it started."""
