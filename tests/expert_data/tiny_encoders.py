"""Random encoders of the published classes, small enough for tests, in folders as their libraries write them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

WORDS = ("a", "red", "green", "blue", "flag", "disc", "picture", "number", *map(str, range(10)))


def tiny_vae(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """An AutoencoderKL from pictures of 3 channels to latents of 4, half the side."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    options = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "scaling_factor": 0.5,
        **changes,
    }
    AutoencoderKL(**options).save_pretrained(folder)
    return folder


def centred_vae(folder: Path, images: np.ndarray) -> Path:
    """`tiny_vae` whose latents of pictures uint8 [b, H, W, 3] have mean 0 in each channel and variance 1, as those of a
    trained VAE nearly have: a constant latent would be predicted without looking.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_vae(folder))
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean = vae.encode(x).latent_dist.mode()  # [b, 4, h, w]
        vae.quant_conv.bias[:4] -= mean.mean((0, 2, 3))
        vae.quant_conv.weight[:4] /= mean.std((0, 2, 3)).view(4, 1, 1, 1)
        vae.quant_conv.bias[:4] /= mean.std((0, 2, 3))
    vae.register_to_config(scaling_factor=1.0)
    vae.save_pretrained(folder)
    return folder


def tiny_clip(folder: Path, *, seed: int = 0, whole: bool = False) -> Path:
    """A CLIPTextModel of 16 numbers a token and 12 tokens, with its tokenizer; ``whole``: inside a whole CLIPModel."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPVisionConfig,
        PreTrainedTokenizerFast,
    )

    vocabulary = {word: place for place, word in enumerate(("<start>", "<end>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    torch.manual_seed(seed)
    model = CLIPTextModel(CLIPTextConfig(**text))
    if whole:
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        both = CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=8))
        both.text_model.load_state_dict(getattr(model, "text_model", model).state_dict())
        both.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", pad_token="<end>", unk_token="<unk>",
        model_max_length=12,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def tiny_dinov2(folder: Path, *, seed: int = 0) -> Path:
    """A Dinov2Model of 16 numbers, patches of 14 pixels, pictures of 28 cut from 32."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(folder)
    said = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 28, "width": 28},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder
