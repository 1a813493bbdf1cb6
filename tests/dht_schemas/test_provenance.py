"""What a checkpoint says of its training, and the chain of its parents (SPEC.md, R-PROV)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paris_swarm.dht_schemas import BadManifest, BrokenChain, Manifest, build_manifest, open_manifest, walk_chain
from paris_swarm.dht_schemas import provenance as provenance_module
from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.digest import blake3_hex

ENVIRONMENT = {
    "device": "cpu",
    "chip": "AuthenticAMD 25 1 AVX2",
    "precision": "fp32",
    "threads": 1,
    "flush_denormal": True,
    "deterministic": False,
    "tf32": False,
    "torch": "2.13.0",
    "package": "0.1.0",
}


def told(from_step: int, to_step: int, **changes: Any) -> dict[str, Any]:
    return {
        "v": 1,
        "from_step": from_step,
        "to_step": to_step,
        "seed": 3,
        "recipe": "ab" * 32,
        "rows": {"digest": "cd" * 32, "count": 900},
        "environment": ENVIRONMENT,
        **changes,
    }


class Chain:
    """Manifests by root, each made as a peer makes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, Manifest] = {}

    def add(
        self, step: int, parent: str | None, from_step: int | None = None, *, slot: str = "0", **changes: Any
    ) -> str:
        (self.folder / "w.safetensors").write_bytes(step.to_bytes(8, "big"))
        meta: dict[str, Any] = {"step": step, "parent": parent}
        if from_step is not None:
            meta["provenance"] = told(from_step, step, **changes)
        manifest, _, root = build_manifest(self.folder, ["w.safetensors"], slot, meta=meta)
        self.known[root] = manifest
        return root


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def test_a_chain_is_followed_to_its_first_checkpoint(chain: Chain) -> None:
    first = chain.add(100, None, 0)
    second = chain.add(200, first, 100)
    third = chain.add(250, second, 200)
    found = walk_chain(third, chain.known.get)
    assert found.links == ((third, 250), (second, 200), (first, 100))
    assert found.complete and found.missing is None


def test_where_a_manifest_is_gone_the_walk_says_so(chain: Chain) -> None:
    second = chain.add(200, "ee" * 32, 100)
    found = walk_chain(second, chain.known.get)
    assert (found.links, found.missing, found.complete) == (((second, 200),), "ee" * 32, False)


@pytest.mark.parametrize(
    ("parent", "child", "words"),
    [
        ({"step": 200}, {"step": 200}, "parent is at step 200"),
        ({"step": 300}, {"step": 200}, "parent is at step 300"),
        ({"step": 100, "slot": "1"}, {"step": 200}, "slot 1"),
        ({"step": 100}, {"step": 200, "from_step": 90}, "began at step 90, its parent is at 100"),
        ({"step": 100, "from_step": 0, "seed": 4}, {"step": 200, "from_step": 100}, "its seed is 3, its parent's 4"),
        (
            {"step": 100, "from_step": 0, "recipe": "ff" * 32},
            {"step": 200, "from_step": 100},
            "its recipe is abab",
        ),
    ],
)
def test_the_break_is_named(chain: Chain, parent: dict[str, Any], child: dict[str, Any], words: str) -> None:
    older = chain.add(parent.pop("step"), None, parent.pop("from_step", None), **parent)
    newer = chain.add(child.pop("step"), older, child.pop("from_step", None))
    newest = chain.add(900, newer)
    with pytest.raises(BrokenChain, match=words) as broken:
        walk_chain(newest, chain.known.get)
    assert newer[:12] in str(broken.value) and older[:12] in str(broken.value)
    assert broken.value.rule == "R-PROV-3"


def test_a_walk_is_bounded(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-PROV-4"""
    monkeypatch.setattr(provenance_module, "MAX_CHAIN", 3)
    root = None
    for step in range(1, 6):
        root = chain.add(step, root)
    assert root is not None
    with pytest.raises(BrokenChain, match="more than 3") as broken:
        walk_chain(root, chain.known.get)
    assert broken.value.rule == "R-PROV-4"


def test_an_environment_that_says_nothing_of_pieces_took_batches_whole() -> None:
    read = provenance_module.Environment.model_validate(ENVIRONMENT)
    assert (read.micro_batch, read.processes, read.compiled) == (0, 1, False)


def test_an_older_or_later_kind_of_checkpoint_is_readable_and_says_nothing(chain: Chain) -> None:
    assert chain.known[chain.add(5, None)].provenance is None
    (chain.folder / "w.safetensors").write_bytes(b"x")
    meta = {"step": 5, "parent": None, "provenance": {"v": 2, "anything": "else"}}
    _, data, root = build_manifest(chain.folder, ["w.safetensors"], "0", meta=meta)
    assert open_manifest(data, root, cap_bytes=1 << 20).provenance is None


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"seed": "3"}, "R-PROV-1"),
        ({"seed": -1}, "R-PROV-1"),
        ({"recipe": "AB" * 32}, "R-PROV-1"),
        ({"rows": {"digest": "cd" * 32, "count": 0}}, "R-PROV-1"),
        ({"environment": {**ENVIRONMENT, "precision": "fp8"}}, "R-PROV-1"),
        ({"environment": {**ENVIRONMENT, "chip": "\x1b[2J"}}, "R-PROV-1"),
        ({"environment": {**ENVIRONMENT, "threads": True}}, "R-PROV-1"),
        ({"environment": {**ENVIRONMENT, "micro_batch": -1}}, "R-PROV-1"),
        ({"environment": {**ENVIRONMENT, "processes": 0}}, "R-PROV-1"),
        ({"environment": {**ENVIRONMENT, "compiled": 1}}, "R-PROV-1"),
        ({"v": 0}, "R-PROV-1"),
        ({"v": True}, "R-PROV-1"),
        ({"to_step": 201}, "R-PROV-2"),
        ({"from_step": 200}, "R-PROV-2"),
        ({"from_step": 7}, "R-PROV-2"),
    ],
)
def test_hostile_provenance_is_refused(chain: Chain, changes: dict[str, Any], rule: str) -> None:
    """`from_step` 7 without a parent included: fresh weights begin at 0."""
    honest = chain.known[chain.add(200, None, 0)].model_dump()
    honest["meta"]["provenance"].update(changes)
    data = canonical_json(honest)
    with pytest.raises(BadManifest) as refused:
        open_manifest(data, blake3_hex(data), cap_bytes=1 << 20)
    assert refused.value.rule == rule
    with pytest.raises(ValueError, match=r"provenance|step"):
        build_manifest(chain.folder, ["w.safetensors"], "0", meta=honest["meta"])


@pytest.mark.parametrize("value", ["text", 7, [], {"v": 1}])
def test_what_is_no_provenance_at_all_is_refused(chain: Chain, value: object) -> None:
    honest = chain.known[chain.add(200, None, 0)].model_dump()
    honest["meta"]["provenance"] = value
    data = canonical_json(honest)
    with pytest.raises(BadManifest):
        open_manifest(data, blake3_hex(data), cap_bytes=1 << 20)
