"""`distill`: a student of the session's one swarm, by prepared rows and by drawn ones; what is refused, and how."""

from __future__ import annotations

import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from swarm_processes import Answer, VerbProcesses, done, eventually, verb
from swarm_story import Story

from paris_swarm.cli.distilling import work_folder
from paris_swarm.router.diffusers_folder import load_pipeline
from paris_swarm.router.folder import open_folder
from paris_swarm.router.lock import open_lock
from paris_swarm.router.png import read_text

FAST = ("--threads", 1, "--device", "cpu", "--batch", 8, "--no-text-encoder", "--json")


@pytest.fixture(scope="module")
def student(story: Story, data: Path, room: Path) -> Answer:
    """A student of the swarm's two experts, by the organiser's own rows."""
    return done(
        verb(
            "--home", room / "distiller", "distill", story.model, "--data", data, "-o", room / "student",
            "--steps", 24, *FAST,
        )
    )  # fmt: skip


def test_a_student_is_a_folder_that_verifies_and_names_its_teachers(student: Answer, story: Story) -> None:
    said = student.json
    folder = Path(said["folder"])
    assert open_folder(folder).verified.plan.plan.data["distilled"]["start"] == "mean"  # its kind is the experts'
    lock = open_lock((story.model / "lock.json").read_bytes())
    roots = {slot.slot: slot.root for slot in lock.lock.slots if slot.slot != "router"}
    assert (said["teachers"], said["teacher_assembly"], said["teacher_plan"]) == (roots, lock.digest, story.plan_id)
    assert (said["done"], said["step"], said["steps"]) == (True, 24, 24)
    assert said["probe_loss"] < said["bar"]
    judged = done(verb("verify", folder, "--probe", "--json")).json
    assert (judged["ok"], judged["missing"]) == (True, [])
    card = (folder / "README.md").read_text()
    assert all(root in card for root in roots.values())
    assert "has no\nrouter" in card and "Missing" not in card
    assert not work_folder(folder).exists()


def test_a_student_draws_without_a_router(student: Answer, tmp_path: Path) -> None:
    folder = student.json["folder"]
    drawn = verb("sample", folder, "-p", "a red square", "-n", 2, "--steps", 2, "-o", tmp_path / "s.png", "--json")
    report = done(drawn).json
    assert (report["missing"], report["shares"]) == ([], [[1.0], [1.0]])
    assert "missing" not in read_text(tmp_path / "s.png")


def test_nobody_is_sent_to_train_a_router_for_a_student(student: Answer, tmp_path: Path) -> None:
    folder = student.json["folder"]
    for more in (("report",), ("rows", "-o", tmp_path / "rows")):
        answer = verb("router", more[0], folder, *more[1:])
        assert answer.code == 2 and "a student" in answer.said and "without a router" in answer.said
        assert "router rows" not in answer.said
    assert not (tmp_path / "rows").exists()


def test_diffusers_loads_a_student(student: Answer) -> None:
    folder = student.json["folder"]
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    assembled = open_folder(folder)
    states = torch.randn(2, 5, assembled.recipe.model.text_dim).half()
    asked = {"num_inference_steps": 2, "guidance_scale": 2.0, "seed": 3}
    images = pipe(prompt_embeds=states, output_type="np", sampler="euler", **asked).images
    own = assembled.sample(states, [5, 5], steps=2, guidance=2.0, seed=3).images
    assert np.abs(np.round(images * 255) - own).max() <= 1


def test_without_data_the_experts_draw_them_and_the_same_command_goes_on(story: Story, tmp_path: Path) -> None:
    out = tmp_path / "student"
    command = (
        "--home", tmp_path / "home", "distill", story.model, "-o", out, "--rows", 48, "--draw-steps", 4,
        "--steps", 24, "--start", "fresh", *FAST,
    )  # fmt: skip
    early = verb(*command, "--minutes", 0)  # its time is over before the first step
    assert early.code == 5 and "run the same command again" in early.said
    assert not out.exists() and (work_folder(out) / "rows" / "manifest.json").is_file()
    other = verb(*command[:-1], "--seed", 7, "--json")
    assert other.code == 2 and "holds another distillation" in other.said
    whole = done(verb(*command)).json
    assert whole["done"] and whole["rows"]["drawn"] and 48 <= whole["rows"]["count"] <= 49
    plan = open_folder(out).verified.plan.plan
    assert plan.data["distilled"]["rows"]["drawn"] is True
    assert "pictures that the experts drew" in (out / "README.md").read_text()
    again = verb(*command)
    assert again.code == 2 and "is there already" in again.said


@pytest.mark.parametrize("slot", ["0", "router"])
def test_every_expert_is_needed_and_no_router(story: Story, data: Path, tmp_path: Path, slot: str) -> None:
    lock = open_lock((story.model / "lock.json").read_bytes()).lock
    lacking = _without(story, tmp_path / "lacking", slot)
    assert slot in {slot.slot for slot in lock.slots}
    command = ("--home", tmp_path / "home", "distill", lacking, "--data", data, "-o", tmp_path / "s")
    answer = verb(*command, "--minutes", 0, "--start", "fresh")
    assert answer.code == 5
    assert ("expert 0 is missing" if slot == "0" else "run the same command again") in answer.said


def _without(story: Story, target: Path, slot: str) -> Path:
    """The assembled folder as it would be without one slot."""
    from paris_swarm.dht_schemas.identity import Identity
    from paris_swarm.router.folder_writing import SlotSource, write_folder
    from paris_swarm.router.layout import announcement_path, manifest_path, weights_path

    verified = open_folder(story.model).verified
    sources = [
        SlotSource(
            (story.model / announcement_path(each.slot)).read_bytes(),
            (story.model / manifest_path(each.root)).read_bytes(),
            story.model / weights_path(each.slot),
        )
        for each in verified.lock.slots
        if each.slot != slot
    ]
    write_folder(
        target,
        identity=Identity.generate(),
        plan=verified.plan,
        plan_folder=story.model / "plan",
        slots=sources,
        created=1,
    )
    return target


def test_a_changed_folder_teaches_nobody(model: Path, data: Path, tmp_path: Path) -> None:
    with open(model / "experts" / "expert_1" / "diffusion_pytorch_model.safetensors", "r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x7f")
    answer = verb("--home", tmp_path / "home", "distill", model, "--data", data, "-o", tmp_path / "s")
    assert answer.code == 4 and "expert_1" in answer.said
    assert not (tmp_path / "s").exists() and not work_folder(tmp_path / "s").exists()


def _drawn_by_others(data: Path, target: Path) -> Path:
    shutil.copytree(data, target)
    manifest: dict[str, Any] = json.loads((target / "manifest.json").read_text())
    manifest["drawn"] = {"plan": "f" * 64, "counts": [manifest["count"] - 8, 8]}
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def _of_another_size(data: Path, target: Path) -> Path:
    shutil.copytree(data, target)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["text"]["digest"] = "0" * 64
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


@pytest.mark.parametrize(
    ("change", "said"),
    [(_drawn_by_others, "drawn by experts of plan ffffffffffff"), (_of_another_size, "the plan asks for")],
)
def test_wrong_rows_are_refused(story: Story, data: Path, tmp_path: Path, change: Any, said: str) -> None:
    rows = change(data, tmp_path / "rows")
    answer = verb("--home", tmp_path / "home", "distill", story.model, "--data", rows, "-o", tmp_path / "s")
    assert answer.code == 2 and said in answer.said
    assert not work_folder(tmp_path / "s").exists()


def test_a_size_that_does_not_fit_is_named(story: Story, data: Path, tmp_path: Path) -> None:
    answer = verb(
        "--home", tmp_path / "home", "distill", story.model, "--data", data, "-o", tmp_path / "s", "--size", "L"
    )
    assert answer.code == 2 and "no recipe is called 'L'" in answer.said


@pytest.mark.slow
def test_a_killed_and_an_interrupted_run_go_on_bit_for_bit(story: Story, data: Path, tmp_path: Path) -> None:
    common = ("distill", story.model, "--data", data, "--steps", 150, "--checkpoint-every", 1, *FAST)
    whole = done(verb("--home", tmp_path / "home", *common, "-o", tmp_path / "whole")).json
    out = tmp_path / "cut"
    checkpoints = work_folder(out) / "checkpoints"

    def grown(beyond: int) -> bool:
        names = [path.name for path in checkpoints.glob("step-*")] if checkpoints.is_dir() else []
        return max((int(name[5:]) for name in names), default=0) > beyond

    reached = 0
    with VerbProcesses(tmp_path / "logs") as processes:
        for number in (signal.SIGKILL, signal.SIGINT):
            running = processes.start(f"cut-{number}", "--home", tmp_path / "home", *common, "-o", out)
            eventually(partial(grown, reached), limit_s=120)
            code = running.end(number)
            assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
            reached = max(int(path.name[5:]) for path in checkpoints.glob("step-*"))
    assert 0 < reached < 150 and not out.exists()
    again = done(verb("--home", tmp_path / "home", *common, "-o", out)).json
    assert again["done"] and again["probe_loss"] == whole["probe_loss"]
    weights = "experts/expert_0/diffusion_pytorch_model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
