"""A small swarm on paper: an organiser, two peers, a plan, and records that are right until a test makes them wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

from paris_swarm.dht_schemas import (
    Announcement,
    Bars,
    Claim,
    Holding,
    Identity,
    OpenedPlan,
    Plan,
    Policy,
    Progress,
    SlotSpec,
    TensorSpec,
    Verification,
    open_plan,
    payload_type,
    seal,
    seal_plan,
)
from paris_swarm.dht_schemas.canonical import canonical_json

# The machines that run this are shared: a slow example is no failure.
settings.register_profile("records", deadline=None, max_examples=100)
settings.load_profile("records")

NOW = 1_800_000_000.0
ROOT = "b" * 64


class World:
    """Fixed keys, so that a failure can be repeated."""

    now = NOW
    organiser = Identity(b"o" * 32)
    alice = Identity(b"a" * 32)
    bob = Identity(b"b" * 32)

    def __init__(self) -> None:
        self.opened = self.open(self.plan())
        self.invited = self.open(self.plan(admission="invited"))

    def open(self, plan: Plan) -> OpenedPlan:
        return open_plan(seal_plan(self.organiser, plan))

    def plan(self, **changes: Any) -> Plan:
        table = [TensorSpec(name="w", dtype="F32", shape=(2, 3)), TensorSpec(name="b", dtype="F32", shape=(3,))]
        spec = SlotSpec(recipe={"steps": 100, "lr": 1e-3}, files={"ema.safetensors": table, "model.safetensors": table})
        values: dict[str, Any] = {
            "name": "three shapes",
            "organiser": self.organiser.peer_id,
            "created": 1_790_000_000,
            "clusters": 3,
            "seed": 7,
            "data": {"licence": "CC0-1.0"},
            "expert": spec,
            "router": spec,
            "policy": Policy(
                lease_s=60, checkpoint_every_s=30, first_checkpoint_grace_s=90, checkpoint_cap_bytes=10_000_000
            ),
            "admission": "open",
            "verification": Verification(
                probe_seed=3,
                bars={slot: Bars(resumable=1.0, assemblable=0.5) for slot in ("0", "1", "2", "router")},
            ),
        }
        return Plan(**{**values, **changes})

    def claim(self, identity: Identity | None = None, **changes: Any) -> Claim:
        values: dict[str, Any] = {
            "plan": self.opened.plan_id,
            "slot": "0",
            "peer": (identity or self.alice).peer_id,
            "seq": 10,
            "until": NOW + 60.25,
            "progress": Progress(step=5, steps=100, loss=0.25, images_per_s=46.5, device="cpu"),
        }
        return Claim(**{**values, **changes})

    def announcement(self, identity: Identity | None = None, **changes: Any) -> Announcement:
        values: dict[str, Any] = {
            "plan": self.opened.plan_id,
            "slot": "0",
            "author": (identity or self.alice).peer_id,
            "seq": 10,
            "step": 50,
            "parent": None,
            "root": ROOT,
            "bytes": 1000,
            "probe_loss": 0.25,
        }
        return Announcement(**{**values, **changes})

    def holding(self, identity: Identity | None = None, announcement: bytes | None = None, **changes: Any) -> Holding:
        """A holding of ``announcement`` (default: alice's)."""
        inner = self.announcement().seal(self.alice) if announcement is None else announcement
        values: dict[str, Any] = {
            "plan": self.opened.plan_id,
            "slot": "0",
            "holder": (identity or self.alice).peer_id,
            "seq": 10,
            "until": NOW + 60.25,
            "announcement": inner.decode(),
        }
        return Holding(**{**values, **changes})

    def forge(self, identity: Identity, kind: str, payload: Any) -> bytes:
        """An envelope whose signature is right, whatever its payload says."""
        data = payload if isinstance(payload, bytes) else canonical_json(payload)
        return seal(identity, payload_type(kind), data)


@pytest.fixture(scope="session")
def world() -> World:
    return World()
