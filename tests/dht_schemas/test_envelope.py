"""The envelope: one spelling, one signer, one kind; any changed bit is refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas import (
    BadSignature,
    Identity,
    MalformedRecord,
    RecordError,
    RecordTooLarge,
    WrongKind,
    blake3_hex,
    payload_type,
    seal,
    unseal,
)

CLAIM = payload_type("claim")
IDENTITY = Identity(b"k" * 32)
OTHER = Identity(b"x" * 32)


@given(st.binary(max_size=300))
def test_round_trip(payload: bytes) -> None:
    data = seal(IDENTITY, CLAIM, payload)
    sealed = unseal(data, CLAIM, max_bytes=4096)
    assert (sealed.signer, sealed.payload, sealed.payload_type) == (IDENTITY.peer_id, payload, CLAIM)
    assert sealed.digest == blake3_hex(payload)
    assert sealed.envelope == data


@given(st.binary(max_size=60), st.data())
def test_any_changed_bit_is_refused(payload: bytes, data: st.DataObject) -> None:
    envelope = bytearray(seal(IDENTITY, CLAIM, payload))
    bit = data.draw(st.integers(0, len(envelope) * 8 - 1))
    envelope[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RecordError):
        unseal(bytes(envelope), CLAIM, max_bytes=4096)


@given(st.binary(max_size=60), st.data())
def test_cut_or_lengthened_is_refused(payload: bytes, data: st.DataObject) -> None:
    envelope = seal(IDENTITY, CLAIM, payload)
    cut = data.draw(st.integers(0, len(envelope) - 1))
    tail = data.draw(st.binary(min_size=1, max_size=5))
    for broken in (envelope[:cut], envelope + tail, tail + envelope):
        with pytest.raises(RecordError):
            unseal(broken, CLAIM, max_bytes=4096)


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RecordError):
        unseal(data, CLAIM, max_bytes=300)


def test_another_kind_is_refused() -> None:
    data = seal(IDENTITY, payload_type("holding"), b"{}")
    with pytest.raises(WrongKind):
        unseal(data, CLAIM, max_bytes=4096)
    assert unseal(data, (CLAIM, payload_type("holding")), max_bytes=4096).payload_type == payload_type("holding")
    relabelled = data.replace(b"holding", b"claim")
    with pytest.raises(BadSignature):
        unseal(relabelled, CLAIM, max_bytes=4096)


def test_forged_signer() -> None:
    data = seal(IDENTITY, CLAIM, b"{}").replace(IDENTITY.peer_id.encode(), OTHER.peer_id.encode())
    with pytest.raises(BadSignature):
        unseal(data, CLAIM, max_bytes=4096)


def test_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(RecordTooLarge):
        unseal(b"[" * 5000, CLAIM, max_bytes=4096)
    exact = seal(IDENTITY, CLAIM, b"")
    unseal(exact, CLAIM, max_bytes=len(exact))
    with pytest.raises(RecordTooLarge):
        unseal(exact, CLAIM, max_bytes=len(exact) - 1)


def _respelled(change: str) -> bytes:
    value: dict[str, Any] = json.loads(seal(IDENTITY, CLAIM, b"{ab}"))
    signature = value["signatures"][0]
    match change:
        case "spaces":
            return json.dumps(value).encode()
        case "key order":
            return json.dumps(dict(reversed(value.items())), separators=(",", ":")).encode()
        case "escape":
            return json.dumps(value, separators=(",", ":")).replace("payloadType", "p\\u0061yloadType").encode()
        case "extra key":
            value["note"] = 1
        case "extra key in signature":
            signature["note"] = 1
        case "two signatures":
            value["signatures"] = [signature, signature]
        case "no signature":
            value["signatures"] = []
        case "base64 without padding":
            signature["sig"] = signature["sig"].rstrip("=")
        case "base64 trailing bits":
            signature["sig"] = signature["sig"][:-3] + chr(ord(signature["sig"][-3]) + 1) + "=="
        case "url-safe base64":
            raw = seal(IDENTITY, CLAIM, b"\xff\xfe\xfd")
            value = json.loads(raw)
            value["payload"] = base64.urlsafe_b64encode(b"\xff\xfe\xfd").decode()
        case "base64 line break":
            value["payload"] = value["payload"][:4] + "\n" + value["payload"][4:]
        case "payload is a number":
            value["payload"] = 1
        case "signatures is an object":
            value["signatures"] = signature
        case "not ascii":
            value["payload"] = "é" + value["payload"]
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "change",
    [
        "spaces",
        "key order",
        "escape",
        "extra key",
        "extra key in signature",
        "two signatures",
        "no signature",
        "base64 without padding",
        "base64 trailing bits",
        "url-safe base64",
        "base64 line break",
        "payload is a number",
        "signatures is an object",
        "not ascii",
    ],
)
def test_a_second_spelling_of_the_same_signature_is_refused(change: str) -> None:
    with pytest.raises(MalformedRecord) as caught:
        unseal(_respelled(change), CLAIM, max_bytes=4096)
    assert caught.value.rule == "R-ENV-3"


def test_unknown_kinds_are_the_callers_error() -> None:
    with pytest.raises(ValueError, match="record kind"):
        payload_type("gradient")
