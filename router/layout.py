"""Where everything lies in an assembled folder, and what its config files say.

    plan.json                                     the organiser's envelope
    plan/...                                      the plan's other files (centroids, probe set with the null caption)
    records/checkpoint-SLOT.json                  the author's announcement
    records/holding-SLOT.json                     the lease of the peer that served it, where one was kept
    manifests/ROOT.json                           the checkpoint's file manifest
    experts/expert_K/config.json                  what the network is
    experts/expert_K/diffusion_pytorch_model.safetensors   the checkpoint's ema.safetensors, byte for byte
    router/config.json, router/diffusion_pytorch_model.safetensors
    config.json, README.md, lock.json
    and what makes it a diffusers model (diffusers_folder.py), in folders that were assembled with it:
    model_index.json, pipeline.py, scheduler/scheduler_config.json
    experts/{config.json, ddm_components.py, null_caption.safetensors}, router/ddm_components.py
    text_encoder/{config.json, model.safetensors}, tokenizer/{tokenizer.json, tokenizer_config.json}
    vae/{config.json, diffusion_pytorch_model.safetensors}, where the experts draw latents

The weights keep the bytes that the manifest commits to; only their name is the one that model hubs look for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from paris_swarm.dht_schemas.fields import ROUTER
from paris_swarm.dht_schemas.plan import PLAN_FILE, OpenedPlan
from paris_swarm.router.lock import LockedSlot

CARD_FILE = "README.md"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
EMA_FILE = "ema.safetensors"
"""The checkpoint's file whose weights are sampled."""
PROBE_FILE = "probe.safetensors"
"""The plan's file that holds the null caption (`null_states`, `null_length`)."""
MODEL_INDEX = "model_index.json"
PIPELINE_FILE = "pipeline.py"
COMPONENTS_FILE = "ddm_components.py"
EXPERTS_CONFIG = "experts/config.json"
NULL_CAPTION = "experts/null_caption.safetensors"
PAD_TEXT = "pad_text"
"""Field of experts/config.json: captions are padded to their full length, and all positions count."""
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
TEXT_CONFIG = "text_encoder/config.json"
TEXT_WEIGHTS = "text_encoder/model.safetensors"
TOKENIZER = "tokenizer/tokenizer.json"
TOKENIZER_CONFIG = "tokenizer/tokenizer_config.json"
VAE_CONFIG = "vae/config.json"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
VAE_FILES = frozenset({VAE_CONFIG, VAE_WEIGHTS})
TEXT_FILES = frozenset({TEXT_CONFIG, TEXT_WEIGHTS, TOKENIZER, TOKENIZER_CONFIG})


def slot_folder(slot: str) -> str:
    """ "router" or "experts/expert_K"."""
    return ROUTER if slot == ROUTER else f"experts/expert_{slot}"


def weights_path(slot: str) -> str:
    """The weights of a slot."""
    return f"{slot_folder(slot)}/{WEIGHTS_FILE}"


def config_path(slot: str) -> str:
    """The config of a slot."""
    return f"{slot_folder(slot)}/{CONFIG_FILE}"


def announcement_path(slot: str) -> str:
    """The announcement of a slot's checkpoint."""
    return f"records/checkpoint-{slot}.json"


def holding_path(slot: str) -> str:
    """The holding under which a slot's checkpoint was found."""
    return f"records/holding-{slot}.json"


def manifest_path(root: str) -> str:
    """The manifest of a checkpoint."""
    return f"manifests/{root}.json"


def plan_file_path(name: str) -> str:
    """A file of the plan folder."""
    return f"plan/{name}"


def needed_slots(plan: OpenedPlan, missing: Iterable[str]) -> tuple[str, ...]:
    """Those of the `missing` slots that pictures need: where there is one cluster, there is nothing to route."""
    return tuple(slot for slot in missing if slot != ROUTER or plan.plan.clusters > 1)


def required_paths(slots: Iterable[LockedSlot]) -> set[str]:
    """The files that a folder with these slots must have, apart from the lock."""
    paths = {PLAN_FILE, CARD_FILE, CONFIG_FILE, plan_file_path(PROBE_FILE)}
    for slot in slots:
        paths |= {
            weights_path(slot.slot),
            config_path(slot.slot),
            announcement_path(slot.slot),
            manifest_path(slot.root),
        }
    return paths


def diffusers_paths(slots: Iterable[LockedSlot]) -> set[str]:
    """The files that a diffusers model of these slots must have; TEXT_FILES and VAE_FILES come on top."""
    paths = {MODEL_INDEX, PIPELINE_FILE, EXPERTS_CONFIG, NULL_CAPTION, SCHEDULER_CONFIG, f"experts/{COMPONENTS_FILE}"}
    if any(slot.slot == ROUTER for slot in slots):
        paths.add(f"{ROUTER}/{COMPONENTS_FILE}")
    return paths


def implied_paths(slots: Iterable[LockedSlot], found: Iterable[str]) -> set[str]:
    """The files that a folder must have because of others it has: a diffusers model is whole or not there."""
    present, whole = set(found), diffusers_paths(slots)
    implied: set[str] = set()
    if present & (whole | TEXT_FILES | VAE_FILES):
        implied |= whole
    for component in (TEXT_FILES, VAE_FILES):
        if present & component:
            implied |= component
    return implied


def optional_paths(slots: Iterable[LockedSlot], plan_files: Iterable[str]) -> set[str]:
    """The files that it may have beside them."""
    slots = list(slots)
    held = {holding_path(slot.slot) for slot in slots} | {plan_file_path(name) for name in plan_files}
    return held | diffusers_paths(slots) | TEXT_FILES | VAE_FILES


# ---------------------------------------------------------------------------------------------------------------------
# configs
# ---------------------------------------------------------------------------------------------------------------------


def bound_fields(plan: OpenedPlan, slot: LockedSlot) -> dict[str, Any]:
    """The fields of a slot's config that verification holds against the plan and the lock."""
    return {
        "plan": plan.plan_id,
        "slot": slot.slot,
        "root": slot.root,
        "recipe": plan.plan.slot_spec(slot.slot).recipe,
    }


def slot_config(plan: OpenedPlan, slot: LockedSlot) -> bytes:
    """config.json of an expert or of the router: enough to build and to use the network without this package."""
    if slot.slot == ROUTER:
        about: dict[str, Any] = {
            "model_type": "router",
            "num_clusters": plan.plan.clusters,
            "output": "logits of p(cluster | x_t, t, caption)",
        }
    else:
        about = {
            "model_type": "dit_expert",
            "expert_id": int(slot.slot),
            **expert_kind(plan.plan.slot_spec(slot.slot).recipe),
        }
    path = {"path": "x_t = (1 - t) x_0 + t eps", "time": "t in 0..1, 1 is noise; the network sees 999 t"}
    return pretty({**about, **path, **bound_fields(plan, slot)})


OUTPUTS = {
    "velocity": "v = eps - x_0",
    "data": "x_0",
    "residual": "what the best linear guess of v from x_t leaves over, at unit scale",
    "noise": "eps",
}
"""What the last layer of an expert may say, by `output` in its recipe."""
TRAINED_ON = {
    "flow": "x_t = (1 - t) x_0 + t eps",
    "cosine": "x_u = cos(angle) x_0 + sin(angle) eps, DDPM's cosine schedule, u in 0..1 (arXiv 2102.09672)",
}
"""The noise path of an expert, by `path` in its recipe."""


def expert_kind(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What an expert's config says for people of its objective and precision. All experts are asked for, and answer
    with, the velocity of the straight path: `output` is what the network says before that (expert/objective.py).
    """
    model, train = (part if isinstance(part, Mapping) else {} for part in (recipe.get("model"), recipe.get("train")))
    output, path = (str(model.get(name, usual)) for name, usual in (("output", "velocity"), ("path", "flow")))
    return {
        "prediction_type": output,
        "output": OUTPUTS.get(output, output),
        "trained_on": TRAINED_ON.get(path, path),
        "combined_as": "v = eps - x_0",
        "precision": str(train.get("precision", "any")),
    }


def folder_config(plan: OpenedPlan, slots: Iterable[LockedSlot], missing: Iterable[str]) -> bytes:
    """config.json of the whole folder."""
    slots = list(slots)
    return pretty(
        {
            "model_type": "paris_swarm_ensemble",
            "model_name": plan.plan.name,
            "plan": plan.plan_id,
            "num_experts": plan.plan.clusters,
            "experts": {slot.slot: slot_folder(slot.slot) for slot in slots if slot.slot != ROUTER},
            "router": ROUTER if any(slot.slot == ROUTER for slot in slots) else None,
            "missing": list(missing),
        }
    )


def experts_config(plan: OpenedPlan, slots: Iterable[LockedSlot]) -> bytes:
    """experts/config.json: what the container of the experts has to know; each expert's own lies in its folder."""
    about: dict[str, Any] = {"guidance": plan_guidance(plan)}
    if isinstance(text := plan.plan.data.get("text"), Mapping) and text.get("padded") is True:
        about[PAD_TEXT] = True
    return pretty({"_class_name": "DDMExperts", **experts_fields(plan, slots), **about})


def experts_fields(plan: OpenedPlan, slots: Iterable[LockedSlot]) -> dict[str, Any]:
    """The fields of experts/config.json that verification holds against the plan and the lock."""
    here = sorted(int(slot.slot) for slot in slots if slot.slot != ROUTER)
    missing = [k for k in range(plan.plan.clusters) if k not in here]
    return {"num_experts": plan.plan.clusters, "experts": here, "missing": missing, "plan": plan.plan_id}


def plan_guidance(plan: OpenedPlan) -> float:
    """The guidance scale that the plan recommends (its field `sampling`), or 2.5 where it says no such number."""
    sampling = (plan.plan.model_extra or {}).get("sampling")
    value = sampling.get("guidance") if isinstance(sampling, Mapping) else None
    return float(value) if isinstance(value, int | float) and 0 <= value <= 100 else 2.5


def pretty(value: object) -> bytes:
    """JSON for people, its keys in the order given."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
