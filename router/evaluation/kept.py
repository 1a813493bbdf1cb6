"""Drawn pictures on disk, so that an evaluation that was stopped goes on where it was.

NAME.npy    uint8 [P, H, W, C]
NAME.json   what was asked for, the digest of NAME.npy, and what the drawing says of itself
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.files import atomic_write, quarantine


@dataclass(frozen=True)
class Kept:
    """images uint8 [P, H, W, C]; facts: plain JSON values about them; damaged: where a file that could not be used was
    set aside, None where there was none.
    """

    images: NDArray[np.uint8]
    facts: Mapping[str, Any]
    damaged: Path | None = None


def kept_pictures(
    folder: Path,
    name: str,
    asked: Mapping[str, Any],
    draw: Callable[[], tuple[NDArray[np.uint8], Mapping[str, Any]]],
) -> Kept:
    """The pictures called `name` that were drawn for `asked` (plain JSON values); draws and keeps them otherwise.

    Pictures drawn for something else are drawn anew; damaged ones are set aside first.

    Raises:
        OSError: no space or no permission.
    """
    array, about = folder / f"{name}.npy", folder / f"{name}.json"
    wanted = json.loads(json.dumps(dict(asked)))
    said = _said(about)
    damaged = None
    if said is not None and said["asked"] == wanted and array.is_file():
        data = array.read_bytes()
        if blake3_hex(data) == said["blake3"]:
            return Kept(np.load(io.BytesIO(data), allow_pickle=False), said["facts"])
        damaged = quarantine(array)
    images, facts = draw()
    stream = io.BytesIO()
    np.save(stream, images, allow_pickle=False)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(array, stream.getvalue())
    note = {"asked": wanted, "blake3": blake3_hex(stream.getvalue()), "facts": dict(facts)}
    atomic_write(about, (json.dumps(note, indent=2, sort_keys=True) + "\n").encode())
    return Kept(images, facts, damaged)


def _said(path: Path) -> dict[str, Any] | None:
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError):
        return None  # not there, or torn: the pictures are drawn again
    return said if isinstance(said, dict) and {"asked", "blake3", "facts"} <= set(said) else None
