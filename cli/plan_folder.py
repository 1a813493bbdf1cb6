"""A plan folder on disk: plan.json (the signed envelope) and the files it names by digest.

plan.json                the DSSE envelope; its BLAKE3 is the plan id
centroids.safetensors    "centroids" F32 [K, F], L2-normalised feature space; with bounded sizes "biases" F32 [K]
probe.safetensors        the open half of the probe set, and the empty prompt's encoding (expert.verify)
held_out.safetensors     "digests" U8 [n, 16]: rows nobody may train on (both halves of the probe set)
cluster-<k>.png          example pictures of each cluster
start-<digest>.safetensors   weights that experts start from, where they are small enough to travel with the plan
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paris_swarm.cli.exits import Unverified
from paris_swarm.dht_schemas.digest import chunk_digests
from paris_swarm.dht_schemas.fields import is_digest
from paris_swarm.dht_schemas.manifest import FileEntry
from paris_swarm.dht_schemas.plan import Bars, OpenedPlan, open_plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from paris_swarm.expert.recipe import Recipe

PLAN_FILE = "plan.json"
CENTROIDS_FILE = "centroids.safetensors"
PROBE_FILE = "probe.safetensors"
HELD_OUT_FILE = "held_out.safetensors"


@dataclass(frozen=True)
class PlanFolder:
    """A plan folder whose every file has been checked against the signed plan."""

    path: Path
    opened: OpenedPlan
    brought: tuple[Path, ...] = ()
    """Start weights that do not travel with the plan, given by hand (`--start-from`)."""

    def start_weights(self, recipe: Recipe) -> Path | None:
        """The file that a recipe starts from: the plan's own, else of those brought the one with its name, or its
        length, or the first; None where there is none. Its bytes are compared with the recipe before they are used.
        """
        if recipe.start is None:
            return None
        own = self.path / start_name(recipe.start.digest)
        if own.is_file():
            return own
        named = [path for path in self.brought if path.name == recipe.start.name]
        fitting = [path for path in self.brought if path.stat().st_size == recipe.start.length]
        return next(iter([*named, *fitting, *self.brought]), None)

    @property
    def plan_id(self) -> str:
        return self.opened.plan_id

    def centroids(self) -> NDArray[np.float32]:
        """float32 [K, F]."""
        centroids: NDArray[np.float32] = self._table(CENTROIDS_FILE, "centroids", "float32")
        return centroids

    def biases(self) -> NDArray[np.float32] | None:
        """float32 [K], what is taken off the cosine with each centroid; None where the plan bounds no sizes."""
        biases: NDArray[np.float32] | None = self._tensors(CENTROIDS_FILE).get("biases")
        return biases

    def held_out(self) -> list[bytes]:
        """16-byte digests of the rows nobody may train on."""
        return [bytes(row.tobytes()) for row in self._table(HELD_OUT_FILE, "digests", "uint8")]

    @property
    def probe_path(self) -> Path:
        return self.path / PROBE_FILE

    @property
    def probe_times(self) -> tuple[float, ...]:
        """The times at which probe rows are judged; plans that pin none have the ones of `expert.verify`.

        Raises:
            Unverified: what the plan pins cannot be times.
        """
        from paris_swarm.expert.verify import PROBE_TIMES, check_times

        pinned = (self.opened.plan.verification.model_extra or {}).get("probe_times", PROBE_TIMES)
        try:
            return check_times(pinned)
        except (TypeError, ValueError) as error:
            raise Unverified(f"the plan {self.plan_id[:12]} cannot be used: {error}") from error

    @property
    def sealed_probe(self) -> str | None:
        """Digest of the sealed half of the probe set, where the plan names one."""
        named = (self.opened.plan.verification.model_extra or {}).get("sealed_probe")
        return named if isinstance(named, str) and is_digest(named) else None

    @property
    def sealed_bars(self) -> dict[str, Bars]:
        """The two bars of every slot on the sealed half; empty where the plan names none.

        Raises:
            Unverified: what the plan names cannot be bars.
        """
        named = (self.opened.plan.verification.model_extra or {}).get("sealed_bars", {})
        try:
            return {str(slot): Bars.model_validate(value) for slot, value in dict(named).items()}
        except (TypeError, ValueError) as error:
            raise Unverified(f"the plan {self.plan_id[:12]} cannot be used: sealed_bars: {error}") from error

    def _table(self, name: str, key: str, dtype: str) -> Any:
        """A two-dimensional tensor of one of the plan's files. Raises Unverified: an organiser may sign anything."""
        found = self._tensors(name).get(key)
        if found is None or found.ndim != 2 or found.dtype.name != dtype:
            what = "is missing" if found is None else f"is {found.dtype.name} {list(found.shape)}"
            raise Unverified(
                f"the plan {self.plan_id[:12]} cannot be used: {key} in {name} {what}, and should be {dtype} with two "
                "dimensions"
            )
        return found

    def _tensors(self, name: str) -> dict[str, Any]:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return dict(load_file(self.path / name))
        except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError) as error:  # odd dtypes: KeyError
            raise Unverified(
                f"the plan {self.plan_id[:12]} cannot be used: its {name} cannot be read ({str(error)[:200]})"
            ) from error


def start_name(digest: str) -> str:
    """The plan's file of start weights with this digest."""
    return f"start-{digest[:16]}.safetensors"


def open_plan_folder(path: Path, *, plan_id: str | None = None) -> PlanFolder:
    """Open and check a plan folder (a path to its plan.json does too).

    Raises:
        ValueError: there is no plan.
        RecordError: the plan is not signed by its organiser, or not the one asked for.
        Unverified: a file is missing or changed; it is named.
    """
    folder = path.parent if path.name == PLAN_FILE else path
    plan_file = folder / PLAN_FILE
    if not plan_file.is_file():
        raise ValueError(f"{path} is not a plan: there is no {PLAN_FILE} in it (`paris-swarm init` writes one)")
    opened = open_plan(plan_file.read_bytes(), plan_id=plan_id)
    for entry in opened.plan.files:
        check_file(folder / entry.name, entry)
    return PlanFolder(folder, opened)


def check_file(path: Path, entry: FileEntry) -> None:
    """Compare one file with its signed entry.

    Raises:
        Unverified: missing, of another length, or with other bytes.
    """
    if not path.is_file() or path.is_symlink():
        raise Unverified(f"{path} is missing: fetch the plan again (join), or copy the whole plan folder")
    if path.stat().st_size != entry.length or chunk_digests(path) != tuple(entry.chunks):
        raise Unverified(f"{path} is not the file the plan names: its bytes were changed after signing")
