"""Experts in memory: loaded when a sample first needs them, and put out again, least recently used first.

Eight experts of Paris' size are 19 GB in fp32; one step of one picture needs one or two of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

import torch
from torch import nn

Held = TypeVar("Held")


def weight_bytes(network: object) -> int:
    """Bytes of a network's parameters and buffers; 0 for a plain function."""
    if not isinstance(network, nn.Module):
        return 0
    tensors: Iterable[torch.Tensor] = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Resident(Generic[Held]):
    """Things loaded on demand, kept within `budget` bytes (None: all of them stay).

    The one in use is always kept, so a budget below one expert still draws, slowly. `loads` counts loadings.
    """

    def __init__(
        self,
        loaders: Mapping[int, Callable[[], Held]],
        budget: int | None = None,
        *,
        size: Callable[[Held], int] = weight_bytes,
    ) -> None:
        if budget is not None and budget < 0:
            raise ValueError(f"the memory budget must not be negative, got {budget} bytes")
        self.loads = 0
        self._loaders = dict(loaders)
        self._budget = budget
        self._size = size
        self._held: OrderedDict[int, tuple[Held, int]] = OrderedDict()
        self._largest = 0

    def __contains__(self, k: int) -> bool:
        return k in self._loaders

    @property
    def budget(self) -> int | None:
        """Bytes that may be held, None for no bound."""
        return self._budget

    def holds(self, k: int) -> bool:
        """Whether number k is in memory now."""
        return k in self._held

    @property
    def held_bytes(self) -> int:
        """Bytes of what is in memory now."""
        return sum(size for _, size in self._held.values())

    def get(self, k: int) -> Held:
        """Number k, loaded if it is not here. Whatever must go for it goes *before* it is loaded."""
        if k not in self._held:
            # Experts of one plan have about one size: room is made for the largest seen so far.
            self._make_room(self._largest)
            item = self._loaders[k]()
            self.loads += 1
            size = self._size(item)
            self._largest = max(self._largest, size)
            self._held[k] = (item, size)
            self._make_room(0, keep=k)
        self._held.move_to_end(k)
        return self._held[k][0]

    def in_order(self, wanted: Iterable[int]) -> list[int]:
        """`wanted`, those in memory first: then a step that needs more than fits loads as few as can be."""
        return sorted(wanted, key=lambda k: (k not in self._held, k))

    def _make_room(self, needed: int, keep: int | None = None) -> None:
        if self._budget is None:
            return
        for k in list(self._held):
            if self.held_bytes + needed <= self._budget:
                return
            if k != keep:
                del self._held[k]
