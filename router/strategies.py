"""From a router's posterior to the weight of each expert: the strategies of DDM's and Paris' tables, and one of ours.

    top-1, top-2, ...   the k likeliest experts, renormalised
    full                all of them
    threshold-0.05      those whose probability is at least tau, renormalised (the likeliest always stays)
    sample              one expert, drawn from the posterior at every step
    nucleus-0.9         one expert, drawn from the likeliest experts that together reach p
    adaptive            as many as the router is in doubt about: k = exp(entropy), rounded, renormalised
    oracle              the true cluster's expert, whatever the router says; for evaluation only

(Decentralized Diffusion Models, arXiv 2501.05450, Table 1; Paris, arXiv 2510.03434.) Which is best the papers disagree
on, so every one of them is here under one name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = (
    "top-1, top-2, ..., full, threshold-TAU (as threshold-0.05), sample, nucleus-P (as nucleus-0.9), adaptive or oracle"
)


@dataclass(frozen=True)
class Strategy:
    """One parsed strategy. value: k, tau or p, where the kind has one."""

    kind: str
    value: float = 0.0

    @classmethod
    def parse(cls, text: str, clusters: int | None) -> Strategy:
        """The strategy called `text` for `clusters` experts, None where nobody knows yet how many.

        Raises:
            ValueError: no such strategy, more experts than there are, or tau or p outside 0..1.
        """
        if text in ("full", "sample", "adaptive", "oracle"):
            return cls(text)
        if match := re.fullmatch(r"top-([1-9][0-9]{0,3})", text):
            kept = int(match[1])
            if clusters is not None and kept > clusters:
                raise ValueError(f"the strategy {text} needs {kept} experts, the plan has {clusters}")
            return cls("top", kept)
        if match := re.fullmatch(r"(threshold|nucleus)-((?:0|1)?\.?[0-9]{1,6})", text):
            value = float(match[2])
            if not 0 < value <= 1:
                raise ValueError(f"the strategy {text} needs a number above 0 and at most 1")
            return cls(match[1], value)
        raise ValueError(f"the strategy must be {NAMES}, got {text!r}")

    @property
    def draws(self) -> bool:
        """Whether each sample and step needs a uniform number of its own."""
        return self.kind in ("sample", "nucleus")

    def weights(self, posterior: Tensor, *, draws: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Weights [B, K] from posterior [B, K], rows sum to 1; a missing expert has posterior 0 and gets none.

        draws: uniform numbers [B] in 0..1, for "sample" and "nucleus". labels: int64 [B], for "oracle".

        Raises:
            ValueError: the strategy needs draws or labels and has none, or a label is no expert that is here.
        """
        if self.kind == "full":
            return posterior
        if self.kind == "oracle":
            return self._true(posterior, labels)
        ordered, order = posterior.sort(dim=1, descending=True, stable=True)  # [B, K] each
        before = ordered.cumsum(dim=1) - ordered  # [B, K], probability of the likelier ones
        place = torch.arange(posterior.shape[1], device=posterior.device)  # [K]
        if self.kind == "top":
            kept = (place < int(self.value)).expand_as(ordered)
        elif self.kind == "threshold":
            kept = (ordered >= self.value) | (place == 0)
        elif self.kind == "nucleus":
            kept = before < self.value
        elif self.kind == "sample":
            kept = torch.ones_like(ordered, dtype=torch.bool)
        else:  # adaptive: the perplexity is the number of equally likely experts that would leave as much doubt
            entropy = -torch.special.xlogy(ordered, ordered).sum(dim=1, keepdim=True)  # [B, 1]
            kept = place < entropy.exp().round().clamp(min=1)
        chosen = ordered * kept
        if self.draws:
            chosen = _one_of(chosen, draws)
        weights = torch.zeros_like(posterior).scatter(1, order, chosen)  # [B, K]
        return weights / weights.sum(dim=1, keepdim=True)

    def _true(self, posterior: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError("the strategy oracle needs the true cluster of each picture")
        clusters = posterior.shape[1]
        if int(labels.min()) < 0 or int(labels.max()) >= clusters:
            raise ValueError(f"the strategy oracle needs labels 0 to {clusters - 1}")
        weights = torch.nn.functional.one_hot(labels, clusters).to(posterior.dtype)  # [B, K]
        if bool(((posterior == 0).all(dim=0) & (weights > 0).any(dim=0)).any()):
            raise ValueError("the strategy oracle names an expert that is missing from this folder")
        return weights


def _one_of(chosen: Tensor, draws: Tensor | None) -> Tensor:
    """One expert a row, with probability in proportion to `chosen` [B, K]: 1 there, 0 elsewhere."""
    if draws is None:
        raise ValueError("a strategy that samples needs one uniform number a picture and step")
    heights = chosen.cumsum(dim=1)  # [B, K]
    level = draws.to(heights)[:, None] * heights[:, -1:]  # [B, 1]
    index = (heights <= level).sum(dim=1).clamp(max=chosen.shape[1] - 1)  # [B]
    # Rounding may point past the last expert with any probability; the last one that has some is meant.
    last = (chosen > 0).sum(dim=1) - 1  # [B]
    return torch.nn.functional.one_hot(torch.minimum(index, last), chosen.shape[1]).to(chosen.dtype)
