"""What the config.json of published weights may ask for, before its network is made.

A plan names encoders of the hub, and whoever wrote their config decides how much memory the libraries take for it: they
make the network first and read the weights into it. So the network is first made of shapes alone (on the meta device),
and must be one that the weights beside the config can fill. A digest over the numbers, which a plan pins, can only be
compared behind that: it is of the network's tensors in the network's own order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paris_swarm.expert.memory import free_ram

MAX_CONFIG = 1 << 20
"""Bytes of a config.json; those of published encoders have a few thousand."""
MAX_LAYERS = 128
"""Of anything that counts layers. CLIP ViT-L/14 has 12, DINOv2 giant 40."""
MAX_ENTRIES = 256
"""Of any list in a config."""
MAX_BLOCKS = 16
"""Resolutions of a VAE; each halves the side."""
REFUSED = ("quantization_config",)
"""Fields that would bring other code or other numbers than float ones in."""

UNMADE = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""What the libraries raise for a config that makes no sense to them."""


class OddConfig(ValueError):
    """A config that asks for what its weights are not, or for too much: what, and where."""


def check_asked(model_class: Any, folder: Path) -> None:
    """Compares the network that ``folder``/config.json describes with the safetensors files beside it.

    Raises OddConfig: no config that can be read, a network of more numbers than those files have bytes, one beyond the
    bounds above, or one that this machine has no memory for.
    """
    said = _read(folder / "config.json")
    for where, value in _fields(said):
        _check_field(folder / "config.json", where, value)
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    network = _of_shapes(model_class, folder, said)
    asked = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    if asked > there:  # the smallest number that safetensors knows has one byte
        raise OddConfig(
            f"{folder / 'config.json'} asks for a network of {asked:,} numbers, and there are {there:,} bytes of "
            "weights in the safetensors files beside it: they are not of one model"
        )
    free = free_ram()
    if free is not None and 4 * asked > free:
        raise OddConfig(
            f"the network of {folder} has {asked:,} numbers: it takes at least {4 * asked / 1e9:,.1f} GB of memory, "
            f"this machine has {free / 1e9:,.1f} GB free; use a machine with more"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise OddConfig(f"{path} has {path.stat().st_size:,} bytes, at most {MAX_CONFIG:,} are read")
        said = json.loads(path.read_text("utf-8"))
    except OddConfig:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise OddConfig(f"{path} cannot be read: {str(error)[:200]}") from error
    if not isinstance(said, dict):
        raise OddConfig(f"{path} is no JSON object")
    return said


def _fields(said: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a config with the field it belongs to; nesting is as deep as `_read` could read."""
    todo = [(where, said)]
    while todo:
        name, value = todo.pop()
        yield name, value
        if isinstance(value, dict):
            todo += [(str(key), entry) for key, entry in value.items()]
        elif isinstance(value, list):
            todo += [(name, entry) for entry in value[:MAX_ENTRIES]]


def _check_field(path: Path, name: str, value: Any) -> None:
    if name in REFUSED:
        raise OddConfig(f"{path} has a {name}: bring the model's own weights, in float32, float16 or bfloat16")
    if isinstance(value, list):
        limit = MAX_BLOCKS if name in ("block_out_channels", "down_block_types", "up_block_types") else MAX_ENTRIES
        if len(value) > limit:
            raise OddConfig(f"{path}: {name} has {len(value)} entries, at most {limit} are allowed")
    if "layers" in name and isinstance(value, int | float) and not 0 <= value <= MAX_LAYERS:
        raise OddConfig(f"{path}: {name} {value}, at most {MAX_LAYERS} are allowed")


def _of_shapes(model_class: Any, folder: Path, said: dict[str, Any]) -> nn.Module:
    """The network on the meta device: names and shapes, no memory."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        if hasattr(model_class, "config_class") and model_class.config_class is not None:  # transformers
            config = model_class.config_class.from_pretrained(str(folder), local_files_only=True)
            config._attn_implementation = "sdpa"  # whatever it says: a name of its own would be looked up on the hub
            with torch.device("meta"):
                network: nn.Module = model_class(config)
        else:
            with torch.device("meta"):
                network = model_class.from_config(said)
    except (*UNMADE, StrictDataclassError) as error:
        first = " ".join(str(error).split())[:200]
        raise OddConfig(
            f"{folder / 'config.json'} makes no {model_class.__name__}: {type(error).__name__} {first}"
        ) from error
    return network
