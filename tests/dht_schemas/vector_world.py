"""The fixed keys, plans and records that the test vectors are made of, and how bytes are written in them."""

from __future__ import annotations

import base64
from typing import Any

from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.envelope import payload_type, seal
from paris_swarm.dht_schemas.identity import Identity

NOW = 1_800_000_000.0
CAP = 10_000_000
"""checkpoint_cap_bytes of the plans."""

ORGANISER, ALICE, BOB = (Identity(bytes([byte]) * 32) for byte in (1, 2, 3))
SEEDS = {"organiser": bytes([1]) * 32, "alice": bytes([2]) * 32, "bob": bytes([3]) * 32}

TENSORS = [
    {"dtype": "F32", "name": "w", "shape": [2, 3]},
    {"dtype": "BF16", "name": "b", "shape": [3]},
    {"dtype": "U8", "name": "none", "shape": [0, 7]},
]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def repeated(byte: bytes, times: int) -> dict[str, Any]:
    """Bytes too many to be written out."""
    return {"repeat": byte.hex(), "times": times}


def sealed(identity: Identity, kind: str, payload: Any) -> bytes:
    """An envelope whose signature is right, whatever its payload says."""
    data = payload if isinstance(payload, bytes) else canonical_json(payload)
    return seal(identity, payload_type(kind), data)


def plan_payload(**changes: Any) -> dict[str, Any]:
    spec = {"files": {"ema.safetensors": TENSORS}, "recipe": {"lr": 0.001, "steps": 100}}
    values: dict[str, Any] = {
        "name": "two shapes",
        "organiser": ORGANISER.peer_id,
        "created": 1_790_000_000,
        "clusters": 2,
        "seed": 7,
        "data": {"licence": "CC0-1.0"},
        "expert": spec,
        "router": spec,
        "policy": {
            "lease_s": 60.0,
            "checkpoint_every_s": 30.5,
            "first_checkpoint_grace_s": 90.0,
            "replicas": 1,
            "slots_per_key": 1,
            "checkpoint_cap_bytes": CAP,
        },
        "admission": "open",
        "router_slot": "open",
        "verification": {
            "probe_seed": 3,
            "tolerance": 0.01,
            "bars": {slot: {"resumable": 1.0, "assemblable": 0.5} for slot in ("0", "1", "router")},
        },
        "files": [{"name": "centroids.safetensors", "length": 3, "chunks": [blake3_hex(b"abc")]}],
    }
    return {**values, **changes}


def mixed_payload() -> dict[str, Any]:
    """A plan whose slot 1 is another kind of expert: other tensors under another recipe."""
    kind = {"files": {"ema.safetensors": TENSORS[:1]}, "recipe": {"lr": 0.001, "objective": "noise"}}
    return plan_payload(variants=[{**kind, "slots": ["1"]}])


OPEN = sealed(ORGANISER, "plan", plan_payload())
INVITED = sealed(ORGANISER, "plan", plan_payload(admission="invited"))
KEPT_ROUTER = sealed(ORGANISER, "plan", plan_payload(router_slot=ALICE.peer_id))
MIXED = sealed(ORGANISER, "plan", mixed_payload())
OPEN_ID, INVITED_ID, KEPT_ROUTER_ID = (blake3_hex(plan) for plan in (OPEN, INVITED, KEPT_ROUTER))


def token(peer: Identity, plan_id: str = INVITED_ID, signer: Identity = ORGANISER) -> str:
    return sealed(signer, "admission", {"peer": peer.peer_id, "plan": plan_id}).decode()


def claim(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "plan": OPEN_ID,
        "slot": "0",
        "seq": 10,
        "token": None,
        "peer": ALICE.peer_id,
        "until": NOW + 60.25,
        "released": False,
        "progress": {"step": 5, "steps": 100, "loss": 0.25, "images_per_s": 46.5, "device": "cpu"},
    }
    return {**values, **changes}


def manifest(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "v": 1,
        "kind": "expert",
        "slot": "0",
        "files": [
            {"name": "ema.safetensors", "length": 238, "chunks": ["c" * 64]},
            {"name": "state.json", "length": 2, "chunks": [blake3_hex(b"{}")]},
        ],
        "meta": {"step": 50, "parent": None},
    }
    return {**values, **changes}


def announcement(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "plan": OPEN_ID,
        "slot": "0",
        "seq": 10,
        "token": None,
        "author": ALICE.peer_id,
        "step": 50,
        "parent": None,
        "root": blake3_hex(canonical_json(manifest())),
        "bytes": 240,
        "probe_loss": 0.25,
    }
    return {**values, **changes}


def holding(inner: bytes | None = None, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "plan": OPEN_ID,
        "slot": "0",
        "seq": 10,
        "token": None,
        "holder": BOB.peer_id,
        "until": NOW + 60.25,
        "announcement": (inner or sealed(ALICE, "checkpoint", announcement())).decode(),
    }
    return {**values, **changes}
