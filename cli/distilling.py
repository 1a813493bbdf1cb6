"""`distill`: the rows a student learns by, the folder it is trained in, and its signed checkpoint.

A student is published as what verification knows already: a signed plan with one cluster, its checkpoint's
announcement, a lock. So `verify`, `sample`, `evaluate` and diffusers take it as they take an ensemble. Its plan says in
`data.distilled` whom it learned from. The training lies beside the result in `.NAME.distilling` until it is over:

    settings.json     what was asked: a run with other settings is refused, not mixed in
    plan/             the student's plan folder, made before the first step
    rows/             what the experts drew, where no data were given
    checkpoints/      of the training loop
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paris_swarm.cli.exits import Incomplete, Unverified, Usage
from paris_swarm.cli.plan_folder import PLAN_FILE, PlanFolder
from paris_swarm.cli.probing import load_slot, open_half
from paris_swarm.cli.row_labels import row_labels
from paris_swarm.cli.student_plan import STUDENT
from paris_swarm.cli.tasks import ROUTER, check_data
from paris_swarm.dht_schemas.files import atomic_write_json
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.dht_schemas.records import Announcement

if TYPE_CHECKING:
    from torch import nn

    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.expert.rows import Rows
    from paris_swarm.router.distill import DistillRecipe, DistillTask
    from paris_swarm.router.drawn_rows import DrawnProgress
    from paris_swarm.router.folder_writing import SlotSource
    from paris_swarm.router.verify import VerifiedFolder

SETTINGS = "settings.json"


def check_teachers(verified: VerifiedFolder) -> dict[str, str]:
    """The root of each cluster's expert.

    Raises:
        Incomplete: an expert is missing.
    """
    clusters = verified.plan.plan.clusters
    if lacking := [slot for slot in map(str, range(clusters)) if slot in verified.lock.missing]:
        raise Incomplete(
            f"expert {', '.join(lacking)} is missing in {verified.path}, and a student learns every cluster from its "
            "expert: wait for its checkpoint and assemble again"
        )
    return {slot.slot: slot.root for slot in verified.lock.slots if slot.slot != ROUTER}


# ---- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudentRows:
    """Prepared or drawn rows, sorted into the plan's clusters; without the rows that the plan holds out."""

    data: PreparedData
    rows: Rows
    labels: Any
    drawn: bool

    @property
    def digest(self) -> str:
        """Of the rows with their clusters, whatever their order."""
        return str(self.rows.used(self.labels[self.rows.rows]).digest)


def student_rows(plan_folder: PlanFolder, data: PreparedData) -> StudentRows:
    """The rows of a folder by which a student learns: of the plan's encoders, or drawn by its experts.

    Raises:
        ValueError: prepared otherwise than the plan asks for, or drawn by experts of another plan.
        Usage: the folder lacks the plan's centroids or its list of held-out rows, so rows cannot be sorted.
    """
    from paris_swarm.expert.rows import Rows, select_rows
    from paris_swarm.router.drawn_rows import drawn_labels

    drawn = drawn_labels(data.manifest)
    if drawn is not None and data.manifest["drawn"].get("plan") != plan_folder.plan_id:
        raise Usage(
            f"the rows in {data.folder} were drawn by experts of plan {str(data.manifest['drawn'].get('plan'))[:12]}: "
            "give prepared rows, or none at all, and these experts draw their own"
        )
    check_data(plan_folder, data, slot=ROUTER)
    try:
        labels = drawn if drawn is not None else row_labels(plan_folder, data)
        held_out = plan_folder.held_out()
    except FileNotFoundError as error:
        raise Usage(f"{error.filename} is not there: rows cannot be sorted into clusters without it") from error
    return StudentRows(data, Rows(data, select_rows(data, None, None, held_out)), labels, drawn is not None)


def draw_own_rows(
    verified: VerifiedFolder, work: Path, *, count: int, steps: int, seed: int, device: str
) -> Iterator[DrawnProgress]:
    """Draws `work`/rows with the folder's experts, unless it is there; goes on where it was interrupted."""
    from paris_swarm.router.drawn_rows import Drawing, counts_by_share, draw_rows, planned_shares

    if (work / "rows").is_dir():
        return
    plan = verified.plan.plan
    plan_folder = PlanFolder(verified.path / "plan", verified.plan)
    yield from draw_rows(
        work / "rows",
        Drawing(
            plan=verified.plan.plan_id,
            experts=check_teachers(verified),
            counts=counts_by_share(planned_shares(plan.data, plan.clusters), count),
            steps=steps,
            seed=seed,
        ),
        experts={str(k): partial(_expert, verified, str(k)) for k in range(plan.clusters)},
        captions=open_half(plan_folder).probes,
        data=plan.data,
        device=device,
    )


# ---- the folder of the training -------------------------------------------------------------------------------------


def work_folder(out: Path) -> Path:
    """Where the training of the student `out` lies."""
    out = Path(os.path.abspath(out))
    return out.with_name(f".{out.name}.distilling")


def begin_work(out: Path, asked: Mapping[str, Any]) -> Path:
    """The work folder of this very distillation, made where it is not there.

    Raises:
        Usage: `out` holds something that this distillation did not write, or another one was begun there.
    """
    work, path = work_folder(out), work_folder(out) / SETTINGS
    wanted = json.loads(json.dumps(asked))
    if path.is_file():
        found = json.loads(path.read_text("utf-8"))
        if odd := [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]:
            raise Usage(
                f"{work} holds another distillation: its {odd[0]} is {_short(found.get(odd[0]))}, asked for was "
                f"{_short(wanted.get(odd[0]))}. Go on with its own settings, choose another place with -o, or remove it"
            )
        if _holds_something(out) and not _is_of_plan(out, work / "plan" / PLAN_FILE):
            raise Usage(f"{out} holds something else than the student of {work}: move one of them away")
        return work
    if _holds_something(out):
        raise Usage(f"{out} is there already: choose a new folder with -o")
    work.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, wanted)
    return work


def _holds_something(out: Path) -> bool:
    return os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir()))


def _is_of_plan(out: Path, plan: Path) -> bool:
    """Whether a folder was written for this very signed plan."""
    try:
        return (out / PLAN_FILE).read_bytes() == plan.read_bytes()
    except OSError:
        return False


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else f"{text[:80]}..."


# ---- training and publishing ----------------------------------------------------------------------------------------


def load_teachers(verified: VerifiedFolder, device: str, memory_budget: int | None) -> Callable[[int], nn.Module]:
    """cluster -> its expert, frozen, loaded when it is first asked for and kept as the budget (bytes) allows.

    Raises (when an expert is loaded):
        Unverified: it holds a NaN or an infinity.
        ChangedFile: it was changed since the folder was verified.
    """
    from paris_swarm.router.resident import Resident

    def load(slot: str) -> nn.Module:
        return _expert(verified, slot).eval().requires_grad_(False).to(device)

    loaders = {k: partial(load, str(k)) for k in range(verified.plan.plan.clusters)}
    return Resident(loaders, memory_budget).get


def _expert(verified: VerifiedFolder, slot: str) -> nn.Module:
    """An expert of the folder, its file compared with the lock once more: hours may lie between two loadings."""
    from paris_swarm.dht_schemas.digest import digest_file
    from paris_swarm.expert.verify import nonfinite_tensors
    from paris_swarm.router.folder_errors import ChangedFile
    from paris_swarm.router.layout import weights_path

    where = weights_path(slot)
    path = verified.path / where
    if digest_file(path) != verified.file(where).blake3:
        raise ChangedFile("changed since the folder was verified", where=where)
    if (bad := next(nonfinite_tensors(path), None)) is not None:
        raise Unverified(f"{bad} in {path} holds a NaN or an infinity: assemble again without this checkpoint")
    return load_slot(PlanFolder(verified.path / "plan", verified.plan), slot, path)


def student_task(
    teacher: PlanFolder, experts: Callable[[int], nn.Module], recipe: DistillRecipe, learned: StudentRows
) -> DistillTask:
    """The training task; the student is judged by the open halves of all clusters."""
    from paris_swarm.router.distill import DistillTask
    from paris_swarm.router.task import join_probes

    halves = open_half(teacher)
    probe = join_probes([halves.probes[slot] for slot in recipe.teachers], teacher.opened.plan.verification.probe_seed)
    return DistillTask(recipe, learned.rows, learned.labels, experts, probe.rows)


def announce(identity: Identity, plan: PlanFolder, checkpoint: Path) -> SlotSource:
    """The student's checkpoint, announced by who trained it.

    Raises:
        Incomplete: it is not below its bar, so nobody could assemble it.
    """
    from paris_swarm.expert.checkpoint import read_state
    from paris_swarm.router.folder_writing import SlotSource
    from paris_swarm.router.layout import EMA_FILE

    state = read_state(checkpoint)
    bar = plan.opened.plan.verification.bars[STUDENT].assemblable
    if state.probe_loss >= bar:
        raise Incomplete(
            f"after {state.step} steps the student's probe loss is {state.probe_loss:.4f}, its bar is {bar:.4f} (the "
            "best scalar predictor, or untrained weights where these are better): "
            + ("run the same command again to go on" if state.step < state.steps else "ask for more --steps")
        )
    manifest, data, root = build_manifest(
        checkpoint, [EMA_FILE], STUDENT, meta={"step": state.step, "distilled": plan.opened.plan.data["distilled"]}
    )
    announcement = Announcement(
        plan=plan.plan_id,
        slot=STUDENT,
        author=identity.peer_id,
        seq=state.step,
        step=state.step,
        parent=None,
        root=root,
        bytes=manifest.total_bytes,
        probe_loss=state.probe_loss,
    )
    return SlotSource(announcement.seal(identity), data, checkpoint / EMA_FILE)


@contextmanager
def ending_in_order() -> Iterator[Callable[[], bool]]:
    """Whether a signal has asked to end; a second one interrupts at once."""
    asked = False

    def first(number: int, _frame: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, first) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
