"""The layout of the released Paris folder (Hugging Face repository bageldotcom/paris), read strictly.

Every tensor is compared with its config, and what is written then is a diffusers model that loads: the released
folder's own DDMPipeline class was never published. paris_layout.py has the layout, and writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from paris_swarm.dht_schemas.fields import ROUTER
from paris_swarm.expert.model import Expert
from paris_swarm.expert.recipe import ModelConfig, plain_record, read_record
from paris_swarm.router.diffusers_folder import (
    Content,
    components_source,
    model_index,
    pipeline_source,
    scheduler_config,
)
from paris_swarm.router.layout import (
    CARD_FILE,
    COMPONENTS_FILE,
    CONFIG_FILE,
    EXPERTS_CONFIG,
    MODEL_INDEX,
    PIPELINE_FILE,
    SCHEDULER_CONFIG,
    WEIGHTS_FILE,
    pretty,
    slot_folder,
    weights_path,
)
from paris_swarm.router.lock import LOCK_FILE
from paris_swarm.router.model import Router
from paris_swarm.router.paris_layout import EXTENDED, write_whole
from paris_swarm.router.recipe import RouterConfig

ROUTER_WEIGHTS = (WEIGHTS_FILE, "pytorch_model.safetensors")
TEXT_TOKENS = 77
"""CLIP's, to which the released experts' captions are padded."""
FLOAT_DTYPES = ("F32", "F16", "BF16")
STOCK_FILES = (".json", ".txt", ".model", ".safetensors")
STOCK_FOLDERS = ("text_encoder", "tokenizer", "vae")


class NotParis(ValueError):
    """The folder is not of the released layout, or its tensors are not those of its configs; the file is named."""


@dataclass(frozen=True)
class ParisFolder:
    """A folder of the released layout whose every tensor was compared with its config."""

    path: Path
    experts: tuple[ModelConfig, ...]
    router: RouterConfig
    router_weights: Path

    def weights(self, k: int) -> Path:
        """The weights of expert k."""
        return self.path / f"expert_{k}" / WEIGHTS_FILE


def read_paris(folder: Path) -> ParisFolder:
    """Reads a folder of the released layout: tensors missing, extra, of another shape or no floats are refused.

    Raises:
        NotParis: what is wrong, and in which file. OSError: a file could not be read.
    """
    if (folder / LOCK_FILE).is_file():
        raise NotParis(f"{folder} is an assembled folder: there is nothing to import, diffusers reads it as it is")
    config = _json(folder / CONFIG_FILE)
    count = _field(config, "num_experts", int, folder / CONFIG_FILE)
    size = _field(config, "image_size", int, folder / CONFIG_FILE)
    if not 1 <= count <= 1024:
        raise NotParis(f"{folder / CONFIG_FILE}: num_experts must be between 1 and 1024, got {count}")
    experts = tuple(_read_expert(folder / f"expert_{k}", k, size) for k in range(count))
    if len({(each.channels, each.text_dim) for each in experts}) != 1:
        raise NotParis(f"{folder}: the experts disagree about the shape of pictures or captions")
    found = [folder / ROUTER / name for name in ROUTER_WEIGHTS if (folder / ROUTER / name).is_file()]
    if len(found) != 1:
        raise NotParis(f"{folder / ROUTER} must hold one of {' and '.join(ROUTER_WEIGHTS)}, found {len(found)}")
    return ParisFolder(folder, experts, _read_router(folder / ROUTER, found[0], count, size), found[0])


def import_paris(source: ParisFolder, target: Path, *, stock: Mapping[str, Path] | None = None) -> list[str]:
    """Writes a diffusers model (no lock: nobody signed it) from a folder of the released layout; gives its paths.

    stock: folders of text_encoder, tokenizer and vae where they are not in the source; safetensors and text files are
    taken, pickles are not. Without a text encoder the model draws from encoded captions only.

    Raises:
        NotParis: a file is a link that leads out of its folder. ValueError: `target` holds something, or a stock folder
            does not say its class. OSError: no space.
    """
    named = dict(stock or {})
    folders = {name: source.path / name for name in STOCK_FOLDERS if (source.path / name).is_dir()} | named
    classes = {name: stock_class(name, path) for name, path in folders.items()}

    def files() -> Iterator[tuple[str, Content]]:
        index = json.loads(model_index(with_router=True, text=None))
        yield MODEL_INDEX, pretty({**index, **classes})
        yield PIPELINE_FILE, pipeline_source()
        components, shape = components_source(), {"num_experts": len(source.experts)}
        numbers = list(range(len(source.experts)))
        # The released experts attend to all 77 states of a caption, padding included.
        yield EXPERTS_CONFIG, pretty({"_class_name": "DDMExperts", **shape, "experts": numbers, "pad_text": True})
        yield f"experts/{COMPONENTS_FILE}", components
        for k, config in enumerate(source.experts):
            about = {"model_type": "dit_expert", "expert_id": k, "recipe": {"model": plain_record(config)}}
            yield f"{slot_folder(str(k))}/{CONFIG_FILE}", pretty(about)
            yield weights_path(str(k)), own_file(source.weights(k), source.path)
        yield f"{ROUTER}/{COMPONENTS_FILE}", components
        about = {"model_type": ROUTER, "recipe": {"model": asdict(source.router)}}
        yield f"{ROUTER}/{CONFIG_FILE}", pretty(about)
        yield weights_path(ROUTER), own_file(source.router_weights, source.path)
        yield SCHEDULER_CONFIG, scheduler_config()
        for name, path in folders.items():
            for each in sorted(path.iterdir()):
                if each.is_file() and each.suffix in STOCK_FILES:
                    yield f"{name}/{each.name}", own_file(each, path if name in named else source.path)
        yield CARD_FILE, _IMPORTED.encode("utf-8")

    return write_whole(target, files(), {})


_IMPORTED = """\
---
library_name: diffusers
pipeline_tag: text-to-image
---

Imported by `paris-swarm import` from a folder of the released Paris layout. Every tensor was compared with its config;
nobody signed these files, and there is no lock.
"""


def stock_class(name: str, folder: Path) -> list[str]:
    """[library, class] of a stock component, from its own config.

    Raises:
        ValueError: it does not say one that is loaded from diffusers or transformers.
    """
    if name == "vae":
        library, found = "diffusers", _json(folder / CONFIG_FILE).get("_class_name")
    elif name == "tokenizer":
        library, found = "transformers", _json(folder / "tokenizer_config.json").get("tokenizer_class")
    else:
        named = _json(folder / CONFIG_FILE).get("architectures")
        library, found = "transformers", named[0] if isinstance(named, list) and named else None
    if not isinstance(found, str) or not found.isidentifier():
        raise ValueError(f"{folder} does not say which class of {library} it is")
    return [library, found]


def _read_expert(folder: Path, k: int, size: int) -> ModelConfig:
    path = folder / CONFIG_FILE
    said = _json(path)
    kind = said.get("model_type")
    try:
        if kind == "dit_expert" + EXTENDED:
            config = read_record(ModelConfig, said.get("paris_swarm"), "paris_swarm")
        elif kind == "dit_expert":
            if not (said.get("use_adaln_single") is True and said.get("use_text_conditioning") is True):
                raise NotParis(f"{path}: only experts with AdaLN-Single and captions are known, as the released ones")
            if said.get("out_channels", said.get("in_channels")) != said.get("in_channels"):
                raise NotParis(f"{path}: out_channels must be in_channels")
            names = ("in_channels", "patch_size", "hidden_size", "num_layers", "num_heads", "text_embed_dim")
            channels, patch, hidden, depth, heads, text = (_field(said, name, int, path) for name in names)
            ratio = float(said.get("mlp_ratio", 4.0))
            config = ModelConfig(channels, size, patch, hidden, depth, heads, ratio, text, TEXT_TOKENS, False)
        else:
            raise NotParis(f"{path}: model_type is {kind!r}, not dit_expert")
    except NotParis:
        raise
    except (TypeError, ValueError) as error:
        raise NotParis(f"{path} cannot be used: {error}") from error
    if said.get("expert_id") != k or config.resolution != size:
        raise NotParis(f"{path} is of another expert or picture size than its folder")
    check_tensors(folder / WEIGHTS_FILE, Expert, config)
    return config


def _read_router(folder: Path, weights: Path, clusters: int, size: int) -> RouterConfig:
    path = folder / CONFIG_FILE
    said = _json(path)
    kind = said.get("model_type")
    try:
        if kind == ROUTER + EXTENDED:
            config = read_record(RouterConfig, said.get("paris_swarm"), "paris_swarm")
        elif kind == ROUTER and said.get("architecture", "dit") == "dit":
            names = ("num_clusters", "in_channels", "patch_size", "hidden_size", "num_layers", "num_heads")
            number, channels, patch, hidden, depth, heads = (_field(said, name, int, path) for name in names)
            ratio = float(said.get("mlp_ratio", 4.0))
            config = RouterConfig(number, channels, size, patch, hidden, depth, heads, ratio, "none", 1)
        else:
            raise NotParis(f"{path}: model_type is {kind!r}, not a router of architecture dit")
    except NotParis:
        raise
    except (TypeError, ValueError) as error:
        raise NotParis(f"{path} cannot be used: {error}") from error
    if (config.clusters, config.resolution) != (clusters, size):
        raise NotParis(f"{path} is of another number of experts or picture size than {CONFIG_FILE}")
    check_tensors(weights, Router, config)
    return config


def check_tensors(path: Path, kind: type[nn.Module], config: object) -> None:
    """Compares a safetensors file with the network `kind(config)`: names, shapes, one float dtype, finite values.

    Raises:
        NotParis: the file and the first tensor that differs.
    """
    with torch.device("meta"):
        expected = {name: list(tensor.shape) for name, tensor in kind(config).state_dict().items()}
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            if odd := sorted(found ^ expected.keys()):
                word = "lacks" if odd[0] in expected else "has more than its config says:"
                raise NotParis(f"{path} {word} {odd[0]} ({len(odd)} tensors missing or extra)")
            dtypes = set()
            for name, shape in expected.items():
                part = file.get_slice(name)
                if part.get_shape() != shape:
                    raise NotParis(f"{path}: {name} has shape {part.get_shape()}, its config says {shape}")
                dtypes.add(part.get_dtype())
                if part.get_dtype() in FLOAT_DTYPES and not bool(torch.isfinite(file.get_tensor(name)).all()):
                    raise NotParis(f"{path}: {name} holds a NaN or an infinity")
    except (OSError, SafetensorError) as error:
        raise NotParis(f"{path} cannot be read as safetensors: {error}") from error
    if len(dtypes) != 1 or not dtypes <= set(FLOAT_DTYPES):
        raise NotParis(f"{path}: tensors must be of one dtype among {', '.join(FLOAT_DTYPES)}, found {sorted(dtypes)}")


def own_file(path: Path, root: Path) -> Path:
    """`path`, which may lead out of `root` only as the Hugging Face cache does: from a snapshot to a blob beside it.

    Any other link could name a file of whoever imports the folder, who would then pass it on as part of a model.

    Raises:
        NotParis: it leads elsewhere. OSError: it is not there.
    """
    found = path.resolve(strict=True)
    blobs = [each.parent / "blobs" for each in root.resolve().parents if each.name == "snapshots"]
    if not found.is_relative_to(root.resolve()) and found.parent not in [each.resolve() for each in blobs]:
        raise NotParis(f"{path} is a link to {found}, outside {root}: put the file itself there")
    return path


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotParis(f"{path} is not there: no folder of the released Paris layout") from error
    except (ValueError, RecursionError) as error:  # the latter: brackets within brackets, a file's length deep
        raise NotParis(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise NotParis(f"{path} is no JSON object")
    return value


def _field(config: Mapping[str, Any], name: str, kind: type[int], path: Path) -> int:
    value = config.get(name)
    if type(value) is not kind:
        raise NotParis(f"{path}: {name} must be a whole number, got {value!r}")
    return value
