"""Experts that come and go, without training the router again: a head an expert.

A router's last layer is one row an expert, the logit z_k = w_k . h + b_k of what the network made of (x_t, t, caption),
h. To **remove** an expert its row goes: the softmax over the rest is the old posterior, renormalised, exactly what
p(k | x_t, t, k among the rest) asks for. To **add** one, a new row is fitted on frozen h, and no other number changes.
With the old logits fixed, the new expert's probability is a logistic function of z_new - logsumexp(z_old), so the fit
is a convex problem in D + 1 numbers: a hundred quasi-Newton steps, seconds.

What a head cannot do: see what the trunk has thrown away because no expert needed it. How much that costs, against
training anew, is measured in docs/results/router-2026-11.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paris_swarm.expert.flow import interpolate
from paris_swarm.router.labelled_rows import LabelledBatch
from paris_swarm.router.model import Router

RIDGE = 1e-4
"""Weight of the squared length of w_new, in nats a sample: separable clusters have no finite best fit without it."""
FIT_STEPS = 100


@dataclass(frozen=True)
class HeadInputs:
    """What a head is fitted on: h float32 [n, D], the trunk's answer; old float32 [n, K], the old logits; fresh bool
    [n], whether the sample is of the new expert's cluster.
    """

    h: Tensor
    old: Tensor
    fresh: Tensor


def without_expert(model: Router, k: int) -> Router:
    """A router of one expert fewer: number `k` is gone, those after it move up by one.

    Raises:
        ValueError: there is no such expert, or no other.
    """
    clusters = model.config.clusters
    if not 0 <= k < clusters or clusters < 2:
        raise ValueError(f"expert {k} cannot be removed from a router of {clusters}")
    kept = [row for row in range(clusters) if row != k]
    head = model.final_layer.linear
    return _with_head(model, head.weight[kept], head.bias[kept])


def with_expert(model: Router, weight: Tensor, bias: Tensor) -> Router:
    """A router of one expert more, numbered last: its head is weight [D] and bias [] (`fit_head` gives both)."""
    head = model.final_layer.linear
    return _with_head(model, torch.cat([head.weight, weight[None]]), torch.cat([head.bias, bias.reshape(1)]))


def head_inputs(model: Router, batch: LabelledBatch, fresh: int, times: Tensor, noise: Tensor) -> HeadInputs:
    """What the trunk makes of `batch`, noised: label `fresh` marks rows of the new cluster, the others are old ones.

    times float [n] in 0..1; noise float32, shape of batch.x0.
    """
    with torch.no_grad(), _seeing_head(model) as seen:
        old = model(interpolate(batch.x0, noise, times), times, batch.states, batch.mask).float()  # [n, K]
    return HeadInputs(seen[0][:, 0].float(), old, batch.labels == fresh)


def joined(parts: list[HeadInputs]) -> HeadInputs:
    """Several batches as one."""
    return HeadInputs(*(torch.cat([getattr(part, name) for part in parts]) for name in ("h", "old", "fresh")))


def fit_head(inputs: HeadInputs, *, share: float | None = None, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Weight [D] and bias [] of a new head: the most likely ones under cross-entropy, the old heads left alone.

    share: the new cluster's share of all data, where it is not that of `inputs.fresh`; the posterior carries it.

    Raises:
        ValueError: rows of the new cluster or of the old ones are missing, or share is not between 0 and 1.
    """
    found = float(inputs.fresh.double().mean())
    if not 0 < found < 1:
        raise ValueError("a head is fitted on rows of the new cluster and of the old ones; one of them is missing")
    wanted = found if share is None else share
    if not 0 < wanted < 1:
        raise ValueError(f"the new cluster's share must lie between 0 and 1, got {wanted}")
    h, rest = inputs.h.double(), inputs.old.double().logsumexp(dim=1)  # [n, D], [n]
    target = inputs.fresh.double()  # [n]
    # Weights that make the rows count as if they came in the wanted shares.
    weigh = torch.where(inputs.fresh, wanted / found, (1 - wanted) / (1 - found))  # [n]
    mean, spread = h.mean(0), h.std(0).clamp(min=1e-6)  # [D] each
    level = (h - mean) / spread  # [n, D], so that one ridge suits every direction
    w = torch.zeros(h.shape[1], dtype=torch.float64, requires_grad=True)  # [D]
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [w, b], max_iter=FIT_STEPS, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-9
    )

    def loss() -> Tensor:
        solver.zero_grad()
        off = F.binary_cross_entropy_with_logits(level @ w + b - rest, target, weight=weigh) + ridge * w.square().sum()
        off.backward()
        return off

    solver.step(loss)
    weight = (w.detach() / spread).float()  # [D]
    bias = (b.detach() - (w.detach() * mean / spread).sum()).float()  # []
    return weight, bias


def _with_head(model: Router, weight: Tensor, bias: Tensor) -> Router:
    made = Router(replace(model.config, clusters=len(bias)))
    tensors = dict(model.state_dict())
    tensors["final_layer.linear.weight"], tensors["final_layer.linear.bias"] = weight.detach(), bias.detach()
    made.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
    return made.to(weight.device).train(model.training)


@contextmanager
def _seeing_head(model: Router) -> Iterator[list[Tensor]]:
    """What goes into the head, [n, 1, D] a call, for as long as the context lasts."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach())

    handle = model.final_layer.linear.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
