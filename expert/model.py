"""The expert network: a diffusion transformer with AdaLN-Single and cross-attention to the caption's token states.

Follows Paris (arXiv 2510.03434) and Decentralized Diffusion Models (arXiv 2501.05450); AdaLN-Single is PixArt-alpha's
(arXiv 2310.00426), the transformer and AdaLN-Zero DiT's (arXiv 2212.09748). Tensor names are those of the released
Paris experts; `pooled_proj` and `patch_skip` are the additions (`pooled_text`, `patch_skip`).

Shapes in the comments: B batch, C channels, H and W height and width, N image tokens, L caption tokens, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paris_swarm.expert.objective import Objective
from paris_swarm.expert.packed_captions import PackedTokens, attend_to_packed, real_tokens, trains_eagerly_here
from paris_swarm.expert.recipe import ModelConfig
from paris_swarm.expert.shape import FREQUENCIES

TIME_SCALE = 999.0
"""The network sees 999 t for t in 0..1."""


# ---------------------------------------------------------------------------------------------------------------------
# embeddings
# ---------------------------------------------------------------------------------------------------------------------


class TimeEmbed(nn.Module):
    """Sinusoids of 999 t (cosines, then sines, longest period 10,000), then a two-layer SiLU MLP."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """[B] in 0..1 -> [B, D]."""
        assert isinstance(self.rates, Tensor)
        angle = (t.float() * TIME_SCALE)[:, None] * self.rates.float()[None]  # [B, 128]
        if self.mlp[0].weight.dtype == torch.float64:  # an audit's reference: these angles, without the waves' rounding
            angle = angle.double()
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)  # [B, 256]
        out: Tensor = self.mlp(waves.to(self.mlp[0].weight.dtype))  # [B, D]
        return out


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the real tokens: states [B, L, D], mask [B, L] bool -> [B, D]; a row without a token gives zeros."""
    weight = mask.to(states.dtype)  # [B, L]
    total = torch.einsum("bld,bl->bd", states, weight)  # [B, D]
    return total / weight.sum(1, keepdim=True).clamp(min=1)  # [B, D]


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C*p*p], in the order a convolution of stride p reads them."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)  # [B, C, h, p, w, p]
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)  # [B, N, C*p*p]


def unpatchify(tokens: Tensor, channels: int, height: int, width: int, patch: int) -> Tensor:
    """[B, N, p*p*C] -> [B, C, H, W]; the channel is the fastest index within a patch, as in DiT."""
    b = tokens.shape[0]
    x = tokens.reshape(b, height // patch, width // patch, patch, patch, channels)  # [B, h, w, p, p, C]
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, height, width)  # [B, C, H, W]


class PatchEmbed(nn.Conv2d):
    """A convolution of stride p, computed as one matrix product: [B, C, H, W] -> [B, N, D]."""

    def __init__(self, channels: int, hidden: int, patch: int) -> None:
        super().__init__(channels, hidden, kernel_size=patch, stride=patch)
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(patchify(x, self.patch), self.weight.flatten(1), self.bias)  # [B, N, D]


# ---------------------------------------------------------------------------------------------------------------------
# block
# ---------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention with the parameter names of torch.nn.MultiheadAttention (in_proj_weight, out_proj, ...)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden, hidden))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden))
        self.out_proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, context: Tensor | PackedTokens | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B, N, D], context [B, L, D] (None: x itself), mask bool, broadcastable to [B, 1, N, L] -> [B, N, D].

        A context of packed tokens has no mask.
        """
        b, n, d = x.shape
        # Splits, not slices: the gradient of a split is one concatenation, of a slice a zero-filled whole.
        if context is None:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).split(d, dim=2)  # each [B, N, D]
            out = F.scaled_dot_product_attention(self._heads(q), self._heads(k), self._heads(v), attn_mask=mask)
        else:
            w_q, w_kv = self.in_proj_weight.split((d, 2 * d))
            b_q, b_kv = self.in_proj_bias.split((d, 2 * d))
            q = self._heads(F.linear(x, w_q, b_q))  # [B, heads, N, D/heads]
            if isinstance(context, PackedTokens):
                out = attend_to_packed(q, F.linear(context.tokens, w_kv, b_kv), context.lengths)
            else:
                k, v = F.linear(context, w_kv, b_kv).split(d, dim=2)  # each [B, L, D]
                out = F.scaled_dot_product_attention(q, self._heads(k), self._heads(v), attn_mask=mask)
        mixed: Tensor = self.out_proj(out.transpose(1, 2).reshape(b, n, d))  # [B, N, D]
        return mixed

    def _heads(self, part: Tensor) -> Tensor:
        """[B, L, D] -> [B, heads, L, D/heads]."""
        return part.unflatten(2, (self.heads, -1)).transpose(1, 2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine, then scale and shift: x [B, N, D], shift and scale [B, 1, D] -> [B, N, D]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)  # [B, N, D]


class Block(nn.Module):
    """Gated self-attention, then (unless `cross` is False) ungated cross-attention, then a gated MLP.

    adaln: "single" adds this block's table to the modulation that all blocks share; "zero" computes its own.
    """

    def __init__(
        self, hidden: int, heads: int, mlp_ratio: float = 4.0, cross: bool = True, adaln: str = "single"
    ) -> None:
        super().__init__()
        inner = int(hidden * mlp_ratio)
        if adaln == "single":
            self.scale_shift_table = nn.Parameter(torch.empty(6, hidden))
        else:
            self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))
        self.attn = Attention(hidden, heads)
        if cross:
            self.cross_attn = Attention(hidden, heads)
        self.mlp = nn.Sequential(nn.Linear(hidden, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, hidden))

    def forward(
        self,
        x: Tensor,
        shared: Tensor,
        context: Tensor | PackedTokens | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, D], context [B, L, D], mask [B, 1, 1, L] bool (none beside packed tokens) -> [B, N, D].

        shared: the shared modulation [B, 6, D] ("single"), or the embedding of time and caption [B, D] ("zero").
        """
        if shared.ndim == 3:
            six = (self.scale_shift_table[None] + shared)[:, :, None]  # [B, 6, 1, D]
        else:
            six = self.adaln(shared).reshape(x.shape[0], 6, 1, -1)  # [B, 6, 1, D]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six.unbind(1)  # each [B, 1, D]
        x = torch.addcmul(x, gate_a, self.attn(modulate(x, shift_a, scale_a)))  # [B, N, D]
        if context is not None:
            x = x + self.cross_attn(x, context, mask)  # [B, N, D]
        return torch.addcmul(x, gate_m, self.mlp(modulate(x, shift_m, scale_m)))  # [B, N, D]


class FinalLayer(nn.Module):
    """Modulated LayerNorm, then one linear map to pixels of a patch.

    adaln: "single" modulates by its own table plus the time embedding; "zero" by a linear map of the embedding.
    """

    def __init__(self, hidden: int, patch: int, channels: int, adaln: str = "single") -> None:
        super().__init__()
        if adaln == "single":
            self.scale_shift_table = nn.Parameter(torch.empty(2, hidden))
        else:
            self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        self.single = adaln == "single"
        self.linear = nn.Linear(hidden, patch * patch * channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, N, D], embedding [B, D] -> [B, N, p*p*C]."""
        if self.single:
            both = (self.scale_shift_table[None] + embedding[:, None])[:, :, None]  # [B, 2, 1, D]
        else:
            both = self.adaln(embedding).reshape(x.shape[0], 2, 1, -1)  # [B, 2, 1, D]
        shift, scale = both.unbind(1)  # each [B, 1, D]
        out: Tensor = self.linear(modulate(x, shift, scale))  # [B, N, p*p*C]
        return out


class PatchSkip(nn.Module):
    """A linear filter of each noisy patch whose gains follow the time: what a narrow transformer cannot carry through.

    Near the data the best guess of the noise is x_t less its projection onto what patches of this cluster look like, a
    Wiener filter; it needs all p*p*C directions of a patch, while the tokens have room for few.
    """

    def __init__(self, hidden: int, patch: int, channels: int) -> None:
        super().__init__()
        size = patch * patch * channels
        self.patch = patch
        self.inner = nn.Linear(size, size, bias=False)
        self.gain = nn.Linear(hidden, size)
        self.outer = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, C, H, W], embedding [B, D] -> [B, N, p*p*C]."""
        basis = self.inner(patchify(x, self.patch))  # [B, N, p*p*C]
        out: Tensor = self.outer(basis * (1 + self.gain(embedding))[:, None])  # [B, N, p*p*C]
        return out


# ---------------------------------------------------------------------------------------------------------------------
# expert
# ---------------------------------------------------------------------------------------------------------------------


class Expert(nn.Module):
    """The velocity of one cluster's flow, v_k(x_t, t, caption), v = eps - x_0.

    x [B, C, H, W] float, pixels or latents at about unit scale; t [B] float in 0..1, 1 is noise; states [B, L, D_text]
    float, the caption's token states; mask [B, L] bool, True for a real token. Returns [B, C, H, W].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.objective = Objective(config.output, config.path, config.data_limit)
        d = config.hidden
        self.patch_embed = PatchEmbed(config.channels, d, config.patch)
        self.pos_embed = nn.Parameter(torch.empty(1, config.tokens, d))
        self.time_embed = TimeEmbed(d)
        self.text_proj = nn.Linear(config.text_dim, d)
        if config.pooled_text:
            self.pooled_proj = nn.Linear(config.text_dim, d)
        if config.adaln == "single":
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.layers = nn.ModuleList(
            Block(d, config.heads, config.mlp_ratio, adaln=config.adaln) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(d, config.patch, config.channels, config.adaln)
        if config.patch_skip:
            self.patch_skip = PatchSkip(d, config.patch, config.channels)
        initialise(self)

    def predict(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """What the last layer says at a point of this expert's own path, before it is a velocity: [B, C, H, W]."""
        h = self.patch_embed(x) + self.pos_embed  # [B, N, D]
        embedding = self.time_embed(t)  # [B, D]
        if self.config.pooled_text:
            embedding = embedding + self.pooled_proj(masked_mean(states, mask))  # [B, D]
        shared = embedding  # [B, D]
        if self.config.adaln == "single":
            shared = self.t_block(embedding).reshape(x.shape[0], 6, -1)  # [B, 6, D]
        context, visible = self._captions(states, mask)
        for layer in self.layers:
            h = layer(h, shared, context, visible)  # [B, N, D]
        h = self.final_layer(h, embedding)  # [B, N, p*p*C]
        if self.config.patch_skip:
            h = h + self.patch_skip(x, embedding)  # [B, N, p*p*C]
        return unpatchify(h, self.config.channels, x.shape[2], x.shape[3], self.config.patch)  # [B, C, H, W]

    def _captions(self, states: Tensor, mask: Tensor) -> tuple[Tensor | PackedTokens, Tensor | None]:
        """What the layers attend to, and its mask: [B, L, D] and [B, 1, 1, L], or the real tokens alone."""
        packed = real_tokens(states, mask) if trains_eagerly_here(states) else None
        if packed is not None:
            return PackedTokens(self.text_proj(packed.tokens), packed.lengths), None
        return self.text_proj(states), mask[:, None, None, :]

    def forward(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor, *, raw: bool = False) -> Tensor:
        """The velocity at (x, t) of the straight path.

        raw: (x, t) is a point of this expert's own path instead, and the answer is what the last layer says there
        (training needs it; see objective.py).
        """
        if raw:
            return self.predict(x, t, states, mask)  # [B, C, H, W]
        point = self.objective.locate(x, t)
        return self.objective.velocity(self.predict(point.x, point.u, states, mask), x, t)  # [B, C, H, W]


# ---------------------------------------------------------------------------------------------------------------------
# initial weights, the one place
# ---------------------------------------------------------------------------------------------------------------------


def initialise(model: nn.Module) -> None:
    """Initial weights from torch's global generator; call under `seeded` to make them a function of a seed.

    Xavier-uniform for every linear map; zero for the last layer, so an untrained network says zero, and for the output
    of cross-attention, so captions enter gently; gates start small through the shared modulation and the tables.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith("scale_shift_table"):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name == "pos_embed":
            nn.init.normal_(parameter, std=0.02)
            parameter.detach().add_(grid_waves(parameter.shape[1], parameter.shape[2]))
        elif name == "cls_token" or name.startswith(("time_embed", "t_block", "pooled_proj")):
            nn.init.normal_(parameter, std=0.02)
        elif name == "patch_skip.inner.weight":
            nn.init.eye_(parameter)
        elif name.startswith(("final_layer", "patch_skip")) or ".cross_attn.out_proj" in name or ".adaln." in name:
            nn.init.zeros_(parameter)
        elif name.endswith("in_proj_weight"):
            for third in parameter.detach().chunk(3):
                nn.init.xavier_uniform_(third)
        else:
            nn.init.xavier_uniform_(parameter.detach().flatten(1))


def grid_waves(tokens: int, hidden: int) -> Tensor:
    """[1, N, D]: sines and cosines of a token's row and column, as in DiT; any N, laid out as the smallest square.

    Where a patch lies is then told from the first step; positions stay learned, as Paris' are.
    """
    side = math.isqrt(max(tokens - 1, 0)) + 1
    quarter = -(-hidden // 4)
    rates = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)  # [D/4]
    place = torch.arange(tokens)
    angles = [axis[:, None].float() * rates[None] for axis in (place // side, place % side)]  # two of [N, D/4]
    waves = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)  # [N, at least D]
    return waves[None, :, :hidden]  # [1, N, D]


def seeded(build: type[nn.Module], config: object, seed: int) -> nn.Module:
    """`build(config)` with initial weights that depend on `seed` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config)


def parameter_count(model: nn.Module) -> int:
    """Number of trained numbers."""
    return sum(parameter.numel() for parameter in model.parameters())
