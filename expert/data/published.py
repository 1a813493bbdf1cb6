"""Published encoders by folder or hub name: AutoencoderKL latents, CLIP text states, DINOv2 features.

    stabilityai/sd-vae-ft-mse       pictures to latents an eighth of the side (Paris: 256 pixels, 32 x 32 x 4)
    openai/clip-vit-large-patch14   captions to 77 states of 768 numbers
    facebook/dinov2-large           pictures to 1,024 numbers, for the clustering

What Paris (arXiv 2510.03434) was trained on, or any other folder of the same classes. Each is named in the prepared
folder and in the plan by a digest of its weights, its settings and, where it has one, its tokenizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from blake3 import blake3
from torch import Tensor

from paris_swarm.expert.data.weights_folder import (
    EncoderError,
    hub_name,
    load_whole,
    missing_package,
    weights_digest,
    weights_folder,
)
from paris_swarm.expert.shape import LIMITS

VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
CLIP_FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
DINOV2_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
MAX_SIDE = 2048
"""Pixels to which a picture is brought for an image encoder; DINOv2 takes 224 of 256."""
MAX_TEXT_TOKENS = LIMITS["text_tokens"]
THUMBNAIL = 32
"""Side in pixels of the small pictures that are kept beside latents, for people to look at."""

_SENTENCES = ("", "a photo of a cat", "Ünïcode, 日本語; don't & 12345 …", "two\tdogs  running on the beach at sunset")


# ---------------------------------------------------------------------------------------------------------------------
# latents
# ---------------------------------------------------------------------------------------------------------------------


class KLLatents:
    """diffusers' AutoencoderKL (arXiv 2112.10752): pictures to latents and back.

    A latent is the mean of the encoder's distribution, less ``shift``, times ``scale`` (both from the model's config,
    so that latents have about unit variance). ``model`` is the AutoencoderKL itself. Raises EncoderError.
    """

    name = "AutoencoderKL"

    def __init__(self, place: str | Path, *, batch: int = 4, device: str = "cpu") -> None:
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise missing_package() from error
        folder = weights_folder(place, "a VAE (AutoencoderKL)", VAE_FILES)
        self.model = load_whole(AutoencoderKL, folder, low_cpu_mem_usage=False).to(device)
        self.origin = hub_name(place)
        self.batch = batch
        config = self.model.config
        self.channels = int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scale = float(config.scaling_factor)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)
        if not (math.isfinite(self.scale) and self.scale > 0 and math.isfinite(self.shift)):
            raise EncoderError(
                f"{folder / 'config.json'}: scaling_factor {self.scale} and shift_factor {self.shift} give no latents"
            )
        about = {
            "class": self.name,
            "scale": self.scale,
            "shift": self.shift,
            "groups": config.norm_num_groups,
            "activation": config.act_fn,
        }
        self.digest = weights_digest(self.model.state_dict(), about)

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """float16 [b, h, w, C] of uint8 [b, H, W, 3], H and W whole multiples of ``factor``. Raises ValueError."""
        check_images(images)
        side = images.shape[1]
        if side % self.factor or images.shape[2] % self.factor:
            raise ValueError(f"pictures of {side} pixels cannot be encoded: the VAE takes multiples of {self.factor}")
        parts = []
        for start in range(0, len(images), self.batch):
            x = to_float(images[start : start + self.batch]).div(127.5).sub(1.0)  # [b, 3, H, W] in -1..1
            mean = self.model.encode(x.to(self.model.device)).latent_dist.mode()  # [b, C, h, w]
            parts.append(((mean - self.shift) * self.scale).permute(0, 2, 3, 1).half().cpu().numpy())
        return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------------------------------
# captions
# ---------------------------------------------------------------------------------------------------------------------


class CLIPTextEncoder:
    """transformers' CLIPTextModel (arXiv 2103.00020): the last hidden state of every token, padding included.

    Every caption is padded to the model's full length (77 for ViT-L/14) and all positions count, as in Stable Diffusion
    and Paris: the model was never told where a caption ends but by its end token. Raises EncoderError.
    """

    name = "CLIPTextModel"
    padded = True

    def __init__(
        self, place: str | Path, *, tokenizer: Path | None = None, batch: int = 32, device: str = "cpu"
    ) -> None:
        """tokenizer: its folder, where it is another than the model's."""
        try:
            from transformers import AutoTokenizer, CLIPTextModel
        except ImportError as error:
            raise missing_package() from error
        folder = weights_folder(place, "a text encoder (CLIPTextModel)", CLIP_FILES)
        self.model = load_whole(CLIPTextModel, folder, more_is_fine=True, attn_implementation="sdpa").to(device)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                str(tokenizer or folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            first = str(error).strip().split("\n")[0][:200]
            raise EncoderError(f"{tokenizer or folder} holds no tokenizer that can be read ({first})") from error
        self.origin = hub_name(place)
        self.batch = batch
        config = self.model.config
        self.dim = int(config.hidden_size)
        self.max_tokens = int(config.max_position_embeddings)
        if not 0 < self.max_tokens <= MAX_TEXT_TOKENS:
            raise EncoderError(
                f"{folder / 'config.json'} makes captions of {self.max_tokens:,} tokens, a recipe has at most "
                f"{MAX_TEXT_TOKENS:,}"
            )
        about = {
            "class": self.name,
            "heads": config.num_attention_heads,
            "activation": config.hidden_act,
            "epsilon": config.layer_norm_eps,
            "tokens": self.max_tokens,
            "tokenizer": self._tokenizer_digest(),
        }
        self.digest = weights_digest(self.model.state_dict(), about)

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """int16 [b]: the full length of every caption."""
        return np.full(len(texts), self.max_tokens, dtype=np.int16)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(float16 [b, 77, D], int16 [b]); ``tokens`` must be None or 77 (ValueError)."""
        if tokens not in (None, self.max_tokens):
            raise ValueError(f"captions of this encoder have {self.max_tokens} tokens, not {tokens}")
        states = np.empty((len(texts), self.max_tokens, self.dim), dtype=np.float16)
        for start in range(0, len(texts), self.batch):
            ids = self._ids(texts[start : start + self.batch]).to(self.model.device)  # [b, 77]
            hidden = self.model(input_ids=ids).last_hidden_state  # [b, 77, D]
            states[start : start + len(ids)] = hidden.half().cpu().numpy()
        return states, self.lengths(texts)

    def _ids(self, texts: Sequence[str]) -> Tensor:
        said = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        ids: Tensor = said["input_ids"]
        return ids

    def _tokenizer_digest(self) -> str:
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return blake3(vocabulary.encode() + self._ids(_SENTENCES).numpy().astype("<i8").tobytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# features
# ---------------------------------------------------------------------------------------------------------------------


class DINOv2Features:
    """transformers' Dinov2Model (arXiv 2304.07193): the class token behind the last norm, 1,024 numbers for ViT-L/14.

    Pictures are prepared as the folder's preprocessor_config.json says: shortest side by bicubic, centre, ImageNet's
    mean and deviation. Raises EncoderError.
    """

    name = "Dinov2Model"

    def __init__(self, place: str | Path, *, batch: int = 16, device: str = "cpu") -> None:
        try:
            from transformers import Dinov2Model
        except ImportError as error:
            raise missing_package() from error
        folder = weights_folder(place, "an image encoder (Dinov2Model)", DINOV2_FILES)
        self.model = load_whole(Dinov2Model, folder, attn_implementation="sdpa").to(device)
        self.origin = hub_name(place)
        self.batch = batch
        config = self.model.config
        self.dim = int(config.hidden_size)
        self._resize, self.size, self._mean, self._std = _preprocessing(folder, int(config.image_size))
        about = {
            "class": self.name,
            "heads": config.num_attention_heads,
            "patch": config.patch_size,
            "activation": config.hidden_act,
            "epsilon": config.layer_norm_eps,
            "preprocessing": [self._resize, self.size, self._mean, self._std],
        }
        self.digest = weights_digest(self.model.state_dict(), about)

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """float32 [b, F] from uint8 [b, H, W, 3]. Raises ValueError."""
        check_images(images)
        features = np.empty((len(images), self.dim), dtype=np.float32)
        for start in range(0, len(images), self.batch):
            x = self.pixel_values(images[start : start + self.batch])
            tokens = self.model(x.to(self.model.device)).last_hidden_state  # [b, 1 + patches, F]
            features[start : start + len(x)] = tokens[:, 0].float().cpu().numpy()
        return features

    def pixel_values(self, images: np.ndarray) -> Tensor:
        """float32 [b, 3, S, S], what the model takes, from uint8 [b, H, W, 3]."""
        x = to_float(images)  # [b, 3, H, W] in 0..255
        height, width = x.shape[2:]
        short = min(height, width)
        target = (round(height * self._resize / short), round(width * self._resize / short))
        if (height, width) != target:
            x = F.interpolate(x, size=target, mode="bicubic", antialias=True).round().clamp(0, 255)
        top, left = (target[0] - self.size) // 2, (target[1] - self.size) // 2
        x = x[:, :, top : top + self.size, left : left + self.size] / 255  # [b, 3, S, S]
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self._mean, self._std))
        return (x - mean) / std


def _preprocessing(folder: Path, image_size: int) -> tuple[int, int, list[float], list[float]]:
    """(shortest side, crop, mean, deviation) of a preprocessor_config.json; without the file the published ones.

    image_size: the model's, which bounds nothing (positions are interpolated) but is the crop where the file is absent.
    """
    path = folder / "preprocessor_config.json"
    try:
        said = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        crop = said.get("crop_size", {"height": min(image_size, 224)})
        crop = int(crop["height"] if isinstance(crop, dict) else crop)
        size = said.get("size", {"shortest_edge": round(crop * 256 / 224)})
        resize = int(size.get("shortest_edge") or size["height"]) if isinstance(size, dict) else int(size)
        mean = [float(value) for value in said.get("image_mean", (0.485, 0.456, 0.406))]
        std = [float(value) for value in said.get("image_std", (0.229, 0.224, 0.225))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(f"{path} cannot be read ({error}): bring the model's folder again") from error
    numbers = len(mean) == len(std) == 3 and all(map(math.isfinite, (*mean, *std))) and min(std) > 0
    if not (0 < crop <= resize <= MAX_SIDE and numbers):
        raise EncoderError(f"{path} asks for a crop of {crop} from {resize} pixels, mean {mean}, deviation {std}")
    return resize, crop, mean, std


def check_images(images: np.ndarray) -> None:
    """Raise ValueError unless images are uint8 [b, H, W, 3]."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 [b, H, W, 3], got {images.dtype} {list(images.shape)}")


def to_float(images: np.ndarray) -> Tensor:
    """uint8 [b, H, W, 3] -> float32 [b, 3, H, W] in 0..255."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().contiguous()
