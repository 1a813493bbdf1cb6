"""Kinds of experts in one plan: `init --slot 0-1:objective=noise,size=S/2`, and the recipe and tensors of each slot.

Experts of one plan may differ in objective, size, precision and start weights (Heterogeneous Decentralized Diffusion
Models, arXiv 2603.06741). What most slots have becomes the plan's `expert`, the rest its `variants`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from paris_swarm.cli.exits import Usage

if TYPE_CHECKING:
    from paris_swarm.dht_schemas.plan import ExpertVariant, SlotSpec
    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.expert.recipe import Recipe, StartWeights

START = "start"
"""The setting that names start weights: a file or folder, or `none`."""
START_IN_PLAN = 64 << 20
"""Start weights of at most so many bytes travel with the plan; larger ones every peer brings (`join --start-from`)."""
EXAMPLE = "such as 0-1:objective=noise,size=S/2,precision=bf16 or all:precision=bf16"


def no_fit(recipe: str, patch: int, data: PreparedData) -> str:
    """What to say where patches of a named recipe do not divide the pictures or latents."""
    from paris_swarm.expert.data.prepare import MIN_RESOLUTION
    from paris_swarm.expert.recipe import SIZES

    side, latents = data.resolution, data.manifest.get("latents")
    what = f"pictures of {side} x {side} pixels" if latents is None else f"latents of {side} x {side} cells"
    others = [name for name, size in SIZES.items() if side % size.patch == 0]
    listed = " or ".join(filter(None, (", ".join(others[:-1]), *others[-1:])))
    step = patch * (1 if latents is None else latents["pixels"] // side)  # pixels
    near = step * max(side // patch, -(-MIN_RESOLUTION // step))
    return (
        f"--recipe {recipe} does not fit {what}: its patches of {patch} x {patch} do not divide them; "
        + (f"choose --recipe {listed}, or " if others else "")
        + f"prepare them again with another size, such as --resolution {near}"
    )


def parse_slots(texts: Iterable[str], clusters: int) -> dict[str, dict[str, str]]:
    """Settings of each cluster slot that ``--slot SLOTS:NAME=VALUE,...`` names; SLOTS is `all`, or numbers and ranges
    with commas between them. What comes later adds to, and overrides, what comes earlier.

    Raises:
        Usage: not of this form, or a slot that the plan does not have; names and values are not judged here.
    """
    found: dict[str, dict[str, str]] = {str(k): {} for k in range(clusters)}
    for text in texts:
        where, colon, what = text.partition(":")
        pairs = [pair.partition("=") for pair in what.split(",")]
        if not colon or not all(name.strip() and equals and value.strip() for name, equals, value in pairs):
            raise Usage(f"--slot {text}: SLOTS:NAME=VALUE,... is needed, {EXAMPLE}")
        for slot in _slots(text, where, clusters):
            found[slot] |= {name.strip(): value.strip() for name, _, value in pairs}
    return found


def _slots(text: str, where: str, clusters: int) -> list[str]:
    if where.strip() == "all":
        return [str(k) for k in range(clusters)]
    if where.strip() == "router":
        raise Usage(f"--slot {text}: the router has a recipe of its own, --router-recipe")
    slots: list[str] = []
    for part in where.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise Usage(f"--slot {text}: {part!r} is no slot and no range of slots; write it {EXAMPLE}")
        if last >= clusters:
            raise Usage(f"--slot {text}: the plan has clusters 0 to {clusters - 1}")
        slots += [str(k) for k in range(first, last + 1)]
    return slots


def slot_recipes(
    base: Recipe, settings: Mapping[str, Mapping[str, str]], start_from: Path | None
) -> tuple[dict[str, Recipe], dict[str, Path]]:
    """(the recipe of every slot, the file of each start weights by digest); `start_from` is for all slots that do not
    say otherwise.

    Raises:
        Usage: a setting that there is none of, or a value that it cannot have; slot and setting are named.
        NotADiT: there are no such start weights.
    """
    from dataclasses import replace

    from paris_swarm.expert.pretrained import start_file, start_of_file
    from paris_swarm.expert.settings import with_settings

    known: dict[str, StartWeights] = {}
    files: dict[str, Path] = {}

    def named(path: Path) -> StartWeights:
        if str(path) not in known:
            known[str(path)] = start_of_file(path)
            files[known[str(path)].digest] = start_file(path)
        return known[str(path)]

    recipes: dict[str, Recipe] = {}
    for slot, given in settings.items():
        changes = dict(given)
        asked = changes.pop(START, None)
        path = start_from if asked is None else None if asked == "none" else Path(asked)
        try:
            recipe = with_settings(base, changes)
        except ValueError as error:
            raise Usage(f"--slot {slot}: {error}") from error
        recipes[slot] = recipe if path is None else replace(recipe, start=named(path))
    return recipes, files


def slot_specs(
    recipes: Mapping[str, Recipe], spec: Callable[[Recipe], SlotSpec]
) -> tuple[SlotSpec, tuple[ExpertVariant, ...]]:
    """(the plan's `expert`, its `variants`): the recipe of most slots, of the lowest ones where several have as many,
    and the others in the order of their first slots. spec: a recipe with the tensors of its checkpoints.

    Raises:
        Usage: more kinds than a plan can hold.
    """
    from paris_swarm.dht_schemas.plan import MAX_VARIANTS, ExpertVariant

    groups: dict[str, list[str]] = {}
    for slot, recipe in recipes.items():
        groups.setdefault(recipe.digest(), []).append(slot)
    usual = max(groups, key=lambda digest: len(groups[digest]))
    if len(groups) > MAX_VARIANTS + 1:
        raise Usage(f"--slot makes {len(groups)} kinds of experts, a plan holds at most {MAX_VARIANTS + 1}")
    variants = tuple(
        ExpertVariant.model_validate({**spec(recipes[slots[0]]).model_dump(), "slots": tuple(slots)})
        for digest, slots in groups.items()
        if digest != usual
    )
    return spec(recipes[groups[usual][0]]), variants
