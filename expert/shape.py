"""How large a network may be, and how many numbers it holds: known from its recipe, before anything is built.

A recipe comes from whoever signed the plan. What it asks for is bounded here, far above what anybody trains as one
expert; whether this machine has the memory for what is left is `memory`'s question (SPEC.md, R-PLAN-5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

FREQUENCIES = 256
"""Width of the sinusoidal time embedding."""

LIMITS: Mapping[str, int] = MappingProxyType(
    {
        "clusters": 1024,
        "channels": 1024,
        "resolution": 8192,
        "patch": 8192,
        "hidden": 16_384,
        "depth": 512,
        "heads": 1024,
        "text_dim": 65_536,
        "text_tokens": 4096,
    }
)
"""Largest value of each field of a model's recipe (SPEC.md, R-PLAN-5)."""
MAX_TOKENS = 1 << 16
"""Image tokens: (resolution / patch) squared."""
MAX_PATCH_NUMBERS = 1 << 16
"""Numbers of one patch: channels x patch squared."""
MAX_INNER = 1 << 18
"""Width inside an MLP: hidden x mlp_ratio."""


class Shape(Protocol):
    """What the records of an expert's and of a router's network have in common."""

    @property
    def channels(self) -> int: ...
    @property
    def resolution(self) -> int: ...
    @property
    def patch(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def mlp_ratio(self) -> float: ...
    @property
    def text_dim(self) -> int: ...
    @property
    def adaln(self) -> str: ...
    @property
    def tokens(self) -> int:
        """Number of image tokens."""

    @property
    def parameters(self) -> int:
        """Number of trained numbers."""


def check_shape(where: str, shape: Shape, names: Iterable[str]) -> None:
    """Compares the fields `names` of a network's record with `LIMITS`, and all of them with one another.

    Raises:
        ValueError: out of bounds, or they do not fit together; the field is named, with `where` before it.
    """
    for name in names:
        value = getattr(shape, name)
        if value < 1:
            raise ValueError(f"{where}.{name} must be at least 1, got {value}")
        if value > LIMITS[name]:
            raise ValueError(f"{where}.{name} must be at most {LIMITS[name]:,}, got {value:,}")
    if shape.resolution % shape.patch:
        raise ValueError(f"{where}.patch {shape.patch} does not divide {where}.resolution {shape.resolution}")
    if shape.hidden % shape.heads:
        raise ValueError(f"{where}.heads {shape.heads} does not divide {where}.hidden {shape.hidden}")
    if not (math.isfinite(shape.mlp_ratio) and 1 <= shape.mlp_ratio * shape.hidden <= MAX_INNER):
        raise ValueError(
            f"{where}.mlp_ratio must give 1 to {MAX_INNER:,} hidden units, got {shape.mlp_ratio} x {shape.hidden}"
        )
    if shape.tokens > MAX_TOKENS:
        raise ValueError(
            f"{where}.resolution {shape.resolution} in patches of {shape.patch} makes {shape.tokens:,} tokens, at most "
            f"{MAX_TOKENS:,} are allowed"
        )
    if patch_numbers(shape) > MAX_PATCH_NUMBERS:
        raise ValueError(
            f"{where}.patch {shape.patch} with {shape.channels} channels has {patch_numbers(shape):,} numbers, at most "
            f"{MAX_PATCH_NUMBERS:,} are allowed"
        )
    if shape.adaln not in ("single", "zero"):
        raise ValueError(f'{where}.adaln must be "single" or "zero", got {shape.adaln!r}')


def patch_numbers(shape: Shape) -> int:
    """Numbers of one patch of a picture."""
    return shape.channels * shape.patch**2


def expert_parameters(shape: Shape, *, pooled_text: bool, patch_skip: bool) -> int:
    """Trained numbers of `model.Expert` (a test compares them with networks that were built)."""
    d, size = shape.hidden, patch_numbers(shape)
    total = _body(shape, cross=True) + _linear(shape.text_dim, d) + _last(shape, size)
    total += _linear(shape.text_dim, d) if pooled_text else 0
    return total + (2 * size * size + _linear(d, size) if patch_skip else 0)


def router_parameters(shape: Shape, *, clusters: int, pooled_text: bool) -> int:
    """Trained numbers of `paris_swarm.router.model.Router`."""
    total = _body(shape, cross=False) + shape.hidden + _last(shape, clusters)  # the CLS token, the head
    return total + (_linear(shape.text_dim, shape.hidden) if pooled_text else 0)


def _body(shape: Shape, *, cross: bool) -> int:
    """Patches, positions, time, shared modulation and the blocks."""
    d = shape.hidden
    total = _linear(patch_numbers(shape), d) + shape.tokens * d + _linear(FREQUENCIES, d) + _linear(d, d)
    total += _linear(d, 6 * d) if shape.adaln == "single" else 0
    inner = int(d * shape.mlp_ratio)
    attention = _linear(d, 3 * d) + _linear(d, d)
    block = (6 * d if shape.adaln == "single" else _linear(d, 6 * d)) + attention * (2 if cross else 1)
    return total + shape.depth * (block + _linear(d, inner) + _linear(inner, d))


def _last(shape: Shape, out: int) -> int:
    d = shape.hidden
    return (2 * d if shape.adaln == "single" else _linear(d, 2 * d)) + _linear(d, out)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
