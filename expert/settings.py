"""A recipe changed in a person's words: `size=S/2`, `objective=noise`, `precision=bf16`, or any field by its name.

What experts of one plan may differ in (Heterogeneous Decentralized Diffusion Models, arXiv 2603.06741): all but the
shape of the data, which pictures and captions decide, and the seed, which is the plan's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, get_type_hints

from paris_swarm.expert.recipe import SIZES, ModelConfig, Recipe, TrainConfig

DATA_FIELDS = ("channels", "resolution", "text_dim", "text_tokens")
FIXED_FIELDS = frozenset({*DATA_FIELDS, "seed", "output"})
"""What no setting changes: the data decide the first, the plan's one seed is for all, `objective` sets the last."""
PIXEL_LIMIT = 1.0
LATENT_LIMIT = 20.0
"""`ModelConfig.data_limit` of "noise" experts: pixels lie in -1..1, latents about 0 with some reserve (HDDM)."""


def with_size(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the network of a named size; what it predicts and the shape of the data stay.

    Raises:
        ValueError: no such size, or its patch does not divide the resolution.
    """
    if name not in SIZES:
        raise ValueError(f"no size is called {name!r}; there are: {', '.join(SIZES)}")
    kept = {part: getattr(recipe.model, part) for part in (*DATA_FIELDS, "output", "path", "data_limit")}
    return replace(recipe, model=replace(SIZES[name], **kept))


def with_objective(recipe: Recipe, output: str, path: str | None = None) -> Recipe:
    """The recipe with another objective, and the loss and times that are usual for it.

    output: "velocity", "data" and "residual" go with the straight path and its velocity loss, "noise" with the cosine
    path, uniform times and the noise loss (DDPM, arXiv 2006.11239), unless `path` says otherwise.

    Raises:
        ValueError: no such objective, or none on this path.
    """
    path = path or ("cosine" if output == "noise" else "flow")
    limit = PIXEL_LIMIT if output == "noise" and recipe.model.channels == 3 else LATENT_LIMIT
    model = replace(recipe.model, output=output, path=path, data_limit=limit)
    train = replace(recipe.train, loss=output if path == "cosine" or output == "noise" else "velocity")
    if path == "cosine":
        train = replace(train, t_sampling="uniform", t_uniform=0.0)
    return replace(recipe, model=model, train=train)


def with_settings(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    """The recipe changed as a person wrote it: `size`, `objective` and `path` first, then any field by its name.

    Raises:
        ValueError: no such setting, or a value that it cannot have; it is named.
    """
    left = dict(settings)
    if "size" in left:
        recipe = with_size(recipe, left.pop("size"))
    if "objective" in left or "path" in left:
        recipe = with_objective(recipe, left.pop("objective", recipe.model.output), left.pop("path", None))
    model, train = get_type_hints(ModelConfig), get_type_hints(TrainConfig)
    changes: dict[str, dict[str, Any]] = {"model": {}, "train": {}}
    for name, text in left.items():
        if name not in setting_names():
            raise ValueError(f"there is no setting {name!r}; there are: {', '.join(setting_names())}")
        part, hints = ("model", model) if name in model else ("train", train)
        changes[part][name] = _value_of(text, hints[name], name)
    return replace(
        recipe, model=replace(recipe.model, **changes["model"]), train=replace(recipe.train, **changes["train"])
    )


def setting_names() -> list[str]:
    """The names that `with_settings` knows."""
    known = [item.name for kind in (ModelConfig, TrainConfig) for item in fields(kind)]
    return ["size", "objective", *(name for name in known if name not in FIXED_FIELDS)]


def _value_of(text: str, kind: type, name: str) -> Any:
    """What was written for a field of type bool, int, float or str."""
    words = {"true": True, "false": False}
    try:
        return words[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        kinds = {bool: "true or false", int: "a whole number", float: "a number"}
        raise ValueError(f"{name} must be {kinds[kind]}, got {text!r}") from None


def describe(recipe: Recipe) -> dict[str, str]:
    """What tells a kind of expert from another, for tables: size (a name, or hidden x depth), objective, precision."""
    model = recipe.model
    shape = ("patch", "hidden", "depth", "heads", "mlp_ratio", "adaln")
    named = [name for name, size in SIZES.items() if all(getattr(size, k) == getattr(model, k) for k in shape)]
    return {
        "size": named[0] if named else f"{model.hidden} x {model.depth}",
        "objective": model.output if model.path == "flow" else f"{model.output}, {model.path} path",
        "precision": recipe.train.precision,
    }
