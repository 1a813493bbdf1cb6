"""One optimiser step: the state it changes, the randomness it uses, and the ways in which a machine may take it.

What a step learns from follows from (seed, step) and the plan's recipe. How a machine takes it (`StepSettings`: in
pieces, recomputing activations, compiled, shared by several processes) is each peer's own choice: it moves the result
by rounding at most, and what moves it at all stands in the checkpoint's provenance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paris_swarm.expert.checkpoint import CheckpointError, CheckpointState, load_weights, read_state, read_tensors
from paris_swarm.expert.memory import check_training
from paris_swarm.expert.optim import Optimiser
from paris_swarm.expert.processes import Alone, Processes
from paris_swarm.expert.task import Task

TIME_BINS = 10
"""Equal bins of t in 0..1 in which the loss is kept apart."""


@dataclass(frozen=True)
class StepSettings:
    """How this machine takes a step.

    micro_batch: rows a forward and backward pass, gradients being added up; 0 for all rows of this process at once.
    Other sums round otherwise: it changes the last bits. recompute: each layer's activations are computed again in the
    backward pass instead of kept, about a third more work for a fraction of the memory; same bits. compiled:
    torch.compile; other kernels, so other last bits.
    """

    micro_batch: int = 0
    recompute: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch < 0:
            raise ValueError(f"a micro-batch has at least one row (0: the whole batch), got {self.micro_batch}")


class GivenUp(Exception):
    """A step was asked to stop half-way and has changed nothing."""


def step_seed(seed: int, step: int) -> int:
    """The 63-bit seed of one step's generator."""
    digest = hashlib.blake2b(f"paris-swarm step {seed} {step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class TrainState:
    """Everything a checkpoint holds: weights, their average, the optimiser, the step.

    wide: all of it in float64. Batches and noise stay the float32 numbers they always are and are widened on their way
    into the model, so a wide run takes the same steps with less rounding. On the meta device (with torch's default
    device set to it, too) a state has names and shapes, and takes no memory.

    Raises:
        TooLarge: this machine has no memory for it.
        ValueError: the batch does not divide into equal shares of the processes.
    """

    def __init__(
        self,
        task: Task,
        device: torch.device,
        *,
        wide: bool = False,
        settings: StepSettings | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.task = task
        self.device = device
        self.config = task.recipe.train
        self.settings = settings or StepSettings()
        self.processes = processes or Alone()
        if self.config.batch % self.processes.count:
            raise ValueError(
                f"a batch of {self.config.batch} rows does not divide into {self.processes.count} equal shares; "
                "choose a number of processes that divides it"
            )
        check_training(task.recipe.model, self.config, device, rows=self.micro_batch, wide=wide)
        self.model = task.build_model().to(device)
        self.ema = task.build_model().to(device).requires_grad_(False)
        if wide:
            for model in (self.model, self.ema):
                model.to(torch.float64).register_forward_pre_hook(_widen)
        if self.settings.recompute:
            _recompute_layers(self.model)
        if self.settings.compiled:
            self.model.compile()
        self.optimiser = Optimiser(self.model, self.config)
        self.step = 0
        self.time_losses = torch.zeros(2, TIME_BINS, device=device)
        """Sums of losses and numbers of rows by bin of t, since whoever reads them last put them to zero."""
        self._shared = self.processes.share(self.model)
        self._weights = list(self.model.parameters())
        self._average = list(self.ema.parameters())

    @property
    def micro_batch(self) -> int:
        """Rows a forward pass."""
        own = self.config.batch // self.processes.count
        return min(self.settings.micro_batch or own, own)

    def take_step(self, precision: torch.dtype, give_up: Callable[[], bool] = lambda: False) -> Tensor:
        """One optimiser step and one EMA update; gives the loss of this process's rows (a detached scalar on the
        device).

        give_up is asked between the pieces of a lone process's batch; when it says so the step never happened.

        Raises:
            GivenUp: give_up said so.
        """
        batch = self.task.batch(self.step).to(self.device)
        generator = torch.Generator(self.device).manual_seed(step_seed(self.config.seed, self.step))
        examples = self.task.draw(batch, generator)  # for the whole batch, however it is then split
        own = len(examples) // self.processes.count
        first = self.processes.rank * own
        self.optimiser.zero_grad()
        losses = []
        for start in range(first, first + own, self.micro_batch):
            end = min(start + self.micro_batch, first + own)
            piece = examples if end - start == len(examples) else examples.rows(start, end)
            last = end == first + own
            with nullcontext() if last else self.processes.not_yet(self._shared):
                with self._mixed(precision):
                    part = self.task.losses(self._shared, piece)  # [rows of the piece]
                (part.sum() / own).backward()  # type: ignore[no-untyped-call]
            losses.append(part.detach().float())
            if not last and self.processes.count == 1 and give_up():
                raise GivenUp
        if self.config.grad_clip:
            clip_gradients(self._weights, self.config.grad_clip)
        self.optimiser.step(self.config.rate(self.step))
        decay = self.config.ema_decay(self.step)
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._weights, 1 - decay)
        self.step += 1
        whole = torch.cat(losses) if len(losses) > 1 else losses[0]
        self._sort_by_time(examples.t[first : first + own], whole)
        return whole.mean()

    def _mixed(self, precision: torch.dtype) -> AbstractContextManager[object]:
        if precision is torch.bfloat16:
            return torch.autocast(self.device.type, dtype=precision)
        return nullcontext()

    def _sort_by_time(self, t: Tensor, losses: Tensor) -> None:
        # As a product: scattered additions come in any order on a GPU.
        bins = (t * TIME_BINS).long().clamp(0, TIME_BINS - 1)  # [B]
        member = (bins[:, None] == torch.arange(TIME_BINS, device=t.device)).float()  # [B, bins]
        self.time_losses += torch.stack([losses, torch.ones_like(losses)]) @ member

    def begin(self) -> None:
        """What a run starts from where there is no checkpoint.

        Raises:
            ValueError: start weights that the recipe names are not at hand, or are not those.
        """
        self.task.begin(self.model)
        self.ema.load_state_dict(self.model.state_dict())

    def load(self, folder: Path) -> CheckpointState:
        """Continues from a checkpoint folder.

        Raises:
            CheckpointError: not of this recipe, or damaged.
        """
        state = read_state(folder)
        if state.recipe != self.task.recipe.digest():
            raise CheckpointError(f"{folder} was trained with another recipe ({state.recipe[:12]}...)")
        optimizer = read_tensors(folder / "optimizer.safetensors", self.optimiser.state())
        load_weights(self.model, folder / "model.safetensors")
        load_weights(self.ema, folder / "ema.safetensors")
        self.optimiser.load(optimizer, state.step)
        self.step = state.step
        return state


@torch.no_grad()
def clip_gradients(weights: list[nn.Parameter], longest: float) -> None:
    """Scales all gradients so that their common Euclidean length is at most `longest`: the numbers that
    torch.nn.utils.clip_grad_norm_ gives.

    On a CPU, where looking at the length costs nothing, gradients that are short enough are left alone instead of
    multiplied by one: a pass over all of them less.
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if not gradients:
        return
    length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    factor = (longest / (length + 1e-6)).clamp(max=1.0)
    if factor.device.type != "cpu" or float(factor) < 1.0:
        torch._foreach_mul_(gradients, factor)


def _recompute_layers(model: nn.Module) -> None:
    """Activation checkpointing (Chen et al. 2016, arXiv 1604.06174), a layer at a time; parameter names stay."""

    def again(layer: nn.Module) -> None:
        inner = layer.forward

        def forward(*inputs: Any) -> Any:
            if not torch.is_grad_enabled():
                return inner(*inputs)
            return checkpoint(inner, *inputs, use_reentrant=False, preserve_rng_state=False)

        layer.forward = forward  # type: ignore[method-assign]

    for layer in model.layers:  # type: ignore[union-attr]
        again(layer)


def _widen(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.double() if part.dtype == torch.float32 else part for part in inputs)


def count_flops(state: TrainState, precision: torch.dtype) -> int:
    """Floating-point operations of the matrix products of one step, forward and backward, as torch counts them; takes
    the step. Recomputed activations count, too: compare settings by images a second, not by this.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        state.take_step(precision)
    return int(counter.get_total_flops())
