"""One small swarm, told once a session: every expensive step is a session fixture, and tests read what it left."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from own_pictures import draw_folder
from swarm_processes import (
    Answer,
    VerbProcesses,
    checkpoint_bytes,
    done,
    eventually,
    nothing_left_to_train,
    verb,
)
from swarm_story import TINY, Story


@pytest.fixture(scope="session")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the whole session."""
    return tmp_path_factory.mktemp("swarm")


@pytest.fixture(scope="session")
def own_folder(room: Path) -> Path:
    """120 captioned pictures, and four rows that cannot be used."""
    return draw_folder(room / "pictures")


@pytest.fixture(scope="session")
def prepared(own_folder: Path, room: Path) -> Answer:
    """`prepare` of that folder, at 12 pixels."""
    return done(verb("prepare", own_folder, room / "data", "--resolution", 12, "--workers", 1, "--json"))


@pytest.fixture(scope="session")
def data(prepared: Answer) -> Path:
    return Path(prepared.json["folder"])


@pytest.fixture(scope="session")
def plan(data: Path, room: Path) -> Answer:
    """`init`: two clusters, a few steps, a short lease."""
    arguments = [*TINY, "--name", "two kinds", "--lease", 12, "--grace", 600]
    return done(verb("--home", room / "organiser", "init", data, "-o", room / "plan", *arguments, "--json"))


@pytest.fixture(scope="session")
def story(plan: Answer, data: Path, room: Path) -> Story:
    """Bootstrap, two peers that train, and a home that trained nothing and assembles; then everything is ended."""
    folder = room / "story"
    with VerbProcesses(folder / "logs") as processes:
        seed = processes.start("bootstrap", "--home", folder / "bootstrap", "bootstrap", room / "plan")
        ready = seed.wait_for(lambda line: line.get("event") == "ready")
        told = Story(folder, plan.json["plan"], ready["invite"], folder / "model")
        told.early = verb("--home", told.home("artist"), "assemble", told.invite, "-o", folder / "early", "--json")
        running = {"bootstrap": seed}
        for name, more in (("alice", ["--claim-router"]), ("bob", [])):
            running[name] = processes.start(
                name, "--home", told.home(name), "join", "--claim-cluster", told.invite, "--data", data, *more,
                "--threads", 1, "--device", "cpu",
            )  # fmt: skip
        for name, process in running.items():
            told.peers[name] = process.wait_for(lambda line: "peer" in line)["peer"]
        for name in ("alice", "bob"):
            running[name].wait_for(nothing_left_to_train, limit_s=180)
        told.status = done(verb("--home", told.home("watcher"), "status", told.invite, "--json")).json
        told.status_text = done(verb("--home", told.home("watcher"), "status", told.invite)).out
        told.served_before = _served(told, *running)
        answer = done(verb("--home", told.home("artist"), "assemble", told.invite, "-o", told.model, "--json"))
        told.assembled = answer.json
        keeper = processes.start(
            "keeper", "--home", told.home("keeper"), "assemble", told.invite, "-o", folder / "kept", "--serve"
        )
        told.kept = keeper.wait_for(lambda line: "digest" in line)
        told.keeper = keeper.wait_for(lambda line: line.get("event") == "serving")["peer"]
        ends = {"alice": signal.SIGTERM, "bob": signal.SIGINT}
        told.exit_codes = {name: running[name].end(number) for name, number in ends.items()}
        answer = done(verb("--home", told.home("late"), "assemble", told.invite, "-o", folder / "late-model", "--json"))
        told.outlived = answer.json
        told.exit_codes["keeper"] = keeper.end(signal.SIGINT)
        told.exit_codes["bootstrap"] = running["bootstrap"].end(signal.SIGTERM)
        told.served = _served(told, *running, "keeper")
        told.left_running = _left(processes)
    return told


def _served(told: Story, *homes: str) -> int:
    return sum(checkpoint_bytes(told.home(home), told.plan_id) for home in homes)


def _left(processes: VerbProcesses) -> list[str]:
    """What still runs; a process that is just ending gets a moment."""
    try:
        eventually(lambda: not processes.left_running(), limit_s=10)
    except AssertionError:
        return processes.left_running()
    return []


@pytest.fixture
def model(story: Story, tmp_path: Path) -> Path:
    """A copy of the assembled folder, to be changed."""
    return Path(shutil.copytree(story.model, tmp_path / "model"))
