"""Two figures that say whether drawn pictures follow their prompts, each beside the same figure for real images.

``cluster_accuracy``: the share of pictures that fall into their prompt's own cluster. ``background_accuracy``: in
families whose captions name a background colour, the share of pictures that show it. Drawn and real pictures go through
the same code at the same resolution; a figure means little without its real counterpart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from paris_swarm.expert.data.dicebear import PALETTE
from paris_swarm.router.partition import nearest

TRUSTED_REAL = 0.9
"""A family whose real pictures show their named background less often than this says nothing about drawn ones."""


class ImageFeatures(Protocol):
    """What is needed of the plan's feature encoder (`expert.data.encoders.FeatureEncoder` has it)."""

    def encode(self, images: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class BackgroundAccuracy:
    """Shares of drawn and of real pictures that show the background their caption names, over the same families.

    None when no family is left. by_family: (drawn, real) within each family that counts; left_out: families whose real
    share is below ``TRUSTED_REAL``, with it; count: captions that count.
    """

    drawn: float | None
    real: float | None
    count: int
    by_family: Mapping[str, tuple[float, float]]
    left_out: Mapping[str, float]


def cluster_hits(
    images: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    centroids: np.ndarray,
    encoder: ImageFeatures,
    biases: np.ndarray | None = None,
) -> np.ndarray:
    """bool [n]: which of images uint8 [n, H, W, 3] lie nearest to their own (labels [n]) of centroids float32 [K, F],
    less biases [K] where the plan bounds the sizes of clusters.

    Raises ValueError: no images, or not one label each.
    """
    wanted = np.asarray(labels, dtype=np.int64)
    if not len(images) or len(images) != len(wanted):
        raise ValueError(f"one label a picture is needed: {len(images)} pictures, {len(wanted)} labels")
    return nearest(encoder.encode(images), centroids, biases) == wanted


def cluster_accuracy(
    images: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    centroids: np.ndarray,
    encoder: ImageFeatures,
    biases: np.ndarray | None = None,
) -> float:
    """The share of ``cluster_hits``, 0 to 1."""
    return float(cluster_hits(images, labels, centroids, encoder, biases).mean())


def background_accuracy(
    drawn: np.ndarray,
    real: np.ndarray,
    captions: Sequence[Mapping[str, Any]],
    palette: Mapping[str, Sequence[int]] = PALETTE,
) -> BackgroundAccuracy:
    """Of drawn uint8 [n, H, W, 3] and real pictures of the same n captions, the shares that show the named background.

    A caption record names one in ``attributes.background``, a name in ``palette`` (name to sRGB 0..255); records
    without one do not count. Raises ValueError: the three do not have one length, or a colour is not in the palette.
    """
    if not len(drawn) == len(real) == len(captions):
        raise ValueError(
            f"one drawn and one real picture a caption are needed: {len(drawn)}, {len(real)}, {len(captions)} captions"
        )
    hits: dict[str, list[tuple[bool, bool]]] = {}
    for of_drawn, of_real, caption in zip(drawn, real, captions, strict=True):
        named = (caption.get("attributes") or {}).get("background")
        if named is None:
            continue
        if named not in palette:
            raise ValueError(f"the colour {named!r} is not in the palette: {', '.join(palette)}")
        found = (background_colour(of_drawn, palette) == named, background_colour(of_real, palette) == named)
        hits.setdefault(str(caption.get("family", "all")), []).append(found)
    shares = {family: tuple(np.mean(found, axis=0).tolist()) for family, found in sorted(hits.items())}
    sound = {family: share for family, share in shares.items() if share[1] >= TRUSTED_REAL}
    counted = [found for family in sound for found in hits[family]]
    whole = np.mean(counted, axis=0).tolist() if counted else (None, None)
    return BackgroundAccuracy(
        drawn=whole[0],
        real=whole[1],
        count=len(counted),
        by_family=sound,
        left_out={family: share[1] for family, share in shares.items() if family not in sound},
    )


def background_colour(image: np.ndarray, palette: Mapping[str, Sequence[int]] = PALETTE) -> str:
    """The palette's name nearest (sRGB distance) to the median border pixel of one image uint8 [H, W, 3].

    The border is a twelfth of the side thick and covers the top edge and the upper third of both sides: below that
    stand hills, pots and feet.
    """
    height, width = image.shape[:2]
    thick, upper = max(1, width // 12), max(1, height // 3)
    border = np.concatenate(
        [part.reshape(-1, 3) for part in (image[:thick], image[thick:upper, :thick], image[thick:upper, -thick:])]
    )
    names = list(palette)
    colours = np.array([palette[name] for name in names], dtype=np.float64)
    return names[int(np.square(colours - np.median(border, axis=0)).sum(axis=1).argmin())]
