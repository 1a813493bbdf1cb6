"""What is fuzzed, and what must hold: any bytes give a value or a documented refusal, and what was accepted reads back.

A target is a function of bytes. It returns True when they were accepted and False when they were refused as the
protocol says; whatever else it raises is a fault. Where a signature would keep random bytes out, the target signs them
first: a hostile peer signs what it likes.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paris_swarm.dht_schemas.admission import check_delegation, check_token, seal_token
from paris_swarm.dht_schemas.canonical import canonical_json, parse_json
from paris_swarm.dht_schemas.dht_rules import check_store, checkpoint_key, claim_key, dht_id
from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.envelope import KINDS, payload_type, seal, unseal
from paris_swarm.dht_schemas.errors import BadHeader, InviteError, MalformedRecord, NotAdmitted, RecordError
from paris_swarm.dht_schemas.greeting import Greeting
from paris_swarm.dht_schemas.header import check_safetensors_header
from paris_swarm.dht_schemas.identity import Identity, peer_id_of, public_key_bytes
from paris_swarm.dht_schemas.invite import Invite
from paris_swarm.dht_schemas.manifest import open_manifest
from paris_swarm.dht_schemas.notice import open_notice, seal_notice
from paris_swarm.dht_schemas.plan import OpenedPlan, open_plan, seal_plan
from paris_swarm.dht_schemas.records import Announcement, Claim, Holding
from paris_swarm.router.lock import open_lock, seal_lock
from paris_swarm.swarm import wire

NOW = 1_800_000_000.0
ORGANISER, ALICE, BOB = (Identity(letter * 32) for letter in (b"o", b"a", b"b"))
TENSORS = [
    {"name": "w", "dtype": "F32", "shape": [2, 3]},
    {"name": "b", "dtype": "BF16", "shape": [3]},
    {"name": "n", "dtype": "U8", "shape": [0]},
]
TENSOR_BYTES = 30


def _plan(admission: str, *, mixed: bool = False) -> OpenedPlan:
    spec = {"recipe": {"steps": 100, "lr": 1e-3}, "files": {"ema.safetensors": TENSORS}}
    payload = {
        "name": "two shapes",
        "organiser": ORGANISER.peer_id,
        "created": 1_790_000_000,
        "clusters": 2,
        "seed": 7,
        "data": {"licence": "CC0-1.0"},
        "expert": spec,
        "router": spec,
        "policy": {
            "lease_s": 60,
            "checkpoint_every_s": 30.5,
            "first_checkpoint_grace_s": 90,
            "checkpoint_cap_bytes": 10_000_000,
        },
        "admission": admission,
        "verification": {
            "probe_seed": 3,
            "bars": {slot: {"resumable": 1.0, "assemblable": 0.5} for slot in ("0", "1", "router")},
        },
        "files": [{"name": "centroids.npy", "length": 3, "chunks": ["a" * 64]}],
    }
    if mixed:
        payload["variants"] = [{**spec, "recipe": {"steps": 7}, "slots": ["1"]}]
    return open_plan(seal(ORGANISER, payload_type("plan"), canonical_json(payload)))


OPEN, INVITED, MIXED = _plan("open"), _plan("invited"), _plan("open", mixed=True)
PLANS = {opened.plan_id: opened.plan for opened in (OPEN, INVITED)}
TOKEN = seal_token(ORGANISER, INVITED.plan_id, ALICE.peer_id)

_CLAIM: dict[str, Any] = {
    "plan": OPEN.plan_id,
    "slot": "0",
    "seq": 10,
    "token": None,
    "peer": ALICE.peer_id,
    "until": NOW + 60.25,
    "released": False,
    "progress": {"step": 5, "steps": 100, "loss": 0.25, "images_per_s": 46.5, "device": "cpu"},
}
_ANNOUNCEMENT: dict[str, Any] = {
    "plan": OPEN.plan_id,
    "slot": "0",
    "seq": 10,
    "token": None,
    "author": ALICE.peer_id,
    "step": 50,
    "parent": None,
    "root": "b" * 64,
    "bytes": 1000,
    "probe_loss": 0.25,
}
_HOLDING: dict[str, Any] = {
    "plan": OPEN.plan_id,
    "slot": "0",
    "seq": 10,
    "token": None,
    "holder": ALICE.peer_id,
    "until": NOW + 60.25,
    "announcement": seal(ALICE, payload_type("checkpoint"), canonical_json(_ANNOUNCEMENT)).decode(),
}
_MANIFEST: dict[str, Any] = {
    "v": 1,
    "kind": "expert",
    "slot": "0",
    "files": [{"name": "a.json", "length": 3, "chunks": ["c" * 64]}, {"name": "b.json", "length": 0, "chunks": []}],
    "meta": {
        "step": 1,
        "parent": None,
        "loss": 0.25,
        "provenance": {
            "v": 1,
            "from_step": 0,
            "to_step": 1,
            "seed": 1,
            "recipe": "d" * 64,
            "rows": {"digest": "e" * 64, "count": 3},
            "environment": {
                "device": "cpu",
                "chip": "x",
                "precision": "fp32",
                "threads": 1,
                "flush_denormal": True,
                "deterministic": True,
                "tf32": False,
                "torch": "2",
                "package": "0",
            },
        },
    },
}
_LOCK: dict[str, Any] = {
    "v": 1,
    "plan": OPEN.plan_id,
    "organiser": ORGANISER.peer_id,
    "assembler": ALICE.peer_id,
    "created": 1_800_000_000,
    "files": [{"path": "plan.json", "length": 3, "blake3": "a" * 64}],
    "slots": [{"slot": "0", "author": ALICE.peer_id, "root": "b" * 64, "step": 50, "probe_loss": 0.25}],
    "missing": ["1", "router"],
}
_HEADER = {
    "__metadata__": {"format": "pt"},
    "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [24, 30]},
    "n": {"dtype": "U8", "shape": [0], "data_offsets": [30, 30]},
}


# ---- targets ---------------------------------------------------------------------------------------------------------


def json_text(data: bytes) -> bool:
    try:
        value = parse_json(data)
    except MalformedRecord:
        return False
    written = canonical_json(value)
    assert parse_json(written) == value
    assert canonical_json(parse_json(written)) == written
    return True


def envelope(data: bytes) -> bool:
    try:
        sealed = unseal(data, [payload_type(kind) for kind in KINDS], max_bytes=4096)
    except RecordError:
        return False
    assert sealed.envelope == data
    return True


def _signed_record(kind: type[Claim] | type[Announcement] | type[Holding]) -> Callable[[bytes], bool]:
    def run(data: bytes) -> bool:
        try:
            opened = kind.open(seal(ALICE, payload_type(kind.KIND), data))
        except RecordError:
            return False
        try:
            again = opened.record.seal(ALICE)
        except ValueError:  # it had 4096 bytes, and our spelling of the same is longer
            return True
        assert kind.open(again).record == opened.record
        return True

    return run


def plan(data: bytes) -> bool:
    try:
        opened = open_plan(seal(ORGANISER, payload_type("plan"), data))
    except RecordError:
        return False
    again = open_plan(seal_plan(ORGANISER, opened.plan)).plan
    assert again == opened.plan
    assert all(again.has_slot(slot) for slot in again.slots)
    return True


def manifest(data: bytes) -> bool:
    try:
        opened = open_manifest(data, blake3_hex(data), cap_bytes=10**12)
    except RecordError:
        return False
    assert canonical_json(opened.model_dump()) == data
    assert len({entry.name for entry in opened.files}) == len(opened.files)
    return True


def header(data: bytes) -> bool:
    """Bytes as a whole file's beginning, and as the JSON behind a length that is right."""
    accepted = False
    table = OPEN.plan.expert.files["ema.safetensors"]
    framed = len(data).to_bytes(8, "little") + data
    for first in (data, framed):
        try:
            check_safetensors_header(first, len(first) + TENSOR_BYTES, table)
        except BadHeader:
            continue
        accepted = True
    return accepted


def invite(data: bytes) -> bool:
    text = data.decode("utf-8", "surrogateescape")
    try:
        parsed = Invite.parse(text)
    except InviteError:
        return False
    assert Invite.parse(str(parsed)) == parsed
    return True


def token(data: bytes) -> bool:
    """Bytes as a token's text, and as the payload that the organiser signed."""
    accepted = False
    signed = seal(ORGANISER, payload_type("admission"), data).decode()
    for text in (data.decode("utf-8", "surrogateescape"), signed):
        try:
            check_token(INVITED.plan, INVITED.plan_id, ALICE.peer_id, text)
        except NotAdmitted:
            continue
        accepted = True
    return accepted


def delegation(data: bytes) -> bool:
    """Bytes as a delegation's text, and as the payload that a peer signed."""
    accepted = False
    signed = seal(ALICE, payload_type("delegation"), data).decode()
    for text in (data.decode("utf-8", "surrogateescape"), signed):
        try:
            peer = check_delegation(INVITED.plan_id, BOB.peer_id, text, NOW)
        except NotAdmitted:
            continue
        assert peer == ALICE.peer_id
        accepted = True
    return accepted


def notice(data: bytes) -> bool:
    try:
        opened = open_notice(OPEN.plan, OPEN.plan_id, seal(ORGANISER, payload_type("notice"), data)).record
    except RecordError:
        return False
    assert open_notice(OPEN.plan, OPEN.plan_id, seal_notice(ORGANISER, opened)).record == opened
    assert ORGANISER.peer_id not in opened.revoked
    return True


def greeting(data: bytes) -> bool:
    try:
        said = Greeting.of_bytes(data)
    except RecordError:
        return False
    assert Greeting.of_bytes(said.to_bytes()) == said
    return True


def key_file(data: bytes) -> bool:
    try:
        identity = Identity.from_protobuf(data)
    except ValueError:
        return False
    assert identity.to_protobuf() == data
    return True


def peer_id(data: bytes) -> bool:
    text = data.decode("utf-8", "surrogateescape")
    try:
        key = public_key_bytes(text)
    except MalformedRecord:
        return False
    assert peer_id_of(key) == text
    return True


def store(data: bytes) -> bool:
    """8 bytes of expiration (0: the one that the payload states), 1 byte that says where and by whom, then a payload
    or an envelope.
    """
    if len(data) < 9:
        return False
    (expiration,), how, body = struct.unpack(">d", data[:8]), data[8], data[9:]
    kind = "holding" if how & 1 else "claim"
    value = body if how & 2 else seal(ALICE, payload_type(kind), body)
    if expiration == 0:
        with_until = None
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            with_until = json.loads(body)["until"]
        expiration = with_until if isinstance(with_until, int | float) else NOW + 60.25
    place = (checkpoint_key if how & 1 else claim_key)(
        (INVITED if how & 4 else OPEN).plan_id, "router" if how & 8 else "0"
    )
    subkey: Any = BOB.peer_id if how & 16 else None if how & 32 else ALICE.peer_id
    try:
        record = check_store(PLANS, dht_id=dht_id(place), subkey=subkey, value=value, expiration=expiration, now=NOW)
    except RecordError:
        return False
    assert record.signer == subkey
    assert math.isfinite(record.until)
    assert NOW < record.until <= NOW + 905
    return True


def lock(data: bytes) -> bool:
    try:
        opened = open_lock(seal(ALICE, payload_type("lock"), data))
    except RecordError:
        return False
    assert open_lock(seal_lock(ALICE, opened.lock)).lock == opened.lock
    return True


def _outcome(reader: Any, pieces: list[bytes]) -> tuple[list[Any], bool]:
    out: list[Any] = []
    try:
        for piece in pieces:
            assert 0 <= reader.wants <= wire.MAX_PAYLOAD
            out += reader.receive(piece)
    except wire.BadFrame:
        return out, False
    return out, True


def requests(data: bytes) -> bool:
    """The first byte says how the rest is cut: what comes out whole comes out of pieces."""
    if not data:
        return False
    step, body = max(1, data[0]), data[1:]
    pieces = [body[start : start + step] for start in range(0, len(body), step)]
    cut, good = _outcome(wire.RequestReader(), pieces)
    whole, also_good = _outcome(wire.RequestReader(), [body])
    assert good == also_good
    assert whole == cut or not good  # an error withholds what came in the same piece
    for request in cut:
        assert request.to_bytes() in body
    return good and bool(cut)


def responses(data: bytes) -> bool:
    if not data:
        return False
    step, body = max(1, data[0]), data[1:]
    reader = wire.ResponseReader()
    for _ in range(4):
        reader.expect(0, 4096)
    out, good = _outcome(reader, [body[start : start + step] for start in range(0, len(body), step)])
    for response in out:
        try:
            assert len(wire.decode_payload(response)) == response.length <= 4096
        except wire.BadFrame:
            good = False
    return good and bool(out)


def compressed(data: bytes) -> bool:
    """2 bytes of declared length, then a payload that claims to be zstd, plain or over byte planes of either width."""
    if len(data) < 3:
        return False
    length = int.from_bytes(data[:2], "big")
    read = []
    for encoding in (wire.Encoding.ZSTD, wire.Encoding.PLANES_2, wire.Encoding.PLANES_4):
        try:
            out = wire.decode_payload(wire.Response(wire.Status.OK, encoding, length, data[2:]))
        except wire.BadFrame:
            continue
        assert len(out) == length
        read.append(sorted(out))
    assert all(other == read[0] for other in read), "planes are permutations of one content"
    return bool(read)


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """seeds: inputs to begin with, at least one of which is accepted. longest: bytes of an input."""

    run: Callable[[bytes], bool]
    seeds: tuple[bytes, ...]
    longest: int = 4096


def _opening() -> bytes:
    return wire.GreetingFrame(b"{}").to_bytes()


def _written(response: wire.Response) -> bytes:
    return response.header() + response.payload


_ZEROS = wire.encode_payload(bytes(3000))
_INVITE = f"paris:{OPEN.plan_id}?peer=/ip4/127.0.0.1/tcp/4001/p2p/{ALICE.peer_id}"

TARGETS: dict[str, Target] = {
    "json": Target(json_text, (canonical_json(_CLAIM), b'[1e5,-0.5,"\\ud83d\\ude00\\n",{"a":[null,true]}]')),
    "envelope": Target(
        envelope, (seal(ALICE, payload_type("claim"), canonical_json(_CLAIM)), seal(BOB, payload_type("lock"), b""))
    ),
    "claim": Target(
        _signed_record(Claim), (canonical_json(_CLAIM), canonical_json({**_CLAIM, "token": TOKEN, "note": [1.5]}))
    ),
    "announcement": Target(
        _signed_record(Announcement), (canonical_json(_ANNOUNCEMENT), canonical_json({**_ANNOUNCEMENT, "token": TOKEN}))
    ),
    "holding": Target(_signed_record(Holding), (canonical_json(_HOLDING),)),
    "plan": Target(plan, tuple(canonical_json(each.plan.model_dump()) for each in (OPEN, INVITED, MIXED)), 8192),
    "manifest": Target(manifest, (canonical_json(_MANIFEST),)),
    "header": Target(
        header,
        (
            canonical_json(_HEADER),
            len(canonical_json(_HEADER)).to_bytes(8, "little") + canonical_json(_HEADER),
            b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00",
        ),
    ),
    "invite": Target(
        invite,
        (
            _INVITE.encode(),
            f"{_INVITE}&peer=/dns4/swarm.example/tcp/443/ws/p2p/{BOB.peer_id}".encode(),
            f"paris:{OPEN.plan_id}?peer=/ip6/%3A%3A1/udp/1/quic-v1/p2p/{BOB.peer_id}".encode(),
            f"paris:{OPEN.plan_id}?peer=/unix/a%2Fb/p2p/{BOB.peer_id}".encode(),
        ),
        2048,
    ),
    "token": Target(token, (TOKEN.encode(), canonical_json({"plan": INVITED.plan_id, "peer": ALICE.peer_id})), 2048),
    "delegation": Target(
        delegation,
        (canonical_json({"plan": INVITED.plan_id, "peer": ALICE.peer_id, "observer": BOB.peer_id, "until": NOW + 9}),),
        2048,
    ),
    "notice": Target(
        notice,
        (
            canonical_json(
                {
                    "plan": OPEN.plan_id,
                    "number": 3,
                    "state": "paused",
                    "revoked": [ALICE.peer_id],
                    "message": "back soon",
                }
            ),
        ),
    ),
    "greeting": Target(
        greeting,
        (b"", canonical_json({"plan": OPEN.plan_id, "token": TOKEN, "proofs": [[_HOLDING["announcement"], "x"]]})),
    ),
    "key_file": Target(key_file, (ALICE.to_protobuf(), b"\x08\x00\x12\x80\x02" + b"0" * 63), 128),
    "peer_id": Target(peer_id, (ALICE.peer_id.encode(), b"12D3KooW" + b"1" * 44), 128),
    "store": Target(
        store,
        (
            bytes(9) + canonical_json(_CLAIM),
            bytes(8) + b"\x01" + canonical_json(_HOLDING),
            bytes(8) + b"\x04" + canonical_json({**_CLAIM, "plan": INVITED.plan_id, "token": TOKEN}),
            struct.pack(">d", NOW + 60.25) + b"\x02" + seal(ALICE, payload_type("claim"), canonical_json(_CLAIM)),
            struct.pack(">d", math.inf) + b"\x00" + canonical_json(_CLAIM),
            struct.pack(">d", math.nan) + b"\x20" + canonical_json(_CLAIM),
        ),
    ),
    "lock": Target(lock, (canonical_json(_LOCK),)),
    "requests": Target(
        requests,
        (
            b"\xff"
            + _opening()
            + wire.Request(wire.RequestKind.CHUNK, "ab" * 32, 3, 9).to_bytes()
            + wire.Request(wire.RequestKind.BLOB, "cd" * 32).to_bytes(),
        ),
        512,
    ),
    "responses": Target(
        responses,
        (
            b"\xff" + _opening() + _written(_ZEROS) + _written(wire.encode_payload(b"raw bytes")),
            b"\x07" + _opening() + _written(wire.Response(wire.Status.BUSY)) + _written(_ZEROS),
        ),
        1024,
    ),
    "compressed": Target(compressed, (_ZEROS.length.to_bytes(2, "big") + _ZEROS.payload,), 1024),
}
