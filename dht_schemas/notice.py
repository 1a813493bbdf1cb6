"""The organiser's notice: a signed, numbered, cumulative statement about a running swarm. Paused, ended, keys revoked.

It travels in the greeting that opens every stream (greeting.py), never in the DHT. Each notice says everything that
holds, so only the one with the highest number counts: a key that it no longer lists is no longer revoked.

An organiser who signs two different notices under one number contradicts himself. Nobody can tell which was meant, so
both count where they are stricter: whoever either revokes is revoked, and ended outranks paused, paused running. That
rule gives every node the same answer whatever the order they came in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from paris_swarm.dht_schemas.canonical import MAX_INT, canonical_json
from paris_swarm.dht_schemas.envelope import payload_type, seal, unseal
from paris_swarm.dht_schemas.errors import MalformedRecord, WrongPlan, WrongSigner
from paris_swarm.dht_schemas.fields import Digest, Model, PeerId, array, printable, read_model
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.plan import Plan
from paris_swarm.dht_schemas.records import Opened

MAX_NOTICE = 64 * 1024
"""Bytes of a notice's envelope: room for about 800 revoked keys."""
MAX_REVOKED = 1024
MAX_CONFLICTING = 2
"""Notices of one number that are kept: those with the smallest payload digests."""

State = Literal["running", "paused", "ended"]
STATES: tuple[State, ...] = ("running", "paused", "ended")
"""From the mildest to the strictest."""


def _ascending(value: tuple[str, ...]) -> tuple[str, ...]:
    if any(left >= right for left, right in pairwise(value)):
        raise ValueError("must be sorted, each peer once")
    return value


class Notice(Model):
    """What the organiser says about the swarm as a whole, until the next notice."""

    plan: Digest
    number: Annotated[int, Field(ge=1, le=MAX_INT)]
    state: State
    """running: train. paused: stop training, keep serving. ended: nothing will be trained any more."""
    revoked: Annotated[tuple[PeerId, ...], *array(MAX_REVOKED), AfterValidator(_ascending)] = ()
    """Peer ids that no longer count, ascending, each once."""
    message: Annotated[str, *printable(500)] = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """What holds in a swarm now. ``number`` 0: the organiser has said nothing yet."""

    number: int = 0
    state: State = "running"
    revoked: frozenset[str] = frozenset()
    message: str = ""
    contradicted: bool = False
    """The organiser signed two different notices under this number."""


def seal_notice(identity: Identity, notice: Notice) -> bytes:
    """Sign a notice and return the envelope. Raises ValueError when it would exceed MAX_NOTICE."""
    data = seal(identity, payload_type("notice"), canonical_json(notice.model_dump()))
    if len(data) > MAX_NOTICE:
        raise ValueError(f"this notice would have {len(data)} bytes, at most {MAX_NOTICE} are allowed")
    return data


def open_notice(plan: Plan, plan_id: str, data: bytes) -> Opened[Notice]:
    """Verify a notice for ``plan``. Raises RecordTooLarge, MalformedRecord, WrongKind, BadSignature, WrongSigner,
    WrongPlan.
    """
    sealed = unseal(data, payload_type("notice"), max_bytes=MAX_NOTICE)
    if sealed.signer != plan.organiser:
        raise WrongSigner(f"a notice signed by {sealed.signer}, not by the organiser {plan.organiser}", rule="R-NOT-2")
    notice = read_model(Notice, sealed.payload, rule="R-NOT-1")
    if notice.plan != plan_id:
        raise WrongPlan(f"a notice of plan {notice.plan}, not {plan_id}")
    if plan.organiser in notice.revoked:
        raise MalformedRecord("the organiser revokes the organiser", rule="R-NOT-1")
    return Opened(notice, sealed)


def kept_notices(notices: Iterable[Opened[Notice]]) -> tuple[Opened[Notice], ...]:
    """Those that count: of the highest number, each payload once, the MAX_CONFLICTING smallest digests, ascending.

    The order in which notices came makes no difference, so nodes that saw the same ones agree.
    """
    by_digest = {opened.sealed.digest: opened for opened in notices}
    highest = max((opened.record.number for opened in by_digest.values()), default=0)
    ordered = sorted(
        (opened for opened in by_digest.values() if opened.record.number == highest),
        key=lambda opened: opened.sealed.digest,
    )
    return tuple(ordered[:MAX_CONFLICTING])


def standing_of(notices: Sequence[Opened[Notice]]) -> Standing:
    """What the kept notices say together: the strictest state, and everybody whom any of them revokes (R-NOT-4)."""
    if not notices:
        return Standing()
    records = [opened.record for opened in notices]
    return Standing(
        number=records[0].number,
        state=max((record.state for record in records), key=STATES.index),
        revoked=frozenset(peer for record in records for peer in record.revoked),
        message=" / ".join(dict.fromkeys(record.message for record in records if record.message)),
        contradicted=len(records) > 1,
    )
