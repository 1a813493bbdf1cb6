"""What may lie in the DHT, and where: the pure rules that the record validator of every node applies.

hivemind stores what it is given unless a validator refuses it, so these refuse everything that is not a signed claim
or holding of a known plan, under its own key, in its signer's subkey, with the expiration that was signed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

from paris_swarm.dht_schemas.admission import check_member
from paris_swarm.dht_schemas.canonical import MAX_INT
from paris_swarm.dht_schemas.envelope import payload_type, unseal
from paris_swarm.dht_schemas.errors import (
    CheckpointTooLarge,
    LeaseExpired,
    LeaseMismatch,
    LeaseTooLong,
    MalformedRecord,
    WrongKey,
    WrongPlan,
    WrongSigner,
    WrongSlot,
    quoted,
)
from paris_swarm.dht_schemas.plan import Plan
from paris_swarm.dht_schemas.records import (
    CLOCK_TOLERANCE_S,
    MAX_LEASE_S,
    MAX_RECORD,
    Announcement,
    Claim,
    Holding,
    Opened,
    SignedRecord,
)

_CLAIM = payload_type(Claim.KIND)
_HOLDING = payload_type(Holding.KIND)


def claim_key(plan_id: str, slot: str) -> str:
    """The DHT key under which a slot's claims lie, one subkey a peer."""
    return f"paris/{plan_id}/claim/{slot}"


def checkpoint_key(plan_id: str, slot: str) -> str:
    """The DHT key under which a slot's holdings lie, one subkey a holder."""
    return f"paris/{plan_id}/ckpt/{slot}"


def dht_id(key: str) -> bytes:
    """The 20 bytes by which hivemind knows ``key``: SHA-1 of its msgpack encoding (R-DHT-6). SHA-1 only
    places a record here; it protects nothing.
    """
    text = key.encode("utf-8")
    if len(text) < 32:
        head = bytes([0xA0 | len(text)])
    elif len(text) < 1 << 8:
        head = b"\xd9" + len(text).to_bytes(1, "big")
    elif len(text) < 1 << 16:
        head = b"\xda" + len(text).to_bytes(2, "big")
    else:
        raise ValueError(f"a DHT key of {len(text)} bytes is longer than any key of this protocol")
    return hashlib.sha1(head + text, usedforsecurity=False).digest()


def check_store(
    plans: Mapping[str, Plan],
    *,
    dht_id: bytes,
    subkey: str | None,
    value: object,
    expiration: float,
    now: float,
    check_signer: Callable[[str], None] = lambda _peer_id: None,
) -> Claim | Holding:
    """Decide whether a node may store ``value`` (the envelope's bytes) under ``dht_id`` and ``subkey`` until
    ``expiration``.

    ``plans`` maps plan ids to the plans this node takes part in; ``now`` is in Unix seconds. ``check_signer`` raises
    for a peer whose records are refused whatever they say: revoked, proven to equivocate, or blocked here (R-DHT-7).
    Cheap checks come first. Returns the record; raises a RecordError for everything else.
    """
    if subkey is None:
        raise WrongKey("a plain value under a key that holds a dictionary", rule="R-DHT-2")
    if not isinstance(subkey, str):
        raise WrongKey(f"a subkey of type {type(subkey).__name__} where a peer id belongs", rule="R-DHT-2")
    if not isinstance(value, bytes):
        raise MalformedRecord(
            f"a value of type {type(value).__name__} where an envelope's bytes belong", rule="R-DHT-1"
        )
    check_lease(expiration, now)
    check_signer(subkey)
    sealed = unseal(value, (_CLAIM, _HOLDING), max_bytes=MAX_RECORD)
    if subkey != sealed.signer:
        raise WrongSigner(f"subkey {quoted(subkey)} holds a record signed by {sealed.signer}", rule="R-DHT-4")
    record = Claim.of_sealed(sealed).record if sealed.payload_type == _CLAIM else Holding.of_sealed(sealed).record
    plan = plans.get(record.plan)
    if plan is None:
        raise WrongPlan(f"this node does not take part in plan {record.plan}")
    if record.until != expiration:
        raise LeaseMismatch(f"signed until {record.until!r}, stored until {expiration!r}")
    key = claim_key(record.plan, record.slot) if isinstance(record, Claim) else checkpoint_key(record.plan, record.slot)
    if dht_id != _place(key):
        raise WrongKey(f"a {record.KIND} of slot {record.slot} belongs under {key}", rule="R-DHT-3")
    if isinstance(record, Claim):
        check_claim(plan, record.plan, record, now)
    else:
        check_signer(check_holding(plan, record.plan, record, now).record.author)
    return record


_place = dht_id  # check_store has an argument of the same name


def check_lease(until: float, now: float) -> None:
    """Raises LeaseTooLong when a lease is not finite or ends more than 900 s (and 5 s for clocks) after ``now``,
    LeaseExpired when it has ended.
    """
    if isinstance(until, bool) or not isinstance(until, int | float):
        raise MalformedRecord(f"an expiration of type {type(until).__name__}", rule="R-DHT-1")
    if isinstance(until, float) and not math.isfinite(until):
        raise LeaseTooLong(f"a lease until {until}")
    if not -MAX_INT <= until <= MAX_INT:  # Python's integers have no end: one that no float holds fails when printed
        raise LeaseTooLong("a lease that ends outside of all time")
    if until > now + MAX_LEASE_S + CLOCK_TOLERANCE_S:
        raise LeaseTooLong(f"a lease until {until - now:.0f} s from now, at most {MAX_LEASE_S} s are allowed")
    if until <= now:
        raise LeaseExpired(f"the lease ended {now - until:.0f} s ago")


def check_claim(plan: Plan, plan_id: str, claim: Claim, now: float) -> None:
    """Check a claim against its plan: plan, slot, lease, admission. Raises WrongPlan, WrongSlot, LeaseTooLong,
    LeaseExpired, NotAdmitted.
    """
    _check_place(plan, plan_id, claim)
    check_lease(claim.until, now)
    check_member(plan, plan_id, claim, trains=True)


def check_announcement(plan: Plan, plan_id: str, announcement: Announcement) -> None:
    """Check an announcement against its plan: plan, slot, admission, size. Raises WrongPlan, WrongSlot, NotAdmitted,
    CheckpointTooLarge.
    """
    _check_place(plan, plan_id, announcement)
    check_member(plan, plan_id, announcement, trains=True)
    if announcement.bytes > plan.policy.checkpoint_cap_bytes:
        raise CheckpointTooLarge(
            f"{announcement.bytes} bytes announced, the plan allows {plan.policy.checkpoint_cap_bytes}"
        )


def check_holding(plan: Plan, plan_id: str, holding: Holding, now: float) -> Opened[Announcement]:
    """Check a holding and the announcement inside it, whose author may be another peer. Returns the announcement;
    raises any RecordError.
    """
    _check_place(plan, plan_id, holding)
    check_lease(holding.until, now)
    check_member(plan, plan_id, holding, trains=False)
    opened = holding.open_announcement()
    if opened.record.slot != holding.slot:
        raise WrongSlot(
            f"a holding of slot {holding.slot} carries an announcement of slot {opened.record.slot}", rule="R-REC-7"
        )
    check_announcement(plan, plan_id, opened.record)
    return opened


def _check_place(plan: Plan, plan_id: str, record: SignedRecord) -> None:
    if record.plan != plan_id:
        raise WrongPlan(f"a {record.KIND} of plan {record.plan}, not {plan_id}")
    if not plan.has_slot(record.slot):
        raise WrongSlot(f"the plan has no slot {record.slot}")
