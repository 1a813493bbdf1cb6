"""`sample` as a person types it: what cannot be drawn is said at once, what was drawn says so, and help explains."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from swarm_processes import done, verb
from swarm_story import Story

from paris_swarm.router import diffusers_folder
from paris_swarm.router.png import read_text

PROMPT = ("-p", "a red disc on white ground")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("--strategy", "top1"), ["got 'top1'", "top-1, top-2", "as threshold-0.05"]),
        (("--strategy", "oracle"), ["paris-swarm evaluate"]),
        (("--sampler", "ddim"), ["euler, heun, dpm++"]),
        (("--precision", "fp16"), ["fp32, bf16, int8"]),
        (("-p", "a \udcff disc"), ["no UTF-8 text"]),
        (("-o", "{room}"), ["-o", "is a folder"]),
        (("-o", "{room}/nowhere/x.png"), ["nowhere is no folder"]),
        (("-o", "{room}/model/x.png"), ["no longer verify"]),
        (("--trace", "{room}/model/deeper.png"), ["--trace", "no longer verify"]),
        (("-o", "{room}/x.png", "--trace", "{room}/./x.png"), ["-o and --trace name the same file"]),
        (("--json", "-o", "{room}/x.png", "--trace", "{room}/x.png.json"), ["--json", "name the same file"]),
    ],
)
def test_a_slip_is_named_before_the_folder_is_read(tmp_path: Path, typed: tuple[str, ...], said: list[str]) -> None:
    """There is no model here: a folder of many gigabytes would be hashed before its absence is noticed."""
    (tmp_path / "model").mkdir()
    words = [word.format(room=tmp_path) for word in typed]
    place = () if "-o" in words else ("-o", tmp_path / "drawn.png")
    answer = verb("sample", tmp_path / "model", *PROMPT, *place, *words)
    assert answer.code == 2, answer.said
    assert all(part in answer.said for part in said), answer.said


def test_compiling_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    answer = verb("sample", tmp_path / "model", *PROMPT, "-o", tmp_path / "x.png", "--compile")
    assert answer.code == 2 and "C++ compiler" in answer.said


def test_what_was_not_used_and_what_was_not_read_is_said(story: Story, tmp_path: Path) -> None:
    out = tmp_path / "drawn.png"
    answer = done(
        verb(
            "sample", story.model, *PROMPT, "-p", "disc " * 300, "--steps", 1, "--guidance", 1.2345678901, "-o", out,
            "--vae", "nowhere", "--text-encoder", "nowhere", "--plan", story.invite, "--device", "cpu", "--json",
        )
    )  # fmt: skip
    assert answer.json["redirected"] == [0.0, 0.0]
    notes = " ".join(answer.err.split())
    assert "--vae is not used" in notes and "--text-encoder is not used" in notes
    assert "Prompt 2 takes all 64 tokens" in notes and "Prompt 1" not in notes
    assert read_text(out)["guidance"] == "1.2345678901", "the very number, or nobody can draw it again"
    with Image.open(out) as image:
        assert image.size == (144 + 2 + 144, 144), "two pictures of 12 pixels, enlarged to 144, and the gap"


def test_one_picture_is_one(story: Story, tmp_path: Path) -> None:
    said = done(verb("sample", story.model, *PROMPT, "--steps", 1, "-o", tmp_path / "x.png", "--device", "cpu")).said
    assert f"1 picture in {tmp_path / 'x.png'}" in said


def test_verify_says_when_the_code_for_diffusers_is_not_ours(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    own = done(verb("verify", story.model, "--json"))
    assert set(own.json["own_code"].values()) == {True}
    monkeypatch.setattr(diffusers_folder, "pipeline_source", lambda: b"another release's")
    answer = done(verb("verify", story.model))
    assert "pipeline.py: not what this release of paris-swarm writes" in answer.said
    assert "ddm_components" not in answer.said
