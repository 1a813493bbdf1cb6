"""Forged, misplaced, endless and oversized records, offered to real nodes by a node without validators.

Each docstring is a row of docs/attacks.md: the attack, the rule that refuses it, what honest peers still see.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from arena import Arena, Stage, forge, pack
from fixture_types import NamedRule, Timed

from paris_swarm.dht_schemas.dht_rules import check_store, claim_key, dht_id
from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.identity import Identity


def play(
    stage: Stage, timed: Timed, named_rule: NamedRule, offers: dict[str, tuple[Any, ...]], *, packed: bool = True
) -> None:
    """Offer each (key, subkey, value, expiration) to both full peers; all refused, and the honest claim is read."""
    arena = stage.arena
    for key, subkey, value, until in offers.values() if packed else ():
        with pytest.raises(RecordError) as caught:
            check_store(
                {arena.opened.plan_id: arena.opened.plan},
                dht_id=dht_id(key),
                subkey=subkey,
                value=value,
                expiration=until,
                now=time.time(),
            )
        named_rule(caught.value)

    async def scenario() -> None:
        with timed():
            for what, (key, subkey, value, until) in offers.items():
                for target in (arena.alice, arena.bob):
                    answer = await arena.rogue.offer(target, key, subkey, value, until, packed=packed)
                    assert answer is False, what
            await arena.check_honest_claim(stage)

    arena.run(scenario())


def test_forged_signer(stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: forged signer: a later claim in alice's name, signed by mallory's key, or with alice's key id pasted in
    Rule: R-REC-2 (WrongSigner), R-DHT-4 (WrongSigner), R-ENV-5 (BadSignature)
    Seen: alice's own claim, unchanged
    """
    arena = stage.arena
    alice, mallory = arena.alice.identity.peer_id, arena.mallory
    later = stage.claim.model_copy(update={"seq": stage.claim.seq + 1, "until": stage.claim.until + 10})
    signed = forge(mallory, "claim", later.model_dump())
    pasted = signed.replace(mallory.peer_id.encode(), alice.encode(), 1)
    assert pasted != signed
    offers = {
        name: (stage.key, subkey, value, later.until)
        for name, subkey, value in [
            ("mallory's signature, alice's subkey", alice, signed),
            ("mallory's signature, her own subkey", mallory.peer_id, signed),
            ("alice's key id over mallory's signature", alice, pasted),
        ]
    }
    play(stage, timed, named_rule, offers)


def test_wrong_plan(stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: wrong plan: a valid claim of another swarm, under this swarm's key and under its own
    Rule: R-REC-3 (WrongPlan), R-DHT-7
    Seen: alice's claim; nodes store nothing for plans they do not know
    """
    claim = stage.arena.claim(stage.slot, plan="f" * 64)
    value, me = claim.seal(stage.arena.mallory), stage.arena.mallory.peer_id
    offers = {
        "under this plan's key": (stage.key, me, value, claim.until),
        "under its own key": (claim_key("f" * 64, stage.slot), me, value, claim.until),
    }
    play(stage, timed, named_rule, offers)


def test_wrong_slot(stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: wrong slot: a claim of one slot under another slot's key, and of a slot that the plan does not have
    Rule: R-DHT-3 (WrongKey), R-REC-4 (WrongSlot)
    Seen: alice's claim; the slot shows no stranger
    """
    arena, me = stage.arena, stage.arena.mallory.peer_id
    other, none = arena.claim("router"), arena.claim("1000")
    offers = {
        "another slot's": (stage.key, me, other.seal(arena.mallory), other.until),
        "a slot that is none": (claim_key(arena.opened.plan_id, "1000"), me, none.seal(arena.mallory), none.until),
    }
    play(stage, timed, named_rule, offers)


def test_subkey_of_another(stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: subkey of another: mallory's own valid claim in alice's subkey, later than hers
    Rule: R-DHT-4 (WrongSigner)
    Seen: alice's claim in alice's subkey
    """
    claim = stage.arena.claim(stage.slot, until=stage.claim.until + 5)
    value = claim.seal(stage.arena.mallory)
    play(stage, timed, named_rule, {"hers": (stage.key, stage.arena.alice.identity.peer_id, value, claim.until)})


def test_plain_value_under_a_claims_key(stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: plain value under a claims key: in hivemind it replaces the whole dictionary of claims
    Rule: R-DHT-2 (WrongKey)
    Seen: every claim that was there
    """
    end = stage.claim.until + 30
    mine = stage.arena.claim(stage.slot, until=end).seal(stage.arena.mallory)
    play(
        stage, timed, named_rule, {"rubbish": (stage.key, None, b"gone", end), "a claim": (stage.key, None, mine, end)}
    )


def test_junk_subkey_on_a_seed(stage: Stage, timed: Timed) -> None:
    """
    Attack: junk subkey on a seed: a seed without validators keeps rubbish beside alice's claim; a plain hivemind
    reader throws the whole dictionary away
    Rule: R-DHT-2, R-DHT-1 (WrongKey, MalformedRecord); each record is judged by itself
    Seen: alice's claim, also out of the poisoned dictionary
    """
    arena = stage.arena
    end, alice = stage.claim.until, arena.alice.identity.peer_id
    junk: list[tuple[object, bytes, float]] = [
        ("junk", pack(b"rubbish"), end + 1),
        (7, pack(b"rubbish"), end + 2),
        (b"bytes", pack(b"rubbish"), end + 3),
        (arena.mallory.peer_id, b"\xc1not msgpack", end + 4),
        (alice, pack(stage.envelope), end),
    ]

    async def scenario() -> None:
        with arena.rogue.answering(junk), timed():
            await arena.rogue.meet(arena.bob, arena.carol)
            answer = await arena.carol.transport._records.node.protocol.call_find(  # type: ignore[attr-defined]
                arena.rogue.node.peer_id, [place]
            )
            poisoned = answer[place][0].value
            assert {subkey for subkey, _item in poisoned.items()} == {alice}, "only the valid part is kept"
            await arena.check_honest_claim(stage)
            assert set(await arena.carol.transport.get(stage.key)) == {alice}

    from hivemind.dht.routing import DHTID

    place = DHTID.generate(stage.key)
    arena.run(scenario())


def test_expiration_without_end(stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: expiration 1e18, infinity, NaN: a record for ever, or one that no comparison can replace
    Rule: R-REC-6 (LeaseTooLong), R-DHT-5 (LeaseMismatch)
    Seen: alice's claim; leases of at most 900 s
    """
    arena, me = stage.arena, stage.arena.mallory.peer_id
    good = arena.claim(stage.slot)
    value = good.seal(arena.mallory)
    endless = forge(arena.mallory, "claim", {**good.model_dump(), "until": 1e15})
    ends = {"1e18": 1e18, "infinity": math.inf, "NaN": math.nan, "minus infinity": -math.inf, "901 s": 0.0}
    ends["901 s"] = time.time() + 960
    offers: dict[str, tuple[Any, ...]] = {name: (stage.key, me, value, end) for name, end in ends.items()}
    offers["signed so"] = (stage.key, me, endless, 1e15)
    play(stage, timed, named_rule, offers)


def test_lease_that_ended_a_second_ago(stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: lease ended 1 s ago: signed and stored with an end in the past, or stored with a later end than signed
    Rule: R-REC-5 (LeaseExpired), R-DHT-5 (LeaseMismatch)
    Seen: alice's claim
    """
    arena, me = stage.arena, stage.arena.mallory.peer_id
    over = arena.claim(stage.slot, until=time.time() - 1).seal(arena.mallory)
    past, ahead = time.time() - 1, time.time() + 60
    play(stage, timed, named_rule, {"past": (stage.key, me, over, past), "stretched": (stage.key, me, over, ahead)})


def test_record_of_1_mib(stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: 1 MiB record: a claim blown up with an unknown field, and a megabyte of nothing
    Rule: R-ENV-1 (RecordTooLarge): refused before it is parsed
    Seen: alice's claim
    """
    arena, me = stage.arena, stage.arena.mallory.peer_id
    claim = arena.claim(stage.slot)
    blown = forge(arena.mallory, "claim", {**claim.model_dump(), "note": "x" * (1 << 20)})
    offers = {
        "blown up": (stage.key, me, blown, claim.until),
        "nothing": (stage.key, me, bytes(1 << 20), claim.until),
    }
    play(stage, timed, named_rule, offers)


def test_four_subkeys_of_1_mib(stage: Stage, timed: Timed) -> None:
    """
    Attack: four subkeys of 1 MiB: an answer over 4 MiB is never delivered by hivemind, so the key would become
    unreadable; offered to honest nodes, and served by a rogue one
    Rule: R-ENV-1 (RecordTooLarge); the rogue's silence costs a reader its answer only
    Seen: alice's claim, from the honest nodes
    """
    arena, end = stage.arena, time.time() + 60
    subkeys = [Identity.generate().peer_id for _ in range(4)]

    async def scenario() -> None:
        with timed():
            for subkey in subkeys:
                for target in (arena.alice, arena.bob):
                    assert await arena.rogue.offer(target, stage.key, subkey, bytes(1 << 20), end) is False
            with arena.rogue.answering([(subkey, pack(bytes(1 << 20)), end) for subkey in subkeys]):
                await arena.rogue.meet(arena.bob, arena.carol)
                await arena.check_honest_claim(stage)

    arena.run(scenario())


def test_numbers_beyond_the_protocol(stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: huge and strange numbers: a sequence of 2^53, of 10^5000, of -0.0, true for 1, NaN as a loss
    Rule: R-ENV-2, R-REC-1 (MalformedRecord)
    Seen: alice's claim; no number reaches a reader that another language would read differently
    """
    arena, me = stage.arena, stage.arena.mallory.peer_id
    claim = arena.claim(stage.slot)
    text = json.dumps(claim.model_dump())
    seq = f'"seq": {claim.seq}'
    assert seq in text and '"loss": 0.25' in text
    changes = {
        "2^53": text.replace(seq, f'"seq": {2**53}'),
        "10^5000": text.replace(seq, '"seq": 1' + "0" * 900),
        "-0.0": text.replace(seq, '"seq": -0.0'),
        "true": text.replace(seq, '"seq": true'),
        "1e999": text.replace(seq, '"seq": 1e999'),
        "NaN": text.replace('"loss": 0.25', '"loss": NaN'),
        "minus infinity": text.replace('"loss": 0.25', '"loss": -Infinity'),
        "a name twice": text.replace(seq, f'"seq": 1, {seq}'),
    }
    offers = {
        what: (stage.key, me, forge(arena.mallory, "claim", changed.encode()), claim.until)
        for what, changed in changes.items()
    }
    play(stage, timed, named_rule, offers)


def test_unicode_tricks_in_names(stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: unicode tricks: full-width or Arabic digits and zero-width spaces in a slot, look-alike letters in a peer
    id, terminal escapes and right-to-left overrides in a device name
    Rule: R-REC-1, R-KEY-1 (MalformedRecord), R-DHT-4 (WrongSigner)
    Seen: alice's claim; nothing of it reaches a terminal
    """
    arena, me = stage.arena, stage.arena.mallory.peer_id
    payload = arena.claim(stage.slot).model_dump()
    lookalike = me.replace("K", "\u212a", 1)  # the Kelvin sign
    assert lookalike != me
    tricks: dict[str, dict[str, Any]] = {
        "full-width digit": {"slot": "\uff10"},
        "Arabic digit": {"slot": "\u0661"},
        "zero width": {"slot": stage.slot + "\u200b"},
        "line end": {"slot": stage.slot + "\n"},
        "leading zero": {"slot": "0" + stage.slot},
        "look-alike": {"peer": lookalike},
        "escape": {"progress": {**payload["progress"], "device": "\x1b[2Jcpu"}},
        "override": {"progress": {**payload["progress"], "device": "\u202eupc"}},
    }
    offers = {
        what: (stage.key, me, forge(arena.mallory, "claim", {**payload, **change}), payload["until"])
        for what, change in tricks.items()
    }
    offers["look-alike subkey"] = (stage.key, lookalike, arena.claim(stage.slot).seal(arena.mallory), payload["until"])
    play(stage, timed, named_rule, offers)


def test_another_kind_of_record(arena: Arena, stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: another kind: an announcement, an admission token or a plan stored where claims lie
    Rule: R-ENV-4 (WrongKind), R-DHT-3 (WrongKey)
    Seen: alice's claim; the DHT carries claims and holdings and nothing else
    """
    me, end = arena.mallory.peer_id, time.time() + 60
    announcement = arena.announcement(stage.slot).seal(arena.mallory)
    holding = arena.holding(stage.slot, announcement)
    offers = {
        "announcement": (stage.key, me, announcement, end),
        "token": (stage.key, me, forge(arena.mallory, "admission", {"plan": "a" * 64, "peer": me}), end),
        "plan": (stage.key, me, forge(arena.mallory, "plan", {"name": "x"}), end),
        "holding": (stage.key, me, holding.seal(arena.mallory), holding.until),
        "lock": (stage.key, me, forge(arena.mallory, "lock", {"v": 1}), end),
    }
    play(stage, timed, named_rule, offers)


def test_bytes_that_no_msgpack_reader_likes(stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: hostile msgpack: unused type bytes, a map of four billion entries, deep nesting, foreign extension types
    Rule: R-DHT-1 (MalformedRecord)
    Seen: alice's claim; the nodes that were fed live on
    """
    me, end = stage.arena.mallory.peer_id, time.time() + 60
    raw = [b"\xc1", b"", b"\xdf\xff\xff\xff\xff", b"\x91" * 500, b"\xc7\x05\x50hello", b"\xc6\xff\xff\xff\xff"]
    play(stage, timed, named_rule, {repr(data[:6]): (stage.key, me, data, end) for data in raw}, packed=False)
    assert stage.arena.alice.transport.alive() and stage.arena.bob.transport.alive()
