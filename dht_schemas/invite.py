"""The invite: the one string a person pastes to join a swarm, ``paris:<plan id>?peer=<multiaddr>&peer=<multiaddr>``.

Its form is R-INV-1. The plan id is the digest of the signed plan, so whoever answers at the addresses cannot pass off
another plan. An invite into a closed swarm is made for one peer id and ends in ``&token=<base64url>``: the organiser's
admission token. It is of no use to any other peer.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from urllib.parse import quote, unquote

from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from paris_swarm.dht_schemas.admission import read_token
from paris_swarm.dht_schemas.errors import InviteError, MalformedRecord, RecordError, quoted
from paris_swarm.dht_schemas.fields import is_digest
from paris_swarm.dht_schemas.identity import public_key_bytes

SCHEME = "paris:"
MAX_INVITE = 8192
MAX_PEERS = 32


@dataclass(frozen=True, slots=True)
class Invite:
    """A plan and the addresses of peers that have it. Validated, and addresses normalised, on construction
    (InviteError).
    """

    plan_id: str
    peers: tuple[str, ...] = ()
    """Multiaddrs, each ending in /p2p/<peer id>; none when nobody's address is known yet."""
    token: str | None = None
    """Admission token (an envelope) of the peer that the invite was made for; None in an open swarm."""

    def __post_init__(self) -> None:
        if not isinstance(self.plan_id, str) or not is_digest(self.plan_id):
            raise InviteError(f"the plan id must have 64 lower-case hexadecimal characters, not {quoted(self.plan_id)}")
        if len(self.peers) > MAX_PEERS:
            raise InviteError(f"{len(self.peers)} peers, at most {MAX_PEERS} are allowed")
        object.__setattr__(self, "peers", tuple(dict.fromkeys(peer_address(peer) for peer in self.peers)))
        if self.token is not None:
            _check_made_for(self.token, self.plan_id)
        if len(str(self)) > MAX_INVITE:
            raise InviteError(f"{len(str(self))} characters once written, at most {MAX_INVITE} are allowed")

    @classmethod
    def parse(cls, text: str) -> Invite:
        """Read an invite; spaces and quotation marks around it are forgiven. Raises InviteError."""
        if len(text) > MAX_INVITE:
            raise InviteError(f"{len(text)} characters, at most {MAX_INVITE} are allowed")
        text = text.strip().strip("'\"<>").strip()
        if not text.startswith(SCHEME):
            raise InviteError(f"an invite begins with {SCHEME!r}, not {quoted(text[:12])}")
        plan_id, question, query = text[len(SCHEME) :].partition("?")
        peers: list[str] = []
        token: str | None = None
        for item in query.split("&") if question else []:
            name, equals, value = item.partition("=")
            if name == "token" and equals and token is None:
                token = _unpacked(value)
            elif name == "peer" and equals:
                peers.append(unquote(value))
            else:
                raise InviteError(f"{quoted(item)} is not of the form peer=<multiaddr>, nor the one token=<base64url>")
        return cls(plan_id, tuple(peers), token)

    def __str__(self) -> str:
        query = ["peer=" + quote(peer, safe="/:.,-_~") for peer in self.peers]
        if self.token is not None:
            query.append("token=" + base64.urlsafe_b64encode(self.token.encode("utf-8")).decode("ascii").rstrip("="))
        return f"{SCHEME}{self.plan_id}" + (f"?{'&'.join(query)}" if query else "")

    @property
    def made_for(self) -> str | None:
        """Peer id that the token admits; None without one."""
        return None if self.token is None else read_token(self.token)[1].peer


def _unpacked(value: str) -> str:
    try:
        if len(value) > MAX_INVITE or not value.isascii():
            raise ValueError("too long, or not base64url")
        return base64.b64decode(value + "=" * (-len(value) % 4), altchars=b"-_", validate=True).decode("utf-8")
    except (binascii.Error, ValueError) as error:
        raise InviteError(f"its token is damaged ({quoted(str(error))}): copy the invite whole") from error


def _check_made_for(token: str, plan_id: str) -> None:
    try:
        _signer, admission = read_token(token)
    except RecordError as error:
        raise InviteError(f"its token is damaged ({error.detail}): copy the invite whole") from error
    if admission.plan != plan_id:
        raise InviteError(f"its token admits to plan {admission.plan}, not to {plan_id}")


def peer_address(text: str) -> str:
    """A multiaddr in its normal spelling. Raises InviteError unless it names an address and ends in /p2p/<Ed25519
    peer id>.
    """
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise InviteError(f"address {quoted(text, 120)} has characters that no multiaddr has")
    head, mark, peer_id = text.rpartition("/p2p/")
    if not mark or not head.strip("/"):  # "//p2p/..." names no address, though multiaddr reads it
        raise InviteError(
            f"address {quoted(text, 120)} must end in /p2p/<peer id>, as /ip4/203.0.113.5/tcp/4001/p2p/12D3KooW... does"
        )
    try:
        public_key_bytes(peer_id)
    except MalformedRecord as error:
        raise InviteError(f"address {quoted(text, 120)}: {error.detail}") from error
    try:
        normal = str(Multiaddr(text))
        if str(Multiaddr(normal)) == normal and normal.rpartition("/p2p/")[2] == peer_id:
            return normal
        reason = "it does not read back the same"
    except (MultiaddrError, ValueError, LookupError) as error:
        reason = str(error)
    raise InviteError(f"address {quoted(text, 120)} cannot be read: {quoted(reason, 200)}")


def peer_id_in(address: str) -> str:
    """The peer id at the end of a multiaddr. Raises InviteError when there is none."""
    return peer_address(address).rpartition("/p2p/")[2]
