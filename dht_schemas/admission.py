"""Who may take part. An open plan admits every key; a plan for invited peers admits keys that bear a token signed by
the organiser.

An observer (`status`, `assemble`) reads with a throw-away key, so that it can run beside the process that speaks as its
peer; where admission is asked for, that peer lends it its own by a short **delegation**. Beside all that, the owner of
a node may keep lists of peers that it alone allows or blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.envelope import payload_type, seal, unseal
from paris_swarm.dht_schemas.errors import Blocked, NotAdmitted, RecordError, quoted
from paris_swarm.dht_schemas.fields import ROUTER, Digest, Model, PeerId, UnixTime, is_peer_id, read_model
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.plan import Plan
from paris_swarm.dht_schemas.records import CLOCK_TOLERANCE_S, MAX_LEASE_S, MAX_RECORD, SignedRecord


class Admission(Model):
    """The organiser admits this peer to this plan."""

    plan: Digest
    peer: PeerId


def seal_token(identity: Identity, plan_id: str, peer_id: str) -> str:
    """The organiser's token for a peer, as the text that rides in the peer's records. Raises ValueError for a plan id
    or peer id that is none.
    """
    admission = Admission(plan=plan_id, peer=peer_id)
    return seal(identity, payload_type("admission"), canonical_json(admission.model_dump())).decode("utf-8")


def read_token(token: str) -> tuple[str, Admission]:
    """Signer and content of a token. Raises RecordError when it is none."""
    try:
        data = token.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotAdmitted("the admission token is not text") from error
    sealed = unseal(data, payload_type("admission"), max_bytes=MAX_RECORD)
    return sealed.signer, read_model(Admission, sealed.payload)


def check_token(plan: Plan, plan_id: str, peer_id: str, token: str | None) -> None:
    """Check that ``plan`` admits ``peer_id``. The organiser needs no token. Raises NotAdmitted (R-ADM-1)."""
    if plan.admission == "open" or peer_id == plan.organiser:
        return
    if token is None:
        raise NotAdmitted(f"{peer_id} bears no admission token")
    try:
        signer, admission = read_token(token)
    except RecordError as error:
        raise NotAdmitted(f"the admission token of {peer_id} cannot be read: {error}") from error
    if signer != plan.organiser:
        raise NotAdmitted(
            f"the admission token of {peer_id} is signed by {signer}, not by the organiser {plan.organiser}"
        )
    if (admission.plan, admission.peer) != (plan_id, peer_id):
        raise NotAdmitted(f"the admission token was made for {admission.peer} in plan {admission.plan}")


def check_member(plan: Plan, plan_id: str, record: SignedRecord, *, trains: bool) -> None:
    """Check the token that rides in ``record``, and, where its signer ``trains`` the slot, that the router's slot is
    theirs to train.

    Raises NotAdmitted (R-ADM-1, R-ADM-2).
    """
    check_token(plan, plan_id, record.signer, record.token)
    if trains and record.slot == ROUTER and plan.router_slot not in ("open", record.signer):
        raise NotAdmitted(
            f"the plan keeps the router's slot for {plan.router_slot}, not {record.signer}", rule="R-ADM-2"
        )


# ---- observers ---------------------------------------------------------------------------------------------------


class Delegation(Model):
    """``peer`` lets the key ``observer`` read in its name until then."""

    plan: Digest
    peer: PeerId
    observer: PeerId
    until: UnixTime


def seal_delegation(identity: Identity, plan_id: str, observer: str, until: float) -> str:
    """A peer's delegation, as text. Raises ValueError for values that a delegation cannot have."""
    delegation = Delegation(plan=plan_id, peer=identity.peer_id, observer=observer, until=until)
    return seal(identity, payload_type("delegation"), canonical_json(delegation.model_dump())).decode("utf-8")


def check_delegation(plan_id: str, observer: str, delegation: str, now: float) -> str:
    """The peer in whose name ``observer`` reads. ``now`` in Unix seconds. Raises NotAdmitted (R-ADM-3)."""
    return open_delegation(plan_id, observer, delegation, now).peer


def open_delegation(plan_id: str, observer: str, delegation: str, now: float) -> Delegation:
    """The same, with how long it lasts. Raises NotAdmitted (R-ADM-3)."""
    try:
        sealed = unseal(delegation.encode("utf-8"), payload_type("delegation"), max_bytes=MAX_RECORD)
        said = read_model(Delegation, sealed.payload)
    except (RecordError, UnicodeEncodeError) as error:
        raise NotAdmitted(f"the delegation of {observer} cannot be read: {error}", rule="R-ADM-3") from error
    if said.peer != sealed.signer or (said.plan, said.observer) != (plan_id, observer):
        raise NotAdmitted(
            f"a delegation of {said.peer} for {said.observer} in plan {said.plan}, signed by {sealed.signer}, "
            f"used by {observer}",
            rule="R-ADM-3",
        )
    left = said.until - now
    if not math.isfinite(left) or not 0 < left <= MAX_LEASE_S + CLOCK_TOLERANCE_S:
        raise NotAdmitted(f"the delegation of {observer} ends {left:.0f} s from now", rule="R-ADM-3")
    return said


# ---- a node's own lists --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeerLists:
    """Whom the owner of a node allows and blocks. ``allowed`` None: everybody who is not blocked."""

    allowed: frozenset[str] | None = None
    blocked: frozenset[str] = frozenset()
    always: frozenset[str] = frozenset()
    """Never refused: the organiser, and the node itself."""

    def check(self, peer_id: str) -> None:
        """Raises Blocked (R-LIST-1) for a peer that the owner does not want."""
        if peer_id in self.always:
            return
        if peer_id in self.blocked:
            raise Blocked(f"{peer_id} is on the block list")
        if self.allowed is not None and peer_id not in self.allowed:
            raise Blocked(f"{peer_id} is not on the allow list")


def parse_peer_list(text: str) -> frozenset[str]:
    """The peer ids of a list: one a line, `#` begins a comment. Raises ValueError naming the line that is none."""
    found: set[str] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        word = line.partition("#")[0].strip()
        if not word:
            continue
        if not is_peer_id(word):
            raise ValueError(f"line {number}: {quoted(word)} is not a peer id (12D3KooW...)")
        found.add(word)
    return frozenset(found)
