"""One test, at least, for every code in docs/exit-codes.md; every message says what is wrong, where, and what to do."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from swarm_processes import Answer, VerbProcesses, done, eventually, verb
from swarm_story import Story

from paris_swarm.dht_schemas.identity import Identity

VERBS = [
    "prepare", "init", "bootstrap", "invite", "notice", "join", "status", "assemble", "verify", "sample", "export",
    "import", "identity", "leave", "demo", "audit", "evaluate", "store", "router", "distill",
]  # fmt: skip
GROUPS = ("identity", "store", "router")
"""Whose verbs, one level down, take --home and --json."""
DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "exit-codes.md"


@pytest.fixture(scope="module")
def seed(plan: Answer, room: Path) -> Iterator[str]:
    """Invite of a bootstrap node in whose swarm nobody trains."""
    folder = room / "exit-codes"
    with VerbProcesses(folder / "logs") as processes:
        running = processes.start("seed", "--home", folder / "seed", "bootstrap", room / "plan")
        yield running.wait_for(lambda line: line.get("event") == "ready")["invite"]


def dead_invite(plan_id: str = "a" * 64) -> str:
    """A well-formed invite to a peer that does not exist."""
    return f"paris:{plan_id}?peer=/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate().peer_id}"


def refusal(code: int, answer: Answer, *parts: object) -> None:
    """The verb ended with ``code``, printed nothing as a result, and its one message holds these parts."""
    assert answer.code == code, answer.said
    assert "Traceback" not in answer.said
    for part in parts:
        assert str(part) in answer.said


# ---- 0 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VERBS)
def test_help_of_every_verb(name: str) -> None:
    answer = done(verb(name, "--help"))
    assert f"paris-swarm {name}" in answer.out
    assert "--help" in answer.out
    if name not in GROUPS:
        assert "--home" in answer.out
        assert "--json" in answer.out


def test_help_lists_every_verb_and_every_exit_code() -> None:
    answer = done(verb("--help"))
    assert all(re.search(rf"\b{name}\b", answer.out) for name in VERBS)
    for code in (0, 2, 3, 4, 5, 6, 130):
        assert re.search(rf"\b{code} [a-z]", answer.said)
        assert f"| {code} |" in DOCUMENTED.read_text("utf-8")


# ---- 2: usage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["join", "status", "assemble", "leave"])
def test_2_no_invite_in_a_fresh_home(name: str, tmp_path: Path) -> None:
    refusal(2, verb(name, "--home", tmp_path / "home"), "no INVITE was given", tmp_path / "home", "paris:")


@pytest.mark.parametrize(
    "invite",
    ["", "paris:", "paris:xyz", "https://example.org", "paris:" + "A" * 64, "paris:" + "a" * 64 + "?peer=nowhere"],
)
@pytest.mark.parametrize("name", ["join", "status", "assemble", "leave"])
def test_2_an_invite_that_cannot_be_read(name: str, invite: str, tmp_path: Path) -> None:
    refusal(2, verb(name, invite, "--home", tmp_path / "home"), "invite")


def test_2_unknown_words(tmp_path: Path) -> None:
    refusal(2, verb("train"), "train")
    refusal(2, verb("sample"), "Missing argument 'folder'")
    refusal(2, verb("status", "--no-such-option"), "--no-such-option")
    refusal(2, verb("init", tmp_path, "-o", tmp_path / "plan", "-k", 0), "-k")
    refusal(2, verb("init", tmp_path, "-o", tmp_path / "plan", "--lease", 1), "--lease")


def test_2_join_that_trains_needs_data(tmp_path: Path) -> None:
    for wish in (["--claim-cluster"], ["--claim-router"], ["--claim-cluster", "1"]):
        refusal(2, verb("join", dead_invite(), *wish, "--home", tmp_path / "home"), "--data", "paris-swarm prepare")


def test_2_a_folder_that_holds_other_things(own_folder: Path, data: Path, story: Story, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "letter.txt").write_text("keep me")
    refusal(2, verb("prepare", own_folder, full), full, "choose another")
    refusal(2, verb("--home", tmp_path / "home", "init", data, "-o", full), full, "choose another")
    assert (full / "letter.txt").read_text() == "keep me"
    assert [path.name for path in full.iterdir()] == ["letter.txt"]


def test_2_data_that_is_none(tmp_path: Path) -> None:
    home = ("--home", tmp_path / "home")
    refusal(2, verb(*home, "init", tmp_path / "nowhere", "-o", tmp_path / "plan"), tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refusal(2, verb(*home, "init", tmp_path / "empty", "-o", tmp_path / "plan"), tmp_path / "empty")
    refusal(2, verb("prepare", tmp_path / "nowhere", tmp_path / "out"), tmp_path / "nowhere", "not a folder")
    refusal(2, verb("prepare", tmp_path / "empty", tmp_path / "out"), "metadata.jsonl")
    refusal(2, verb(*home, "bootstrap", tmp_path / "empty"), "paris-swarm init")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "plan").exists()


def test_2_more_clusters_than_the_data_can_hold(data: Path, tmp_path: Path) -> None:
    answer = verb("--home", tmp_path / "home", "init", data, "-o", tmp_path / "plan", "-k", 100)
    refusal(2, answer, "cluster")
    assert list(tmp_path.glob("*plan*")) == [], "nothing half written"


def test_2_data_of_another_plan(seed: str, own_folder: Path, room: Path, tmp_path: Path) -> None:
    arguments = ("--resolution", 24, "--workers", 1, "--count", 8)
    done(verb("prepare", own_folder, tmp_path / "larger", *arguments, "--json"))
    answer = verb("join", seed, "--claim-cluster", "--data", tmp_path / "larger", "--home", tmp_path / "home")
    refusal(2, answer, tmp_path / "larger", "resolution 24", "the plan asks for 12", "paris-swarm prepare")


def test_2_a_cluster_that_the_plan_does_not_have(seed: str, data: Path, tmp_path: Path) -> None:
    answer = verb("join", seed, "--claim-cluster", 7, "--data", data, "--home", tmp_path / "home")
    refusal(2, answer, "--claim-cluster 7", "0 to 1")


def test_2_sampling_nothing_or_on_no_such_device(story: Story, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "drawn.png")
    refusal(2, verb("sample", story.model, "--prompt", " ", *out), "--prompt is empty")
    refusal(2, verb("sample", story.model, "--prompt", "x", "--device", "abacus", *out), "abacus", "auto, cpu")
    refusal(2, verb("sample", story.model, "--prompt", "x", "--strategy", "best", *out, "--device", "cpu"), "best")
    assert not (tmp_path / "drawn.png").exists()


def test_2_home_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refusal(2, verb("identity", "show", "--home", tmp_path / "file"), tmp_path / "file", "--home")


# ---- 3: not reachable ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["status", "assemble", "join"])
def test_3_nobody_answers(name: str, tmp_path: Path) -> None:
    answer = verb(name, dead_invite(), "--home", tmp_path / "home")
    refusal(3, answer, "Error:")
    assert re.search(r"peer|holder|seed", answer.said)
    assert not (tmp_path / "home" / "last_swarm").exists(), "a swarm that was never joined is not the one joined last"


def test_3_the_peer_is_there_but_knows_no_such_plan(seed: str, tmp_path: Path) -> None:
    other = "paris:" + "b" * 64 + seed[seed.index("?") :]
    refusal(3, verb("status", other, "--home", tmp_path / "home"), "b" * 64)


# ---- 4: verification ----------------------------------------------------------------------------------------------


def test_4_a_changed_file(model: Path) -> None:
    with open(model / "README.md", "ab") as card:
        card.write(b"!")
    refusal(4, verb("verify", model), "README.md", "assemble the folder again")


def test_4_a_changed_plan_is_not_served(room: Path, plan: Answer, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(room / "plan", tmp_path / "plan"))
    (changed / "cluster-0.png").write_bytes(b"another picture")
    answer = verb("bootstrap", changed, "--home", tmp_path / "home")
    refusal(4, answer, changed / "cluster-0.png")


# ---- 5: incomplete ------------------------------------------------------------------------------------------------


def test_5_missing_experts_are_named(seed: str, tmp_path: Path) -> None:
    home = ("--home", tmp_path / "home")
    answer = verb(*home, "assemble", seed, "-o", tmp_path / "model")
    refusal(5, answer, "slot 0, 1, router", "--allow-missing")
    assert not (tmp_path / "model").exists()

    report = done(verb(*home, "assemble", seed, "-o", tmp_path / "model", "--allow-missing", "--json")).json
    assert report["missing"] == ["0", "1", "router"]
    assert done(verb("verify", tmp_path / "model", "--json")).json["missing"] == ["0", "1", "router"]
    answer = verb("sample", tmp_path / "model", "--prompt", "x", "-o", tmp_path / "x.png", "--device", "cpu")
    refusal(5, answer, "expert 0, expert 1, the router", "Assemble again")


# ---- 6: disk ------------------------------------------------------------------------------------------------------


def unwritable(tmp_path: Path) -> Path:
    """A folder in which nobody, root included, can make another; skips where there is none."""
    if os.geteuid() != 0:
        folder = tmp_path / "read-only"
        folder.mkdir(mode=0o500)
        return folder
    folder = Path("/sys")  # permission bits do not bind root; a kernel file system does
    if not folder.is_dir() or not os.path.ismount(folder):
        pytest.skip("run as root, and there is no /sys: no folder refuses root here")
    return folder


def test_6_a_home_that_cannot_be_made(tmp_path: Path) -> None:
    home = unwritable(tmp_path) / "paris-swarm-home"
    refusal(6, verb("identity", "show", "--home", home), home, "choose another with --home")


def test_6_no_space_while_writing(own_folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk; it binds root too."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))

    arguments = ["prepare", str(own_folder), str(tmp_path / "data"), "--resolution", "12", "--workers", "1"]
    ended = subprocess.run(
        [sys.executable, "-m", "paris_swarm.cli.app", *arguments],
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert ended.returncode == 6, ended.stderr
    assert "Traceback" not in ended.stderr
    assert re.search(r"Error: .*-00000\.npy: File too large; free some space", ended.stderr)
    assert list(tmp_path.iterdir()) == [], "what was half written is gone"


# ---- 130: interrupted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_130_a_verb_that_is_cut_short(number: signal.Signals, tmp_path: Path) -> None:
    with VerbProcesses(tmp_path / "logs") as processes:
        running = processes.start(
            "prepare", "prepare", "dicebear", tmp_path / "data", "--count", 200_000, "--workers", 1
        )
        eventually(lambda: list(tmp_path.glob(".data.*")), limit_s=60, what="work begun")
        assert running.end(number) == 130
        assert "Traceback" not in running.log.read_text("utf-8")
        assert "Interrupted" in running.log.read_text("utf-8")
        eventually(lambda: not processes.left_running(), limit_s=20, what="the end of its workers")
    assert [path.name for path in tmp_path.iterdir()] == ["logs"], "what was half written is gone"
