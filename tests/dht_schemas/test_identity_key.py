"""One key: hivemind reads it, its peer id verifies what it signed, and its signatures pass nowhere else."""

from __future__ import annotations

import contextlib
import copy

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas import BadSignature, Identity, MalformedRecord, public_key_bytes, verify
from paris_swarm.dht_schemas.envelope import pae
from paris_swarm.dht_schemas.identity import SIGNING_DOMAIN, peer_id_of

SEEDS = st.binary(min_size=32, max_size=32)
LIBP2P_DOMAINS = (
    b"libp2p-tls-handshake:",
    b"noise-libp2p-static-key:",
    b"\x12libp2p-peer-record",  # signed envelopes: the domain's length as a varint, then the domain
    b"libp2p-relay-rsvp",
    b"libp2p-pubsub:",
)


@given(SEEDS)
def test_key_file_round_trip(seed: bytes) -> None:
    identity = Identity(seed)
    data = identity.to_protobuf()
    assert len(data) == 68
    assert Identity.from_protobuf(data).peer_id == identity.peer_id
    assert identity.peer_id.startswith("12D3KooW")
    assert len(identity.peer_id) == 52
    assert peer_id_of(public_key_bytes(identity.peer_id)) == identity.peer_id


def test_two_generated_keys_differ() -> None:
    assert Identity.generate().peer_id != Identity.generate().peer_id


def test_hivemind_and_multiaddr_know_the_same_peer_id() -> None:
    from hivemind.p2p import PeerID
    from hivemind.proto import crypto_pb2
    from multiaddr import Multiaddr

    identity = Identity(b"k" * 32)
    private = crypto_pb2.PrivateKey.FromString(identity.to_protobuf())
    assert private.key_type == crypto_pb2.KeyType.Value("Ed25519") == 1
    assert private.data == b"k" * 32 + public_key_bytes(identity.peer_id)
    multihash = b"\x00\x24\x08\x01\x12\x20" + public_key_bytes(identity.peer_id)
    assert PeerID(multihash).to_base58() == identity.peer_id
    assert PeerID.from_base58(identity.peer_id).to_bytes() == multihash
    assert str(Multiaddr(f"/p2p/{identity.peer_id}")) == f"/p2p/{identity.peer_id}"


@pytest.mark.parametrize("damage", ["short", "long", "type", "halves", "empty", "rsa"])
def test_a_damaged_key_file_is_the_callers_error(damage: str) -> None:
    good = Identity(b"k" * 32).to_protobuf()
    data = {
        "short": good[:-1],
        "long": good + b"\x00",
        "type": b"\x08\x00" + good[2:],
        "halves": good[:36] + Identity(b"x" * 32).to_protobuf()[36:],
        "empty": b"",
        "rsa": b"\x08\x00\x12\x80\x02" + b"\x30" * 256,
    }[damage]
    with pytest.raises(ValueError, match="identity file"):
        Identity.from_protobuf(data)


def test_the_secret_is_not_printed_or_pickled() -> None:
    identity = Identity(b"k" * 32)
    assert repr(identity) == f"Identity({identity.peer_id})"
    with pytest.raises(TypeError):
        copy.copy(identity)


@given(SEEDS, st.binary(max_size=50), st.integers(0, 511), st.booleans())
def test_sign_mutate_verify_fails(seed: bytes, message: bytes, position: int, mutate_signature: bool) -> None:
    identity = Identity(seed)
    data = SIGNING_DOMAIN + message
    signature = identity.sign(data)
    verify(identity.peer_id, data, signature)
    target = bytearray(signature if mutate_signature else data)
    target[position // 8 % len(target)] ^= 1 << position % 8
    changed = (data, bytes(target)) if mutate_signature else (bytes(target), signature)
    with pytest.raises(BadSignature):
        verify(identity.peer_id, *changed)
    stranger = Identity(bytes(byte ^ 1 for byte in seed))
    with pytest.raises(BadSignature):
        verify(stranger.peer_id, data, signature)


@pytest.mark.parametrize("signature", [b"", b"\x00" * 64, b"\x01" * 63, b"\x01" * 65])
def test_rubbish_signatures(signature: bytes) -> None:
    with pytest.raises(BadSignature):
        verify(Identity(b"k" * 32).peer_id, b"data", signature)


def test_keys_that_are_no_point_of_the_curve_verify_nothing() -> None:
    for raw in (b"\x02" + b"\x00" * 31, b"\x07" + b"\x00" * 31):
        with pytest.raises(BadSignature):
            verify(peer_id_of(raw), b"data", b"\x02" * 64)


@given(st.text(max_size=60) | st.text(st.sampled_from("12D3KooWabcXYZ0OIl"), min_size=50, max_size=54))
def test_arbitrary_text_is_a_peer_id_or_refused(text: str) -> None:
    with contextlib.suppress(MalformedRecord):
        assert peer_id_of(public_key_bytes(text)) == text


def test_other_spellings_of_a_peer_id_are_refused() -> None:
    peer_id = Identity(b"k" * 32).peer_id
    others = [
        "1" + peer_id,
        peer_id + "1",
        peer_id[:-1],
        peer_id.lower(),
        " " + peer_id[1:],
        "z" * 52,
        "1" * 52,
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "",
    ]
    for other in others:
        with pytest.raises(MalformedRecord) as caught:
            public_key_bytes(other)
        assert caught.value.rule == "R-KEY-1"


def test_the_key_signs_envelopes_only() -> None:
    """R-ENV-6"""
    identity = Identity(b"k" * 32)
    for domain in LIBP2P_DOMAINS:
        with pytest.raises(ValueError, match="DSSE"):
            identity.sign(domain + b"anything")
        assert not domain.startswith(SIGNING_DOMAIN)
        assert not SIGNING_DOMAIN.startswith(domain)
    assert pae("type", b"payload") == b"DSSEv1 4 type 7 payload"


def test_signatures_are_plain_ed25519() -> None:
    data = pae("t", b"p")
    assert Identity(b"k" * 32).sign(data) == Ed25519PrivateKey.from_private_bytes(b"k" * 32).sign(data)


def test_keys_of_another_length_are_the_callers_error() -> None:
    for length in (0, 31, 33):
        with pytest.raises(ValueError, match="32 bytes"):
            peer_id_of(bytes(length))
        with pytest.raises(ValueError, match="32 bytes"):
            Identity(bytes(length))
