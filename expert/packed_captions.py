"""Captions without their padding, as a processor trains on them.

Half of a batch's caption tokens are padding: their projections and the attention to them are work for nothing
(docs/results/train-2026-11.md). A processor can take each row at its own length; the results equal those under a mask
up to rounding. Taken only while gradients are recorded: a GPU, torch.compile, sampling and probing take the mask.

Shapes: B batch, N image tokens, L caption tokens, T real caption tokens of the whole batch, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def trains_eagerly_here(x: Tensor) -> bool:
    """Whether gradients of x's functions are recorded on a CPU, without torch.compile."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class PackedTokens:
    """The real tokens of a batch of captions, row after row: tokens [T, D], and how many of them each row has."""

    tokens: Tensor
    lengths: tuple[int, ...]


def real_tokens(states: Tensor, mask: Tensor) -> PackedTokens | None:
    """The tokens of states [B, L, D] that mask [B, L] names, or None where some row has none."""
    lengths = tuple(mask.sum(1).tolist())
    if not all(lengths):
        return None
    real = mask.flatten().nonzero().squeeze(1)  # [T]
    return PackedTokens(states.flatten(0, 1).index_select(0, real), lengths)


def attend_to_packed(q: Tensor, keys_values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Attention of each row to its own tokens: q [B, heads, N, D/heads], keys_values [T, 2D] -> as q."""
    heads = q.shape[1]
    k, v = keys_values.unflatten(1, (2, heads, -1)).permute(1, 2, 0, 3).unbind(0)  # each [heads, T, D/heads]
    rows = zip(q.split(1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
    return torch.cat([F.scaled_dot_product_attention(own, key[None], value[None]) for own, key, value in rows])
