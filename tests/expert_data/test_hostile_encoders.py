"""Folders of encoders that ask for more than they bring: refused before a network is made of them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
from tests.expert_data.tiny_encoders import tiny_clip, tiny_dinov2, tiny_vae

from paris_swarm.expert.data.published import CLIPTextEncoder, DINOv2Features, KLLatents
from paris_swarm.expert.data.weights_folder import EncoderError

CLASSES = {"vae": KLLatents, "clip": CLIPTextEncoder, "dinov2": DINOv2Features}
MAKERS: dict[str, Callable[[Path], Path]] = {"vae": tiny_vae, "clip": tiny_clip, "dinov2": tiny_dinov2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vae/, clip/ and dinov2/."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, make in MAKERS.items():
        make(folder / name)
    return folder


@pytest.fixture
def never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own loader allocates what a config asks for: it must not be reached."""
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was made")

    monkeypatch.setattr(ModelMixin, "from_pretrained", refuse)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


def changed(place: Path, kind: str, target: Path, changes: dict[str, Any], file: str = "config.json") -> Path:
    """A copy of an encoder's folder with another config."""
    folder = shutil.copytree(place / kind, target / kind)
    said = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**said, **changes}))
    return folder


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("dinov2", {"hidden_size": 65536}, "asks for a network of [0-9,]+ numbers.*bytes of weights"),
        ("dinov2", {"hidden_size": 10**12}, "config.json"),
        ("dinov2", {"num_hidden_layers": 10**6}, "num_hidden_layers 1000000, at most"),
        ("dinov2", {"hidden_size": "wide"}, "hidden_size"),
        ("dinov2", {"num_attention_heads": 0}, "config.json"),
        ("clip", {"vocab_size": 10**9}, "asks for a network of"),
        ("clip", {"text_config": {"num_hidden_layers": 10**6}}, "num_hidden_layers 1000000, at most"),
        ("clip", {"max_position_embeddings": 10**9}, "asks for a network of"),
        ("clip", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ("vae", {"block_out_channels": [8192, 8192]}, "asks for a network of"),
        ("vae", {"layers_per_block": 10**7}, "layers_per_block 10000000, at most"),
        ("vae", {"block_out_channels": [4] * 100_000}, "block_out_channels.*100000 entries, at most"),
        ("vae", {"norm_num_groups": 0}, "config.json"),
        ("vae", {"down_block_types": ["NoBlock", "NoBlock"]}, "config.json"),
    ],
)
@pytest.mark.usefixtures("never_built")
def test_a_config_cannot_ask_for_more_than_the_weights_there(
    place: Path, tmp_path: Path, kind: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(EncoderError, match=words):
        CLASSES[kind](changed(place, kind, tmp_path, changes))


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "{", "{}" + " " * (2 << 20), '{"image_size": 1e999}'])
@pytest.mark.usefixtures("never_built")
def test_a_config_that_is_none_is_named(place: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(place / "dinov2", tmp_path / "dinov2")
    (folder / "config.json").write_text(text)
    with pytest.raises(EncoderError, match=r"config\.json"):
        DINOv2Features(folder)


@pytest.mark.usefixtures("never_built")
def test_a_network_that_this_machine_has_no_memory_for_is_not_made(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paris_swarm.expert.data.asked_network.free_ram", lambda: 1000)
    with pytest.raises(EncoderError, match=r"GB of memory.*GB free"):
        KLLatents(place / "vae")


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_size": {"height": 10**6}, "size": {"shortest_edge": 10**6}},
        {"size": {"shortest_edge": 10**9}},
        {"image_mean": [math.nan, 0.5, 0.5]},
        {"image_std": [math.inf, 0.5, 0.5]},
    ],
)
def test_pictures_are_not_made_huge_or_senseless(place: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(EncoderError, match="asks for a crop of"):
        DINOv2Features(changed(place, "dinov2", tmp_path, changes, "preprocessor_config.json"))


def test_captions_have_a_length_that_a_recipe_may_have(place: Path, tmp_path: Path) -> None:
    folder = changed(place, "clip", tmp_path, {"max_position_embeddings": 5000})
    tensors = load_file(folder / "model.safetensors")
    (name,) = [name for name in tensors if "position_embedding" in name]
    save_file({**tensors, name: torch.zeros(5000, 16)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match="5,000 tokens"):
        CLIPTextEncoder(folder)


def test_a_scale_that_is_no_number_is_refused(place: Path, tmp_path: Path) -> None:
    for scale in (0, math.nan, -1):
        with pytest.raises(EncoderError, match="scaling_factor"):
            KLLatents(changed(place, "vae", tmp_path / str(scale), {"scaling_factor": scale}))


def test_a_vocabulary_is_not_read_whatever_its_size(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "clip", tmp_path / "clip")
    with open(folder / "tokenizer.json", "r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(EncoderError, match=r"tokenizer\.json.*at most"):
        CLIPTextEncoder(folder)
