"""Which expert drew what, step by step, as a picture: one row a picture, one column a step, a colour an expert."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CELL_WIDTH, CELL_HEIGHT, GAP = 10, 18, 4
LEGEND_HEIGHT = 22
MARGIN = 12
LABEL_WIDTH = 150
LABEL_LETTERS = 24


def expert_colours(count: int) -> NDArray[np.uint8]:
    """uint8 [count, 3]: hues by the golden angle, so that neighbours differ and a colour stays when experts come."""
    hues = [(0.58 + 0.618034 * k) % 1.0 for k in range(count)]
    rgb = [colorsys.hls_to_rgb(hue, (0.45, 0.62, 0.35)[k % 3], 0.65) for k, hue in enumerate(hues)]
    return np.round(np.array(rgb) * 255).astype(np.uint8)


def trace_picture(weights: NDArray[np.float32], labels: Sequence[str] = ()) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] from weights [N, steps, K]: noise on the left, the finished picture on the right.

    A cell is divided by weight, the largest share below, so a Top-2 step shows two colours. labels: a few words for
    each row.

    Raises:
        ValueError: the weights are not [N, steps, K].
    """
    from PIL import Image, ImageDraw

    if weights.ndim != 3 or not weights.size:
        raise ValueError(f"weights must be [N, steps, K], got {list(weights.shape)}")
    count, steps, experts = weights.shape
    colours = [tuple(int(part) for part in colour) for colour in expert_colours(experts)]
    shares = weights.mean(axis=(0, 1))
    shown = [k for k in np.argsort(-shares, kind="stable").tolist() if shares[k] > 0]
    left = MARGIN + (LABEL_WIDTH if labels else 0)
    width = max(left + steps * CELL_WIDTH + MARGIN, left + 3 * LABEL_WIDTH)
    columns = max(1, (width - 2 * MARGIN) // 110)
    legend = LEGEND_HEIGHT * -(-len(shown) // columns)
    image = Image.new("RGB", (width, 2 * MARGIN + count * (CELL_HEIGHT + GAP) + legend), "white")
    pen = ImageDraw.Draw(image)
    for row in range(count):
        top = MARGIN + row * (CELL_HEIGHT + GAP)
        if row < len(labels):
            words = labels[row] if len(labels[row]) <= LABEL_LETTERS else labels[row][: LABEL_LETTERS - 3] + "..."
            pen.text((MARGIN, top + 3), words.encode("latin-1", "replace").decode("latin-1"), fill=(60, 60, 60))
        for step in range(steps):
            x, drawn = left + step * CELL_WIDTH, 0
            order = np.argsort(-weights[row, step], kind="stable")
            # Borders are rounded, not heights, so that the shares of a cell fill it exactly.
            borders = np.round(np.cumsum(weights[row, step][order], dtype=np.float64) * CELL_HEIGHT).astype(int)
            for k, border in zip(order.tolist(), borders.clip(0, CELL_HEIGHT).tolist(), strict=True):
                if border > drawn:
                    box = (x, top + CELL_HEIGHT - border, x + CELL_WIDTH - 2, top + CELL_HEIGHT - 1 - drawn)
                    pen.rectangle(box, fill=colours[k])
                    drawn = border
    for place, k in enumerate(shown):
        x = MARGIN + (place % columns) * 110
        y = 2 * MARGIN + count * (CELL_HEIGHT + GAP) + (place // columns) * LEGEND_HEIGHT - MARGIN // 2
        pen.rectangle((x, y + 2, x + 11, y + 13), fill=colours[k])
        pen.text((x + 17, y), f"expert {k}  {100 * shares[k]:.0f} %", fill=(30, 30, 30))
    return np.asarray(image)
