"""Table and plots of the runs that `claims.py --grid FOLDER` left: FOLDER/table.md, FOLDER/*.svg. No library needed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

Series = dict[str, list[tuple[float, float]]]

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 520, 320, 62, 40, 96, 46
COLOURS = ("#0b6e99", "#b3541e", "#4b7f52", "#7a4b94", "#888888")

PLOTS: tuple[tuple[str, str, Callable[[dict[str, Any]], float | None]], ...] = (
    ("records", "stores and reads per peer and second", lambda run: run["records_per_peer_s"]),
    ("key-reads", "reads of one slot's claims, per second", lambda run: run["detail"]["reads_per_slot_key_s"]),
    ("orphans", "leases until an orphaned slot is held, p99", lambda run: run["orphan_leases_p99"]),
    ("all-held", "seconds until every slot is trained", lambda run: run["all_held_s"]),
)


def write_report(folder: Path) -> str:
    """Write the plots and ``table.md``; returns the table."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    usual = {name: run for name, run in runs.items() if name.startswith("usual-")}
    for name, title, figure in PLOTS:
        lines: Series = {}
        for run in usual.values():
            value, scenario = figure(run), run["detail"]["scenario"]
            if value is not None:
                lines.setdefault(f"{scenario['slots']} slots", []).append((scenario["peers"], value))
        if lines:
            (folder / f"{name}.svg").write_text(
                chart(title, {key: sorted(lines[key]) for key in sorted(lines, key=_slots)})
            )
    table = "\n".join(rows(runs)) + "\n"
    (folder / "table.md").write_text(table)
    return table


def _slots(label: str) -> int:
    return int(label.split()[0])


def rows(runs: dict[str, Any]) -> list[str]:
    """A Markdown table, one run a row."""
    found = [
        "| scenario | peers | slots | leases | duplicate work | orphans | median, p99 (leases) | all held (s) "
        "| records a peer and s (reads, stores) | reads a slot key and s | slot time trained | CPU (s) |",
        "|" + "---|" * 12,
    ]

    def order(item: tuple[str, Any]) -> tuple[bool, str, int, int]:
        scenario = item[1]["detail"]["scenario"]
        return not item[0].startswith("usual"), item[0].split("-")[0], scenario["peers"], scenario["slots"]

    for name, run in sorted(runs.items(), key=order):
        more, scenario = run["detail"], run["detail"]["scenario"]
        cells = [
            name.split("-")[0],
            f"{scenario['peers']:,}",
            f"{scenario['slots']:,}",
            f"{scenario['leases']:g}",
            f"{run['duplicate_work']:.3%}",
            str(more["orphans"]),
            f"{_number(more['orphan_leases_median'])}, **{_number(run['orphan_leases_p99'])}**",
            _number(run["all_held_s"], 1),
            f"{run['records_per_peer_s']:.4f} ({more['reads_per_peer_s']:.4f}, {more['stores_per_peer_s']:.4f})",
            f"{more['reads_per_slot_key_s']:.3f}",
            f"{more['trained_share_of_slot_time']:.1%}",
            f"{more['cpu_s']:.0f}",
        ]
        found.append("| " + " | ".join(cells) + " |")
    return found


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def chart(title: str, lines: Series) -> str:
    """A line chart as SVG text: both axes logarithmic where the values span more than a decade."""
    xs = [x for line in lines.values() for x, _ in line]
    ys = [y for line in lines.values() for _, y in line]
    wide = min(ys) > 0 and max(ys) / min(ys) > 10
    low_x, high_x = math.log10(min(xs)) - 0.1, math.log10(max(xs)) + 0.1
    low_y, high_y = (math.log10(min(ys)) - 0.1, math.log10(max(ys)) + 0.1) if wide else (0.0, max(ys) * 1.15 or 1.0)

    def across(x: float) -> float:
        return LEFT + (math.log10(x) - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        at = math.log10(y) if wide else y
        return HEIGHT - BOTTOM - (at - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    if wide:
        ticks = [10.0**power for power in range(math.ceil(low_y), math.floor(high_y) + 1)]
        ticks = ticks if len(ticks) > 1 else [min(ys), max(ys)]
    else:
        ticks = [high_y * part / 4 for part in range(5)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{title}</text>',
    ]
    for y in ticks:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>'
        )
    for x in sorted(set(xs)):
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:,.0f}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">peers</text>')
    for number, (label, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5" fill="{colour}"/>' for x, y in line]
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{TOP + 18 * number + 10}" fill="{colour}">{label}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
