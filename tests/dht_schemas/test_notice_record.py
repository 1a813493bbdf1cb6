"""What the organiser says while a swarm runs, who may read in whose name, and the greeting that carries both."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas import (
    MAX_GREETING,
    MAX_NOTICE,
    BadSignature,
    Blocked,
    Greeting,
    Identity,
    Invite,
    InviteError,
    MalformedRecord,
    NotAdmitted,
    Notice,
    PeerLists,
    RecordError,
    RecordTooLarge,
    Standing,
    WrongKind,
    WrongPlan,
    WrongSigner,
    canonical_json,
    check_delegation,
    check_token,
    open_notice,
    parse_peer_list,
    payload_type,
    seal,
    seal_delegation,
    seal_notice,
    seal_token,
    standing_of,
)
from paris_swarm.dht_schemas.notice import kept_notices

CAROL = Identity(b"c" * 32)
ADDRESS = f"/ip4/127.0.0.1/tcp/4001/p2p/{CAROL.peer_id}"


def notice(world: Any, **changes: Any) -> Notice:
    values: dict[str, Any] = {"plan": world.opened.plan_id, "number": 1, "state": "running"}
    return Notice(**{**values, **changes})


def sealed(world: Any, **changes: Any) -> bytes:
    return seal_notice(world.organiser, notice(world, **changes))


def opened(world: Any, data: bytes) -> Any:
    return open_notice(world.opened.plan, world.opened.plan_id, data)


# ---- notices ---------------------------------------------------------------------------------------------------------


def test_a_notice_reads_back_as_it_was_signed(world: Any) -> None:
    revoked = tuple(sorted((world.alice.peer_id, world.bob.peer_id)))
    said = notice(world, number=7, state="paused", revoked=revoked, message="disk full, back at noon")
    record, envelope = opened(world, seal_notice(world.organiser, said))
    assert record == said
    assert envelope.signer == world.organiser.peer_id


@pytest.mark.parametrize(
    ("changes", "error", "rule"),
    [
        ({"number": 0}, MalformedRecord, "R-NOT-1"),
        ({"number": 1.0}, MalformedRecord, "R-NOT-1"),
        ({"number": 2**53}, MalformedRecord, "R-ENV-2"),
        ({"state": "stopped"}, MalformedRecord, "R-NOT-1"),
        ({"message": "x" * 501}, MalformedRecord, "R-NOT-1"),
        ({"message": "\x1b[2J"}, MalformedRecord, "R-NOT-1"),
        ({"revoked": ["12D3KooWnobody"]}, MalformedRecord, "R-NOT-1"),
        ({"revoked": [CAROL.peer_id, CAROL.peer_id]}, MalformedRecord, "R-NOT-1"),
        ({"plan": "0" * 64}, WrongPlan, "R-REC-3"),
    ],
)
def test_what_a_notice_may_not_say(world: Any, changes: dict[str, Any], error: type[RecordError], rule: str) -> None:
    payload = {"plan": world.opened.plan_id, "number": 1, "state": "running", "revoked": [], "message": "", **changes}
    data = b'{"number":9007199254740992}' if changes.get("number") == 2**53 else canonical_json(payload)
    with pytest.raises(error) as caught:
        opened(world, world.forge(world.organiser, "notice", data))
    assert caught.value.rule == rule


def test_an_unsorted_list_of_revoked_keys_is_refused(world: Any) -> None:
    backwards = tuple(sorted((world.alice.peer_id, world.bob.peer_id), reverse=True))
    with pytest.raises(ValueError, match="sorted"):
        notice(world, revoked=backwards)


def test_the_organiser_cannot_be_revoked(world: Any) -> None:
    with pytest.raises(MalformedRecord, match="the organiser revokes the organiser"):
        opened(world, sealed(world, revoked=(world.organiser.peer_id,)))


def test_only_the_organiser_signs_notices_and_only_as_notices(world: Any) -> None:
    with pytest.raises(WrongSigner) as caught:
        opened(world, seal_notice(world.alice, notice(world)))
    assert caught.value.rule == "R-NOT-2"
    payload = canonical_json(notice(world).model_dump())
    with pytest.raises(WrongKind):
        opened(world, seal(world.organiser, payload_type("claim"), payload))
    data = sealed(world, message="pause")
    forged = data.replace(data[20:24], b"AAAA")
    with pytest.raises((BadSignature, MalformedRecord)):
        opened(world, forged)


def test_eight_hundred_keys_fit_and_more_than_64_kib_do_not(world: Any) -> None:
    keys = sorted(Identity(n.to_bytes(32, "big")).peer_id for n in range(1, 1025))
    assert len(sealed(world, revoked=tuple(keys[:800]))) <= MAX_NOTICE
    with pytest.raises(ValueError, match="at most 65536"):
        sealed(world, revoked=tuple(keys))
    with pytest.raises(RecordTooLarge) as caught:
        opened(world, b" " * (MAX_NOTICE + 1))
    assert caught.value.rule == "R-ENV-1"


def test_two_notices_of_one_number_count_where_they_are_stricter(world: Any) -> None:
    """R-NOT-4"""
    one = sealed(world, number=3, state="paused", revoked=(world.alice.peer_id,), message="one")
    other = sealed(world, number=3, state="running", revoked=(world.bob.peer_id,), message="other")
    standing = standing_of(kept_notices([opened(world, one), opened(world, other)]))
    assert (standing.number, standing.state, standing.contradicted) == (3, "paused", True)
    assert standing.revoked == {world.alice.peer_id, world.bob.peer_id}
    assert set(standing.message.split(" / ")) == {"one", "other"}
    after = kept_notices([opened(world, one), opened(world, other), opened(world, sealed(world, number=4))])
    assert standing_of(after) == Standing(number=4)


def test_whatever_the_order_every_node_keeps_the_same_notices(world: Any) -> None:
    all_notices = [opened(world, sealed(world, number=2, message=f"{n}")) for n in range(4)]
    all_notices.append(opened(world, sealed(world, number=1, state="ended")))
    found = set()
    for order in itertools.permutations(all_notices):
        kept: tuple[Any, ...] = ()
        for one in order:
            kept = kept_notices((*kept, one))
        found.add(tuple(one.sealed.digest for one in kept))
    assert len(found) == 1
    assert len(found.pop()) == 2


# ---- delegations -----------------------------------------------------------------------------------------------------


def test_a_delegation_names_the_peer_in_whose_name_a_key_reads(world: Any) -> None:
    plan_id = world.invited.plan_id
    lent = seal_delegation(world.alice, plan_id, CAROL.peer_id, world.now + 900)
    assert check_delegation(plan_id, CAROL.peer_id, lent, world.now) == world.alice.peer_id


def test_a_delegation_serves_one_key_one_plan_and_fifteen_minutes(world: Any) -> None:
    plan_id, now = world.invited.plan_id, world.now
    lent = seal_delegation(world.alice, plan_id, CAROL.peer_id, now + 900)
    payload = {"plan": plan_id, "peer": world.bob.peer_id, "observer": CAROL.peer_id, "until": now + 60}
    for plan, observer, text, at in (
        (plan_id, world.bob.peer_id, lent, now),
        (world.opened.plan_id, CAROL.peer_id, lent, now),
        (plan_id, CAROL.peer_id, lent, now + 900),
        (plan_id, CAROL.peer_id, seal_delegation(world.alice, plan_id, CAROL.peer_id, now + 906), now),
        (plan_id, CAROL.peer_id, lent, math.inf),
        (plan_id, CAROL.peer_id, world.forge(world.alice, "delegation", payload).decode(), now),
        (plan_id, CAROL.peer_id, seal_token(world.organiser, plan_id, CAROL.peer_id), now),
        (plan_id, CAROL.peer_id, "\ud800", now),
        (plan_id, CAROL.peer_id, "", now),
    ):
        with pytest.raises(NotAdmitted) as caught:
            check_delegation(plan, observer, text, at)
        assert caught.value.rule == "R-ADM-3"


def test_a_token_is_no_delegation_and_a_delegation_no_token(world: Any) -> None:
    plan_id = world.invited.plan_id
    lent = seal_delegation(world.organiser, plan_id, world.alice.peer_id, world.now + 60)
    with pytest.raises(NotAdmitted):
        check_token(world.invited.plan, plan_id, world.alice.peer_id, lent)


# ---- a node's own lists ----------------------------------------------------------------------------------------------


def test_lists_block_some_or_allow_only_some(world: Any) -> None:
    alice, bob, organiser = (one.peer_id for one in (world.alice, world.bob, world.organiser))
    PeerLists().check(alice)
    blocking = PeerLists(blocked=frozenset({alice, organiser}), always=frozenset({organiser}))
    blocking.check(bob)
    blocking.check(organiser)
    with pytest.raises(Blocked, match="block list") as caught:
        blocking.check(alice)
    assert caught.value.rule == "R-LIST-1"
    allowing = PeerLists(allowed=frozenset({alice, bob}), blocked=frozenset({bob}))
    allowing.check(alice)
    for refused in (bob, organiser):
        with pytest.raises(Blocked):
            allowing.check(refused)
    with pytest.raises(Blocked, match="not on the allow list"):
        PeerLists(allowed=frozenset()).check(alice)


def test_a_list_is_one_peer_a_line_with_comments(world: Any) -> None:
    text = f"# friends\n\n{world.alice.peer_id}\n  {world.bob.peer_id}  # bob\n"
    assert parse_peer_list(text) == {world.alice.peer_id, world.bob.peer_id}
    assert parse_peer_list("# nobody\n") == frozenset()
    with pytest.raises(ValueError, match="line 2: 'alice' is not a peer id"):
        parse_peer_list(f"{world.alice.peer_id}\nalice\n")


# ---- invites into a closed swarm -------------------------------------------------------------------------------------


def test_an_invite_carries_its_token_and_says_for_whom_it_is(world: Any) -> None:
    token = seal_token(world.organiser, world.invited.plan_id, CAROL.peer_id)
    link = str(Invite(world.invited.plan_id, (ADDRESS,), token))
    assert link.isascii()
    assert Invite.parse(f' "{link}"\n') == Invite(world.invited.plan_id, (ADDRESS,), token)
    assert Invite.parse(link).made_for == CAROL.peer_id
    assert Invite.parse(link.partition("&token")[0]).made_for is None
    assert Invite.parse(str(Invite(world.invited.plan_id, (), token))).token == token


def test_the_largest_record_of_a_closed_swarm_fits_with_both_tokens(world: Any) -> None:
    plan_id, largest = world.invited.plan_id, 2**53 - 1
    tokens = {who.peer_id: seal_token(world.organiser, plan_id, who.peer_id) for who in (world.alice, world.bob)}
    announcement = world.announcement(
        plan=plan_id, slot="router", seq=largest, step=largest, parent="a" * 64, bytes=largest,
        probe_loss=-1.2345678901234567e-300, token=tokens[world.alice.peer_id],
    ).seal(world.alice)  # fmt: skip
    holding = world.holding(
        world.bob, announcement, plan=plan_id, slot="router", seq=largest, until=world.now + 0.123456,
        token=tokens[world.bob.peer_id],
    ).seal(world.bob)  # fmt: skip
    assert len(holding) <= 4096


def test_a_damaged_token_is_named(world: Any) -> None:
    plan_id = world.invited.plan_id
    link = str(Invite(plan_id, (ADDRESS,), seal_token(world.organiser, plan_id, CAROL.peer_id)))
    for damaged in (link[:-9], link[:-30] + "AAAA" + link[-26:], link + "*", link + "&token=AAAA", link + "\xe4"):
        with pytest.raises(InviteError):
            Invite.parse(damaged)
    with pytest.raises(InviteError, match="its token admits to plan"):
        Invite(world.opened.plan_id, (), seal_token(world.organiser, plan_id, CAROL.peer_id))


@given(st.text(max_size=300))
def test_any_text_as_a_token_gives_an_invite_or_an_invite_error(text: str) -> None:
    try:
        Invite.parse(f"paris:{'0' * 64}?token={text}")
    except InviteError:
        return
    raise AssertionError("nobody signed that")


# ---- the greeting ----------------------------------------------------------------------------------------------------


@given(
    st.booleans(),
    st.one_of(st.none(), st.text(max_size=50).filter(lambda text: text.isascii())),
    st.lists(st.tuples(st.just("{}"), st.just("[]")), max_size=4),
)
def test_a_greeting_reads_back(named: bool, token: str | None, proofs: list[tuple[str, str]]) -> None:
    greeting = Greeting(plan="0" * 64 if named else None, token=token, proofs=tuple(proofs))
    assert Greeting.of_bytes(greeting.to_bytes()) == greeting


def test_nothing_to_say_is_no_bytes() -> None:
    assert Greeting().to_bytes() == b""
    assert Greeting.of_bytes(b"") == Greeting()


def test_the_largest_greeting_fits(world: Any) -> None:
    keys = sorted(Identity(n.to_bytes(32, "big")).peer_id for n in range(1, 830))
    largest = sealed(world, revoked=tuple(keys), message="é" * 500).decode()
    while len(largest) < MAX_NOTICE:
        largest += "x"
    full = Greeting(
        plan="0" * 64,
        token='"' * 300,
        delegation=largest[:4096],
        notice=largest,
        proofs=((largest[:4096], largest[:4096]),) * 4,
    )
    assert len(full.to_bytes()) <= MAX_GREETING
    with pytest.raises(ValueError, match="at most 131072"):
        Greeting(notice='"' * MAX_NOTICE, delegation='"' * 4096).to_bytes()


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b" " * (MAX_GREETING + 1), "R-GRT-1"),
        (b'{"plan": null}', "R-GRT-2"),
        (b'{"plan":"x"}', "R-GRT-2"),
        (b"[]", "R-GRT-2"),
        (b'{"proofs":[["a"]]}', "R-GRT-2"),
        (b'{"proofs":[["a","b"],["a","b"],["a","b"],["a","b"],["a","b"]]}', "R-GRT-2"),
        (b'{"notice":1}', "R-GRT-2"),
        (b'{"plan":null,"plan":null}', "R-ENV-2"),
        (b"\xff", "R-ENV-2"),
    ],
)
def test_what_is_no_greeting(data: bytes, rule: str) -> None:
    with pytest.raises((MalformedRecord, RecordTooLarge)) as caught:
        Greeting.of_bytes(data)
    assert caught.value.rule == rule


@given(st.binary(max_size=300))
def test_rubbish_is_refused_as_a_record_error(data: bytes) -> None:
    try:
        greeting = Greeting.of_bytes(data)
    except RecordError:
        return
    assert greeting.to_bytes() == data or b"null" in data or data in (b"{}",)
