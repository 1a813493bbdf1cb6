"""A grid of pictures as one PNG that says in its own text chunks where it comes from."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paris_swarm.dht_schemas.files import atomic_write

MAX_TEXT = 65_536
"""Characters in one text chunk."""
_KEYWORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _-]{0,77}[A-Za-z0-9]|[A-Za-z0-9]")


@dataclass(frozen=True)
class Origin:
    """What pictures were asked with, and of which model: what their PNG and the file beside it say.

    plan_id, assembly: the plan's id and the assembly digest; missing: slots of the plan that were not there.
    """

    prompts: tuple[str, ...]
    seed: int
    strategy: str
    sampler: str
    steps: int
    guidance: float
    plan_id: str
    assembly: str
    missing: tuple[str, ...] = ()
    precision: str = "fp32"


def provenance(origin: Origin, *, shares: NDArray[np.float32] | None = None, redirected: float = 0.0) -> dict[str, str]:
    """The text chunks of a sampled picture or grid.

    shares float [N, K], averaged over the pictures; redirected: the mean probability that belonged to missing experts.
    """
    text = {
        "prompt": "\n".join(origin.prompts),
        "seed": str(origin.seed),
        "strategy": origin.strategy,
        "sampler": origin.sampler,
        "steps": str(origin.steps),
        "guidance": repr(float(origin.guidance)).removesuffix(".0"),  # every digit: the same picture again
        "plan": origin.plan_id,
        "assembly": origin.assembly,
        "software": "paris-swarm",
    }
    if origin.precision != "fp32":
        text["precision"] = origin.precision
    if shares is not None:
        text["experts"] = " ".join(f"{k}:{share:.3f}" for k, share in enumerate(shares.mean(axis=0)))
    if origin.missing:
        text["missing"] = " ".join(origin.missing)
        text["redirected"] = f"{redirected:.4f}"
    return text


def tile(images: NDArray[np.uint8], columns: int, gap: int = 2, scale: int = 1) -> NDArray[np.uint8]:
    """Pictures uint8 [N, H, W, C] row by row in a white grid uint8 [rows, width, C]; each enlarged `scale` times.

    Raises:
        ValueError: no pictures, or columns or scale below 1.
    """
    if images.ndim != 4 or not len(images) or columns < 1 or scale < 1:
        raise ValueError(f"a grid needs pictures [N, H, W, C] and at least 1 column, got {images.shape}, {columns}")
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def png_bytes(image: NDArray[np.uint8], text: Mapping[str, str] | None = None) -> bytes:
    """One picture uint8 [H, W, 3] or [H, W, 1] as PNG with `text` in international text chunks (PNG, section 11.3.4).

    Raises:
        ValueError: another shape or dtype, or a keyword PNG does not allow.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"a picture is uint8 [H, W, 3] or [H, W, 1], got {image.dtype} {image.shape}")
    info = PngInfo()
    for keyword, value in (text or {}).items():
        if not _KEYWORD.fullmatch(keyword):
            raise ValueError(f"{keyword!r} is no keyword of a PNG text chunk")
        info.add_itxt(keyword, value[:MAX_TEXT])
    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def write_grid(
    path: str | os.PathLike[str],
    images: NDArray[np.uint8],
    *,
    columns: int,
    text: Mapping[str, str],
    gap: int = 2,
    scale: int = 1,
) -> None:
    """`tile` and `png_bytes`, written atomically.

    Raises:
        ValueError: as these two do. OSError: no space or no permission.
    """
    atomic_write(path, png_bytes(tile(images, columns, gap, scale), text))


def read_text(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text chunks of a PNG.

    Raises:
        ValueError: not a PNG.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(Path(path).read_bytes()), formats=["PNG"]) as image:
            image.load()
            return {key: str(value) for key, value in getattr(image, "text", {}).items()}
    except (UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{path} is no PNG") from error


def untile(path: str | os.PathLike[str], *, count: int, side: int, columns: int, gap: int = 2) -> NDArray[np.uint8]:
    """The pictures in a grid that `write_grid` wrote, enlarging undone: uint8 [count, side, side, 3].

    Raises:
        ValueError: the picture is no such grid.
    """
    from PIL import Image

    with Image.open(path) as image:
        grid = np.asarray(image.convert("RGB"))
    columns = min(columns, count)
    scale = (grid.shape[1] + gap) // columns - gap
    if scale % side or grid.shape[1] != columns * (scale + gap) - gap:
        raise ValueError(f"{path} is no grid of {columns} columns of {side}-pixel pictures")
    enlarged = scale // side
    pictures = []
    for index in range(count):
        top, left = index // columns * (scale + gap), index % columns * (scale + gap)
        pictures.append(grid[top : top + scale : enlarged, left : left + scale : enlarged])
    return np.stack(pictures)
