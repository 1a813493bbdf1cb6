"""Published encoders: what they compute, what names them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
from PIL import Image
from tests.expert_data.loopback_hub import hub_of
from tests.expert_data.tiny_encoders import tiny_clip, tiny_dinov2, tiny_vae

from paris_swarm.cli.encoders import chosen_encoders
from paris_swarm.expert.data.encoders import named_feature_encoder, named_text_encoder, named_vae
from paris_swarm.expert.data.prepare import prepare
from paris_swarm.expert.data.published import CLIP_FILES, CLIPTextEncoder, DINOv2Features, KLLatents
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.data.sources import PrepareError
from paris_swarm.expert.data.weights_folder import EncoderError
from paris_swarm.expert.rows import Rows
from paris_swarm.router.draw import vae_decoder

VAE_FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vae/, clip/ and dinov2/."""
    folder = tmp_path_factory.mktemp("published")
    tiny_vae(folder / "vae", shift_factor=0.1)
    tiny_clip(folder / "clip")
    tiny_dinov2(folder / "dinov2")
    return folder


def pictures(count: int = 5, side: int = 16) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


# ---- latents --------------------------------------------------------------------------------------------------------


def test_latents_are_the_scaled_mean_and_decode_to_the_vaes_own_picture(place: Path) -> None:
    vae = KLLatents(place / "vae", batch=2)
    images = pictures()
    latents = vae.encode(images)
    assert (latents.dtype, latents.shape) == (np.float16, (5, 8, 8, 4))
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        mean = vae.model.encode(x).latent_dist.mean
        expected = (mean - 0.1) * 0.5
        seen = vae.model.decode(mean).sample
    found = torch.from_numpy(latents).float().permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    with torch.inference_mode():
        drawn = vae_decoder(vae.model)(found)
    wanted = ((seen.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert drawn.dtype == torch.uint8
    assert (drawn.float() - wanted).abs().max() <= 3
    with pytest.raises(ValueError, match="multiples of 2"):
        vae.encode(pictures(1, 15))


def test_a_digest_is_of_the_numbers_and_of_the_settings(place: Path, tmp_path: Path) -> None:
    digest = KLLatents(place / "vae").digest
    copy = tmp_path / "copy"
    shutil.copytree(place / "vae", copy)
    tensors = load_file(copy / VAE_FILE)
    save_file(dict(reversed(tensors.items())), copy / VAE_FILE, metadata={"format": "pt", "note": "saved again"})
    assert KLLatents(copy).digest == digest
    tensors["encoder.conv_in.bias"][0] += 1e-6
    save_file(tensors, copy / VAE_FILE, metadata={"format": "pt"})
    assert KLLatents(copy).digest != digest
    assert KLLatents(tiny_vae(tmp_path / "other scale", shift_factor=0.2)).digest != digest
    assert KLLatents(tiny_vae(tmp_path / "other activation", shift_factor=0.1, act_fn="relu")).digest != digest


def test_the_same_numbers_in_other_places_are_another_model(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "vae", tmp_path / "vae")
    tensors = load_file(tmp_path / "vae" / VAE_FILE)
    one, other = (f"decoder.up_blocks.0.resnets.{number}.conv1.weight" for number in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, tmp_path / "vae" / VAE_FILE, metadata={"format": "pt"})
    assert KLLatents(tmp_path / "vae").digest != KLLatents(place / "vae").digest


def test_an_epsilon_is_a_setting_too(place: Path, tmp_path: Path) -> None:
    for name, encoder in (("clip", CLIPTextEncoder), ("dinov2", DINOv2Features)):
        shutil.copytree(place / name, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert encoder(tmp_path / name).digest == encoder(place / name).digest
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1.0}))
        assert encoder(tmp_path / name).digest != encoder(place / name).digest


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "nan", "cut", "pickle", "nothing"])
def test_weights_that_are_not_whole_are_refused(place: Path, tmp_path: Path, fault: str) -> None:
    folder = shutil.copytree(place / "vae", tmp_path / "vae")
    tensors = load_file(folder / VAE_FILE)
    if fault == "missing":
        del tensors["decoder.conv_out.weight"]
    elif fault == "extra":
        tensors["more"] = torch.zeros(1)
    elif fault == "shape":
        tensors["decoder.conv_out.bias"] = torch.zeros(7)
    elif fault == "nan":
        tensors["decoder.conv_out.bias"][0] = torch.nan
    save_file(tensors, folder / VAE_FILE, metadata={"format": "pt"})
    if fault == "cut":
        (folder / VAE_FILE).write_bytes((folder / VAE_FILE).read_bytes()[:-9])
    elif fault == "pickle":
        (folder / VAE_FILE).rename(folder / "diffusion_pytorch_model.bin")
    elif fault == "nothing":
        (folder / "config.json").unlink()
    with pytest.raises(EncoderError, match=r"AutoencoderKL|NaN"):
        KLLatents(folder)


# ---- captions -------------------------------------------------------------------------------------------------------


def test_every_caption_has_the_full_length_and_depends_on_itself_alone(place: Path) -> None:
    clip = CLIPTextEncoder(place / "clip", batch=2)
    texts = ["a red flag", "", "a blue disc " * 20]
    states, lengths = clip.encode(texts)
    assert (states.shape, lengths.tolist()) == ((3, 12, 16), [12, 12, 12])
    assert (np.abs(states.astype(float)).sum(axis=2) > 0).all()
    for text, row in zip(texts, states, strict=True):
        np.testing.assert_allclose(clip.encode([text])[0][0], row, atol=2e-3)
    ids = torch.tensor([[0, 3, 4, 7, *[1] * 8]])  # <start> a red flag <end> <end> ...
    with torch.inference_mode():
        hidden = clip.model(input_ids=ids).last_hidden_state[0].numpy()
    np.testing.assert_allclose(states[0], hidden, atol=4e-3)
    with pytest.raises(ValueError, match="12 tokens"):
        clip.encode(texts, 9)


def test_the_text_half_of_a_whole_clip_is_the_same_encoder(place: Path, tmp_path: Path) -> None:
    alone, within = CLIPTextEncoder(place / "clip"), CLIPTextEncoder(tiny_clip(tmp_path / "whole", whole=True))
    assert within.digest == alone.digest
    np.testing.assert_array_equal(within.encode(["a red flag"])[0], alone.encode(["a red flag"])[0])


def test_another_tokenizer_is_another_encoder(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "clip", tmp_path / "clip")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"flag"', '"flagg"'))
    assert CLIPTextEncoder(folder).digest != CLIPTextEncoder(place / "clip").digest
    path.unlink()
    with pytest.raises(EncoderError, match="tokenizer"):
        CLIPTextEncoder(folder)


# ---- features -------------------------------------------------------------------------------------------------------


def test_features_are_the_class_token_of_pictures_prepared_as_pillow_would(place: Path) -> None:
    dinov2 = DINOv2Features(place / "dinov2", batch=2)
    images = np.stack(
        [np.asarray(Image.fromarray(each).resize((48, 48), Image.Resampling.BICUBIC)) for each in pictures()]
    )
    values = dinov2.pixel_values(images)
    assert values.shape == (5, 3, 28, 28)
    mean, std = (np.array(each).reshape(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for image, found in zip(images, values.numpy(), strict=True):
        small = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))[2:30, 2:30]
        assert np.abs(found * std + mean - small.transpose(2, 0, 1) / 255).max() < 2.5 / 255
    features = dinov2.encode(images)
    with torch.inference_mode():
        expected = dinov2.model(values).pooler_output
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [named_vae, named_text_encoder, named_feature_encoder])
def test_offline_a_hub_name_is_answered_with_what_to_do(make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EncoderError, match=r"hf download some-body/some-model config\.json .* --local-dir some-model"):
        make("some-body/some-model")
    with pytest.raises(EncoderError, match=r"^there is no folder weights/vae here, and as a hub name it is "):
        make("weights/vae")  # a mistyped path as often as a hub name
    with pytest.raises(EncoderError, match="neither a folder here nor a hub name"):
        make("./nowhere")


def test_a_hub_name_is_downloaded_once_and_kept_in_the_record(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with hub_of({"some-body/vae": place / "vae"}, monkeypatch, tmp_path / "cache") as asked:
        vae = named_vae("some-body/vae")
        assert vae.origin == "some-body/vae"
        assert vae.digest == named_vae(place / "vae").digest
        assert named_vae(place / "vae").origin is None
        fetched = {path for kind, path in asked if kind == "GET" and "/resolve/" in path}
        assert len(fetched) == 2
        again = len(asked)
        named_vae("some-body/vae")
        assert not [path for kind, path in asked[again:] if kind == "GET" and "/resolve/" in path]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert named_vae("some-body/vae").digest == vae.digest  # from the cache


def test_of_a_hub_model_only_the_files_that_are_needed_are_fetched(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = shutil.copytree(place / "clip", tmp_path / "clip")
    for name in ("tokenizer-more.bin", "README.md", "model.bin", "own.py"):
        (folder / name).write_bytes(b"0" * 100)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "huge.json").write_bytes(b"{}")
    with hub_of({"some-body/clip": folder}, monkeypatch, tmp_path / "cache") as asked:
        assert named_text_encoder("some-body/clip").digest == named_text_encoder(place / "clip").digest
    fetched = {path.rsplit("/resolve/", 1)[1].split("/", 1)[1] for _, path in asked if "/resolve/" in path}
    assert fetched <= set(CLIP_FILES)


def sharded(place: Path, kind: str, target: Path) -> Path:
    """The same encoder, its weights spread over several files with an index."""
    folder = shutil.copytree(place / kind, target / kind)
    whole = next(folder.glob("*.safetensors"))
    tensors, stem = sorted(load_file(whole).items()), whole.name.removesuffix(".safetensors")
    whole.unlink()
    weight_map = {}
    for number in range(3):
        name = f"{stem}-{number + 1:05d}-of-00003.safetensors"
        save_file(dict(tensors[number::3]), folder / name, metadata={"format": "pt"})
        weight_map |= {tensor: name for tensor, _ in tensors[number::3]}
    index = {"metadata": {"total_size": sum(tensor.nbytes for _, tensor in tensors)}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("kind", "named"), [("vae", named_vae), ("clip", named_text_encoder), ("dinov2", named_feature_encoder)]
)
def test_weights_spread_over_several_files_are_the_same_encoder_by_folder_and_by_name(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, named
) -> None:
    folder = sharded(place, kind, tmp_path)
    (folder / "other-00001-of-00001.safetensors").write_bytes(b"0" * 100)
    digest = named(place / kind).digest
    with hub_of({"some-body/model": folder}, monkeypatch, tmp_path / "cache") as asked:
        assert named("some-body/model").digest == digest
    fetched = {path.rsplit("/", 1)[1] for method, path in asked if method == "GET" and "/resolve/" in path}
    assert len([name for name in fetched if name.endswith("-of-00003.safetensors")]) == 3
    assert "other-00001-of-00001.safetensors" not in fetched
    (folder / "other-00001-of-00001.safetensors").unlink()
    assert named(folder).digest == digest
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert named("some-body/model").digest == digest, "from the cache"


def test_spread_weights_are_weighed_together_and_before_a_byte_of_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = sharded(place, "vae", tmp_path)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    sizes = {"some-body/vae": dict.fromkeys(shards, 3 << 30)}
    with (
        hub_of({"some-body/vae": folder}, monkeypatch, tmp_path / "cache", sizes=sizes) as asked,
        pytest.raises(EncoderError, match=rf"9\.0 GiB to download .*hf download some-body/vae .*{shards[2]}"),
    ):
        named_vae("some-body/vae")
    assert not [path for method, path in asked if method == "GET" and path.endswith(".safetensors")]


@pytest.mark.parametrize(
    "weight_map",
    [{"a": "../other/model.safetensors"}, {"a": "/etc/passwd"}, {"a": "*.safetensors"}, {"a": 5}, {}, None, ["a"]],
    ids=["elsewhere", "absolute", "pattern", "number", "nothing", "null", "list"],
)
def test_an_index_names_files_beside_it_and_nothing_else(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weight_map: object
) -> None:
    folder = sharded(place, "vae", tmp_path)
    (folder / f"{VAE_FILE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(EncoderError, match=r"index\.json (names|is no index)"):
        named_vae(folder)
    with (
        hub_of({"some-body/vae": folder}, monkeypatch, tmp_path / "cache") as asked,
        pytest.raises(EncoderError, match=r"index\.json (names|is no index)"),
    ):
        named_vae("some-body/vae")
    assert not [path for _, path in asked if path.endswith(".safetensors")]


def test_a_hub_model_that_is_too_large_is_refused_before_a_byte_of_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = {"some-body/vae": {VAE_FILE: 9 << 30}, "some-body/unweighed": {VAE_FILE: None}}
    folders = dict.fromkeys(sizes, place / "vae")
    with hub_of(folders, monkeypatch, tmp_path / "cache", sizes=sizes) as asked:
        with pytest.raises(EncoderError, match=r"9\.0 GiB to download .*at most 8 GiB .*hf download some-body/vae"):
            named_vae("some-body/vae")
        with pytest.raises(EncoderError, match="some-body/unweighed"):
            named_vae("some-body/unweighed")
        with pytest.raises(EncoderError, match="could not be downloaded"):
            named_vae("some-body/nothing")
    assert not [path for kind, path in asked if kind == "GET" and path.endswith(VAE_FILE)]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) < 100_000


# ---- prepared -------------------------------------------------------------------------------------------------------


def test_a_folder_of_latents_has_what_training_and_people_need(photo_folder, place: Path, tmp_path: Path) -> None:
    folder = photo_folder(7)
    encoders = {
        "text_encoder": named_text_encoder(place / "clip"),
        "feature_encoder": named_feature_encoder(place / "dinov2"),
        "vae": named_vae(place / "vae"),
    }
    report = prepare(folder, tmp_path / "latents", resolution=32, shard_rows=4, **encoders)
    again = prepare(folder, tmp_path / "again", resolution=32, shard_rows=4, workers=2, **encoders)
    names = sorted(path.name for path in report.folder.iterdir())
    assert [(again.folder / name).read_bytes() for name in names] == [
        (report.folder / name).read_bytes() for name in names
    ]
    pixels = prepare(folder, tmp_path / "pixels", resolution=32, shard_rows=4, **{**encoders, "vae": None})
    data, plain = PreparedData.open(report.folder, verify=True), PreparedData.open(pixels.folder)
    assert (data.resolution, data.manifest["channels"], data.count) == (16, 4, 7)
    said = data.manifest["latents"]
    assert (said["name"], said["digest"]) == ("AutoencoderKL", encoders["vae"].digest)
    assert (said["scale"], said["shift"], said["pixels"]) == (0.5, 0.1, 32)
    np.testing.assert_array_equal(data.digests, plain.digests)  # a row is its picture, whoever encodes it
    np.testing.assert_array_equal(data.pixels([6, 2]), encoders["vae"].encode(plain.pixels([2, 6]))[::-1])
    assert data.thumbnails([0]).shape == (1, 32, 32, 3)
    assert data.thumbnails([0]).dtype == np.uint8
    batch = Rows(data, np.arange(7)).batch(np.array([3, 5]))
    assert batch.x0.shape == (2, 4, 16, 16)
    expected = torch.from_numpy(data.pixels([3, 5])).float().permute(0, 3, 1, 2)
    torch.testing.assert_close(batch.x0, expected)
    with pytest.raises(PrepareError, match="multiple of 2"):
        prepare(folder, tmp_path / "odd", resolution=33, **encoders)


def test_a_tokenizer_that_brings_code_is_refused_unasked(place: Path, tmp_path: Path, monkeypatch) -> None:
    folder = shutil.copytree(place / "clip", tmp_path / "clip")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("tokenizer_class", "processor_class"):
        settings.pop(name, None)
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text("raise AssertionError('a stranger's code ran')\n")
    (folder / "config.json").unlink()
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(EncoderError, match="tokenizer"):
        CLIPTextEncoder(place / "clip", tokenizer=folder)


def test_a_plan_names_encoders_of_the_hub_and_no_folder_of_this_machine(place: Path) -> None:
    for secret in (str(place / "vae"), "../vae", "~/vae"):
        with pytest.raises(ValueError, match="--vae"):
            chosen_encoders(None, None, None, device="cpu", asked={"latents": {"name": "x", "from": secret}})
