"""An auditor who trained nothing takes a checkpoint and its parent from a swarm and trains the steps between again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from own_pictures import draw_folder
from safetensors.torch import load_file, save_file
from swarm_processes import Answer, VerbProcesses, done, events, lane, verb

from paris_swarm.cli.app import run
from paris_swarm.dht_schemas.manifest import build_manifest, open_manifest
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.store import ContentStore

STEPS = 60
WEIGHTS = ("ema.safetensors", "model.safetensors", "optimizer.safetensors")


@dataclass
class Trained:
    """What one peer published, and the answers of audits while it still served. ``auditor`` trained nothing."""

    invite: str
    plan_id: str
    author: Path
    auditor: Path
    roots: list[str]
    early: Answer
    answer: dict[str, Any]

    @property
    def store(self) -> ContentStore:
        return ContentStore(self.auditor / "store")

    def audit(self, root: str, data: Path, *more: object) -> Answer:
        return verb("audit", root, self.invite, "--data", data, "--home", self.auditor, "--offline", *more)

    def forged(
        self,
        scratch: Path,
        *,
        meta: Callable[[dict[str, Any]], None] = lambda meta: None,
        weights: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None,
    ) -> str:
        """The last checkpoint with its meta and its model changed, put into the auditor's store; gives its root."""
        root = self.roots[-1]
        blob = self.store.read_blob(root)
        assert blob is not None
        honest = open_manifest(blob, root, cap_bytes=1 << 40)
        names = [entry.name for entry in honest.files]
        for name in names:
            shutil.copyfile(self.store.path(root, name), scratch / name)
        tensors = load_file(scratch / "model.safetensors")
        weights(tensors)
        save_file(tensors, scratch / "model.safetensors")
        told = dict(honest.meta)
        meta(told)
        _, data, forged = build_manifest(scratch, names, honest.slot, meta=told)
        return ContentStore(self.auditor / "store").put_folder(data, scratch) and forged


@pytest.fixture(scope="module")
def trained(room: Path, data: Path) -> Trained:
    folder = room / "audited"
    arguments = ("-k", 2, "--steps", STEPS, "--router-steps", 8, "--batch", 8, "--lease", 60, "--checkpoint-every", 1)
    plan = done(verb("--home", folder / "seed", "init", data, "-o", folder / "plan", *arguments, "--json")).json["plan"]
    auditor = folder / "auditor"
    with VerbProcesses(folder / "logs") as processes:
        seed = processes.start("seed", "--home", folder / "seed", "bootstrap", folder / "plan")
        invite = seed.wait_for(lambda line: line.get("event") == "ready")["invite"]
        early = verb("audit", "0", invite, "--data", data, "--home", auditor)
        peer = processes.start(
            "peer", "join", invite, "--claim-cluster", "0", "--data", data, "--home", folder / "peer",
            "--threads", 1, "--device", "cpu",
        )  # fmt: skip
        peer.wait_for(lambda line: lane(line).get("phase") == "finished", limit_s=150)
        roots = [str(event["root"]) for event in events(folder / "peer", plan) if event["event"] == "published"]
        answer = done(verb("audit", "0", invite, "--data", data, "--home", auditor, "--json")).json
    return Trained(invite, plan, folder / "peer", auditor, roots, early, answer)


# ---- over real nodes -----------------------------------------------------------------------------------------------


def test_an_honest_checkpoint_is_reproduced_bit_for_bit(trained: Trained) -> None:
    answer = trained.answer
    assert answer["verdict"] == "identical" and answer["reproduced"] is True
    assert (answer["root"], answer["to_step"]) == (trained.roots[-1], STEPS)
    assert answer["environment_differs"] == {}
    assert [(file["name"], file["identical"]) for file in answer["files"]] == [(name, True) for name in WEIGHTS]
    ledger = Home(trained.author).swarm(trained.plan_id).ledger
    (envelope,) = ledger.signed("checkpoint")
    announced = Announcement.open(envelope).record
    assert (answer["author"], answer["parent"]) == (announced.author, announced.parent)


def test_the_chain_is_followed_to_the_first_checkpoint(trained: Trained) -> None:
    """The author serves the manifests of all its checkpoints, and the files of the newest two."""
    assert len(trained.roots) > 1
    chain = trained.answer["chain"]
    assert chain == {"checkpoints": len(trained.roots), "complete": True, "missing": None}
    store = ContentStore(trained.author / "store")
    assert [store.has(root) for root in trained.roots] == [False] * (len(trained.roots) - 2) + [True, True]


def test_before_anything_is_published_there_is_nothing_to_audit(trained: Trained) -> None:
    assert trained.early.code == 5


# ---- from this home's store ------------------------------------------------------------------------------------------


def test_what_this_home_does_not_hold_is_said(trained: Trained, data: Path) -> None:
    answer = trained.audit("f" * 64, data)
    assert answer.code == 5
    assert "without --offline" in answer.said


def test_a_copy_with_noise_is_told_apart_and_the_tensor_named(trained: Trained, data: Path, tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["final_layer.linear.weight"] += 1e-4

    root = trained.forged(tmp_path, weights=add)
    answer = trained.audit(root[:16], data, "--json")
    assert answer.code == 4, answer.said
    found = answer.json
    assert found["verdict"] == "unexplained" and found["author"] is None
    model = next(file for file in found["files"] if file["name"] == "model.safetensors")
    assert model["worst"]["part"] == "final_layer.linear.weight"
    assert model["distance"] > found["margin"] * model["noise"] > 0
    assert [file["identical"] for file in found["files"]] == [True, False, True]


@pytest.mark.slow
def test_what_another_version_made_is_not_decided_and_nobody_accused(
    trained: Trained, data: Path, tmp_path: Path
) -> None:
    def older(meta: dict[str, Any]) -> None:
        environment = {**meta["provenance"]["environment"], "package": "0.0.9"}
        meta["provenance"] = {**meta["provenance"], "environment": environment}

    def otherwise(tensors: dict[str, torch.Tensor]) -> None:
        tensors["final_layer.linear.weight"] += 1e-4

    for folder in ("other", "same"):
        (tmp_path / folder).mkdir()
    answer = trained.audit(trained.forged(tmp_path / "other", meta=older, weights=otherwise), data)
    assert answer.code == 5, answer.said
    assert "NOT DECIDED: made by another version of the code, 0.0.9" in answer.said
    assert "NOT REPRODUCED" not in answer.said
    same = done(trained.audit(trained.forged(tmp_path / "same", meta=older), data, "--json")).json
    assert same["verdict"] == "identical", "bits that are equal prove what they prove, whoever made them"
    assert list(same["environment_differs"]) == ["package"]


def test_a_machine_too_small_for_the_replay_is_told_before_anything_is_trained(
    trained: Trained, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("paris_swarm.expert.memory.free_ram", lambda: 1_000_000)
    command = ["audit", trained.roots[-1], trained.invite, "--data", data, "--home", trained.auditor, "--offline"]
    assert run([str(part) for part in (*command, "--threads", 1, "--device", "cpu")]) == 2
    assert "slot 0 of the plan makes a network of" in " ".join(capsys.readouterr().err.split())


def test_a_broken_chain_is_named(trained: Trained, data: Path, tmp_path: Path) -> None:
    def earlier(meta: dict[str, Any]) -> None:
        meta["provenance"] = {**meta["provenance"], "from_step": meta["provenance"]["from_step"] - 1}

    answer = trained.audit(trained.forged(tmp_path, meta=earlier), data)
    assert answer.code == 4
    assert "R-PROV-3" in answer.said
    assert trained.roots[-2][:12] in answer.said, "it names the link"


def test_without_provenance_it_cannot_be_audited(trained: Trained, data: Path, tmp_path: Path) -> None:
    answer = trained.audit(trained.forged(tmp_path, meta=lambda meta: meta.pop("provenance")), data)
    assert answer.code == 5, "an honest author may have been upgraded in the middle (R-PROV-5): nobody is accused"
    assert "NOT DECIDED" in answer.said and "cannot be audited" in answer.said
    assert "do not take it for reproduced" in " ".join(answer.said.split())


def test_another_recipe_or_other_rows_are_named_before_anything_is_trained(
    trained: Trained, data: Path, room: Path, tmp_path: Path
) -> None:
    def other(meta: dict[str, Any]) -> None:
        meta["provenance"] = {**meta["provenance"], "seed": 7}

    for folder in ("seed", "pictures"):
        (tmp_path / folder).mkdir()
    answer = trained.audit(trained.forged(tmp_path / "seed", meta=other), data)
    assert answer.code == 4
    assert "seed" in answer.said

    pictures = draw_folder(tmp_path / "pictures" / "drawn", seed=9)
    done(verb("prepare", pictures, tmp_path / "data", "--resolution", 12, "--workers", 1, "--json"))
    answer = trained.audit(trained.roots[-1], tmp_path / "data")
    assert answer.code == 4
    assert "not the same rows" in answer.said
