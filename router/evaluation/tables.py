"""An evaluation's figures over seeds, as plain JSON values and as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from paris_swarm.router.evaluation.intervals import Interval
from paris_swarm.router.evaluation.measure import Distances, Measures

EXTRACTOR_NAMES = {"efficientnet-lite0": "EffL0", "inception-v3-fid": "Inception", "Dinov2Model": "DINOv2"}
"""Short names for column heads; others are written out."""


@dataclass(frozen=True)
class Column:
    """One figure: `key` in the JSON, its `head`, the factor it is shown with, and how many digits."""

    key: str
    head: str
    factor: float = 1.0
    digits: int = 2


def columns(extractor: str, size: int, published: bool) -> tuple[Column, ...]:
    """The table's columns; FID and KID name their extractor and the side it brings pictures to, in pixels."""
    name = f"{EXTRACTOR_NAMES.get(extractor, extractor)}@{size}"
    own = (
        Column("fid", f"FID-{name}", digits=1),
        Column("kid", f"KID-{name} x1000", 1000.0, 1),
        Column("precision", "precision"),
        Column("recall", "recall"),
        Column("cluster_accuracy", "own cluster"),
        Column("attribute_accuracy", "background"),
    )
    more = (Column("published_fid", "FID", digits=2), Column("published_kid", "KID x1000", 1000.0, 2))
    return own + (more if published else ())


def figures(found: Measures) -> dict[str, float | None]:
    """The figures of one set of pictures by column key, None where there is none."""

    def of(distances: Distances | None, prefix: str = "") -> dict[str, float | None]:
        names = ("fid", "kid", "precision", "recall")
        return {prefix + name: None if distances is None else getattr(distances, name) for name in names}

    shares = {"cluster_accuracy": found.cluster_accuracy, "attribute_accuracy": found.attribute_accuracy}
    return {**of(found.distances), **shares, **of(found.published, "published_")}


def over_seeds(values: Sequence[Mapping[str, float | None]]) -> dict[str, Interval | None]:
    """Each figure's interval over the seeds; None where a seed has none."""
    keys = list(values[0]) if values else []
    rows: dict[str, Interval | None] = {}
    for key in keys:
        found = [value[key] for value in values]
        rows[key] = None if any(each is None for each in found) else Interval.of([float(each or 0) for each in found])
    return rows


def interval_dict(row: Mapping[str, Interval | None]) -> dict[str, Any]:
    """Plain JSON values: {key: {"mean", "half", "count"} or None}."""
    return {key: None if value is None else asdict(value) for key, value in row.items()}


def markdown(
    rows: Mapping[str, Mapping[str, Interval | None]], shown: Sequence[Column], *, first: str = "strategy"
) -> str:
    """A table with one line a row, in the order given; an absent figure is a dash."""
    heads = [first, *(column.head for column in shown)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, row in rows.items():
        cells = [_cell(row.get(column.key), column) for column in shown]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines) + "\n"


def _cell(value: Interval | None, column: Column) -> str:
    if value is None:
        return "-"
    half = None if value.half is None else value.half * column.factor
    return Interval(value.mean * column.factor, half, value.count).text(column.digits)
