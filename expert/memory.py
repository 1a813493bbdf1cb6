"""Whether this machine has the memory for a network before one is built (SPEC.md, R-PLAN-5).

A plan's recipe is its organiser's word, and an honest one may be meant for larger machines. What is counted here is the
least that work on it takes; what is refused would certainly not have fitted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from paris_swarm.expert.shape import Shape

FLOAT32 = 4
FLOAT64 = 8
SMALLEST = 2
"""Bytes of an activation: bfloat16."""


class TooLarge(ValueError):
    """This machine has less memory than work on the recipe's network takes: the message says both figures."""


class Training(Protocol):
    """What decides how much memory training takes, of `recipe.TrainConfig`."""

    @property
    def optimizer(self) -> str: ...
    @property
    def batch(self) -> int: ...


def training_bytes(shape: Shape, train: Training, *, rows: int = 0, wide: bool = False) -> int:
    """Least memory of training on one device: weights, their average, gradients and the optimiser's state (two numbers
    a weight of AdamW, at least one of Muon), the batch's pictures and their noise, and, of each layer, what goes into
    it, for `rows` of the batch at once (0: all). wide: in float64.
    """
    number = FLOAT64 if wide else FLOAT32
    weights = shape.parameters * number * (4 if train.optimizer == "muon" else 5)
    pictures = 2 * train.batch * shape.channels * shape.resolution**2 * FLOAT32
    kept = (rows or train.batch) * shape.depth * shape.tokens * shape.hidden * (FLOAT64 if wide else SMALLEST)
    return weights + pictures + kept


def forward_bytes(shape: Shape, rows: int = 1) -> int:
    """Least memory of `rows` going through a float32 network: its weights, and what goes into and comes out of the
    first map of an MLP.
    """
    widest = shape.hidden + int(shape.hidden * shape.mlp_ratio)
    return FLOAT32 * (shape.parameters + rows * shape.tokens * widest)


def check_training(
    shape: Shape, train: Training, device: torch.device, *, rows: int = 0, wide: bool = False, what: str = "the recipe"
) -> None:
    """Compares `training_bytes` with what `device` has free.

    Raises:
        TooLarge: it is more.
    """
    needed = training_bytes(shape, train, rows=rows, wide=wide)
    _compare(shape, needed, device, what, "training", "train a smaller slot, or use a machine with more")


def check_forward(shape: Shape, rows: int = 1, *, what: str = "the recipe") -> None:
    """Compares `forward_bytes` with what torch's default device has free: on the meta device nothing is needed.

    Raises:
        TooLarge: it is more.
    """
    needed = forward_bytes(shape, rows)
    _compare(shape, needed, torch.get_default_device(), what, "one forward pass", "use a machine with more")


def _compare(shape: Shape, needed: int, device: torch.device, what: str, work: str, way_out: str) -> None:
    free = free_memory(device)
    if free is not None and needed > free:
        raise TooLarge(
            f"{what} makes a network of {shape.parameters:,} parameters (hidden {shape.hidden}, depth {shape.depth}, "
            f"{shape.tokens} tokens): {work} takes at least {_gigabytes(needed)} GB of memory, {device.type} has "
            f"{_gigabytes(free)} GB free; {way_out}"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f}"


# ---------------------------------------------------------------------------------------------------------------------
# what there is
# ---------------------------------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> int | None:
    """Bytes that `device` can still give to this process; None where nothing says so, or nothing is needed (meta)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_ram() if device.type in ("cpu", "mps") else None


def free_ram(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of main memory that can be taken without swapping, and within the limits of this process's control groups;
    where the system tells neither, all the memory that it has.
    """
    found = [size for size in (_available(proc / "meminfo"), *_group_rooms(proc, groups)) if size is not None]
    if found:
        return max(0, min(found))
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _available(meminfo: Path) -> int | None:
    """MemAvailable of Linux: free, and what the kernel can drop."""
    for line in _lines(meminfo):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _group_rooms(proc: Path, groups: Path) -> Iterator[int | None]:
    """What each memory limit above this process leaves (cgroup v2, and v1 under memory/)."""
    for line in _lines(proc / "self" / "cgroup"):
        _, kinds, place = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = groups if kinds == "" else groups / "memory"
        names = ("memory.max", "memory.current") if kinds == "" else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        folder = root / place.strip("/")
        for each in (folder, *folder.parents):
            limit, used = (_number(each / name) for name in names)
            if limit is not None and used is not None:
                yield limit - used + _droppable(each / "memory.stat")
            if each == root:
                break


def _droppable(stat: Path) -> int:
    """Bytes of files that the kernel keeps in a group's memory and can drop."""
    values = dict(line.split(" ", 1) for line in _lines(stat) if " " in line)
    return int(values.get("total_inactive_file", values.get("inactive_file", "0")))


def _number(path: Path) -> int | None:
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None  # "max": no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
