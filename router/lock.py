"""The lock of an assembled folder: every file, every checkpoint, signed by whoever assembled it.

lock.json is a DSSE envelope of kind "lock". It names each file by path, length and BLAKE3 digest, and each slot by
author, manifest root, step and probe loss; what is not here is listed as missing. Its own digest is the folder's name
in pictures' metadata: the assembly digest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.envelope import payload_type, seal, unseal
from paris_swarm.dht_schemas.errors import WrongSigner
from paris_swarm.dht_schemas.fields import Count, Digest, Finite, Model, PeerId, Slot, read_model
from paris_swarm.dht_schemas.identity import Identity

LOCK_FILE = "lock.json"
MAX_LOCK = 8 * 1024 * 1024
"""Bytes of lock.json."""

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


class Lock(Model):
    """What an assembled folder is made of."""

    v: Literal[1] = 1
    plan: Digest
    organiser: PeerId
    assembler: PeerId
    created: Count
    """Unix seconds."""
    files: Annotated[tuple[LockedFile, ...], Field(strict=False, max_length=16384)]
    """Every file but lock.json, sorted by path."""
    slots: Annotated[tuple[LockedSlot, ...], Field(strict=False, max_length=1025)]
    missing: Annotated[tuple[Slot, ...], Field(strict=False, max_length=1025)]
    """Slots of the plan without a checkpoint here."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        paths = [file.path for file in self.files]
        if paths != sorted(set(paths)):
            raise ValueError("the files must be sorted by path, each named once")
        slots = [*(slot.slot for slot in self.slots), *self.missing]
        if len(set(slots)) != len(slots):
            raise ValueError("a slot is named twice")
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
