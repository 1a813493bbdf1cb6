from __future__ import annotations

import numpy as np
import pytest

from paris_swarm.router.png import Origin, provenance, read_text, tile, write_grid


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, 4, 5, 3), dtype=np.uint8)


def test_a_grid_holds_every_picture_and_its_provenance(tmp_path):
    from PIL import Image

    images = pictures(5)
    prompt = "a planet: Erdöl, 星 and \N{ROCKET}"
    origin = Origin(
        prompts=(prompt, "two"),
        seed=7,
        strategy="top-2",
        sampler="heun",
        steps=50,
        guidance=2.5,
        plan_id="a" * 64,
        assembly="b" * 64,
        missing=("3",),
        precision="bf16",
    )
    text = provenance(origin, shares=np.array([[1.0, 0.0], [0.5, 0.5]], dtype=np.float32), redirected=0.25)
    write_grid(tmp_path / "grid.png", images, columns=3, text=text)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 4 + 2, 3 * 5 + 4, 3)
    for index, image in enumerate(images):
        top, left = index // 3 * 6, index % 3 * 7
        assert (grid[top : top + 4, left : left + 5] == image).all()
    assert (grid[6:, 14:] == 255).all()
    assert read_text(tmp_path / "grid.png") == text
    assert text["prompt"] == f"{prompt}\ntwo"
    assert text["experts"] == "0:0.750 1:0.250"
    assert (text["missing"], text["redirected"]) == ("3", "0.2500")
    assert (text["precision"], text["sampler"], text["guidance"]) == ("bf16", "heun", "2.5")


def test_pictures_can_be_enlarged():
    images = pictures(1)
    assert (tile(images, 4, scale=3)[::3, ::3] == images[0]).all()


@pytest.mark.parametrize(
    "bad", [lambda: tile(pictures(0), 1), lambda: tile(pictures(1), 0), lambda: tile(pictures(2)[0], 1)]
)
def test_grids_of_nothing_are_refused(bad):
    with pytest.raises(ValueError):
        bad()


def test_files_that_are_no_png_are_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="no PNG"):
        read_text(tmp_path / "x.png")
    with pytest.raises(ValueError, match="keyword"):
        write_grid(tmp_path / "y.png", pictures(1), columns=1, text={"": "x"})
    assert not (tmp_path / "y.png").exists()
