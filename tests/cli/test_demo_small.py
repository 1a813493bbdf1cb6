"""The demo at a size that CI can afford: everything but good pictures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = [
    "--minutes",
    "0.2",
    "--peers",
    "2",
    "--clusters",
    "2",
    "--count",
    "192",
    "--steps",
    "30",
    "--sample-steps",
    "2",
]


def demo(out: Path) -> list[str]:
    return [sys.executable, "-m", "paris_swarm.cli.app", "demo", "-o", str(out), *SMALL]


def processes_mentioning(text: str) -> list[str]:
    """Command lines (and p2pd's open folders) of live processes that mention a path."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            except OSError:
                continue
            if text in line:
                found.append(line)
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run(demo(out), check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Next:" in done.stdout
    return out, json.loads((out / "report.json").read_bytes())


def test_the_report_has_every_figure(report: tuple[Path, dict]) -> None:
    out, figures = report
    assert {
        "seconds",
        "cluster_accuracy",
        "cluster_accuracy_real",
        "background_accuracy",
        "background_accuracy_real",
        "bytes",
        "slots",
    } <= set(figures)
    assert {"records", "files_before_assembly", "files", "gradients"} <= set(figures["bytes"])
    assert [slot["slot"] for slot in figures["slots"]] == ["0", "1", "router"]
    assert all({"slot", "peer", "root", "step", "probe_loss"} <= set(slot) for slot in figures["slots"])
    assert figures["cluster_accuracy_real"] > 0.9
    for name in ("samples.png", "model/lock.json", "swarm"):
        assert (out / name).exists()


def test_experts_come_from_different_peers(report: tuple[Path, dict]) -> None:
    authors = {slot["slot"]: slot["peer"] for slot in report[1]["slots"]}
    assert authors["0"] != authors["1"]


@pytest.mark.skipif(sys.platform != "linux", reason="kernel counters are read on Linux only")
def test_no_checkpoint_and_no_gradient_is_sent_while_training(report: tuple[Path, dict]) -> None:
    figures = report[1]
    assert figures["bytes"]["files_before_assembly"] == 0
    assert figures["bytes"]["gradients"] == 0
    assert figures["trainers"]["processes"] >= 3  # two experts and the router were looked at
    assert figures["trainers"]["internet_sockets"] == 0
    assert figures["bytes"]["records"] > figures["bytes"]["plan_files"] > 0
    assert figures["bytes"]["files"] > 0


def test_no_process_is_left_behind(report: tuple[Path, dict]) -> None:
    assert processes_mentioning(str(report[0])) == []


def test_ctrl_c_stops_every_process_it_started(tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = subprocess.Popen(
        demo(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    try:
        deadline = time.monotonic() + 200
        while not list(out.glob("swarm/peer-*/swarms/*/work/*/job.json")):  # a trainer was started
            assert running.poll() is None, running.stderr.read() if running.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(running.pid, signal.SIGINT)
        assert running.wait(90) == 130
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert processes_mentioning(str(out)) == []


def test_a_folder_with_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("keep me")
    done = subprocess.run(demo(tmp_path), check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "holds other things" in done.stderr
    assert (tmp_path / "letter.txt").read_text() == "keep me"
