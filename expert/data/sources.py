"""What a source of captioned images is: numbered items, each an image or the reason why it is none."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from blake3 import blake3

from paris_swarm.dht_schemas.fields import is_printable

NOT_STATED = "not stated"
"""The name of a licence that nobody named."""
MAX_LICENCE, MAX_ORIGIN = 200, 500
"""Characters of what a person says of their pictures."""


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


@dataclass(frozen=True)
class Stated:
    """What a person says of their own pictures: the licence they stand under, and where they come from (a page's
    address or words). Both travel with the plan, to every peer and onto the model's card.

    Raises PrepareError: longer than MAX_LICENCE or MAX_ORIGIN characters, empty, or not one line of plain text.
    """

    licence: str | None = None
    origin: str | None = None

    def __post_init__(self) -> None:
        for option, text, limit in (("licence", self.licence, MAX_LICENCE), ("origin", self.origin, MAX_ORIGIN)):
            if text is None:
                continue
            if not text.strip() or len(text) > limit or not is_printable(text):
                raise PrepareError(
                    f"--{option}: give 1 to {limit} characters of plain text on one line, without control characters "
                    f"(got {len(text)} characters)"
                )
            if any("\ud800" <= letter <= "\udfff" for letter in text):  # a byte of the command line that is no UTF-8
                raise PrepareError(f"--{option} is not valid Unicode")

    def added(self, facts: dict[str, Any]) -> dict[str, Any]:
        """`Source.describe`'s facts with this; a licence that the source itself names is kept beside it."""
        out = dict(facts)
        if self.licence is not None:
            known = [item for item in facts["licences"] if item["name"] != NOT_STATED]
            what = facts["licences"][0]["what"] if facts["licences"] else "the images"
            said = f"{what}, as said by who prepared them"
            out["licences"] = [*known, {"what": said, "name": self.licence.strip()}]
        if self.origin is not None:
            out["source"] = {**facts["source"], "origin": self.origin.strip()}
        return out


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
