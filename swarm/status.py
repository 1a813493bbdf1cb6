"""The swarm as seen from here, as frozen records and as the documented JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from paris_swarm.swarm.node import SwarmNode


@dataclass(frozen=True)
class ClaimStatus:
    """A live claim. ``stale`` means it no longer protects the slot (claims.py, C2); progress is what the peer says."""

    peer: str
    step: int
    steps: int
    loss: float | None
    images_per_s: float
    lease_left_s: float
    device: str
    stale: bool


@dataclass(frozen=True)
class CheckpointStatus:
    """The slot's best announced checkpoint that someone holds now; its weights are verified at `assemble`."""

    root: str
    author: str
    step: int
    bytes: int
    probe_loss: float
    holders: int
    age_s: float


@dataclass(frozen=True)
class SlotStatus:
    slot: str
    claims: tuple[ClaimStatus, ...]
    checkpoint: CheckpointStatus | None


@dataclass(frozen=True)
class PeerStatus:
    peer: str
    slots: tuple[str, ...]
    last_seen_s: float


@dataclass(frozen=True)
class NoticeStatus:
    """What the organiser said last. ``contradicted``: two different notices bear this number, the stricter counts."""

    number: int
    state: str
    revoked: tuple[str, ...]
    message: str
    contradicted: bool


@dataclass(frozen=True)
class OutlawStatus:
    """A peer that signed two different records under one sequence, and on which it was proven."""

    peer: str
    kind: str
    slot: str
    seq: int


@dataclass(frozen=True)
class SwarmStatus:
    """`status --json` prints exactly this (docs/status.md)."""

    plan: str
    name: str
    time: float
    peers: tuple[PeerStatus, ...]
    slots: tuple[SlotStatus, ...]
    admission: str = "open"
    notice: NoticeStatus | None = None
    outlaws: tuple[OutlawStatus, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def swarm_status(node: SwarmNode) -> SwarmStatus:
    """Status from the records the node has verified; refresh the node first."""
    now = node.clock()
    policy = node.plan.policy
    slots: list[SlotStatus] = []
    active: dict[str, list[str]] = {}
    for slot in node.plan.slots:
        view = node.slot_view(slot)
        protecting = view.protecting(now, policy)
        claims = tuple(
            ClaimStatus(
                peer=peer,
                step=claim.progress.step,
                steps=claim.progress.steps,
                loss=claim.progress.loss,
                images_per_s=claim.progress.images_per_s,
                lease_left_s=round(claim.until - now, 1),
                device=claim.progress.device,
                stale=peer not in protecting,
            )
            for peer, claim in sorted(view.live(now).items())
        )
        for claim_status in claims:
            active.setdefault(claim_status.peer, []).append(slot)
        best = next(iter(node.candidates(slot)), None)
        checkpoint = None
        if best is not None:
            announcement = best.announcement
            checkpoint = CheckpointStatus(
                root=announcement.root,
                author=announcement.author,
                step=announcement.step,
                bytes=announcement.bytes,
                probe_loss=announcement.probe_loss,
                holders=len(best.holders),
                age_s=round(max(0.0, now - announcement.seq / 1000), 1),
            )
            for holder in best.holders:
                active.setdefault(holder, [])
        slots.append(SlotStatus(slot, claims, checkpoint))
    peers = tuple(
        PeerStatus(peer, tuple(held), round(max(0.0, now - node.last_seen.get(peer, now)), 1))
        for peer, held in sorted(active.items())
    )
    standing = node.trusted.standing
    notice = None
    if standing.number:
        notice = NoticeStatus(
            standing.number,
            standing.state,
            tuple(sorted(standing.revoked)),
            standing.message,
            standing.contradicted,
        )
    return SwarmStatus(
        node.plan_id,
        node.plan.name,
        round(now, 3),
        peers,
        tuple(slots),
        admission=node.plan.admission,
        notice=notice,
        outlaws=tuple(
            OutlawStatus(proof.signer, proof.kind, proof.slot, proof.seq)
            for proof in sorted(node.trusted.proofs, key=lambda proof: proof.signer)
            if proof.signer in node.trusted.notable
        ),
    )


def status_from_dict(report: dict[str, Any]) -> SwarmStatus:
    """The records behind one line of `status --json` (the inverse of ``as_dict``)."""
    return SwarmStatus(
        plan=report["plan"],
        name=report["name"],
        time=report["time"],
        peers=tuple(PeerStatus(item["peer"], tuple(item["slots"]), item["last_seen_s"]) for item in report["peers"]),
        slots=tuple(
            SlotStatus(
                item["slot"],
                tuple(ClaimStatus(**claim) for claim in item["claims"]),
                CheckpointStatus(**item["checkpoint"]) if item["checkpoint"] else None,
            )
            for item in report["slots"]
        ),
        admission=report["admission"],
        notice=NoticeStatus(**{**report["notice"], "revoked": tuple(report["notice"]["revoked"])})
        if report["notice"]
        else None,
        outlaws=tuple(OutlawStatus(**item) for item in report["outlaws"]),
    )
