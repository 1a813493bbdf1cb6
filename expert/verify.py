"""Is a peer's checkpoint what it claims: finite numbers, and a probe loss anyone can recompute.

A probe set is one safetensors file of the plan: for every slot `pixels.<slot>` uint8 [n, H, W, 3], `states.<slot>`
float16 [n, L, D], `lengths.<slot>` int16 [n]; and `null_states` float16 [L, D], `null_length` int16 [1]. Times and
noise come from the plan's probe seed alone, so two machines agree to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from paris_swarm.dht_schemas.files import atomic_write
from paris_swarm.expert.checkpoint import load_weights
from paris_swarm.expert.flow import flow_loss, interpolate, scalar_predictor_loss, to_pixels
from paris_swarm.expert.model import Expert, seeded
from paris_swarm.expert.recipe import Recipe
from paris_swarm.expert.rows import Rows, mask_of

PROBE_TIMES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.98)
"""Every probe row is judged at each of these times."""


# ---------------------------------------------------------------------------------------------------------------------
# the probe set
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """Held-out rows of one slot: x0 float32 [n, C, H, W], states float32 [n, L, D], mask bool [n, L], the noise's seed.

    `null` is the null caption, states float32 [1, L, D] and mask bool [1, L].
    """

    x0: Tensor
    states: Tensor
    mask: Tensor
    null: tuple[Tensor, Tensor]
    seed: int

    def noise(self, index: int) -> Tensor:
        """Standard normal noise for the time `PROBE_TIMES[index]`, float32, shape of x0."""
        generator = torch.Generator().manual_seed(self.seed * 1_000 + index)
        return torch.randn(self.x0.shape, generator=generator)


def probe_from_rows(rows: Rows, seed: int) -> Probe:
    """A probe made of all of `rows`, as `write_probe_set` and `load_probe` would give it."""
    batch = rows.batch(np.arange(len(rows), dtype=np.int64))
    return Probe(batch.x0, batch.states, batch.mask, rows.null, seed)


def probe_set_bytes(
    slots: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], null_states: np.ndarray, null_length: int
) -> bytes:
    """A probe file: for each slot name (pixels uint8 [n, H, W, 3], states float16 [n, L, D], lengths int16 [n])."""
    tensors: dict[str, Tensor] = {
        "null_states": torch.from_numpy(np.array(null_states, dtype=np.float16)),
        "null_length": torch.tensor([null_length], dtype=torch.int16),
    }
    for slot, (pixels, states, lengths) in slots.items():
        tensors[f"pixels.{slot}"] = torch.from_numpy(np.array(pixels, dtype=np.uint8))
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


def load_probe(path: Path, slot: str, seed: int) -> Probe:
    """The probe rows of `slot` from a probe file.

    Raises:
        ValueError: the file is no probe set, or has no rows for this slot.
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
    tokens = states.shape[1]
    null = (null_states.float()[None], mask_of(null_length, tokens))
    return Probe(to_pixels(pixels), states.float(), mask_of(lengths, tokens), null, seed)


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
def expert_probe_loss(model: nn.Module, probe: Probe) -> float:
    """Mean squared velocity error of `model` over the probe rows and `PROBE_TIMES`, in float32."""
    training = model.training
    model.eval()
    first = next(model.parameters())
    total = 0.0
    states, mask = probe.states.to(first.device), probe.mask.to(first.device)
    for index, time in enumerate(PROBE_TIMES):
        noise = probe.noise(index)
        t = torch.full((probe.x0.shape[0],), time)
        x = interpolate(probe.x0, noise, t).to(first.device)
        said = model(x, t.to(first.device), states, mask)
        total += float(flow_loss(said.cpu(), probe.x0, noise))
    model.train(training)
    return total / len(PROBE_TIMES)


def probe_loss_of_file(recipe: Recipe, weights: Path, probe: Probe) -> float:
    """Probe loss of the expert weights in a safetensors file.

    Raises:
        CheckpointError: the tensors are not those of the recipe.
    """
    model = seeded(Expert, recipe.model, 0)
    load_weights(model, weights)
    return expert_probe_loss(model, probe)


# ---------------------------------------------------------------------------------------------------------------------
# the bars
# ---------------------------------------------------------------------------------------------------------------------


def resumable_bar(recipe: Recipe, probe: Probe) -> float:
    """Probe loss of the untrained weights of the recipe: a successor may continue from anything better."""
    return expert_probe_loss(seeded(Expert, recipe.model, recipe.train.seed), probe)


def assemblable_bar(rows: Rows, probe: Probe, seed: int, limit: int = 512) -> float:
    """Probe loss of the best scalar predictor, fitted on at most `limit` training rows."""
    chosen = np.arange(min(len(rows), limit), dtype=np.int64)
    train = rows.batch(chosen).x0
    train_noise = torch.stack(
        [
            torch.randn(train.shape, generator=torch.Generator().manual_seed(seed * 1_000 + 500 + index))
            for index in range(len(PROBE_TIMES))
        ]
    )
    probe_noise = torch.stack([probe.noise(index) for index in range(len(PROBE_TIMES))])
    return scalar_predictor_loss(train, probe.x0, train_noise, probe_noise, PROBE_TIMES)
