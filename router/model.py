"""The router network: a small diffusion transformer with a CLS token that says which cluster a noised sample is from.

p(k | x_t, t) weighs the experts' velocities so that their sum is the flow of all the data (Decentralized Diffusion
Models, arXiv 2501.05450, section 3). With `text: pooled` it is p(k | x_t, t, caption), the weight a prompt asks for.
Blocks and embeddings are the expert's, without cross-attention.

Shapes in the comments: B batch, C channels, H and W height and width, N image tokens, D width, K clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paris_swarm.expert.model import Block, FinalLayer, PatchEmbed, TimeEmbed, initialise, masked_mean
from paris_swarm.router.recipe import RouterConfig


class Router(nn.Module):
    """Logits of p(k | x_t, t[, caption]).

    x [B, C, H, W] float, the noised sample; t [B] float in 0..1, 1 is noise; states [B, L, D_text] float, the
    caption's token states; mask [B, L] bool, True for a real token. Returns [B, K] float. With `text: none` states
    and mask are not looked at. The null caption in their place gives the unconditional posterior.
    """

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden
        self.patch_embed = PatchEmbed(config.channels, d, config.patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, d))
        self.pos_embed = nn.Parameter(torch.empty(1, config.tokens, d))
        self.time_embed = TimeEmbed(d)
        if config.text == "pooled":
            self.pooled_proj = nn.Linear(config.text_dim, d)
        if config.adaln == "single":
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.layers = nn.ModuleList(
            Block(d, config.heads, config.mlp_ratio, cross=False, adaln=config.adaln) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(d, 1, config.clusters, config.adaln)
        initialise(self)  # the last layer starts at zero: an untrained router says 1 / K for every cluster

    def forward(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        h = self.patch_embed(x) + self.pos_embed  # [B, N, D]
        h = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), h], dim=1)  # [B, 1 + N, D]
        embedding = self.time_embed(t)  # [B, D]
        if self.config.text == "pooled":
            embedding = embedding + self.pooled_proj(masked_mean(states, mask))  # [B, D]
        shared = embedding  # [B, D]
        if self.config.adaln == "single":
            shared = self.t_block(embedding).reshape(x.shape[0], 6, -1)  # [B, 6, D]
        for layer in self.layers:
            h = layer(h, shared)  # [B, 1 + N, D]
        logits: Tensor = self.final_layer(h[:, :1], embedding)[:, 0]  # [B, K]
        return logits
