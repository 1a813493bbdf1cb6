"""The log of a run: means over what was gathered, as JSON lines and as TensorBoard events."""

import json
from pathlib import Path

import pytest

from paris_swarm.cli.training_log import JsonLines, TrainingLog, open_log
from paris_swarm.expert.training import CheckpointReport, StepReport


def report(step: int, loss: float, seconds: float, rows: int = 4) -> StepReport:
    bins = ((loss, rows), (None, 0))
    return StepReport(step, 100, loss, 10.0, seconds, 0.5, bins)


def written(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def test_rows_are_means_weighted_by_steps(tmp_path: Path) -> None:
    log = TrainingLog(JsonLines(tmp_path, clock=lambda: 5.0), every_s=10.0)
    log.steps_from(10)
    log.step(report(11, 4.0, 1.0, rows=2))
    log.step(report(14, 2.0, 4.0, rows=6))
    assert written(tmp_path) == []
    log.step(report(15, 2.0, 11.0, rows=2))
    (row,) = written(tmp_path)
    assert row["step"] == 15 and row["unix_s"] == 5.0
    assert row["loss"] == pytest.approx((4.0 + 3 * 2.0 + 2.0) / 5)
    assert row["loss_by_time"] == [[pytest.approx((2 * 4.0 + 6 * 2.0 + 2 * 2.0) / 10), 10], [None, 0]]
    assert row["learning_rate_share"] == 0.5


def test_a_checkpoint_writes_what_was_gathered_before_it(tmp_path: Path) -> None:
    log = TrainingLog(JsonLines(tmp_path, clock=lambda: 0.0))
    log.step(report(3, 1.0, 1.0))
    log.checkpoint(CheckpointReport(3, 100, tmp_path, 0.25, None))
    log.close()
    assert [sorted(row) for row in written(tmp_path)][1] == ["probe_loss", "step", "unix_s"]
    again = TrainingLog(JsonLines(tmp_path, clock=lambda: 0.0))
    again.step(report(4, 1.0, 1.0))
    again.close()
    assert [row["step"] for row in written(tmp_path)] == [3, 3, 4]  # appended, nothing lost


def test_unknown_kinds_are_named(tmp_path: Path) -> None:
    assert open_log("none", tmp_path) is None
    with pytest.raises(ValueError, match="csv"):
        open_log("csv", tmp_path)


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_log("tensorboard", tmp_path)
    assert log is not None
    log.step(report(3, 1.5, 1.0))
    log.checkpoint(CheckpointReport(3, 100, tmp_path, 0.25, None))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == [
        "images_per_s", "learning_rate_share", "loss", "loss_by_time/0.0-0.5", "probe_loss"
    ]  # fmt: skip
    (loss,) = events.Scalars("loss")
    assert (loss.step, loss.value) == (3, 1.5)
    assert events.Scalars("probe_loss")[0].value == 0.25


def test_a_line_that_a_crash_cut_short_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    path.write_text('{"step": 1}\n{"st')
    writer = JsonLines(tmp_path)
    writer.write(2, {})
    writer.close()
    first, torn, last = path.read_text().splitlines()
    assert (json.loads(first)["step"], torn, json.loads(last)["step"]) == (1, '{"st', 2)
