"""What `verify --probe` shows: tables for terminals, and the K x K table as a picture. Pure state -> renderable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from paris_swarm.cli.baselines import Baselines
    from paris_swarm.cli.probing import ProbeReport

CELL = 56
MARGIN = 44
"""Pixels of the picture: the side of a cell, and the room for names at the top and on the left."""
GOOD, BAD = (0x1B, 0x9E, 0x77), (0xD9, 0x5F, 0x02)
"""Colours of a loss far below the bar and of one far above it; white is the bar."""

CROSS_TITLE = "Expert (row) on the open half of each cluster (column), * its own"
CROSS_NOTE = "Reported, not judged: an expert that fits another cluster too is no worse for its own."


def probe_table(report: ProbeReport) -> Table:
    """One line a slot and kind of rows: announced, measured, both bars, verdict (80 columns are enough)."""
    table = _table("Probe losses")
    for heading in ("slot", "rows"):
        table.add_column(heading, no_wrap=True)
    for heading in ("held out", "announced", "measured", "resumable", "assemblable"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for figure in report.figures:
        held = "all" if figure.held_out is None else f"{figure.held_out} of {figure.count}"
        table.add_row(
            figure.slot,
            f"{figure.rows} {figure.count}",
            held,
            _loss(figure.announced),
            _loss(figure.measured),
            _loss(figure.resumable),
            _loss(figure.assemblable),
            Text("FAILS", style="bold red") if figure.problem else Text("ok", style="green"),
        )
    return table


def cross_table(cross: Sequence[Sequence[float | None]], bars: Sequence[float]) -> Table:
    """The K x K table, each cell coloured by its loss as a share of the column's assemblable bar."""
    table = _table(CROSS_TITLE)
    table.add_column("expert", justify="right", no_wrap=True)
    for j in range(len(cross)):
        table.add_column(str(j), justify="right", no_wrap=True)
    for k, row in enumerate(cross):
        cells = [
            Text(
                _loss(loss) + ("*" if j == k and loss is not None else " "),
                style="dim" if loss is None else _style(loss, bars[j]),
            )
            for j, loss in enumerate(row)
        ]
        table.add_row(str(k), *cells)
    table.add_row("bar", *(Text(f"{bar:.4f} ", style="dim") for bar in bars))
    return table


def cross_picture(cross: Sequence[Sequence[float | None]], bars: Sequence[float]) -> NDArray[np.uint8]:
    """The same as a heat map uint8 [H, W, 3]; an expert's own cluster is framed, a missing expert's row stays grey."""
    import numpy as np
    from PIL import Image, ImageDraw

    count = len(cross)
    side = MARGIN + count * CELL + 8
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    draw.text((6, 6), "expert \\ probe", fill="black")
    for k, row in enumerate(cross):
        top = MARGIN + k * CELL
        draw.text((MARGIN - 16, top + CELL // 2 - 6), str(k), fill="black")
        draw.text((MARGIN + k * CELL + CELL // 2 - 4, MARGIN - 16), str(k), fill="black")
        for j, loss in enumerate(row):
            left = MARGIN + j * CELL
            box = (left, top, left + CELL - 2, top + CELL - 2)
            fill = (0xCC, 0xCC, 0xCC) if loss is None else _colour(loss, bars[j])
            draw.rectangle(box, fill=fill, outline="black" if j == k else None, width=2 if j == k else 0)
            draw.text((left + 8, top + CELL // 2 - 6), _loss(loss), fill="black")
    return np.asarray(image, dtype=np.uint8)


def baseline_table(found: Baselines) -> Table:
    """One line a bar: the plan's figure beside the one computed here."""
    table = _table("Bars of the plan, computed again")
    for heading in ("slot", "bar"):
        table.add_column(heading, no_wrap=True)
    for heading in ("in the plan", "computed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for figure in found.bars:
        verdict = Text("DIFFERS", style="bold red") if figure.problem else Text("ok", style="green")
        table.add_row(figure.slot, figure.bar, f"{figure.planned:.6f}", f"{figure.computed:.6f}", verdict)
    return table


def baseline_lines(found: Baselines) -> list[str]:
    """What the audit says about the choice of the probe rows."""
    lines = [f"Note: {note}" for note in found.notes]
    for half, drawn in found.drawn_by_seed.items():
        if drawn is not None:
            said = "is what the plan's seed draws from this data" if drawn else "is NOT what the plan's seed draws"
            lines.append(f"The {half} half of the probe set {said}.")
    if found.unknown_rows:
        count = sum(found.unknown_rows.values())
        lines.append(
            "Every row of the open half is a held-out row of its own cluster."
            if not count
            else f"{count} row(s) of the open half are no held-out rows of their cluster in this data."
        )
    return lines


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value < 1000 else f"{value:.1e}"


def _colour(loss: float, bar: float) -> tuple[int, int, int]:
    """From GOOD (half the bar or less) over white (the bar) to BAD (twice the bar or more)."""
    import math

    depth = max(-1.0, min(1.0, math.log2(max(loss, 1e-9) / bar)))
    towards = GOOD if depth < 0 else BAD
    red, green, blue = (round(255 + (part - 255) * abs(depth)) for part in towards)
    return red, green, blue


def _style(loss: float, bar: float) -> str:
    red, green, blue = _colour(loss, bar)
    return f"black on rgb({red},{green},{blue})"
