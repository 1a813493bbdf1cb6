"""What the file beside a grid says: the picture's own shares, and the very PNG it speaks of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paris_swarm.dht_schemas.digest import digest_file
from paris_swarm.router.draw import Pictures
from paris_swarm.router.png import Origin, write_grid
from paris_swarm.router.sidecar import sidecar, sidecar_path

ORIGIN = Origin(
    prompts=("a", "b"),
    seed=7,
    strategy="top-2",
    sampler="euler",
    steps=2,
    guidance=1.5,
    plan_id="p" * 64,
    assembly="a" * 64,
    missing=("3",),
    precision="int8",
)


def test_each_picture_has_its_prompt_and_the_share_of_each_expert(tmp_path: Path) -> None:
    weights = np.zeros((4, 2, 3), dtype=np.float32)
    weights[0, :, 0] = weights[1, :, 1] = weights[2, :, 2] = 1
    weights[3, 0, 0] = weights[3, 1, 1] = 1
    pictures = Pictures(np.zeros((4, 2, 2, 3), dtype=np.uint8), weights, np.array([0, 0, 0.25, 0], dtype=np.float32))
    png = tmp_path / "grid.png"
    write_grid(png, pictures.images, columns=2, text={})
    said = sidecar(png, pictures, ORIGIN)
    assert [one["prompt"] for one in said["pictures"]] == ["a", "a", "b", "b"]
    assert said["pictures"][3]["shares"] == {"0": 0.5, "1": 0.5, "2": 0.0}
    assert said["pictures"][2]["redirected"] == 0.25
    assert said["blake3"] == digest_file(png)
    assert (said["png"], said["missing"]) == ("grid.png", ["3"])
    named = ("seed", "strategy", "sampler", "steps", "guidance", "plan", "assembly", "precision")
    assert [said[name] for name in named] == [7, "top-2", "euler", 2, 1.5, "p" * 64, "a" * 64, "int8"]
    assert sidecar_path(png) == tmp_path / "grid.png.json"


def test_pictures_that_do_not_fit_their_prompts_are_refused(tmp_path: Path) -> None:
    pictures = Pictures(np.zeros((3, 2, 2, 3), dtype=np.uint8), np.ones((3, 1, 1), dtype=np.float32), np.zeros(3))
    with pytest.raises(ValueError, match="3 pictures"):
        sidecar(tmp_path / "grid.png", pictures, ORIGIN)
