"""The plan's published encoders as they go into an assembled folder: a VAE, a text encoder, compared with the plan.

What is written is what was loaded and has the plan's digest: a text encoder alone where the hub's file holds two
models, and float32 numbers in safetensors.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paris_swarm.dht_schemas.plan import OpenedPlan
from paris_swarm.expert.data.published import CLIPTextEncoder, KLLatents
from paris_swarm.expert.data.weights_folder import EncoderError, hub_name, no_bar
from paris_swarm.router.diffusers_folder import TextEncoderFiles, VAEFiles
from paris_swarm.router.plan_facts import encoder_facts

_ONE_FILE = "1000GB"


class OtherEncoder(EncoderError):
    """An encoder is not the one that the plan names: the message has both digests."""


def plan_vae(plan: OpenedPlan, place: str | Path | None, *, device: str = "cpu") -> KLLatents:
    """The VAE that the plan's pictures were encoded with, from ``place`` or where the plan says it came from.

    Raises:
        EncoderError: the plan's pictures are pixels; no place is known; it cannot be loaded; it is another VAE.
    """
    asked = plan.plan.data.get("latents")
    if not isinstance(asked, Mapping):
        raise EncoderError("the plan's experts draw pixels: there is no VAE to give")
    vae = KLLatents(_place(place, asked, "--vae"), device=device)
    check_encoder(vae, asked, "VAE")
    return vae


def plan_clip(
    plan: OpenedPlan, place: str | Path | None, *, tokenizer: Path | None = None, option: str = "--text-encoder"
) -> CLIPTextEncoder:
    """The CLIPTextModel that the plan's captions were encoded with, found as `plan_vae` finds a VAE.

    option: what names its place on the command line, for the error.

    Raises:
        EncoderError: no place is known; it cannot be loaded; it is another text encoder.
        ValueError: the plan does not say which it is.
    """
    asked = encoder_facts(plan.plan.data, "text", "its text encoder")
    clip = CLIPTextEncoder(_place(place, asked, option), tokenizer=tokenizer)
    check_encoder(clip, asked, "text encoder")
    return clip


def check_encoder(encoder: Any, asked: Mapping[str, Any], what: str) -> None:
    """Raise OtherEncoder unless an encoder is the one that a plan or a manifest names."""
    for name in ("name", "digest"):
        if getattr(encoder, name) != asked.get(name):
            known = f" ({asked['from']})" if isinstance(asked.get("from"), str) else ""
            raise OtherEncoder(
                f"the plan's {what}{known} has {name} {asked.get(name)}, this one has {getattr(encoder, name)}: use "
                "the weights that the plan was made with"
            )


def _place(place: str | Path | None, asked: Mapping[str, Any], option: str) -> str | Path:
    if place is not None:
        return place
    said = asked.get("from")
    if isinstance(said, str) and (name := hub_name(said)) is not None:  # a path would be one of this machine
        return name
    raise EncoderError(
        f"the plan names a {asked.get('name')} (digest {str(asked.get('digest'))[:16]}) and not where to find it: give "
        f"its folder with {option}"
    )


def vae_files(vae: KLLatents) -> VAEFiles:
    """Its config and weights, as diffusers writes them."""
    with tempfile.TemporaryDirectory() as folder:
        vae.model.save_pretrained(folder, max_shard_size=_ONE_FILE)
        config = json.loads(Path(folder, "config.json").read_bytes())
        config.pop("_name_or_path", None)  # a path of this machine
        return VAEFiles(config, Path(folder, "diffusion_pytorch_model.safetensors").read_bytes())


def clip_files(clip: CLIPTextEncoder) -> TextEncoderFiles:
    """Its config, weights and tokenizer, as transformers writes them."""
    with tempfile.TemporaryDirectory() as folder:
        with no_bar():
            clip.model.save_pretrained(folder, max_shard_size=_ONE_FILE)
        config = json.loads(Path(folder, "config.json").read_bytes())
        weights = Path(folder, "model.safetensors").read_bytes()
    tokenizer = clip.tokenizer
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return TextEncoderFiles(
        config,
        weights,
        tokenizer.backend_tokenizer.to_str().encode("utf-8"),
        max_tokens=clip.max_tokens,
        encoder_class="CLIPTextModel",
        special_tokens=special,
    )
