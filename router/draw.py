"""Pictures from an ensemble: batches, one noise a picture, and a trace of who drew what."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paris_swarm.expert.flow import from_pixels
from paris_swarm.expert.rows import mask_of
from paris_swarm.router.ensemble import Ensemble
from paris_swarm.router.in_flight import Flight, at_own_pace, in_step
from paris_swarm.router.samplers import Sampler, Solver, named_sampler, picture_draws, picture_noise, times
from paris_swarm.router.strategies import Strategy

BYTES_A_NUMBER = 16
"""Of memory for each number of a picture under way: itself, its velocity and what a solver keeps, in float32."""


@dataclass(frozen=True)
class DrawStep:
    """One step of one batch is done: `batch` of `batches` (from 1), `step` of `steps` (from 1)."""

    batch: int
    batches: int
    step: int
    steps: int


@dataclass(frozen=True)
class Pictures:
    """images uint8 [N, H, W, C], prompt by prompt, n of each; weights float32 [N, steps, K], what each expert counted
    for; redirected float32 [N], the mean probability that belonged to missing experts and went to others."""

    images: NDArray[np.uint8]
    weights: NDArray[np.float32]
    redirected: NDArray[np.float32]

    @property
    def shares(self) -> NDArray[np.float32]:
        """float32 [N, K]: the share of each expert in each picture, the mean weight over the steps."""
        mean: NDArray[np.float32] = self.weights.mean(axis=1)
        return mean


def vae_decoder(vae: Any) -> Callable[[Tensor], Tensor]:
    """From latents at unit scale [b, C, h, w] to pictures uint8 [b, H, W, 3], by diffusers' AutoencoderKL.

    The latents must be on its device. Pictures are decoded four at a time: one of 256 pixels takes 0.3 GB on the way.
    """
    scale = float(vae.config.scaling_factor)
    shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def decode(x: Tensor) -> Tensor:
        latents = (x / scale + shift).to(vae.dtype)  # [b, C, h, w]
        return torch.cat([from_pixels(vae.decode(part, return_dict=False)[0]) for part in latents.split(4)])

    return decode


def draw(
    ensemble: Ensemble,
    states: Tensor | NDArray[np.float16],
    lengths: Tensor | NDArray[np.int16] | Sequence[int],
    *,
    shape: tuple[int, int, int],
    n: int = 1,
    strategy: str = "top-1",
    sampler: str | Sampler = "euler",
    steps: int = 50,
    guidance: float = 2.5,
    seed: int = 0,
    batch: int = 32,
    labels: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    on_step: Callable[[DrawStep], None] | None = None,
    decode: Callable[[Tensor], Tensor] = from_pixels,
) -> Pictures:
    """`n` pictures for each of P prompts; picture i (prompt i // n) starts from noise that depends on (seed, i) only.

    states [P, L, D] and lengths [P]: the prompts' token states; shape: (C, H, W) of a picture; labels [P]: the true
    cluster of each prompt, for the strategy "oracle"; decode: what was sampled [b, C, H, W] -> `Pictures.images`. The
    result does not depend on `batch` beyond float rounding.

    Raises:
        ValueError: no prompts, shapes that do not agree, n, batch or steps below 1, a guidance below 0 or without end,
            no such strategy or sampler.
    """
    caption_states = torch.as_tensor(np.array(states) if isinstance(states, np.ndarray) else states)
    caption_lengths = torch.as_tensor(np.array(lengths)).to(torch.int64)
    if caption_states.ndim != 3 or caption_lengths.shape != caption_states.shape[:1] or not len(caption_states):
        raise ValueError(
            f"prompts need states [P, L, D] and lengths [P], got {tuple(caption_states.shape)} and "
            f"{tuple(caption_lengths.shape)}"
        )
    if n < 1 or batch < 1:
        raise ValueError(f"n and batch must be at least 1, got {n} and {batch}")
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance must be a number of at least 0, got {guidance}")
    times(steps)
    solve = named_sampler(sampler) if isinstance(sampler, str) else sampler
    needs_draws = Strategy.parse(strategy, ensemble.clusters).draws
    if labels is not None and len(labels) != len(caption_states):
        raise ValueError(f"one label a prompt is needed: {len(labels)} labels, {len(caption_states)} prompts")
    # Cut once for all pictures, never batch by batch: then the sums over tokens are the same whatever the batch.
    tokens = max(int(caption_lengths.max()), ensemble.null.length)
    caption_states = caption_states[:, :tokens].float()  # [P, tokens, D]
    caption_mask = mask_of(caption_lengths, caption_states.shape[1])  # [P, tokens]

    total = len(caption_states) * n
    budget = ensemble.resident.budget
    at_once, own_pace = batch, None
    if budget is not None and isinstance(solve, Solver):
        # So many that what they hold on their way takes at most a quarter of the experts' memory, or one batch.
        held = BYTES_A_NUMBER * math.prod(shape) + 4 * caption_states[0].numel()
        at_once, own_pace = max(batch, budget // (4 * held)), solve
    starts = range(0, total, at_once)
    landed: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.inference_mode():
        for start in starts:
            indices = range(start, min(start + at_once, total))
            first, last = indices[0] // n, indices[-1] // n
            flight = Flight(
                noise=picture_noise(seed, indices, shape).to(device),
                states=caption_states[first : last + 1].to(device),
                mask=caption_mask[first : last + 1].to(device),
                prompts=torch.tensor([index // n - first for index in indices], device=device),
                steps=steps,
                strategy=strategy,
                guidance=guidance,
                draws=picture_draws(seed, indices, steps).to(device) if needs_draws else None,
                labels=None if labels is None else torch.tensor([labels[i // n] for i in indices], device=device),
            )

            def report(step: int, number: int = len(landed) + 1) -> None:
                if on_step is not None:
                    on_step(DrawStep(number, len(starts), step, steps))

            if own_pace is not None:
                found = at_own_pace(ensemble, flight, own_pace, batch, report)
            else:
                found = in_step(ensemble, flight, solve, report)
            images = torch.cat([decode(part) for part in found.x.split(batch)])
            landed.append((images.cpu(), found.weights.float().cpu(), found.redirected.float().cpu()))
    images, all_weights, all_redirected = (torch.cat(column).numpy() for column in zip(*landed, strict=True))
    return Pictures(images, all_weights, all_redirected)
