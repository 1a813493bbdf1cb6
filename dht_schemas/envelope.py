"""The signed envelope around every record: DSSE (github.com/secure-systems-lab/dsse, protocol v1) with one Ed25519
signature.

An envelope is the canonical JSON ``{"payload":<base64>,"payloadType":<type>,"signatures":[{"keyid":<peer
id>,"sig":<base64>}]}``. The signature covers ``PAE(type, payload)``, so a record of one kind never passes as another.
What is hashed and verified are the bytes received. Stricter than DSSE: exactly this spelling is accepted, so that
nobody without the key can make a second envelope of the same record.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection
from dataclasses import dataclass

from paris_swarm.dht_schemas.canonical import canonical_json, parse_json
from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.errors import MalformedRecord, RecordTooLarge, WrongKind, quoted
from paris_swarm.dht_schemas.identity import SIGNING_DOMAIN, Identity, verify

KINDS = ("plan", "claim", "checkpoint", "holding", "lock", "admission", "notice", "delegation")


def payload_type(kind: str) -> str:
    """The DSSE payload type of a record kind. Raises ValueError for a kind that is none of ``KINDS``."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not a record kind: {', '.join(KINDS)}")
    return f"application/vnd.paris-swarm.{kind}.v1+json"


@dataclass(frozen=True, slots=True)
class Sealed:
    """A verified envelope."""

    signer: str
    """Peer id whose key signed."""
    payload: bytes
    """The signed bytes, as received."""
    digest: str
    """BLAKE3 of ``payload``: two envelopes of one signer, kind and payload say the same."""
    payload_type: str
    envelope: bytes
    """The whole envelope, as received: forward this, never a re-serialised one."""


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: the bytes that are signed."""
    kind = payload_type.encode("utf-8")
    return SIGNING_DOMAIN + b"%d %b %d %b" % (len(kind), kind, len(payload), payload)


def seal(identity: Identity, payload_type: str, payload: bytes) -> bytes:
    """Sign ``payload`` and return the envelope's bytes."""
    return _envelope(payload_type, payload, identity.peer_id, identity.sign(pae(payload_type, payload)))


def unseal(data: bytes, payload_type: str | Collection[str], *, max_bytes: int) -> Sealed:
    """Verify an envelope of ``payload_type`` (or of one of several).

    Raises RecordTooLarge beyond ``max_bytes``, MalformedRecord, WrongKind, BadSignature.
    """
    if len(data) > max_bytes:
        raise RecordTooLarge(f"{len(data)} bytes, at most {max_bytes} are allowed", rule="R-ENV-1")
    kind, payload, signer, signature = _parse(data)
    wanted = (payload_type,) if isinstance(payload_type, str) else tuple(payload_type)
    if kind not in wanted:
        raise WrongKind(f"payload type {quoted(kind)} where {' or '.join(wanted)} belongs")
    verify(signer, pae(kind, payload), signature)
    return Sealed(signer, payload, blake3_hex(payload), kind, bytes(data))


def _envelope(payload_type: str, payload: bytes, signer: str, signature: bytes) -> bytes:
    return canonical_json(
        {
            "payload": base64.b64encode(payload).decode("ascii"),
            "payloadType": payload_type,
            "signatures": [{"keyid": signer, "sig": base64.b64encode(signature).decode("ascii")}],
        }
    )


def _parse(data: bytes) -> tuple[str, bytes, str, bytes]:
    """Payload type, payload, signer, signature of an envelope in its one spelling; nothing is verified yet."""
    match parse_json(data):
        case {
            "payload": str(payload),
            "payloadType": str(kind),
            "signatures": [{"keyid": str(signer), "sig": str(sig)}],
        }:
            pass
        case _:
            raise MalformedRecord("not a DSSE envelope with exactly one signature", rule="R-ENV-3")
    try:
        body, signature = (base64.b64decode(text, validate=True) for text in (payload, sig))
    except (binascii.Error, ValueError) as error:
        raise MalformedRecord("payload or signature is not base64", rule="R-ENV-3") from error
    if _envelope(kind, body, signer, signature) != data:
        raise MalformedRecord("the envelope is not written in its one canonical form", rule="R-ENV-3")
    return kind, body, signer, signature
