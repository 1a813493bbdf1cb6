"""Preparing on Ray: what a worker does, and a Ray of two processes coming to the bytes of one run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.expert_data.plain_encoders import MeanColour, WordEncoder
from tests.expert_data.test_prepare import contents

from paris_swarm.expert.data.on_ray import PartMaker, RayOptions, prepare_on_ray
from paris_swarm.expert.data.parts import merge
from paris_swarm.expert.data.prepare import prepare
from paris_swarm.expert.data.shard_maker import OnlyRows
from paris_swarm.expert.data.sources import PrepareError

OPTIONS = {"resolution": 16, "shard_rows": 4}


def tiny_encoders() -> tuple[WordEncoder, MeanColour, None]:
    return WordEncoder(), MeanColour(), None


def no_encoders() -> tuple[WordEncoder, MeanColour, None]:
    raise AssertionError("loaded although there was nothing to encode")


def one_run(source: Path, out: Path, **options: object) -> dict[str, bytes]:
    text, features, _ = tiny_encoders()
    return contents(prepare(source, out, text_encoder=text, feature_encoder=features, **OPTIONS, **options).folder)


# ---- a worker, without Ray ------------------------------------------------------------------------------------------


def test_a_worker_makes_parts_that_join_to_one_run_and_makes_none_twice(photo_folder, tmp_path: Path) -> None:
    source = photo_folder(22, extra=({"file_name": "gone.png", "text": "x"},))
    (tmp_path / "parts").mkdir()
    worker = PartMaker(str(source), str(tmp_path / "parts"), 3, tiny_encoders, OPTIONS)
    for number in (2, 0, 1):
        assert worker({"id": [number]}) == {"part": [number + 1], "why": [""]}
    again = PartMaker(str(source), str(tmp_path / "parts"), 3, no_encoders, OPTIONS)
    assert again({"id": [1]}) == {"part": [2], "why": [""]}
    joined = merge(tmp_path / "parts", tmp_path / "joined")
    assert contents(joined.folder) == one_run(source, tmp_path / "one")


def test_a_worker_answers_with_a_sentence_what_will_not_pass(photo_folder, tmp_path: Path) -> None:
    source = photo_folder(8, extra=({"file_name": "gone.png", "text": "x"},))
    nowhere = PartMaker(str(source), str(tmp_path / "nowhere"), 2, no_encoders, OPTIONS)
    assert "where every machine of the cluster sees them" in nowhere({"id": [0]})["why"][0]
    (tmp_path / "parts").mkdir()
    strict = PartMaker(str(source), str(tmp_path / "parts"), 2, tiny_encoders, OPTIONS | {"strict": True})
    assert "gone.png" in strict({"id": [1]})["why"][0]


def test_without_ray_the_extra_is_named_and_nothing_is_left(photo_folder, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    with pytest.raises(PrepareError, match=r"pip install 'paris-swarm\[ray\]'"):
        prepare_on_ray(photo_folder(), tmp_path / "out", tiny_encoders, RayOptions(), **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    with pytest.raises(PrepareError, match="at least 1"):
        RayOptions(parts=0)
    with pytest.raises(PrepareError, match="leave the count out"):
        prepare_on_ray(photo_folder, tmp_path / "out", tiny_encoders, RayOptions(), count=10, **OPTIONS)


# ---- two processes of Ray -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_of_ray_make_what_one_run_makes(photo_folder, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # read when ray is imported
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # the workers import the tests' encoders
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    source = photo_folder(22, extra=({"file_name": "gone.png", "text": "x"},))
    where, seen = RayOptions(parts=3), []

    def make_encoders() -> tuple[WordEncoder, MeanColour, None]:
        return WordEncoder(), MeanColour(), None

    def run(out: str, **options: object):
        told = lambda stage, done, total: seen.append((stage, done, total))  # noqa: E731
        return prepare_on_ray(source, tmp_path / out, make_encoders, where, on_progress=told, **OPTIONS | options)

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        report = run("ray")
        half = OnlyRows(lambda features, digests, records: features[:, 0] > 127.4, {"cluster": "1"})
        kept = run("ray kept", only=half)  # a function that only this process knows
        with pytest.raises(PrepareError, match=r"part 3/3 was not made on .*gone\.png"):
            run("ray strict", strict=True)
        with pytest.raises(PrepareError, match="less than the 99 cores"):
            prepare_on_ray(source, tmp_path / "wide", make_encoders, RayOptions(cores=99), **OPTIONS)
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    assert seen[:3] == [("parts", done, 3) for done in (1, 2, 3)]
    assert report.count == 22
    assert contents(report.folder) == one_run(source, tmp_path / "one")
    assert contents(kept.folder) == one_run(source, tmp_path / "one kept", only=half)
    left = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("."))
    assert all(name.startswith(".ray strict.") for name in left)  # to go on with
