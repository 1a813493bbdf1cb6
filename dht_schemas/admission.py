"""Who may take part. An open plan admits every key; a plan for invited peers admits keys that bear a token signed by
the organiser.
"""

from __future__ import annotations

from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.envelope import payload_type, seal, unseal
from paris_swarm.dht_schemas.errors import NotAdmitted, RecordError
from paris_swarm.dht_schemas.fields import ROUTER, Digest, Model, PeerId, read_model
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.plan import Plan
from paris_swarm.dht_schemas.records import MAX_RECORD, SignedRecord


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


def check_token(plan: Plan, plan_id: str, peer_id: str, token: str | None) -> None:
    """Check that ``plan`` admits ``peer_id``. The organiser needs no token. Raises NotAdmitted (R-ADM-1)."""
    if plan.admission == "open" or peer_id == plan.organiser:
        return
    if token is None:
        raise NotAdmitted(f"{peer_id} bears no admission token")
    try:
        sealed = unseal(token.encode("utf-8"), payload_type("admission"), max_bytes=MAX_RECORD)
        admission = read_model(Admission, sealed.payload)
    except (RecordError, UnicodeEncodeError) as error:
        raise NotAdmitted(f"the admission token of {peer_id} cannot be read: {error}") from error
    if sealed.signer != plan.organiser:
        raise NotAdmitted(
            f"the admission token of {peer_id} is signed by {sealed.signer}, not by the organiser {plan.organiser}"
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
