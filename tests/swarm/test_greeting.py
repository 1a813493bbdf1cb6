"""Who is let in: tokens, delegations, notices, proofs and lists at the opening of every stream; how news spreads."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from closed_world import ORGANISER, PROGRESS, Closed, closed, closed_plan, rounds_until
from hypothesis import given
from hypothesis import strategies as st
from test_peer_life import Swarm, make_plan, until

from paris_swarm.dht_schemas.admission import Delegation, PeerLists, seal_delegation, seal_token
from paris_swarm.dht_schemas.dht_rules import claim_key
from paris_swarm.dht_schemas.errors import (
    Blocked,
    Equivocation,
    MalformedRecord,
    NotAdmitted,
    NotAProof,
    RecordError,
    Revoked,
    Rollback,
    WrongPlan,
    WrongSigner,
)
from paris_swarm.dht_schemas.greeting import MAX_GREETING, Greeting
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.notice import Notice, seal_notice
from paris_swarm.dht_schemas.records import Claim
from paris_swarm.dht_schemas.trusted import TrustedSwarm
from paris_swarm.swarm import wire
from paris_swarm.swarm.door import OpenDoor, greet_client
from paris_swarm.swarm.fetching import fetch_blob
from paris_swarm.swarm.greeting import MAX_OBSERVERS, NewcomerDoor, SwarmDoor, greet_peer
from paris_swarm.swarm.home import Home, HomeError
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.serving import ServingLimits
from paris_swarm.swarm.status import status_from_dict, swarm_status
from paris_swarm.swarm.transport import NoSource, StreamClosed, TurnedAway

STRANGER = Identity(b"s" * 32)


# ---- the frame, byte by byte -----------------------------------------------------------------------------------------


@given(st.binary(max_size=600), st.sampled_from(wire.Verdict), st.lists(st.integers(1, 50), min_size=1))
def test_a_greeting_comes_out_as_it_went_in_however_it_is_cut(
    payload: bytes, verdict: wire.Verdict, cuts: list[int]
) -> None:
    frame = wire.GreetingFrame(payload, verdict)
    request = wire.Request(wire.RequestKind.BLOB, "ab" * 32)
    data = frame.to_bytes() + request.to_bytes()
    reader = wire.RequestReader()
    found: list[wire.Request] = []
    at = 0
    for cut in cuts * (len(data) // sum(cuts) + 1):
        assert (reader.greeting is None) == (at < len(frame.to_bytes()))
        assert reader.wants <= wire.MAX_PAYLOAD
        found += reader.receive(data[at : at + cut])
        at += cut
    assert reader.greeting == frame
    assert found == [request]


def test_byte_by_byte_nothing_is_wanted_beyond_the_greeting() -> None:
    data = wire.GreetingFrame(b"hello").to_bytes()
    reader = wire.ResponseReader()
    for index in range(len(data)):
        assert 0 < reader.wants <= len(data) - index
        reader.receive(data[index : index + 1])
    assert reader.greeting == wire.GreetingFrame(b"hello")
    assert reader.wants == 0
    with pytest.raises(wire.BadFrame, match="nobody asked for"):
        reader.receive(b"x")


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (bytes([2, 0, 0, 0, 0, 0, 0, 0]), "unknown verdict 2"),
        (bytes([0, 1, 0, 0, 0, 0, 0, 0]), "reserved"),
        (bytes([0, 0, 0, 1, 0, 0, 0, 0]), "reserved"),
        (bytes([0, 0, 0, 0]) + (MAX_GREETING + 1).to_bytes(4, "big"), "131073 bytes"),
        (b"\xff" * 8, "verdict 255"),
    ],
)
def test_a_greeting_out_of_form_is_refused_before_its_payload(head: bytes, why: str) -> None:
    for reader in (wire.RequestReader(), wire.ResponseReader()):
        with pytest.raises(wire.BadFrame, match=why):
            reader.receive(wire.HELLO + head)
        assert reader.greeting is None
        with pytest.raises(wire.BadFrame):
            reader.receive(b"")


def test_the_longest_greeting_passes_and_one_byte_more_is_never_sent() -> None:
    reader = wire.RequestReader()
    reader.receive(wire.GreetingFrame(bytes(MAX_GREETING)).to_bytes())
    assert reader.greeting is not None
    with pytest.raises(ValueError, match="the most is 131072"):
        wire.GreetingFrame(bytes(MAX_GREETING + 1)).to_bytes()


# ---- the door by itself ----------------------------------------------------------------------------------------------


def door(trusted: TrustedSwarm, **options: Any) -> SwarmDoor:
    values: dict[str, Any] = {"token": None, "clock": lambda: 1000.0, "dice": random.Random(0)}
    return SwarmDoor(trusted, **{**values, **options})


def greeting(**said: Any) -> bytes:
    return Greeting(**said).to_bytes()


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(lambda data: b'{"plan":' + data)))
def test_rubbish_in_a_greeting_is_a_record_error_and_changes_nothing(data: bytes) -> None:
    trusted = TrustedSwarm(PLAN)
    with pytest.raises(RecordError):
        door(trusted).admit(STRANGER.peer_id, data)
    assert (trusted.notices, trusted.proofs) == ((), [])


PLAN = closed_plan()
OPEN = closed_plan(admission="open")


def test_a_closed_door_opens_for_tokens_and_delegations_only() -> None:
    """R-GRT-4"""
    guest, observer = Identity(b"g" * 32), Identity(b"x" * 32)
    here, plan_id = door(TrustedSwarm(PLAN)), PLAN.plan_id
    token = seal_token(ORGANISER, plan_id, guest.peer_id)
    here.admit(guest.peer_id, greeting(plan=plan_id, token=token))
    here.admit(guest.peer_id, greeting(token=token))
    here.admit(ORGANISER.peer_id, greeting())
    lent = seal_delegation(guest, plan_id, observer.peer_id, 1900.0)
    here.admit(observer.peer_id, greeting(plan=plan_id, token=token, delegation=lent))
    own_word = seal_token(STRANGER, plan_id, STRANGER.peer_id)
    strangers = seal_delegation(STRANGER, plan_id, observer.peer_id, 1900.0)
    late = seal_delegation(guest, plan_id, observer.peer_id, 1000.0)
    for peer, said, error in (
        (STRANGER, {"plan": plan_id}, NotAdmitted),
        (STRANGER, {}, NotAdmitted),
        (STRANGER, {"token": token}, NotAdmitted),
        (STRANGER, {"token": own_word}, NotAdmitted),
        (STRANGER, {"token": token, "delegation": lent}, NotAdmitted),
        (observer, {"token": token}, NotAdmitted),
        (observer, {"delegation": lent}, NotAdmitted),
        (observer, {"token": token, "delegation": late}, NotAdmitted),
        (observer, {"token": token, "delegation": strangers}, NotAdmitted),
        (guest, {"token": token, "plan": OPEN.plan_id}, WrongPlan),
    ):
        with pytest.raises(error):
            here.admit(peer.peer_id, greeting(**said))


def test_an_open_door_asks_for_nothing_but_the_right_plan() -> None:
    here = door(TrustedSwarm(OPEN))
    here.admit(STRANGER.peer_id, b"")
    here.admit(STRANGER.peer_id, greeting(plan=OPEN.plan_id))
    with pytest.raises(WrongPlan):
        here.admit(STRANGER.peer_id, greeting(plan=PLAN.plan_id))


def test_who_brings_what_does_not_verify_is_turned_away_and_not_believed() -> None:
    """R-GRT-3"""
    trusted = TrustedSwarm(OPEN)
    here = door(trusted)
    forged = seal_notice(STRANGER, Notice(plan=OPEN.plan_id, number=9, state="ended"))
    one = claim(STRANGER, 5).decode()
    for said, error in (
        ({"notice": forged.decode()}, WrongSigner),
        ({"notice": "{}"}, MalformedRecord),
        ({"proofs": ((one, one),)}, NotAProof),
        ({"proofs": ((one, "x"),)}, MalformedRecord),
    ):
        with pytest.raises(error):
            here.admit(ORGANISER.peer_id, greeting(**said))
    assert (trusted.notices, trusted.proofs) == ((), [])


def test_a_revoked_observer_or_lender_is_out_and_told_why() -> None:
    guest, observer = Identity(b"g" * 32), Identity(b"x" * 32)
    trusted = TrustedSwarm(PLAN)
    here = door(trusted)
    said = greeting(
        token=seal_token(ORGANISER, PLAN.plan_id, guest.peer_id),
        delegation=seal_delegation(guest, PLAN.plan_id, observer.peer_id, 1900.0),
    )
    here.admit(observer.peer_id, said)
    for number, out in enumerate((guest, observer), start=1):
        notice = Notice(plan=PLAN.plan_id, number=number, state="running", revoked=(out.peer_id,))
        trusted.feed_notice(seal_notice(ORGANISER, notice))
        with pytest.raises(Revoked):
            here.check(observer.peer_id)
        with pytest.raises(Revoked):
            here.admit(observer.peer_id, said)
        assert Greeting.of_bytes(here.refusal(observer.peer_id)).notice is not None
    assert here.refusal(STRANGER.peer_id) == b""


def test_observers_pass_an_allow_list_by_the_peer_they_read_for() -> None:
    guest, observer = Identity(b"g" * 32), Identity(b"x" * 32)
    here = door(TrustedSwarm(OPEN, lists=PeerLists(allowed=frozenset({guest.peer_id}))))
    lent = seal_delegation(guest, OPEN.plan_id, observer.peer_id, 1900.0)
    here.admit(observer.peer_id, greeting(delegation=lent))
    with pytest.raises(Blocked):
        here.admit(observer.peer_id, greeting())
    other = seal_delegation(STRANGER, OPEN.plan_id, observer.peer_id, 1900.0)
    with pytest.raises(Blocked):
        here.admit(observer.peer_id, greeting(delegation=other))


def test_what_binds_an_observer_lasts_while_it_is_being_welcomed() -> None:
    """It reads its welcome slowly while a thousand others greet: its stream still ends when its peer is revoked."""
    guest, observer = Identity(b"g" * 32), Identity(b"x" * 32)
    trusted = TrustedSwarm(OPEN)
    here = door(trusted)

    said = greeting(delegation=seal_delegation(guest, OPEN.plan_id, observer.peer_id, 1900.0))
    another = Delegation(plan=OPEN.plan_id, peer=STRANGER.peer_id, observer=ORGANISER.peer_id, until=1900.0)

    class Slow:
        peer_id = observer.peer_id
        sent = memoryview(wire.GreetingFrame(said).to_bytes())
        closed = asyncio.Event()

        async def read_exactly(self, size: int) -> bytes:
            piece, self.sent = bytes(self.sent[:size]), self.sent[size:]
            return piece

        async def write(self, _data: bytes) -> None:
            for number in range(MAX_OBSERVERS + 1):
                here._bind(f"observer {number}", another)

        async def close(self) -> None:
            self.closed.set()

    async def scenario() -> None:
        stream: Any = Slow()
        assert await greet_client(stream, wire.RequestReader(), here, stall_s=10.0)
        notice = Notice(plan=OPEN.plan_id, number=1, state="running", revoked=(guest.peer_id,))
        trusted.feed_notice(seal_notice(ORGANISER, notice))
        here.close_unwelcome()
        await asyncio.wait_for(stream.closed.wait(), 10)
        here.leave(observer.peer_id, stream)

    asyncio.run(scenario())


def test_contradicting_notices_are_both_told_in_turn() -> None:
    trusted = TrustedSwarm(OPEN)
    for text in ("one", "other"):
        trusted.feed_notice(seal_notice(ORGANISER, Notice(plan=OPEN.plan_id, number=1, state="running", message=text)))
    here = door(trusted)
    told = {Greeting.of_bytes(here.greeting()).notice for _ in range(32)}
    assert told == {notice.sealed.envelope.decode() for notice in trusted.notices}


# ---- nodes -----------------------------------------------------------------------------------------------------------


def claim(identity: Identity, seq: int, *, plan_id: str = OPEN.plan_id, token: str | None = None, **more: Any) -> bytes:
    values: dict[str, Any] = {"slot": "0", "until": time.time() + 60, "progress": PROGRESS}
    return Claim(plan=plan_id, peer=identity.peer_id, seq=seq, token=token, **{**values, **more}).seal(identity)


def test_an_uninvited_peer_stores_nothing_fetches_nothing_and_opens_no_stream(tmp_path: Path) -> None:
    async def story(swarm: Closed) -> None:
        organiser, guest = await swarm.node("organiser"), None
        swarm.invite("guest")
        guest = await swarm.node("guest")
        stranger = await swarm.transport(STRANGER.peer_id)
        await stranger.join_dht(lambda *_: None)

        until_s = time.time() + 60
        key = claim_key(swarm.plan_id, "0")
        own_token = seal_token(STRANGER, swarm.plan_id, STRANGER.peer_id)
        for token in (None, own_token, swarm.invite("guest")):
            data = claim(STRANGER, 1, plan_id=swarm.plan_id, token=token, until=until_s)
            assert not await stranger.store(key, STRANGER.peer_id, data, until_s), "no other node took it"
        for node in (organiser, guest):
            await node.refresh(["0"])
            assert node.trusted.claims["0"] == {}
            for visiting in (OpenDoor(), NewcomerDoor(swarm.plan_id, token=swarm.invite("guest"))):
                with pytest.raises(TurnedAway, match="ask the organiser"):
                    await fetch_blob(
                        stranger, [node.transport.peer_id], swarm.plan_id, max_bytes=1 << 20, door=visiting
                    )
            await greeted_with_nothing(stranger, node)

        await guest.publish_claim("0", PROGRESS)
        await organiser.refresh(["0"])
        assert organiser.trusted.claims["0"].keys() == {guest.identity.peer_id}
        plan = await fetch_blob(
            guest.transport, [organiser.transport.peer_id], swarm.plan_id, max_bytes=1 << 20, door=guest.door
        )
        assert plan == swarm.opened.envelope
        await stranger.close()

    closed(tmp_path, story)


async def greeted_with_nothing(stranger: Any, node: SwarmNode) -> None:
    """Whatever it asks, it gets one refusal of no words, and the end of the stream."""
    stream = await stranger.open_stream(node.transport.peer_id)
    request = wire.Request(wire.RequestKind.BLOB, node.plan_id)
    await stream.write(wire.OPENING + request.to_bytes())
    refusal = wire.GreetingFrame(verdict=wire.Verdict.NOT_ADMITTED).to_bytes()
    assert await stream.read_exactly(len(refusal)) == refusal
    with pytest.raises(StreamClosed):
        await stream.read_exactly(1)
    await stream.close()


def test_strangers_that_say_nothing_use_up_no_members_place(tmp_path: Path) -> None:
    async def story(swarm: Closed) -> None:
        organiser = await swarm.node("organiser")
        swarm.invite("guest")
        guest = await swarm.node("guest")
        silent = []
        for number in range(ServingLimits().streams // 4):
            stranger = await swarm.transport(Identity(bytes([100 + number]) * 32).peer_id)
            silent += [(stranger, await stranger.open_stream(organiser.transport.peer_id)) for _ in range(4)]
        await asyncio.sleep(0)
        fetched = await fetch_blob(
            guest.transport, [organiser.transport.peer_id], swarm.plan_id, max_bytes=1 << 20, door=guest.door
        )
        assert fetched == swarm.opened.envelope
        for stranger, stream in silent:
            await stream.close()
            await stranger.close()

    closed(tmp_path, story)


def test_an_invited_newcomer_gets_the_plan_before_it_knows_it(tmp_path: Path) -> None:
    async def story(swarm: Closed) -> None:
        organiser = await swarm.node("organiser")
        token = swarm.invite("guest")
        transport = await swarm.transport(swarm.home("guest").identity().peer_id)
        visiting = NewcomerDoor(swarm.plan_id, token=token)
        plan = await fetch_blob(
            transport, [organiser.transport.peer_id], swarm.plan_id, max_bytes=1 << 20, door=visiting
        )
        assert plan == swarm.opened.envelope
        blocking = NewcomerDoor(
            swarm.plan_id, token=token, lists=PeerLists(blocked=frozenset({organiser.transport.peer_id}))
        )
        with pytest.raises(Blocked):
            await greet_peer(transport, organiser.transport.peer_id, blocking)
        await transport.close()

    closed(tmp_path, story)


def test_a_revoked_peer_loses_its_open_streams_its_records_and_its_way_in(tmp_path: Path) -> None:
    """R-GRT-5"""

    async def story(swarm: Closed) -> None:
        organiser = await swarm.node("organiser")
        for name in ("guest", "friend"):
            swarm.invite(name)
        guest, friend = await swarm.node("guest"), await swarm.node("friend")
        await guest.publish_claim("0", PROGRESS)
        await friend.refresh(["0"])
        stream = await guest.transport.open_stream(friend.transport.peer_id)
        reader = wire.ResponseReader()
        await stream.write(wire.GreetingFrame(guest.door.greeting()).to_bytes())
        while reader.greeting is None:
            reader.receive(await stream.read_exactly(reader.wants))

        organiser.files.write_notices([swarm.notice(1, guest, message="lent its key")])
        organiser.reload_notices()
        await rounds_until(swarm, lambda node: node.trusted.standing.number == 1, at_most=8)
        with pytest.raises(StreamClosed):
            await stream.read_exactly(1)
        await stream.close()
        assert friend.trusted.claims["0"] == {}
        with pytest.raises(Revoked):
            guest.check_own()
        with pytest.raises(Revoked):
            await guest.publish_claim("0", PROGRESS)
        with pytest.raises(Revoked):
            await greet_peer(friend.transport, guest.transport.peer_id, friend.door)
        with pytest.raises(TurnedAway):
            await greet_peer(guest.transport, friend.transport.peer_id, OpenDoor())
        events = [json.loads(line) for line in (friend.files.path / "events.jsonl").read_text().splitlines()]
        assert [event["message"] for event in events if event["event"] == "notice"] == ["lent its key"]
        assert swarm_status(friend).notice is not None
        assert swarm_status(friend).notice.revoked == (guest.identity.peer_id,)  # type: ignore[union-attr]

    closed(tmp_path, story)


def test_a_revoked_peer_that_asks_learns_from_the_refusal(tmp_path: Path) -> None:
    async def story(swarm: Closed) -> None:
        organiser = await swarm.node("organiser")
        swarm.invite("guest")
        guest = await swarm.node("guest")
        organiser.trusted.feed_notice(swarm.notice(1, guest))
        with pytest.raises((TurnedAway, Revoked)):
            await greet_peer(guest.transport, organiser.transport.peer_id, guest.door)
        assert guest.trusted.standing.revoked == {guest.identity.peer_id}

    closed(tmp_path, story)


@pytest.mark.parametrize("count", [4, 32])
def test_news_reaches_everybody_in_a_few_rounds(tmp_path: Path, count: int) -> None:
    """R-GRT-6"""

    async def story(swarm: Closed) -> None:
        for index in range(count):
            await swarm.node(f"peer-{index}")
        claims = [claim(node.identity, 1, plan_id=swarm.plan_id) for node in swarm.nodes]
        for node in swarm.nodes:
            for data in claims:
                node.trusted.feed_claim(data, time.time())
        swarm.nodes[-1].trusted.feed_notice(swarm.notice(1, state="paused"))
        cheat = Identity(b"c" * 32)
        for node in swarm.nodes:
            node.trusted.feed_claim(claim(cheat, 4, plan_id=swarm.plan_id), time.time())
        swarm.nodes[0].trusted.feed_claim(claim(cheat, 5, plan_id=swarm.plan_id), time.time())
        with pytest.raises(Equivocation):
            swarm.nodes[0].trusted.feed_claim(claim(cheat, 5, plan_id=swarm.plan_id, released=True), time.time())

        def heard(node: SwarmNode) -> bool:
            return node.trusted.standing.state == "paused" and cheat.peer_id in node.trusted.outlaws

        rounds = await rounds_until(swarm, heard, at_most=40)
        assert rounds <= 2 * math.ceil(math.log2(count)) + 2
        for node in swarm.nodes:
            assert cheat.peer_id not in node.trusted.claims["0"]

    closed(tmp_path, story, closed_plan(admission="open"))


def test_what_was_said_and_proven_outlives_the_process(tmp_path: Path) -> None:
    async def story(swarm: Closed) -> None:
        node = await swarm.node("peer")
        cheat = Identity(b"c" * 32)
        proof = (claim(cheat, 5, plan_id=swarm.plan_id), claim(cheat, 5, plan_id=swarm.plan_id, released=True))
        node.trusted.feed_claim(claim(cheat, 4, plan_id=swarm.plan_id), time.time())
        said = greeting(
            notice=swarm.notice(7, state="paused").decode(), proofs=(tuple(data.decode() for data in proof),)
        )
        node.door.admit(STRANGER.peer_id, said)
        await swarm.close(node)

        again = await swarm.node("peer", join=False)
        assert again.trusted.standing.number == 7
        assert again.trusted.outlaws == {cheat.peer_id}
        with pytest.raises(Rollback):
            again.trusted.feed_notice(swarm.notice(6))
        status = swarm_status(again)
        report = status.as_dict()
        assert report["outlaws"] == ({"peer": cheat.peer_id, "kind": "claim", "slot": "0", "seq": 5},)
        assert report["notice"]["state"] == "paused"
        assert status_from_dict(json.loads(json.dumps(report))) == status
        assert again.door.greeting() != b""
        assert Greeting.of_bytes(again.door.greeting()).proofs == (tuple(data.decode() for data in proof),)

    closed(tmp_path, story, closed_plan(admission="open"))


def test_a_forged_proof_on_disk_convicts_nobody(tmp_path: Path) -> None:
    async def story(swarm: Closed) -> None:
        files = swarm.home("peer").swarm(swarm.plan_id)
        one = claim(STRANGER, 5, plan_id=swarm.plan_id)
        files.keep_proof(STRANGER.peer_id, one, one)
        (files.path / "proofs" / "torn.json").write_bytes(b'{"first": ')
        (files.path / "notice.json").write_bytes(b'["not a notice"]')
        node = await swarm.node("peer", join=False)
        assert node.trusted.outlaws == set()
        assert node.trusted.standing.number == 0
        assert [path.name for path in (files.path / "proofs").glob("torn*")] == ["torn.json.corrupt-1"]

    closed(tmp_path, story, closed_plan(admission="open"))


def test_a_notice_written_beside_a_running_node_is_taken_up_and_an_older_one_never_replaces_it(tmp_path: Path) -> None:
    async def story(swarm: Closed) -> None:
        node = await swarm.node("organiser")
        node.files.write_notices([swarm.notice(2, message="two")])
        node.reload_notices()
        assert node.trusted.standing.message == "two"
        node.files.write_notices([swarm.notice(3, message="three")])
        node.door.admit(STRANGER.peer_id, greeting(notice=swarm.notice(1, message="one").decode()))
        node.news.keep()
        assert node.trusted.standing.message == "three"
        assert node.files.notices() == [swarm.notice(3, message="three")]

    closed(tmp_path, story, closed_plan(admission="open"))


def test_own_lists_close_streams_and_refuse_records_on_this_node_only(tmp_path: Path) -> None:
    async def story(swarm: Closed) -> None:
        picky_id = swarm.home("picky").identity().peer_id
        await swarm.node("organiser")
        other = await swarm.node("other")
        picky = await swarm.node("picky", lists=PeerLists(blocked=frozenset({other.identity.peer_id, picky_id})))
        await other.publish_claim("0", PROGRESS)
        await picky.publish_claim("1", PROGRESS)
        for node in swarm.nodes:
            await node.refresh(["0", "1"])
        assert [other.identity.peer_id in node.trusted.claims["0"] for node in swarm.nodes] == [True, True, False]
        assert picky_id in picky.trusted.claims["1"], "a node never refuses itself"
        with pytest.raises(TurnedAway):
            await greet_peer(other.transport, picky.transport.peer_id, other.door)
        with pytest.raises(Blocked):
            await greet_peer(picky.transport, other.transport.peer_id, picky.door)
        await greet_peer(picky.transport, ORGANISER.peer_id, picky.door)

    closed(tmp_path, story, closed_plan(admission="open"))


def test_lists_are_files_of_the_home(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert home.peer_lists() == PeerLists()
    (tmp_path / "block.txt").write_text(f"{STRANGER.peer_id} # no thanks\n")
    more = tmp_path / "more"
    more.write_text(f"{ORGANISER.peer_id}\n")
    assert home.peer_lists(block=more).blocked == {STRANGER.peer_id, ORGANISER.peer_id}
    assert home.peer_lists(allow=more).allowed == {ORGANISER.peer_id}
    (tmp_path / "allow.txt").write_text("# nobody\n")
    assert home.peer_lists().allowed == frozenset()
    (tmp_path / "allow.txt").write_text("bob\n")
    with pytest.raises(HomeError, match=r"allow\.txt: line 1: 'bob' is not a peer id"):
        home.peer_lists()
    with pytest.raises(HomeError, match="cannot be read"):
        Home(tmp_path / "x").peer_lists(block=tmp_path / "missing")


def test_a_store_shared_with_a_closed_swarm_serves_its_files_to_nobody_else(tmp_path: Path) -> None:
    """R-GRT-7"""

    async def story(swarm: Closed) -> None:
        secret = closed_plan()
        node = await swarm.node("both")
        other = await swarm.node("other")
        files = node.home.swarm(secret.plan_id)
        blob = node.store.put_blob(b"weights of the closed swarm")
        files.note_root(blob)
        node.store.put_blob(secret.envelope)
        here = [node.transport.peer_id]
        for digest in (blob, secret.plan_id):
            with pytest.raises(NoSource, match="does not hold"):
                await fetch_blob(other.transport, here, digest, max_bytes=1 << 20, door=other.door)
        assert await fetch_blob(other.transport, here, swarm.plan_id, max_bytes=1 << 20, door=other.door)

    closed(tmp_path, story, closed_plan(admission="open"))


# ---- peers -----------------------------------------------------------------------------------------------------------


def in_swarm(tmp_path: Path, story: Callable[[Swarm], Any]) -> None:
    async def run() -> None:
        swarm = Swarm(tmp_path, make_plan())
        try:
            await story(swarm)
        finally:
            await swarm.close()

    asyncio.run(run())


def say(swarm: Swarm, node: SwarmNode, number: int, state: str, *revoked: SwarmNode) -> None:
    keys = tuple(sorted(other.identity.peer_id for other in revoked))
    notice = Notice.model_validate(
        {"plan": swarm.plan.plan_id, "number": number, "state": state, "revoked": keys, "message": "noon"}
    )
    node.door.admit(STRANGER.peer_id, greeting(notice=seal_notice(ORGANISER, notice).decode()))


def test_a_paused_peer_publishes_gives_its_slot_back_and_goes_on_when_told(tmp_path: Path) -> None:
    """R-NOT-6"""

    async def story(swarm: Swarm) -> None:
        worker = await swarm.join("a", cluster="0")
        await until(worker.is_training)
        worker.open(1)
        await until(lambda: worker.peer.lanes[0].published_step == 1)
        say(swarm, worker.node, 1, "paused")
        await until(lambda: worker.peer.lanes[0].phase == "waiting")
        assert worker.peer.lanes[0].note == "the organiser paused the swarm: noon"
        assert worker.trainers[0].stopped.is_set()
        own = worker.node.identity.peer_id
        assert worker.node.trusted.claims["0"][own].released
        assert own in worker.node.trusted.holdings["0"], "what it published is still held"
        say(swarm, worker.node, 2, "running")
        await until(worker.is_training)
        say(swarm, worker.node, 3, "ended")
        await until(lambda: worker.peer.lanes[0].phase == "finished")
        assert worker.peer.finished
        assert len(worker.trainers) == 2

    in_swarm(tmp_path, story)


def test_a_revoked_peer_stops_training_and_says_why(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        worker = await swarm.join("a", cluster="0")
        await until(worker.is_training)
        say(swarm, worker.node, 1, "running", worker.node)
        assert worker.running is not None
        await until(worker.running.done)
        with pytest.raises(ExceptionGroup) as caught:
            await worker.running
        assert caught.group_contains(Revoked)
        assert worker.trainers[0].stopped.is_set()

    in_swarm(tmp_path, story)
