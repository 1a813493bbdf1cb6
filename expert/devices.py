"""Where a training step runs and what its matrices are multiplied in."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "mps" as a device.

    Raises:
        ValueError: not one of these, or not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if there["cuda"] else "mps" if there["mps"] else "cpu")
    if name not in there:
        raise ValueError(f"no device is called {name!r}; choose auto, cpu, cuda or mps")
    if not there[name]:
        raise ValueError(f"this machine, or this build of torch, has no {name}; choose auto or cpu")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """ "auto", "fp32", "bf16" or "fp64" as a dtype. bf16 (of matrix products only) is emulated, slowly, on most CPUs.

    Raises:
        ValueError: not one of these.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        return torch.bfloat16 if native else torch.float32
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
    if name not in known:
        raise ValueError(f"no precision is called {name!r}; choose auto, fp32, bf16 or fp64")
    return known[name]
