"""The trainer as the process that `join` starts: asked to end, sharing its batches, keeping a log."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from swarm_processes import done, verb

from paris_swarm.cli import peer_session
from paris_swarm.cli.exits import Usage
from paris_swarm.cli.peer_session import SessionOptions
from paris_swarm.cli.plan_folder import open_plan_folder
from paris_swarm.cli.tasks import build_task
from paris_swarm.cli.trainer import STOP_SECONDS, TrainerChoices, TrainJobFile, check_choices, trainer_environment
from paris_swarm.dht_schemas.invite import Invite
from paris_swarm.dht_schemas.plan import seal_plan
from paris_swarm.expert.checkpoint import newest_whole, read_state
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.memory import TooLarge
from paris_swarm.expert.training import TrainJob, train
from paris_swarm.swarm.home import Home

WEIGHTS = ("ema.safetensors", "model.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def long_job(data: Path, room: Path) -> TrainJobFile:
    """Cluster 0 of a plan whose schedule nobody will see the end of."""
    folder = room / "long"
    done(verb("--home", folder / "home", "init", data, "-o", folder / "plan", "-k", 2, "--steps", 100000, "--batch", 8))
    return TrainJobFile(
        plan_folder=str(folder / "plan"),
        plan_id=open_plan_folder(folder / "plan").plan_id,
        data=str(data),
        slot="0",
        work="",
        resume=None,
        parent=None,
        device="cpu",
        threads=1,
        checkpoint_every_s=3600.0,
    )


def start(job: TrainJobFile, work: Path, **changes: Any) -> subprocess.Popen[str]:
    work.mkdir(exist_ok=True)
    job = replace(job, work=str(work), **changes)
    job.write(work / "job.json")
    return subprocess.Popen(
        [sys.executable, "-m", "paris_swarm.cli.train_child", str(work / "job.json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=trainer_environment(os.environ, job),
    )


def words(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """All that a process says to its end, which must be a good one."""
    assert process.stdout is not None
    said = [json.loads(line) for line in process.stdout]
    assert process.wait(timeout=STOP_SECONDS) == 0
    return said


def test_sigterm_leaves_a_checkpoint_and_no_error(long_job: TrainJobFile, tmp_path: Path) -> None:
    process = start(long_job, tmp_path / "work", metrics="jsonl", micro_batch=3)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "progress":
            break
    process.send_signal(signal.SIGTERM)
    said = words(process)
    assert said[-1]["event"] == "stopped"
    step = said[-1]["step"]
    folder, torn = newest_whole(tmp_path / "work")
    assert folder is not None and not torn
    assert read_state(folder).step == step > 0
    (saved,) = [word for word in said if word["event"] == "checkpoint"]
    assert saved["step"] == step and saved["seconds"] > 0
    assert saved["facts"]["environment"]["micro_batch"] == 3
    rows = [json.loads(line) for line in (tmp_path / "work" / "training.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == step and rows[-1]["probe_loss"] == saved["probe_loss"]
    (seen,) = [row for row in rows if "loss" in row]
    by_time = seen["loss_by_time"]
    total = sum(mean * count for mean, count in by_time if count)
    assert total / sum(count for _, count in by_time) == pytest.approx(seen["loss"], rel=1e-4)


def test_two_processes_that_share_each_batch_learn_what_one_learns(long_job: TrainJobFile, tmp_path: Path) -> None:
    alone = start(long_job, tmp_path / "alone", until=4)
    words(alone)
    said = words(start(long_job, tmp_path / "shared", until=4, processes=2, micro_batch=2))
    saved = [word for word in said if word["event"] == "checkpoint"]
    assert [word["step"] for word in saved] == [4]
    assert saved[0]["facts"]["environment"]["processes"] == 2
    assert saved[0]["facts"]["environment"]["micro_batch"] == 2
    for name in WEIGHTS:
        one, other = (
            load_file(tmp_path / where / "checkpoints" / "step-00000004" / name) for where in ("alone", "shared")
        )
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(
                tensor, other[key], rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_what_an_earlier_run_left_is_told_again(long_job: TrainJobFile, tmp_path: Path) -> None:
    """Its peer may have died before it published it, at the last step even: the next one has it to publish."""
    (saved,) = [word for word in words(start(long_job, tmp_path / "work", until=2)) if word["event"] == "checkpoint"]
    said = words(start(long_job, tmp_path / "work", until=2, metrics="jsonl"))
    (told,) = [word for word in said if word["event"] == "checkpoint"]
    assert told.pop("seconds") == 0 < saved.pop("seconds"), "what a checkpoint takes is not learnt from one on disk"
    assert told == saved
    assert "probe_loss" not in (tmp_path / "work" / "training.jsonl").read_text(), "it is no new point of the curve"


def test_the_time_to_end_grows_with_what_a_checkpoint_takes() -> None:
    from paris_swarm.cli.trainer import TrainerProcess

    process = TrainerProcess.__new__(TrainerProcess)
    process._save_seconds, process._step_seconds = 40.0, 0.0
    assert process.stop_seconds >= STOP_SECONDS + 40.0
    process._step_seconds = 100.0
    assert process.stop_seconds >= STOP_SECONDS + 40.0 + 100.0, "a step under way is finished first"


NOISY = """
import os, sys
from paris_swarm.cli import train_child
from paris_swarm.expert import training

def noisy(job, train=training.train):
    print("a library's word")
    os.write(1, b"another's\\n")
    yield from train(job)

training.train = noisy
sys.exit(train_child.main(sys.argv[1]))
"""


def test_what_libraries_print_is_not_taken_for_the_trainers_word(long_job: TrainJobFile, tmp_path: Path) -> None:
    replace(long_job, work=str(tmp_path), until=1).write(tmp_path / "job.json")
    process = subprocess.Popen(
        [sys.executable, "-c", NOISY, str(tmp_path / "job.json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=trainer_environment(os.environ, long_job),
    )
    said = words(process)
    assert [word["event"] for word in said] == ["progress", "checkpoint", "done"]
    assert said[0]["step_s"] > 0
    assert process.stderr is not None
    assert "a library's word" in (log := process.stderr.read()) and "another's" in log


def test_a_replay_is_as_deterministic_as_its_author(
    long_job: TrainJobFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paris_swarm.cli import replay

    started: list[TrainJobFile] = []

    async def start(job: TrainJobFile) -> None:
        started.append(job)
        raise InterruptedError

    monkeypatch.setattr(replay.TrainerProcess, "start", start)
    folder = open_plan_folder(Path(long_job.plan_folder))
    place = replay.ReplayPlace(
        folder, tmp_path, "0", tmp_path, tmp_path, 1, "cpu", 1, micro_batch=4, compiled=True, deterministic=True
    )
    with pytest.raises(InterruptedError):
        asyncio.run(replay.replay(place, "fp32", print))
    (job,) = started
    assert (job.micro_batch, job.compiled, job.deterministic) == (4, True, True)


@pytest.mark.parametrize(
    ("choices", "lacking", "words_said"),
    [
        (TrainerChoices(processes=3), (), "batch of 8 rows does not divide into 3"),
        (TrainerChoices(processes=2), ("accelerate",), "paris-swarm\\[accelerate\\]"),
        (TrainerChoices(metrics="tensorboard"), ("tensorboard",), "paris-swarm\\[tensorboard\\]"),
        (TrainerChoices(compiled=True), ("g++", "c++", "clang++"), "C\\+\\+ compiler"),
    ],
)
def test_what_this_machine_cannot_do_is_said_before_a_slot_is_claimed(
    choices: TrainerChoices, lacking: tuple[str, ...], words_said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in lacking else object())
    monkeypatch.setattr("shutil.which", lambda name: None if name in lacking else f"/usr/bin/{name}")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Usage, match=words_said):
        check_choices(choices, "cpu", [8])
    check_choices(replace(choices, processes=1, metrics="none", compiled=False), "cpu", [8])


def hostile_plan(job: TrainJobFile, folder: Path, **model: Any) -> TrainJobFile:
    """The job on a plan whose organiser signed another network for cluster 0."""
    shutil.copytree(job.plan_folder, folder)
    identity = Home(Path(job.plan_folder).parent / "home").identity()
    plan = open_plan_folder(folder).opened.plan
    recipe = {**plan.expert.recipe, "model": {**plan.expert.recipe["model"], **model}}
    changed = plan.model_copy(update={"expert": plan.expert.model_copy(update={"recipe": recipe})})
    (folder / "plan.json").write_bytes(seal_plan(identity, changed))
    return replace(job, plan_folder=str(folder), plan_id=open_plan_folder(folder).plan_id)


@pytest.mark.parametrize(
    ("model", "error", "words_said"),
    [
        ({"hidden": 1_000_000, "heads": 1}, ValueError, "model.hidden must be at most 16,384, got 1,000,000"),
        ({"hidden": 16_384, "depth": 512, "heads": 16}, TooLarge, "slot 0 of the plan .* parameters .* GB of memory"),
    ],
)
def test_a_plan_for_a_network_that_cannot_be_is_refused_before_a_slot_is_claimed(
    long_job: TrainJobFile, tmp_path: Path, model: dict[str, int], error: type[Exception], words_said: str
) -> None:
    job = hostile_plan(long_job, tmp_path / "plan", **model)
    plan_folder = open_plan_folder(Path(job.plan_folder))
    options = SessionOptions(
        invite=Invite(job.plan_id, ()),
        cluster="auto",
        router=False,
        data=Path(job.data),
        device="cpu",
        threads=1,
        listen="",
        public=False,
        exit_when_done=True,
    )
    with pytest.raises(error, match=words_said):
        peer_session._check_wishes(SimpleNamespace(plan_folder=plan_folder), options, "cpu")  # type: ignore[arg-type]
    with pytest.raises(error, match=words_said.replace("slot 0 of the plan", "the recipe")):
        list(train(TrainJob(build_task(plan_folder, PreparedData.open(Path(job.data)), "0"), tmp_path / "work")))


def listening(pid: int) -> set[str]:
    """The addresses, as the kernel writes them, at which a process takes connections."""
    own = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    tables = (Path(f"/proc/{pid}/net/{kind}").read_text() for kind in ("tcp", "tcp6"))
    rows = [line.split() for table in tables for line in table.splitlines()]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}


@pytest.mark.parametrize("victim", ["fellow", "first"])
def test_one_of_two_processes_killed_ends_both(
    long_job: TrainJobFile, tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    first = start(long_job, tmp_path / "work", processes=2)
    assert first.stdout is not None
    for line in first.stdout:
        if json.loads(line)["event"] == "progress":
            break
    (fellow,) = map(int, Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split())
    waiting = os.pidfd_open(fellow)
    assert listening(fellow) <= {"0100007F", "00000000000000000000000001000000"}, "others can reach the exchange"
    os.kill(fellow if victim == "fellow" else first.pid, signal.SIGKILL)
    assert first.wait(timeout=STOP_SECONDS) == (1 if victim == "fellow" else -signal.SIGKILL)
    assert select.select([waiting], [], [], STOP_SECONDS)[0], "the fellow outlived the first process"
    os.close(waiting)
    if victim == "fellow":
        assert not list(tmp_path.glob("paris-swarm-meeting-*"))
    folder, torn = newest_whole(tmp_path / "work")
    assert not torn and (folder is None or read_state(folder).step >= 0)
