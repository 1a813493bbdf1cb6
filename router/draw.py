"""Pictures from an ensemble: batches, one noise a picture, and a trace of who drew what."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paris_swarm.expert.flow import from_pixels
from paris_swarm.expert.rows import mask_of
from paris_swarm.router.ensemble import Decision, Ensemble
from paris_swarm.router.samplers import Sampler, named_sampler, picture_draws, picture_noise, times
from paris_swarm.router.strategies import Strategy


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


def in_order(indices: Sequence[int], batch: int) -> list[Sequence[int]]:
    """`indices` in batches of `batch`."""
    return [indices[start : start + batch] for start in range(0, len(indices), batch)]


def of_few_loads(experts: Sequence[frozenset[int]], batch: int, steps: int, room: int) -> list[Sequence[int]]:
    """Pictures in batches of at most `batch`, such that few experts are loaded while all of them are drawn.

    experts: for each picture those that its first step uses; most pictures stay with them to the end. room: how many
    experts fit in memory. Either in plain order, where a batch that needs more than fit loads the rest anew at every
    step, or each picture beside those that use the same experts, whichever loads less.
    """
    sets: dict[tuple[int, ...], list[int]] = {}
    for index, used in enumerate(experts):
        sets.setdefault(tuple(sorted(used)), []).append(index)
    plain = in_order(range(len(experts)), batch)
    together = [part for _, members in sorted(sets.items()) for part in in_order(members, batch)]

    def loads(batches: list[Sequence[int]]) -> int:
        needed = [len(frozenset[int]().union(*(experts[index] for index in indices))) for indices in batches]
        return sum(count + (steps - 1) * max(count - room, 0) for count in needed)

    return together if loads(together) < loads(plain) else plain


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
        ValueError: no prompts, shapes that do not agree, n, batch or steps below 1, no such strategy or sampler.
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
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.inference_mode():
        order = in_order(range(total), batch)
        first: list[frozenset[int]] = []
        if ensemble.resident.budget is not None:
            for indices in order:
                prompts = torch.tensor([index // n for index in indices])
                x = picture_noise(seed, indices, shape).to(device)  # [b, C, H, W]
                row = picture_draws(seed, indices, steps).to(device)[:, 0] if needs_draws else None  # [b]
                true = None if labels is None else torch.tensor([labels[int(p)] for p in prompts], device=device)
                s, m = (part.index_select(0, prompts).to(device) for part in (caption_states, caption_mask))
                one = torch.ones(len(indices), dtype=x.dtype, device=device)  # [b]
                decision = ensemble.route(x, one, s, m, strategy=strategy, draws=row, labels=true)
                first += [frozenset(torch.nonzero(each).flatten().tolist()) for each in decision.weights]
            order = of_few_loads(first, batch, steps, ensemble.resident.room_for(min(first[0])) or 1)
        waiting, done_order = deque(order), list[int]()
        while waiting:
            indices = waiting.popleft()
            number, of_batches = len(parts) + 1, len(parts) + 1 + len(waiting)
            loads_before = ensemble.resident.loads
            prompts = torch.tensor([index // n for index in indices])
            b_states = caption_states.index_select(0, prompts).to(device)  # [b, tokens, D]
            b_mask = caption_mask.index_select(0, prompts).to(device)  # [b, tokens]
            own_draws = picture_draws(seed, indices, steps).to(device) if needs_draws else None  # [b, steps]
            own_labels = None if labels is None else torch.tensor([labels[int(p)] for p in prompts], device=device)
            decisions: list[Decision] = []
            asked: list[Decision] = []

            def velocity(
                x: Tensor,
                t: Tensor,
                s: Tensor = b_states,
                m: Tensor = b_mask,
                u: Tensor | None = own_draws,
                true: Tensor | None = own_labels,
                asked: list[Decision] = asked,
                done: list[Decision] = decisions,
            ) -> Tensor:
                row = None if u is None else u[:, len(done)]  # one number a step, whatever the sampler asks in it
                asked.append(ensemble.route(x, t, s, m, strategy=strategy, draws=row, labels=true))
                return ensemble.velocity(x, t, s, m, asked[-1], guidance=guidance)  # [b, C, H, W]

            def report(
                step: int,
                of: int,
                number: int = number,
                of_batches: int = of_batches,
                asked: list[Decision] = asked,
                done: list[Decision] = decisions,
            ) -> None:
                done.append(asked[0])  # the decision at the step's own t
                asked.clear()
                if on_step is not None:
                    on_step(DrawStep(number, of_batches, step, of))

            x = solve(velocity, picture_noise(seed, indices, shape).to(device), steps, report)  # [b, C, H, W]
            weights = torch.stack([decision.weights for decision in decisions], dim=1)  # [b, steps, K]
            redirected = torch.stack([decision.redirected for decision in decisions], dim=1).mean(dim=1)  # [b]
            parts.append((decode(x).cpu(), weights.float().cpu(), redirected.float().cpu()))
            done_order += indices
            foreseen = len(frozenset[int]().union(*(first[index] for index in indices if first)))
            if first and waiting and ensemble.resident.loads - loads_before > 2 * foreseen:
                # These pictures did not stay with the experts they began with: keeping like with like gains nothing.
                waiting = deque(in_order(sorted(index for each in waiting for index in each), batch))
    places = torch.tensor(done_order).argsort()
    images, all_weights, all_redirected = (torch.cat(column)[places].numpy() for column in zip(*parts, strict=True))
    return Pictures(images, all_weights, all_redirected)
