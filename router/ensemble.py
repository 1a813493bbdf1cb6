"""Experts and a router as one velocity: which experts see which sample, and how their answers are weighed.

u(x_t, t) = sum_k p(k | x_t, t) v_k(x_t, t) (Decentralized Diffusion Models, arXiv 2501.05450, section 3). One routing
decision a sample and step; guidance is computed inside each expert, whose conditional and unconditional halves go
through it in one batch and share the decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paris_swarm.dht_schemas.fields import ROUTER
from paris_swarm.router.resident import Resident
from paris_swarm.router.strategies import Strategy

Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x [B, ...], t [B], states [B, L, D], mask [B, L]) -> an expert's velocity [B, ...] or a router's logits [B, K]."""


class MissingExperts(ValueError):
    """Experts (or the router) of the plan are not here. Fetch them, or allow sampling without some of the experts: the
    pictures then say how much of the router's weight went elsewhere. none_here: no expert is."""

    def __init__(self, missing: Iterable[int | str], *, none_here: bool = False) -> None:
        self.missing = tuple(str(slot) for slot in missing)
        named = ["the router" if slot == ROUTER else f"expert {slot}" for slot in self.missing]
        if ROUTER in self.missing:
            way_out = (
                "without a router nothing says which expert a picture needs (`paris-swarm router rows` gives rows to "
                "train one from the experts alone)"
            )
        elif none_here:
            way_out = "without any expert there is nothing to draw with"
        else:
            way_out = (
                "or allow missing experts: weight the router gives to them then goes to the others, and each picture "
                "says how much"
            )
        super().__init__(f"not here: {', '.join(named)}. Assemble again once they are published; {way_out}")


@dataclass(frozen=True)
class NullText:
    """The empty caption's encoding: states float [L, D], of which the first `length` rows are real tokens."""

    states: Tensor
    length: int

    def rows(self, count: int, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """States [count, tokens, D] in the dtype and on the device of `like`, and their mask [count, tokens] bool.

        Raises:
            ValueError: the null caption has more than `tokens` tokens.
        """
        if self.length > tokens:
            raise ValueError(f"the null caption has {self.length} tokens, captions were cut to {tokens}")
        states = torch.zeros(tokens, self.states.shape[1], dtype=like.dtype, device=like.device)  # [tokens, D]
        states[: self.length] = self.states[: self.length].to(like)
        mask = torch.arange(tokens, device=like.device) < self.length  # [tokens]
        return states.expand(count, -1, -1), mask.expand(count, -1)


@dataclass(frozen=True)
class Decision:
    """One routing decision: weights [B, K], rows sum to 1, zero for an expert that is not used; redirected [B], the
    probability the router gave to experts that are missing and that therefore went to the others."""

    weights: Tensor
    redirected: Tensor

    def in_use(self) -> list[int]:
        """Experts that at least one sample uses, ascending."""
        return torch.nonzero((self.weights > 0).any(dim=0)).flatten().tolist()


def decide(
    logits: Tensor,
    strategy: Strategy,
    available: Tensor,
    *,
    draws: Tensor | None = None,
    labels: Tensor | None = None,
) -> Decision:
    """The weights that `strategy` gives the available experts of each sample.

    logits [B, K]; available [K] bool, at least one True; draws [B] and labels [B] where the strategy needs them.
    """
    redirected = logits.softmax(dim=1)[:, ~available].sum(dim=1)  # [B]
    # Masked before the softmax, so that a row whose weight lies on missing experts alone still has a well-defined rest.
    posterior = logits.masked_fill(~available, -torch.inf).softmax(dim=1)  # [B, K]
    return Decision(strategy.weights(posterior, draws=draws, labels=labels), redirected)


class Ensemble:
    """K experts and their router as one velocity.

    experts: for each expert that is here, a function that loads it; called when a sample first needs it.
    memory_budget: bytes of experts kept in memory, None for all; the least recently used go first.
    router: its network; None is right for a single cluster only.
    allow_missing: False refuses to be built without all experts; True spreads their weight over the others and reports
    it in `Decision.redirected`.

    Raises:
        MissingExperts: an expert or the router is missing (the router always, for several clusters).
        ValueError: an expert number outside 0..K-1.
    """

    def __init__(
        self,
        clusters: int,
        experts: Mapping[int, Callable[[], Network]],
        router: Network | None,
        null: NullText,
        *,
        allow_missing: bool = False,
        memory_budget: int | None = None,
    ) -> None:
        if any(not 0 <= k < clusters for k in experts):
            raise ValueError(f"experts are numbered 0 to {clusters - 1}, got {sorted(experts)}")
        missing: list[int | str] = [k for k in range(clusters) if k not in experts]
        without_router = router is None and clusters > 1
        if (missing and not (allow_missing and experts)) or without_router:
            raise MissingExperts([*missing, *([ROUTER] if without_router else [])], none_here=not experts)
        self.clusters = clusters
        self.missing = tuple(k for k in range(clusters) if k not in experts)
        self.null = null
        self.resident: Resident[Network] = Resident(experts, memory_budget)
        self._router = router

    def expert(self, k: int) -> Network:
        """Expert k, loaded if it is not in memory."""
        return self.resident.get(k)

    def route(
        self,
        x: Tensor,
        t: Tensor,
        states: Tensor,
        mask: Tensor,
        *,
        strategy: str = "top-1",
        draws: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Decision:
        """The decision for samples x [B, ...] at times t [B] under captions states [B, L, D], mask [B, L].

        draws [B], uniform in 0..1, for strategies that sample; labels int64 [B], the true clusters, for "oracle".

        Raises:
            ValueError: no such strategy, or it lacks the draws or labels it needs.
        """
        chosen = Strategy.parse(strategy, self.clusters)
        if self._router is None:
            logits = torch.zeros(x.shape[0], 1, device=x.device)  # [B, 1]
        else:
            logits = self._router(x, t, states, mask)  # [B, K]
        available = torch.ones(self.clusters, dtype=torch.bool, device=logits.device)  # [K]
        available[list(self.missing)] = False
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return decide(logits, chosen, available, draws=draws, labels=labels)

    def velocity(
        self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor, decision: Decision, *, guidance: float = 1.0
    ) -> Tensor:
        """The experts' velocities weighed by `decision`: [B, ...] like x.

        Samples are grouped by expert: an expert runs once, on the samples that use it. guidance 1 is the conditional
        velocity alone and 0 the unconditional one alone; other values cost both.
        """
        out = torch.zeros_like(x)  # [B, ...]
        for k in self.resident.in_order(decision.in_use()):
            rows = torch.nonzero(decision.weights[:, k]).flatten()  # [b]
            own_x, own_t, own_states, own_mask = (part.index_select(0, rows) for part in (x, t, states, mask))
            v = self.guided(k, own_x, own_t, own_states, own_mask, guidance)  # [b, ...]
            weight = decision.weights[:, k].index_select(0, rows).to(out.dtype)  # [b]
            out.index_add_(0, rows, v.to(out.dtype) * weight.reshape(-1, *[1] * (x.ndim - 1)))
        return out  # [B, ...]

    def guided(self, k: int, x: Tensor, t: Tensor, states: Tensor, mask: Tensor, guidance: float) -> Tensor:
        """Expert k's velocity [B, ...] with classifier-free guidance inside the expert (arXiv 2207.12598):
        v_null + guidance (v_caption - v_null).
        """
        expert = self.expert(k)
        if guidance == 1.0:
            return expert(x, t, states, mask)  # [b, ...]
        null_states, null_mask = self.null.rows(x.shape[0], states.shape[1], states)
        if guidance == 0.0:
            return expert(x, t, null_states, null_mask)  # [b, ...]
        both = expert(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([states, null_states]), torch.cat([mask, null_mask])
        )  # [2b, ...]
        conditional, unconditional = both.chunk(2)
        return torch.lerp(unconditional, conditional, guidance)  # [b, ...]
