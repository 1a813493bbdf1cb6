"""What leaves this machine: addresses that others are told, the warning of a peer nobody reaches, hub names."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiaddr import Multiaddr
from tests.expert_data.loopback_hub import hub_of

from paris_swarm.cli.connect import announced, start_transport, warn_of_loopback
from paris_swarm.cli.exits import Usage
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.invite import Invite

ELSEWHERE = "/ip4/203.0.113.5/tcp/31337/p2p/12D3KooW"
HERE = "/ip4/127.0.0.1/tcp/4001/p2p/12D3KooW"


@pytest.mark.parametrize(
    "address", ["/ip4/203.0.113.5/tcp/31337", "/ip6/2001:db8::1/tcp/1", "/dns4/peer.example.org/tcp/65535"]
)
def test_an_address_that_can_be_dialled_may_be_announced(address: str) -> None:
    assert announced([address]) == (address,)


@pytest.mark.parametrize(
    "address",
    [
        "203.0.113.5:31337",
        "/ip4/203.0.113.5",
        "/ip4/203.0.113.5/udp/31337",
        "/ip4/203.0.113.5/tcp/0",
        "/ip4/0.0.0.0/tcp/31337",
        "/ip6/::/tcp/31337",
        "/ip4/203.0.113.5/tcp/31337/p2p/12D3KooWD2Rx7gj1Kak7CZkf5FQ7a9E3Lg7fj2J7rBpe1jgu7TEK",
        "/ip4/203.0.113.500/tcp/31337",
    ],
)
def test_one_that_cannot_is_refused_by_name_with_one_that_can(address: str) -> None:
    with pytest.raises(Usage, match=r"--announce .*wanted") as caught:
        announced(["/ip4/203.0.113.5/tcp/31337", address])
    assert address in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        (address,) = announced([text])
    except Usage:
        return
    assert str(Multiaddr(address)) == address


def test_what_is_announced_is_what_the_invite_says(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(Identity.generate().to_protobuf())

    async def scenario() -> tuple[str, list[str]]:
        transport = await start_transport(key, [], announce=announced(["/ip4/203.0.113.5/tcp/31337"]))
        try:
            return transport.peer_id, await transport.addresses()
        finally:
            await transport.close()

    peer_id, addresses = asyncio.run(scenario())
    assert addresses == [f"/ip4/203.0.113.5/tcp/31337/p2p/{peer_id}"]
    assert Invite.parse(str(Invite("ab" * 32, tuple(addresses)))).peers == tuple(addresses)


@pytest.mark.parametrize(
    ("listen", "peers", "said"),
    [
        ("/ip4/127.0.0.1/tcp/0", [ELSEWHERE], True),
        ("/ip6/::1/tcp/0", [ELSEWHERE], True),
        ("/ip4/127.0.0.1/tcp/0", [ELSEWHERE, HERE], False),
        ("/ip4/127.0.0.1/tcp/0", [], False),
        ("/ip4/0.0.0.0/tcp/31337", [ELSEWHERE], False),
    ],
)
def test_a_peer_that_nobody_can_reach_is_told_so(
    listen: str, peers: list[str], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_loopback(listen, peers)
    assert ("--listen /ip4/0.0.0.0" in caplog.text) is said
    assert {record.levelno for record in caplog.records} <= {logging.ERROR}, "shown by default"


@pytest.mark.parametrize(("offline", "code"), [(None, 0), ("1", 2)])
def test_prepare_fetches_a_hub_name_unless_told_to_stay_offline(
    offline: str | None, code: int, own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    from tests.expert_data.tiny_encoders import tiny_vae

    with hub_of({"some-body/vae": tiny_vae(tmp_path / "vae")}, monkeypatch, tmp_path / "unused") as asked:
        import huggingface_hub.constants as hub

        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": hub.ENDPOINT, "HF_HOME": str(tmp_path / "hf"), "HF_XET_HIGH_PERFORMANCE": "0"}
        environment |= {"HF_HUB_OFFLINE": offline} if offline else {}
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "paris_swarm.cli.app", "prepare", own_folder, tmp_path / "data"),
                *("--vae", "some-body/vae", "--resolution", "16", "--workers", "1", "--device", "cpu"),
            ],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    assert ran.returncode == code, ran.stderr
    if offline:
        assert asked == []
        assert "HF_HUB_OFFLINE" in ran.stderr
    else:
        assert any("/resolve/" in path for _kind, path in asked)
