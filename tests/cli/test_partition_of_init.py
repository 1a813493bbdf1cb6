"""`init --partition`: controls whose rule a peer can follow, and the report for the organiser."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from swarm_processes import done, verb
from swarm_story import TINY

from paris_swarm.cli.own_cluster import wanted_rows
from paris_swarm.cli.partitioning import check_report_folder, find_partition
from paris_swarm.cli.plan_folder import open_plan_folder
from paris_swarm.cli.probing import bars_on, open_half, own_rows
from paris_swarm.cli.row_labels import all_captions, router_allowance, row_labels
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.swarm.home import Home


def test_random_shards_are_found_again_by_any_peer(data: Path, room: Path, tmp_path: Path) -> None:
    said = done(
        verb("--home", room / "organiser", "init", data, "-o", tmp_path / "plan", *TINY, "--partition", "random",
             "--report", tmp_path / "told", "--json")
    ).json  # fmt: skip
    prepared = PreparedData.open(data)
    folder = open_plan_folder(tmp_path / "plan")
    labels = row_labels(folder, prepared)
    assert said["partition"]["sizes"] == np.bincount(labels).tolist()
    assert said["partition"]["method"] == folder.opened.plan.data["partition"]["method"] == "random"
    _, only, *_ = wanted_rows(Home(tmp_path / "home"), str(tmp_path / "plan"), 1, None)
    assert only is not None
    some = np.arange(0, prepared.count, 3)
    kept = only.keeps(prepared.features()[some], prepared.digests[some], prepared.captions(some))
    np.testing.assert_array_equal(kept, labels[some] == 1)
    bars = folder.opened.plan.verification.bars["router"]
    assert bars.assemblable > np.log(2)  # nothing tells random shards apart: saying the prior must do
    own = bars_on(folder, own_rows(folder, prepared), open_half(folder))["router"]
    assert own.assemblable > np.log(2) and own.resumable > np.log(2)  # on rows of one's own just as well
    assert router_allowance({"partition": {"method": "clusters"}}) == router_allowance({}) == 1
    files = {path.name for path in (tmp_path / "told").iterdir()}
    assert files == {"index.html", "clusters.json", "cluster-0.png", "cluster-1.png"}
    assert json.loads((tmp_path / "told" / "clusters.json").read_text())["sizes"] == said["partition"]["sizes"]
    assert not {"index.html"} & {entry.name for entry in folder.opened.plan.files}


def test_what_cannot_be_is_refused_before_any_work(data: Path, tmp_path: Path) -> None:
    prepared = PreparedData.open(data)
    for options, words in (
        ({"method": "magic"}, "must be one of"),
        ({"method": "random", "balance": 1.2}, "leave it out"),
        ({"method": "class", "class_key": "no such field"}, "has no 'no such field'"),
    ):
        with pytest.raises(ValueError, match=words):
            find_partition(prepared, 2, seed=0, **options)  # type: ignore[arg-type]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="other things"):
        check_report_folder(tmp_path / "mine")
    check_report_folder(tmp_path / "nothing yet")


def test_what_lies_beside_an_earlier_report_is_never_removed(tmp_path: Path) -> None:
    report = tmp_path / "report"
    report.mkdir()
    for name in ("index.html", "clusters.json", "cluster-0.png", "cluster-11.png"):
        (report / name).write_text("{}")
    check_report_folder(report)
    (report / "cluster-notes.txt").write_text("dear diary")
    with pytest.raises(ValueError, match=r"cluster-notes\.txt"):
        check_report_folder(report)


def test_captions_are_read_shard_by_shard_whatever_their_sizes(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "rows")
    manifest = json.loads((data / "manifest.json").read_text())
    del manifest["shard_rows"]  # the sizes of the shards say it all
    (tmp_path / "rows" / "manifest.json").write_text(json.dumps(manifest))
    prepared = PreparedData.open(tmp_path / "rows")
    assert list(all_captions(prepared)) == prepared.captions(range(prepared.count))


def test_a_plan_is_not_made_of_rows_that_experts_drew(data: Path, room: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "rows")
    manifest = json.loads((data / "manifest.json").read_text())
    (tmp_path / "rows" / "manifest.json").write_text(json.dumps({**manifest, "drawn": {"plan": "f" * 64}}))
    init = ("--home", room / "organiser", "init", tmp_path / "rows", "-o", tmp_path / "plan", *TINY)
    refused = verb(*init)
    assert refused.code == 2 and "drawn by the experts" in " ".join(refused.err.split())
    inside = verb(*init[:3], data, *init[4:], "--report", tmp_path / "plan" / "report")
    assert inside.code == 2 and "lies in the plan's folder" in " ".join(inside.err.split())
    assert {path.name for path in tmp_path.iterdir()} == {"rows"}
