import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.expert.synthetic import small_task

from paris_swarm.expert.checkpoint import CheckpointError
from paris_swarm.expert.training import (
    CheckpointReport,
    DoneReport,
    ResumeReport,
    StepReport,
    TornReport,
    TrainingDiverged,
    TrainJob,
    checkpoint_tables,
    pick_device,
    pick_precision,
    train,
)

WEIGHTS = ("ema.safetensors", "model.safetensors", "optimizer.safetensors")


def same_files(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in WEIGHTS)


def run(job: TrainJob) -> list[object]:
    return list(train(job))


def finished(reports: list[object]) -> DoneReport:
    assert isinstance(reports[-1], DoneReport)
    return reports[-1]


RESUME = """
import sys
from pathlib import Path
from paris_swarm.expert.training import TrainJob, train
from tests.expert.synthetic import small_task
list(train(TrainJob(small_task(optimizer=sys.argv[1], steps=8), Path(sys.argv[2]), threads=1)))
"""


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_killed_run_continues_to_the_same_bits_in_a_fresh_process(tmp_path: Path, kind: str) -> None:
    straight = finished(run(TrainJob(small_task(optimizer=kind, steps=8), tmp_path / "straight", threads=1)))
    killed = TrainJob(small_task(optimizer=kind, steps=8), tmp_path / "killed", checkpoint_every_steps=4, threads=1)
    for report in train(killed):  # walk away after the fourth step's checkpoint, as a kill would
        if isinstance(report, CheckpointReport):
            assert report.step == 4
            break
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", RESUME, kind, str(tmp_path / "killed")], check=True, cwd=root, timeout=120)
    assert same_files(straight.folder, tmp_path / "killed" / "checkpoints" / "step-00000008")


def test_a_successor_continues_from_anothers_checkpoint(tmp_path: Path) -> None:
    straight = finished(run(TrainJob(small_task(), tmp_path / "a", keep=9, checkpoint_every_steps=3)))
    middle = tmp_path / "a" / "checkpoints" / "step-00000003"
    reports = run(TrainJob(small_task(), tmp_path / "b", resume=middle, parent="cd" * 32))
    assert ResumeReport(3, middle) in reports
    assert same_files(straight.folder, finished(reports).folder)
    assert [r.parent for r in reports if isinstance(r, CheckpointReport)] == ["cd" * 32]


def test_training_learns(tmp_path: Path) -> None:
    reports = run(TrainJob(small_task("residual", steps=300, batch=16, lr=3e-3), tmp_path, report_every_s=0.0))
    steps = [r for r in reports if isinstance(r, StepReport)]
    (saved,) = [r for r in reports if isinstance(r, CheckpointReport)]
    first, last = (sum(r.loss for r in part) / 20 for part in (steps[:20], steps[-20:]))
    assert last < 0.8 * first
    assert saved.probe_loss < 0.9 * first


def test_reports_come_in_order_and_count_to_the_end(tmp_path: Path) -> None:
    reports = run(TrainJob(small_task(), tmp_path, report_every_s=0.0, checkpoint_every_steps=3))
    assert [r.step for r in reports if isinstance(r, StepReport)] == list(range(1, 9))
    assert [r.step for r in reports if isinstance(r, CheckpointReport)] == [3, 6, 8]
    assert finished(reports) == DoneReport(8, 8, tmp_path / "checkpoints" / "step-00000008", False)


def test_checkpoints_follow_the_clock_that_is_given(tmp_path: Path) -> None:
    ticks = iter(range(1000))
    reports = run(
        TrainJob(small_task(), tmp_path, checkpoint_every_s=3.0, report_every_s=1e9, clock=lambda: float(next(ticks)))
    )
    saved = [r.step for r in reports if isinstance(r, CheckpointReport)]
    assert saved[-1] == 8 and len(saved) >= 2


def test_being_asked_to_stop_leaves_a_checkpoint(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    done = finished(run(TrainJob(small_task(), tmp_path, stop=lambda: next(asked))))
    assert done.stopped and done.step == 2 and done.folder.is_dir()
    again = run(TrainJob(small_task(), tmp_path))
    assert ResumeReport(2, done.folder) in again and finished(again).step == 8


def test_a_finished_run_is_done_at_once(tmp_path: Path) -> None:
    first = finished(run(TrainJob(small_task(), tmp_path)))
    again = run(TrainJob(small_task(), tmp_path))
    assert not [r for r in again if isinstance(r, StepReport | CheckpointReport)]
    assert finished(again).folder == first.folder


def test_a_torn_checkpoint_is_reported_and_the_one_before_it_serves(tmp_path: Path) -> None:
    done = finished(run(TrainJob(small_task(), tmp_path, checkpoint_every_steps=4)))
    whole = load_file(done.folder / "ema.safetensors")
    with (done.folder / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    reports = run(TrainJob(small_task(), tmp_path))
    assert isinstance(reports[0], TornReport) and "model.safetensors" in reports[0].reason
    assert reports[0].folder.name == "step-00000008.corrupt-1"
    again = load_file(finished(reports).folder / "ema.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_anothers_recipe_is_refused(tmp_path: Path) -> None:
    done = finished(run(TrainJob(small_task(), tmp_path / "a")))
    with pytest.raises(CheckpointError, match="another recipe"):
        run(TrainJob(small_task(lr=5e-4), tmp_path / "b", resume=done.folder))


def test_divergence_is_said_and_nothing_is_saved(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged):
        run(TrainJob(small_task(lr=1e30, warmup_steps=0, grad_clip=0.0), tmp_path, report_every_s=0.0))
    assert not (tmp_path / "checkpoints").exists()


def test_bf16_trains_fp32_weights(tmp_path: Path) -> None:
    done = finished(run(TrainJob(small_task(steps=2), tmp_path, precision="bf16")))
    assert {t.dtype for t in load_file(done.folder / "model.safetensors").values()} == {torch.float32}


def test_the_plans_table_is_what_a_checkpoint_holds(tmp_path: Path) -> None:
    task = small_task(optimizer="muon")
    done = finished(run(TrainJob(task, tmp_path)))
    for name, table in checkpoint_tables(task).items():
        stored = load_file(done.folder / name)
        assert [(key, shape) for key, _, shape in table] == sorted((k, tuple(t.shape)) for k, t in stored.items())
        assert {kind for _, kind, _ in table} == {"F32"}


def test_unknown_devices_and_precisions_are_named() -> None:
    with pytest.raises(ValueError, match="tpu"):
        pick_device("tpu")
    with pytest.raises(ValueError, match="fp8"):
        pick_precision("fp8", torch.device("cpu"))
    assert pick_precision("fp32", torch.device("cpu")) is torch.float32
