"""A closed swarm end to end: real processes, real p2pd, and people who are let in, kept out, and thrown out."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from swarm_processes import VerbProcess, VerbProcesses, done, events, eventually, verb
from swarm_story import TINY

from paris_swarm.dht_schemas.admission import seal_token
from paris_swarm.dht_schemas.dht_rules import claim_key
from paris_swarm.dht_schemas.invite import Invite, peer_id_in
from paris_swarm.dht_schemas.plan import open_plan
from paris_swarm.dht_schemas.records import Claim, Progress
from paris_swarm.swarm.door import OpenDoor
from paris_swarm.swarm.fetching import fetch_blob
from paris_swarm.swarm.greeting import NewcomerDoor
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.transport import TurnedAway

LEASE_S = 6


@dataclass
class ClosedSwarm:
    """A bootstrap, a guest who trains, a friend who serves only; and where their homes lie."""

    folder: Path
    plan_id: str
    invite: str
    processes: dict[str, VerbProcess]
    invites: dict[str, str]

    def home(self, name: str) -> Path:
        return self.folder / name

    @property
    def plan(self) -> Path:
        return self.folder / "plan"

    def peer(self, name: str) -> str:
        return Home(self.home(name)).identity().peer_id

    def verb(self, name: str, *words: object) -> Any:
        return verb("--home", self.home(name), *words)

    def invite_for(self, name: str) -> str:
        shown = done(self.verb(name, "identity", "show", "--json")).json["peer"]
        return str(done(self.verb("organiser", "invite", shown, "--plan", self.plan, "--json")).json["invite"])

    def addresses(self) -> list[str]:
        """Of every node that runs."""
        return list(Invite.parse(self.invite).peers) + Home(self.home("organiser")).known_peers()


@pytest.fixture(scope="module")
def swarm(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClosedSwarm]:
    folder = tmp_path_factory.mktemp("closed")
    words = ["init", data, "-o", folder / "plan", *TINY, "--lease", LEASE_S, "--grace", 600, "--invited", "--json"]
    plan = done(verb("--home", folder / "organiser", *words)).json
    assert plan["admission"] == "invited"
    with VerbProcesses(folder / "logs") as processes:
        seed = processes.start("bootstrap", "--home", folder / "organiser", "bootstrap", folder / "plan")
        ready = seed.wait_for(lambda line: line.get("event") == "ready")
        made = ClosedSwarm(folder, plan["plan"], ready["invite"], {"bootstrap": seed}, {})
        for name, more in (("guest", ["--claim-cluster", "--data", data, "--threads", 1, "--device", "cpu"]),
                           ("friend", [])):  # fmt: skip
            made.invites[name] = made.invite_for(name)
            made.processes[name] = processes.start(name, "--home", folder / name, "join", made.invites[name], *more)
        for name in ("guest", "friend"):
            made.processes[name].wait_for(lambda line: "peer" in line)
        yield made


def test_a_stranger_cannot_join_and_is_told_what_to_do(swarm: ClosedSwarm) -> None:
    answer = swarm.verb("stranger", "join", swarm.invite)
    assert answer.code == 3
    assert "paris-swarm identity show" in answer.said
    assert not (swarm.home("stranger") / "swarms" / swarm.plan_id / "plan").exists()
    assert swarm.verb("stranger", "status", swarm.invite).code == 3

    stolen = swarm.verb("stranger", "join", swarm.invites["guest"])
    assert stolen.code == 2
    assert f"was made for {swarm.peer('guest')}" in stolen.said


def test_only_the_organiser_admits(swarm: ClosedSwarm) -> None:
    Home(swarm.home("stranger")).identity()
    refused = swarm.verb("stranger", "invite", swarm.peer("stranger"), "--plan", swarm.plan)
    assert refused.code == 2
    assert "only its organiser can do this" in refused.said
    assert swarm.verb("stranger", "notice", swarm.plan, "--end").code == 2
    assert swarm.verb("organiser", "invite", "12D3KooWnobody", "--plan", swarm.plan).code == 2
    assert swarm.verb("organiser", "notice", swarm.plan, "--pause", "--end").code == 2
    assert swarm.verb("organiser", "notice", swarm.plan, "--revoke", swarm.peer("organiser")).code == 2


def test_a_stranger_stores_no_claim_and_fetches_nothing_from_any_node(swarm: ClosedSwarm) -> None:
    async def attack(addresses: list[str]) -> None:
        from paris_swarm.swarm.hivemind_transport import HivemindTransport

        home = Home(swarm.home("stranger"))
        identity = home.identity()
        transport = await HivemindTransport.start(home.identity_path, addresses)
        try:
            await transport.join_dht(lambda *_: None)
            until_s = time.time() + 60
            for token in (None, seal_token(identity, swarm.plan_id, identity.peer_id)):
                claim = Claim(
                    plan=swarm.plan_id, slot="0", peer=identity.peer_id, seq=int(time.time() * 1000), until=until_s,
                    progress=Progress(step=0, steps=1, loss=None, images_per_s=0.0, device="cpu"), token=token,
                ).seal(identity)  # fmt: skip
                assert not await transport.store(claim_key(swarm.plan_id, "0"), identity.peer_id, claim, until_s)
            nodes = {peer_id_in(address) for address in addresses}
            for node in nodes:
                for door in (OpenDoor(), NewcomerDoor(swarm.plan_id, token=seal_token(identity, swarm.plan_id, node))):
                    with pytest.raises(TurnedAway):
                        await fetch_blob(transport, [node], swarm.plan_id, max_bytes=1 << 20, door=door)
        finally:
            await transport.close()

    members = {swarm.peer(name) for name in ("organiser", "guest", "friend")}

    def known() -> list[str]:
        # The bootstrap may come to know the stranger's address too: the stranger does not attack itself.
        return [address for address in swarm.addresses() if peer_id_in(address) in members]

    eventually(lambda: {peer_id_in(at) for at in known()} == members, what="the bootstrap knows both peers")
    asyncio.run(attack(known()))


def test_the_guest_trains_and_status_and_assemble_read_in_a_members_name(swarm: ClosedSwarm) -> None:
    def published(line: dict[str, Any]) -> bool:
        return any(lane["published_step"] > 0 for lane in line.get("lanes", ()))

    swarm.processes["guest"].wait_for(published, limit_s=120)
    for name, words in (("organiser", [swarm.invite]), ("guest", []), ("friend", [swarm.invite])):
        seen = done(swarm.verb(name, "status", *words, "--json")).json
        assert (seen["admission"], seen["notice"], seen["outlaws"]) == ("invited", None, [])
        assert swarm.peer("guest") in {peer["peer"] for peer in seen["peers"]}
    out = swarm.folder / "model"
    assembled = done(swarm.verb("friend", "assemble", swarm.invite, "-o", out, "--allow-missing", "--json")).json
    assert "router" in assembled["missing"]
    assert open_plan((swarm.plan / "plan.json").read_bytes()).plan_id == assembled["plan"]


def test_a_revoked_guest_is_thrown_out_within_a_gossip_interval(swarm: ClosedSwarm) -> None:
    guest = swarm.peer("guest")
    words = ["notice", swarm.plan, "--revoke", guest, "--message", "sold the key", "--json"]
    said = done(swarm.verb("organiser", *words)).json
    assert said["notice"] == {
        "number": 1, "state": "running", "revoked": [guest], "message": "sold the key", "contradicted": False
    }  # fmt: skip
    assert swarm.peer("organiser") in said["told"]
    code = swarm.processes["guest"].wait(limit_s=60)
    assert code == 4
    assert "The organiser has revoked this key" in swarm.processes["guest"].log.read_text()

    friend = swarm.home("friend")
    eventually(lambda: any(line["event"] == "notice" for line in events(friend, swarm.plan_id)), what="friend heard")
    seen = done(swarm.verb("friend", "status", "--json", swarm.invite)).json
    assert seen["notice"]["revoked"] == [guest]
    assert guest not in {peer["peer"] for peer in seen["peers"]}
    assert "revoked" in done(swarm.verb("friend", "status", swarm.invite)).out
    again = swarm.verb("guest", "join", swarm.invites["guest"])
    assert again.code in (3, 4)
    for words in (["status"], ["assemble", "-o", swarm.folder / "late", "--allow-missing"]):
        out = swarm.verb("guest", *words)
        assert out.code == 4
        assert "sold the key" in out.said
    assert not (swarm.folder / "late").exists()


def test_the_next_notice_says_everything_and_its_number_goes_on(swarm: ClosedSwarm) -> None:
    guest = swarm.peer("guest")
    notice_file = swarm.home("organiser") / "swarms" / swarm.plan_id / "notice.json"
    eventually(lambda: notice_file.exists())
    paused = done(swarm.verb("organiser", "notice", swarm.plan, "--pause", "--json")).json["notice"]
    assert (paused["number"], paused["state"], paused["revoked"], paused["message"]) == (2, "paused", [guest], "")
    notice_file.unlink()  # a backup older than the last notice was restored: peers know better
    restored = done(swarm.verb("organiser", "notice", swarm.plan, "--restore", guest, "--resume", "--json")).json
    assert (restored["notice"]["number"], restored["notice"]["revoked"]) == (3, [])
    shown = done(swarm.verb("organiser", "notice", swarm.plan, "--json")).json["notice"]
    assert shown["number"] == 3
    assert json.loads(notice_file.read_bytes())
    twice = swarm.verb("organiser", "notice", swarm.plan, "--restore", guest)
    assert twice.code == 2
    assert "is not revoked" in twice.said


def test_they_end_in_order(swarm: ClosedSwarm) -> None:
    assert swarm.processes["friend"].end() == 0
    assert swarm.processes["bootstrap"].end() == 0
    unreachable = swarm.verb("organiser", "notice", swarm.plan, "--end", "--json")
    assert done(unreachable).json["notice"]["state"] == "ended"
    assert unreachable.json["told"] == []
