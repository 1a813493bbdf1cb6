"""The trusted set: feed it bytes from anywhere, and what it holds has passed every check that needs no tensors.

Modelled on python-tuf's trusted metadata set: each ``feed_*`` takes bytes (and the time), accepts or raises a
RecordError, and does no I/O. A checkpoint passes in this order: holding (signature, plan, slot, lease, admission,
sequence) and the announcement inside it; manifest; the header of every weights file. All values finite, and the probe
loss, are then judged by code that knows tensors; ``feed_probe`` compares the figure.

Sequence rules (SPEC.md, R-SET): per signer, kind and slot a record below the highest sequence seen is a rollback; the
same sequence with another payload is an equivocation, kept as proof, and that signer is out. The same bytes may be
fed again at any time. An announcement is a timeless fact that any holder may keep alive, so an older one of the same
author is no rollback; its holder's own sequence is what orders holdings.

What outranks single records is fed as well: the organiser's notices (R-NOT) and other peers' proofs of equivocation.
Whoever a notice revokes, a proof convicts or this node's own lists refuse is dropped at once and refused from then on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from paris_swarm.dht_schemas.admission import PeerLists
from paris_swarm.dht_schemas.dht_rules import check_claim, check_holding
from paris_swarm.dht_schemas.envelope import payload_type, unseal
from paris_swarm.dht_schemas.errors import (
    BadManifest,
    Equivocation,
    NotAProof,
    NotFinite,
    ProbeFailed,
    Revoked,
    Rollback,
    WrongPlan,
    WrongSlot,
    quoted,
)
from paris_swarm.dht_schemas.header import check_safetensors_header
from paris_swarm.dht_schemas.manifest import Manifest, open_manifest
from paris_swarm.dht_schemas.notice import Notice, Standing, kept_notices, open_notice, standing_of
from paris_swarm.dht_schemas.plan import OpenedPlan, Plan
from paris_swarm.dht_schemas.records import (
    CLOCK_TOLERANCE_S,
    MAX_LEASE_S,
    MAX_RECORD,
    Announcement,
    Claim,
    Holding,
    Opened,
    SignedRecord,
)

Author = tuple[str, str, str]
"""(signer, kind, slot): within it, sequences grow."""


@dataclass(frozen=True, slots=True)
class EquivocationProof:
    """Two records of one signer, kind, slot and sequence that differ. Anyone can check it with nothing but the two
    envelopes.
    """

    signer: str
    kind: str
    slot: str
    seq: int
    first: bytes | None
    """The envelope seen first; None when only its digest was kept from an earlier run."""
    second: bytes


MAX_SEEN = 4096
"""Sequences remembered for each kind and slot, beyond those of records that are live (R-SET-5)."""
MAX_OUTLAWS = 1024
"""Signers proven to equivocate that are remembered (R-SET-7)."""
_REMEMBERED_S = MAX_LEASE_S + CLOCK_TOLERANCE_S


class TrustedSwarm:
    """What is known of one swarm, all of it verified.

    ``highest`` maps (signer, kind, slot) to (sequence, payload digest): keep it on disk between runs, and hand it in
    again. ``outlaws`` are signers whose equivocation was proven earlier.
    """

    def __init__(
        self,
        opened_plan: OpenedPlan,
        highest: Mapping[Author, tuple[int, str]] | None = None,
        *,
        outlaws: Iterable[str] = (),
        lists: PeerLists | None = None,
    ) -> None:
        self.opened_plan = opened_plan
        self.lists = lists or PeerLists()
        self.highest: dict[Author, tuple[int, str]] = dict(highest or {})
        self.claims: dict[str, dict[str, Claim]] = {slot: {} for slot in self.plan.slots}
        """slot -> peer -> newest claim, released ones included."""
        self.holdings: dict[str, dict[str, tuple[Holding, Announcement]]] = {slot: {} for slot in self.plan.slots}
        """slot -> holder -> newest holding and the announcement it carries."""
        self.proofs: list[EquivocationProof] = []
        self.outlaws: set[str] = set(outlaws)
        self.notices: tuple[Opened[Notice], ...] = ()
        """The organiser's notices that count: none, one, or two that contradict one another."""
        self.standing = Standing()
        """What those notices say together."""
        self._envelopes: dict[Author, bytes] = {}
        self.notable: set[str] = set()
        """Outlaws of whom something was ever accepted or offered here: not keys made up to fill the list (R-SET-7)."""
        self._accepted: dict[Author, float] = {}
        """When a sequence was last accepted; empty for those that were handed in."""

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self.opened_plan.plan

    @property
    def plan_id(self) -> str:
        """The plan's id."""
        return self.opened_plan.plan_id

    def feed_claim(self, data: bytes, now: float) -> Claim:
        """Accept a claim, or raise a RecordError. ``now`` in Unix seconds."""
        opened = Claim.open(data)
        check_claim(self.plan, self.plan_id, opened.record, now)
        self._check_speaker(opened.record.peer)
        self._advance(opened, now, ordered=True)
        self.claims[opened.record.slot][opened.record.peer] = opened.record
        return opened.record

    def feed_holding(self, data: bytes, now: float) -> tuple[Holding, Announcement]:
        """Accept a holding and the announcement it carries, or raise a RecordError. ``now`` in Unix seconds."""
        opened = Holding.open(data)
        inner = check_holding(self.plan, self.plan_id, opened.record, now)
        self._check_speaker(opened.record.holder)
        self._check_speaker(inner.record.author)
        self._advance(inner, now, ordered=False)
        self._advance(opened, now, ordered=True)
        self.holdings[opened.record.slot][opened.record.holder] = (opened.record, inner.record)
        return opened.record, inner.record

    def feed_manifest(self, announcement: Announcement, data: bytes) -> Manifest:
        """Accept the manifest that ``announcement`` names, or raise a RecordError."""
        self._check_announced(announcement)
        manifest = open_manifest(data, announcement.root, cap_bytes=self.plan.policy.checkpoint_cap_bytes)
        for what, said, found in (
            ("slot", announcement.slot, manifest.slot),
            ("step", announcement.step, manifest.step),
            ("parent", announcement.parent, manifest.parent),
            ("bytes", announcement.bytes, manifest.total_bytes),
        ):
            if said != found:
                raise BadManifest(f"the announcement says {what} {said}, the manifest {found}", rule="R-MAN-6")
        weights = self.plan.slot_spec(announcement.slot).files.keys()
        names = {entry.name for entry in manifest.files}
        if missing := sorted(weights - names):
            raise BadManifest(f"{missing[0]} is missing", rule="R-MAN-7")
        if strange := sorted(name for name in names - weights if not name.endswith(".json")):
            raise BadManifest(f"{strange[0]} is neither a weights file of the plan nor a .json file", rule="R-MAN-7")
        return manifest

    def feed_header(self, slot: str, name: str, data: bytes, length: int) -> None:
        """Accept the first bytes ``data`` of weights file ``name`` (``length`` bytes long in all) of a checkpoint of
        ``slot``, or raise a RecordError.
        """
        if not self.plan.has_slot(slot):
            raise WrongSlot(f"the plan has no slot {quoted(slot)}")
        table = self.plan.slot_spec(slot).files.get(name)
        if table is None:
            raise BadManifest(f"{quoted(name)} is not a weights file of the plan", rule="R-MAN-7")
        check_safetensors_header(data, length, table)

    def feed_probe(self, announcement: Announcement, measured: float, *, bar: str = "assemblable") -> None:
        """Accept the probe loss ``measured`` on the files of ``announcement``: as announced within the plan's
        tolerance, and below ``bar``.

        ``bar`` is "assemblable" or "resumable". Raises NotFinite, ProbeFailed; ValueError for another bar.
        """
        if bar not in ("assemblable", "resumable"):
            raise ValueError(f"the bars are assemblable and resumable, not {bar!r}")
        self._check_announced(announcement)
        if not math.isfinite(measured):
            raise NotFinite(f"the probe loss of slot {announcement.slot} is {measured}", rule="R-VAL-1")
        share = self.plan.verification.tolerance
        if abs(measured - announcement.probe_loss) > share * abs(announcement.probe_loss):
            raise ProbeFailed(
                f"announced {announcement.probe_loss:.6g}, measured {measured:.6g}, more than {share:.2%} apart",
                rule="R-VAL-2",
            )
        bars = self.plan.verification.bars[announcement.slot]
        limit = bars.assemblable if bar == "assemblable" else bars.resumable
        if measured >= limit:
            raise ProbeFailed(f"measured {measured:.6g}, the {bar} bar is {limit:.6g}", rule="R-VAL-3")

    def feed_notice(self, data: bytes) -> Notice:
        """Accept a notice of the organiser that is not older than the newest known, or raise a RecordError.

        Whoever it revokes is dropped; whoever it no longer lists may speak again.
        """
        opened = open_notice(self.plan, self.plan_id, data)
        if opened.record.number < self.standing.number:
            raise Rollback(f"notice {opened.record.number} after {self.standing.number}", rule="R-NOT-3")
        self.notices = kept_notices((*self.notices, opened))
        self.standing = standing_of(self.notices)
        self._drop(self.standing.revoked)
        return opened.record

    def feed_proof(self, first: bytes, second: bytes) -> EquivocationProof | None:
        """Accept another peer's proof of equivocation, or raise a RecordError; None when its signer is out already.

        Nothing of whoever brought it is trusted: the two envelopes prove it, or do not (R-SET-6).
        """
        proof = check_proof(self.plan, self.plan_id, first, second)
        if proof.signer in self.outlaws:
            return None
        self._convict(proof)
        return proof

    def feed_own_proof(self, first: bytes | None, second: bytes) -> EquivocationProof | None:
        """As ``feed_proof``, for what this node wrote down itself: where only a digest of the first record had been
        kept, its own word is enough for itself. Such a proof convinces nobody else and is not passed on.
        """
        if first is not None:
            told = self.feed_proof(first, second)
            if told is not None:
                self.notable.add(told.signer)
            return told
        opened = _open_any(second)
        record = opened.record
        if record.plan != self.plan_id:
            raise WrongPlan(f"a proof about plan {record.plan}, not {self.plan_id}")
        if record.signer in self.outlaws:
            return None
        proof = EquivocationProof(record.signer, record.KIND, record.slot, record.seq, None, second)
        self._convict(proof)
        self.notable.add(proof.signer)
        return proof

    def check_signer(self, signer: str) -> None:
        """Whether this peer's records may count at all. Raises Equivocation, Revoked, Blocked."""
        if signer in self.outlaws:
            raise Equivocation(
                f"{signer} was proven to have signed two different records under one sequence", rule="R-SET-4"
            )
        if signer in self.standing.revoked:
            said = f": {self.standing.message}" if self.standing.message else ""
            raise Revoked(f"{signer} is revoked by notice {self.standing.number}{said}")
        self.lists.check(signer)

    def _check_speaker(self, signer: str) -> None:
        """``check_signer`` for the signer of a record that verified, token and all. An outlaw's is noted: its proof is
        then worth passing on. Nothing less would do, or strangers and made-up keys could fill the list (R-SET-7).
        """
        if signer in self.outlaws:
            self.notable.add(signer)
        self.check_signer(signer)

    def notable_proofs(self) -> list[EquivocationProof]:
        """Proofs worth passing on: whole, and against signers that this node has met (R-SET-7)."""
        return [proof for proof in self.proofs if proof.first is not None and proof.signer in self.notable]

    def expire(self, now: float) -> None:
        """Forget claims and holdings whose lease has ended, and the sequences that no replay can use any more.

        A record's lease ends at most 905 s after it was accepted, and so does that of every older one of its honest
        signer: after that, the lease refuses what the sequence would have (R-SET-5).
        """
        for claims in self.claims.values():
            for peer in [peer for peer, claim in claims.items() if claim.until <= now]:
                del claims[peer]
        for holdings in self.holdings.values():
            for holder in [holder for holder, (holding, _) in holdings.items() if holding.until <= now]:
                del holdings[holder]
        live = self._live_authors()
        for author in [author for author in self.highest if author not in live]:
            if author[1] != Announcement.KIND and self._accepted.setdefault(author, now) + _REMEMBERED_S < now:
                self._forget(author)
        self._cap_sequences(live)

    def _live_authors(self) -> set[Author]:
        """Whose sequence protects a record that counts now."""
        live = {(peer, Claim.KIND, slot) for slot, claims in self.claims.items() for peer in claims}
        for slot, holdings in self.holdings.items():
            for holder, (_holding, announcement) in holdings.items():
                live |= {(holder, Holding.KIND, slot), (announcement.author, Announcement.KIND, slot)}
        return live

    def _cap_sequences(self, live: set[Author]) -> None:
        """Of each kind and slot keep those of live records and the MAX_SEEN accepted last."""
        idle: dict[tuple[str, str], list[Author]] = {}
        for author in self.highest:
            if author not in live:
                idle.setdefault(author[1:], []).append(author)
        for authors in idle.values():
            if len(authors) > MAX_SEEN:
                authors.sort(key=lambda author: self._accepted.get(author, 0.0), reverse=True)
                for author in authors[MAX_SEEN:]:
                    self._forget(author)

    def _forget(self, author: Author) -> None:
        for remembered in (self.highest, self._envelopes, self._accepted):
            remembered.pop(author, None)

    def _check_announced(self, announcement: Announcement) -> None:
        if announcement.plan != self.plan_id:
            raise WrongPlan(f"an announcement of plan {announcement.plan}, not {self.plan_id}")
        if not self.plan.has_slot(announcement.slot):
            raise WrongSlot(f"the plan has no slot {announcement.slot}")

    def _advance(
        self, opened: Opened[Claim] | Opened[Holding] | Opened[Announcement], now: float, *, ordered: bool
    ) -> None:
        """Apply the sequence rules and remember the highest; ``ordered``: whether an older record is a rollback."""
        record: SignedRecord = opened.record
        sealed = opened.sealed
        author = (sealed.signer, record.KIND, record.slot)
        seen = self.highest.get(author)
        if seen is None or record.seq > seen[0]:
            self.highest[author] = (record.seq, sealed.digest)
            self._envelopes[author] = sealed.envelope
            self._accepted[author] = now
        elif record.seq == seen[0]:  # R-SET-1: the same payload may come again
            if sealed.digest != seen[1]:
                self._outlaw(EquivocationProof(*author, record.seq, self._envelopes.get(author), sealed.envelope))
            self._envelopes[author] = sealed.envelope
            self._accepted[author] = now
        elif ordered:
            raise Rollback(f"{record.KIND} {record.seq} of {sealed.signer} for slot {record.slot} after {seen[0]}")
        else:
            self._compare_with_held(opened, author)

    def _compare_with_held(
        self, opened: Opened[Claim] | Opened[Holding] | Opened[Announcement], author: Author
    ) -> None:
        """An older announcement: compare with those of the same author that others still hold."""
        for holding, held in self.holdings[opened.record.slot].values():
            if (held.author, held.seq) == (opened.sealed.signer, opened.record.seq):
                first = holding.open_announcement().sealed
                if first.digest != opened.sealed.digest:
                    self._outlaw(EquivocationProof(*author, held.seq, first.envelope, opened.sealed.envelope))

    def _outlaw(self, proof: EquivocationProof) -> None:
        """Keep the proof, drop everything of its signer, and refuse."""
        self._convict(proof)
        raise Equivocation(f"two different {proof.kind} records {proof.seq} of {proof.signer} for slot {proof.slot}")

    def _convict(self, proof: EquivocationProof) -> None:
        if len(self.proofs) >= MAX_OUTLAWS:
            # Keys cost nothing: proofs against signers nobody here ever heard of make room first (R-SET-7).
            spare = next((kept for kept in self.proofs if kept.signer not in self.notable), self.proofs[0])
            self.proofs.remove(spare)
            self.outlaws.discard(spare.signer)
            self.notable.discard(spare.signer)
        self.proofs.append(proof)
        self.outlaws.add(proof.signer)
        if any(author[0] == proof.signer for author in self.highest):
            self.notable.add(proof.signer)
        self._drop({proof.signer})

    def _drop(self, signers: Collection[str]) -> None:
        """Everything these signed, also what others hold of it."""
        for claims in self.claims.values():
            for peer in claims.keys() & signers:
                del claims[peer]
        for holdings in self.holdings.values():
            gone = [holder for holder, (_, held) in holdings.items() if holder in signers or held.author in signers]
            for holder in gone:
                del holdings[holder]


def check_proof(plan: Plan, plan_id: str, first: bytes, second: bytes) -> EquivocationProof:
    """Whether two envelopes prove that their signer equivocated in this plan (R-SET-6).

    The proof is timeless: leases that have ended, and tokens, make no difference. Raises NotAProof, or the error of the
    envelope that is not right.
    """
    one, other = (_open_any(data) for data in (first, second))
    record, again = one.record, other.record
    if plan_id not in (record.plan, again.plan) or record.plan != again.plan:
        raise WrongPlan(f"a proof about plans {record.plan} and {again.plan}, not {plan_id}")
    if not plan.has_slot(record.slot):
        raise WrongSlot(f"the plan has no slot {record.slot}")
    same = (record.signer, record.KIND, record.slot, record.seq)
    if same != (again.signer, again.KIND, again.slot, again.seq) or one.sealed.digest == other.sealed.digest:
        raise NotAProof(f"two records of {record.signer} and {again.signer} that do not contradict one another")
    return EquivocationProof(*same, first, second)


_KINDS: dict[str, type[Claim] | type[Announcement] | type[Holding]] = {
    payload_type(kind.KIND): kind for kind in (Claim, Announcement, Holding)
}


def _open_any(data: bytes) -> Opened[Claim] | Opened[Announcement] | Opened[Holding]:
    sealed = unseal(data, tuple(_KINDS), max_bytes=MAX_RECORD)
    return _KINDS[sealed.payload_type].of_sealed(sealed)
