from __future__ import annotations

import re

import numpy as np
import pytest

from paris_swarm.expert.data import dicebear
from paris_swarm.expert.data.dicebear import DEFAULT_FAMILIES, FAMILIES, PALETTE, DiceBearSource, Family
from paris_swarm.expert.data.sources import PrepareError

WHOLE_SET = tuple(FAMILIES)


@pytest.fixture(scope="module")
def drawn():
    return list(DiceBearSource(count=20 * len(WHOLE_SET), resolution=48, seed=3, families=WHOLE_SET).items())


def share_near(pixels: np.ndarray, name: str, within: float = 45.0) -> float:
    distance = np.linalg.norm(pixels.reshape(-1, 3).astype(float) - np.array(PALETTE[name]), axis=1)
    return float((distance < within).mean())


def test_every_named_colour_is_in_the_picture(drawn):
    for item in drawn:
        for attribute, value in item.record["attributes"].items():
            if value in PALETTE and attribute not in ("eyes", "hair"):
                assert share_near(item.pixels, value) > 0.004, (attribute, item.record)


def test_the_background_is_the_upper_corner(drawn):
    for item in drawn:
        background = item.record["attributes"]["background"]
        assert np.abs(item.pixels[0, 0].astype(int) - PALETTE[background]).max() <= 8, item.record


def test_a_planet_has_a_moon_only_when_its_caption_says_so(drawn):
    planets = [item.record for item in drawn if item.record["family"] == "planets"]
    assert {"none", "one", "two"} == {record["attributes"]["moons"] for record in planets}
    for record in planets:
        assert ("moon" in record["text"]) == (record["attributes"]["moons"] != "none")
        assert ("ring" in record["text"]) == (record["attributes"]["ring"] == "yes")


def test_captions_are_sentences_that_begin_with_the_background(drawn):
    for item in drawn:
        text = item.record["text"]
        assert re.fullmatch(r"An? [a-z]+ (background|sky) (with|over) [a-z ]+\.", text), text
        assert text.split()[1] == item.record["attributes"]["background"]
        for article, word in re.findall(r"\b([Aa]n?) (\w+)", text):
            assert (article.lower() == "an") == (word[0] in "aeiou"), text
        assert len(text.split()) <= 16


def test_a_picture_depends_on_its_seed_and_number_alone(drawn):
    again = list(DiceBearSource(count=24, resolution=48, seed=3, families=WHOLE_SET).items())
    for first, second in zip(drawn, again, strict=False):
        assert first.record == second.record
        assert np.array_equal(first.pixels, second.pixels)
    other = next(iter(DiceBearSource(count=1, resolution=48, seed=4, families=WHOLE_SET).items()))
    assert not np.array_equal(other.pixels, drawn[0].pixels)


def test_pictures_differ(drawn):
    assert len({item.pixels.tobytes() for item in drawn}) == len(drawn)


def test_only_cc0_styles_are_drawn():
    licences = DiceBearSource(count=1, resolution=16, seed=0, families=WHOLE_SET).describe()["licences"]
    assert [licence["name"] for licence in licences] == ["CC0 1.0"] * len(WHOLE_SET)


def test_a_style_with_another_licence_is_refused(monkeypatch):
    robot = FAMILIES["voxel-bot"]
    monkeypatch.setattr(dicebear, "FAMILIES", {"bottts": Family("bottts", robot.options, robot.caption)})
    with pytest.raises(PrepareError, match="'bottts' is licensed"):
        DiceBearSource(count=1, resolution=16, seed=0, families=["bottts"])


@pytest.mark.parametrize("families", [(), ("planets", "planets"), ("planets", "dragons")])
def test_bad_families_are_named(families):
    with pytest.raises(PrepareError, match="landscape, planets"):
        DiceBearSource(count=1, resolution=16, seed=0, families=families)


def test_defaults_are_families():
    assert set(DEFAULT_FAMILIES) <= set(FAMILIES)
