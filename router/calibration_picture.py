"""A router's report as a picture: accuracy and calibration error by noise level, and its reliability bins."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from paris_swarm.router.calibration import RouterReport
from paris_swarm.router.trace import expert_colours

SIDE = 300
LEFT, TOP, GAP, FOOT = 48, 40, 76, 44
LINE_HEIGHT = 20
GREY, DARK = (225, 225, 225), (50, 50, 50)


def calibration_picture(reports: Mapping[str, RouterReport]) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]: left, by t, accuracy (thick) and ECE (thin) of every report; right, accuracy over confidence of
    its bins at all t together, a dot the larger the more samples it stands for. The diagonal is a calibrated router.

    reports: name -> report, a colour each.

    Raises:
        ValueError: there are none.
    """
    from PIL import Image, ImageDraw

    if not reports:
        raise ValueError("a picture needs at least one report")
    width = LEFT + 2 * SIDE + GAP + 24
    image = Image.new("RGB", (width, TOP + SIDE + FOOT + LINE_HEIGHT * len(reports) + 12), "white")
    pen = ImageDraw.Draw(image)
    right = LEFT + SIDE + GAP
    for corner, title, axis in (
        (LEFT, "accuracy (thick) and ECE (thin) by t", "t (1 is noise)"),
        (right, "accuracy by confidence, all t", "confidence"),
    ):
        for tick in range(6):
            share = tick / 5
            across, down = corner + round(SIDE * share), TOP + round(SIDE * (1 - share))
            pen.line((corner, down, corner + SIDE, down), fill=GREY)
            pen.line((across, TOP, across, TOP + SIDE), fill=GREY)
            pen.text((corner - 26, down - 6), f"{share:.1f}", fill=DARK)
            pen.text((across - 8, TOP + SIDE + 4), f"{share:.1f}", fill=DARK)
        pen.text((corner, TOP - 26), title, fill=DARK)
        pen.text((corner + SIDE // 2 - 30, TOP + SIDE + 20), axis, fill=DARK)
    pen.line((right, TOP + SIDE, right + SIDE, TOP), fill=(170, 170, 170))

    def at(corner: int, x: float, y: float) -> tuple[int, int]:
        return corner + round(SIDE * x), TOP + round(SIDE * (1 - y))

    for number, (name, report) in enumerate(reports.items()):
        colour = tuple(int(part) for part in expert_colours(len(reports))[number])
        pen.line([at(LEFT, t, found.accuracy) for t, found in report.by_time], fill=colour, width=4)
        pen.line([at(LEFT, t, found.ece) for t, found in report.by_time], fill=colour, width=1)
        filled = [part for part in report.overall.bins if part.count]
        pen.line([at(right, part.confidence, part.accuracy) for part in filled], fill=colour, width=1)
        for part in filled:
            x, y = at(right, part.confidence, part.accuracy)
            radius = 2 + round(6 * (part.count / report.overall.count) ** 0.5)
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        y = TOP + SIDE + FOOT + LINE_HEIGHT * number
        pen.rectangle((LEFT, y + 2, LEFT + 11, y + 13), fill=colour)
        whole = report.overall
        words = f"{name}: accuracy {whole.accuracy:.3f}, ECE {whole.ece:.3f}, cross-entropy {whole.cross_entropy:.3f}"
        pen.text((LEFT + 18, y), words.encode("latin-1", "replace").decode("latin-1"), fill=DARK)
    return np.asarray(image)
