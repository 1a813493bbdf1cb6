"""The encoders that a person names on the command line, held against those of the plan before any work is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paris_swarm.dht_schemas.plan import OpenedPlan
    from paris_swarm.expert.data.encoders import FeatureEncoder, LatentEncoder, TextEncoder
    from paris_swarm.router.diffusers_folder import TextEncoderFiles, VAEFiles


@dataclass(frozen=True)
class ChosenEncoders:
    """What `prepare` encodes with."""

    text: TextEncoder
    features: FeatureEncoder
    vae: LatentEncoder | None


def chosen_encoders(
    text: str | None, features: str | None, vae: str | None, *, device: str, asked: Mapping[str, Any] | None
) -> ChosenEncoders:
    """Encoders by folder, hub name or built-in name; what is not named is the plan's where the plan says whence it is.

    asked: the plan's ``data`` field, None without a plan.

    Raises:
        EncoderError: one cannot be found or loaded, or is not the plan's (both digests are named).
        ValueError: the plan's pictures are pixels and a VAE was given, or the other way round.
    """
    from paris_swarm.expert.data.encoders import named_feature_encoder, named_text_encoder, named_vae
    from paris_swarm.router.encoder_files import check_encoder

    facts = asked or {}
    latents = facts.get("latents")
    if asked is not None and vae is not None and latents is None:
        raise ValueError("the plan's experts learn pixels: leave --vae out")
    vae = vae or place_said(latents)
    if latents is not None and vae is None:
        raise ValueError(
            f"the plan's experts learn latents of a {latents.get('name')} with digest {latents.get('digest')}: give "
            "its folder with --vae"
        )
    chosen = ChosenEncoders(
        named_text_encoder(text or place_said(facts.get("text")), device=device),
        named_feature_encoder(features or place_said(facts.get("features")), device=device),
        None if vae is None else named_vae(vae, device=device),
    )
    for encoder, name, what in (
        (chosen.text, "text", "text encoder"),
        (chosen.features, "features", "image encoder"),
        (chosen.vae, "latents", "VAE"),
    ):
        if isinstance(facts.get(name), Mapping):
            check_encoder(encoder, facts[name], what)
    return chosen


def encoders_there(
    text: str | None, features: str | None, vae: str | None, *, device: str, asked: Mapping[str, Any] | None
) -> tuple[TextEncoder, FeatureEncoder, LatentEncoder | None]:
    """`chosen_encoders` on the machine where they are used; device: as `--device` takes it.

    Raises:
        EncoderError, ValueError: as `chosen_encoders`, or the machine has no such device.
    """
    from paris_swarm.cli.settings import pick_device

    chosen = chosen_encoders(text, features, vae, device=pick_device(device), asked=asked)
    return chosen.text, chosen.features, chosen.vae


def place_said(facts: object) -> str | None:
    """Where a plan says an encoder comes from: a hub name, or None. A path is none: it would be one of this machine."""
    from paris_swarm.expert.data.weights_folder import hub_name

    value = facts.get("from") if isinstance(facts, Mapping) else None
    return hub_name(value) if isinstance(value, str) else None


def folder_encoders(
    plan: OpenedPlan, text: str | None, vae: str | None, *, with_text: bool
) -> tuple[TextEncoderFiles | None, VAEFiles | None, list[str]]:
    """(text encoder, VAE, what could not be had and why) for an assembled folder; text, vae: folders or hub names.

    Raises:
        EncoderError: one that was named cannot be loaded, or is not the plan's.
    """
    from paris_swarm.expert.data.weights_folder import EncoderError
    from paris_swarm.router.diffusers_folder import NoTextEncoder, plan_text_encoder
    from paris_swarm.router.encoder_files import clip_files, plan_clip, plan_vae, vae_files

    notes: list[str] = []
    text_found, vae_found = None, None
    if with_text:
        try:
            if is_clip(plan):
                text_found = clip_files(plan_clip(plan, text, option="--text-encoder-from"))
            else:
                text_found = plan_text_encoder(plan)
        except (NoTextEncoder, EncoderError) as error:
            if text is not None:
                raise
            notes.append(f"No text encoder in the folder: {error}")
    if vae is not None or plan.plan.data.get("latents") is not None:
        try:
            vae_found = vae_files(plan_vae(plan, vae))
        except EncoderError as error:
            if vae is not None:
                raise
            notes.append(f"No VAE in the folder, so `sample` will need --vae: {error}")
    return text_found, vae_found, notes


def is_clip(plan: OpenedPlan) -> bool:
    """Whether the plan's captions were encoded by a CLIPTextModel."""
    text = plan.plan.data.get("text")
    return isinstance(text, Mapping) and text.get("name") == "CLIPTextModel"
