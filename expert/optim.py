"""Optimisers whose whole state has names and shapes from the first step on.

A checkpoint's tensor table stands in the plan, so state cannot appear lazily: every tensor exists before training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from paris_swarm.expert.recipe import TrainConfig

# Five quintic steps of the Newton-Schulz iteration with the coefficients of Polar Express (arXiv 2505.16932), optimal
# step by step for singular values down to 1e-3; a shorter run of the iteration uses the last rows' start.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def orthogonalise(matrices: Tensor, steps: int) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: float32 [M, r, c] -> [M, r, c], singular values near 1.

    Muon (Jordan et al. 2024) with Polar Express coefficients. In float32, unlike torch.optim.Muon, whose bfloat16
    products are emulated on most CPUs; batched, for one product of M small matrices beats M products.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    if _by_gram_matrices(x, steps):
        x = _polynomial(x @ x.mT, steps) @ x
    else:
        for index in range(steps):
            a, b, c = _coefficients(index)
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _coefficients(index: int) -> tuple[float, float, float]:
    return POLAR_EXPRESS[min(index, len(POLAR_EXPRESS) - 1)]


def _by_gram_matrices(x: Tensor, steps: int) -> bool:
    """Whether `_polynomial` is right for x [M, r, c]: fewer multiplications (at five steps from c = 1.5 r on; half of
    them at c = 4 r), and exact enough. Its errors are not corrected by the steps that follow, so few steps only; and
    not where products may be rounded to TF32, in which a small singular value's square is lost."""
    return x.is_cpu and 2 <= steps <= len(POLAR_EXPRESS) and x.shape[2] >= 2 * x.shape[1]


def _polynomial(gram: Tensor, steps: int) -> Tensor:
    """What the steps multiply x by, in terms of x @ x.mT alone: [M, r, r] -> [M, r, r]. All factors are polynomials of
    one matrix, so they commute: after a step with factor q the Gram matrix is q @ gram @ q."""
    whole = gram
    for index in range(steps):
        a, b, c = _coefficients(index)
        q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal(dim1=1, dim2=2).add_(a)
        whole = q if index == 0 else q @ whole
        if index < steps - 1:
            gram = q @ gram @ q
    return whole


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Muon's share: the weight matrices inside the transformer's layers, not embeddings, tables or the last layer."""
    return name.startswith("layers.") and name.endswith("weight") and parameter.ndim == 2


class Optimiser:
    """AdamW on everything, or (`optimizer="muon"`) Muon on the hidden matrices and AdamW on the rest.

    `state` names: "exp_avg.<tensor>", "exp_avg_sq.<tensor>" for AdamW and "momentum.<tensor>" for Muon, each of the
    shape of its weight, float32.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.config = config
        named = dict(model.named_parameters())
        muon = {name for name, p in named.items() if config.optimizer == "muon" and is_hidden_matrix(name, p)}
        self._adam = {name: p for name, p in named.items() if name not in muon}
        self._engine = torch.optim.AdamW(
            list(self._adam.values()),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=all(p.device.type in ("cpu", "cuda") for p in self._adam.values()),
        )
        self._matrices = {name: named[name] for name in named if name in muon}
        self._momentum = {name: torch.zeros_like(p) for name, p in self._matrices.items()}
        for p in self._adam.values():
            self._engine.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        # Attention's three projections share one tensor but are three maps: each is orthogonalised for itself.
        self._groups: dict[tuple[int, int], list[tuple[str, int, int]]] = {}
        for name, p in self._matrices.items():
            parts = 3 if name.endswith("in_proj_weight") else 1
            rows = p.shape[0] // parts
            for part in range(parts):
                self._groups.setdefault((rows, p.shape[1]), []).append((name, part * rows, (part + 1) * rows))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update with every learning rate multiplied by `rate`; gradients are read from the parameters."""
        for group in self._engine.param_groups:
            group["lr"] = self.config.lr * rate
        self._engine.step()
        if self._matrices:
            self._muon_step(rate)

    def _muon_step(self, rate: float) -> None:
        config = self.config
        names = list(self._matrices)
        gradients = [
            g if (g := self._matrices[n].grad) is not None else torch.zeros_like(self._momentum[n]) for n in names
        ]
        buffers = [self._momentum[n] for n in names]
        torch._foreach_lerp_(buffers, gradients, 1 - config.momentum)
        updates = dict(zip(names, torch._foreach_lerp(gradients, buffers, config.momentum), strict=True))
        if config.weight_decay:
            weights = [self._matrices[n] for n in names]
            torch._foreach_mul_(weights, 1 - config.matrix_lr * rate * config.weight_decay)
        for (rows, columns), members in self._groups.items():
            stack = torch.stack([updates[name][start:end] for name, start, end in members])
            polar = orthogonalise(stack, config.muon_steps)
            scale = config.matrix_lr * rate * math.sqrt(max(1.0, rows / columns))
            weights = [self._matrices[name].data[start:end] for name, start, end in members]
            torch._foreach_add_(weights, list(polar.unbind(0)), alpha=-scale)

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        for p in (*self._adam.values(), *self._matrices.values()):
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Every state tensor by name (not copies)."""
        out = {f"momentum.{name}": buffer for name, buffer in self._momentum.items()}
        for name, p in self._adam.items():
            out[f"exp_avg.{name}"] = self._engine.state[p]["exp_avg"]
            out[f"exp_avg_sq.{name}"] = self._engine.state[p]["exp_avg_sq"]
        return out

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continues from `state` after `step` updates. Names, shapes and dtypes must already have been checked."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        for p in self._adam.values():
            self._engine.state[p]["step"].fill_(float(step))
