"""Captions without padding, as a processor trains on them, teach what captions under a mask teach."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.expert.synthetic import small_task
from torch import Tensor

from paris_swarm.expert.model import Attention, Expert, seeded
from paris_swarm.expert.packed_captions import PackedTokens, real_tokens
from paris_swarm.expert.recipe import ModelConfig

CONFIG = ModelConfig(hidden=32, depth=2, heads=2, text_dim=24, text_tokens=6, resolution=8)


def values_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    inputs = [part.detach().clone().requires_grad_() for part in inputs]
    out = function(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_to_packed_captions_is_attention_under_a_mask(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention = Attention(32, 2).to(dtype)
    torch.nn.init.normal_(attention.in_proj_weight, std=0.3)
    x, states = torch.randn(4, 9, 32, dtype=dtype), torch.randn(4, 6, 32, dtype=dtype)
    mask = torch.tensor([[1, 0, 0, 0, 0, 0], [1] * 6, [0, 1, 1, 0, 0, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)

    def packed(x: Tensor, states: Tensor) -> Tensor:
        tokens = real_tokens(states, mask)
        assert isinstance(tokens, PackedTokens) and tokens.lengths == (1, 6, 3, 3)
        return attention(x, tokens)

    def padded(x: Tensor, states: Tensor) -> Tensor:
        return attention(x, states, mask[:, None, None, :])

    tolerance = 1e-11 if dtype is torch.float64 else 5e-2
    for one, other in zip(
        values_and_gradients(packed, [x, states]), values_and_gradients(padded, [x, states]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_caption_without_a_token_is_seen_as_it_is_at_sampling() -> None:
    model = seeded(Expert, CONFIG, 0)
    assert isinstance(model, Expert)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    draw = torch.Generator().manual_seed(1)
    x, states = torch.randn(2, 3, 8, 8, generator=draw), torch.randn(2, 6, 24, generator=draw)
    mask = torch.tensor([[True] * 6, [False] * 6])
    assert real_tokens(states, mask) is None
    recorded = model(x, torch.tensor([0.3, 0.7]), states, mask)
    with torch.no_grad():
        sampled = model(x, torch.tensor([0.3, 0.7]), states, mask)
    assert recorded.requires_grad and torch.isfinite(recorded).all()
    torch.testing.assert_close(recorded.detach(), sampled, rtol=1e-5, atol=1e-5)


def test_packed_captions_teach_what_a_mask_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    task = small_task(batch=8)

    def gradients() -> list[Tensor]:
        model = task.build_model()
        torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
        examples = task.draw(task.batch(0), torch.Generator().manual_seed(3))
        return list(torch.autograd.grad(task.losses(model, examples).sum(), list(model.parameters())))

    torch.manual_seed(0)
    ours = gradients()
    monkeypatch.setattr("paris_swarm.expert.model.trains_eagerly_here", lambda x: False)
    torch.manual_seed(0)
    plain = gradients()
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-5 * float(other.abs().max()) + 1e-7)
