"""One audit from beginning to end, and what it came to, for people and for scripts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paris_swarm.cli.auditing import (
    Evidence,
    announcements_in,
    check_finite,
    checked_task,
    fetched_evidence,
    held_evidence,
)
from paris_swarm.cli.connect import observing
from paris_swarm.cli.exits import INCOMPLETE, OK, UNVERIFIED, Incomplete
from paris_swarm.cli.plan_folder import PLAN_FILE, PlanFolder, open_plan_folder
from paris_swarm.cli.replay import (
    Replayed,
    ReplayPlace,
    device_for,
    forget,
    prepared_start,
    replay,
    replay_folder,
    threads_for,
)
from paris_swarm.cli.settings import Settings
from paris_swarm.cli.tasks import check_memory
from paris_swarm.dht_schemas.fields import ROUTER
from paris_swarm.dht_schemas.invite import Invite
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.trainer import TrainProgress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from paris_swarm.expert.audit import Comparison, FileDistance


@dataclass(frozen=True)
class AuditOptions:
    """What `audit` was asked to do."""

    root: str
    data: Path
    model: Path | None
    offline: bool
    device: str
    threads: int
    keep_work: bool
    start_from: tuple[Path, ...] = ()


# ---- what it came to ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AuditFound:
    """differs: what of the environment is not the author's, field -> (here, the author's). kept: where the replays lie,
    None when they were removed.
    """

    evidence: Evidence
    comparison: Comparison
    verdict: str
    differs: dict[str, tuple[str, str]]
    kept: Path | None

    @property
    def reproduced(self) -> bool:
        return self.verdict in ("identical", "explained")

    @property
    def exit_code(self) -> int:
        """Nobody is accused where another version of the code made the weights: that audit is to be done elsewhere."""
        return OK if self.reproduced else INCOMPLETE if self.verdict == "other version" else UNVERIFIED

    def as_dict(self) -> dict[str, Any]:
        """The report of `--json`."""
        from paris_swarm.expert.audit import MARGIN

        said, chain = self.evidence.provenance, self.evidence.chain
        author = self.evidence.announcement.author if self.evidence.announcement else None
        return {
            "root": self.evidence.root,
            "slot": self.evidence.slot,
            "author": author,
            "parent": self.evidence.manifest.parent,
            "from_step": said.from_step,
            "to_step": said.to_step,
            "verdict": self.verdict,
            "reproduced": self.reproduced,
            "margin": MARGIN,
            "files": [_file_dict(file) for file in self.comparison.files],
            "environment": said.environment.model_dump(),
            "environment_differs": {name: list(pair) for name, pair in self.differs.items()},
            "chain": {"checkpoints": len(chain.links), "complete": chain.complete, "missing": chain.missing},
            "work": str(self.kept) if self.kept else None,
        }

    def text(self) -> str:
        """The same for people."""
        from paris_swarm.expert.audit import MARGIN

        said, chain = self.evidence.provenance, self.evidence.chain
        author = self.evidence.announcement.author if self.evidence.announcement else "unknown (no announcement here)"
        back = "to the first checkpoint" if chain.complete else f"to {str(chain.missing)[:12]}, whose manifest is gone"
        lines = [
            f"Checkpoint {self.evidence.root[:16]} of slot {self.evidence.slot}, author {author}",
            f"Steps {said.from_step} to {said.to_step} on {said.rows.count} rows; "
            f"chain of {len(chain.links)} checkpoints followed back {back}",
        ]
        lines += [
            f"Environment: {name} is {here} here, {theirs} there" for name, (here, theirs) in self.differs.items()
        ]
        lines += [_file_line(file) for file in self.comparison.files]
        lines.append(_conclusion(self.verdict, self.comparison, self.differs, MARGIN))
        if self.kept is not None:
            lines.append(f"The replayed checkpoints are in {self.kept}")
        return "\n".join(lines)


def _file_dict(file: FileDistance) -> dict[str, Any]:
    worst = file.worst
    return {
        "name": file.name,
        "identical": file.identical,
        "distance": _number(file.relative),
        "noise": _number(file.relative_noise),
        "published_move": _number(file.published_move / file.move if file.move else 0.0),
        "worst": None if worst is None else {"part": worst[1], "times_noise": _number(worst[0])},
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _file_line(file: FileDistance) -> str:
    if file.identical:
        return f"{file.name:<24} identical, bit for bit"
    line = f"{file.name:<24} {file.relative:.2e} of the way trained apart"
    worst = file.worst
    if worst is None or file.relative_noise is None:
        return line
    return f"{line}; rounding {file.relative_noise:.2e}; worst {worst[0]:.3g} times its rounding ({worst[1]})"


def _conclusion(verdict: str, comparison: Comparison, differs: dict[str, tuple[str, str]], margin: float) -> str:
    if verdict == "identical":
        return "Reproduced: the same steps on the same rows give the published weights, bit for bit."
    if verdict == "explained":
        return f"Reproduced: what differs is within {margin:g} times what rounding explains on other hardware."
    if verdict == "other version":
        here, theirs = differs["package"]
        return (
            f"NOT DECIDED: made by another version of the code, {theirs}; this is {here}, which cannot replay it bit "
            "for bit, and what differs is more than rounding. That says nothing against the author and nothing for "
            "the weights: do not take them for reproduced, audit it with the version that made it"
        )
    if comparison.untrained:
        return "NOT REPRODUCED: the published weights are the parent's; nothing was trained."
    if all(file.explained(margin) for file in comparison.files) and not differs:
        return (
            "NOT REPRODUCED: hardware and versions are the author's, so the bits should be too, and they are not; what "
            "differs is as small as rounding on other hardware"
        )
    return (
        "NOT REPRODUCED: the published weights are not what these steps on these rows give; rounding is no explanation."
    )


# ---- the audit ----------------------------------------------------------------------------------------------------


async def run_audit(shared: Settings, home: Home, invite: Invite, options: AuditOptions) -> AuditFound:
    """Find the checkpoint and its parent, check chain, values and rows, train the steps again, compare.

    Raises:
        Incomplete: nobody holds what is needed.
        Unverified, RecordError, FolderError: chain, values, recipe, seed or rows are not what they should be.
        Usage: the root is not one checkpoint's, or there is no swarm to ask.
        ProcessFailed: the replay ended in error.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=shared.console, disable=shared.as_json) as bars:
        plan_folder, evidence = await _find(home, invite, options, bars)
        plan_folder = replace(plan_folder, brought=options.start_from)
        return await _judge(home, plan_folder, evidence, options, bars)


async def _find(home: Home, invite: Invite, options: AuditOptions, bars: Bars) -> tuple[PlanFolder, Evidence]:
    plan_path = home.swarm(invite.plan_id).plan_path
    here = open_plan_folder(plan_path, plan_id=invite.plan_id) if (plan_path / PLAN_FILE).exists() else None
    announced = announcements_in(options.model, invite.plan_id) if options.model is not None else {}
    by_slot = {entry.slot: entry.root for entry in announced.values()}
    wanted = by_slot.get(options.root, options.root)
    is_slot = wanted == ROUTER or (wanted.isdigit() and len(wanted) < 5)
    if here is not None and (options.offline or not is_slot):
        evidence = await asyncio.to_thread(held_evidence, home, here, wanted, announced)
        if evidence is not None:
            return here, evidence
    if options.offline:
        raise Incomplete(
            f"{home.path} does not hold {wanted[:16]} and its parent whole: without --offline they are fetched"
        )

    def on_progress(what: str) -> Callable[[int, int], None]:
        task = bars.add_task(f"fetching {what}", total=None)
        return lambda done, total: bars.update(task, completed=done, total=total)

    async with observing(home, invite) as connected:
        return connected.plan_folder, await fetched_evidence(connected.node, connected.plan_folder, wanted, on_progress)


async def _judge(
    home: Home, plan_folder: PlanFolder, evidence: Evidence, options: AuditOptions, bars: Bars
) -> AuditFound:
    from paris_swarm.expert.audit import (
        REFERENCES,
        compare,
        environment_differences,
        same_bits_expected,
        write_start,
    )
    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.expert.provenance import machine

    said = evidence.provenance
    await asyncio.to_thread(check_finite, evidence)
    task = await asyncio.to_thread(checked_task, plan_folder, PreparedData.open(options.data), evidence)
    device = device_for(said.environment, options.device)
    threads = threads_for(said.environment, options.threads)
    check_memory(plan_folder, [evidence.slot], device, said.environment.micro_batch, 1)
    folder = replay_folder(
        home.swarm(plan_folder.plan_id).path / "audits",
        evidence.root,
        said,
        evidence.manifest.parent,
        device,
        threads,
        machine(task, device),
    )
    place = ReplayPlace(
        plan_folder,
        options.data,
        evidence.slot,
        folder,
        folder / "start",
        evidence.manifest.step,
        device,
        threads,
        said.environment.micro_batch,
        said.environment.compiled,
        said.environment.deterministic,
    )
    if not prepared_start(place.start):
        await asyncio.to_thread(write_start, place.start, task, said.from_step, evidence.parent_folder)

    async def train_again(precision: str, what: str) -> Replayed:
        bar = bars.add_task(what, total=said.to_step - said.from_step)

        def show(report: TrainProgress) -> None:
            bars.update(bar, completed=report.step - said.from_step)

        return await replay(place, precision, show)

    mine = await train_again(said.environment.precision, f"training {said.from_step} to {said.to_step} again")
    assert mine.environment is not None, "a replay in the author's precision says where it ran"
    differs = environment_differences(mine.environment, said.environment)
    found = await asyncio.to_thread(compare, place.start, evidence.folder, mine.folder, None, names=evidence.files)
    if not found.identical:
        exact = await train_again(REFERENCES[said.environment.precision], "the same with less rounding")
        found = await asyncio.to_thread(
            compare, place.start, evidence.folder, mine.folder, exact.folder, names=evidence.files
        )
    verdict = found.verdict(
        must_be_identical=same_bits_expected(mine.environment, said.environment), other_version="package" in differs
    )
    keep = options.keep_work
    if not keep:
        await asyncio.to_thread(forget, place)
    return AuditFound(evidence, found, verdict, differs, folder if keep else None)
