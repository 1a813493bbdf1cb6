"""The trusted set: order of checks, sequences, proofs; and that nothing refused leaves a trace."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from paris_swarm.dht_schemas import (
    BadHeader,
    BadManifest,
    BadSignature,
    DigestMismatch,
    Equivocation,
    Identity,
    LeaseExpired,
    LeaseTooLong,
    NotAdmitted,
    NotFinite,
    ProbeFailed,
    RecordError,
    Rollback,
    TrustedSwarm,
    WrongPlan,
    WrongSlot,
    blake3_hex,
    canonical_json,
    seal_token,
)


@pytest.fixture
def swarm(world: Any) -> TrustedSwarm:
    return TrustedSwarm(world.opened)


def manifest_bytes(**changes: Any) -> bytes:
    files = changes.pop("files", {"ema.safetensors": 400, "model.safetensors": 590, "state.json": 10})
    values = {
        "v": 1,
        "kind": "expert",
        "slot": "0",
        "files": [{"name": name, "length": length, "chunks": ["c" * 64]} for name, length in sorted(files.items())],
        "meta": {"step": 50, "parent": None},
    }
    return canonical_json({**values, **changes})


# ---- what is accepted ------------------------------------------------------------------------------------------------


def test_claims_and_holdings_are_kept_by_slot_and_peer(world: Any, swarm: TrustedSwarm) -> None:
    claim, holding = world.claim(), world.holding(world.bob)
    assert swarm.feed_claim(claim.seal(world.alice), world.now) == claim
    assert swarm.feed_holding(holding.seal(world.bob), world.now) == (holding, world.announcement())
    assert swarm.claims["0"] == {world.alice.peer_id: claim}
    assert swarm.holdings["0"] == {world.bob.peer_id: (holding, world.announcement())}
    assert set(swarm.claims) == set(swarm.holdings) == set(world.opened.plan.slots)
    assert {key: seq for key, (seq, _) in swarm.highest.items()} == {
        (world.alice.peer_id, "claim", "0"): 10,
        (world.alice.peer_id, "checkpoint", "0"): 10,
        (world.bob.peer_id, "holding", "0"): 10,
    }


def test_newer_records_replace_older_ones_and_leases_end(world: Any, swarm: TrustedSwarm) -> None:
    swarm.feed_claim(world.claim().seal(world.alice), world.now)
    swarm.feed_claim(world.claim(seq=11, released=True, until=world.now + 70).seal(world.alice), world.now)
    assert swarm.claims["0"][world.alice.peer_id].released
    swarm.feed_holding(world.holding().seal(world.alice), world.now)
    swarm.expire(world.now + 65)
    assert list(swarm.claims["0"]) == [world.alice.peer_id]
    assert swarm.holdings["0"] == {}
    swarm.expire(world.now + 70)
    assert swarm.claims["0"] == {}
    assert len(swarm.highest) == 3


def test_the_same_bytes_may_come_again(world: Any, swarm: TrustedSwarm) -> None:
    data, holding = world.claim().seal(world.alice), world.holding(world.bob).seal(world.bob)
    for _ in range(3):
        swarm.feed_claim(data, world.now)
        swarm.feed_holding(holding, world.now)
    again = TrustedSwarm(world.opened, swarm.highest)
    again.feed_claim(data, world.now)
    again.feed_holding(holding, world.now)
    assert again.claims == swarm.claims
    assert not again.proofs


def test_a_checkpoint_from_holding_to_probe(world: Any, swarm: TrustedSwarm) -> None:
    data = manifest_bytes()
    announcement = world.announcement(root=blake3_hex(data))
    swarm.feed_holding(world.holding(world.bob, announcement.seal(world.alice)).seal(world.bob), world.now)
    manifest = swarm.feed_manifest(announcement, data)
    assert manifest.total_bytes == 1000
    entries = [("w", [2, 3], [0, 24]), ("b", [3], [24, 36])]
    text = canonical_json(
        {name: {"dtype": "F32", "shape": shape, "data_offsets": span} for name, shape, span in entries}
    )
    head = len(text).to_bytes(8, "little") + text
    swarm.feed_header("0", "ema.safetensors", head, len(head) + 36)
    swarm.feed_probe(announcement, 0.2510)
    swarm.feed_probe(announcement, 0.2476, bar="resumable")


# ---- sequences -------------------------------------------------------------------------------------------------------


def test_rollback_of_a_claim_and_of_a_holding(world: Any, swarm: TrustedSwarm) -> None:
    old_claim, old_holding = world.claim(seq=9).seal(world.alice), world.holding(seq=9).seal(world.alice)
    swarm.feed_claim(old_claim, world.now)
    swarm.feed_claim(world.claim().seal(world.alice), world.now)
    swarm.feed_holding(world.holding().seal(world.alice), world.now)
    for feed, data in ((swarm.feed_claim, old_claim), (swarm.feed_holding, old_holding)):
        with pytest.raises(Rollback):
            feed(data, world.now)
    restarted = TrustedSwarm(world.opened, swarm.highest)
    with pytest.raises(Rollback):
        restarted.feed_claim(old_claim, world.now)
    assert swarm.claims["0"][world.alice.peer_id].seq == 10


def test_sequences_of_other_slots_kinds_and_signers_are_their_own(world: Any, swarm: TrustedSwarm) -> None:
    swarm.feed_claim(world.claim(seq=100).seal(world.alice), world.now)
    swarm.feed_claim(world.claim(seq=1, slot="1").seal(world.alice), world.now)
    swarm.feed_claim(world.claim(world.bob, seq=1).seal(world.bob), world.now)
    swarm.feed_holding(world.holding(seq=1).seal(world.alice), world.now)


def test_an_earlier_checkpoint_may_be_kept_alive_by_another_holder(world: Any, swarm: TrustedSwarm) -> None:
    """The author announces a second checkpoint and vanishes before anybody has it: the first one, which bob has, must
    still count.
    """
    first, second = world.announcement(seq=10), world.announcement(seq=20, root="e" * 64)
    swarm.feed_holding(world.holding(world.alice, second.seal(world.alice)).seal(world.alice), world.now)
    swarm.feed_holding(world.holding(world.bob, first.seal(world.alice)).seal(world.bob), world.now)
    assert swarm.holdings["0"][world.bob.peer_id][1] == first
    assert swarm.highest[(world.alice.peer_id, "checkpoint", "0")][0] == 20


def test_the_same_step_with_another_root_under_a_later_sequence_is_a_legal_resume(
    world: Any, swarm: TrustedSwarm
) -> None:
    swarm.feed_holding(world.holding().seal(world.alice), world.now)
    resumed = world.announcement(seq=11, root="e" * 64).seal(world.alice)
    swarm.feed_holding(world.holding(world.alice, resumed, seq=11).seal(world.alice), world.now)
    assert not swarm.proofs


def test_equivocation_in_claims(world: Any, swarm: TrustedSwarm) -> None:
    one, two = world.claim().seal(world.alice), world.claim(until=world.now + 50).seal(world.alice)
    swarm.feed_claim(one, world.now)
    swarm.feed_holding(world.holding(world.bob).seal(world.bob), world.now)
    with pytest.raises(Equivocation) as caught:
        swarm.feed_claim(two, world.now)
    assert caught.value.rule == "R-SET-3"
    proof = swarm.proofs[0]
    assert (proof.signer, proof.kind, proof.slot, proof.seq) == (world.alice.peer_id, "claim", "0", 10)
    assert (proof.first, proof.second) == (one, two)
    assert swarm.claims["0"] == {}
    assert swarm.holdings["0"] == {}, "a checkpoint that the outlaw made no longer counts, whoever holds it"
    for feed, data in (
        (swarm.feed_claim, one),
        (swarm.feed_claim, world.claim(seq=99, slot="1").seal(world.alice)),
        (swarm.feed_holding, world.holding(world.bob, seq=11).seal(world.bob)),
    ):
        with pytest.raises(Equivocation) as caught:
            feed(data, world.now)
        assert caught.value.rule == "R-SET-4"
    assert len(swarm.proofs) == 1
    swarm.feed_claim(world.claim(world.bob).seal(world.bob), world.now)


def test_equivocation_after_a_restart(world: Any, swarm: TrustedSwarm) -> None:
    swarm.feed_claim(world.claim().seal(world.alice), world.now)
    restarted = TrustedSwarm(world.opened, swarm.highest)
    with pytest.raises(Equivocation):
        restarted.feed_claim(world.claim(until=world.now + 50).seal(world.alice), world.now)
    assert restarted.proofs[0].first is None
    known = TrustedSwarm(world.opened, restarted.highest, outlaws=restarted.outlaws)
    with pytest.raises(Equivocation):
        known.feed_claim(world.claim(seq=11).seal(world.alice), world.now)


def test_two_roots_shown_to_two_holders(world: Any, swarm: TrustedSwarm) -> None:
    one, two = (world.announcement(root=root * 64).seal(world.alice) for root in "de")
    swarm.feed_holding(world.holding(world.bob, one).seal(world.bob), world.now)
    carol = Identity(b"c" * 32)
    with pytest.raises(Equivocation):
        swarm.feed_holding(world.holding(carol, two).seal(carol), world.now)
    assert swarm.proofs[0].kind == "checkpoint"
    assert swarm.outlaws == {world.alice.peer_id}
    with pytest.raises(Equivocation):
        swarm.feed_holding(world.holding(world.bob, one).seal(world.bob), world.now)
    bobs_own = world.announcement(world.bob).seal(world.bob)
    swarm.feed_holding(world.holding(world.bob, bobs_own, seq=11).seal(world.bob), world.now)


def test_two_roots_under_an_older_sequence(world: Any, swarm: TrustedSwarm) -> None:
    old, other = (world.announcement(seq=5, root=root * 64).seal(world.alice) for root in "de")
    swarm.feed_holding(world.holding(world.bob, old).seal(world.bob), world.now)
    newest = world.announcement(seq=6).seal(world.alice)
    swarm.feed_holding(world.holding(world.alice, newest).seal(world.alice), world.now)
    carol = Identity(b"c" * 32)
    with pytest.raises(Equivocation):
        swarm.feed_holding(world.holding(carol, other).seal(carol), world.now)
    assert (swarm.proofs[0].first, swarm.proofs[0].second) == (old, other)


def test_nobody_can_frame_another_peer(world: Any, swarm: TrustedSwarm) -> None:
    swarm.feed_claim(world.claim().seal(world.alice), world.now)
    framed = {**world.claim().model_dump(), "until": world.now + 50}
    with pytest.raises(RecordError):
        swarm.feed_claim(world.forge(world.bob, "claim", framed), world.now)
    assert not swarm.outlaws
    swarm.feed_claim(world.claim(seq=11).seal(world.alice), world.now)


# ---- refusals leave no trace -----------------------------------------------------------------------------------------


def test_refused_claims(world: Any, swarm: TrustedSwarm) -> None:
    for error, data in (
        (WrongPlan, world.claim(plan="d" * 64).seal(world.alice)),
        (WrongSlot, world.claim(slot="3").seal(world.alice)),
        (LeaseTooLong, world.claim(until=world.now + 906).seal(world.alice)),
        (LeaseExpired, world.claim(until=world.now).seal(world.alice)),
        (BadSignature, world.claim().seal(world.alice).replace(b'"sig":"', b'"sig":"AAAA')[:-9] + b'=="}]}'),
    ):
        with pytest.raises(RecordError) as caught:
            swarm.feed_claim(data, world.now)
        if error is not BadSignature:
            assert type(caught.value) is error
    assert swarm.highest == {}
    assert all(not claims for claims in swarm.claims.values())


def test_a_closed_swarm(world: Any) -> None:
    swarm = TrustedSwarm(world.invited)
    plan_id = world.invited.plan_id
    with pytest.raises(NotAdmitted):
        swarm.feed_claim(world.claim(plan=plan_id).seal(world.alice), world.now)
    token = seal_token(world.organiser, plan_id, world.alice.peer_id)
    swarm.feed_claim(world.claim(plan=plan_id, token=token).seal(world.alice), world.now)


def test_fifty_sybils_in_a_closed_swarm(world: Any) -> None:
    swarm = TrustedSwarm(world.invited)
    for number in range(50):
        sybil = Identity(bytes([number]) * 32)
        token = seal_token(sybil, world.invited.plan_id, sybil.peer_id)
        with pytest.raises(NotAdmitted):
            swarm.feed_claim(world.claim(sybil, plan=world.invited.plan_id, token=token).seal(sybil), world.now)
    assert swarm.highest == {}


@given(st.binary(max_size=200))
def test_arbitrary_bytes_leave_no_trace(world: Any, data: bytes) -> None:
    swarm = TrustedSwarm(world.opened)
    announcement = world.announcement()
    for feed in (
        lambda: swarm.feed_claim(data, world.now),
        lambda: swarm.feed_holding(data, world.now),
        lambda: swarm.feed_manifest(announcement, data),
        lambda: swarm.feed_header("0", "model.safetensors", data, len(data)),
    ):
        with pytest.raises(RecordError):
            feed()
    assert swarm.highest == {}


# ---- manifest, header, probe -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "rule_number"),
    [
        ({"slot": "1"}, "R-MAN-6"),
        ({"meta": {"step": 51, "parent": None}}, "R-MAN-6"),
        ({"meta": {"step": 50, "parent": "a" * 64}}, "R-MAN-6"),
        ({"files": {"ema.safetensors": 400, "model.safetensors": 590, "state.json": 11}}, "R-MAN-6"),
        ({"files": {"ema.safetensors": 400, "state.json": 600}}, "R-MAN-7"),
        ({"files": {"ema.safetensors": 400, "model.safetensors": 590, "model.pt": 10}}, "R-MAN-7"),
        ({"files": {"ema.safetensors": 400, "model.safetensors": 590, "z.safetensors": 10}}, "R-MAN-7"),
        ({"files": {"ema.safetensors": 10_000_000, "model.safetensors": 590}}, "R-MAN-1"),
    ],
)
def test_manifests_that_are_not_the_announced_checkpoint(
    world: Any, swarm: TrustedSwarm, changes: dict[str, Any], rule_number: str
) -> None:
    data = manifest_bytes(**changes)
    with pytest.raises(BadManifest) as caught:
        swarm.feed_manifest(world.announcement(root=blake3_hex(data)), data)
    assert caught.value.rule == rule_number


def test_a_manifest_of_another_root_plan_or_slot(world: Any, swarm: TrustedSwarm) -> None:
    data = manifest_bytes()
    root = blake3_hex(data)
    with pytest.raises(DigestMismatch):
        swarm.feed_manifest(world.announcement(), data)
    with pytest.raises(WrongPlan):
        swarm.feed_manifest(world.announcement(root=root, plan="d" * 64), data)
    with pytest.raises(WrongSlot):
        swarm.feed_manifest(world.announcement(root=root, slot="9"), data)


def test_headers_of_files_that_the_plan_does_not_know(world: Any, swarm: TrustedSwarm) -> None:
    with pytest.raises(WrongSlot):
        swarm.feed_header("9", "model.safetensors", b"", 0)
    with pytest.raises(BadManifest):
        swarm.feed_header("0", "other.safetensors", b"", 0)
    with pytest.raises(BadHeader):
        swarm.feed_header("0", "model.safetensors", b"", 0)


@pytest.mark.parametrize(
    ("announced", "measured", "bar", "error"),
    [
        (0.25, 0.2526, "assemblable", ProbeFailed),
        (0.25, 0.2474, "assemblable", ProbeFailed),
        (0.25, math.nan, "assemblable", NotFinite),
        (0.25, math.inf, "resumable", NotFinite),
        (0.5, 0.5, "assemblable", ProbeFailed),
        (0.6, 0.6, "assemblable", ProbeFailed),
        (0.6, 0.6, "resumable", None),
        (1.0, 1.0, "resumable", ProbeFailed),
        (0.0, 1e-9, "resumable", ProbeFailed),
        (0.0, 0.0, "assemblable", None),
    ],
)
def test_probe(
    world: Any, swarm: TrustedSwarm, announced: float, measured: float, bar: str, error: type[RecordError] | None
) -> None:
    announcement = world.announcement(probe_loss=announced)
    if error is None:
        swarm.feed_probe(announcement, measured, bar=bar)
    else:
        with pytest.raises(error):
            swarm.feed_probe(announcement, measured, bar=bar)
    with pytest.raises(ValueError, match="bars"):
        swarm.feed_probe(announcement, measured, bar="any")


# ---- any order of honest and hostile feeding -------------------------------------------------------------------------


class Feeding(RuleBasedStateMachine):
    """Whatever is fed in whatever order: what is held is live, of the plan, at the highest sequence, and of nobody
    who is out.
    """

    world: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.swarm = TrustedSwarm(self.world.opened)
        self.clock = self.world.now
        self.before: dict[Any, Any] = {}

    @rule(
        who=st.sampled_from(["alice", "bob"]),
        seq=st.integers(0, 3),
        lease=st.integers(-1, 910),
        slot=st.sampled_from("03"),
    )
    def claim(self, who: str, seq: int, lease: int, slot: str) -> None:
        identity = getattr(self.world, who)
        data = self.world.claim(identity, seq=seq, until=self.clock + lease, slot=slot).seal(identity)
        try:
            self.swarm.feed_claim(data, self.clock)
        except RecordError:
            return
        assert 0 < lease <= 905
        assert slot == "0"

    @rule(
        author=st.sampled_from(["alice", "bob"]),
        holder=st.sampled_from(["alice", "bob"]),
        seq=st.integers(0, 3),
        step=st.integers(0, 1),
    )
    def holding(self, author: str, holder: str, seq: int, step: int) -> None:
        author_key, holder_key = getattr(self.world, author), getattr(self.world, holder)
        inner = self.world.announcement(author_key, seq=seq, step=step).seal(author_key)
        data = self.world.holding(holder_key, inner, seq=seq, until=self.clock + 30).seal(holder_key)
        try:
            self.swarm.feed_holding(data, self.clock)
        except RecordError:
            return

    @rule(seconds=st.integers(1, 40))
    def wait(self, seconds: int) -> None:
        self.clock += seconds
        self.swarm.expire(self.clock)

    @invariant()
    def holds_only_what_counts(self) -> None:
        swarm = self.swarm
        for slot, claims in swarm.claims.items():
            for peer, claim in claims.items():
                assert (claim.slot, claim.peer) == (slot, peer)
                assert claim.until > self.clock
                assert claim.seq == swarm.highest[(peer, "claim", slot)][0]
                assert peer not in swarm.outlaws
        for slot, holdings in swarm.holdings.items():
            for holder, (held, announcement) in holdings.items():
                assert held.until > self.clock
                assert held.seq == swarm.highest[(holder, "holding", slot)][0]
                assert not {holder, announcement.author} & swarm.outlaws
        assert {proof.signer for proof in swarm.proofs} == swarm.outlaws
        for key, (seq, _) in self.before.items():
            assert swarm.highest[key][0] >= seq
        self.before = copy.copy(swarm.highest)


def test_any_order_of_feeding(world: Any) -> None:
    from hypothesis import settings
    from hypothesis.stateful import run_state_machine_as_test

    Feeding.world = world
    run_state_machine_as_test(Feeding, settings=settings(max_examples=40, stateful_step_count=20, deadline=None))
