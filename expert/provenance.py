"""What a checkpoint says of its own training, as far as the trainer knows it (SPEC.md, "Training provenance").

The steps since the parent are missing here: which checkpoint was published before is the peer's to know.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.provenance import Environment
from paris_swarm.expert.task import Task

if TYPE_CHECKING:
    from paris_swarm.expert.step import TrainState

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def training_facts(
    task: Task, device: torch.device, precision: torch.dtype, state: TrainState | None = None
) -> dict[str, Any]:
    """`meta.provenance` of a manifest without `from_step` and `to_step`, as plain JSON values.

    state: the run, for how this machine takes a step; without one, as a lone process takes whole batches.
    """
    return {
        "v": 1,
        "seed": task.recipe.train.seed,
        "recipe": task.recipe.digest(),
        "rows": task.rows_used().model_dump(),
        "environment": environment(device, precision, state).model_dump(),
    }


def environment(device: torch.device, precision: torch.dtype, state: TrainState | None = None) -> Environment:
    """What decides the rounding of a training step in this process."""
    return Environment.model_validate(
        {
            "device": device.type,
            "chip": chip(device),
            "precision": PRECISIONS[precision],
            "threads": torch.get_num_threads(),
            "flush_denormal": flushes_denormals(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "tf32": device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32,
            "torch": str(torch.__version__)[:64],
            "package": package_version(None if state is None else state.task),
            **(step_facts(state) if state is not None else {}),
        }
    )


def step_facts(state: TrainState) -> dict[str, Any]:
    """How a run takes its steps, as far as it rounds otherwise than a lone process that takes whole batches."""
    return {
        "micro_batch": state.micro_batch if state.micro_batch < state.config.batch else 0,
        "processes": state.processes.count,
        "compiled": state.settings.compiled,
    }


def machine(task: Task, device: str) -> dict[str, str]:
    """Code and hardware that a run in this installation would train with, as far as its caller does not choose them."""
    return {
        "package": package_version(task),
        "torch": str(torch.__version__),
        "chip": chip(torch.device(device)),
    }


def flushes_denormals() -> bool:
    """Whether this thread turns subnormal results into zero; torch has a switch for it and no way to read it."""
    return float(torch.full((1,), 1e-38) * 0.1) == 0.0


def package_version(task: Task | None = None) -> str:
    """Version of this package ("unknown" when it runs from a folder that was never installed), "+" and the first
    digits of the digest of the code that trains: between two releases, too, other code may round otherwise.
    """
    try:
        name = version("paris-swarm")
    except PackageNotFoundError:
        name = "unknown"
    return f"{name}+{code_digest(task)}"


def code_digest(task: Task | None = None) -> str:
    """12 hex digits over the source files of this room and, where it is another, of the room that `task` comes from."""
    folders = [Path(__file__).parent]
    own = getattr(sys.modules.get(type(task).__module__), "__file__", None) if task is not None else None
    if own is not None and Path(own).parent not in folders:
        folders.append(Path(own).parent)
    files = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    return blake3_hex("".join(f"{path.name} {blake3_hex(path.read_bytes())}\n" for path in files).encode())[:12]


def chip(device: torch.device) -> str:
    """The kind of hardware, for people and for comparing: kernels are chosen by it."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return _plain(f"{torch.cuda.get_device_name(device)} sm_{major}{minor}")
    capability = torch.backends.cpu.get_cpu_capability()
    return _plain(f"{cpu_model()} {capability}")


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Vendor, family and model of the processor where Linux says them (libraries choose kernels by these), else its
    architecture.
    """
    try:
        lines = cpuinfo.read_text("utf-8", "replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.machine()
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    names = ("vendor_id", "cpu family", "model")
    if not all(name in values for name in names):
        return platform.machine()
    return " ".join(values[name] for name in names)


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)[:128]
