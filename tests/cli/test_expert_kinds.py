"""Experts of different objectives, sizes and precisions in one plan: from `init --slot` to a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from swarm_processes import done, verb

from paris_swarm.cli.auditing import Evidence, checked_task
from paris_swarm.cli.checking import check_weights
from paris_swarm.cli.exits import Unverified, Usage
from paris_swarm.cli.plan_folder import PlanFolder, open_plan_folder
from paris_swarm.cli.tasks import build_task, expert_recipe
from paris_swarm.cli.variants import parse_slots
from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.errors import BadHeader
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import build_manifest, open_manifest
from paris_swarm.dht_schemas.provenance import Chain
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.dht_schemas.trusted import TrustedSwarm
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.training import CheckpointReport, TrainJob, train
from paris_swarm.router.folder_writing import SlotSource, write_folder

SLOTS = ("0", "1", "2", "router")
KINDS = [
    "all:hidden=48,heads=2,depth=2,precision=fp32",
    "1:objective=noise,depth=1,steps=160",
    "2:size=S/2,objective=velocity,patch=3,hidden=32,depth=2,heads=2,pooled_text=true,precision=bf16",
]


def test_slots_are_named_alone_in_ranges_or_all_together_and_the_last_word_counts() -> None:
    found = parse_slots(["all:lr=1e-3,batch=8", "0-1,3:batch=4", "3:objective=noise"], 5)
    assert found["0"] == found["1"] == {"lr": "1e-3", "batch": "4"}
    assert found["2"] == found["4"] == {"lr": "1e-3", "batch": "8"}
    assert found["3"] == {"lr": "1e-3", "batch": "4", "objective": "noise"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "SLOTS:NAME=VALUE"),
        ("0:objective", "SLOTS:NAME=VALUE"),
        ("0:objective=,size=S/2", "SLOTS:NAME=VALUE"),
        ("router:size=S/2", "--router-recipe"),
        ("3:size=S/2", "clusters 0 to 2"),
        ("2-1:size=S/2", "no slot and no range"),
        ("one:size=S/2", "no slot and no range"),
    ],
)
def test_what_cannot_be_read_is_said_with_an_example(text: str, words: str) -> None:
    with pytest.raises(Usage, match=words):
        parse_slots([text], 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1:size=huge", "tiny, S/2, B/2, XL/2"),
        ("1:objective=eps", "velocity, data, residual, noise"),
        ("1:objective=velocity,path=cosine", "model.path"),
        ("1:precision=fp8", "any, fp32, bf16"),
        ("1:channels=4", "there is no setting 'channels'"),
        ("1:depth=two", "a whole number"),
        ("1:patch=5", "does not divide"),
    ],
)
def test_init_names_the_slot_and_the_setting_that_are_wrong(data: Path, tmp_path: Path, text: str, words: str) -> None:
    answer = verb("--home", tmp_path / "home", "init", data, "-o", tmp_path / "plan", "-k", 2, "--slot", text)
    assert answer.code == 2
    assert "--slot 1" in answer.err and words in answer.said
    assert not (tmp_path / "plan").exists()


# ---- from init to a picture -----------------------------------------------------------------------------------------


@dataclass
class Mixed:
    """A plan with three kinds of experts, a trained checkpoint for every slot, and what was made of them."""

    answer: dict[str, Any]
    folder: PlanFolder
    data: Path
    reports: dict[str, CheckpointReport] = field(default_factory=dict)
    sources: dict[str, SlotSource] = field(default_factory=dict)
    model: Path = Path()


@pytest.fixture(scope="module")
def mixed(data: Path, room: Path) -> Mixed:
    torch.set_num_threads(1)
    room = room / "kinds"
    kinds = [part for kind in KINDS for part in ("--slot", kind)]
    answer = done(
        verb(
            "--home", room / "home", "init", data, "-o", room / "plan", "-k", 3, "--steps", 60, "--router-steps", 30,
            "--batch", 8, *kinds, "--json",
        )
    )  # fmt: skip
    made = Mixed(answer.json, open_plan_folder(room / "plan"), data)
    for slot in SLOTS:
        job = TrainJob(build_task(made.folder, PreparedData.open(data), slot), room / "work" / slot, device="cpu")
        report = [found for found in train(job) if isinstance(found, CheckpointReport)][-1]
        made.reports[slot] = report
        made.sources[slot] = announced(made.folder, slot, report)
    made.model = room / "model"
    write_folder(
        made.model,
        identity=Identity.generate(),
        plan=made.folder.opened,
        plan_folder=made.folder.path,
        slots=list(made.sources.values()),
        created=1,
    )
    return made


def announced(folder: PlanFolder, slot: str, report: CheckpointReport) -> SlotSource:
    author = Identity.generate()
    names = sorted(path.name for path in report.folder.iterdir())
    provenance = {**report.facts, "from_step": 0, "to_step": report.step}
    meta = {"step": report.step, "parent": None, "provenance": provenance}
    manifest, data, root = build_manifest(report.folder, names, slot, meta=meta)
    said = Announcement(
        plan=folder.plan_id,
        slot=slot,
        author=author.peer_id,
        seq=1,
        step=report.step,
        parent=None,
        root=root,
        bytes=manifest.total_bytes,
        probe_loss=report.probe_loss,
    )
    return SlotSource(said.seal(author), data, report.folder / "ema.safetensors")


def test_init_says_and_the_plan_holds_every_slot_s_kind(mixed: Mixed) -> None:
    plan = mixed.folder.opened.plan
    assert mixed.answer["experts"] == {
        "0": {"size": "48 x 2", "objective": "residual", "precision": "fp32"},
        "1": {"size": "48 x 1", "objective": "noise, cosine path", "precision": "fp32"},
        "2": {"size": "32 x 2", "objective": "velocity", "precision": "bf16"},
    }
    assert [variant.slots for variant in plan.variants] == [("1",), ("2",)]
    shapes = {
        slot: next(spec.shape for spec in plan.slot_spec(slot).files["ema.safetensors"] if spec.name == "pos_embed")
        for slot in SLOTS[:3]
    }
    assert shapes == {"0": (1, 4, 48), "1": (1, 4, 48), "2": (1, 16, 32)}
    assert {expert_recipe(plan, slot).train.seed for slot in SLOTS[:3]} == {0}
    resumable = {slot: plan.verification.bars[slot].resumable for slot in SLOTS[:3]}
    assert len(set(resumable.values())) == 3, "each slot's untrained weights, under its own objective"


def test_each_slot_was_trained_in_its_own_precision(mixed: Mixed) -> None:
    said = {slot: mixed.reports[slot].facts["environment"]["precision"] for slot in SLOTS[:3]}
    assert said == {"0": "fp32", "1": "fp32", "2": "bf16"}
    assert len({mixed.reports[slot].facts["recipe"] for slot in SLOTS[:3]}) == 3


def test_weights_of_another_slot_s_size_are_refused_by_their_header(mixed: Mixed) -> None:
    trusted = TrustedSwarm(mixed.folder.opened)
    weights = (mixed.reports["1"].folder / "ema.safetensors").read_bytes()
    header = weights[: 8 + int.from_bytes(weights[:8], "little")]
    trusted.feed_header("1", "ema.safetensors", header, len(weights))
    for slot in ("0", "2"):
        with pytest.raises(BadHeader):
            trusted.feed_header(slot, "ema.safetensors", header, len(weights))


def test_every_checkpoint_beats_the_bars_of_its_own_slot(mixed: Mixed) -> None:
    for slot in SLOTS:
        announcement = Announcement.open(mixed.sources[slot].announcement).record
        for purpose in ("resume", "assemble"):
            loss = check_weights(mixed.folder, slot, mixed.reports[slot].folder, announcement, purpose)  # type: ignore[arg-type]
            assert loss == pytest.approx(mixed.reports[slot].probe_loss, rel=1e-6)


def test_the_bars_of_every_kind_can_be_computed_again(mixed: Mixed) -> None:
    found = done(verb("verify", mixed.folder.path, "--probe", "--data", mixed.data, "--json")).json["baselines"]
    assert found["problems"] == []
    assert {bar["slot"] for bar in found["bars"] if bar["bar"] == "sealed resumable"} == set(SLOTS)


def test_the_folder_verifies_says_what_each_expert_is_and_draws(mixed: Mixed, tmp_path: Path) -> None:
    report = done(verb("verify", mixed.model, "--probe", "--json")).json
    assert report["ok"] is True
    configs = [json.loads((mixed.model / f"experts/expert_{k}/config.json").read_bytes()) for k in range(3)]
    assert [config["prediction_type"] for config in configs] == ["residual", "noise", "velocity"]
    assert [config["precision"] for config in configs] == ["fp32", "fp32", "bf16"]
    assert "cosine" in configs[1]["trained_on"] and "cosine" not in configs[0]["trained_on"]
    card = (mixed.model / "README.md").read_text()
    assert "Kinds of experts" in card
    count = sum(tensor.numel() for tensor in load_file(mixed.reports["1"].folder / "ema.safetensors").values())
    assert "| 1 | eps |" in card and f"| 48 | 1 | 6 | {count:,} |" in card
    drawn = done(
        verb("sample", mixed.model, "--prompt", "a flag, red above blue", "--strategy", "full", "--steps", 6, "-n", 2,
             "-o", tmp_path / "grid.png", "--json")
    ).json  # fmt: skip
    assert all(share > 0 for share in drawn["shares"][0]), "every kind had a part in the picture"


def test_diffusers_draws_the_same_from_the_mixed_folder(mixed: Mixed) -> None:
    pytest.importorskip("diffusers")
    from paris_swarm.router.folder import open_folder
    from paris_swarm.router.pipeline_code.components import DDMExperts

    experts = DDMExperts.from_pretrained(mixed.model / "experts")
    ours = open_folder(mixed.model).ensemble
    shape = (3, 3, 12, 12)
    x, t = torch.randn(shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0.99, 0.5, 0.02])
    states, mask = torch.randn(3, 4, 384, generator=torch.Generator().manual_seed(2)), torch.ones(3, 4).bool()
    with torch.inference_mode():
        for k in range(3):
            torch.testing.assert_close(experts(k, x, t, states, mask), ours.expert(k)(x, t, states, mask))


def test_the_released_layout_has_no_words_for_such_experts(mixed: Mixed, tmp_path: Path) -> None:
    answer = verb("export", mixed.model, tmp_path / "paris", "--paris")
    assert answer.code == 2
    assert "output=noise" in answer.said and "path=cosine" in answer.said
    done(verb("export", mixed.model, tmp_path / "paris", "--paris", "--extended"))
    done(verb("import", tmp_path / "paris", "-o", tmp_path / "back"))


def test_an_audit_asks_for_the_precision_of_the_plan(mixed: Mixed) -> None:
    def evidence(precision: str) -> Evidence:
        source = mixed.sources["2"]
        plain = json.loads(source.manifest)
        plain["meta"]["provenance"]["environment"]["precision"] = precision
        blob = canonical_json(plain)
        manifest = open_manifest(blob, blake3_hex(blob), cap_bytes=1 << 40)
        return Evidence(blake3_hex(blob), manifest, mixed.reports["2"].folder, None, Chain((), None), None, ())

    prepared = PreparedData.open(mixed.data)
    task = checked_task(mixed.folder, prepared, evidence("bf16"))
    assert task.recipe.digest() == mixed.reports["2"].facts["recipe"]
    with pytest.raises(Unverified, match="trained in fp32, the plan asks for bf16 in slot 2"):
        checked_task(mixed.folder, prepared, evidence("fp32"))
