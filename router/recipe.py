"""The recipe of a router as frozen records.

It travels inside the plan as plain JSON and is read as strictly as an expert's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from paris_swarm.expert.recipe import ADDED, TrainConfig, plain_record, read_record, recipe_digest
from paris_swarm.expert.shape import check_shape, router_parameters


@dataclass(frozen=True)
class RouterConfig:
    """The shape of a router network. Lengths in pixels (or latent cells), widths in numbers.

    `text` says what the router sees of the caption: "none" (as published in Paris, arXiv 2510.03434: x_t and t only)
    or "pooled" (the mean token state is added to the time embedding). Where captions decide the cluster, a router
    that does not see them cannot follow a prompt: at t = 1 the noise says nothing about the cluster.
    `adaln` is "single" (one shared modulation and a table a block, PixArt-alpha, arXiv 2310.00426) or "zero" (each
    block its own, DiT, arXiv 2212.09748), as an expert's.
    """

    clusters: int = 4
    channels: int = 3
    resolution: int = 24
    patch: int = 6
    hidden: int = 96
    depth: int = 2
    heads: int = 3
    mlp_ratio: float = 4.0
    text: str = "pooled"
    text_dim: int = 384
    adaln: str = field(default="single", metadata=ADDED)

    def __post_init__(self) -> None:
        names = ("clusters", "channels", "resolution", "patch", "hidden", "depth", "heads", "text_dim")
        check_shape("router", self, names)
        if self.text not in ("pooled", "none"):
            raise ValueError(f'router.text must be "pooled" or "none", got {self.text!r}')

    @property
    def tokens(self) -> int:
        """Number of image tokens, (resolution / patch) squared; the CLS token comes on top."""
        return (self.resolution // self.patch) ** 2

    @property
    def parameters(self) -> int:
        """Number of trained numbers."""
        return router_parameters(self, clusters=self.clusters, pooled_text=self.text == "pooled")


@dataclass(frozen=True)
class RouterRecipe:
    """Everything that decides what a router becomes, apart from its rows and their labels.

    `train` is an expert's training record: `condition_dropout` is the probability of giving the null caption,
    `t_sampling` where on the path the labelled samples lie. Its `loss` says nothing here: a router's is cross-entropy.
    """

    model: RouterConfig = field(default_factory=RouterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field written out but those that recipes did not have at first (`ADDED`)."""
        return {"model": plain_record(self.model), "train": plain_record(self.train)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> RouterRecipe:
        """The recipe written by `to_dict`.

        Raises:
            ValueError: an unknown or missing field, or a value of the wrong type; the message names the field.
        """
        if set(value) != {"model", "train"}:
            raise ValueError(f"a router recipe has the fields model and train, this one has {sorted(value)}")
        return cls(
            model=read_record(RouterConfig, value["model"], "router"),
            train=read_record(TrainConfig, value["train"], "train"),
        )

    def digest(self) -> str:
        """BLAKE3 of the recipe's canonical JSON, 64 hex digits."""
        return recipe_digest(self.to_dict())

    def with_data(self, *, clusters: int, channels: int, resolution: int, text_dim: int) -> RouterRecipe:
        """This recipe fitted to a plan; the patch becomes the largest one up to its own that divides the resolution."""
        patch = next(size for size in range(min(self.model.patch, resolution), 0, -1) if resolution % size == 0)
        model = replace(
            self.model, clusters=clusters, channels=channels, resolution=resolution, patch=patch, text_dim=text_dim
        )
        return replace(self, model=model)

    def with_train(self, **changes: Any) -> RouterRecipe:
        """This recipe with fields of `train` replaced."""
        return replace(self, train=replace(self.train, **changes))


# ---------------------------------------------------------------------------------------------------------------------
# named sizes
# ---------------------------------------------------------------------------------------------------------------------

BLIND = "-blind"

_SEEING: dict[str, RouterConfig] = {
    "tiny": RouterConfig(),
    "S/2": RouterConfig(8, 4, 32, 2, 384, 12, 6, 4.0, "pooled", 768, "zero"),
    "B/2": RouterConfig(8, 4, 32, 2, 768, 12, 12, 4.0, "pooled", 768, "zero"),
}

SIZES: dict[str, RouterConfig] = _SEEING | {
    f"{name}{BLIND}": replace(config, text="none") for name, config in _SEEING.items()
}
"""Every size with the pooled caption, and without it under its name and "-blind".

S/2 and B/2 are DiT's sizes on 32 x 32 x 4 latents (arXiv 2212.09748). "B/2-blind" is the published router of Paris: x_t
and t only, a CLS token, a linear head on 8 clusters. How it is modulated is not published. With a modulation of their
own (AdaLN-Zero) its blocks alone hold 127.5M numbers and the whole of ours 129.7M; a shared one (AdaLN-Single) would
make it 90M. 129.1M is what is published: 0.5 % of the numbers lie where we do not know them.
"""

DEMO = RouterRecipe(
    model=SIZES["tiny"],
    train=TrainConfig(
        steps=400,
        batch=64,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.01,
        ema=0.99,
        t_sampling="uniform",
        t_uniform=0.0,
    ),
)
"""What `make demo` trains beside an expert: 363,556 numbers, about 25 s of one CPU core at 24 px. On four DiceBear
families the probe's cross-entropy fell below 0.005 within 100 steps; without the caption such a router names the
family of 0.99 of the samples at t = 0.3, of 0.75 at t = 0.8 and of a chance share at t = 1.
"""


def named_router_recipe(name: str) -> RouterRecipe:
    """The recipe called `name`: "tiny" and "tiny-blind" train as the demo's, the others with DDM's training values.

    Raises:
        ValueError: no such name; the message lists the names.
    """
    if name not in SIZES:
        raise ValueError(f"no router recipe is called {name!r}; there are: {', '.join(SIZES)}")
    if name.removesuffix(BLIND) == "tiny":
        return replace(DEMO, model=SIZES[name])
    published = TrainConfig(
        steps=400_000,
        batch=256,
        optimizer="adamw",
        lr=1e-4,
        beta2=0.999,
        warmup_steps=0,
        schedule="constant",
        ema=0.9999,
        t_sampling="uniform",
        t_uniform=0.0,
    )
    return RouterRecipe(model=SIZES[name], train=published)
