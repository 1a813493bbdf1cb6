"""What a plan's free field `data` says of its rows (SPEC, section 6), or a sentence about what it does not say.

`init` writes all of it. A plan that another program signed may lack any part; whoever needs it is told which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_WIDTH = 1 << 16
"""No encoder's states or features, no picture's side is wider: a plan may not ask for arbitrary memory."""


def encoder_facts(data: Mapping[str, Any], name: str, what: str) -> Mapping[str, Any]:
    """{"name", "digest", "dim", ...} of an encoder under ``name`` ("text", "features"); what: for the error.

    Raises:
        ValueError: the plan does not say.
    """
    said = data.get(name)
    known = isinstance(said, Mapping) and all(isinstance(said.get(part), str) for part in ("name", "digest"))
    if not known:
        raise _lacking(f"{name}.name and {name}.digest", what)
    assert isinstance(said, Mapping)
    return said


def size_fact(data: Mapping[str, Any], path: str, what: str) -> int:
    """The whole number, 1 to MAX_WIDTH, at a dotted path of ``data``, "features.dim".

    Raises:
        ValueError: the plan does not say, or says something else.
    """
    value: Any = data
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if type(value) is not int or not 1 <= value <= MAX_WIDTH:
        raise _lacking(path, what)
    return value


def picture_side(data: Mapping[str, Any]) -> int:
    """Pixels along a side of the plan's pictures, whether its experts learn pixels or latents. Raises ValueError."""
    path = "latents.pixels" if data.get("latents") is not None else "resolution"
    return size_fact(data, path, "the size of its pictures")


def _lacking(path: str, what: str) -> ValueError:
    return ValueError(
        f"the plan does not say {what} (its data.{path}), as plans that `paris-swarm init` writes do: ask its "
        "organiser for one that does"
    )
