"""The demo at its own size, held to the figures it promises (`make test-full`; ten minutes, alone on the machine)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_the_pictures_are_recognisable(tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-m", "paris_swarm.cli.app", "demo", "-o", str(out)], check=True)
    report = json.loads((out / "report.json").read_bytes())
    assert report["cluster_accuracy"] >= 0.9 * report["cluster_accuracy_real"]
    assert report["background_accuracy"] >= 0.6 * report["background_accuracy_real"]
