"""Training the same steps again: honest runs give the same bits, every forgery is told from rounding."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.expert.synthetic import SyntheticData, small_probe, small_recipe, small_task

from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.dht_schemas.provenance import Environment, Provenance
from paris_swarm.expert import provenance
from paris_swarm.expert.audit import (
    MARGIN,
    Comparison,
    compare,
    environment_differences,
    same_bits_expected,
    write_start,
)
from paris_swarm.expert.checkpoint import CheckpointError, read_state
from paris_swarm.expert.provenance import chip, cpu_model, environment, flushes_denormals
from paris_swarm.expert.rows import Rows, select_rows
from paris_swarm.expert.task import ExpertTask
from paris_swarm.expert.training import CheckpointReport, ResumeReport, TrainJob, train
from paris_swarm.router.task import RouterTask

FROM, TO = 12, 24
WEIGHTS = ("ema.safetensors", "model.safetensors", "optimizer.safetensors")


def task(data: SyntheticData | None = None, **changes: Any) -> ExpertTask:
    data = data or SyntheticData()
    return ExpertTask(recipe(**changes), Rows(data, select_rows(data, None, None)[:-8]), small_probe(data))


def recipe(**changes: Any) -> Any:
    return small_recipe("residual", **{"steps": 40, "optimizer": "muon", "lr": 3e-3, **changes})


def run(work: Path, what: ExpertTask, **more: Any) -> Path:
    """Trains to `TO` (or until=) and gives the last checkpoint's folder."""
    job = TrainJob(what, work, threads=1, report_every_s=1e9, **{"until": TO, "precision": "fp32", **more})
    return [report.folder for report in train(job) if isinstance(report, CheckpointReport)][-1]


class Audit:
    """A parent, its honest child, and the replays that an auditor makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parent = run(folder / "parent", task(), until=FROM)
        self.published = run(folder / "author", task(), resume=self.parent)
        self.start = folder / "start"
        write_start(self.start, task(), FROM, self.parent)
        self.replayed = run(folder / "replay", task(), resume=self.start)
        self.exact = run(folder / "exact", task(), resume=self.start, precision="fp64")

    def of(self, published: Path) -> Comparison:
        return compare(self.start, published, self.replayed, self.exact)

    def trained(self, name: str, what: ExpertTask, **more: Any) -> Path:
        """Another run from the same parent, in a folder of its own: its recipe need not be the plan's."""
        start = self.folder / f"{name}-start"
        write_start(start, what, FROM, self.parent)
        return run(self.folder / name, what, resume=start, **more)

    def changed(self, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        """The honest child with its model's tensors changed."""
        forged = self.folder / name
        forged.mkdir()
        for file in WEIGHTS:
            tensors = load_file(self.published / file)
            if file == "model.safetensors":
                change(tensors)
            save_file(tensors, forged / file)
        return forged


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    return Audit(tmp_path_factory.mktemp("audit"))


# ---- honest ----------------------------------------------------------------------------------------------------------


def test_two_honest_runs_have_the_same_root(audit: Audit) -> None:
    meta = {"step": TO, "parent": "ab" * 32}
    roots = {build_manifest(folder, WEIGHTS, "0", meta=meta)[2] for folder in (audit.published, audit.replayed)}
    assert len(roots) == 1
    found = audit.of(audit.published)
    assert found.identical and found.verdict(must_be_identical=True) == "identical"
    assert all(file.distance == 0 < file.move for file in found.files)


def test_rows_in_another_order_are_the_same_rows(audit: Audit) -> None:
    data = SyntheticData()
    shuffled = SyntheticData()
    order = np.random.default_rng(1).permutation(data.count - 8)
    order = np.concatenate([order, np.arange(data.count - 8, data.count)])
    for name in ("_pixels", "_states", "_lengths", "digests"):
        setattr(shuffled, name, getattr(data, name)[order])
    same = set(map(bytes, data.digests[:-8].tolist()))
    held_out = [bytes(row) for row in data.digests[-8:].tolist() if bytes(row) not in same]

    def of(source: SyntheticData) -> ExpertTask:
        rows = Rows(source, select_rows(source, None, None, held_out))
        return ExpertTask(recipe(), rows, small_probe(source))

    assert of(data).rows_used() == of(shuffled).rows_used()
    one, other = (run(audit.folder / name, of(source)) for name, source in (("a", data), ("b", shuffled)))
    assert compare(audit.start, one, other).identical


OTHER_CPU = """
import sys, torch
from pathlib import Path
from tests.expert.test_audit import run, task
run(Path(sys.argv[1]), task(), resume=Path(sys.argv[2]))
print(torch.backends.cpu.get_cpu_capability())
"""


def test_another_instruction_set_is_explained_by_rounding(audit: Audit) -> None:
    """torch's scalar kernels and MKL's SSE ones stand in for another machine."""
    environ = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    work = audit.folder / "other-cpu"
    code = [sys.executable, "-c", OTHER_CPU, str(work), str(audit.start)]
    said = subprocess.run(
        code, check=True, cwd=Path(__file__).parents[2], env=environ, timeout=120, capture_output=True, text=True
    ).stdout
    found = audit.of(work / "checkpoints" / f"step-{TO:08d}")
    assert found.verdict(must_be_identical=False) in ("identical", "explained")
    if said.strip() != torch.backends.cpu.get_cpu_capability():
        assert not found.identical, "other kernels round otherwise; if they do not, this test shows nothing"
        assert found.verdict(must_be_identical=True) == "unexplained", "on the same hardware it would not be believed"


def test_a_replay_goes_on_after_an_interruption(audit: Audit) -> None:
    work = audit.folder / "cut"
    job = TrainJob(task(), work, resume=audit.start, until=TO, checkpoint_every_steps=5, threads=1, precision="fp32")
    for report in train(job):
        if isinstance(report, CheckpointReport):
            break
    assert read_state(run(work, task(), resume=audit.start)).step == TO
    assert compare(audit.start, audit.published, work / "checkpoints" / f"step-{TO:08d}").identical


def test_a_chain_begins_with_the_recipes_own_weights(audit: Audit) -> None:
    start = audit.folder / "fresh"
    write_start(start, task(), 0, None)
    again = run(audit.folder / "from-fresh", task(), resume=start, until=FROM)
    assert compare(start, audit.parent, again).identical
    with pytest.raises(ValueError, match="step 3"):
        write_start(audit.folder / "no", task(), 3, None)


# ---- forged ----------------------------------------------------------------------------------------------------------


def noise(scale: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        draw = torch.Generator().manual_seed(1)
        for tensor in tensors.values():
            tensor += scale * tensor.abs().mean() * torch.randn(tensor.shape, generator=draw)

    return add


def one_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["final_layer.linear.bias"][0] += 1e-3


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3])
def test_added_noise_is_no_rounding(audit: Audit, scale: float) -> None:
    found = audit.of(audit.changed(f"noise-{scale}", noise(scale)))
    assert found.verdict(must_be_identical=False) == "unexplained"
    model = next(file for file in found.files if file.name == "model.safetensors")
    assert model.worst is not None and model.worst[0] > MARGIN


def test_noise_below_rounding_is_seen_on_the_same_hardware_only(audit: Audit) -> None:
    found = audit.of(audit.changed("noise-tiny", noise(1e-8)))
    assert not found.identical
    assert found.verdict(must_be_identical=True) == "unexplained"
    assert found.verdict(must_be_identical=False) == "explained"


def test_one_changed_number_is_named(audit: Audit) -> None:
    found = audit.of(audit.changed("one-bias", one_bias))
    assert found.verdict(must_be_identical=False) == "unexplained"
    model = next(file for file in found.files if file.name == "model.safetensors")
    assert model.worst is not None and model.worst[1] == "final_layer.linear.bias"
    assert [file.identical for file in found.files] == [True, False, True]


def other_rows() -> SyntheticData:
    """One row shows another picture: one that these steps see, for of others an audit can say nothing."""
    data = SyntheticData()
    seen = task(data).batch(FROM).rows[:1].numpy()
    data._pixels[seen] = 255 - data._pixels[seen]
    return data


def other_captions() -> SyntheticData:
    data = SyntheticData()
    data._states[:-8] = data._states[:-8][::-1].copy()
    return data


FORGERIES: dict[str, Callable[[Audit], Path]] = {
    "the parent again": lambda audit: audit.parent,
    "a step too few": lambda audit: audit.trained("short", task(), until=TO - 1),
    "another rate": lambda audit: audit.trained("rate", task(lr=3.03e-3)),
    "another seed": lambda audit: audit.trained("seed", task(seed=4)),
    "one other row": lambda audit: audit.trained("rows", task(other_rows())),
    "shuffled captions": lambda audit: audit.trained("captions", task(other_captions())),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_forgeries_are_told_from_rounding(audit: Audit, what: str) -> None:
    found = audit.of(FORGERIES[what](audit))
    assert found.verdict(must_be_identical=False) == "unexplained"
    model = next(file for file in found.files if file.name == "model.safetensors")
    assert model.noise is not None
    assert model.distance > 2 * MARGIN * model.noise, f"{what}: {model.distance / model.noise:.0f} times the noise"


def test_trained_on_the_probe_rows_it_is_judged_by(audit: Audit) -> None:
    data = SyntheticData()
    probed = ExpertTask(recipe(), Rows(data, np.arange(data.count - 8, data.count)), small_probe(data))
    start = audit.folder / "tuned-start"
    write_start(start, probed, TO, audit.published)
    tuned = run(audit.folder / "tuned", probed, resume=start, until=TO + 1)
    assert audit.of(tuned).verdict(must_be_identical=False) == "unexplained"


def test_what_another_version_of_the_code_made_accuses_nobody(audit: Audit) -> None:
    """Its sums may be others; only weights that did not move no code excuses."""
    far = audit.of(audit.changed("far", noise(1e-2)))
    assert far.verdict(must_be_identical=False, other_version=True) == "other version"
    near = audit.of(audit.changed("near", noise(1e-8)))
    assert near.verdict(must_be_identical=False, other_version=True) == "explained"
    assert audit.of(audit.published).verdict(must_be_identical=False, other_version=True) == "identical"
    parent = audit.of(audit.parent)
    assert parent.untrained
    assert parent.verdict(must_be_identical=False, other_version=True) == "unexplained"


def test_what_does_not_fit_is_refused(audit: Audit, tmp_path: Path) -> None:
    def wider(tensors: dict[str, torch.Tensor]) -> None:
        tensors["pos_embed"] = tensors["pos_embed"].repeat(1, 1, 2)

    with pytest.raises(CheckpointError, match="pos_embed"):
        audit.of(audit.changed("wider", wider))
    with pytest.raises(CheckpointError, match=r"ema\.safetensors"):
        audit.of(tmp_path)


def test_values_that_are_no_numbers_are_never_explained(audit: Audit) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["pos_embed"][0, 0, 0] = float("nan")

    assert audit.of(audit.changed("nan", poison)).verdict(must_be_identical=False) == "unexplained"


# ---- provenance ------------------------------------------------------------------------------------------------------


def test_the_trainer_says_what_a_manifest_accepts(tmp_path: Path) -> None:
    reports = train(TrainJob(small_task(), tmp_path, threads=1, precision="fp32"))
    facts = next(report.facts for report in reports if isinstance(report, CheckpointReport))
    said = Provenance.model_validate({**facts, "from_step": 0, "to_step": 8})
    assert said.rows == small_task().rows_used()
    assert (said.seed, said.recipe) == (3, small_task().recipe.digest())
    assert (said.environment.device, said.environment.threads) == ("cpu", 1)
    assert said.environment.chip == chip(torch.device("cpu"))


def resumed(work: Path, **more: Any) -> tuple[CheckpointReport, CheckpointReport]:
    """Goes on in a work folder: what the earlier run left there, and the new run's last checkpoint."""
    reports = list(train(TrainJob(task(), work, threads=1, report_every_s=1e9, precision="fp32", **more)))
    (begin,) = [report for report in reports if isinstance(report, ResumeReport)]
    assert begin.left is not None
    return begin.left, [report for report in reports if isinstance(report, CheckpointReport)][-1]


def test_what_other_code_trained_stays_told_apart_from_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer was upgraded after a checkpoint that nobody had published yet."""
    run(tmp_path, task(), until=4)
    before = provenance.package_version()
    same, later = resumed(tmp_path, until=8)
    assert (same.step, same.facts["from_step"]) == (4, 0)
    assert later.facts["from_step"] == 0, "the same code on the same machine: one piece, however often it was killed"
    monkeypatch.setattr(provenance, "package_version", lambda task=None: "9.9+000000000000")
    left, last = resumed(tmp_path, until=12)
    assert (left.step, left.folder.name) == (8, "step-00000008")
    assert left.probe_loss == read_state(left.folder).probe_loss
    assert (left.facts["from_step"], left.facts["environment"]["package"]) == (0, before)
    assert (last.facts["from_step"], last.facts["environment"]["package"]) == (8, "9.9+000000000000")


def test_a_checkpoint_that_does_not_say_who_trained_it_says_nothing(tmp_path: Path) -> None:
    """One that an older version left; and one that was fetched is told as the author of it, not as ours."""
    folder = run(tmp_path / "work", task(), until=4)
    path = folder / "state.json"
    state = json.loads(path.read_text())
    del state["facts"]
    path.write_text(json.dumps(state))
    left, last = resumed(tmp_path / "work", until=6)
    assert left.facts == {}
    assert last.facts["from_step"] == 4
    fetched = list(train(TrainJob(task(), tmp_path / "mine", resume=last.folder, until=8, threads=1, precision="fp32")))
    assert [report.left for report in fetched if isinstance(report, ResumeReport)] == [None]
    assert [report.facts["from_step"] for report in fetched if isinstance(report, CheckpointReport)] == [6]
    path.write_text(json.dumps({**state, "facts": "all mine"}))
    with pytest.raises(CheckpointError, match="facts"):
        read_state(folder)


def test_rows_are_committed_to_as_a_set() -> None:
    data = SyntheticData()
    all_rows = Rows(data, np.arange(20)).used()
    assert Rows(data, np.arange(20)[::-1].copy()).used() == all_rows
    assert Rows(data, np.arange(19)).used() != all_rows
    labels = np.zeros(20, dtype=np.int64)
    labelled = Rows(data, np.arange(20)).used(labels)
    assert labelled.digest != all_rows.digest
    labels[3] = 1
    assert Rows(data, np.arange(20)).used(labels).digest != labelled.digest


def test_environments_that_must_agree_to_the_bit() -> None:
    mine = environment(torch.device("cpu"), torch.float32)
    assert same_bits_expected(mine, mine)
    theirs = mine.model_copy(update={"threads": mine.threads + 1})
    assert environment_differences(mine, theirs) == {"threads": (str(mine.threads), str(mine.threads + 1))}
    assert not same_bits_expected(mine, theirs)
    other = mine.model_copy(update={"package": "99"})
    assert environment_differences(mine, other) == {"package": (mine.package, "99")}
    assert not same_bits_expected(mine, other), "another version of the code may add up otherwise"
    cuda = mine.model_copy(update={"device": "cuda"})
    assert not same_bits_expected(cuda, cuda), "its kernels may add in any order"
    assert same_bits_expected(*2 * (cuda.model_copy(update={"deterministic": True}),))
    compiled = mine.model_copy(update={"compiled": True})
    assert not same_bits_expected(compiled, compiled), "its kernels are the work of a compiler that nobody recorded"
    assert isinstance(mine, Environment)


def test_other_code_that_trains_is_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = provenance.package_version()
    assert said.startswith("0.") or said.startswith("unknown")
    assert len(said.partition("+")[2]) == 12
    room = tmp_path / "expert"
    shutil.copytree(Path(provenance.__file__).parent, room, ignore=shutil.ignore_patterns("data", "__pycache__"))
    monkeypatch.setattr(provenance, "__file__", str(room / "provenance.py"))
    assert provenance.package_version() == said, "the same code elsewhere"
    (room / "step.py").write_text((room / "step.py").read_text() + "\n# other sums\n")
    assert provenance.package_version() != said
    monkeypatch.undo()
    assert provenance.code_digest(small_task()) != provenance.code_digest(RouterTask.__new__(RouterTask))


def test_the_processor_is_named_by_its_kind(tmp_path: Path) -> None:
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\n\nprocessor\t: 1\n")
    assert cpu_model(listed) == "AuthenticAMD 25 1"
    listed.write_text("Hardware : something else\n")
    assert cpu_model(listed) == cpu_model(tmp_path / "missing") != ""


def test_flushing_is_seen() -> None:
    before = flushes_denormals()
    try:
        if torch.set_flush_denormal(True):
            assert flushes_denormals()
        torch.set_flush_denormal(False)
        assert not flushes_denormals()
    finally:
        torch.set_flush_denormal(before)


def test_a_successor_that_left_something_older_starts_from_what_it_fetched(tmp_path: Path) -> None:
    """Its work folder still holds step 4 of an earlier claim; the checkpoint it fetched is at step 8."""
    ahead = run(tmp_path / "other", task(), until=8)
    mine = tmp_path / "mine"
    run(mine, task(), until=4)
    reports = list(train(TrainJob(task(), mine, resume=ahead, parent="cd" * 32, until=9, threads=1)))
    saved = [report for report in reports if isinstance(report, CheckpointReport)]
    assert [(report.step, report.parent) for report in saved] == [(9, "cd" * 32)]
    assert dataclasses.asdict(read_state(saved[-1].folder))["parent"] == "cd" * 32
