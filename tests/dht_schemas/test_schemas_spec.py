"""SPEC.md, the errors and the code name the same rules; the room stays pure; what is exported exists."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import rule_index

import paris_swarm.dht_schemas as room
from paris_swarm.dht_schemas import MalformedRecord, RecordError
from paris_swarm.dht_schemas.errors import described, quoted

FOLDER = Path(room.__file__).parent
VECTORS = Path(__file__).parent / "vectors"
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


def test_every_rule_is_in_code_and_in_a_test_and_every_rule_cited_anywhere_exists() -> None:
    """A row that is missing from the index, or names a file that does not cite its rule: run rule_index.py."""
    rules, code, tests = rule_index.defined(), rule_index.code(), rule_index.tests()
    cited = {*code, *tests} - {"R-DIR-0"}  # the base class of R-DIR's errors
    assert cited <= set(rules), sorted(cited - set(rules))
    assert set(rules) <= set(code), f"no code cites {sorted(set(rules) - set(code))}"
    assert set(rules) <= set(tests), f"no test cites {sorted(set(rules) - set(tests))}"


def test_the_index_names_every_rule_with_a_file_that_cites_it() -> None:
    spec = (FOLDER / "SPEC.md").read_text("utf-8")
    rows = re.findall(r"^\| (R-[A-Z]+-[0-9]+) \| (.+) \| (.+) \| (.+) \|$", spec.partition(rule_index.HEADING)[2], re.M)
    assert [row[0] for row in rows] == list(rule_index.defined()), "run tests/dht_schemas/rule_index.py"
    for rule, error, code, test in rows:
        said = (rule_index.ROOT / code).read_text("utf-8")
        assert rule in said or any(f"{name}(" in said for name in error.split(", ")), (rule, code)
        assert re.search(rf"\b{rule}\b", (rule_index.ROOT / "tests" / test).read_text("utf-8")), (rule, test)


def test_errors_that_the_specification_names_exist() -> None:
    from paris_swarm.router import folder_errors
    from paris_swarm.swarm import fetch_session, wire

    homes = (room, folder_errors, wire, fetch_session)
    for rule, text in rule_index.defined().items():
        for name in filter(None, rule_index.error_of(text).split(", ")):
            assert any(hasattr(home, name) for home in homes), f"{rule} names {name}"


def test_rules_that_refuse_inputs_have_an_input_that_they_refuse() -> None:
    """Not by one input of its own: rules about whole folders, streams, lists and chains, which have their own tests."""
    other = re.compile(r"R-(DIR|LIST|GRT-[34]|NOT-5|NOT-3|PROV-[34]|SET-[234]|VAL-4|WIRE|DIG-1|REC-12)")
    refused = {case["rule"] for path in VECTORS.glob("*.json") for case in json.loads(path.read_text())["refuse"]}
    for rule, text in rule_index.defined().items():
        if rule_index.error_of(text) and not other.match(rule):
            assert rule in refused, f"no vector is refused by {rule}"


def test_the_worked_example_is_the_vectors() -> None:
    spec = "".join((FOLDER / "SPEC.md").read_text("utf-8").split())
    by_kind = {path.stem: json.loads(path.read_text()) for path in VECTORS.glob("*.json")}
    envelope = next(case for case in by_kind["envelopes"]["accept"] if case["name"] == "claim")
    alice = next(case for case in by_kind["keys"]["accept"] if case["name"] == "alice")
    claim = json.loads(base64.b64decode(by_kind["records"]["accept"][0]["envelope"]))["payload"]
    manifest = by_kind["manifests"]["accept"][0]
    place = by_kind["dht"]["keys"][0]
    for piece in (
        alice["public_key"],
        alice["peer_id"],
        base64.b64decode(envelope["pae"]).hex(),
        envelope["signature"],
        base64.b64decode(envelope["envelope"]).decode(),
        base64.b64decode(claim).decode(),
        base64.b64decode(manifest["manifest"]).decode(),
        manifest["announcement"]["root"],
        place["key"],
        place["id"],
        by_kind["wire"]["accept"][0]["bytes"][-160:],
        by_kind["wire"]["accept"][2]["bytes"][:-72],
    ):
        assert "".join(piece.split()) in spec, piece


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
