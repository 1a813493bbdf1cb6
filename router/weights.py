"""From a safetensors file's tensors to a network that is ready to be asked, quickly enough to be done again and again.

An ensemble under a memory budget loads experts as samples need them, so loading must cost little beside a step: a
network's initial weights are computed once, then never again, and tensors that were read are used where they lie.
`precision` says how the weights are held (docs/results/sample-2026-11.md has what each costs and gives):

    fp32    as trained
    bf16    half the memory; fast only where the processor multiplies bfloat16
    int8    a quarter: every matrix as 8-bit whole numbers with a scale for each output row, multiplied out when used
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.nn.utils import parametrize

PRECISIONS = ("fp32", "bf16", "int8")
SMALLEST_MATRIX = 4096
"""Matrices with fewer numbers stay as they are in int8: there is nothing to gain."""


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""safetensors' names of what a checkpoint may hold."""


def tensors_in_place(data: bytearray) -> dict[str, Tensor]:
    """The tensors of a safetensors file where they lie in `data`, without a copy; `data` must not change afterwards.

    Half the time and half the memory of copying them out, which is what loading an expert costs most. A file whose
    tensors do not begin at a multiple of 8 bytes, or of rarer dtypes, is copied by safetensors itself.

    Raises:
        SafetensorError: no safetensors file.
    """
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    try:
        header = json.loads(data[8:start].decode())
        entries = {name: each for name, each in header.items() if name != "__metadata__"}
        if start % 8 or any(each["dtype"] not in DTYPES for each in entries.values()):
            return load_tensors(bytes(data))
        return {name: _in_place(data, start, each) for name, each in entries.items()}
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise SafetensorError(f"no readable header or tensor: {error}") from error


def _in_place(data: bytearray, start: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    count = math.prod(shape)
    if not 0 <= begin <= end <= len(data) - start or end - begin != count * dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} does not lie at {begin} to {end}")
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin).reshape(shape)


class TensorsDiffer(ValueError):
    """Tensors are not those of the network: the message names the first, and says how many differ."""


class Skeleton:
    """A network without weights, to be filled many times.

    build: makes the network; called once. Its weights are dropped at once, its buffers are kept.
    """

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        network = build().eval()
        self._shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                hollow = torch.empty_like(parameter, device="meta")
                module.register_parameter(name, nn.Parameter(hollow, requires_grad=False))
        self._network = network

    def filled(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A frozen network with these tensors, which are not copied.

        Raises:
            TensorsDiffer: a name is missing or extra, or a shape differs.
        """
        odd = sorted(
            name
            for name in self._shapes.keys() | tensors.keys()
            if name not in tensors or self._shapes.get(name) != tensors[name].shape
        )
        if odd:
            raise TensorsDiffer(f"tensor {odd[0]} is not that of the plan's recipe ({len(odd)} differ)")
        network = copy.deepcopy(self._network)
        network.load_state_dict(dict(tensors), assign=True)
        return network.eval().requires_grad_(False)


def hold(network: nn.Module, precision: str) -> nn.Module:
    """`network`, frozen, with its weights held as `precision` says; it takes and gives float32 whatever that is.

    Raises:
        ValueError: no such precision.
    """
    check_precision(precision)
    if precision == "bf16":
        return Bfloat16(network)
    if precision == "int8":
        quantise(network)
    return network


def check_precision(precision: str) -> None:
    """Raises ValueError where there is no such precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"the precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


class Bfloat16(nn.Module):
    """An expert in bfloat16: samples and captions are rounded on the way in, times are not, the answer is float32.

    Where the point lies on the expert's own path, and what its answer means, is computed in float32.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.bfloat16()

    def forward(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """As the network's own: [B, ...] float32."""
        objective = self.network.objective
        point = objective.locate(x, t)
        said: Tensor = self.network(point.x.bfloat16(), point.u, states.bfloat16(), mask, raw=True).float()  # [B, ...]
        out: Tensor = objective.velocity(said, x, t)
        return out


class EightBit(nn.Module):
    """A matrix as 8-bit numbers: weight [out, ...] = whole [out, ...] times scale [out, 1, ...].

    Symmetric and by output row, the scale such that the row's largest number is 127: the weight-only scheme of
    LLM.int8() (arXiv 2208.07339) and torch's own `quantize_` without its kernels. An error is at most half a scale.
    """

    def forward(self, whole: Tensor, scale: Tensor) -> Tensor:
        return whole.to(scale.dtype) * scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        largest = weight.abs().flatten(1).amax(dim=1).clamp(min=1e-12)  # [out]
        scale = (largest / 127).reshape(-1, *[1] * (weight.ndim - 1))  # [out, 1, ...]
        return (weight / scale).round().to(torch.int8), scale


def quantise(network: nn.Module) -> None:
    """Hold every matrix of at least SMALLEST_MATRIX numbers in 8 bits, in place; the network must be frozen."""
    for module in list(network.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim >= 2 and parameter.numel() >= SMALLEST_MATRIX and not name.endswith(("embed", "table")):
                parametrize.register_parametrization(module, name, EightBit(), unsafe=True)
            else:  # what lies in a file's bytes (`tensors_in_place`) would keep all of them in memory
                parameter.data = parameter.detach().clone()


STABLE_SIZES = (1, 2, 4, 8, 12, 16, 24, 32)
"""Rows that a compiled network is asked for at once. torch compiles a network for eight shapes (its
`recompile_limit`, which experts of one recipe share) and runs it uncompiled at any further one, with no more than a
line in its log.
"""


class StableShapes(nn.Module):
    """A compiled network asked with few batch sizes only, so that it is compiled few times.

    Groups of samples change their size with every step of every picture. They are cut into pieces of 32 rows, and the
    last piece is filled up with copies of the last sample to one of STABLE_SIZES.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._compiled = torch.compile(network, dynamic=False)

    def forward(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """As the network's own: [B, ...]."""
        count, out, start = x.shape[0], [], 0
        for size in stable_pieces(count):
            rows = torch.arange(start, start + size, device=x.device).clamp(max=count - 1)  # [size]
            out.append(self._compiled(*(part.index_select(0, rows) for part in (x, t, states, mask))))
            start += size
        return torch.cat(out)[:count]


def stable_pieces(count: int) -> list[int]:
    """Sizes of the pieces, each of STABLE_SIZES, that `count` rows are cut into: 45 -> [32, 16]."""
    largest = STABLE_SIZES[-1]
    whole, rest = divmod(count, largest)
    return [largest] * whole + [next(size for size in STABLE_SIZES if size >= rest)] * (rest > 0)
