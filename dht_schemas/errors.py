"""Every way in which a peer's data can be refused.

    RecordError
    ├── RecordTooLarge      more bytes than the protocol allows
    ├── MalformedRecord     not the JSON, the shape or the values the protocol knows
    │   ├── BadManifest     a file manifest that breaks a rule
    │   │   └── BrokenChain a checkpoint that cannot follow from the parent it names
    │   └── BadHeader       a safetensors header that is not the plan's table
    ├── WrongKind           signed, but as a record of another kind
    ├── BadSignature        the signature does not belong to the signer and these bytes
    ├── WrongSigner         the record speaks for somebody else than its signer
    ├── WrongPlan           a record of another swarm
    ├── WrongSlot           a slot that the plan does not have, or another record's slot
    ├── WrongKey            stored under a DHT key or subkey that is not its own
    ├── LeaseExpired        the lease has already ended
    ├── LeaseTooLong        the lease ends too far in the future, or never
    ├── LeaseMismatch       the DHT's expiration is not the signed end of the lease
    ├── NotAdmitted         the plan does not admit this key
    ├── Revoked             the organiser has revoked this key
    ├── Blocked             this node's own lists refuse this key
    ├── CheckpointTooLarge  more bytes than the plan allows for a checkpoint
    ├── Rollback            an older record than one already seen
    ├── Equivocation        two different records under one sequence number
    ├── NotAProof           two records that were said to prove equivocation and do not
    ├── DigestMismatch      the bytes are not the ones that the digest names
    ├── NotFinite           weights, or a loss, that are not finite numbers
    └── ProbeFailed         the probe loss differs from the announced one, or misses the bar
    InviteError(ValueError) the invite somebody pasted cannot be read

Wrong arguments of the caller are ``ValueError``; a peer's bytes raise a ``RecordError`` and nothing else. The rule
numbers are those of SPEC.md beside this file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class RecordError(Exception):
    """The record was refused."""

    rule: str = "R-0"

    def __init__(self, detail: str, *, rule: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        if rule is not None:
            self.rule = rule

    def __str__(self) -> str:
        sentence = " ".join((type(self).__doc__ or "").split())
        return f"{sentence} [{self.rule}: {self.detail}]"

    def __reduce__(self) -> tuple[Any, ...]:
        # Keeps ``rule`` when the error crosses a process boundary.
        return _rebuild, (type(self), self.detail, self.rule)


def _rebuild(kind: type[RecordError], detail: str, rule: str) -> RecordError:
    return kind(detail, rule=rule)


class RecordTooLarge(RecordError):
    """The record has more bytes than the protocol allows; it was refused unread, and its sender should be avoided."""

    rule = "R-ENV-1"


class MalformedRecord(RecordError):
    """The record cannot be read: its bytes, its shape or one of its values break the protocol, so it was ignored."""

    rule = "R-ENV-2"


class BadManifest(MalformedRecord):
    """The file manifest breaks a rule, so none of its files was fetched; use another holder or another checkpoint."""

    rule = "R-MAN-1"


class BrokenChain(BadManifest):
    """The checkpoint cannot follow from the parent it names, so its history is not to be believed; use another one."""

    rule = "R-PROV-3"


class BadHeader(MalformedRecord):
    """The weights file does not hold exactly the tensors of the plan, so it was refused; use another checkpoint."""

    rule = "R-HDR-1"


class WrongKind(RecordError):
    """The record was signed as another kind of record, so it does not count as this one."""

    rule = "R-ENV-4"


class BadSignature(RecordError):
    """The signature does not match the signer and these bytes: the record was changed or forged, so it was refused."""

    rule = "R-ENV-5"


class WrongSigner(RecordError):
    """The record speaks for another peer than the one who signed it, so it was refused."""

    rule = "R-REC-2"


class WrongPlan(RecordError):
    """The record belongs to another plan; check that both sides were given the same invite."""

    rule = "R-REC-3"


class WrongSlot(RecordError):
    """The record names a slot that the plan does not have, or that is not the slot it is used for."""

    rule = "R-REC-4"


class LeaseExpired(RecordError):
    """The lease has ended, so the record no longer counts; if it is fresh, compare the clocks of both machines."""

    rule = "R-REC-5"


class LeaseTooLong(RecordError):
    """The lease ends further in the future than the protocol allows; if it is honest, compare the clocks of both
    machines.
    """

    rule = "R-REC-6"


class CheckpointTooLarge(RecordError):
    """The checkpoint is larger than the plan allows, so it will not be downloaded."""

    rule = "R-REC-8"


class NotAdmitted(RecordError):
    """The plan does not admit this key; ask the organiser for an admission token made for this peer id."""

    rule = "R-ADM-1"


class Revoked(RecordError):
    """The organiser has revoked this key, so nothing it signs counts in this swarm; ask the organiser why."""

    rule = "R-NOT-5"


class Blocked(RecordError):
    """This node's own lists refuse this peer; see allow.txt and block.txt in its home, and --allow and --block."""

    rule = "R-LIST-1"


class WrongKey(RecordError):
    """The record was stored under a DHT key or subkey that is not its own, so it was refused."""

    rule = "R-DHT-3"


class LeaseMismatch(RecordError):
    """The DHT's expiration differs from the end of the lease that was signed, so the record was refused."""

    rule = "R-DHT-5"


class Rollback(RecordError):
    """The record is older than one already seen from the same peer: it is being replayed, so it was ignored."""

    rule = "R-SET-2"


class Equivocation(RecordError):
    """The peer signed two different records under one sequence number, so its records no longer count; one key must
    run in one place.
    """

    rule = "R-SET-3"


class NotAProof(RecordError):
    """Two records were said to prove that their signer equivocated, and do not; whoever sent them was not believed."""

    rule = "R-SET-6"


class DigestMismatch(RecordError):
    """The bytes are not the ones that the digest names: they were changed on the way or on disk; fetch them from
    another holder.
    """

    rule = "R-DIG-1"


class NotFinite(RecordError):
    """The checkpoint holds values that are not finite numbers, so it was refused; use another checkpoint."""

    rule = "R-VAL-1"


class ProbeFailed(RecordError):
    """The checkpoint does not do on the plan's probe set what its author announced or what the plan asks, so it was
    refused.
    """

    rule = "R-VAL-2"


class InviteError(ValueError):
    """The invite cannot be read; copy it whole, in the form paris:<plan id>?peer=<multiaddr>."""

    def __str__(self) -> str:
        return f"{' '.join((type(self).__doc__ or '').split())} [{super().__str__()}]"


def quoted(value: object, limit: int = 60) -> str:
    """A hostile value made fit for an error message: printable ASCII, at most ``limit`` characters."""
    if isinstance(value, str | bytes):
        value = value[: limit + 1]
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def described(problems: Iterable[Any], limit: int = 3) -> str:
    """The first ``limit`` entries of pydantic's ``ValidationError.errors()`` as one line, hostile names quoted."""
    lines: list[str] = []
    for count, problem in enumerate(problems):
        if count == limit:
            lines.append("and more")
            break
        where = ".".join(
            part
            if isinstance(part, str) and part.isascii() and part.isidentifier() and len(part) < 40
            else quoted(part, 40)
            for part in problem["loc"]
        )
        lines.append(f"{where or 'record'}: {problem['msg']}")
    return "; ".join(lines)
