"""The trusted set: feed it bytes from anywhere, and what it holds has passed every check that needs no tensors.

Modelled on python-tuf's trusted metadata set: each ``feed_*`` takes bytes (and the time), accepts or raises a
RecordError, and does no I/O. A checkpoint passes in this order: holding (signature, plan, slot, lease, admission,
sequence) and the announcement inside it; manifest; the header of every weights file. All values finite, and the probe
loss, are then judged by code that knows tensors; ``feed_probe`` compares the figure.

Sequence rules (SPEC.md, R-SET): per signer, kind and slot a record below the highest sequence seen is a rollback; the
same sequence with another payload is an equivocation, kept as proof, and that signer is out. The same bytes may be
fed again at any time. An announcement is a timeless fact that any holder may keep alive, so an older one of the same
author is no rollback; its holder's own sequence is what orders holdings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from paris_swarm.dht_schemas.dht_rules import check_claim, check_holding
from paris_swarm.dht_schemas.errors import (
    BadManifest,
    Equivocation,
    NotFinite,
    ProbeFailed,
    Rollback,
    WrongPlan,
    WrongSlot,
    quoted,
)
from paris_swarm.dht_schemas.header import check_safetensors_header
from paris_swarm.dht_schemas.manifest import Manifest, open_manifest
from paris_swarm.dht_schemas.plan import OpenedPlan, Plan
from paris_swarm.dht_schemas.records import Announcement, Claim, Holding, Opened, SignedRecord

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
    ) -> None:
        self.opened_plan = opened_plan
        self.highest: dict[Author, tuple[int, str]] = dict(highest or {})
        self.claims: dict[str, dict[str, Claim]] = {slot: {} for slot in self.plan.slots}
        """slot -> peer -> newest claim, released ones included."""
        self.holdings: dict[str, dict[str, tuple[Holding, Announcement]]] = {slot: {} for slot in self.plan.slots}
        """slot -> holder -> newest holding and the announcement it carries."""
        self.proofs: list[EquivocationProof] = []
        self.outlaws: set[str] = set(outlaws)
        self._envelopes: dict[Author, bytes] = {}

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
        self._check_signer(opened.record.peer)
        self._advance(opened, ordered=True)
        self.claims[opened.record.slot][opened.record.peer] = opened.record
        return opened.record

    def feed_holding(self, data: bytes, now: float) -> tuple[Holding, Announcement]:
        """Accept a holding and the announcement it carries, or raise a RecordError. ``now`` in Unix seconds."""
        opened = Holding.open(data)
        inner = check_holding(self.plan, self.plan_id, opened.record, now)
        self._check_signer(opened.record.holder)
        self._check_signer(inner.record.author)
        self._advance(inner, ordered=False)
        self._advance(opened, ordered=True)
        self.holdings[opened.record.slot][opened.record.holder] = (opened.record, inner.record)
        return opened.record, inner.record

    def feed_manifest(self, announcement: Announcement, data: bytes) -> Manifest:
        """Accept the manifest that ``announcement`` names, or raise a RecordError."""
        if announcement.plan != self.plan_id:
            raise WrongPlan(f"an announcement of plan {announcement.plan}, not {self.plan_id}")
        if not self.plan.has_slot(announcement.slot):
            raise WrongSlot(f"the plan has no slot {announcement.slot}")
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

    def expire(self, now: float) -> None:
        """Forget claims and holdings whose lease has ended; the sequences seen are kept."""
        for claims in self.claims.values():
            for peer in [peer for peer, claim in claims.items() if claim.until <= now]:
                del claims[peer]
        for holdings in self.holdings.values():
            for holder in [holder for holder, (holding, _) in holdings.items() if holding.until <= now]:
                del holdings[holder]

    def _check_signer(self, signer: str) -> None:
        if signer in self.outlaws:
            raise Equivocation(
                f"{signer} was proven to have signed two different records under one sequence", rule="R-SET-4"
            )

    def _advance(self, opened: Opened[Claim] | Opened[Holding] | Opened[Announcement], *, ordered: bool) -> None:
        """Apply the sequence rules and remember the highest; ``ordered``: whether an older record is a rollback."""
        record: SignedRecord = opened.record
        sealed = opened.sealed
        author = (sealed.signer, record.KIND, record.slot)
        seen = self.highest.get(author)
        if seen is None or record.seq > seen[0]:
            self.highest[author] = (record.seq, sealed.digest)
            self._envelopes[author] = sealed.envelope
        elif record.seq == seen[0]:
            if sealed.digest != seen[1]:
                self._outlaw(EquivocationProof(*author, record.seq, self._envelopes.get(author), sealed.envelope))
            self._envelopes[author] = sealed.envelope
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
        self.proofs.append(proof)
        self.outlaws.add(proof.signer)
        for claims in self.claims.values():
            claims.pop(proof.signer, None)
        for holdings in self.holdings.values():
            for holder in [holder for holder, (_, held) in holdings.items() if proof.signer in (holder, held.author)]:
                del holdings[holder]
        raise Equivocation(f"two different {proof.kind} records {proof.seq} of {proof.signer} for slot {proof.slot}")
