"""A run that is killed goes on where it was, and comes to the very bytes of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.expert_data.plain_encoders import MeanColour, WordEncoder, picture
from tests.expert_data.test_prepare import contents

from paris_swarm.expert.data.prepare import PrepareReport, prepare
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.data.sources import PrepareError
from paris_swarm.expert.data.unfinished import UnfinishedFolder

EXTRA = (
    {"file_name": "gone.png", "text": "x"},
    {"file_name": "twin.png", "text": "picture number 1"},
    {"file_name": "0.png", "text": "named twice"},
)
KILLED = -signal.SIGKILL


def run(folder: Path, out: Path, **options: object) -> PrepareReport:
    encoders = {"text_encoder": WordEncoder(), "feature_encoder": MeanColour()}
    return prepare(folder, out, resolution=16, shard_rows=4, **encoders, **options)


def killed_at(moment: int, folder: Path, out: Path) -> int:
    """The exit code of `run` in a process that kills itself at its n-th touch of the files beside and below ``out``."""
    child = os.fork()
    if child == 0:
        left = [moment]

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            touches = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
            if touches and str(out.parent) in str(arguments[0]) + str(arguments[1:]):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        code = 1
        try:
            run(folder, out)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def source(photo_folder: Callable[..., Path]) -> Path:
    folder = photo_folder(14, extra=EXTRA)
    picture(1).save(folder / "twin.png")
    return folder


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments_the_result_is_the_same(source: Path, tmp_path: Path, seed: int) -> None:
    whole = contents(run(source, tmp_path / "whole" / "data").folder)
    out = tmp_path / "killed" / "data"
    out.parent.mkdir()
    if seed % 2:  # over a previous output, which must not be lost
        run(source, out, count=3)
    dice = random.Random(seed)
    kept, deaths, before = -1, 0, contents(out) if out.exists() else {}
    for _ in range(60):
        code = killed_at(dice.randrange(1, 60), source, out)
        deaths += code == KILLED
        assert code in (0, KILLED)
        records = list(out.parent.glob(".data.*.partial/shard-*.json"))
        done = list(out.parent.glob(".data.*.partial/manifest.json")) or (out.exists() and contents(out) == whole)
        assert len(records) >= kept or done  # records go once the folder is whole
        kept = len(records)
        if code == 0:
            break
        if seed % 2 and out.exists():
            assert contents(out) in (before, whole)
    assert deaths >= 3
    assert code == 0
    assert contents(out) == whole
    assert [path.name for path in out.parent.iterdir()] == ["data"]


def test_a_run_killed_ever_later_over_a_previous_output_ends_whole(source: Path, tmp_path: Path) -> None:
    whole = contents(run(source, tmp_path / "whole" / "data").folder)
    out = tmp_path / "killed" / "data"
    out.parent.mkdir()
    run(source, out, count=3)
    moment = 0
    while (code := killed_at(moment := moment + 1, source, out)) == KILLED:
        assert moment < 400
    assert code == 0
    assert contents(out) == whole
    assert [path.name for path in out.parent.iterdir()] == ["data"]


def test_finished_shards_are_not_done_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    calls: list[int] = []

    class Dying(MeanColour):
        def encode(self, images):
            calls.append(len(images))
            if len(calls) == 3:
                raise OSError(28, "No space left on device")
            return super().encode(images)

    encoders = {"text_encoder": WordEncoder(), "feature_encoder": Dying()}
    with pytest.raises(OSError, match="No space"):
        prepare(source, out, resolution=16, shard_rows=4, **encoders)
    assert not out.exists()
    report = prepare(source, out, resolution=16, shard_rows=4, **encoders)
    assert report.resumed == 2
    assert calls == [4, 4, 4, 4, 3]  # the third shard twice; the last has 14 - 12 pictures and the twin
    assert contents(out) == contents(run(source, tmp_path / "whole").folder)


def test_a_run_with_other_settings_is_another_run(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    while killed_at(40, source, out) != KILLED:
        pass
    [unfinished] = tmp_path.glob(".data.*.partial")
    report = prepare(source, out, resolution=8, shard_rows=4, text_encoder=WordEncoder(), feature_encoder=MeanColour())
    assert (report.resumed, report.unfinished) == (0, (unfinished,))
    assert PreparedData.open(out).resolution == 8
    assert run(source, out).resumed > 0
    assert not unfinished.exists()


def test_a_damaged_record_costs_its_shard_and_nothing_else(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    while killed_at(60, source, out) != KILLED:
        pass
    records = sorted(tmp_path.glob(".data.*.partial/shard-*.json"))
    assert len(records) >= 2
    records[1].write_text(records[1].read_text()[:-9])
    assert run(source, out).resumed == 1
    assert contents(out) == contents(run(source, tmp_path / "whole").folder)


def test_two_runs_at_once_do_not_share_a_folder(source: Path, tmp_path: Path) -> None:
    first, second, other = (UnfinishedFolder(tmp_path / "data", {"a": value}) for value in (1, 1, 2))
    first.take()
    with pytest.raises(PrepareError, match="another prepare"):
        second.take()
    second.leave()
    assert first.path.is_dir(), "a run that was refused leaves the other's folder alone"
    other.take()
    other.leave()
    first.leave()
    second.take()
    second.leave()
    assert not list(tmp_path.glob(".data*"))


@pytest.mark.parametrize("cut_in", ["atomic_write_json", "blake3_hex", "UnfinishedFolder._read_records"])
def test_a_run_that_is_cut_short_while_it_takes_its_folder_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_in: str
) -> None:
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"paris_swarm.expert.data.unfinished.{cut_in}", cut)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out" / "data")
    assert not list(tmp_path.glob("out/.data*"))


def test_skipped_rows_are_counted_and_the_first_are_named(
    photo_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paris_swarm.expert.data.prepare.MAX_NAMED", 5)
    folder = photo_folder(3, extra=tuple({"file_name": f"gone-{k}.png", "text": "x"} for k in range(30)))
    report = run(folder, tmp_path / "data")
    assert report.skipped_count == 30
    assert [item.file for item in report.skipped] == [f"gone-{k}.png" for k in range(5)]
    manifest = json.loads((report.folder / "manifest.json").read_text())
    assert (manifest["skipped_count"], len(manifest["skipped"])) == (30, 5)
    with pytest.raises(PrepareError, match=r"gone-0\.png: does not exist; repair it, or run without --strict"):
        run(folder, tmp_path / "strict", strict=True)


def test_a_count_holds_for_usable_rows_across_shards(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "data", count=10).count == 10
    assert run(source, tmp_path / "more", count=99).count == 14


def test_what_a_person_put_at_the_output_meanwhile_is_not_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def meanwhile(stage: str, done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("mine")

    with pytest.raises(PrepareError, match="choose another OUT"):
        run(source, out, on_progress=meanwhile)
    assert (out / "thesis.txt").read_text() == "mine"
    (out / "thesis.txt").unlink()
    assert run(source, out).resumed > 0
