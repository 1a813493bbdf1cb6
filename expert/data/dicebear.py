"""The embedded image source: DiceBear styles drawn by resvg, with true captions.

Only styles whose own licence field says CC0 1.0 are drawn. The colours that a caption names are set by a seeded
generator from a palette of clearly different ones; the rest (hills, leaves, eyes, stars, ...) is DiceBear's own choice
from the same seed. A caption is written from what DiceBear reports as drawn, never from what was asked for.
Item i of a set depends on (seed, families, i) only.
"""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from itertools import islice
from typing import Any

import numpy as np
from blake3 import blake3

from paris_swarm.expert.data.sources import Captioned, PrepareError, Skipped

PALETTE: Mapping[str, tuple[int, int, int]] = {
    "black": (21, 23, 31),
    "white": (244, 244, 238),
    "red": (214, 48, 58),
    "orange": (245, 135, 42),
    "yellow": (248, 210, 60),
    "green": (63, 159, 74),
    "blue": (44, 98, 214),
    "purple": (122, 61, 184),
    "pink": (245, 156, 196),
    "brown": (123, 75, 42),
}
"""The colours captions name, sRGB. The closest two are 77 apart (Euclidean), most more than 150."""

DEFAULT_FAMILIES = ("landscape", "planets", "sprouts", "voxel-bot")
LICENCE = "CC0 1.0"

_CONTRAST = 110.0  # two named colours side by side are at least this far apart in RGB, so both can be seen
_BATCH = 64  # images a worker process draws at a time
_AHEAD = 4  # batches for each worker that may be drawn before they are asked for


@dataclass(frozen=True)
class Family:
    """One kind of picture: the DiceBear style, how its options are drawn, and how its caption reads.

    ``options(pick)`` gives DiceBear options; ``pick(colours, *beside)`` is a seeded choice among named colours that can
    be told apart from those in ``beside``. ``caption(drawn)`` gives the sentence and the attributes it rests on.
    """

    style: str
    options: Callable[[Callable[..., str]], dict[str, Any]]
    caption: Callable[[Mapping[str, Any]], tuple[str, dict[str, str]]]


# --- landscapes ------------------------------------------------------------------------------------------------------

_SKIES = ("black", "white", "red", "orange", "yellow", "blue", "purple", "pink")
_HILLS = ("green", "blue", "orange", "purple", "brown", "red")
_SLOPES = ((1.0, 0.5), (1.0, 0.22), (0.85, 0.0), (0.55, 0.0))  # brightness and share of white, back to front


def _landscape_options(pick: Callable[..., str]) -> dict[str, Any]:
    sky = pick(_SKIES)
    hills = pick(_HILLS, sky)
    options: dict[str, Any] = {
        "backgroundColor": [_hex(sky)],
        "orbColor": [_hex(pick(("yellow", "white", "orange", "red"), sky))],
        "orbVariant": ["sun"],
    }
    for number, (bright, white) in enumerate(_SLOPES, start=1):
        shade = tuple(round(bright * part * (1 - white) + 255 * white) for part in PALETTE[hills])
        options[f"hill{number}Color"] = ["#{:02x}{:02x}{:02x}".format(*shade)]
    return options


def _landscape_caption(drawn: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    sky = _named(drawn["backgroundColor"])
    shades = {
        tuple(round(_SLOPES[2][0] * part) for part in PALETTE[name]): name for name in _HILLS
    }  # the third hill has the colour's own hue, unmixed with white
    hills = shades[_rgb(drawn["hill3Color"][0])]
    attributes = {"background": sky, "hills": hills}
    if "orbVariant" not in drawn:
        return f"{_a(sky)} sky over {hills} hills.", attributes
    orb = _named(drawn["orbColor"])
    attributes["orb"] = orb
    return f"{_a(sky)} sky with {_a(orb).lower()} {'moon' if orb == 'white' else 'sun'} over {hills} hills.", attributes


# --- planets ---------------------------------------------------------------------------------------------------------

_SPACE = ("black", "blue", "purple", "green", "red")
_BRIGHT = ("white", "red", "orange", "yellow", "green", "blue", "purple", "pink")
_MOONS = {"one": "one moon", "two": "two moons", "tiny": "tiny moons"}


def _planet_options(pick: Callable[..., str]) -> dict[str, Any]:
    space = pick(_SPACE)
    return {
        "backgroundColor": [_hex(space)],
        "planetColor": [_hex(pick(_BRIGHT, space))],
        "moonsVariant": ["one", "two"],
    }


def _planet_caption(drawn: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    space, planet = _named(drawn["backgroundColor"]), _named(drawn["planetColor"])
    parts = []
    if "ringVariant" in drawn:
        parts.append("a ring")
    if "moonsVariant" in drawn:
        parts.append(_MOONS[drawn["moonsVariant"]])
    attributes = {
        "background": space,
        "planet": planet,
        "ring": "yes" if "ringVariant" in drawn else "no",
        "moons": str(drawn.get("moonsVariant", "none")),
    }
    having = f" that has {' and '.join(parts)}" if parts else ""
    return f"{_a(space)} background with {_a(planet).lower()} planet{having}.", attributes


# --- sprouts ---------------------------------------------------------------------------------------------------------

_WALLS = ("black", "white", "red", "orange", "yellow", "blue", "purple", "pink")
_POTS = ("white", "red", "orange", "yellow", "blue", "purple", "pink")
_PLANTS = {
    "sprout": "sprout", "seedling": "seedling", "cactus": "cactus", "ball": "round cactus", "succulent": "succulent",
    "bush": "bush", "tall": "tall plant", "flower": "flower", "tulip": "tulip", "palm": "palm", "grass": "grass",
    "buds": "plant with buds",
}  # fmt: skip


def _sprout_options(pick: Callable[..., str]) -> dict[str, Any]:
    wall = pick(_WALLS)
    return {
        "backgroundColor": [_hex(wall)],
        "potColor": [_hex(pick(_POTS, wall))],
        "bloomColor": [_hex(pick(("white", "red", "yellow", "pink", "purple"), wall))],
        "plantColor": ["#4ade80", "#22c55e", "#10b981", "#34d399"],
    }


def _sprout_caption(drawn: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    wall, pot, plant = _named(drawn["backgroundColor"]), _named(drawn["potColor"]), drawn["plantVariant"]
    attributes = {"background": wall, "pot": pot, "plant": plant}
    if plant in ("flower", "tulip"):
        attributes["bloom"] = _named(drawn["bloomColor"])
        noun = f"{_a(attributes['bloom']).lower()} {_PLANTS[plant]}"
    elif plant == "grass":
        noun = "green grass"
    else:
        noun = f"a green {_PLANTS[plant]}"
    return f"{_a(wall)} background with {noun} in {_a(pot).lower()} pot.", attributes


# --- robots ----------------------------------------------------------------------------------------------------------

_BACKDROPS = ("black", "white", "red", "orange", "yellow", "green", "blue", "purple", "pink")
_EYES = ("white", "red", "yellow", "green", "blue", "pink")


def _robot_options(pick: Callable[..., str]) -> dict[str, Any]:
    backdrop = pick(_BACKDROPS)
    body = pick(_BRIGHT, backdrop)
    return {
        "backgroundColor": [_hex(backdrop)],
        "bodyColor": [_hex(body)],
        "glowColor": [_hex(pick(_EYES, body))],
        "screenColor": ["#161a21"],
    }


def _robot_caption(drawn: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    backdrop, body, eyes = (_named(drawn[key]) for key in ("backgroundColor", "bodyColor", "glowColor"))
    text = f"{_a(backdrop)} background with {_a(body).lower()} robot that has {eyes} eyes."
    return text, {"background": backdrop, "robot": body, "eyes": eyes}


# --- simpler kinds: one body or pattern in one named colour -------------------------------------------


def _simple_options(colour_option: str) -> Callable[[Callable[..., str]], dict[str, Any]]:
    def options(pick: Callable[..., str]) -> dict[str, Any]:
        backdrop = pick(_BACKDROPS)
        return {"backgroundColor": [_hex(backdrop)], colour_option: [_hex(pick(_BRIGHT, backdrop))]}

    return options


def _simple_caption(colour_option: str, noun: str) -> Callable[[Mapping[str, Any]], tuple[str, dict[str, str]]]:
    def caption(drawn: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
        backdrop, body = _named(drawn["backgroundColor"]), _named(drawn[colour_option])
        return f"{_a(backdrop)} background with {_a(body).lower()} {noun}.", {"background": backdrop, noun: body}

    return caption


_HAIR = {"black": "#28150a", "brown": "#603a14", "red": "#bd1700", "green": "#91cb15", "blonde": "#e2c071"}
_SHIRTS = {"red": "#d11141", "blue": "#428bca", "green": "#00b159", "yellow": "#ffd969"}


def _portrait_options(pick: Callable[..., str]) -> dict[str, Any]:
    return {
        "backgroundColor": [_hex(pick(_BACKDROPS))],
        "hairColor": list(_HAIR.values()),
        "clothingColor": list(_SHIRTS.values()),
        "hatProbability": 0,
    }


def _portrait_caption(drawn: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    backdrop = _named(drawn["backgroundColor"])
    hair = next(name for name, code in _HAIR.items() if code == drawn["hairColor"][0])
    length = "long" if drawn["hairVariant"].startswith("long") else "short"
    text = f"{_a(backdrop)} background with a person who has {length} {hair} hair."
    return text, {"background": backdrop, "hair": f"{length} {hair}"}


def _shapes_options(pick: Callable[..., str]) -> dict[str, Any]:
    return {"backgroundColor": [_hex(pick(_BACKDROPS))]}


def _shapes_caption(drawn: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    backdrop = _named(drawn["backgroundColor"])  # the shapes are a translucent tint of it, which has no name
    return f"{_a(backdrop)} background with a pattern of shapes.", {"background": backdrop}


FAMILIES: Mapping[str, Family] = {
    "landscape": Family("landscape", _landscape_options, _landscape_caption),
    "planets": Family("planets", _planet_options, _planet_caption),
    "sprouts": Family("sprouts", _sprout_options, _sprout_caption),
    "voxel-bot": Family("voxel-bot", _robot_options, _robot_caption),
    "critters": Family("critters", _simple_options("bodyColor"), _simple_caption("bodyColor", "monster")),
    "moods": Family("moods", _simple_options("faceColor"), _simple_caption("faceColor", "smiley")),
    "pixel-art": Family("pixel-art", _portrait_options, _portrait_caption),
    "clay": Family("clay", _simple_options("bodyColor"), _simple_caption("bodyColor", "clay figure")),
    "rings": Family("rings", _simple_options("ringColor"), _simple_caption("ringColor", "ring pattern")),
    "shape-grid": Family("shape-grid", _shapes_options, _shapes_caption),
}


# --- the source ------------------------------------------------------------------------------------------------------


class DiceBearSource:
    """``count`` pictures, the families taking turns, drawn at ``resolution`` pixels by ``workers`` processes.

    Raises PrepareError: an unknown family, a style that is not CC0, a package that is not installed, a bad number.
    """

    def __init__(
        self, *, count: int, resolution: int, seed: int, families: Sequence[str] = DEFAULT_FAMILIES, workers: int = 1
    ) -> None:
        unknown = [name for name in families if name not in FAMILIES]
        if unknown or not families or len(set(families)) != len(families):
            raise PrepareError(f"families must be different names out of {', '.join(FAMILIES)}; got {list(families)}")
        if count < 1:
            raise PrepareError(f"count must be at least 1, got {count}")
        self._families, self._count, self._resolution = tuple(families), count, resolution
        self._seed, self._workers = seed, max(1, workers)
        self._licences = [_checked_licence(FAMILIES[name].style) for name in families]

    def describe(self) -> dict[str, Any]:
        return {
            "source": {
                "kind": "dicebear",
                "families": list(self._families),
                "seed": self._seed,
                "packages": {name: version(name) for name in ("dicebear-core", "dicebear-styles", "resvg-py")},
            },
            "licences": self._licences,
            "palette": {name: list(rgb) for name, rgb in PALETTE.items()},
        }

    def fingerprint(self) -> str:
        return ""

    def total(self) -> int:
        return self._count

    def items(self, start: int = 0) -> Generator[Captioned | Skipped, None, None]:
        jobs = (
            (self._families, self._seed, self._resolution, first, min(first + _BATCH, self._count))
            for first in range(start, self._count, _BATCH)
        )
        if self._workers == 1:
            for job in jobs:
                yield from _draw_batch(job)
            return
        pool = ProcessPoolExecutor(
            self._workers,
            # "spawn": a fork would copy torch's thread pool in whatever state it is in.
            mp_context=multiprocessing.get_context("spawn"),
            # Ctrl-C reaches the whole process group: it ends these at once and in silence, the parent answers it.
            initializer=signal.signal,
            initargs=(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            ahead = deque(pool.submit(_draw_batch, job) for job in islice(jobs, _AHEAD * self._workers))
            while ahead:
                yield from ahead.popleft().result()
                ahead.extend(pool.submit(_draw_batch, job) for job in islice(jobs, 1))
        except BrokenProcessPool as error:
            raise PrepareError("a drawing process was killed, perhaps for want of memory: use fewer workers") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _draw_batch(job: tuple[tuple[str, ...], int, int, int, int]) -> list[Captioned]:
    families, seed, resolution, start, stop = job
    drawn = []
    for index in range(start, stop):
        name = families[index % len(families)]
        number = index // len(families)
        pixels, text, attributes = draw(name, _style(FAMILIES[name].style), f"{seed}-{number}", resolution)
        record = {"text": text, "family": name, "attributes": attributes, "file": f"{name}-{number:06d}"}
        drawn.append(Captioned(pixels, record))
    return drawn


def draw(family: str, style: Any, seed: str, resolution: int) -> tuple[np.ndarray, str, dict[str, str]]:
    """One picture: uint8 [resolution, resolution, 3], its caption and the attributes the caption rests on."""
    import resvg_py
    from dicebear import Avatar
    from PIL import Image

    chosen = FAMILIES[family].options(_picker(f"{family}/{seed}"))
    result = Avatar(style, {"seed": seed, **chosen}).to_json()
    text, attributes = FAMILIES[family].caption(result["options"])
    png = resvg_py.svg_to_bytes(svg_string=result["svg"], width=resolution, height=resolution, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGB")), text, attributes


def _picker(key: str) -> Callable[..., str]:
    """A seeded choice among named colours: a stream of BLAKE3 output, the same in every release of every library."""
    stream = iter(blake3(f"paris-swarm dicebear {key}".encode()).digest(length=64))

    def pick(colours: Sequence[str], *beside: str) -> str:
        apart = [
            colour
            for colour in colours
            if all(np.hypot.reduce(np.subtract(PALETTE[colour], PALETTE[other])) >= _CONTRAST for other in beside)
        ]
        number = int.from_bytes(bytes(next(stream) for _ in range(4)), "little")
        return apart[number % len(apart)]

    return pick


@functools.cache  # DiceBear checks a style against its schema, which takes seconds: once a process
def _style(name: str) -> Any:
    from dicebear import Style

    return Style(_definition(name))


def _definition(style: str) -> dict[str, Any]:
    try:
        return json.loads(files("dicebear_styles").joinpath(f"{style}.json").read_text("utf-8"))
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise PrepareError(
            f"the DiceBear style {style!r} is not installed ({error}): run pip install 'paris-swarm[data]'"
        ) from error


def _checked_licence(style: str) -> dict[str, str]:
    meta = _definition(style).get("meta", {})
    licence = meta.get("license", {})
    if licence.get("name") != LICENCE:
        raise PrepareError(
            f"the DiceBear style {style!r} is licensed {licence.get('name')!r}, not {LICENCE}: choose another"
        )
    return {
        "what": f"DiceBear style {style}",
        "name": LICENCE,
        "url": str(licence.get("url", "")),
        "creator": str(meta.get("creator", {}).get("name", "")),
    }


def _hex(name: str) -> str:
    return "#{:02x}{:02x}{:02x}".format(*PALETTE[name])


def _rgb(code: str) -> tuple[int, ...]:
    return tuple(int(code[place : place + 2], 16) for place in (1, 3, 5))


def _named(drawn: Sequence[str]) -> str:
    """The name of a drawn colour (DiceBear reports a list of one)."""
    rgb = _rgb(drawn[0])
    return next(name for name, value in PALETTE.items() if value == rgb)


def _a(name: str) -> str:
    return f"{'An' if name[0] in 'aeiou' else 'A'} {name}"
