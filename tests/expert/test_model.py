from dataclasses import replace

import pytest
import torch
from tests.expert.synthetic import small_recipe

from paris_swarm.expert.model import (
    Expert,
    masked_mean,
    parameter_count,
    patchify,
    seeded,
    unpatchify,
)
from paris_swarm.expert.objective import DATA_STD, SMALLEST_T
from paris_swarm.expert.recipe import SIZES

CONFIG = small_recipe().model


def inputs(batch: int = 3) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 8, 8, generator=draw)
    t = torch.linspace(0.1, 0.9, batch)
    states = torch.randn(batch, CONFIG.text_tokens, CONFIG.text_dim, generator=draw)
    mask = torch.arange(CONFIG.text_tokens)[None] < torch.tensor([2, 4, 6])[:batch, None]
    return x, t, states, mask


def awake(config: object = CONFIG) -> Expert:
    """A network whose zero-initialised layers have been given values, so that every input can matter."""
    model = seeded(Expert, config, 1)
    assert isinstance(model, Expert)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def test_the_published_size_and_names() -> None:
    with torch.device("meta"):
        model = Expert(SIZES["XL/2"])
    assert parameter_count(model) == 605_970_448
    names = set(model.state_dict())
    assert {
        "patch_embed.weight",
        "patch_embed.bias",
        "pos_embed",
        "time_embed.mlp.0.weight",
        "time_embed.mlp.2.bias",
        "text_proj.weight",
        "t_block.1.weight",
        "layers.27.scale_shift_table",
        "layers.0.attn.in_proj_weight",
        "layers.0.attn.out_proj.bias",
        "layers.0.cross_attn.in_proj_bias",
        "layers.0.mlp.2.weight",
        "final_layer.linear.weight",
        "final_layer.scale_shift_table",
    } <= names
    assert model.state_dict()["patch_embed.weight"].shape == (1152, 4, 2, 2)
    assert model.state_dict()["pos_embed"].shape == (1, 256, 1152)


def test_attention_equals_torchs_own() -> None:
    attention = awake().layers[0].cross_attn
    stock = torch.nn.MultiheadAttention(CONFIG.hidden, CONFIG.heads, batch_first=True)
    stock.load_state_dict(attention.state_dict())
    x, context = torch.randn(2, 5, CONFIG.hidden), torch.randn(2, 4, CONFIG.hidden)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    expected = stock(x, context, context, key_padding_mask=~mask)[0]
    torch.testing.assert_close(attention(x, context, mask[:, None, None]), expected)


def test_an_untrained_network_says_zero() -> None:
    x, t, states, mask = inputs()
    assert torch.equal(seeded(Expert, CONFIG, 0)(x, t, states, mask), torch.zeros_like(x))


def test_initial_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    first, second, other = (seeded(Expert, CONFIG, seed).state_dict() for seed in (4, 4, 5))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_tokens_behind_the_mask_do_not_matter_and_others_do() -> None:
    model = awake()
    x, t, states, mask = inputs()
    out = model(x, t, states, mask)
    hidden = torch.where(mask[..., None], states, torch.full_like(states, 1e3))
    torch.testing.assert_close(model(x, t, hidden, mask), out)
    assert not torch.allclose(model(x, t, -states, mask), out)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    model = awake()
    x, t, states, mask = inputs()
    whole = model(x, t, states, mask)
    for row in range(3):
        one = slice(row, row + 1)
        torch.testing.assert_close(model(x[one], t[one], states[one], mask[one]), whole[one])


def test_a_data_output_becomes_the_velocity_towards_it() -> None:
    model = awake(replace(CONFIG, output="data"))
    x, _, states, mask = inputs()
    t = torch.tensor([0.001, 0.5, 1.0])
    x0 = model.predict(x, t, states, mask)
    expected = (x - x0) / torch.tensor([SMALLEST_T, 0.5, 1.0])[:, None, None, None]
    torch.testing.assert_close(model(x, t, states, mask), expected)


def test_a_residual_output_starts_at_the_best_linear_guess() -> None:
    draw = torch.Generator().manual_seed(3)
    x0 = torch.randn(4000, 3, 8, 8, generator=draw) * DATA_STD
    noise = torch.randn(x0.shape, generator=draw)
    model = seeded(Expert, replace(CONFIG, output="residual"), 0)
    _, _, states, mask = inputs(1)
    for time in (0.0, 0.3, 0.7, 1.0):
        x = (1 - time) * x0 + time * noise
        v = noise - x0
        slope = (x * v).mean() / x.square().mean()
        said = model(x[:1], torch.tensor([time]), states, mask)
        torch.testing.assert_close(said, slope * x[:1], atol=0.03, rtol=0.03)


def test_patches_come_back_in_their_places() -> None:
    x = torch.randn(2, 3, 8, 12)
    patches = patchify(x, 4)  # channel slowest
    again = patches.reshape(2, 6, 3, 16).transpose(2, 3).reshape(2, 6, 48)  # channel fastest
    assert torch.equal(unpatchify(again, 3, 8, 12, 4), x)


def test_the_patch_embedding_is_a_convolution() -> None:
    embed = awake().patch_embed
    x = torch.randn(2, 3, 8, 8)
    stock = torch.nn.functional.conv2d(x, embed.weight, embed.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(x), stock)


def test_the_mean_counts_real_tokens_only() -> None:
    states = torch.tensor([[[2.0], [4.0], [100.0]], [[7.0], [7.0], [7.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert torch.equal(masked_mean(states, mask), torch.tensor([[3.0], [0.0]]))


@pytest.mark.parametrize("output", ["velocity", "data", "residual"])
@pytest.mark.parametrize("extras", [True, False])
def test_every_weight_learns(extras: bool, output: str) -> None:
    model = awake(replace(CONFIG, pooled_text=extras, patch_skip=extras, output=output))
    model(*inputs()).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
