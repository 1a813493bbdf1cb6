"""Zero exchange, shown: an expert trained where no network exists at all becomes the very same bits."""

import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = """
import sys
from pathlib import Path
from paris_swarm.expert.training import TrainJob, train
from tests.expert.synthetic import small_task

interfaces = [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
routes = Path("/proc/net/route").read_text().splitlines()[1:]
print("interfaces", *sorted(interfaces), "routes", len(routes))
list(train(TrainJob(small_task("residual", optimizer="muon", steps=12), Path(sys.argv[1]), threads=1)))
"""

WEIGHTS = ("ema.safetensors", "model.safetensors", "optimizer.safetensors")


def train_in(folder: Path, *, cut_off: bool) -> str:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", TRAIN, str(folder)]
    if cut_off:
        command = ["unshare", "--user", "--map-root-user", "--net", *command]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_expert_trained_without_any_network_becomes_the_same_bits(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--user", "--map-root-user", "--net", "true"], check=False).returncode != 0:
        pytest.skip("this kernel grants no network namespaces to ordinary users")
    said = train_in(tmp_path / "alone", cut_off=True)
    assert said.split()[:2] == ["interfaces", "lo"] and said.split()[-1] == "0", said
    train_in(tmp_path / "connected", cut_off=False)
    for name in WEIGHTS:
        alone, connected = (
            (tmp_path / where / "checkpoints" / "step-00000012" / name).read_bytes() for where in ("alone", "connected")
        )
        assert alone == connected, name
