"""Is a peer's checkpoint what it claims: finite numbers, and a probe loss anyone can recompute.

A probe set is one safetensors file of the plan: for every slot `pixels.<slot>` uint8 [n, H, W, 3] (or latents,
float16 [n, h, w, C]), `states.<slot>` float16 [n, L, D], `lengths.<slot>` int16 [n]; and `null_states` float16 [L, D],
`null_length` int16 [1]. The plan pins the file's digest, the times and the seed of the noise, so two machines agree to
rounding (measured in docs/results/bars-2026-11.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from paris_swarm.dht_schemas.files import atomic_write
from paris_swarm.expert.checkpoint import load_weights
from paris_swarm.expert.flow import interpolate, scalar_predictor_loss, to_pixels, velocity_target
from paris_swarm.expert.memory import check_forward
from paris_swarm.expert.model import Expert, seeded
from paris_swarm.expert.objective import Objective
from paris_swarm.expert.pretrained import untrained_expert
from paris_swarm.expert.recipe import ModelConfig, Recipe
from paris_swarm.expert.rows import Rows, mask_of

PROBE_TIMES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.98)
"""Every probe row is judged at each of these times, unless the plan pins others."""
MAX_TIMES = 64
BATCH = 64
"""Probe rows that go through a network at once: it bounds the memory and changes no figure."""
BAR_MARGIN = 0.001
"""A bar lies this share below the loss that it stands for: rounding on another machine must not lift untrained weights,
or the scalar predictor, over their own bar."""


# ---------------------------------------------------------------------------------------------------------------------
# the probe set
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """Held-out rows of one slot: x0 float32 [n, C, H, W], states float32 [n, L, D], mask bool [n, L], the noise's seed.

    `null` is the null caption, states float32 [1, L, D] and mask bool [1, L]; `times` are where the rows are judged.
    """

    x0: Tensor
    states: Tensor
    mask: Tensor
    null: tuple[Tensor, Tensor]
    seed: int
    times: tuple[float, ...] = PROBE_TIMES

    def __len__(self) -> int:
        return len(self.x0)

    def noise(self, index: int) -> Tensor:
        """Standard normal noise for `times[index]`, float32, shape of x0: of all rows at once, so that how they are cut
        into batches changes nothing. No global generator is read or moved.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000 + index)
        return torch.randn(self.x0.shape, generator=generator, dtype=torch.float32)

    def noised(self, batch: int = BATCH) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Every row at every time: (rows, x_t [b, C, H, W], t [b], noise [b, C, H, W]), at most `batch` rows each."""
        for index, time in enumerate(self.times):
            noise = self.noise(index)
            for start in range(0, len(self), batch):
                rows = slice(start, min(start + batch, len(self)))
                t = torch.full((rows.stop - rows.start,), time, dtype=torch.float32)
                yield rows, interpolate(self.x0[rows], noise[rows], t), t, noise[rows]


def check_times(times: Sequence[float]) -> tuple[float, ...]:
    """Times at which rows may be judged: 1 to MAX_TIMES numbers between 0 and 1.

    Raises:
        ValueError: they are not that.
    """
    sound = all(isinstance(t, int | float) and not isinstance(t, bool) and 0 <= t <= 1 for t in times)
    if not 1 <= len(times) <= MAX_TIMES or not sound:
        raise ValueError(f"probe times are 1 to {MAX_TIMES} numbers between 0 and 1, got {list(times)[:8]}")
    return tuple(float(t) for t in times)


def probe_from_rows(rows: Rows, seed: int, times: Sequence[float] = PROBE_TIMES) -> Probe:
    """A probe made of all of `rows`, as `write_probe_set` and `load_probe` would give it."""
    batch = rows.batch(np.arange(len(rows), dtype=np.int64))
    return Probe(batch.x0, batch.states, batch.mask, rows.null, seed, check_times(times))


def probe_set_bytes(
    slots: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], null_states: np.ndarray, null_length: int
) -> bytes:
    """A probe file: for each slot name (pixels uint8 [n, H, W, 3], states float16 [n, L, D], lengths int16 [n])."""
    tensors: dict[str, Tensor] = {
        "null_states": torch.from_numpy(np.array(null_states, dtype=np.float16)),
        "null_length": torch.tensor([null_length], dtype=torch.int16),
    }
    for slot, (pixels, states, lengths) in slots.items():
        tensors[f"pixels.{slot}"] = torch.from_numpy(np.array(pixels))
        tensors[f"states.{slot}"] = torch.from_numpy(np.array(states, dtype=np.float16))
        tensors[f"lengths.{slot}"] = torch.from_numpy(np.array(lengths, dtype=np.int16))
    return save(tensors)


def write_probe_set(
    path: Path,
    slots: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    null_states: np.ndarray,
    null_length: int,
) -> None:
    """`probe_set_bytes`, written atomically."""
    atomic_write(path, probe_set_bytes(slots, null_states, null_length))


def load_probe(path: Path, slot: str, seed: int, times: Sequence[float] = PROBE_TIMES) -> Probe:
    """The probe rows of `slot` from a probe file.

    Raises:
        ValueError: the file is no probe set, or has no rows for this slot, or `times` are none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            wanted = {f"pixels.{slot}", f"states.{slot}", f"lengths.{slot}", "null_states", "null_length"}
            if not wanted <= names:
                raise ValueError(
                    f"{path} has no probe rows for slot {slot}: it lacks {', '.join(sorted(wanted - names))}"
                )
            pixels, states = file.get_tensor(f"pixels.{slot}"), file.get_tensor(f"states.{slot}")
            lengths, null_states = file.get_tensor(f"lengths.{slot}"), file.get_tensor("null_states")
            null_length = file.get_tensor("null_length")
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable probe set ({error}); fetch the plan's files again") from error
    sound = (
        pixels.dtype in (torch.uint8, torch.float16)
        and (states.dtype, null_states.dtype) == (torch.float16, torch.float16)
        and (pixels.ndim, states.ndim, lengths.ndim, null_states.ndim, null_length.numel()) == (4, 3, 1, 2, 1)
        and len(pixels) == len(states) == len(lengths) > 0
        and states.shape[1:] == null_states.shape
        and all(bool(torch.isfinite(tensor).all()) for tensor in (pixels, states, null_states))
    )
    if not sound:
        raise ValueError(f"{path} is no probe set: the tensors of slot {slot} do not fit together")
    tokens = states.shape[1]
    null = (null_states.float()[None], mask_of(null_length.reshape(1), tokens))
    return Probe(to_pixels(pixels), states.float(), mask_of(lengths, tokens), null, seed, check_times(times))


def probe_slots(path: Path) -> list[str]:
    """The slots a probe file has rows for, sorted."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    return sorted(name.removeprefix("pixels.") for name in names if name.startswith("pixels."))


# ---------------------------------------------------------------------------------------------------------------------
# the checks
# ---------------------------------------------------------------------------------------------------------------------


def nonfinite_tensors(path: Path) -> Iterator[str]:
    """Names of the tensors in a safetensors file that hold a NaN or an infinity, read one tensor at a time."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        for name in names:
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                yield name


def all_finite(path: Path) -> bool:
    """Whether every number in a safetensors file is finite."""
    return next(nonfinite_tensors(path), None) is None


@torch.no_grad()
def expert_probe_loss(model: nn.Module, probe: Probe, batch: int = BATCH) -> float:
    """Mean squared velocity error of `model` over the probe rows and their times; float32, summed in float64.

    `batch` (rows at once), threads and the state of any global generator change rounding at most.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    states, mask = probe.states.to(device), probe.mask.to(device)

    def say(rows: slice, x: Tensor, t: Tensor) -> Tensor:
        return model(x.to(device), t.to(device), states[rows], mask[rows]).float().cpu()  # type: ignore[no-any-return]

    with torch.autocast(device.type, enabled=False):
        loss = _velocity_error(say, probe, batch)
    model.train(training)
    return loss


def untrained_probe_loss(config: ModelConfig, probe: Probe) -> float:
    """What `expert_probe_loss` gives of initial weights, of any seed and with or without start weights: their last
    layer is zero (`model.initialise`, `pretrained`), so they say zero everywhere, and no network has to be built.
    """
    objective = Objective(config.output, config.path, config.data_limit)
    return _velocity_error(lambda _rows, x, t: objective.velocity(torch.zeros_like(x), x, t), probe, BATCH)


def _velocity_error(say: Callable[[slice, Tensor, Tensor], Tensor], probe: Probe, batch: int) -> float:
    total = 0.0
    for rows, x, t, noise in probe.noised(batch):
        total += float((say(rows, x, t) - velocity_target(probe.x0[rows], noise)).double().square().sum())
    return total / (probe.x0.numel() * len(probe.times))


def probe_loss_of_file(recipe: Recipe, weights: Path, probe: Probe) -> float:
    """Probe loss of the expert weights in a safetensors file.

    Raises:
        CheckpointError: the tensors are not those of the recipe. TooLarge: this machine has no memory for its network.
    """
    check_forward(recipe.model, BATCH)
    model = seeded(Expert, recipe.model, 0)
    load_weights(model, weights)
    return expert_probe_loss(model, probe)


# ---------------------------------------------------------------------------------------------------------------------
# the bars
# ---------------------------------------------------------------------------------------------------------------------


def resumable_bar(recipe: Recipe, probe: Probe, start: Path | None = None) -> float:
    """What a successor may continue from is better than this: the untrained weights of the recipe, less BAR_MARGIN.

    start: the file of the start weights, where the recipe names any; that it fits is seen on the way.

    Raises:
        StartRefused: they are not at hand, or other bytes. NotADiT: they do not fit the recipe.
    """
    if recipe.start is not None:
        untrained_expert(recipe, start)
    return (1 - BAR_MARGIN) * untrained_probe_loss(recipe.model, probe)


def assemblable_bar(rows: Rows, probe: Probe, seed: int, limit: int = 512) -> float:
    """What may be assembled is better than this: the best scalar predictor, fitted on at most `limit` training rows,
    less BAR_MARGIN.
    """
    return scalar_bar(rows.batch(np.arange(min(len(rows), limit), dtype=np.int64)).x0, probe, seed)


def scalar_bar(train: Tensor, probe: Probe, seed: int) -> float:
    """Probe loss of v = a_t x_t + b_t m, a_t, b_t and the mean picture m fitted on rows train float32 [M, C, H, W] that
    must not be among the probe's, less BAR_MARGIN.
    """
    train_noise = torch.stack(
        [
            torch.randn(train.shape, generator=torch.Generator().manual_seed(seed * 1_000 + 500 + index))
            for index in range(len(probe.times))
        ]
    )
    probe_noise = torch.stack([probe.noise(index) for index in range(len(probe.times))])
    return (1 - BAR_MARGIN) * scalar_predictor_loss(train, probe.x0, train_noise, probe_noise, probe.times)
