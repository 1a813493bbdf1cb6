"""The lock of an assembled folder: every file, every checkpoint, signed by whoever assembled it.

lock.json is a DSSE envelope of kind "lock". It names each file by path, length and BLAKE3 digest, and each slot by
author, manifest root, step and probe loss; what is not here is listed as missing; where other rows than the open half
of the probe set decided between checkpoints, it says which and how. Its own digest is the folder's name in pictures'
metadata: the assembly digest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, model_validator

from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.envelope import payload_type, seal, unseal
from paris_swarm.dht_schemas.errors import WrongSigner
from paris_swarm.dht_schemas.fields import Count, Digest, Finite, Model, PeerId, Slot, array, read_model, table
from paris_swarm.dht_schemas.identity import Identity

LOCK_FILE = "lock.json"
MAX_LOCK = 8 * 1024 * 1024
"""Bytes of lock.json."""
MAX_RIVALS = 64
"""Checkpoints of one slot that a lock lists."""

_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*){0,3}")


def _relative_path(value: str) -> str:
    if not _PATH.fullmatch(value) or len(value) > 256 or value == LOCK_FILE:
        raise ValueError("a path is relative, with / between plain names, and never that of the lock itself")
    return value


class LockedFile(Model):
    """One file of the folder."""

    path: Annotated[str, AfterValidator(_relative_path)]
    """Relative to the folder, / between names."""
    length: Count
    blake3: Digest


class LockedSlot(Model):
    """The checkpoint that fills a slot, as its author announced it."""

    slot: Slot
    author: PeerId
    root: Digest
    step: Count
    probe_loss: Finite


class Rival(Model):
    """A verified checkpoint that could have filled a slot, and its loss on the deciding rows."""

    author: PeerId
    root: Digest
    loss: Finite


class Deciding(Model):
    """The rows that decided between the verified checkpoints of a slot, instead of the announced probe losses."""

    rows: Literal["sealed", "own"]
    """The sealed half of the plan's probe set, or the assembler's own rows."""
    digest: Digest
    """Of the sealed half's file, or of the digests of the assembler's rows."""
    measured: Annotated[dict[Slot, Annotated[tuple[Rival, ...], *array(MAX_RIVALS)]], *table(1025)]
    """By slot, best first. A slot is absent where there were no such rows."""

    @model_validator(mode="after")
    def _best_first(self) -> Self:
        for slot, rivals in self.measured.items():
            if not rivals or [rival.loss for rival in rivals] != sorted(rival.loss for rival in rivals):
                raise ValueError(f"the checkpoints measured for slot {slot} must be listed best first")
        return self


class Lock(Model):
    """What an assembled folder is made of."""

    v: Literal[1] = 1
    plan: Digest
    organiser: PeerId
    assembler: PeerId
    created: Count
    """Unix seconds."""
    files: Annotated[tuple[LockedFile, ...], *array(16384)]
    """Every file but lock.json, sorted by path."""
    slots: Annotated[tuple[LockedSlot, ...], *array(1025)]
    missing: Annotated[tuple[Slot, ...], *array(1025)]
    """Slots of the plan without a checkpoint here."""
    deciding: Deciding | None = None
    """None where the announced probe losses decided."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        paths = [file.path for file in self.files]
        if paths != sorted(set(paths)):
            raise ValueError("the files must be sorted by path, each named once")
        slots = [*(slot.slot for slot in self.slots), *self.missing]
        if len(set(slots)) != len(slots):
            raise ValueError("a slot is named twice")
        for slot in self.slots:
            rivals = self.deciding.measured.get(slot.slot) if self.deciding is not None else None
            if rivals is not None and (slot.author, slot.root) != (rivals[0].author, rivals[0].root):
                raise ValueError(f"slot {slot.slot} is not filled by the checkpoint that was best on the deciding rows")
        return self


@dataclass(frozen=True)
class OpenedLock:
    """A verified lock; `digest` is BLAKE3 of lock.json's bytes, the assembly digest."""

    lock: Lock
    digest: str


def seal_lock(identity: Identity, lock: Lock) -> bytes:
    """The bytes of lock.json.

    Raises:
        ValueError: `identity` is not the assembler, or the lock exceeds MAX_LOCK.
    """
    if identity.peer_id != lock.assembler:
        raise ValueError(f"the lock names {lock.assembler} as assembler and cannot be signed by {identity.peer_id}")
    data = seal(identity, payload_type("lock"), canonical_json(lock.model_dump()))
    if len(data) > MAX_LOCK:
        raise ValueError(f"the lock would have {len(data)} bytes, at most {MAX_LOCK} are allowed")
    return data


def open_lock(data: bytes) -> OpenedLock:
    """Verifies the bytes of lock.json.

    Raises:
        RecordTooLarge, MalformedRecord, WrongKind, BadSignature, WrongSigner.
    """
    sealed = unseal(data, payload_type("lock"), max_bytes=MAX_LOCK)
    lock = read_model(Lock, sealed.payload)
    if lock.assembler != sealed.signer:
        raise WrongSigner(f"the lock names {lock.assembler} as assembler, signed by {sealed.signer}")
    return OpenedLock(lock, blake3_hex(data))
