"""The one Ed25519 key of a peer: libp2p identity and record signer in one, and the peer id that carries the public
key.

A peer id is base58btc of the identity multihash of libp2p's protobuf public key (libp2p peer-ids specification,
"Ed25519"): ``00 24 08 01 12 20`` and the 32 bytes of the key, 52 characters beginning with ``12D3KooW``. So a peer id
alone verifies what that peer signed. The key file is libp2p's protobuf PrivateKey (key type 1, 32 bytes of seed and
32 of public key), which p2pd reads as it is.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from paris_swarm.dht_schemas.errors import BadSignature, MalformedRecord, quoted

SIGNING_DOMAIN = b"DSSEv1 "
"""Everything this key signs for us begins so; libp2p's own signatures begin with domains of their own, so neither
passes as the other.
"""

_PRIVATE_PREFIX = bytes.fromhex("08011240")  # protobuf PrivateKey: field 1 = 1 (Ed25519), field 2 = 64 bytes
_PEER_ID_PREFIX = bytes.fromhex(
    "002408011220"
)  # identity multihash of 36 bytes: protobuf PublicKey, field 1 = 1, field 2 = 32 bytes
_PEER_ID_LENGTH = 52
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"

_FIELD = 2**255 - 19
_ORDER_8 = 2707385501144840649318225287225658788936804267575313519463743609750303402022
_LOW_ORDER_Y = frozenset({0, 1, _FIELD - 1, _ORDER_8, _FIELD - _ORDER_8})
"""The y of the eight points whose order divides 8: as a public key each has signatures that anybody can make."""


class Identity:
    """An Ed25519 key pair. Never printed: ``repr`` shows the peer id only."""

    __slots__ = ("_key", "_public", "peer_id")

    def __init__(self, seed: bytes) -> None:
        """``seed``: the 32 secret bytes. Raises ValueError for another length."""
        self._key = Ed25519PrivateKey.from_private_bytes(_exactly(seed, 32, "an Ed25519 seed"))
        self._public = self._key.public_key().public_bytes_raw()
        self.peer_id: str = peer_id_of(self._public)

    @classmethod
    def generate(cls) -> Identity:
        """A fresh key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def from_protobuf(cls, data: bytes) -> Identity:
        """Read a key file (68 bytes). Raises ValueError when it is not an Ed25519 libp2p private key or its two
        halves do not belong together.
        """
        if not data.startswith(_PRIVATE_PREFIX) or len(data) != len(_PRIVATE_PREFIX) + 64:
            raise ValueError(
                "not an Ed25519 identity file (libp2p PrivateKey, 68 bytes); restore it from a backup or make a new one"
            )
        identity = cls(data[4:36])
        if identity._public != data[36:]:
            raise ValueError(
                "the identity file is damaged: its public key is not that of its secret key; restore it from a backup"
            )
        return identity

    def to_protobuf(self) -> bytes:
        """The key file, 68 bytes, secret: write it with mode 0600."""
        return _PRIVATE_PREFIX + self._key.private_bytes_raw() + self._public

    def sign(self, data: bytes) -> bytes:
        """The 64-byte signature of ``data``, which must begin with ``SIGNING_DOMAIN`` (R-ENV-6; else ValueError)."""
        if not data.startswith(SIGNING_DOMAIN):
            raise ValueError("this key signs DSSE envelopes only: use envelope.seal")
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    def __reduce__(self) -> str:
        raise TypeError("an Identity is not pickled: pass its key file's path")


def peer_id_of(public_key: bytes) -> str:
    """The peer id of a 32-byte Ed25519 public key. Raises ValueError for another length."""
    return _base58(_PEER_ID_PREFIX + _exactly(public_key, 32, "an Ed25519 public key"))


def public_key_bytes(peer_id: str) -> bytes:
    """The 32-byte Ed25519 public key inside a peer id. Raises MalformedRecord when ``peer_id`` is not one, in its one
    spelling (R-KEY-1), or when its key is one for which anybody can sign (R-KEY-2).
    """
    if len(peer_id) == _PEER_ID_LENGTH:
        number = 0
        for character in peer_id:
            digit = _ALPHABET.find(character)
            if digit < 0:
                break
            number = number * 58 + digit
        else:
            # 37 bytes follow the multihash's leading zero, which base58 writes as one "1"
            if peer_id[0] == "1" and peer_id[1] != "1" and number < 1 << (8 * 37):
                raw = b"\x00" + number.to_bytes(37, "big")
                if raw.startswith(_PEER_ID_PREFIX):
                    return _sound(raw[len(_PEER_ID_PREFIX) :], peer_id)
    raise MalformedRecord(f"{quoted(peer_id)} is not an Ed25519 peer id (12D3KooW...)", rule="R-KEY-1")


def verify(peer_id: str, data: bytes, signature: bytes) -> None:
    """Check that the holder of ``peer_id`` signed ``data``. Raises BadSignature, or MalformedRecord when ``peer_id``
    is not one.
    """
    public_key = public_key_bytes(peer_id)
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError) as error:  # ValueError: bytes that are no point of the curve
        raise BadSignature(f"not signed by {peer_id}") from error


def _sound(public_key: bytes, peer_id: str) -> bytes:
    y = int.from_bytes(public_key, "little") & ((1 << 255) - 1)
    if y >= _FIELD or y in _LOW_ORDER_Y:
        raise MalformedRecord(f"{peer_id} is a key that belongs to nobody: anybody can sign for it", rule="R-KEY-2")
    return public_key


def _base58(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    digits: list[str] = []
    while number:
        number, digit = divmod(number, 58)
        digits.append(_ALPHABET[digit])
    zeros = len(data) - len(data.lstrip(b"\x00"))
    return "1" * zeros + "".join(reversed(digits))


def _exactly(data: bytes, length: int, what: str) -> bytes:
    if len(data) != length:
        raise ValueError(f"{what} has {length} bytes, not {len(data)}")
    return bytes(data)
