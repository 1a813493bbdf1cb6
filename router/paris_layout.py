"""The layout of the released Paris folder (Hugging Face bageldotcom/paris), written; paris_import.py reads it.

    config.json, model_index.json
    expert_K/{config.json, diffusion_pytorch_model.safetensors}
    router/{config.json, diffusion_pytorch_model.safetensors}      pytorch_model.safetensors is read too

Tensor names are the published ones, which are this package's own. What the layout has no words for (`pooled_text`,
`patch_skip`, another output or path, AdaLN-Zero, a router that sees captions) is written only where the caller asks for
it, under another `model_type`, so that no reader of the released layout takes it for what it is not.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paris_swarm.dht_schemas.digest import digest_file
from paris_swarm.dht_schemas.fields import ROUTER
from paris_swarm.expert.recipe import ModelConfig, plain_record, read_record
from paris_swarm.router.diffusers_folder import (
    DIFFUSERS_VERSION,
    Content,
)
from paris_swarm.router.folder import Assembled
from paris_swarm.router.layout import (
    CONFIG_FILE,
    MODEL_INDEX,
    WEIGHTS_FILE,
    pretty,
    slot_folder,
    weights_path,
)
from paris_swarm.router.recipe import RouterConfig

EXTENDED = "_extended"
"""Ends `model_type` where a network is more than the released layout can say."""


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
