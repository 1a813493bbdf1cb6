"""docs/attacks.md, made from the docstrings of the attack tests and the figures that a run of them wrote.

PARIS_SWARM_ATTACK_FIGURES=docs/results/attacks.json python -m pytest tests/attacks -m "slow or not slow"
python tests/attacks/attack_table.py
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "attacks.md"
FIGURES = ROOT / "docs" / "results" / "attacks.json"
FIELDS = ("Attack", "Rule", "Seen")

HEAD = """# Attacks

What somebody who joins a swarm may try, and what happens then. Each row is one test in `tests/attacks/`, played against
real nodes: alice trains, bob is another peer, carol only reads, and the rogue is a node of plain hivemind without any
validator. After each attack on the network bob and carol still read alice's claim, or the test fails.

The attacker's powers, and the numbered rules, stand in [SPEC.md](../dht_schemas/SPEC.md); what no rule prevents stands
in its last section, and in the rows that say so here.

*In how long*: from the first hostile byte until everything offered was refused and, on the network, until both readers
had read the honest record again; for what is judged without a network, until it was refused. One run on two shared
cores, loopback; a report, not a promise. This page is made by `tests/attacks/attack_table.py`, and a test compares it.
"""


@dataclass(frozen=True)
class Row:
    """One attack: what its test's docstring says."""

    test: str
    file: str
    attack: str
    rule: str
    seen: str


def rows() -> list[tuple[str, list[Row]]]:
    """(what the file's docstring says, its attacks), file by file. Raises ValueError for a bad docstring."""
    found = []
    for path in sorted(HERE.glob("test_attack_*.py")):
        module = ast.parse(path.read_text("utf-8"))
        tests = [item for item in module.body if isinstance(item, ast.FunctionDef) and item.name.startswith("test_")]
        title = (ast.get_docstring(module) or "").partition("\n")[0]
        found.append((title, [_row(path.name, test) for test in tests]))
    return found


def _row(file: str, test: ast.FunctionDef) -> Row:
    text = " ".join((ast.get_docstring(test) or "").split())
    match = re.fullmatch("Attack: (.+) Rule: (.+) Seen: (.+)", text)
    if match is None or "|" in text:
        raise ValueError(f"{file}: the docstring of {test.name} must say Attack:, Rule: and Seen:, without a bar")
    return Row(test.name, file, *match.groups())


def page(figures: dict[str, float]) -> str:
    """The whole of docs/attacks.md. Raises KeyError for a test without a figure."""
    lines = [HEAD]
    for title, attacks in rows():
        lines += [f"## {title}", "", "| attack | refused by | honest peers still see | in how long | test |"]
        lines.append("|---|---|---|---:|---|")
        for row in attacks:
            cells = (row.attack, row.rule, row.seen, _seconds(figures[row.test]), f"`{row.test}`")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _seconds(value: float) -> str:
    if value < 0.001:
        return "under 1 ms"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(json.loads(FIGURES.read_text("utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
