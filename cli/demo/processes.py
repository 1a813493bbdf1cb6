"""Processes of the demo: each in its own session and with its own log; all of them end when the demo ends."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paris_swarm.cli.exits import ProcessFailed

STOP_SECONDS = 40.0
PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """Linux: SIGTERM for the child when the demo dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass
class Running:
    """One background process and the JSON lines it printed."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                parsed = json.loads(line)
            except ValueError:
                continue
            with self.arrived:
                self.lines.append(parsed)
                del self.lines[:-100]
                self.arrived.notify_all()
        with self.arrived:
            self.arrived.notify_all()

    def wait_line(self, seconds: float) -> dict[str, Any]:
        """The newest JSON line; waits for the first one.

        Raises:
            ProcessFailed: the process ended, or said nothing in time.
        """
        deadline = time.monotonic() + seconds
        with self.arrived:
            while not self.lines:
                left = deadline - time.monotonic()
                if self.process.poll() is not None or left <= 0:
                    raise ProcessFailed(self.last_words())
                self.arrived.wait(min(left, 1.0))
            return self.lines[-1]

    def last_words(self) -> str:
        code = self.process.poll()
        tail = self.log.read_text("utf-8", "replace").strip().splitlines()[-3:] if self.log.exists() else []
        state = "said nothing in time" if code is None else f"ended with code {code}"
        return f"{self.name} {state}: {' / '.join(tail) or 'no message'} (log: {self.log})"


class Processes:
    """Everything the demo started. Use as a context manager: leaving it stops all of them."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        self.running: list[Running] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop_all()

    def start(self, name: str, arguments: Sequence[str]) -> Running:
        """`paris-swarm ARGUMENTS` in the background; its JSON lines are kept, the rest goes to its log."""
        log = self._logs / f"{name}.log"
        with open(log, "ab") as errors:
            process = subprocess.Popen(
                command(arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C reaches the demo alone, which then stops them in order
                preexec_fn=_die_with_parent,
            )
        started = Running(name, process, log)
        threading.Thread(target=started.read, daemon=True).start()
        self.running.append(started)
        return started

    def check(self) -> None:
        """Raises ProcessFailed when one of them has ended."""
        for running in self.running:
            if running.process.poll() is not None:
                raise ProcessFailed(running.last_words())

    def stop_all(self) -> None:
        """SIGTERM to all, then SIGKILL to the sessions of those that do not end; p2pd and trainers go with them."""
        for running in self.running:
            if running.process.poll() is None:
                running.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for running in self.running:
            try:
                running.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(running.process.pid, signal.SIGKILL)
                running.process.wait()
        self.running.clear()


def command(arguments: Sequence[str]) -> list[str]:
    """The command line of a verb, run by this interpreter."""
    return [sys.executable, "-m", "paris_swarm.cli.app", *arguments]


def ask_verb(arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON answer of a verb; what it says to people goes to this terminal (standard error).

    Raises:
        ProcessFailed: it ended with another code than 0.
        KeyboardInterrupt: the user pressed Ctrl-C.
    """
    done = subprocess.run(
        command([*arguments, "--json"]), check=False, stdout=subprocess.PIPE, preexec_fn=_die_with_parent
    )
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode != 0:
        raise ProcessFailed(f"`paris-swarm {' '.join(arguments[:6])} ...` ended with code {done.returncode}")
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer
