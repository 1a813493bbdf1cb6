"""The processes that share one peer's training: one, or several that `accelerate` joins, one to a GPU.

Every process draws the whole batch's randomness and learns from its own share of the rows; gradients are averaged, so
all hold the same weights. Process 0 alone reads the clock, writes checkpoints and reports. The others follow its word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

PATIENCE = timedelta(hours=2)
"""How long the others wait for process 0, which writes checkpoints and measures probes meanwhile."""


class Processes(Protocol):
    """What the loop needs of its fellows."""

    @property
    def count(self) -> int: ...
    @property
    def rank(self) -> int: ...
    def device(self, wanted: torch.device) -> torch.device:
        """Where this process computes."""

    def share(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over all processes."""

    def not_yet(self, model: nn.Module) -> AbstractContextManager[object]:
        """Backward passes within only add up: a later one averages."""

    def agree(self, words: Sequence[bool]) -> list[bool]:
        """What process 0 says."""

    def mean(self, value: Tensor) -> Tensor:
        """The mean of all processes' values."""

    def first_then_others(self) -> AbstractContextManager[object]:
        """Process 0 goes through the block before the others enter it."""


class Alone:
    """The ordinary case."""

    count = 1
    rank = 0

    def device(self, wanted: torch.device) -> torch.device:
        return wanted

    def share(self, model: nn.Module) -> nn.Module:
        return model

    def not_yet(self, model: nn.Module) -> AbstractContextManager[object]:
        return nullcontext()

    def agree(self, words: Sequence[bool]) -> list[bool]:
        return list(words)

    def mean(self, value: Tensor) -> Tensor:
        return value

    def first_then_others(self) -> AbstractContextManager[object]:
        return nullcontext()


class Joined:
    """One of `count` processes of this machine; they meet through the file `meeting`, which must not exist before.

    Gradients travel by NCCL between GPUs and by gloo between CPUs; process 0's word always by gloo, so that no GPU has
    to be waited for.

    Raises:
        ImportError: accelerate is not installed (`pip install 'paris-swarm[accelerate]'`).
    """

    def __init__(self, rank: int, count: int, meeting: Path, device: torch.device) -> None:
        import os
        import sys

        from accelerate import Accelerator, DistributedDataParallelKwargs

        # accelerate reads its place among the processes from here.
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in place.items()})
        # All are on this machine; left alone, gloo and NCCL would listen on the address of its name, for anybody.
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.update({"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback})
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(rank)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=count,
            timeout=PATIENCE,
        )
        self.rank = rank
        self.count = count
        # Gradients are averaged where they lie: without it every process would hold a second copy of them.
        averaging = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        # The step casts for itself.
        self._accelerator = Accelerator(cpu=not on_gpu, mixed_precision="no", kwargs_handlers=[averaging])
        if self._accelerator.num_processes != count:
            raise RuntimeError(f"accelerate sees {self._accelerator.num_processes} of {count} processes")

    def device(self, wanted: torch.device) -> torch.device:
        return torch.device("cuda", self.rank) if wanted.type == "cuda" else wanted

    def share(self, model: nn.Module) -> nn.Module:
        shared: nn.Module = self._accelerator.prepare_model(model)
        return shared

    def not_yet(self, model: nn.Module) -> AbstractContextManager[object]:
        held: AbstractContextManager[object] = self._accelerator.no_sync(model)
        return held

    def agree(self, words: Sequence[bool]) -> list[bool]:
        said = torch.tensor(list(words), dtype=torch.uint8)
        torch.distributed.broadcast(said, src=0)
        return [bool(word) for word in said.tolist()]

    def mean(self, value: Tensor) -> Tensor:
        total: Tensor = self._accelerator.reduce(value.clone(), reduction="mean")
        return total

    @contextmanager
    def first_then_others(self) -> Iterator[None]:
        with self._accelerator.main_process_first():
            yield

    def leave(self) -> None:
        """Say good-bye, so that nobody waits for this process."""
        torch.distributed.destroy_process_group()
