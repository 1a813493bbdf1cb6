"""What is installed, what is imported, and what ends up in the wheel."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from swarm_story import Story

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cli", "dht_schemas", "expert", "router", "swarm")

BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ImportError(f"{{name}} must not be imported here")

sys.meta_path.insert(0, Block())
from paris_swarm.cli.app import run
code = run({arguments!r})
loaded = sorted({names!r} & {{name.split(".")[0] for name in sys.modules}})
sys.exit(code or (f"imported: {{loaded}}" if loaded else 0))
"""


def run_without(names: set[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """A verb in a fresh process in which some packages cannot be imported."""
    script = BLOCKED.format(names=names, arguments=[str(argument) for argument in arguments])
    return subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120)


def test_torchvision_is_not_installed() -> None:
    assert importlib.util.find_spec("torchvision") is None


def test_verify_and_sample_never_import_hivemind(story: Story, tmp_path: Path) -> None:
    done = run_without({"hivemind"}, "verify", story.model, "--json")
    assert done.returncode == 0, done.stderr
    png = tmp_path / "drawn.png"
    done = run_without({"hivemind"}, "sample", story.model, "--prompt", "a flag", "--steps", 2, "-o", png, "--json")
    assert done.returncode == 0, done.stderr
    assert png.exists()


@pytest.mark.parametrize("arguments", [["--help"], ["join", "--help"], ["identity", "--help"], ["identity", "show"]])
def test_help_and_small_verbs_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    heavy = {"torch", "hivemind", "numpy", "transformers", "sklearn", "PIL", "safetensors"}
    if arguments == ["--help"]:
        heavy |= {"pydantic", "cryptography", "rich.progress"}  # two thirds of the half second that help may take
    done = run_without(heavy, "--home", tmp_path / "home", *arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", ["dht_schemas", "swarm"])
def test_the_protocol_rooms_import_no_torch(room: str) -> None:
    modules = [
        f"paris_swarm.{room}.{path.stem}"
        for path in sorted((ROOT / room).glob("*.py"))
        if path.stem not in ("__init__", "p2pd_launch")
    ]
    script = f"import sys; [__import__(name) for name in {modules!r}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_no_pickle_is_read_but_the_pinned_encoder() -> None:
    """`torch.load` stands in one file only, with weights_only=True; pickle nowhere."""
    found = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "numpy.load", "np.load"):
                    found.append((path.relative_to(ROOT).as_posix(), ast.unparse(node.func), ast.unparse(node)))
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                    packages = {name.split(".")[0] for name in names}
                    assert not {"pickle", "dill", "joblib", "cloudpickle"} & packages, path
    loads = [(path, text) for path, function, text in found if function == "torch.load"]
    assert [path for path, _ in loads] == ["expert/data/encoders.py"]
    assert "weights_only=True" in loads[0][1]
    assert all("allow_pickle=False" in text for _, function, text in found if function != "torch.load")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline from what is here, with the setuptools that is installed."""
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run(
        [*pip, "--wheel-dir", str(out), str(copy_of_tree(out / "tree"))], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def copy_of_tree(target: Path) -> Path:
    """What a build reads, elsewhere: a build leaves folders beside its source, and reads what earlier ones left."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, target / name)
    for room in ROOMS:
        shutil.copytree(ROOT / room, target / room, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def test_the_wheel_holds_exactly_the_rooms(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        f"paris_swarm/{path.relative_to(ROOT).as_posix()}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.suffix == ".py" or path.name in ("SPEC.md", "py.typed")
    }
    assert inside == wanted


def test_the_wheel_installs_the_command_and_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split("/", 1)[1]: name for name in archive.namelist() if ".dist-info/" in name}
        assert "paris-swarm = paris_swarm.cli.app:main" in archive.read(names["entry_points.txt"]).decode()
        assert "licenses/LICENSE" in names
        metadata = archive.read(names["METADATA"]).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "torchvision" not in metadata
