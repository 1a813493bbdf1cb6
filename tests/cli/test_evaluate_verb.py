from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from swarm_processes import Answer, done, verb
from swarm_story import Story

from paris_swarm.cli.evaluating import check_rows, choose_rows
from paris_swarm.cli.exits import Usage

FEW = ("--steps", 2, "--pictures", 8, "--seeds", 2, "--strategy", "top-1", "--strategy", "oracle", "--device", "cpu")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation") / "figures"


@pytest.fixture(scope="module")
def first(story: Story, data: Path, out: Path) -> Answer:
    return done(verb("evaluate", story.model, "--data", data, "-o", out, *FEW, "--json"))


def test_every_strategy_is_measured_beside_real_pictures(first: Answer, story: Story, out: Path):
    answer = first.json
    assert (answer["pictures"], answer["held_out"]) == (8, True)
    assert answer["real_pictures"] >= 8
    assert answer["floor"]["cluster_accuracy"] == 1.0  # by construction: the same encoder chose the clusters
    assert set(answer["strategies"]) == {"top-1", "oracle"}
    for found in answer["strategies"].values():
        assert found["experts_used"] == 1.0
        assert [len(found["seeds"]), found["over_seeds"]["fid"]["count"]] == [2, 2]
        # Two steps of a hardly trained model draw nothing like the pictures it learned from.
        assert found["over_seeds"]["fid"]["mean"] > answer["floor"]["fid"]
        assert found["over_seeds"]["kid"]["mean"] > answer["floor"]["kid"]
    assert json.loads((out / "evaluation.json").read_text()) == answer
    page = (out / "evaluation.md").read_text()
    assert "| real held-out pictures |" in page and "FID-EffL0@80" in page
    assert "FID as published is absent" in page
    with Image.open(out / "pictures.png") as sheet:
        assert sheet.text["assembly"] == answer["assembly"]
        assert sheet.text["strategy"] == "real, top-1, oracle"


def test_pictures_that_were_drawn_are_kept_and_damaged_ones_drawn_again(
    first: Answer, story: Story, data: Path, out: Path
):
    kept, torn = (out / "pictures" / f"{name}-seed-0.npy" for name in ("top-1", "oracle"))
    before = kept.stat().st_mtime_ns
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")
    again = done(verb("evaluate", story.model, "--data", data, "-o", out, *FEW, "--json"))
    assert again.json == first.json
    assert kept.stat().st_mtime_ns == before
    assert torn.with_name(f"{torn.name}.corrupt-1").is_file()
    assert np.load(torn, allow_pickle=False).shape == (8, 12, 12, 3)


def test_a_strategy_that_is_none_is_refused(story: Story, data: Path, tmp_path: Path):
    refused = verb("evaluate", story.model, "--data", data, "-o", tmp_path, "--strategy", "../../top-1")
    assert refused.code == 2 and "strategy must be" in refused.err
    assert not list(tmp_path.iterdir())


def plan_of(held_out: list[bytes], **facts: Any) -> Any:
    plan = SimpleNamespace(seed=0, data=facts)
    return SimpleNamespace(
        plan_id="p" * 64,
        held_out=lambda: held_out,
        centroids=lambda: np.eye(2, dtype=np.float32),
        biases=lambda: None,
        opened=SimpleNamespace(plan=plan),
    )


class Prepared:
    """40 rows of two kinds, told apart by their features."""

    folder, resolution, count = Path("rows"), 12, 40
    digests = np.random.default_rng(0).integers(0, 256, (40, 16), dtype=np.uint8)

    def __init__(self, **more: Any) -> None:
        encoders = {part: {"name": part, "digest": "d"} for part in ("text", "features")}
        self.manifest = {**encoders, "source": {}, **more}

    def features(self) -> np.ndarray:
        return np.eye(2, dtype=np.float32)[np.arange(40) % 2]

    def captions(self, rows: np.ndarray) -> list[dict[str, Any]]:
        return [{"text": f"row {row}"} for row in rows]

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        return np.zeros((len(rows), 12, 12, 3), dtype=np.uint8)


def test_rows_that_cannot_be_compared_are_refused():
    facts = {part: {"name": part, "digest": "d"} for part in ("text", "features")}
    check_rows(plan_of([], **facts), Prepared(), 12)
    with pytest.raises(Usage, match="pictures of 12 px, this model draws 24"):
        check_rows(plan_of([], **facts), Prepared(), 24)
    with pytest.raises(Usage, match="holds latents"):
        check_rows(plan_of([], **facts), Prepared(latents={"pixels": 12}), 12)
    with pytest.raises(Usage, match="drawn by experts"):
        check_rows(plan_of([], **facts), Prepared(drawn={"plan": "p" * 64}), 12)
    with pytest.raises(Usage, match="captions of an encoder with digest d, the plan's has e"):
        check_rows(plan_of([], **{**facts, "text": {"name": "text", "digest": "e"}}), Prepared(), 12)


def test_prompts_come_from_held_out_rows_and_are_never_compared_with_themselves():
    held = [row.tobytes() for row in Prepared.digests[:6]]
    judged = choose_rows(plan_of(held), Prepared(), 5)
    assert judged.held_out and len(judged.rows) == 5 and judged.rows.max() < 6
    assert len(judged.features) == 34  # no held-out row, not even the one that gave no prompt
    assert judged.prompts.clusters.tolist() == (judged.rows % 2).tolist()
    strange = choose_rows(plan_of([b"x" * 16]), Prepared(), 100)
    assert not strange.held_out and (len(strange.rows), len(strange.features)) == (20, 20)
    with pytest.raises(Usage, match="prepare more images"):
        choose_rows(plan_of([row.tobytes() for row in Prepared.digests[:30]]), Prepared(), 30)
