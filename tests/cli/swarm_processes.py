"""Verbs run in this process, and verbs run as processes of their own whose JSON lines can be awaited."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paris_swarm.cli.app import run

START_S = 90.0
PR_SET_PDEATHSIG = 1
MARK = "PARIS_SWARM_TEST_RUN"


# ---- in this process -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What one verb said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON line on standard output."""
        lines = self.out.strip().splitlines()
        assert len(lines) == 1, f"one JSON line was expected on standard output, got:\n{self.out}\n{self.err}"
        report = json.loads(lines[0])
        assert isinstance(report, dict)
        return report

    @property
    def said(self) -> str:
        """Both streams as one line, so that a message can be searched whatever the terminal's width."""
        return " ".join((self.out + " " + self.err).split())


def verb(*arguments: object) -> Answer:
    """`paris-swarm ARGUMENTS` in this process. What it raises is a bug: a person would see a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return Answer(code, out.getvalue(), err.getvalue())


def done(answer: Answer) -> Answer:
    """The answer of a verb that must have succeeded."""
    assert answer.code == 0, f"ended with code {answer.code}:\n{answer.out}\n{answer.err}"
    return answer


# ---- processes of their own ----------------------------------------------------------------------------------------


@dataclass
class VerbProcess:
    """A background verb. Its session holds its children's parents; p2pd and trainers have sessions of their own."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    mark: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)
    ended: bool = False
    """Whether it was told to end."""

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError), self.arrived:
                self.lines.append(json.loads(line))
                self.arrived.notify_all()
        with self.arrived:
            self.arrived.notify_all()

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], *, limit_s: float = START_S) -> dict[str, Any]:
        """The first JSON line, printed already or still to come, that ``wanted`` accepts."""
        deadline = time.monotonic() + limit_s
        looked = 0
        with self.arrived:
            while True:
                while looked < len(self.lines):
                    looked += 1
                    if wanted(self.lines[looked - 1]):
                        return self.lines[looked - 1]
                left = deadline - time.monotonic()
                if left <= 0 or (self.process.poll() is not None and not self.arrived.wait(1.0)):
                    raise AssertionError(self.last_words())
                self.arrived.wait(min(left, 1.0))

    def last_words(self) -> str:
        tail = "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-15:])
        said = "\n".join(json.dumps(line) for line in self.lines[-5:])
        return f"{self.name}, code {self.process.poll()}; last lines:\n{said}\nstandard error:\n{tail}"

    def end(self, number: int = signal.SIGTERM, *, limit_s: float = 60.0) -> int:
        """Send a signal and wait for the end; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(limit_s=limit_s)

    def wait(self, *, limit_s: float = 60.0) -> int:
        """Wait for a process that was told to end; the exit code."""
        self.ended = True
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not end within {limit_s:g} s: {self.last_words()}") from None

    def kill(self) -> None:
        """SIGKILL to the process and everything it started, trainers and p2pd included, as when a machine dies."""
        self.ended = True
        for pid in [self.process.pid, *marked(self.mark)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def children(self, mentioning: str) -> list[int]:
        """Processes it started, however far down, whose command line holds these words."""
        return [pid for pid in marked(self.mark) if mentioning in _command(pid)]


class VerbProcesses:
    """Everything a fixture starts; leaving it leaves nothing running."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._run = f"{os.getpid()}-{time.monotonic_ns()}"
        logs.mkdir(parents=True, exist_ok=True)
        self.started: list[VerbProcess] = []

    def __enter__(self) -> VerbProcesses:
        return self

    def __exit__(self, *exc: object) -> None:
        for started in self.started:
            started.kill()

    def start(self, name: str, *arguments: object) -> VerbProcess:
        """`paris-swarm ARGUMENTS --json` in the background, in a session of its own."""
        mark = f"{self._run}/{name}/"
        log = self._logs / f"{name}.log"
        with open(log, "ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "paris_swarm.cli.app", *map(str, arguments), "--json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                preexec_fn=_die_with_the_tests,
                env={**os.environ, MARK: mark},
            )
        started = VerbProcess(name, process, log, mark)
        threading.Thread(target=started.read, daemon=True).start()
        self.started.append(started)
        return started

    def left_running(self) -> list[str]:
        """Command lines of processes, p2pd and trainers included, that something started here left behind."""
        return [_command(pid) for pid in marked(self._run + "/")]


def _die_with_the_tests() -> None:
    """Linux: SIGKILL when the test process ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def marked(mark: str) -> list[int]:
    """Live processes that inherited a mark beginning with ``mark`` in their environment (Linux)."""
    needle = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if needle in (entry / "environ").read_bytes() and "State:\tZ" not in (entry / "status").read_text():
                found.append(int(entry.name))
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return f"process {pid}, just ended"


def eventually(condition: Callable[[], Any], *, limit_s: float = 30.0, what: str = "the condition") -> Any:
    """Ask again and again, for what has no event to wait for, and give the first true answer."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {limit_s:g} s"
        time.sleep(0.1)
    return found


# ---- what processes left on disk -----------------------------------------------------------------------------------


def events(home: Path, plan_id: str) -> list[dict[str, Any]]:
    """The lines of a home's events.jsonl for one swarm."""
    path = home / "swarms" / plan_id / "events.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def checkpoint_bytes(home: Path, plan_id: str, direction: str = "sent") -> int:
    """Bytes of checkpoint chunks that a home has sent or received, by its own counters on disk."""
    path = home / "swarms" / plan_id / "traffic.json"
    table = json.loads(path.read_bytes())[direction] if path.exists() else {}
    return sum(kinds["checkpoint"]["wire"] for kinds in table.values() if "checkpoint" in kinds)


def lane(line: dict[str, Any], name: str = "cluster") -> dict[str, Any]:
    """A lane of a `join` state line; empty when it has none of this name."""
    return next((item for item in line.get("lanes", []) if item["lane"] == name), {})


def nothing_left_to_train(line: dict[str, Any]) -> bool:
    """Whether a `join` state line says that every lane has finished."""
    return bool(line.get("lanes")) and all(item["phase"] == "finished" for item in line["lanes"])
