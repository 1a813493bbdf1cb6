"""The recipe of an expert as frozen records.

A recipe travels inside the plan as plain JSON, so `from_dict` is strict: an unknown field, a missing field or a
value of the wrong type is an error that names the field. Two peers with the same recipe digest train the same thing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.expert.shape import check_shape, expert_parameters

_Record = TypeVar("_Record", "ModelConfig", "TrainConfig", "StartWeights")

OUTPUTS = ("velocity", "data", "residual", "noise")
PATHS = ("flow", "cosine")
LOSSES = ("velocity", "data", "noise")
PRECISIONS = ("any", "fp32", "bf16")
MAX_BATCH = 1 << 16
MAX_MUON_STEPS = 64
ADDED: Mapping[str, bool] = MappingProxyType({"added": True})
"""Marks a field that recipes did not have at first: written only where it is not its default, so that older recipes
keep their digest, and read as its default where it is missing."""


# ---------------------------------------------------------------------------------------------------------------------
# records
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one expert network. Lengths in pixels (or latent cells), widths in numbers.

    `output` says what the last layer itself predicts: "velocity" (v = eps - x_0); "data" (x_0, as in "Back to Basics:
    Let Denoising Generative Models Denoise", arXiv 2511.13720); "residual" (what the best linear guess from x_t
    leaves over, at unit scale: the preconditioning of EDM, arXiv 2206.00364, on this path); or "noise" (eps, DDPM,
    arXiv 2006.11239). `path` is the noise path it is trained on: "flow" (straight) or "cosine" (arXiv 2102.09672).
    Callers of the model get a velocity of the straight path in every case (objective.py).
    `adaln` is "single" (one shared modulation and a table a block, PixArt-alpha, arXiv 2310.00426: Paris' choice) or
    "zero" (each block its own modulation, starting at nothing, DiT, arXiv 2212.09748).
    `pooled_text` adds the caption's mean state to the time embedding; `patch_skip` adds a learned linear filter from
    noisy patches to the output. `data_limit` clamps the data read out of a "noise" output: 20 for latents (HDDM, arXiv
    2603.06741), 1 for pixels in -1..1 (as DDPM's samplers clip).
    """

    channels: int = 3
    resolution: int = 32
    patch: int = 4
    hidden: int = 192
    depth: int = 4
    heads: int = 3
    mlp_ratio: float = 4.0
    text_dim: int = 384
    text_tokens: int = 32
    pooled_text: bool = True
    output: str = "velocity"
    path: str = "flow"
    adaln: str = "single"
    patch_skip: bool = False
    data_limit: float = field(default=20.0, metadata=ADDED)

    def __post_init__(self) -> None:
        names = ("channels", "resolution", "patch", "hidden", "depth", "heads", "text_dim", "text_tokens")
        check_shape("model", self, names)
        if not 0 < self.data_limit < math.inf:
            raise ValueError(f"model.data_limit must be finite and above 0, got {self.data_limit}")
        if self.output not in OUTPUTS:
            raise ValueError(f"model.output must be one of {', '.join(OUTPUTS)}, got {self.output!r}")
        if self.path not in PATHS:
            raise ValueError(f"model.path must be one of {', '.join(PATHS)}, got {self.path!r}")
        if self.path == "cosine" and self.output not in ("noise", "data"):
            raise ValueError(f'model.path "cosine" goes with output "noise" or "data", not {self.output!r}')

    @property
    def tokens(self) -> int:
        """Number of image tokens, (resolution / patch) squared."""
        return (self.resolution // self.patch) ** 2

    @property
    def parameters(self) -> int:
        """Number of trained numbers."""
        return expert_parameters(self, pooled_text=self.pooled_text, patch_skip=self.patch_skip)

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """(channels, resolution, text_dim): what experts of one model share, whatever their size and objective."""
        return self.channels, self.resolution, self.text_dim


@dataclass(frozen=True)
class TrainConfig:
    """How one expert is trained. Rates are per step; `steps` is where the schedule ends.

    t_sampling: "uniform", or "logit-normal" (mean `t_mean`, standard deviation `t_std` of logit t; SD3, arXiv
    2403.03206). Positive means lean towards noise. `t_uniform` is the share drawn uniformly all the same, so no t is
    left out. `loss`: squared error of the "velocity", of the "data" or of the "noise" that the prediction amounts to.
    schedule: "constant"; "linear" or "cosine" (to zero over all steps); "wsd" (warm up, hold, then to zero over the
    last `decay_share` of the steps). `precision` of its matrix products: "any" (each peer's choice), "fp32" or "bf16".
    """

    steps: int = 1000
    batch: int = 32
    optimizer: str = "adamw"
    lr: float = 1e-3
    matrix_lr: float = 0.02
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    momentum: float = 0.95
    muon_steps: int = 5
    grad_clip: float = 1.0
    warmup_steps: int = 50
    schedule: str = "wsd"
    decay_share: float = 0.4
    ema: float = 0.995
    condition_dropout: float = 0.1
    t_sampling: str = "logit-normal"
    t_mean: float = 0.0
    t_std: float = 1.0
    t_uniform: float = 0.1
    loss: str = "velocity"
    seed: int = 0
    precision: str = field(default="any", metadata=ADDED)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "muon_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name, limit in (("batch", MAX_BATCH), ("muon_steps", MAX_MUON_STEPS)):
            if getattr(self, name) > limit:
                raise ValueError(f"train.{name} must be at most {limit:,}, got {getattr(self, name):,}")
        choices = {
            "optimizer": ("adamw", "muon"),
            "schedule": ("constant", "linear", "cosine", "wsd"),
            "t_sampling": ("uniform", "logit-normal"),
            "loss": LOSSES,
            "precision": PRECISIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"train.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("lr", "matrix_lr", "weight_decay", "grad_clip", "t_std"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"train.{name} must be finite and not negative, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "momentum", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("condition_dropout", "t_uniform", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train.{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not math.isfinite(self.t_mean):
            raise ValueError(f"train.t_mean must be finite, got {self.t_mean}")
        if self.warmup_steps < 0 or self.seed < 0:
            raise ValueError("train.warmup_steps and train.seed must not be negative")

    def rate(self, step: int) -> float:
        """The multiplier of every learning rate at `step` (0 for the first step), between 0 and 1."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        left = max(0.0, (self.steps - step) / self.steps)
        if self.schedule == "constant":
            return warm
        if self.schedule == "cosine":
            return warm * (1 - math.cos(math.pi * left)) / 2
        if self.schedule == "linear" or self.decay_share == 0:
            return warm * (left if self.schedule == "linear" else 1.0)
        return warm * min(1.0, left / self.decay_share)

    def ema_decay(self, updates: int) -> float:
        """EMA decay after `updates` earlier updates: warmed up, for over short runs 0.9999 keeps initial weights."""
        return min(self.ema, (1 + updates) / (10 + updates))


@dataclass(frozen=True)
class StartWeights:
    """The checkpoint of an ImageNet DiT that training starts from (`expert.pretrained`): a safetensors file by what it
    was called, its BLAKE3 digest and its bytes.
    """

    name: str
    digest: str
    length: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._+-]{1,128}", self.name):
            raise ValueError("start.name must be 1 to 128 letters, digits or ._+-")
        if not re.fullmatch(r"[0-9a-f]{64}", self.digest) or self.length < 1:
            raise ValueError("start.digest must be 64 lower-case hexadecimal characters, start.length at least 1")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what an expert becomes, apart from its rows."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    start: StartWeights | None = None

    def __post_init__(self) -> None:
        if self.model.path == "cosine" and self.train.loss == "velocity":
            raise ValueError('train.loss "velocity" is defined on model.path "flow" only; use "noise" or "data"')

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field written out but those that recipes did not have at first (`ADDED`)."""
        value = {"model": plain_record(self.model), "train": plain_record(self.train)}
        return value if self.start is None else {**value, "start": plain_record(self.start)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Recipe:
        """The recipe written by `to_dict`.

        Raises:
            ValueError: an unknown or missing field, or a value of the wrong type; the message names the field.
        """
        _check_names("recipe", value, {"model", "train"}, {"start"})
        return cls(
            model=read_record(ModelConfig, value["model"], "model"),
            train=read_record(TrainConfig, value["train"], "train"),
            start=read_record(StartWeights, value["start"], "start") if "start" in value else None,
        )

    def digest(self) -> str:
        """BLAKE3 of the recipe's canonical JSON, 64 hex digits."""
        return recipe_digest(self.to_dict())

    def with_data(self, *, channels: int, resolution: int, text_dim: int, text_tokens: int) -> Recipe:
        """This recipe fitted to a prepared data set; patch, width and depth stay."""
        model = replace(
            self.model, channels=channels, resolution=resolution, text_dim=text_dim, text_tokens=text_tokens
        )
        return replace(self, model=model)

    def with_train(self, **changes: Any) -> Recipe:
        """This recipe with fields of `train` replaced."""
        return replace(self, train=replace(self.train, **changes))


# ---------------------------------------------------------------------------------------------------------------------
# plain values, strict reading
# ---------------------------------------------------------------------------------------------------------------------


def plain_record(record: ModelConfig | TrainConfig | StartWeights) -> dict[str, Any]:
    """A record as plain JSON values, without the `ADDED` fields that have their default."""
    unsaid = {
        item.name
        for item in fields(record)
        if item.metadata.get("added") and getattr(record, item.name) == item.default
    }
    return {name: value for name, value in asdict(record).items() if name not in unsaid}


def recipe_digest(value: Mapping[str, Any]) -> str:
    """BLAKE3 of `value` as canonical JSON (sorted keys, compact, no NaN), 64 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return blake3_hex(text.encode())


def read_record(kind: type[_Record], value: Any, where: str) -> _Record:
    """A frozen record of type `kind` from plain JSON; `where` prefixes the field names in errors.

    Raises:
        ValueError: an unknown or missing field, or a value of the wrong type.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be an object, got {type(value).__name__}")
    hints = get_type_hints(kind)
    added = {item.name for item in fields(kind) if item.metadata.get("added")}
    _check_names(where, value, {item.name for item in fields(kind)} - added, added)
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        if name not in value:
            continue
        item = value[name]
        if hint is float and isinstance(item, int) and not isinstance(item, bool):
            try:
                item = float(item)
            except OverflowError as error:
                raise ValueError(f"{where}.{name} is beyond every float") from error
        if type(item) is not hint:
            raise ValueError(f"{where}.{name} must be {hint.__name__}, got {type(item).__name__}")
        values[name] = item
    return kind(**values)


def _check_names(where: str, value: Mapping[str, Any], expected: set[str], optional: Iterable[str] = ()) -> None:
    unknown = sorted(set(value) - expected - set(optional))
    missing = sorted(expected - set(value))
    if unknown:
        raise ValueError(f"{where} has fields this version does not know: {', '.join(unknown)}")
    if missing:
        raise ValueError(f"{where} lacks: {', '.join(missing)}")


# ---------------------------------------------------------------------------------------------------------------------
# named sizes
# ---------------------------------------------------------------------------------------------------------------------

SIZES: dict[str, ModelConfig] = {
    "tiny": ModelConfig(resolution=24, patch=6, hidden=128, depth=4, heads=2, output="residual", patch_skip=True),
    "S/2": ModelConfig(4, 32, 2, 384, 12, 6, 4.0, 768, 77, pooled_text=False),
    "B/2": ModelConfig(4, 32, 2, 768, 12, 12, 4.0, 768, 77, pooled_text=False),
    "XL/2": ModelConfig(4, 32, 2, 1152, 28, 16, 4.0, 768, 77, pooled_text=False),
}
"""S/2, B/2 and XL/2 are DiT's sizes on 32 x 32 x 4 latents (arXiv 2212.09748); XL/2 is Paris' expert."""

DEMO = Recipe(
    model=SIZES["tiny"],
    train=TrainConfig(steps=700, batch=32, optimizer="muon", lr=3e-3, matrix_lr=0.02, muon_steps=4),
)
"""What `make demo` trains: measured in docs/results/recipe-2026-11.md."""


def named_recipe(name: str) -> Recipe:
    """The recipe called `name`: "tiny" is the demo's, the others pair a size with DDM's published training values.

    Raises:
        ValueError: no such name; the message lists the names.
    """
    if name == "tiny":
        return DEMO
    if name not in SIZES:
        raise ValueError(f"no recipe is called {name!r}; there are: {', '.join(SIZES)}")
    published = TrainConfig(
        steps=400_000,
        batch=32,
        optimizer="adamw",
        lr=1e-4,
        beta2=0.999,
        warmup_steps=0,
        schedule="constant",
        ema=0.9999,
        t_sampling="uniform",
        t_uniform=0.0,
    )
    return Recipe(model=SIZES[name], train=published)
