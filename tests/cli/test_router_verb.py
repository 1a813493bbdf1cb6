"""`router report` and `router rows`: figures of a router, and one made from the experts alone, then audited."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from swarm_processes import Answer

from paris_swarm.cli.app import run
from paris_swarm.cli.plan_folder import PlanFolder, open_plan_folder
from paris_swarm.cli.probing import own_rows
from paris_swarm.cli.tasks import build_task
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.training import CheckpointReport, TrainJob, train
from paris_swarm.router.calibration import REPORT_TIMES
from paris_swarm.router.folder_writing import SlotSource, write_folder
from paris_swarm.router.png import read_text
from paris_swarm.router.verify import verify_folder
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.store import ContentStore


@dataclass
class Swarm:
    """A plan, the organiser's data, and sealed checkpoints by slot; ``experts`` is a folder without a router."""

    plan: PlanFolder
    data: Path
    room: Path
    sources: dict[str, SlotSource] = field(default_factory=dict)
    reports: dict[str, list[CheckpointReport]] = field(default_factory=dict)

    def train(self, slot: str, data: Path, name: str) -> str:
        """Train a slot with two checkpoints and announce the last; gives its root. The manifests say what was done."""
        job = TrainJob(
            build_task(self.plan, PreparedData.open(data), slot),
            self.room / name,
            device="cpu",
            precision="fp32",
            threads=1,
            checkpoint_every_steps=12,
        )
        found = [report for report in train(job) if isinstance(report, CheckpointReport)]
        author, parent, root = Identity.generate(), None, ""
        store = ContentStore(self.home.store_path)
        before = 0
        for report in found:
            names = sorted(path.name for path in report.folder.iterdir())
            provenance = {**report.facts, "from_step": before, "to_step": report.step}
            meta = {"step": report.step, "parent": parent, "provenance": provenance}
            manifest, blob, root = build_manifest(report.folder, names, slot, meta=meta)
            store.put_folder(blob, report.folder)
            announcement = Announcement(
                plan=self.plan.plan_id,
                slot=slot,
                author=author.peer_id,
                seq=report.step,
                step=report.step,
                parent=parent,
                root=root,
                bytes=manifest.total_bytes,
                probe_loss=report.probe_loss,
            )
            self.sources[slot] = SlotSource(announcement.seal(author), blob, report.folder / "ema.safetensors")
            parent, before = root, report.step
        return root

    @property
    def home(self) -> Home:
        return Home(self.room / "home")

    def assembled(self, name: str, *slots: str) -> Path:
        write_folder(
            self.room / name,
            identity=Identity.generate(),
            plan=self.plan.opened,
            plan_folder=self.plan.path,
            slots=[self.sources[slot] for slot in slots],
            created=1,
        )
        return self.room / name


@pytest.fixture(scope="module")
def swarm(plan: Answer, data: Path, room: Path) -> Swarm:
    torch.set_num_threads(1)
    made = Swarm(open_plan_folder(room / "plan"), data, room / "router-verb")
    for slot in ("0", "1"):
        made.train(slot, data, f"expert-{slot}")
    made.assembled("experts", "0", "1")
    return made


@pytest.fixture(scope="module")
def rows(swarm: Swarm) -> Path:
    """Rows drawn by the two experts."""
    out = swarm.room / "rows"
    code = run(
        ["router", "rows", str(swarm.room / "experts"), "-o", str(out), "--count", "64", "--steps", "4", "--json"]
    )
    assert code == 0
    return out


@pytest.fixture(scope="module")
def root(swarm: Swarm, rows: Path) -> str:
    """Of a router that was trained on them."""
    return swarm.train("router", rows, "router")


@pytest.fixture(scope="module")
def model(swarm: Swarm, root: str) -> Path:
    return swarm.assembled("model", "0", "1", "router")


def asked(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON answer (empty without one) and what was said to people."""
    capsys.readouterr()
    code = run([str(part) for part in arguments])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out.startswith("{") else {}, " ".join((out + err).split())


def test_without_a_router_a_person_is_told_how_to_make_one(swarm: Swarm, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = asked(capsys, "router", "report", swarm.room / "experts")
    assert code == 2
    assert "paris-swarm router rows" in said


def test_every_row_bears_the_mark_of_its_expert(swarm: Swarm, rows: Path) -> None:
    data = PreparedData.open(rows, verify=True)
    note = data.manifest["drawn"]
    sizes = swarm.plan.opened.plan.data["partition"]["sizes"]
    assert note["counts"] == [round(64 * size / sum(sizes)) for size in sizes]
    assert note["plan"] == swarm.plan.plan_id
    announced = {slot: Announcement.open(swarm.sources[slot].announcement).record.root for slot in ("0", "1")}
    assert note["experts"] == announced


def test_drawn_rows_train_this_plans_router_and_nothing_else(swarm: Swarm, rows: Path) -> None:
    drawn = PreparedData.open(rows)
    for refused in (lambda: build_task(swarm.plan, drawn, "0"), lambda: own_rows(swarm.plan, drawn)):
        with pytest.raises(ValueError, match="--claim-router"):
            refused()
    task = build_task(swarm.plan, drawn, "router")
    assert task.rows_used().model_dump()["drawn_by"] == drawn.manifest["drawn"]["experts"]
    assert np.bincount(task.batch(0).labels, minlength=2).min() > 0


def test_rows_of_another_plan_are_refused(swarm: Swarm, rows: Path, tmp_path: Path) -> None:
    shutil.copytree(rows, tmp_path / "rows")
    manifest = json.loads((rows / "manifest.json").read_text())
    manifest["drawn"]["plan"] = "f" * 64
    (tmp_path / "rows" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="f" * 12):
        build_task(swarm.plan, PreparedData.open(tmp_path / "rows"), "router")


def test_rows_need_every_expert(swarm: Swarm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lonely = swarm.assembled("lonely", "1")
    code, _, said = asked(capsys, "router", "rows", lonely, "-o", tmp_path / "rows")
    assert code == 5
    assert "expert 0 is missing" in said
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize("lacking", ["text", "features", "resolution", "channels"])
def test_rows_of_a_plan_that_says_too_little_are_refused_before_any_is_drawn(
    swarm: Swarm, lacking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = verify_folder(swarm.room / "experts")
    signed = verified.plan.plan
    data = {name: value for name, value in signed.data.items() if name != lacking}
    plan = replace(verified.plan, plan=signed.model_copy(update={"data": data}))
    monkeypatch.setattr("paris_swarm.router.verify.verify_folder", lambda *_, **__: replace(verified, plan=plan))
    code, _, said = asked(capsys, "router", "rows", swarm.room / "experts", "-o", tmp_path / "none", "--count", 64)
    assert code == 2
    assert "the plan does not say" in said and f"data.{lacking}" in said
    assert not list(tmp_path.iterdir())


def test_a_router_of_drawn_rows_is_audited_bit_for_bit(
    swarm: Swarm, rows: Path, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Like an expert's checkpoint: chain, rows, seed, recipe, and the steps since the parent trained again."""
    kept = swarm.home.swarm(swarm.plan.plan_id).plan_path
    shutil.copytree(swarm.plan.path, kept, dirs_exist_ok=True)
    common = ("audit", root, f"paris:{swarm.plan.plan_id}", "--home", swarm.home.path, "--offline", "--json")
    code, answer, said = asked(capsys, *common, "--data", rows)
    assert code == 0, said
    assert (answer["slot"], answer["verdict"]) == ("router", "identical")
    assert (answer["from_step"], answer["to_step"]) == (12, 24)
    code, _, said = asked(capsys, *common, "--data", swarm.data)
    assert code == 4
    assert "not the same rows" in said


def test_a_report_says_accuracy_and_calibration_with_and_without_captions(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer, said = asked(capsys, "router", "report", model, "--picture", tmp_path / "router.png", "--json")
    assert code == 0, said
    assert answer["rows"]["kind"] == "open"
    assert set(answer["reports"]) == {"own", "null"}
    for report in answer["reports"].values():
        assert [t for t, _ in report["by_time"]] == list(REPORT_TIMES)
        for figures in [report["overall"], *(found for _, found in report["by_time"])]:
            assert 0 <= figures["ece"] <= 1 and 0 <= figures["accuracy"] <= 1
            assert sum(part["count"] for part in figures["bins"]) == figures["count"]
    assert read_text(tmp_path / "router.png") == {}


def test_people_get_a_table_and_may_bring_rows_of_their_own(
    swarm: Swarm, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = asked(capsys, "router", "report", model, "--probe", swarm.data)
    assert code == 0, said
    for word in ("accuracy", "ECE", "cross-entropy", "1.00", "all", "own"):
        assert word in said
    code, _, said = asked(capsys, "router", "report", model, "--probe", swarm.data, "--sealed", "x")
    assert code == 2
