"""`evaluate`: draws with every strategy and seed, keeps the pictures, measures them beside real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paris_swarm.cli.exits import Usage
from paris_swarm.cli.plan_folder import PlanFolder
from paris_swarm.cli.row_labels import row_rule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.router.draw import DrawStep
    from paris_swarm.router.evaluation.measure import Extractor, Measures, Prompts
    from paris_swarm.router.folder import Assembled

STRATEGIES = ("top-1", "top-2", "top-3", "full", "threshold-0.05", "adaptive", "sample", "nucleus-0.9", "oracle")
"""What is measured where no strategy is named; those that need more experts than there are, are left out."""
FLOOR = "real held-out pictures"


@dataclass(frozen=True)
class Asked:
    """What to draw: pictures a seed, and how."""

    strategies: tuple[str, ...]
    seeds: int
    pictures: int
    sampler: str
    steps: int
    guidance: float


@dataclass(frozen=True)
class Judged:
    """Rows to judge by: `prompts` [P] and what they are compared with, features [n, F] of other real rows.

    held_out: whether the plan forbids to train on the prompts' rows; palette: the colours that captions name.
    """

    rows: NDArray[np.int64]
    prompts: Prompts
    features: NDArray[np.floating[Any]]
    pixels: NDArray[np.uint8] | None
    held_out: bool
    palette: Mapping[str, Sequence[int]]


def default_strategies(clusters: int, missing: Sequence[str]) -> tuple[str, ...]:
    """Every strategy that K experts can follow, one where there is one; the oracle only where all experts are here."""
    if clusters == 1:
        return ("top-1",)
    fitting = (name for name in STRATEGIES if not name.startswith("top-") or int(name[4:]) <= clusters)
    return tuple(name for name in fitting if not (missing and name == "oracle"))


def check_rows(plan_folder: PlanFolder, data: PreparedData, side: int) -> None:
    """Refuses rows that pictures of this plan cannot be compared with.

    Raises:
        Usage: drawn by experts, latents, another size, or encoded by other encoders than the plan's.
    """
    facts, manifest = plan_folder.opened.plan.data, data.manifest
    again = "prepare it again: paris-swarm prepare SOURCE OUT"
    if manifest.get("drawn") is not None:
        raise Usage(f"the rows in {data.folder} were drawn by experts: compare pictures with real rows")
    if manifest.get("latents") is not None:
        raise Usage(f"{data.folder} holds latents, pictures are compared as pixels: {again} without --vae")
    if data.resolution != side:
        raise Usage(f"{data.folder} holds pictures of {data.resolution} px, this model draws {side}: {again}")
    for part, what in (("text", "captions"), ("features", "features")):
        for name in ("name", "digest"):
            found, asked = manifest[part].get(name), facts.get(part, {}).get(name)
            if found != asked:
                raise Usage(f"{data.folder} has {what} of an encoder with {name} {found}, the plan's has {asked}")


def choose_rows(plan_folder: PlanFolder, data: PreparedData, count: int, *, keep_pixels: bool = False) -> Judged:
    """Prompts from the rows that nobody may train on (from any, where the data has too few of those), at most `count`
    and never more than the rows that are left to compare with.

    Raises:
        Usage: too few rows.
    """
    import numpy as np

    from paris_swarm.expert.data.dicebear import PALETTE
    from paris_swarm.router.evaluation.measure import Prompts
    from paris_swarm.router.evaluation.neighbours import NEIGHBOURS

    forbidden = set(plan_folder.held_out())
    digests = np.asarray(data.digests)
    held = np.array([row for row in range(data.count) if digests[row].tobytes() in forbidden], dtype=np.int64)
    held_out = len(held) > NEIGHBOURS
    dice = np.random.Generator(np.random.PCG64(plan_folder.opened.plan.seed))
    pool = held if held_out else np.arange(data.count, dtype=np.int64)
    rows = np.sort(dice.permutation(pool)[: min(count, data.count // 2)])
    others = np.setdiff1d(np.arange(data.count, dtype=np.int64), held if held_out else rows)
    if len(rows) <= NEIGHBOURS or len(others) < len(rows):
        raise Usage(
            f"{data.folder} has {len(rows)} rows for prompts and {len(others)} to compare with: at least "
            f"{NEIGHBOURS + 1} prompts and as many others are needed; prepare more images"
        )
    captions = data.captions(rows)
    features = np.asarray(data.features()[np.arange(data.count)])
    labels = row_rule(plan_folder).labels(features[rows], digests[rows], lambda: captions)
    palette = data.manifest.get("palette") or data.manifest["source"].get("palette") or PALETTE
    pixels = data.pixels(others) if keep_pixels else None
    return Judged(rows, Prompts(labels, captions, data.pixels(rows)), features[others], pixels, held_out, dict(palette))


class Evaluation:
    """One model judged on one set of rows. `folder` keeps the pictures; `say` hears of files that were set aside."""

    def __init__(
        self,
        assembled: Assembled,
        plan_folder: PlanFolder,
        data: PreparedData,
        judged: Judged,
        extractor: Extractor,
        published: Extractor | None,
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        from paris_swarm.router.evaluation.measure import Reference

        self._model, self._data, self._judged = assembled, data, judged
        self._extractor, self._folder, self._say = extractor, folder, say
        count = len(judged.rows)
        self._reference = Reference(judged.features, count)
        self._published = None
        if published is not None:
            assert judged.pixels is not None  # choose_rows was asked to keep them
            self._published = (published, Reference(published.encode(judged.pixels), count))
        clustered = row_rule(plan_folder).method == "clusters"
        self._centroids = plan_folder.centroids() if clustered else None
        self._biases = plan_folder.biases() if clustered else None

    def floor(self) -> Measures:
        """The figures of the prompts' own real pictures: what a perfect model would get."""
        return self._measured(self._judged.prompts.pixels)

    def measured(self, strategy: str, seed: int, asked: Asked, on_step: Callable[[DrawStep], None]) -> Drawn:
        """Draws with one strategy and seed, unless the pictures are there, and measures them.

        Raises:
            ValueError: no such strategy or sampler.
            FolderError: weights were changed since the folder was verified.
            OSError: no space or no permission.
        """
        from paris_swarm.router.evaluation.kept import kept_pictures

        judged = self._judged
        rows = [row.tobytes().hex() for row in self._data.digests[judged.rows]]
        key = {
            "assembly": self._model.digest,
            "rows": rows,
            "strategy": strategy,
            "seed": seed,
            "sampler": asked.sampler,
            "steps": asked.steps,
            "guidance": asked.guidance,
        }

        def draw() -> tuple[NDArray[np.uint8], Mapping[str, Any]]:
            pictures = self._model.sample(
                *self._data.states(judged.rows),
                strategy=strategy,
                sampler=asked.sampler,
                steps=asked.steps,
                guidance=asked.guidance,
                seed=seed,
                labels=judged.prompts.clusters.tolist(),
                on_step=on_step,
            )
            return pictures.images, {"experts_used": float((pictures.weights > 0).sum(axis=2).mean())}

        kept = kept_pictures(self._folder / "pictures", f"{strategy}-seed-{seed}", key, draw)
        if kept.damaged is not None:
            self._say(f"Pictures that were damaged lie at {kept.damaged}; they were drawn again.")
        return Drawn(kept.images, float(kept.facts["experts_used"]), self._measured(kept.images))

    def _measured(self, images: NDArray[np.uint8]) -> Measures:
        from paris_swarm.router.evaluation.measure import measure

        return measure(
            images,
            self._judged.prompts,
            self._reference,
            self._centroids,
            self._extractor,
            palette=self._judged.palette,
            published=self._published,
            biases=self._biases,
        )


@dataclass(frozen=True)
class Drawn:
    """One strategy, one seed: images uint8 [P, H, W, 3], experts used a step on average, the figures."""

    images: NDArray[np.uint8]
    experts_used: float
    measures: Measures
