"""The index at the end of SPEC.md: rule, error, where it is checked, which test holds it to that.

python tests/dht_schemas/rule_index.py            write the table from the specification, the code and the tests
python tests/dht_schemas/rule_index.py --check    1 if a rule is cited by no code or no test
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "dht_schemas" / "SPEC.md"
ROOMS = ("dht_schemas", "swarm", "router", "expert", "cli")
HEADING = "## 17. Index of rules"

RULE = re.compile(r"R-[A-Z]+-[0-9]+")
DEFINED = re.compile(r"\*\*(R-[A-Z]+-[0-9]+)\*\*(.*?)(?=\n- \*\*R-|\n\n|\*\*R-|\Z)", re.DOTALL)
ERROR = re.compile(r"\*([A-Z][A-Za-z]+)\b[^*]*\.?\*")

CARRIES = re.compile(r'^class (\w+)\(.*?^    rule = "(R-[A-Z]+-[0-9]+)"', re.DOTALL | re.MULTILINE)


def defined() -> dict[str, str]:
    """Rule -> its text, in the order of the specification."""
    body = SPEC.read_text("utf-8").partition(HEADING)[0]
    return {found[1]: found[2] for found in DEFINED.finditer(body)}


def error_of(text: str) -> str:
    """The error that a rule's text names, if any."""
    return ", ".join(dict.fromkeys(ERROR.findall(text)))


def citations(paths: Iterable[Path]) -> dict[str, list[tuple[Path, int]]]:
    """Rule -> the files that cite it, those that cite it most first."""
    found: dict[str, list[tuple[Path, int]]] = {}
    for path in sorted(paths):
        rules = RULE.findall(path.read_text("utf-8"))
        for rule in set(rules):
            found.setdefault(rule, []).append((path, rules.count(rule)))
    return {rule: sorted(files, key=lambda entry: -entry[1]) for rule, files in found.items()}


def code() -> dict[str, list[tuple[Path, int]]]:
    """Citations in the rooms. The modules of errors check nothing: a rule that only they cite is looked for where the
    error that carries its number is raised.
    """
    files = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    errors = [path for path in files if path.name in ("errors.py", "folder_errors.py")]
    rest = [path for path in files if path not in errors]
    found = citations(rest)
    for path in errors:
        for name, rule in CARRIES.findall(path.read_text("utf-8")):
            raised = [(other, other.read_text("utf-8").count(f"{name}(")) for other in rest]
            where = sorted((entry for entry in raised if entry[1]), key=lambda entry: -entry[1])
            found.setdefault(rule, where or [(path, 1)])
    return found


def tests() -> dict[str, list[tuple[Path, int]]]:
    """Citations in tests and vectors."""
    here = Path(__file__)
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if path != here]
    return citations([*files, *(ROOT / "tests" / "dht_schemas" / "vectors").glob("*.json")])


def rows() -> list[tuple[str, str, str, str]]:
    """Rule, error, code, test."""
    checked, tested = code(), tests()

    def first(found: dict[str, list[tuple[Path, int]]], rule: str) -> str:
        return found[rule][0][0].relative_to(ROOT).as_posix() if rule in found else ""

    return [(rule, error_of(text), first(checked, rule), first(tested, rule)) for rule, text in defined().items()]


def main() -> int:
    found = rows()
    missing = [row for row in found if not row[2] or not row[3]]
    for rule, _error, where, _test in missing:
        print(f"{rule} is cited by no {'code' if not where else 'test'}")
    if sys.argv[1:] != ["--check"]:
        table = ["| rule | error | checked in | test |", "|---|---|---|---|"]
        for rule, error, where, test in found:
            table.append(f"| {rule} | {error or '-'} | {where} | {test.removeprefix('tests/')} |")
        text = SPEC.read_text("utf-8").partition(HEADING)[0]
        about = "Written by `tests/dht_schemas/rule_index.py`: of several files that cite a rule, the keenest."
        SPEC.write_text(f"{text}{HEADING}\n\n{about}\n\n" + "\n".join(table) + "\n", "utf-8")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
