"""How long `leave` waits for a `join` that still writes: on a clock of the test's own, without processes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from swarm_processes import done, verb

from paris_swarm.cli.exits import Usage
from paris_swarm.cli.trainer import TrainerProcess
from paris_swarm.cli.verbs.leave import LIMIT_S, until_given_back
from paris_swarm.dht_schemas.invite import Invite
from paris_swarm.dht_schemas.records import Claim, Progress
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.ledger import Ledger


class Joined:
    """A `join` that gives its slot back, or ends without a word, so many seconds from now."""

    def __init__(self, *, releases: float = 1e9, ends: float = 1e9) -> None:
        self.now, self.said = 0.0, []
        self.releases, self.ends = releases, ends

    def wait(self) -> bool:
        return until_given_back(
            lambda: ["1"] if self.now < self.releases else [],
            lambda: self.now < self.ends,
            self.said.append,
            process=4711,
            clock=lambda: self.now,
            sleep=self._sleep,
        )

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_trainer_gets_the_time_that_its_last_checkpoint_takes() -> None:
    joined = Joined(releases=300)
    assert joined.wait() is True
    assert 300 <= joined.now < 301
    assert all("process 4711" in line and "slot 1" in line for line in joined.said)
    assert 5 <= len(joined.said) <= 50, "a person sees that it goes on, and is not flooded"


def test_a_slot_that_is_given_back_soon_is_not_talked_about() -> None:
    joined = Joined(releases=2)
    assert joined.wait() is True
    assert joined.said == []


def test_a_process_that_ended_without_giving_back_is_waited_for_no_longer() -> None:
    joined = Joined(ends=3)
    assert joined.wait() is False
    assert joined.now < 4


def test_at_the_limit_it_is_said_that_the_slot_is_still_given_back() -> None:
    joined = Joined()
    with pytest.raises(Usage, match=r"process 4711 is still .* slot 1 is given back once that is done"):
        joined.wait()
    assert LIMIT_S <= joined.now < LIMIT_S + 2


def test_the_limit_covers_what_a_trainer_is_granted(tmp_path: Path) -> None:
    """With a checkpoint that takes four minutes to write, too."""
    trainer = TrainerProcess(SimpleNamespace(returncode=None), tmp_path / "trainer.log")  # type: ignore[arg-type]
    assert trainer.stop_seconds < LIMIT_S
    trainer._save_seconds = 240.0
    assert trainer.stop_seconds < LIMIT_S


PROGRESS = Progress(device="cpu", images_per_s=1.0, loss=1.0, step=1, steps=100)
HOLDER = """
import fcntl, os, signal, sys, time
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print(os.getpid(), file=lock, flush=True)
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
print("here", flush=True)
while not told:
    time.sleep(0.05)
time.sleep(2.5)  # the last checkpoint, longer than what is left of the lease
"""


def test_a_claim_that_runs_out_meanwhile_is_not_taken_for_given_back(tmp_path: Path) -> None:
    """`leave && poweroff` would cut the last checkpoint off."""
    home, plan = Home(tmp_path / "home"), "ab" * 32
    claim = Claim(plan=plan, slot="1", peer=home.identity().peer_id, seq=1, until=time.time() + 1.0, progress=PROGRESS)
    ledger = home.swarm(plan).path / "ledger.json"
    ledger.parent.mkdir(parents=True, exist_ok=True)
    Ledger(ledger).record("claim", "1", 1, claim.seal(home.identity()))
    command = [sys.executable, "-c", HOLDER, str(home.path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as joined:
        assert joined.stdout is not None and joined.stdout.readline() == b"here\n"
        answer = verb("leave", str(Invite(plan)), "--home", home.path, "--json")
        ended = joined.poll()
    assert ended == 0, "leave came back while join was still writing"
    assert done(answer).json == {"released": ["1"], "serving": False}
