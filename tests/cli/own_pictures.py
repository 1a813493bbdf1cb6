"""A folder of a person's own captioned pictures, drawn with Pillow: two kinds that look different, and bad ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (205, 35, 40),
    "orange": (240, 140, 30),
    "yellow": (245, 220, 60),
    "green": (40, 150, 60),
    "blue": (40, 80, 200),
    "purple": (130, 50, 160),
    "grey": (128, 128, 128),
    "white": (245, 245, 245),
}
GOOD = 120
BAD = {
    "broken.png": "cannot be decoded",
    "empty.png": "is empty",
    "uncaptioned.png": "no caption",
    "missing.png": "does not exist",
}


def draw_folder(folder: Path, *, good: int = GOOD, bad: bool = True, seed: int = 0) -> Path:
    """``good`` usable pictures (half flags of two bands, half discs) and, if asked, four bad rows."""
    folder.mkdir(parents=True)
    dice = random.Random(seed)
    lines = []
    for number in range(good):
        name = f"picture-{number:03}.png"
        image, text = _flag(dice) if number % 2 else _disc(dice)
        image.save(folder / name)
        lines.append({"file_name": name, "text": text})
    if bad:
        (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"these are no chunks")
        (folder / "empty.png").touch()
        Image.new("RGB", (32, 32), (9, 99, 199)).save(folder / "uncaptioned.png")
        lines.insert(3, {"file_name": "broken.png", "text": "a picture that was cut off"})
        lines.insert(7, {"file_name": "empty.png", "text": "nothing at all"})
        lines.append({"file_name": "uncaptioned.png", "text": "  "})
        lines.append({"file_name": "missing.png", "text": "a picture that was deleted"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return folder


def _flag(dice: random.Random) -> tuple[Image.Image, str]:
    """Two broad bands of bright colour."""
    top, bottom = dice.sample([name for name in COLOURS if name not in ("grey", "white")], 2)
    image = Image.new("RGB", (48, 48), _shade(dice, COLOURS[top]))
    ImageDraw.Draw(image).rectangle((0, 24, 48, 48), fill=_shade(dice, COLOURS[bottom]))
    return image, f"a flag, {top} above {bottom}"


def _disc(dice: random.Random) -> tuple[Image.Image, str]:
    """A disc on dark or light ground."""
    ground = dice.choice(["black", "white"])
    image = Image.new("RGB", (48, 48), _shade(dice, (14, 14, 14) if ground == "black" else COLOURS["white"]))
    colour = dice.choice(["red", "green", "blue", "grey"])
    x, y, radius = dice.randrange(18, 30), dice.randrange(18, 30), dice.randrange(10, 16)
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=_shade(dice, COLOURS[colour]))
    return image, f"a {colour} disc on {ground} ground"


def _shade(dice: random.Random, colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, part + dice.randrange(-10, 11))) for part in colour)
    return red, green, blue
