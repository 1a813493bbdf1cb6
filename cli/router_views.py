"""What `router report` shows. Pure state -> renderable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from paris_swarm.router.calibration import RouterFigures, RouterReport


def report_table(name: str, report: RouterReport) -> Table:
    """One line a noise level, and one for all of them (80 columns are enough)."""
    table = Table(title=f"Router, {name}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("t", "accuracy", "confidence", "ECE", "cross-entropy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for t, figures in report.by_time:
        table.add_row(f"{t:.2f}", *_cells(figures))
    table.add_row("all", *_cells(report.overall), style="bold")
    return table


def _cells(figures: RouterFigures) -> list[str]:
    return [f"{value:.3f}" for value in (figures.accuracy, figures.confidence, figures.ece, figures.cross_entropy)]
