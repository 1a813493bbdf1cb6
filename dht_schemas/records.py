"""What travels over the DHT: claims, and holders' leases on checkpoint announcements.

A **claim** says: I train this slot until then. An **announcement** is an author's timeless fact: I made this
checkpoint. A **holding** says: until then, I serve the checkpoint of this announcement. Each is signed by the peer it
names; its envelope has at most 4096 bytes.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Generic, NamedTuple, Self, TypeVar

from pydantic import Field

from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.envelope import Sealed, payload_type, seal, unseal
from paris_swarm.dht_schemas.errors import WrongSigner
from paris_swarm.dht_schemas.fields import (
    Count,
    Digest,
    Finite,
    Model,
    PeerId,
    Slot,
    Token,
    UnixTime,
    printable,
    read_model,
)
from paris_swarm.dht_schemas.identity import Identity

MAX_RECORD = 4096
"""Bytes of an envelope on the DHT."""
MAX_LEASE_S = 900
"""Seconds that a lease may last from now."""
CLOCK_TOLERANCE_S = 5
"""Seconds by which two honest clocks may differ."""

R = TypeVar("R")


class Opened(NamedTuple, Generic[R]):
    """A verified record beside the envelope it came in: ``record, sealed = Claim.open(data)``."""

    record: R
    sealed: Sealed


class SignedRecord(Model):
    """A record that the peer named in its field ``SIGNER`` must sign."""

    KIND: ClassVar[str]
    SIGNER: ClassVar[str]

    plan: Digest
    slot: Slot
    seq: Count
    """Sequence number: grows with every record that the signer makes of this kind and slot."""
    token: Token | None = None
    """Admission token (an envelope of kind "admission") where the plan is for invited peers only."""

    @property
    def signer(self) -> str:
        """Peer id of the one who signs this record."""
        return str(getattr(self, self.SIGNER))

    def seal(self, identity: Identity) -> bytes:
        """Sign and return the envelope. Raises ValueError when ``identity`` is not the named signer or the envelope
        exceeds MAX_RECORD.
        """
        if identity.peer_id != self.signer:
            raise ValueError(f"this {self.KIND} names {self.signer} and cannot be signed by {identity.peer_id}")
        data = seal(identity, payload_type(self.KIND), canonical_json(self.model_dump()))
        if len(data) > MAX_RECORD:
            raise ValueError(f"this {self.KIND} would have {len(data)} bytes, at most {MAX_RECORD} are allowed")
        return data

    @classmethod
    def open(cls, data: bytes) -> Opened[Self]:
        """Verify an envelope and read the record. Raises RecordTooLarge, MalformedRecord, WrongKind, BadSignature,
        WrongSigner.
        """
        return cls.of_sealed(unseal(data, payload_type(cls.KIND), max_bytes=MAX_RECORD))

    @classmethod
    def of_sealed(cls, sealed: Sealed) -> Opened[Self]:
        """Read the record of an envelope already verified. Raises MalformedRecord, WrongSigner."""
        record = read_model(cls, sealed.payload)
        if record.signer != sealed.signer:
            raise WrongSigner(f"the {cls.KIND} names {record.signer}, signed by {sealed.signer}")
        return Opened(record, sealed)


class Progress(Model):
    """How far a peer's training is."""

    step: Count
    steps: Count
    """Steps that the recipe asks for."""
    loss: Finite | None
    """Recent mean training loss; None before the first step."""
    images_per_s: Annotated[Finite, Field(ge=0)]
    device: Annotated[str, *printable(32)]
    """Such as "cpu" or "cuda"."""


class Claim(SignedRecord):
    """This peer trains this slot until the lease ends."""

    KIND: ClassVar[str] = "claim"
    SIGNER: ClassVar[str] = "peer"

    peer: PeerId
    until: UnixTime
    """Unix seconds at which the lease ends: exactly the DHT record's expiration."""
    released: bool = False
    """A zero lease: the slot was given back. (hivemind deletes nothing, so the record itself lives on until
    ``until``.)
    """
    progress: Progress


class Announcement(SignedRecord):
    """This author made this checkpoint of this slot. Timeless; ordered by ``seq`` among the same author's only."""

    KIND: ClassVar[str] = "checkpoint"
    SIGNER: ClassVar[str] = "author"

    author: PeerId
    step: Count
    """Optimiser steps that the weights have seen, those of earlier authors included."""
    parent: Digest | None
    """Manifest root of the checkpoint it continued from; None when it began from fresh weights."""
    root: Digest
    """Manifest root: BLAKE3 of the manifest's bytes."""
    bytes: Annotated[Count, Field(ge=1)]
    """Sum of the lengths of the manifest's files."""
    probe_loss: Finite
    """Loss on the plan's probe set of this slot; lower is better."""


class Holding(SignedRecord):
    """This holder serves the announced checkpoint until the lease ends. The author is simply the first holder."""

    KIND: ClassVar[str] = "holding"
    SIGNER: ClassVar[str] = "holder"

    holder: PeerId
    until: UnixTime
    """Unix seconds at which the lease ends: exactly the DHT record's expiration."""
    announcement: Annotated[str, Field(max_length=MAX_RECORD)]
    """The author's envelope, verbatim."""

    def open_announcement(self) -> Opened[Announcement]:
        """Verify the author's envelope. Raises as ``Announcement.open`` does."""
        return Announcement.open(self.announcement.encode("utf-8", "surrogatepass"))
