"""Every figure of one set of pictures, and the same figures of real pictures: the floor they are read against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from paris_swarm.expert.data.dicebear import PALETTE
from paris_swarm.router.evaluation.frechet import Gaussian, frechet_distance
from paris_swarm.router.evaluation.kernel import kernel_distance
from paris_swarm.router.evaluation.neighbours import NEIGHBOURS, Manifold, precision_recall
from paris_swarm.router.figures import background_accuracy, cluster_accuracy


class Extractor(Protocol):
    """Pictures to features; `expert.data.encoders.EfficientNetLite0` and `inception.FidInception` are two."""

    name: str
    size: int

    def encode(self, images: np.ndarray) -> np.ndarray:
        """float32 [n, F] from uint8 [n, H, W, 3]."""


@dataclass(frozen=True)
class Distances:
    """Drawn against real pictures in one extractor's features. fid, kid: lower is better; precision, recall: 0 to 1,
    higher is better. `kid` is the mean over blocks, `kid_deviation` their standard deviation.
    """

    fid: float
    kid: float
    kid_deviation: float
    precision: float
    recall: float


class Reference:
    """Real pictures' features [n, F], prepared once and compared with many drawn sets of `count` pictures each.

    FID and KID use all of them; precision and recall a random `count` of them, for both depend on the counts.

    Raises:
        ValueError: fewer than `count` real pictures, or `count` not above the neighbours that are counted.
    """

    def __init__(self, features: NDArray[np.floating], count: int, *, seed: int = 0) -> None:
        if not NEIGHBOURS < count <= len(features):
            raise ValueError(
                f"{len(features)} real pictures are too few to judge {count} drawn ones: at least as many are needed, "
                f"and more than {NEIGHBOURS} of each"
            )
        chosen = np.random.Generator(np.random.PCG64(seed)).permutation(len(features))[:count]
        self.count = count
        self._features = features
        self._seed = seed
        self._gaussian = Gaussian.fit(features)
        self._manifold = Manifold.of(features[np.sort(chosen)])

    def distances(self, features: NDArray[np.floating]) -> Distances:
        """Of drawn (or other real) pictures' features [count, F].

        Raises:
            ValueError: another number of pictures, or another width.
        """
        if len(features) != self.count:
            raise ValueError(f"prepared for {self.count} pictures, got {len(features)}")
        kernel = kernel_distance(features, self._features, seed=self._seed)
        precision, recall = precision_recall(self._manifold, Manifold.of(features))
        fid = frechet_distance(Gaussian.fit(features), self._gaussian)
        return Distances(fid, kernel.mean, kernel.deviation, precision, recall)


@dataclass(frozen=True)
class Prompts:
    """What the drawn pictures should show. clusters int64 [P]: each prompt's own cluster; captions: the caption records
    of the prompts; pixels uint8 [P, H, W, 3]: the real pictures of the same captions.
    """

    clusters: NDArray[np.int64]
    captions: Sequence[Mapping[str, Any]]
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Measures:
    """Figures of one set of pictures. Shares are 0 to 1; `cluster_accuracy` is None where clusters follow no features,
    `attribute_accuracy` where no caption names a background colour that real pictures show, and `published`,
    the distances in the published extractor's features, where its weights were not given.
    """

    distances: Distances
    cluster_accuracy: float | None
    attribute_accuracy: float | None
    published: Distances | None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Encoded:
    """Features that are known already, for those who ask an encoder."""

    features: NDArray[np.floating]

    def encode(self, images: np.ndarray) -> NDArray[np.floating]:
        return self.features


def measure(
    images: NDArray[np.uint8],
    prompts: Prompts,
    reference: Reference,
    centroids: NDArray[np.floating] | None,
    extractor: Extractor,
    *,
    palette: Mapping[str, Sequence[int]] = PALETTE,
    published: tuple[Extractor, Reference] | None = None,
    biases: NDArray[np.floating] | None = None,
) -> Measures:
    """Figures of images uint8 [P, H, W, 3], one a prompt.

    `extractor` is the plan's feature encoder: its features decide both the cluster of a picture (by `centroids` [K, F],
    None for a partition that follows no features, and `biases` [K] where the plan bounds sizes) and the distances.

    Raises:
        ValueError: not one picture a prompt, or shapes that do not agree.
    """
    if len(images) != len(prompts.clusters):
        raise ValueError(f"one picture a prompt is needed: {len(images)} pictures, {len(prompts.clusters)} prompts")
    features = extractor.encode(images)
    return Measures(
        distances=reference.distances(features),
        cluster_accuracy=None
        if centroids is None
        else cluster_accuracy(images, prompts.clusters, centroids, _Encoded(features), biases),
        attribute_accuracy=background_accuracy(images, prompts.pixels, prompts.captions, palette).drawn,
        published=None if published is None else published[1].distances(published[0].encode(images)),
    )
