"""The invite: the one string a person pastes to join a swarm, ``paris:<plan id>?peer=<multiaddr>&peer=<multiaddr>``.

The plan id is the digest of the signed plan, so whoever answers at the addresses cannot pass off another plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote

from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from paris_swarm.dht_schemas.errors import InviteError, MalformedRecord, quoted
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

    def __post_init__(self) -> None:
        if not isinstance(self.plan_id, str) or not is_digest(self.plan_id):
            raise InviteError(f"the plan id must have 64 lower-case hexadecimal characters, not {quoted(self.plan_id)}")
        if len(self.peers) > MAX_PEERS:
            raise InviteError(f"{len(self.peers)} peers, at most {MAX_PEERS} are allowed")
        object.__setattr__(self, "peers", tuple(dict.fromkeys(peer_address(peer) for peer in self.peers)))

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
        for item in query.split("&") if question else []:
            name, equals, value = item.partition("=")
            if name != "peer" or not equals:
                raise InviteError(f"{quoted(item)} is not of the form peer=<multiaddr>")
            peers.append(unquote(value))
        return cls(plan_id, tuple(peers))

    def __str__(self) -> str:
        query = "&".join("peer=" + quote(peer, safe="/:.,-_~") for peer in self.peers)
        return f"{SCHEME}{self.plan_id}" + (f"?{query}" if query else "")


def peer_address(text: str) -> str:
    """A multiaddr in its normal spelling. Raises InviteError unless it names an address and ends in /p2p/<Ed25519
    peer id>.
    """
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise InviteError(f"address {quoted(text, 120)} has characters that no multiaddr has")
    head, mark, peer_id = text.rpartition("/p2p/")
    if not mark or not head:
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
