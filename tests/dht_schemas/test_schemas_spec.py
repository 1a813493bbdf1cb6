"""SPEC.md, the errors and the code name the same rules; the room stays pure; what is exported exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import paris_swarm.dht_schemas as room
from paris_swarm.dht_schemas import MalformedRecord, RecordError
from paris_swarm.dht_schemas.errors import described, quoted

FOLDER = Path(room.__file__).parent
RULE = re.compile(r"R-[A-Z]+-[0-9]+")


def subclasses(kind: type[RecordError]) -> set[type[RecordError]]:
    """This room's error classes; other rooms define more (SPEC.md, sections 13 and 14)."""
    own = [child for child in kind.__subclasses__() if child.__module__.startswith("paris_swarm.dht_schemas")]
    return {kind}.union(*map(subclasses, own))


def test_every_rule_in_the_code_is_in_the_specification_once() -> None:
    spec = (FOLDER / "SPEC.md").read_text("utf-8")
    defined = re.findall(r"\*\*(R-[A-Z]+-[0-9]+)\*\*", spec)
    assert len(defined) == len(set(defined))
    cited = {rule for path in FOLDER.glob("*.py") for rule in RULE.findall(path.read_text("utf-8"))}
    assert cited <= set(defined), sorted(cited - set(defined))


def test_every_error_has_a_rule_a_sentence_and_a_place_in_tree_and_specification() -> None:
    spec = (FOLDER / "SPEC.md").read_text("utf-8")
    tree = (FOLDER / "errors.py").read_text("utf-8").partition('"""\n\nfrom')[0]
    for kind in subclasses(RecordError) - {RecordError}:
        assert kind.rule != RecordError.rule
        assert kind.__doc__ is not None
        assert kind.__doc__ != RecordError.__doc__
        assert kind.__name__ in tree
        assert kind.__name__ in spec
        assert kind.__name__ in room.__all__


def test_messages_carry_sentence_rule_and_detail() -> None:
    error = MalformedRecord("field seq", rule="R-REC-1")
    assert str(error).startswith("The record cannot be read")
    assert "R-REC-1: field seq" in str(error)
    assert MalformedRecord.rule == "R-ENV-2"


def test_hostile_values_are_quoted() -> None:
    assert quoted("\x1b[2J\n\u202e") == r"'\x1b[2J\n\u202e'"
    assert len(quoted("x" * 10**6)) == 60
    assert len(quoted([1] * 10**4)) == 60
    assert described([{"loc": ("a", 0, "\x1b"), "msg": "wrong"}] * 5).count("wrong") == 3


def test_exports() -> None:
    assert len(room.__all__) == len(set(room.__all__))
    for name in room.__all__:
        assert getattr(room, name) is not None
    for path in FOLDER.glob("*.py"):
        if path.stem != "__init__":
            assert re.search(rf"^{path.stem} +\S", room.__doc__ or "", re.MULTILINE), (
                f"{path.stem} is not in the package docstring"
            )


def test_the_room_is_pure() -> None:
    code = "import sys, paris_swarm.dht_schemas; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for module in ("torch", "numpy", "hivemind", "rich", "typer", "safetensors", "zstandard", "asyncio"):
        assert f"'{module}'" not in loaded, f"dht_schemas imports {module}"
