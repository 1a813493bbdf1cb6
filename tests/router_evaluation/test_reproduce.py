"""`benchmarks/reproduce.py`: both sides pay the same, and what is done is never done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FACTS = {"channels": 3, "text": {"dim": 384, "tokens": 30}}


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("name", ["small", "toy"])
def test_every_arm_of_a_seed_has_the_same_training_flops(name):
    from reproduce_grid import SCALES, training_flops

    scale = SCALES[name]
    dense = scale.dense_recipe(0, FACTS)
    for clusters in scale.clusters:
        expert, router = scale.expert_recipe(clusters, 0, FACTS), scale.router_recipe(clusters, 0, FACTS)
        assert expert.train.batch * clusters == dense.train.batch
        same = {"batch": 1, "steps": 1, "lr": 1.0, "matrix_lr": 1.0}  # each side has the rates that suit it best
        assert (expert.model, replace(expert.train, **same)) == (dense.model, replace(dense.train, **same))
        assert expert.train.lr / scale.expert_rates == dense.train.lr / scale.dense_rates == scale.train.lr
        whole = clusters * training_flops(expert) + training_flops(router)
        one_step = training_flops(dense) / dense.train.steps
        assert abs(training_flops(dense) - whole) <= 0.51 * one_step


def test_flops_are_those_of_the_matrix_products():
    from reproduce_grid import forward_flops

    from paris_swarm.expert.recipe import ModelConfig

    small = ModelConfig(
        resolution=8, patch=4, hidden=16, depth=1, heads=1, text_dim=8, text_tokens=5, pooled_text=False
    )
    n, d, tokens = 4, 16, 5
    attention = 2 * (4 * n * d * d + 2 * n * n * d)
    cross = 2 * (2 * n * d * d + 2 * tokens * d * d + 2 * n * tokens * d)
    mlp = 2 * (8 * n * d * d)
    ends = 2 * (n * 48 * d + n * d * 48 + tokens * 8 * d + 256 * d + d * d + d * 6 * d)
    assert forward_flops(small) == attention + cross + mlp + ends


def test_words_follow_the_interval_of_the_difference():
    from reproduce_report import difference, word

    def cell(fid: float) -> dict:
        distances = {"fid": fid, "kid": 0.0, "kid_deviation": 0.0, "precision": 0.0, "recall": 0.0}
        measures = {"distances": distances, "cluster_accuracy": 1.0, "attribute_accuracy": None}
        other = ("held_out_loss", "step_flops", "experts_used", "training_flops")
        return {"measures": measures, **dict.fromkeys(other, 1.0)}

    low = {seed: cell(10.0 + seed) for seed in range(3)}
    high = {seed: cell(20.0 + seed) for seed in range(1, 5)}
    found = difference(low, high, "fid")
    assert (found.mean, found.half, found.count) == (-10.0, 0.0, 2)
    assert [word(found, expected) for expected in (-1, 1, 0)] == ["agrees", "contradicts", "lower"]
    assert word(difference(low, {0: cell(10.0), 1: cell(12.0)}, "fid"), -1) == "not decided"
    assert word(difference(low, {7: cell(1.0)}, "fid"), -1) == "empty"
    assert difference(low, high, "attribute_accuracy") is None


def test_a_page_of_other_data_says_what_they_cannot_show(tmp_path):
    from reproduce_grid import SCALES
    from reproduce_report import tables

    distances = {"fid": 1.0, "kid": 0.0, "kid_deviation": 0.0, "precision": 1.0, "recall": 1.0}
    floor = {"distances": distances, "cluster_accuracy": 1.0, "attribute_accuracy": None}
    (tmp_path / "floor.json").write_text(json.dumps(floor))
    said = {"folder": str(tmp_path / "gone"), "count": 1730, "source": "imagefolder (emoji)"}
    (tmp_path / "data.json").write_text(json.dumps(said))
    text = tables(SCALES["toy"], tmp_path, tmp_path / "page.md")
    assert "1730 imagefolder (emoji) pictures of 8 px, 16 of them held out" in text
    assert "that column is empty" in text
    real = next(line for line in text.splitlines() if line.startswith("| real held-out pictures"))
    assert real.split("|")[9].strip() == "-" and real.split("|")[8].strip() == "1.00"
    assert not (tmp_path / "page.png").exists()


def test_what_was_written_by_hand_stays_and_an_unfinished_seed_is_said(tmp_path):
    from reproduce_grid import SCALES, Cell, arms
    from reproduce_report import MARK, write_report

    scale, page = SCALES["toy"], tmp_path / "page.md"
    measures = {"distances": {"fid": 1.0, "kid": 0.0}, "cluster_accuracy": 1.0, "attribute_accuracy": 1.0}
    cell = {"measures": measures, "held_out_loss": 1.0, "step_flops": 1.0, "experts_used": 1.0, "training_flops": 1.0}
    dense = Cell(arms(scale)[0], 1, "top-1")
    dense.done(tmp_path).parent.mkdir()
    dense.done(tmp_path).write_text(json.dumps({**cell, "settings": scale.digest()}))
    page.write_text("# By hand\n\nNothing marks this page.\n")
    for _ in range(2):
        write_report(scale, tmp_path, page)
        text = page.read_text()
        assert text.startswith(f"# By hand\n\nNothing marks this page.\n\n{MARK}\n")
        assert text.count(MARK) == 1
    empty = text.partition("### Empty cells")[2].split("\n\n")[1].splitlines()
    assert empty[0] == "Seed 0: all of it."
    assert "encoder-2 full" in empty[1] and "dense" not in empty[1]


@pytest.mark.slow
def test_toy_grid_stops_resumes_and_writes_its_page(tmp_path):
    out, page = tmp_path / "out", tmp_path / "page.md"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*more: object) -> str:
        command = [sys.executable, BENCHMARKS / "reproduce.py", out, "--scale", "toy", "--workers", "2", *more]
        return subprocess.run(
            list(map(str, command)), env=environment, check=True, capture_output=True, text=True
        ).stdout

    run("--report", page)  # before anything is done: every cell is said to be empty
    assert "Seed 1: all of it." in page.read_text().partition("### Empty cells")[2]
    assert "0 of 24" in run("--budget-minutes", 0)
    assert "24 of 24" in run()
    cells = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert len(cells) == 10
    next(iter(cells)).unlink()
    assert "24 of 24" in run()
    again = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert sum(cells[path] != again[path] for path in cells) == 1
    trained = [json.loads(path.read_text()) for path in (out / "parts").rglob("done.json")]
    assert {part["steps"] for part in trained} == {4, 5}  # the dense model takes one more for the router
    page.write_text(page.read_text().replace("# The claim, reproduced", "# By hand"))
    run("--report", page)
    text = page.read_text()
    assert text.startswith("# By hand") and "None of this scale." in text and "| real held-out pictures |" in text
    assert page.with_suffix(".png").is_file()
