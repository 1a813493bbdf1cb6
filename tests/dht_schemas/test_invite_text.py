"""The invite: what is printed parses back; what a person mangled is explained."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas import Identity, Invite, InviteError, peer_address, peer_id_in

PLAN = "0123456789abcdef" * 4
PEER = Identity(b"k" * 32).peer_id
RELAY = Identity(b"r" * 32).peer_id

IDS = st.binary(min_size=32, max_size=32).map(lambda seed: Identity(seed).peer_id)
HOSTS = st.one_of(
    st.ip_addresses(v=4).map(lambda ip: f"/ip4/{ip}"),
    st.ip_addresses(v=6).map(lambda ip: f"/ip6/{ip}"),
    st.sampled_from(["/dns4/seed.example.org", "/dns6/a-b.example", "/dns/x"]),
)
TRANSPORTS = st.integers(1, 65535).flatmap(
    lambda port: st.sampled_from([f"/tcp/{port}", f"/udp/{port}/quic-v1", f"/tcp/{port}/ws"])
)
ADDRESSES = st.builds(lambda host, transport, peer: f"{host}{transport}/p2p/{peer}", HOSTS, TRANSPORTS, IDS)


@given(st.text("0123456789abcdef", min_size=64, max_size=64), st.lists(ADDRESSES, max_size=5))
def test_round_trip(plan_id: str, peers: list[str]) -> None:
    invite = Invite(plan_id, tuple(peers))
    assert Invite.parse(str(invite)) == invite
    assert str(Invite.parse(str(invite))) == str(invite)
    assert " " not in str(invite)
    assert [peer_id_in(peer) for peer in invite.peers] == [
        peer.rpartition("/")[2] for peer in dict.fromkeys(invite.peers)
    ]


def test_its_form() -> None:
    address = f"/ip4/203.0.113.5/tcp/4001/p2p/{PEER}"
    assert str(Invite(PLAN, (address, address))) == f"paris:{PLAN}?peer={address}"
    assert str(Invite(PLAN)) == f"paris:{PLAN}"
    assert Invite.parse(f"paris:{PLAN}") == Invite(PLAN)
    through_relay = f"/ip4/203.0.113.5/tcp/4001/p2p/{RELAY}/p2p-circuit/p2p/{PEER}"
    assert Invite.parse(str(Invite(PLAN, (through_relay,)))).peers == (through_relay,)
    assert peer_id_in(through_relay) == PEER


def test_what_pasting_adds_is_forgiven() -> None:
    invite = Invite(PLAN, (f"/ip4/203.0.113.5/tcp/4001/p2p/{PEER}",))
    for text in (f"  {invite}\n", f'"{invite}"', f"'{invite}'", f"<{invite}>", str(invite).replace("/", "%2F")):
        assert Invite.parse(text) == invite


GOOD = f"/ip4/203.0.113.5/tcp/4001/p2p/{PEER}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "paris:"),
        ("hello", "paris:"),
        (f"PARIS:{PLAN}", "paris:"),
        ("paris:", "64"),
        (f"paris:{PLAN[:-1]}?peer={GOOD}", "64"),
        (f"paris:{PLAN.upper()}", "64"),
        (f"paris:{PLAN}?", "peer=<multiaddr>"),
        (f"paris:{PLAN}?seed={GOOD}", "peer=<multiaddr>"),
        (f"paris:{PLAN}?peer={GOOD}&", "peer=<multiaddr>"),
        (f"paris:{PLAN}?peer=", "/p2p/<peer id>"),
        (f"paris:{PLAN}?peer=203.0.113.5:4001", "/p2p/<peer id>"),
        (f"paris:{PLAN}?peer=/ip4/203.0.113.5/tcp/4001", "/p2p/<peer id>"),
        (f"paris:{PLAN}?peer=/p2p/{PEER}", "/p2p/<peer id>"),
        (f"paris:{PLAN}?peer=//p2p/{PEER}", "/p2p/<peer id>"),
        (f"paris:{PLAN}?peer=/ip4/203.0.113.5/tcp/4001/p2p/{PEER[:-1]}", "peer id"),
        (f"paris:{PLAN}?peer=/ip4/1.2.3.4/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "12D3KooW"),
        (f"paris:{PLAN}?peer={GOOD}/p2p-circuit", "peer id"),
        (f"paris:{PLAN}?peer=/ip4/203.0.113.500/tcp/4001/p2p/{PEER}", "cannot be read"),
        (f"paris:{PLAN}?peer=/ip4/203.0.113.5/tcp/70000/p2p/{PEER}", "cannot be read"),
        (f"paris:{PLAN}?peer=/nonsense/1/p2p/{PEER}", "cannot be read"),
        (f"paris:{PLAN}?peer=/dns4/%1b[2J/tcp/1/p2p/{PEER}", "characters"),
        (f"paris:{PLAN}?peer=/dns4/a b/tcp/1/p2p/{PEER}", "characters"),
        (f"paris:{PLAN}?" + "&".join(f"peer=/ip4/203.0.113.5/tcp/{i}/p2p/{PEER}" for i in range(1, 34)), "at most 32"),
        ("paris:" + "x" * 9000, "at most 8192"),
    ],
    ids=lambda text: text[-40:],
)
def test_what_is_wrong_is_said(text: str, says: str) -> None:
    with pytest.raises(InviteError) as caught:
        Invite.parse(text)
    assert says in str(caught.value)
    assert str(caught.value).isprintable()


@given(st.text(max_size=80))
def test_arbitrary_text(text: str) -> None:
    for candidate in (text, f"paris:{PLAN}{text}", f"paris:{PLAN}?peer={text}", f"paris:{PLAN}?peer={text}/p2p/{PEER}"):
        with contextlib.suppress(InviteError):
            invite = Invite.parse(candidate)
            assert Invite.parse(str(invite)) == invite


PARTS = [
    "ip4",
    "ip6",
    "tcp",
    "udp",
    "dns",
    "dns4",
    "dnsaddr",
    "unix",
    "onion",
    "onion3",
    "garlic64",
    "certhash",
    "http-path",
    "sni",
    "ws",
    "wss",
    "p2p",
    "p2p-circuit",
    "ip6zone",
    "ipcidr",
    "memory",
    "quic",
    "quic-v1",
    "webtransport",
    "sctp",
    "1.2.3.4",
    "::1",
    "0",
    "4001",
    "99999",
    "a.b",
    "%25",
    "é",
]


@given(st.lists(st.sampled_from(PARTS), max_size=8))
def test_arbitrary_multiaddrs(parts: list[str]) -> None:
    with contextlib.suppress(InviteError):
        assert peer_address(peer_address(f"/{'/'.join(parts)}/p2p/{PEER}"))
