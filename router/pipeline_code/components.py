"""The networks of an assembled folder as diffusers components: loaded strictly, or not at all.

`ModelMixin.from_pretrained` warns about a missing tensor and fills it with random numbers; these classes compare names,
shapes and dtypes of every tensor first and refuse.
"""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from paris_swarm.expert.memory import check_forward
from paris_swarm.expert.model import Expert
from paris_swarm.expert.recipe import ModelConfig, read_record
from paris_swarm.router.model import Router
from paris_swarm.router.pipeline_code.plain_blake3 import plain_blake3_hex
from paris_swarm.router.recipe import RouterConfig

CONFIG_NAME, WEIGHTS_NAME = "config.json", "diffusion_pytorch_model.safetensors"
NULL_CAPTION_NAME, LOCK_NAME = "null_caption.safetensors", "lock.json"
SOURCE = Path(__file__).read_bytes()
"""Of this file, as it was when it was loaded: what a saved pipeline carries along."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
log = logging.getLogger(__name__)


class WeightsRefused(ValueError):
    """A folder's weights or config are not what they must be: the message names the file and the tensor or field."""


class StrictComponent(ModelMixin, ConfigMixin):
    """What the two components share: a folder in, a frozen network out. Pickles are never read."""

    config_name = CONFIG_NAME

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        subfolder: str | None = None,
        device_map: Any = None,
        variant: str | None = None,
        **_: Any,
    ) -> StrictComponent:
        """The component in a local folder, frozen, in eval mode; torch_dtype as diffusers means it (None: as stored).

        Raises:
            WeightsRefused: a file is missing, or a tensor is missing, extra, of another shape, no float or not finite.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if variant is not None:
            raise WeightsRefused(f"{folder} holds no variant {variant!r}: load it with torch_dtype instead")
        model = cls.read(folder)
        if torch_dtype is not None:
            model.to(torch_dtype)
        if isinstance(device_map, str) and device_map not in ("auto", "balanced"):
            model.to(device_map)
        elif isinstance(device_map, Mapping) and "" in device_map:
            model.to(device_map[""])
        return model.eval().requires_grad_(False)

    @classmethod
    @abstractmethod
    def read(cls, folder: Path) -> StrictComponent:
        """The component in a folder, in the dtype of the file."""


class DDMExperts(StrictComponent):
    """Every expert that a folder holds: expert_K/{config.json, diffusion_pytorch_model.safetensors}.

    num_experts: K of the plan; configs: config.json of each expert that is here, by number; about: what pictures say of
    their model (plan id, assembly digest), the recommended guidance, and whether captions are padded to full length.
    `null_caption` is the empty caption's states, float32 [n, D], or None: then the text encoder is asked.
    """

    @register_to_config
    def __init__(self, num_experts: int, configs: dict[str, Any], about: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({name: _expert(model_config(config)) for name, config in configs.items()})
        self.null_caption: Tensor | None = None

    @property
    def here(self) -> list[int]:
        """Numbers of the experts that are here."""
        return sorted(int(name) for name in self.experts)

    @property
    def missing(self) -> list[int]:
        """Numbers of the experts that are not."""
        return [k for k in range(self.config.num_experts) if str(k) not in self.experts]

    @property
    def model_config(self) -> ModelConfig:
        """The shape of a picture and of a caption, which all experts share."""
        return next(iter(self.experts.values())).config

    def forward(self, k: int, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Velocity of expert k in the dtype of x [B, C, H, W]; the network itself runs in the dtype of its weights."""
        expert = self.experts[str(k)]
        dtype = expert.pos_embed.dtype
        # Where the point lies, and what the answer means, is computed in x's own precision.
        point = expert.objective.locate(x, t)
        said = expert.predict(point.x.to(dtype), point.u, states.to(dtype), mask).to(x.dtype)  # [B, C, H, W]
        return expert.objective.velocity(said, x, t)  # [B, C, H, W]

    @classmethod
    def read(cls, folder: Path) -> DDMExperts:
        """The experts under `folder`; the assembly digest is that of lock.json beside `folder`, where there is one."""
        config = read_json(folder / CONFIG_NAME)
        number, names = config.get("num_experts"), config.get("experts")
        if not isinstance(number, int) or not isinstance(names, list) or not names:
            raise WeightsRefused(f"{folder / CONFIG_NAME} does not say which experts are here")
        if any(type(k) is not int or not 0 <= k < number for k in names) or len(set(names)) != len(names):
            raise WeightsRefused(f"{folder / CONFIG_NAME}: experts must be different numbers from 0 to {number - 1}")
        about = {key: config[key] for key in ("plan", "guidance", "pad_text") if key in config}
        lock = folder.parent / LOCK_NAME
        if lock.is_file():
            about["assembly"] = plain_blake3_hex(lock.read_bytes())
        configs = {str(k): read_json(folder / f"expert_{k}" / CONFIG_NAME) for k in sorted(names)}
        shapes = {model_config(each).data_shape for each in configs.values()}
        if len(shapes) != 1:
            raise WeightsRefused(f"{folder}: the experts disagree about the shape of pictures or captions")
        model = cls(number, configs, about)
        for k, expert in model.experts.items():
            load_strictly(expert, folder / f"expert_{k}" / WEIGHTS_NAME)
        null = folder / NULL_CAPTION_NAME
        if null.is_file():
            states = read_tensors_of(null).get("null_states")
            if states is None or states.ndim != 2 or states.shape[1] != model.model_config.text_dim:
                raise WeightsRefused(f"{null} holds no caption of this model's text encoder")
            model.null_caption = states.float()
        if model.missing:
            log.warning(
                "experts missing here: %s; their share of the router's weight goes to the others, and every picture "
                "says how much",
                ", ".join(map(str, model.missing)),
            )
        return model

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Writes config.json, the null caption and one folder an expert, as `from_pretrained` reads them."""
        folder = Path(save_directory)
        about = {key: value for key, value in (self.config.about or {}).items() if key != "assembly"}
        save_code(folder)
        write_json(folder / CONFIG_NAME, {"num_experts": self.config.num_experts, "experts": self.here, **about})
        for name, expert in self.experts.items():
            write_json(folder / f"expert_{name}" / CONFIG_NAME, dict(self.config.configs[name]))
            save_strictly(expert, folder / f"expert_{name}" / WEIGHTS_NAME)
        if self.null_caption is not None:
            save_file({"null_states": self.null_caption.half().contiguous()}, folder / NULL_CAPTION_NAME)


def _expert(config: ModelConfig) -> Expert:
    """Raises TooLarge: this machine has no memory for it."""
    check_forward(config)
    return Expert(config)


class DDMRouter(StrictComponent):
    """The router: logits of p(k | x_t, t, caption), float32 [B, K]."""

    @register_to_config
    def __init__(self, recipe: dict[str, Any]) -> None:
        super().__init__()
        config = router_config({"recipe": recipe})
        check_forward(config)
        self.network = Router(config)

    def forward(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """x [B, C, H, W], t [B], states [B, L, D], mask [B, L] -> [B, K]."""
        dtype = self.network.pos_embed.dtype
        logits: Tensor = self.network(x.to(dtype), t, states.to(dtype), mask).float()  # [B, K]
        return logits

    @classmethod
    def read(cls, folder: Path) -> DDMRouter:
        """The router in `folder`."""
        config = read_json(folder / CONFIG_NAME)
        router_config(config)
        model = cls(config["recipe"])
        load_strictly(model.network, folder / WEIGHTS_NAME)
        return model

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Writes config.json and the weights, as `from_pretrained` reads them."""
        save_code(Path(save_directory))
        write_json(Path(save_directory) / CONFIG_NAME, {"model_type": "router", "recipe": self.config.recipe})
        save_strictly(self.network, Path(save_directory) / WEIGHTS_NAME)


# ---------------------------------------------------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------------------------------------------------


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """The network that an expert's config.json describes. Raises WeightsRefused."""
    try:
        return read_record(ModelConfig, config["recipe"]["model"], "recipe.model")
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsRefused(f"an expert's {CONFIG_NAME} cannot be used: {error!r}") from error


def router_config(config: Mapping[str, Any]) -> RouterConfig:
    """The network that the router's config.json describes. Raises WeightsRefused."""
    try:
        return read_record(RouterConfig, config["recipe"]["model"], "recipe.model")
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsRefused(f"the router's {CONFIG_NAME} cannot be used: {error!r}") from error


def load_strictly(network: nn.Module, path: Path) -> None:
    """Weights of `network` from a safetensors file with exactly its tensors; their dtype becomes the network's.

    Raises:
        WeightsRefused: names or shapes differ, dtypes are mixed or no floats, a value is not finite.
    """
    own, found = network.state_dict(), read_tensors_of(path)
    if odd := sorted(own.keys() ^ found.keys()):
        missing = [name for name in odd if name in own]
        what = "lacks" if missing else "has more than this network:"
        raise WeightsRefused(f"{path} {what} {(missing or odd)[0]} ({len(odd)} tensors missing or extra)")
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            raise WeightsRefused(f"{path}: {name} has shape {list(tensor.shape)}, not {list(own[name].shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsRefused(f"{path}: {name} holds a NaN or an infinity")
    dtypes = {tensor.dtype for tensor in found.values()}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        raise WeightsRefused(f"{path}: tensors must be of one dtype among {FLOATS}, found {sorted(map(str, dtypes))}")
    network.to(dtypes.pop())
    network.load_state_dict(found)


def save_strictly(network: nn.Module, path: Path) -> None:
    """The tensors of `network` as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


def save_code(folder: Path) -> None:
    """This file beside the weights, where it stands on its own (in the package it does not)."""
    if not __name__.startswith("paris_swarm."):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{__name__.split('.')[-1]}.py").write_bytes(SOURCE)


def read_tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises WeightsRefused."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise WeightsRefused(f"{path} cannot be read as safetensors: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises WeightsRefused."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise WeightsRefused(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise WeightsRefused(f"{path} is no JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """JSON for people."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
