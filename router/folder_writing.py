"""The assembled folder, written: whole or not at all, and verified before it is put in its place."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paris_swarm.dht_schemas.digest import digest_file
from paris_swarm.dht_schemas.files import sync
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.plan import PLAN_FILE, OpenedPlan
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.router.card import model_card
from paris_swarm.router.diffusers_folder import TextEncoderFiles, VAEFiles, diffusers_files
from paris_swarm.router.layout import (
    CARD_FILE,
    CONFIG_FILE,
    PROBE_FILE,
    announcement_path,
    config_path,
    folder_config,
    holding_path,
    manifest_path,
    needed_slots,
    plan_file_path,
    slot_config,
    weights_path,
)
from paris_swarm.router.lock import LOCK_FILE, Deciding, Lock, LockedFile, LockedSlot, seal_lock
from paris_swarm.router.verify import VerifiedFolder, verify_folder


@dataclass(frozen=True)
class SlotSource:
    """A verified checkpoint, ready to be put into a folder.

    announcement and manifest: the bytes as received; weights: the checkpoint's ema.safetensors; holding: the envelope
    of the peer that served it, where it should be kept.
    """

    announcement: bytes
    manifest: bytes
    weights: Path
    holding: bytes | None = None


def write_folder(
    target: str | os.PathLike[str],
    *,
    identity: Identity,
    plan: OpenedPlan,
    plan_folder: Path,
    slots: Sequence[SlotSource],
    created: int,
    plan_files: Sequence[str] | None = None,
    figures: Mapping[str, str] | None = None,
    deciding: Deciding | None = None,
    replace: bool = False,
    text_encoder: TextEncoderFiles | None = None,
    vae: VAEFiles | None = None,
) -> VerifiedFolder:
    """Writes, verifies and puts in place an assembled folder signed by `identity`.

    plan_files: which files of `plan_folder` go with it, all of the plan's when None (the null caption's always does);
    figures: what the model card should say about quality, name -> value; deciding: the rows that decided between
    several checkpoints of a slot, where not the announced losses did; created: Unix seconds; replace: whether an
    assembled folder that is already there gives way (one that is not assembled never does); text_encoder, vae: what
    goes into it so that prompts can be taken and latents become pictures (`encoder_files`).

    Raises:
        ValueError: the target holds something, a slot comes twice, or a plan file is not the plan's.
        RecordError: a source does not verify; nothing is left behind.
        OSError: no space or no permission; nothing is left behind.
    """
    target = Path(os.path.abspath(target))
    check_target(target, replace)
    named = {entry.name for entry in plan.plan.files}
    wanted = sorted(named if plan_files is None else {*plan_files, PROBE_FILE})
    if unknown := sorted({*wanted, PROBE_FILE} - named):
        raise ValueError(f"the plan names no file {unknown[0]}; it has: {', '.join(sorted(named)) or 'none'}")

    locked: dict[str, LockedSlot] = {}
    opened = [(source, Announcement.open(source.announcement).record) for source in slots]
    for _, said in opened:
        if said.slot in locked:
            raise ValueError(f"slot {said.slot} was given twice")
        locked[said.slot] = LockedSlot(
            slot=said.slot, author=said.author, root=said.root, step=said.step, probe_loss=said.probe_loss
        )
    filled = [locked[slot] for slot in plan.plan.slots if slot in locked]
    filled += [slot for name, slot in locked.items() if name not in plan.plan.slots]  # refused by verification, named
    missing = tuple(slot for slot in plan.plan.slots if slot not in locked)

    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.partial-{secrets.token_hex(6)}")
    draft.mkdir()
    try:
        writer = _Writer(draft)
        writer.data(PLAN_FILE, plan.envelope)
        for name in wanted:
            writer.copy(plan_file_path(name), plan_folder / name)
        for source, said in opened:
            writer.data(announcement_path(said.slot), source.announcement)
            writer.data(manifest_path(said.root), source.manifest)
            if source.holding is not None:
                writer.data(holding_path(said.slot), source.holding)
            writer.copy(weights_path(said.slot), source.weights)
            if plan.plan.has_slot(said.slot):
                writer.data(config_path(said.slot), slot_config(plan, locked[said.slot]))
        known = [slot for slot in filled if plan.plan.has_slot(slot.slot)]
        for path, content in diffusers_files(plan, known, plan_folder / PROBE_FILE, text_encoder, vae):
            writer.put(path, content)
        needed = needed_slots(plan, missing)
        writer.data(CONFIG_FILE, folder_config(plan, filled, needed))
        card = model_card(plan, filled, needed, assembler=identity.peer_id, figures=figures or {}, deciding=deciding)
        writer.data(CARD_FILE, card.encode("utf-8"))
        lock = Lock(
            plan=plan.plan_id,
            organiser=plan.plan.organiser,
            assembler=identity.peer_id,
            created=created,
            files=tuple(sorted(writer.files, key=lambda file: file.path)),
            slots=tuple(filled),
            missing=missing,
            deciding=deciding,
        )
        writer.data(LOCK_FILE, seal_lock(identity, lock))
        writer.sync_folders()
        verified = verify_folder(draft, plan_id=plan.plan_id)
        _put_in_place(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return VerifiedFolder(target, verified.lock, verified.digest, verified.plan)


def check_target(target: Path, replace: bool) -> None:
    """Raises ValueError where no folder can be written: `target` holds something, and `replace` does not allow it."""
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise ValueError(f"{target} exists and is not a folder; choose another place")
    if any(target.iterdir()):
        if not (target / LOCK_FILE).is_file():
            raise ValueError(f"{target} holds other things; choose an empty or a new folder")
        if not replace:
            raise ValueError(f"{target} already holds an assembled folder; choose another place, or pass --replace")


def _put_in_place(draft: Path, target: Path) -> None:
    """Renames the draft to its name. A reader sees the old folder, for an instant none, then the new one."""
    old = target.with_name(f".{target.name}.replaced-{secrets.token_hex(6)}")
    had_old = target.exists()
    if had_old:
        target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        if had_old:
            old.rename(target)
        raise
    sync(target.parent)
    if had_old:
        shutil.rmtree(old)


class _Writer:
    """Puts files into the draft, each synced to disk, and keeps their entries for the lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: list[LockedFile] = []

    def data(self, path: str, data: bytes) -> None:
        with open(self._place(path), "xb") as stream:
            stream.write(data)
        self._done(path)

    def put(self, path: str, content: bytes | Path) -> None:
        if isinstance(content, Path):
            self.copy(path, content)
        else:
            self.data(path, content)

    def copy(self, path: str, source: Path) -> None:
        # Copied, never linked: whoever edits the folder must not edit the content store with it.
        place = self._place(path)
        if place.exists():
            raise ValueError(f"{path} was given twice")
        shutil.copyfile(source, place)
        self._done(path)

    def sync_folders(self) -> None:
        for folder in [self._folder, *(path for path in self._folder.rglob("*") if path.is_dir())]:
            sync(folder)

    def _place(self, path: str) -> Path:
        place = self._folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def _done(self, path: str) -> None:
        place = self._folder / path
        place.chmod(0o644)
        sync(place)
        if path == LOCK_FILE:  # it cannot name itself
            return
        self.files.append(LockedFile(path=path, length=place.stat().st_size, blake3=digest_file(place)))
