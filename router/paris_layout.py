"""The layout of the released Paris folder (Hugging Face repository bageldotcom/paris): written, and read strictly.

    config.json, model_index.json
    expert_K/{config.json, diffusion_pytorch_model.safetensors}
    router/{config.json, diffusion_pytorch_model.safetensors}      pytorch_model.safetensors is read too

Tensor names are the published ones, which are this package's own. What the layout has no words for (`pooled_text`,
`patch_skip`, another output or path, AdaLN-Zero, a router that sees captions) is written only where the caller asks for
it, under another `model_type`, so that no reader of the released layout takes it for what it is not. The released
folder's own DDMPipeline class was never published: what `import_paris` writes is a diffusers model that loads.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from paris_swarm.dht_schemas.digest import digest_file
from paris_swarm.dht_schemas.fields import ROUTER
from paris_swarm.expert.model import Expert
from paris_swarm.expert.recipe import ModelConfig, plain_record, read_record
from paris_swarm.router.diffusers_folder import (
    DIFFUSERS_VERSION,
    Content,
    components_source,
    model_index,
    pipeline_source,
    scheduler_config,
)
from paris_swarm.router.folder import Assembled
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
from paris_swarm.router.model import Router
from paris_swarm.router.recipe import RouterConfig

ROUTER_WEIGHTS = (WEIGHTS_FILE, "pytorch_model.safetensors")
EXTENDED = "_extended"
"""Ends `model_type` where a network is more than the released layout can say."""
TEXT_TOKENS = 77
"""CLIP's, to which the released experts' captions are padded."""
FLOAT_DTYPES = ("F32", "F16", "BF16")
STOCK_FILES = (".json", ".txt", ".model", ".safetensors")
STOCK_FOLDERS = ("text_encoder", "tokenizer", "vae")


class NotParis(ValueError):
    """The folder is not of the released layout, or its tensors are not those of its configs; the file is named."""


# ---------------------------------------------------------------------------------------------------------------------
# export
# ---------------------------------------------------------------------------------------------------------------------


def export_paris(model: Assembled, target: Path, *, extended: bool = False) -> list[str]:
    """Writes a verified folder in the released layout and gives the paths written, weights byte for byte.

    extended: whether networks that the layout has no words for may be written, marked as such.

    Raises:
        ValueError: experts or the router are missing, `target` holds something, or such networks without `extended`.
        FolderError: weights were changed since the folder was verified. OSError: no space or no permission.
    """
    verified = model.verified
    if missing := verified.lock.missing:
        raise ValueError(f"the released layout needs every expert and the router; missing: {', '.join(missing)}")
    plan = verified.plan.plan
    router = router_of(plan.router.recipe)
    found = [each for recipe in model.recipes.values() for each in expert_additions(recipe.model)]
    additions = [*dict.fromkeys(found), *router_additions(router)]
    if additions and not extended:
        raise ValueError(
            f"the released layout has no words for {', '.join(additions)}: its readers would draw something else. "
            "Write it all the same, marked as extended, with --extended; or use the folder as it is, with diffusers"
        )
    text = plan.data.get("text")
    shape = model.recipe.model

    def files() -> Iterator[tuple[str, Content]]:
        yield (
            CONFIG_FILE,
            pretty(
                {
                    "model_name": plan.name,
                    "num_experts": plan.clusters,
                    "experiment_name": verified.plan.plan_id,
                    "dataset_name": str(plan.data.get("source", "")),
                    "image_size": shape.resolution,
                    "num_channels": shape.channels,
                    "use_latents": shape.channels == 4,
                    "assembly": verified.digest,
                }
            ),
        )
        yield (
            MODEL_INDEX,
            pretty(
                {
                    "_class_name": "DDMPipeline",
                    "_diffusers_version": DIFFUSERS_VERSION,
                    "num_experts": plan.clusters,
                    "expert_architecture": "dit",
                    "router_architecture": "dit",
                    "text_encoder_name": text.get("name") if isinstance(text, Mapping) else None,
                }
            ),
        )
        for slot in plan.slots:
            if slot == ROUTER:
                config = router_config(router)
            else:
                recipe = model.recipes[int(slot)]
                config = expert_config(int(slot), recipe.model, recipe.train.condition_dropout)
            yield f"{paris_folder(slot)}/{CONFIG_FILE}", pretty(config)
            yield f"{paris_folder(slot)}/{WEIGHTS_FILE}", verified.path / weights_path(slot)

    copied = {f"{paris_folder(slot)}/{WEIGHTS_FILE}": verified.file(weights_path(slot)).blake3 for slot in plan.slots}
    return write_whole(target, files(), copied)


def paris_folder(slot: str) -> str:
    """ "router" or "expert_K"."""
    return slot_folder(slot).removeprefix("experts/")


def expert_additions(config: ModelConfig) -> list[str]:
    """What an expert has that the released layout has no words for."""
    plain = ModelConfig(pooled_text=False)
    names = ("pooled_text", "output", "path", "adaln", "patch_skip")
    return [f"{name}={getattr(config, name)}" for name in names if getattr(config, name) != getattr(plain, name)]


def router_additions(config: RouterConfig) -> list[str]:
    """What a router has that the released layout has no words for."""
    found = [f"router text={config.text}"] if config.text != "none" else []
    return found + ([f"router adaln={config.adaln}"] if config.adaln != "single" else [])


def router_of(recipe: Mapping[str, Any]) -> RouterConfig:
    """The router's shape in a plan's recipe."""
    return read_record(RouterConfig, recipe["model"], "router")


def expert_config(expert_id: int, config: ModelConfig, dropout: float) -> dict[str, Any]:
    """config.json of an expert in the released words."""
    extended = bool(expert_additions(config))
    return {
        "model_type": "dit_expert" + EXTENDED * extended,
        "expert_id": expert_id,
        "hidden_size": config.hidden,
        "num_layers": config.depth,
        "num_heads": config.heads,
        "patch_size": config.patch,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "mlp_ratio": config.mlp_ratio,
        "use_text_conditioning": True,
        "text_embed_dim": config.text_dim,
        "use_adaln_single": config.adaln == "single",
        "use_dit_time_embed": True,
        "cfg_dropout_prob": dropout,
        **({"paris_swarm": plain_record(config)} if extended else {}),
    }


def router_config(config: RouterConfig) -> dict[str, Any]:
    """config.json of a router in the released words."""
    extended = bool(router_additions(config))
    return {
        "model_type": ROUTER + EXTENDED * extended,
        "architecture": "dit",
        "num_clusters": config.clusters,
        "hidden_size": config.hidden,
        "num_layers": config.depth,
        "num_heads": config.heads,
        "patch_size": config.patch,
        "in_channels": config.channels,
        "mlp_ratio": config.mlp_ratio,
        **({"paris_swarm": asdict(config)} if extended else {}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# import
# ---------------------------------------------------------------------------------------------------------------------


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
        ValueError: `target` holds something, or a stock folder does not say its class. OSError: no space.
    """
    folders = {name: source.path / name for name in STOCK_FOLDERS if (source.path / name).is_dir()} | dict(stock or {})
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
            yield weights_path(str(k)), source.weights(k)
        yield f"{ROUTER}/{COMPONENTS_FILE}", components
        about = {"model_type": ROUTER, "recipe": {"model": asdict(source.router)}}
        yield f"{ROUTER}/{CONFIG_FILE}", pretty(about)
        yield weights_path(ROUTER), source.router_weights
        yield SCHEDULER_CONFIG, scheduler_config()
        for name, path in folders.items():
            for each in sorted(path.iterdir()):
                if each.is_file() and each.suffix in STOCK_FILES:
                    yield f"{name}/{each.name}", each
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
        library, found = "transformers", (_json(folder / CONFIG_FILE).get("architectures") or [None])[0]
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


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise NotParis(f"{path} is not there: no folder of the released Paris layout") from error
    except ValueError as error:
        raise NotParis(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise NotParis(f"{path} is no JSON object")
    return value


def _field(config: Mapping[str, Any], name: str, kind: type[int], path: Path) -> int:
    value = config.get(name)
    if type(value) is not kind:
        raise NotParis(f"{path}: {name} must be a whole number, got {value!r}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# writing
# ---------------------------------------------------------------------------------------------------------------------


def write_whole(target: Path, files: Iterator[tuple[str, Content]], digests: Mapping[str, str]) -> list[str]:
    """Writes files into a new folder that appears under its name only when whole; copies listed in `digests` (path ->
    BLAKE3) are compared. Gives the paths.

    Raises:
        ValueError: `target` holds something, or a copy is not what it should be. OSError: no space or no permission.
    """
    target = Path(os.path.abspath(target))
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} holds other things; choose an empty or a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.partial-{secrets.token_hex(6)}")
    draft.mkdir()
    written = []
    try:
        for path, content in files:
            place = draft / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, place)
            else:
                place.write_bytes(content)
            if path in digests and digest_file(place) != digests[path]:
                raise ValueError(f"{content} was changed while it was copied; verify the folder, then export again")
            with open(place, "rb") as stream:
                os.fsync(stream.fileno())
            written.append(path)
        if target.exists():
            target.rmdir()
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return written
