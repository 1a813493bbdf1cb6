"""Training the steps of an audit again: a trainer process as `join` starts it, from the parent's weights to the step.

A replay is a training job like any other, so it writes checkpoints on its way and an interrupted audit goes on where it
was. Its folder is named by all that decides its bits; what belongs to another audit is never mixed in.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from paris_swarm.cli.exits import ProcessFailed
from paris_swarm.cli.plan_folder import PlanFolder
from paris_swarm.cli.trainer import TrainerProcess, TrainJobFile
from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.files import atomic_write
from paris_swarm.dht_schemas.provenance import Environment, Provenance
from paris_swarm.swarm.trainer import TrainedCheckpoint, TrainFailed, TrainProgress

CHECKPOINT_EVERY_S = 60.0
FACTS = "facts.json"

OnProgress = Callable[[TrainProgress], None]


@dataclass(frozen=True)
class ReplayPlace:
    """Where and with what the steps are trained again. ``folder`` belongs to this audit alone."""

    plan_folder: PlanFolder
    data: Path
    slot: str
    folder: Path
    start: Path
    step: int
    device: str
    threads: int
    micro_batch: int = 0
    compiled: bool = False
    deterministic: bool = False


@dataclass(frozen=True)
class Replayed:
    """The checkpoint that came out, and the environment it was trained in (None for a reference)."""

    folder: Path
    environment: Environment | None


def replay_folder(
    audits: Path, root: str, said: Provenance, parent: str | None, device: str, threads: int, machine: Mapping[str, str]
) -> Path:
    """A folder under ``audits`` named by the checkpoint and by everything that decides what a replay computes, our own
    code and hardware (``machine``) among it: a replay that was cut short is not gone on with after an upgrade.
    """
    decides = {
        "machine": dict(machine),
        "parent": parent,
        "provenance": said.model_dump(),
        "device": device,
        "threads": threads,
    }
    return audits / f"{root[:16]}-{blake3_hex(canonical_json(decides))[:8]}"


def threads_for(said: Environment, wanted: int) -> int:
    """Torch threads of a replay: those asked for, else the author's where this machine has as many cores."""
    return wanted or min(said.threads, os.cpu_count() or 1)


def device_for(said: Environment, wanted: str) -> str:
    """The device asked for; with "auto" the author's where it is here, else the CPU."""
    from paris_swarm.cli.settings import pick_device

    if wanted != "auto":
        return pick_device(wanted)
    try:
        return pick_device(said.device)
    except ValueError:
        return "cpu"


async def replay(place: ReplayPlace, precision: str, on_progress: OnProgress) -> Replayed:
    """Train from ``place.start`` to ``place.step`` in a process of its own, or go on with an earlier attempt.

    Raises:
        ProcessFailed: the process ended before the step was reached; its log is named.
    """
    work = place.folder / precision
    work.mkdir(parents=True, exist_ok=True)
    job = TrainJobFile(
        plan_folder=str(place.plan_folder.path.absolute()),
        plan_id=place.plan_folder.plan_id,
        data=str(place.data.absolute()),
        slot=place.slot,
        work=str(work.absolute()),
        resume=str(place.start.absolute()),
        parent=None,
        device=place.device,
        threads=place.threads,
        checkpoint_every_s=CHECKPOINT_EVERY_S,
        until=place.step,
        precision=precision,
        keep=1,
        micro_batch=place.micro_batch,
        compiled=place.compiled,
        deterministic=place.deterministic,
        start_from=tuple(str(path.absolute()) for path in place.plan_folder.brought),
    )
    trainer = await TrainerProcess.start(job)
    try:
        async for event in trainer.events():
            if isinstance(event, TrainProgress):
                on_progress(event)
            elif isinstance(event, TrainedCheckpoint):
                atomic_write(work / FACTS, json.dumps(dict(event.facts)).encode())
            elif isinstance(event, TrainFailed):
                raise ProcessFailed(event.why)
    finally:
        await trainer.stop()
    found = work / "checkpoints" / f"step-{place.step:08d}"
    if not found.is_dir():
        raise ProcessFailed(f"the replay ended before step {place.step}; its log is {work / 'trainer.log'}")
    facts = json.loads((work / FACTS).read_bytes())
    return Replayed(found, Environment.model_validate(facts["environment"]) if facts else None)


def prepared_start(folder: Path) -> bool:
    """Whether ``folder`` was written whole by an earlier attempt (state.json comes last)."""
    return (folder / "state.json").is_file()


def forget(place: ReplayPlace) -> None:
    """Remove what the replays wrote: two or three checkpoints' worth of disk."""
    shutil.rmtree(place.folder, ignore_errors=True)
