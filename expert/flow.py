"""The flow-matching path, its loss, and the best scalar predictor.

x_t = (1 - t) x_0 + t eps and v = eps - x_0: t = 0 is data, t = 1 is noise (Flow Matching, arXiv 2210.02747; used by
DDM, arXiv 2501.05450, and Paris, arXiv 2510.03434).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paris_swarm.expert.recipe import TrainConfig


def per_item(t: Tensor, like: Tensor) -> Tensor:
    """t [B] with ones appended until it broadcasts against `like` [B, ...]."""
    return t.reshape(-1, *([1] * (like.ndim - 1)))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t on the straight path: x0 and noise [B, ...], t [B] -> [B, ...]."""
    return torch.lerp(x0, noise, per_item(t, x0))


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the network should say at every t: eps - x_0, [B, ...]."""
    return noise - x0


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] in -1..1; latents float16 [B, h, w, C], at unit scale, as they are."""
    if images.is_floating_point():
        return images.permute(0, 3, 1, 2).to(torch.float32).contiguous()
    return images.permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1.0).contiguous()


def from_pixels(x: Tensor) -> Tensor:
    """float [B, C, H, W] in -1..1 (clamped) -> uint8 [B, H, W, C]."""
    return x.float().clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def sample_t(count: int, config: TrainConfig, generator: torch.Generator, device: torch.device) -> Tensor:
    """Training times, float32 [count] in 0..1.

    Stratified: the draws of one batch fall into `count` equal slices of probability, which lowers the variance of the
    loss without changing its mean (Variational Diffusion Models, arXiv 2107.00630, appendix I).
    """
    offset = torch.rand(count, generator=generator, device=device)
    u = (torch.randperm(count, generator=generator, device=device) + offset) / count
    if config.t_sampling == "uniform":
        return u
    # u below t_uniform is stretched to 0..1 as it is, the rest goes through the logit-normal's quantile function.
    share = config.t_uniform
    quantile = ((u - share) / max(1e-6, 1 - share)).clamp(1e-4, 1 - 1e-4)
    normal = torch.special.ndtri(quantile) * config.t_std + config.t_mean
    return torch.where(u < share, u / max(share, 1e-6), torch.sigmoid(normal))


def flow_loss(prediction: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of a velocity prediction [B, ...] over everything: a scalar."""
    return (prediction.float() - velocity_target(x0, noise)).square().mean()


def scalar_predictor_loss(
    train: Tensor, probe: Tensor, train_noise: Tensor, probe_noise: Tensor, times: Sequence[float]
) -> float:
    """Loss on probe rows of v = a_t x_t + b_t m, m the mean training image, (a_t, b_t) fitted for each t.

    The best that can be said without looking at what is in a picture; a checkpoint worth assembling is below it.
    train [M, C, H, W], probe [P, C, H, W], float; the noises have the same shapes plus a leading [T].
    """
    mean = train.mean(0, keepdim=True).double()
    total = 0.0
    for index, t in enumerate(times):
        at = torch.full((1,), t, dtype=torch.float64)
        x = interpolate(train.double(), train_noise[index].double(), at)
        target = velocity_target(train.double(), train_noise[index].double())
        m = mean.expand_as(x)
        # Two unknowns: the normal equations, 2 x 2 in float64, instead of a decomposition of millions of rows.
        a, b, y = x.flatten(), m.flatten(), target.flatten()
        gram = torch.stack([torch.stack([a @ a, a @ b]), torch.stack([a @ b, b @ b])])
        fit = torch.linalg.pinv(gram) @ torch.stack([a @ y, b @ y])
        px = interpolate(probe.double(), probe_noise[index].double(), at)
        guess = fit[0] * px + fit[1] * mean
        total += float((guess - velocity_target(probe.double(), probe_noise[index].double())).square().mean())
    return total / len(times)
