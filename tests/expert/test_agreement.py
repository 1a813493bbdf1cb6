"""The network against an independent implementation of the same one: diffusers' PixArt transformer.

PixArt's block is Paris' block: AdaLN-Single, ungated and un-normed cross-attention, gated GELU MLP. Where they differ
(learned positions, a linear caption projection) diffusers' part is given our values. Outputs and gradients agree in
float64.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from paris_swarm.expert.model import Expert, seeded
from paris_swarm.expert.recipe import SIZES, ModelConfig

CONFIG = replace(SIZES["S/2"], resolution=8, hidden=48, depth=3, heads=4, text_dim=24, text_tokens=6)


def stock_twin(model: Expert, config: ModelConfig) -> torch.nn.Module:
    """diffusers' network with the weights of ``model``."""
    from diffusers import PixArtTransformer2DModel

    twin = PixArtTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.hidden // config.heads,
        in_channels=config.channels,
        out_channels=config.channels,
        num_layers=config.depth,
        cross_attention_dim=config.hidden,
        sample_size=config.resolution,
        patch_size=config.patch,
        caption_channels=None,
        use_additional_conditions=False,
        norm_eps=1e-6,
    ).double()
    ours = model.state_dict()
    theirs: dict[str, Tensor] = {
        "pos_embed.proj.weight": ours["patch_embed.weight"],
        "pos_embed.proj.bias": ours["patch_embed.bias"],
        "adaln_single.emb.timestep_embedder.linear_1.weight": ours["time_embed.mlp.0.weight"],
        "adaln_single.emb.timestep_embedder.linear_1.bias": ours["time_embed.mlp.0.bias"],
        "adaln_single.emb.timestep_embedder.linear_2.weight": ours["time_embed.mlp.2.weight"],
        "adaln_single.emb.timestep_embedder.linear_2.bias": ours["time_embed.mlp.2.bias"],
        "adaln_single.linear.weight": ours["t_block.1.weight"],
        "adaln_single.linear.bias": ours["t_block.1.bias"],
        "scale_shift_table": ours["final_layer.scale_shift_table"],
        "proj_out.weight": ours["final_layer.linear.weight"],
        "proj_out.bias": ours["final_layer.linear.bias"],
    }
    for index in range(config.depth):
        mine, its = f"layers.{index}.", f"transformer_blocks.{index}."
        theirs[its + "scale_shift_table"] = ours[mine + "scale_shift_table"]
        for attn, stock in (("attn", "attn1"), ("cross_attn", "attn2")):
            for kind in ("weight", "bias"):
                thirds = ours[f"{mine}{attn}.in_proj_{kind}"].chunk(3)
                for name, third in zip(("to_q", "to_k", "to_v"), thirds, strict=True):
                    theirs[f"{its}{stock}.{name}.{kind}"] = third
                theirs[f"{its}{stock}.to_out.0.{kind}"] = ours[f"{mine}{attn}.out_proj.{kind}"]
        for kind in ("weight", "bias"):
            theirs[f"{its}ff.net.0.proj.{kind}"] = ours[f"{mine}mlp.0.{kind}"]
            theirs[f"{its}ff.net.2.{kind}"] = ours[f"{mine}mlp.2.{kind}"]
    missing, unexpected = twin.load_state_dict(theirs, strict=False)
    assert not unexpected and not missing, (missing, unexpected)
    twin.pos_embed.pos_embed = ours["pos_embed"].clone()
    twin.adaln_single.emb.time_proj = WideSinusoids()
    return twin


class WideSinusoids(torch.nn.Module):
    """diffusers' Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0), its waves in float64 as ours are."""

    def forward(self, timesteps: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10_000.0) * torch.arange(128, dtype=torch.float32) / 128)
        angle = (timesteps.float()[:, None] * rates[None]).double()
        return torch.cat([angle.cos(), angle.sin()], dim=1)


@pytest.fixture(scope="module")
def networks() -> tuple[Expert, torch.nn.Module]:
    pytest.importorskip("diffusers")
    model = seeded(Expert, CONFIG, 0)
    assert isinstance(model, Expert)
    draw = torch.Generator().manual_seed(1)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.1)
    return model, stock_twin(model, CONFIG)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(3, CONFIG.channels, 8, 8, generator=draw, dtype=torch.float64)
    t = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    states = torch.randn(3, CONFIG.text_tokens, CONFIG.text_dim, generator=draw, dtype=torch.float64)
    mask = torch.arange(CONFIG.text_tokens)[None] < torch.tensor([1, 4, 6])[:, None]
    return x, t, states, mask


def test_outputs_and_gradients_agree_with_diffusers(networks: tuple[Expert, torch.nn.Module]) -> None:
    model, twin = networks
    x, t, states, mask = inputs()
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = model(x_ours, t, states, mask)
    theirs = twin(
        x_theirs,
        encoder_hidden_states=model.text_proj(states),
        timestep=t.float() * 999.0,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        encoder_attention_mask=mask,
        return_dict=False,
    )[0]
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model.zero_grad()
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    torch.testing.assert_close(x_theirs.grad, x_ours.grad, rtol=1e-9, atol=1e-9)
    pairs = [
        ("patch_embed.weight", "pos_embed.proj.weight"),
        ("t_block.1.weight", "adaln_single.linear.weight"),
        ("layers.1.mlp.0.weight", "transformer_blocks.1.ff.net.0.proj.weight"),
        ("layers.2.cross_attn.out_proj.weight", "transformer_blocks.2.attn2.to_out.0.weight"),
        ("layers.0.scale_shift_table", "transformer_blocks.0.scale_shift_table"),
        ("final_layer.linear.weight", "proj_out.weight"),
    ]
    mine, its = dict(model.named_parameters()), dict(twin.named_parameters())
    for ours_name, theirs_name in pairs:
        torch.testing.assert_close(its[theirs_name].grad, mine[ours_name].grad, rtol=1e-9, atol=1e-9)


def test_a_changed_weight_shows(networks: tuple[Expert, torch.nn.Module]) -> None:
    """The agreement above is not vacuous: each pair of parts matters to the output."""
    model, _ = networks
    x, t, states, mask = inputs()
    before = model(x, t, states, mask)
    for name in ("layers.1.mlp.0.weight", "layers.2.cross_attn.in_proj_weight", "final_layer.scale_shift_table"):
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.add_(0.05)
            changed = model(x, t, states, mask)
            parameter.sub_(0.05)
        assert (changed - before).abs().max() > 1e-3
