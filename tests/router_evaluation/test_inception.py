from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from paris_swarm.router.evaluation.inception import ExtractorError, FidInception, InceptionFeatures


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {name: t for name, t in InceptionFeatures().state_dict().items() if not name.endswith("_tracked")}


def test_the_network_has_the_published_size_and_names(weights):
    # InceptionV3 has 23,834,568 numbers with its classifier of 1,000 classes (2,049,000) and without the auxiliary one.
    trained = {name: t for name, t in weights.items() if "running" not in name}
    assert sum(t.numel() for t in trained.values()) == 23_834_568 - 2_049_000
    assert len(trained) == 94 * 3  # 94 convolutions, each with a scale and a shift
    assert weights["Mixed_6b.branch7x7dbl_4.conv.weight"].shape == (128, 128, 7, 1)
    assert weights["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)


def test_weights_from_a_folder_give_2048_features_whatever_the_batch(tmp_path, weights):
    extra = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    save_file({**weights, **extra}, tmp_path / "inception.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)
    together = FidInception(tmp_path).encode(images)
    apart = FidInception(tmp_path, batch=1).encode(images)
    assert together.shape == (3, 2048)
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0


def test_weights_of_another_network_are_refused(tmp_path, weights):
    with pytest.raises(ExtractorError, match=r"one \.safetensors file"):
        FidInception(tmp_path)
    path = tmp_path / "w.safetensors"
    save_file({name: t for name, t in weights.items() if name != "Mixed_5b.branch1x1.bn.bias"}, path)
    with pytest.raises(ExtractorError, match=r"Mixed_5b\.branch1x1\.bn\.bias"):
        FidInception(tmp_path)
    save_file({**weights, "Conv2d_1a_3x3.conv.weight": torch.zeros(32, 1, 3, 3)}, path)
    with pytest.raises(ExtractorError, match="another shape"):
        FidInception(tmp_path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ExtractorError, match="cannot be read"):
        FidInception(tmp_path)
