"""The published FID's extractor, InceptionV3 with the weights of 2015-12-05, from a safetensors file in a local folder.

The network of "Rethinking the Inception Architecture for Computer Vision" (arXiv 1512.00567) as FID (arXiv 1706.08500)
uses it: average pools count no padding, the last block pools by maximum, the features are the 2,048 numbers before the
classifier. Tensor names are those of the weights' usual PyTorch form (`Mixed_5b.branch1x1.conv.weight`, ...). The
weights are not in any package, so they are never fetched here: `--inception DIR` names a folder that has them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paris_swarm.dht_schemas.digest import digest_file

SIDE = 299
FEATURES = 2048
_IGNORED = ("fc.", "AuxLogits.")  # the classifiers: not part of the features

_Size = int | tuple[int, int]


class ExtractorError(ValueError):
    """The folder does not hold the extractor's weights; the message says what is wrong with it."""


class Conv(nn.Module):
    """Convolution without bias, batch normalisation (epsilon 0.001), ReLU; padding "same" unless stride is 2."""

    def __init__(self, inputs: int, outputs: int, kernel: _Size = 1, stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        sizes = (kernel, kernel) if isinstance(kernel, int) else kernel
        margin = (sizes[0] // 2, sizes[1] // 2) if pad and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, sizes, stride, margin, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(self.bn(self.conv(x)))
        return out


def _mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halving_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


class Block(nn.Module):
    """Branches side by side, their channels concatenated.

    A branch is a list of convolutions by name; one whose last two are a pair (names ending in "a" and "b") forks there.
    `pool` feeds the branch "branch_pool", or stands alone as the last branch where the block halves the picture.
    """

    def __init__(self, branches: list[list[tuple[str, Conv]]], pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._branches = [[name for name, _ in branch] for branch in branches]
        self._pool = pool
        for branch in branches:
            for name, conv in branch:
                self.add_module(name, conv)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        parts: list[Tensor] = []
        for names in self._branches:
            fork = [name for name in names if name[-1] in "ab"]
            y = self._pool(x) if names == ["branch_pool"] else x
            for name in names[: len(names) - len(fork)]:
                y = self.get_submodule(name)(y)
            parts += [self.get_submodule(name)(y) for name in fork] if fork else [y]
        if self._pool is _halving_pool:
            parts.append(self._pool(x))
        return torch.cat(parts, dim=1)


def _block_a(inputs: int, pooled: int) -> Block:
    """35 x 35."""
    return Block(
        [
            [("branch1x1", Conv(inputs, 64))],
            [("branch5x5_1", Conv(inputs, 48)), ("branch5x5_2", Conv(48, 64, 5))],
            [
                ("branch3x3dbl_1", Conv(inputs, 64)),
                ("branch3x3dbl_2", Conv(64, 96, 3)),
                ("branch3x3dbl_3", Conv(96, 96, 3)),
            ],
            [("branch_pool", Conv(inputs, pooled))],
        ],
        _mean_pool,
    )


def _block_b(inputs: int) -> Block:
    """35 x 35 -> 17 x 17."""
    return Block(
        [
            [("branch3x3", Conv(inputs, 384, 3, stride=2))],
            [
                ("branch3x3dbl_1", Conv(inputs, 64)),
                ("branch3x3dbl_2", Conv(64, 96, 3)),
                ("branch3x3dbl_3", Conv(96, 96, 3, stride=2)),
            ],
        ],
        _halving_pool,
    )


def _block_c(inputs: int, c: int) -> Block:
    """17 x 17, seven by seven as one by seven and seven by one."""
    return Block(
        [
            [("branch1x1", Conv(inputs, 192))],
            [
                ("branch7x7_1", Conv(inputs, c)),
                ("branch7x7_2", Conv(c, c, (1, 7))),
                ("branch7x7_3", Conv(c, 192, (7, 1))),
            ],
            [
                ("branch7x7dbl_1", Conv(inputs, c)),
                ("branch7x7dbl_2", Conv(c, c, (7, 1))),
                ("branch7x7dbl_3", Conv(c, c, (1, 7))),
                ("branch7x7dbl_4", Conv(c, c, (7, 1))),
                ("branch7x7dbl_5", Conv(c, 192, (1, 7))),
            ],
            [("branch_pool", Conv(inputs, 192))],
        ],
        _mean_pool,
    )


def _block_d(inputs: int) -> Block:
    """17 x 17 -> 8 x 8."""
    return Block(
        [
            [("branch3x3_1", Conv(inputs, 192)), ("branch3x3_2", Conv(192, 320, 3, stride=2))],
            [
                ("branch7x7x3_1", Conv(inputs, 192)),
                ("branch7x7x3_2", Conv(192, 192, (1, 7))),
                ("branch7x7x3_3", Conv(192, 192, (7, 1))),
                ("branch7x7x3_4", Conv(192, 192, 3, stride=2)),
            ],
        ],
        _halving_pool,
    )


def _block_e(inputs: int, pool: Callable[[Tensor], Tensor]) -> Block:
    """8 x 8."""
    return Block(
        [
            [("branch1x1", Conv(inputs, 320))],
            [
                ("branch3x3_1", Conv(inputs, 384)),
                ("branch3x3_2a", Conv(384, 384, (1, 3))),
                ("branch3x3_2b", Conv(384, 384, (3, 1))),
            ],
            [
                ("branch3x3dbl_1", Conv(inputs, 448)),
                ("branch3x3dbl_2", Conv(448, 384, 3)),
                ("branch3x3dbl_3a", Conv(384, 384, (1, 3))),
                ("branch3x3dbl_3b", Conv(384, 384, (3, 1))),
            ],
            [("branch_pool", Conv(inputs, 192))],
        ],
        pool,
    )


class InceptionFeatures(nn.Module):
    """[B, 3, 299, 299] in -1..1 -> [B, 2048]. The order of the modules is the order of the computation."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, pad=False)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, 128)
        self.Mixed_6c = _block_c(768, 160)
        self.Mixed_6d = _block_c(768, 160)
        self.Mixed_6e = _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, _mean_pool)
        self.Mixed_7c = _block_e(2048, _max_pool)

    def forward(self, x: Tensor) -> Tensor:
        for name, module in self.named_children():
            x = module(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = _halving_pool(x)
        return x.mean(dim=(2, 3))  # [B, 2048]


class FidInception:
    """The extractor, its weights read from the one .safetensors file in `folder`.

    Raises:
        ExtractorError: not exactly one such file, or tensors that are missing, unknown or of another shape.
    """

    name = "inception-v3-fid"
    size = SIDE

    def __init__(self, folder: str | Path, *, batch: int = 16) -> None:
        found = sorted(Path(folder).glob("*.safetensors"))
        if len(found) != 1:
            raise ExtractorError(f"{folder} must hold one .safetensors file with the InceptionV3 weights of FID")
        self.digest = digest_file(found[0])
        self.batch = batch
        self._network = InceptionFeatures().eval().requires_grad_(False)
        _load(self._network, found[0])

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """float32 [n, 2048] from uint8 [n, H, W, 3], brought to 299 x 299 bilinearly.

        Raises:
            ValueError: another shape or dtype.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images must be uint8 [n, H, W, 3], got {images.dtype} {list(images.shape)}")
        features = np.empty((len(images), FEATURES), dtype=np.float32)
        for start in range(0, len(images), self.batch):
            part = torch.from_numpy(np.array(images[start : start + self.batch])).permute(0, 3, 1, 2).float() / 255
            x = F.interpolate(part, size=(SIDE, SIDE), mode="bilinear", align_corners=False)  # [b, 3, 299, 299]
            features[start : start + len(part)] = self._network(2 * x - 1).numpy()
        return features


def _load(network: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ExtractorError(f"{path} cannot be read as safetensors: {error}") from error
    wanted = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = {name: t for name, t in tensors.items() if not name.startswith(_IGNORED) and not name.endswith("_tracked")}
    wrong = sorted(set(wanted) ^ set(given)) or [n for n, t in wanted.items() if t.shape != given[n].shape]
    if wrong:
        raise ExtractorError(
            f"{path} does not hold the InceptionV3 of FID: {len(wrong)} tensors are missing, unknown or of another "
            f"shape, the first {wrong[0]}"
        )
    network.load_state_dict({name: t.float() for name, t in given.items()}, strict=False)
