"""Training killed at random moments loses at most one interval and never a file (`make kills`: 200 kills)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.expert.killed_training import job

from paris_swarm.expert.training import DoneReport, train

ROOT = Path(__file__).parents[2]
WEIGHTS = ("ema.safetensors", "model.safetensors", "optimizer.safetensors")


def killed(folder: Path, kills: int, seed: int) -> dict[str, object]:
    command = [sys.executable, "-m", "tests.expert.killed_training", str(folder), str(kills), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 + 10 * kills, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def held_to_a_straight_run(folder: Path, found: dict[str, object]) -> None:
    """The run that was killed so often has become, bit for bit, what an undisturbed one becomes."""
    *_, done = train(job(folder, int(str(found["steps"]))))
    assert isinstance(done, DoneReport)
    for name in WEIGHTS:
        assert (done.folder / name).read_bytes() == (Path(str(found["folder"])) / name).read_bytes(), name


def test_a_few_kills(tmp_path: Path) -> None:
    found = killed(tmp_path / "killed", 6, 1)
    held_to_a_straight_run(tmp_path / "straight", found)


@pytest.mark.kills
@pytest.mark.timeout(3600)
def test_two_hundred_kills(tmp_path: Path) -> None:
    found = killed(tmp_path / "killed", 200, int(os.environ.get("PARIS_SWARM_KILLS_SEED", "0")))
    held_to_a_straight_run(tmp_path / "straight", found)
    print(json.dumps(found))
