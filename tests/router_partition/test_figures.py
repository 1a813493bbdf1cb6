from __future__ import annotations

import numpy as np
import pytest

from paris_swarm.expert.data.dicebear import FAMILIES, PALETTE, DiceBearSource
from paris_swarm.router.figures import background_accuracy, background_colour, cluster_accuracy, cluster_hits


class MeanColour:
    def encode(self, images):
        return images.mean((1, 2)).astype(np.float32)


def plain(*names: str) -> np.ndarray:
    return np.stack([np.full((12, 12, 3), PALETTE[name], dtype=np.uint8) for name in names])


def record(family: str, background: str | None) -> dict:
    return {"text": "x", "family": family, "attributes": {"background": background} if background else {}}


def test_cluster_accuracy_is_the_share_in_the_wanted_cluster():
    centroids = np.array([PALETTE["red"], PALETTE["blue"]], dtype=np.float32)
    images, wanted = plain("red", "blue", "blue", "red"), [0, 1, 0, 0]
    assert cluster_hits(images, wanted, centroids, MeanColour()).tolist() == [True, True, False, True]
    assert cluster_accuracy(images, wanted, centroids, MeanColour()) == 0.75
    with pytest.raises(ValueError, match="one label a picture"):
        cluster_accuracy(images, [0], centroids, MeanColour())


@pytest.mark.parametrize("resolution", [24, 32])
def test_real_pictures_of_every_family_show_their_background(resolution):
    items = list(
        DiceBearSource(count=12 * len(FAMILIES), resolution=resolution, seed=2, families=tuple(FAMILIES)).items()
    )
    pixels, records = np.stack([item.pixels for item in items]), [item.record for item in items]
    found = background_accuracy(pixels, pixels, records)
    assert found.left_out == {}
    assert found.count == len(items)
    assert min(real for _, real in found.by_family.values()) > 0.95
    shuffled = background_accuracy(np.roll(pixels, len(FAMILIES), axis=0), pixels, records)
    assert shuffled.drawn < 0.3


def test_a_family_whose_real_pictures_do_not_show_it_is_left_out():
    records = [record("sound", "red")] * 2 + [record("unsound", "blue")] * 4 + [record("sound", None)]
    real = plain("red", "red", "blue", "blue", "blue", "red", "green")
    drawn = plain("red", "green", *["blue"] * 4, "green")
    found = background_accuracy(drawn, real, records)
    assert found.left_out == {"unsound": 0.75}
    assert found.by_family == {"sound": (0.5, 1.0)}
    assert (found.drawn, found.real, found.count) == (0.5, 1.0, 2)


def test_captions_without_a_background_give_no_figure():
    found = background_accuracy(plain("red"), plain("red"), [{"text": "my own photo"}])
    assert (found.drawn, found.real, found.count, found.left_out) == (None, None, 0, {})


def test_an_unknown_colour_and_missing_pictures_are_refused():
    with pytest.raises(ValueError, match="'mauve' is not in the palette"):
        background_accuracy(plain("red"), plain("red"), [record("a", "mauve")])
    with pytest.raises(ValueError, match="one drawn and one real picture"):
        background_accuracy(plain("red"), plain("red", "blue"), [record("a", "red")])


def test_a_sun_and_hills_do_not_hide_the_sky():
    image = plain("purple")[0].copy()
    image[5:] = PALETTE["green"]
    image[0:2, 3:6] = PALETTE["yellow"]
    assert background_colour(image) == "purple"
