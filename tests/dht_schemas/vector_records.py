"""Vectors of keys, JSON, envelopes, plans, records, tokens, manifests, headers and locks."""

from __future__ import annotations

import json
from typing import Any

from vector_world import (
    ALICE,
    BOB,
    CAP,
    INVITED,
    INVITED_ID,
    KEPT_ROUTER,
    KEPT_ROUTER_ID,
    MIXED,
    NOW,
    OPEN,
    OPEN_ID,
    ORGANISER,
    SEEDS,
    TENSORS,
    announcement,
    b64,
    claim,
    holding,
    manifest,
    mixed_payload,
    plan_payload,
    repeated,
    sealed,
    token,
)

from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.envelope import KINDS, pae, payload_type
from paris_swarm.dht_schemas.identity import Identity, peer_id_of, public_key_bytes

Case = dict[str, Any]


def refused(name: str, rule: str, error: str, **inputs: Any) -> Case:
    return {"name": name, "rule": rule, "error": error, **inputs}


def keys() -> Case:
    good = ALICE.peer_id
    return {
        "about": "seed (hex) -> public key (hex), peer id, key file (hex). Refused: texts that are no peer id.",
        "accept": [
            {
                "name": name,
                "seed": seed.hex(),
                "public_key": public_key_bytes(Identity(seed).peer_id).hex(),
                "peer_id": Identity(seed).peer_id,
                "key_file": Identity(seed).to_protobuf().hex(),
            }
            for name, seed in SEEDS.items()
        ],
        "refuse": [
            refused(name, rule, "MalformedRecord", peer_id=text)
            for name, rule, text in (
                ("empty", "R-KEY-1", ""),
                ("one character short", "R-KEY-1", good[:-1]),
                ("one character long", "R-KEY-1", good + "1"),
                ("a character that base58 lacks", "R-KEY-1", good[:-1] + "0"),
                ("another case", "R-KEY-1", good.lower()),
                ("a second leading one", "R-KEY-1", "1" + good[:-1]),
                ("an RSA peer id", "R-KEY-1", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"),
                ("the neutral point", "R-KEY-2", peer_id_of(b"\x01" + bytes(31))),
                ("the neutral point, sign bit set", "R-KEY-2", peer_id_of(b"\x01" + bytes(30) + b"\x80")),
                ("a point of order 4", "R-KEY-2", peer_id_of(bytes(32))),
                ("y = p, which is y = 0 again", "R-KEY-2", peer_id_of((2**255 - 19).to_bytes(32, "little"))),
                ("y beyond the field", "R-KEY-2", peer_id_of(b"\xff" * 32)),
            )
        ],
    }


def json_texts() -> Case:
    good = [
        b'{"b":1,"a":[true,false,null]}',
        b' {"a" : 1.50 , "b" : 1E2}\n',
        b"[0,-0,9007199254740991,-9007199254740991]",
        b"[1e-5,0.0001,1e15,1e16,123456789.125,5e-324,1.7976931348623157e308,0.1,-0.0,1e22]",
        rb'"\u0001\u001f\b\f\n\r\t\"\\\/\u00e9\ud83d\ude00\u2028\u007f"',
        '{"é":"é","z":1,"𝒳":2,"ﬀ":3}'.encode(),
        b"[" * 32 + b"]" * 32,
    ]
    bad = {
        "nothing": b"",
        "not UTF-8": b'"\xff"',
        "a byte order mark": b"\xef\xbb\xbf{}",
        "a lone surrogate": rb'"\ud800"',
        "a lone surrogate, raw": b'"\xed\xa0\x80"',
        "a key twice": b'{"a":1,"a":1}',
        "a key twice, once escaped": rb'{"a":1,"\u0061":1}',
        "NaN": b"NaN",
        "infinity": b"-Infinity",
        "a number that overflows": b"1e999",
        "2^53": b"9007199254740992",
        "-2^53": b"-9007199254740992",
        "a number of 65 characters": b"0." + b"1" * 63,
        "33 deep": b"[" * 33 + b"]" * 33,
        "two values": b"1 2",
        "a comma too many": b"[1,]",
        "a control character": b'"\n"',
        "a leading zero": b"01",
    }
    return {
        "about": "text (base64) -> its value in canonical JSON (base64). Refused: texts that are no JSON of ours.",
        "accept": [
            {"name": f"text {n}", "text": b64(text), "canonical": b64(canonical_json(json.loads(text)))}
            for n, text in enumerate(good)
        ],
        "refuse": [refused(name, "R-ENV-2", "MalformedRecord", text=b64(text)) for name, text in bad.items()],
    }


def envelopes() -> Case:
    accept = []
    for kind in KINDS:
        payload = canonical_json({"kind": kind})
        envelope = sealed(ALICE, kind, payload)
        message = pae(payload_type(kind), payload)
        accept.append(
            {
                "name": kind,
                "seed": SEEDS["alice"].hex(),
                "type": payload_type(kind),
                "payload": b64(payload),
                "pae": b64(message),
                "signature": ALICE.sign(message).hex(),
                "digest": blake3_hex(payload),
                "envelope": b64(envelope),
            }
        )
    good = sealed(ALICE, "claim", b"{ab}")
    empty = sealed(ALICE, "claim", b"")
    kind = payload_type("claim")

    def bad(name: str, rule: str, error: str, data: bytes | Case, **more: Any) -> Case:
        return refused(
            name, rule, error, type=kind, max_bytes=4096, envelope=data if isinstance(data, dict) else b64(data), **more
        )

    forged_zero = b'{"payload":"","payloadType":"%b","signatures":[{"keyid":"%b","sig":"%b"}]}' % (
        kind.encode(),
        peer_id_of(b"\x01" + bytes(31)).encode(),
        b64(b"\x01" + bytes(63)).encode(),
    )
    return {
        "about": "An envelope of each kind, with what was signed. Refused: as one of `type` and at most `max_bytes`.",
        "accept": accept,
        "refuse": [
            bad("4,097 bytes", "R-ENV-1", "RecordTooLarge", repeated(b"[", 4097)),
            bad("not JSON", "R-ENV-2", "MalformedRecord", b"{]"),
            bad("a space", "R-ENV-3", "MalformedRecord", good.replace(b",", b", ", 1)),
            bad("a line break behind it", "R-ENV-3", "MalformedRecord", good + b"\n"),
            bad("an escaped letter", "R-ENV-3", "MalformedRecord", good.replace(b'"sig"', rb'"s\u0069g"')),
            bad("a further key", "R-ENV-3", "MalformedRecord", good[:-1] + b',"z":1}'),
            bad("a further key in the signature", "R-ENV-3", "MalformedRecord", good.replace(b'"}]', b'","z":1}]')),
            bad(
                "no signature",
                "R-ENV-3",
                "MalformedRecord",
                b'{"payload":"","payloadType":"%b","signatures":[]}' % kind.encode(),
            ),
            bad(
                "base64 with bits to spare",
                "R-ENV-3",
                "MalformedRecord",
                good.replace(b64(b"{ab}").encode(), b"e2FifR=="),
            ),
            bad("base64 without padding", "R-ENV-3", "MalformedRecord", good.replace(b64(b"{ab}").encode(), b"e2FifQ")),
            bad("another kind", "R-ENV-4", "WrongKind", sealed(ALICE, "holding", b"{ab}")),
            bad("a kind that is none", "R-ENV-4", "WrongKind", good.replace(b".claim.", b".gradient.")),
            bad(
                "a changed payload",
                "R-ENV-5",
                "BadSignature",
                good.replace(b64(b"{ab}").encode(), b64(b"{ac}").encode()),
            ),
            bad(
                "another signer", "R-ENV-5", "BadSignature", good.replace(ALICE.peer_id.encode(), BOB.peer_id.encode())
            ),
            bad(
                "relabelled",
                "R-ENV-5",
                "BadSignature",
                sealed(ALICE, "holding", b"{ab}").replace(b".holding.", b".claim."),
            ),
            bad(
                "a signature of 63 bytes",
                "R-ENV-5",
                "BadSignature",
                empty[: empty.index(b'"sig":"') + 7] + b64(bytes(63)).encode() + b'"}]}',
            ),
            bad("a keyid that is none", "R-KEY-1", "MalformedRecord", good.replace(ALICE.peer_id.encode(), b"alice")),
            bad("a key for which anybody can sign", "R-KEY-2", "MalformedRecord", forged_zero),
        ],
    }


def plans() -> Case:
    def bad(name: str, rule: str, error: str, data: bytes | Case, plan_id: str | None = None) -> Case:
        return refused(name, rule, error, plan=data if isinstance(data, dict) else b64(data), plan_id=plan_id)

    def field(name: str, /, **changes: Any) -> Case:
        return bad(name, "R-PLAN-3", "MalformedRecord", sealed(ORGANISER, "plan", plan_payload(**changes)))

    spec = plan_payload()["expert"]
    policy = plan_payload()["policy"]
    verification = plan_payload()["verification"]
    entry = {"name": "a.json", "length": 0, "chunks": []}
    return {
        "about": "plan.json (base64) -> plan id and payload. Refused: as the plan `plan_id` (null: as any).",
        "accept": [
            {"name": name, "plan": b64(data), "plan_id": plan_id, "payload": payload}
            for name, data, plan_id, payload in (
                ("open", OPEN, OPEN_ID, plan_payload()),
                ("invited", INVITED, INVITED_ID, plan_payload(admission="invited")),
                ("router kept for one key", KEPT_ROUTER, KEPT_ROUTER_ID, plan_payload(router_slot=ALICE.peer_id)),
                ("another kind of expert in slot 1", MIXED, blake3_hex(MIXED), mixed_payload()),
            )
        ],
        "refuse": [
            bad("1 MiB and a byte", "R-PLAN-1", "RecordTooLarge", repeated(b"[", 2**20 + 1)),
            bad("another plan", "R-PLAN-2", "DigestMismatch", OPEN, INVITED_ID),
            bad("signed by another", "R-PLAN-4", "WrongSigner", sealed(ALICE, "plan", plan_payload())),
            bad("another kind", "R-ENV-4", "WrongKind", sealed(ORGANISER, "lock", plan_payload())),
            field("no clusters", clusters=0),
            field("1,025 clusters", clusters=1025),
            field("clusters is a truth value", clusters=True),
            field("created is a fraction", created=1.5),
            field("a name that clears the screen", name="\x1b[2J"),
            field("a name that runs backwards", name="a\u202eb"),
            field("a name of 101 characters", name="a" * 101),
            field("an admission that is none", admission="closed"),
            field("a router slot of nobody", router_slot="me"),
            field("a lease of 901 s", policy={**policy, "lease_s": 901}),
            field(
                "no bar for a slot", verification={**verification, "bars": {"0": {"resumable": 1, "assemblable": 1}}}
            ),
            field("no tolerance", verification={**verification, "tolerance": 0}),
            field("names itself", files=[{**entry, "name": "plan.json"}]),
            field("a file twice", files=[entry, entry]),
            field("a file that climbs", files=[{**entry, "name": "../a"}]),
            field("2,049 files", files=[{**entry, "name": f"f{number}"} for number in range(2049)]),
            field(
                "files of more than 2^33 bytes",
                files=[
                    {"name": f"f{number}", "length": 2**23, "chunks": ["0" * 64, "1" * 64]} for number in range(1025)
                ],
            ),
            field("a tensor twice", expert={**spec, "files": {"ema.safetensors": [TENSORS[0], TENSORS[0]]}}),
            field(
                "a tensor of 2^55 bytes",
                expert={**spec, "files": {"ema.safetensors": [{"name": "w", "dtype": "I64", "shape": [2**26, 2**26]}]}},
            ),
            field(
                "a checkpoint of more than 2^36 bytes",
                expert={**spec, "files": {"ema.safetensors": [{"name": "w", "dtype": "F32", "shape": [2**34 + 1]}]}},
            ),
            field("weights that are no safetensors", expert={**spec, "files": {"ema.pt": TENSORS}}),
            field("an empty list of variants", variants=[]),
            field("a variant of no slot", variants=[{**spec, "slots": []}]),
            field("a variant without tensors", variants=[{"recipe": {}, "slots": ["1"]}]),
            field("a slot in two variants", variants=[{**spec, "slots": ["1"]}, {**spec, "slots": ["0", "1"]}]),
            field("a variant of the router", variants=[{**spec, "slots": ["router"]}]),
            field("a variant of a slot that the plan does not have", variants=[{**spec, "slots": ["2"]}]),
            field(
                "65 variants",
                clusters=65,
                variants=[{**spec, "slots": [str(k)]} for k in range(65)],
                verification={
                    **verification,
                    "bars": dict.fromkeys((*map(str, range(65)), "router"), verification["bars"]["0"]),
                },
            ),
        ],
    }


def records() -> Case:
    """Checked against the plans of plans.json at `now`."""
    author_token, holder_token = token(ALICE), token(BOB)

    def case(name: str, kind: str, envelope: bytes, plan: str = OPEN_ID) -> Case:
        return {"name": name, "kind": kind, "plan_id": plan, "now": NOW, "envelope": b64(envelope)}

    def bad(name: str, rule: str, error: str, kind: str, envelope: bytes, plan: str = OPEN_ID) -> Case:
        return {**refused(name, rule, error), **case(name, kind, envelope, plan)}

    def by_alice(**changes: Any) -> bytes:
        return sealed(ALICE, "claim", claim(**changes))

    def by_bob(inner: bytes, **changes: Any) -> bytes:
        return sealed(BOB, "holding", holding(inner, **changes))

    def announced(**changes: Any) -> bytes:
        return sealed(ALICE, "checkpoint", announcement(**changes))

    invited = {"plan": INVITED_ID}
    accept = [
        case("a claim", "claim", by_alice()),
        case("a released claim with unknown fields", "claim", by_alice(released=True, note=[1, {"x": None}])),
        case("a lease of 905 s", "claim", by_alice(until=NOW + 905)),
        case("no loss yet", "claim", by_alice(progress={**claim()["progress"], "loss": None})),
        case("a holding by another than the author", "holding", by_bob(announced())),
        case("an invited claim", "claim", by_alice(**invited, token=author_token), INVITED_ID),
        case(
            "the organiser needs no token",
            "claim",
            sealed(ORGANISER, "claim", claim(**invited, peer=ORGANISER.peer_id)),
            INVITED_ID,
        ),
        case(
            "an invited holding",
            "holding",
            by_bob(announced(**invited, token=author_token), **invited, token=holder_token),
            INVITED_ID,
        ),
        case(
            "anybody holds the router that one key trains",
            "holding",
            by_bob(announced(plan=KEPT_ROUTER_ID, slot="router"), plan=KEPT_ROUTER_ID, slot="router"),
            KEPT_ROUTER_ID,
        ),
    ]
    progress = claim()["progress"]
    shapes: dict[str, dict[str, Any]] = {
        "seq is a truth value": {"seq": True},
        "seq is a fraction": {"seq": 10.0},
        "seq is negative": {"seq": -1},
        "seq is text": {"seq": "10"},
        "a slot with a leading zero": {"slot": "00"},
        "a plan id in capitals": {"plan": OPEN_ID.upper()},
        "a peer id that is none": {"peer": "alice"},
        "until is text": {"until": "1800000060.25"},
        "until is zero": {"until": 0},
        "no progress": {"progress": None},
        "a device that moves the cursor": {"progress": {**progress, "device": "\x1b[H"}},
        "a device of 33 characters": {"progress": {**progress, "device": "a" * 33}},
        "images a second below zero": {"progress": {**progress, "images_per_s": -1}},
        "a token of 2,049 characters": {"token": "a" * 2049},
    }
    missing = claim()
    del missing["seq"]
    refuse = [bad(name, "R-REC-1", "MalformedRecord", "claim", by_alice(**change)) for name, change in shapes.items()]
    refuse += [
        bad("seq is missing", "R-REC-1", "MalformedRecord", "claim", sealed(ALICE, "claim", missing)),
        bad("a checkpoint of no bytes", "R-REC-1", "MalformedRecord", "holding", by_bob(announced(bytes=0))),
        bad("in another's name", "R-REC-2", "WrongSigner", "claim", sealed(BOB, "claim", claim())),
        bad(
            "an announcement in another's name",
            "R-REC-2",
            "WrongSigner",
            "holding",
            by_bob(sealed(BOB, "checkpoint", announcement())),
        ),
        bad("another plan", "R-REC-3", "WrongPlan", "claim", by_alice(plan=INVITED_ID)),
        bad("a slot that the plan lacks", "R-REC-4", "WrongSlot", "claim", by_alice(slot="2")),
        bad("a lease that ended now", "R-REC-5", "LeaseExpired", "claim", by_alice(until=NOW)),
        bad("a lease of 906 s", "R-REC-6", "LeaseTooLong", "claim", by_alice(until=NOW + 906)),
        bad(
            "a holding of another slot than its announcement",
            "R-REC-7",
            "WrongSlot",
            "holding",
            by_bob(announced(), slot="1"),
        ),
        bad(
            "a checkpoint beyond the cap", "R-REC-8", "CheckpointTooLarge", "holding", by_bob(announced(bytes=CAP + 1))
        ),
        bad("a claim where an announcement belongs", "R-ENV-4", "WrongKind", "holding", by_bob(by_alice())),
        bad("no token", "R-ADM-1", "NotAdmitted", "claim", by_alice(**invited), INVITED_ID),
        bad("another's token", "R-ADM-1", "NotAdmitted", "claim", by_alice(**invited, token=holder_token), INVITED_ID),
        bad(
            "a token of another plan",
            "R-ADM-1",
            "NotAdmitted",
            "claim",
            by_alice(**invited, token=token(ALICE, OPEN_ID)),
            INVITED_ID,
        ),
        bad(
            "a token signed by oneself",
            "R-ADM-1",
            "NotAdmitted",
            "claim",
            by_alice(**invited, token=token(ALICE, signer=ALICE)),
            INVITED_ID,
        ),
        bad(
            "a holder with a token, an author without",
            "R-ADM-1",
            "NotAdmitted",
            "holding",
            by_bob(announced(**invited), **invited, token=holder_token),
            INVITED_ID,
        ),
        bad(
            "the router's slot of another",
            "R-ADM-2",
            "NotAdmitted",
            "claim",
            sealed(BOB, "claim", claim(plan=KEPT_ROUTER_ID, slot="router", peer=BOB.peer_id)),
            KEPT_ROUTER_ID,
        ),
    ]
    return {
        "about": "Envelopes of claims and holdings -> accepted, or refused, for the plan at `now` (Unix seconds).",
        "accept": accept,
        "refuse": refuse,
    }


def admission() -> Case:
    def lent(**changes: Any) -> str:
        values = {"observer": BOB.peer_id, "peer": ALICE.peer_id, "plan": INVITED_ID, "until": NOW + 60}
        return sealed(ALICE, "delegation", {**values, **changes}).decode()

    def bad(name: str, text: str) -> Case:
        return refused(
            name, "R-ADM-3", "NotAdmitted", observer=BOB.peer_id, plan_id=INVITED_ID, now=NOW, delegation=text
        )

    return {
        "about": "Tokens of the invited plan, and delegations to `observer` at `now`. Refused: delegations.",
        "accept": [
            {"name": name, "peer": peer.peer_id, "plan_id": INVITED_ID, "token": token(peer)}
            for name, peer in (("alice", ALICE), ("bob", BOB))
        ],
        "delegations": [
            {
                "name": "one minute",
                "observer": BOB.peer_id,
                "peer": ALICE.peer_id,
                "plan_id": INVITED_ID,
                "now": NOW,
                "delegation": lent(),
            }
        ],
        "refuse": [
            bad("not an envelope", "rubbish"),
            bad("ended", lent(until=NOW)),
            bad("too long", lent(until=NOW + 906)),
            bad("for another observer", lent(observer=ORGANISER.peer_id)),
            bad("for another plan", lent(plan=OPEN_ID)),
            bad("in another's name", lent(peer=BOB.peer_id)),
        ],
    }


def manifests() -> Case:
    good = manifest()
    step_of = announcement()

    def case(name: str, value: Any, **changes: Any) -> Case:
        data = value if isinstance(value, bytes) else canonical_json(value)
        root = changes.pop("root", None) or blake3_hex(data)
        announced = {**step_of, "root": root, **changes}
        return {"name": name, "manifest": b64(data), "announcement": announced, "plan_id": OPEN_ID}

    def bad(name: str, rule: str, error: str, value: Any, **changes: Any) -> Case:
        return {**refused(name, rule, error), **case(name, value, **changes)}

    def files(name: str, rule: str, *entries: Case) -> Case:
        return bad(name, rule, "BadManifest", {**good, "files": list(entries)})

    weights, state = good["files"]
    trained = {
        "v": 1,
        "from_step": 0,
        "to_step": 50,
        "seed": 1,
        "recipe": "d" * 64,
        "rows": {"digest": "e" * 64, "count": 3},
        "environment": {
            "device": "cpu",
            "chip": "x86_64 AVX2",
            "precision": "fp32",
            "threads": 1,
            "flush_denormal": True,
            "deterministic": True,
            "tf32": False,
            "torch": "2.9.0",
            "package": "0.1.0",
        },
    }

    def provenance(**changes: Any) -> Case:
        return {**good, "meta": {**good["meta"], "provenance": {**trained, **changes}}}

    text = canonical_json(good)
    return {
        "about": "A manifest (base64) as the one that `announcement` of the plan names -> accepted or refused.",
        "accept": [
            case("a manifest", good),
            case("with further fields", {**good, "note": 1, "meta": {**good["meta"], "loss": 0.25}}),
            case("with provenance", provenance()),
        ],
        "refuse": [
            files("a path that climbs", "R-MAN-1", {**weights, "name": "../x"}),
            files("an absolute path", "R-MAN-1", {**weights, "name": "/etc/passwd"}),
            files("a name in capitals", "R-MAN-1", {**weights, "name": "A.json"}),
            files("a name twice", "R-MAN-1", weights, weights),
            files("not sorted", "R-MAN-1", state, weights),
            files("a chunk missing", "R-MAN-1", {**weights, "chunks": []}),
            files("a chunk too many", "R-MAN-1", {**weights, "chunks": ["c" * 64] * 2}),
            files("no files", "R-MAN-1"),
            files(
                "65 files",
                "R-MAN-1",
                *({"name": f"f{number:02}.json", "length": 0, "chunks": []} for number in range(65)),
            ),
            bad("another version", "R-MAN-1", "BadManifest", {**good, "v": 2}),
            bad("a router of a cluster", "R-MAN-1", "BadManifest", {**good, "kind": "router"}),
            bad("no parent named", "R-MAN-1", "BadManifest", {**good, "meta": {"step": 50}}),
            bad("another root", "R-MAN-2", "DigestMismatch", good, root="f" * 64),
            {
                **refused("1 MiB and a byte", "R-MAN-3", "RecordTooLarge"),
                "manifest": repeated(b" ", 2**20 + 1),
                "announcement": step_of,
                "plan_id": OPEN_ID,
            },
            bad("a line break behind it", "R-MAN-4", "BadManifest", text + b"\n"),
            bad(
                "a number spelled otherwise",
                "R-MAN-4",
                "BadManifest",
                text.replace(b'"parent":null', b'"loss":0.50,"parent":null'),
            ),
            bad(
                "beyond the cap",
                "R-MAN-5",
                "BadManifest",
                {**good, "files": [{**weights, "length": CAP + 1, "chunks": ["c" * 64] * 3}]},
            ),
            bad("another slot than announced", "R-MAN-6", "BadManifest", good, slot="1"),
            bad("another step than announced", "R-MAN-6", "BadManifest", good, step=51),
            bad("another parent than announced", "R-MAN-6", "BadManifest", good, parent="a" * 64),
            bad("other bytes than announced", "R-MAN-6", "BadManifest", good, bytes=241),
            bad("no weights", "R-MAN-7", "BadManifest", {**good, "files": [{**state, "length": 240}]}),
            bad("a pickle", "R-MAN-7", "BadManifest", {**good, "files": [weights, {**state, "name": "state.pt"}]}),
            bad("a provenance without rows", "R-PROV-1", "BadManifest", provenance(rows=None)),
            bad("a provenance of other steps", "R-PROV-2", "BadManifest", provenance(to_step=51)),
            bad("a provenance that begins after its end", "R-PROV-2", "BadManifest", provenance(from_step=50)),
            bad("a provenance with a beginning and no parent", "R-PROV-2", "BadManifest", provenance(from_step=10)),
        ],
    }


def headers() -> Case:
    good: dict[str, Any] = {
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [24, 30]},
        "none": {"dtype": "U8", "shape": [0, 7], "data_offsets": [30, 30]},
    }

    def framed(text: bytes, extra: int = 30) -> Case:
        return {"data": b64(len(text).to_bytes(8, "little") + text), "file_length": 8 + len(text) + extra}

    def bad(name: str, rule: str, value: Any, extra: int = 30) -> Case:
        text = value if isinstance(value, bytes) else canonical_json(value)
        return refused(name, rule, "BadHeader", **framed(text, extra))

    def changed(name: str, rule: str, tensor: str, **changes: Any) -> Case:
        return bad(name, rule, {**good, tensor: {**good[tensor], **changes}})

    text = canonical_json(good)
    return {
        "about": "The first bytes (base64) of a weights file of `file_length` bytes, against `table`.",
        "table": TENSORS,
        "accept": [
            {"name": "a header", **framed(text)},
            {
                "name": "with metadata and spaces behind",
                **framed(canonical_json({"__metadata__": {"format": "pt"}, **good}) + b"   "),
            },
            {
                "name": "in another order",
                **framed(
                    canonical_json(
                        {
                            "w": {**good["w"], "data_offsets": [6, 30]},
                            "b": {**good["b"], "data_offsets": [0, 6]},
                            "none": {**good["none"], "data_offsets": [6, 6]},
                        }
                    )
                ),
            },
        ],
        "refuse": [
            refused("seven bytes", "R-HDR-1", "BadHeader", data=b64(bytes(7)), file_length=7),
            refused("a header of no bytes", "R-HDR-1", "BadHeader", data=b64(bytes(8)), file_length=38),
            refused(
                "a header of 4 MiB and a byte",
                "R-HDR-1",
                "BadHeader",
                data=b64((2**22 + 1).to_bytes(8, "little")),
                file_length=2**23,
            ),
            refused(
                "a header beyond the file",
                "R-HDR-1",
                "BadHeader",
                data=b64((40).to_bytes(8, "little") + b"{}"),
                file_length=10,
            ),
            refused(
                "a pickle",
                "R-HDR-1",
                "BadHeader",
                data=b64(b"\x80\x04\x95\x1d\x00\x00\x00\x00cposix\nsystem"),
                file_length=100,
            ),
            bad("not JSON", "R-HDR-2", b"{]"),
            bad("a list", "R-HDR-2", [good]),
            bad("spaces before", "R-HDR-2", b" " + text),
            bad("a tensor twice", "R-HDR-2", text[:-1] + b',"w":{}}'),
            bad("metadata that is no text", "R-HDR-2", {"__metadata__": {"a": 1}, **good}),
            changed("a further field", "R-HDR-2", "w", note=1),
            changed("offsets that are fractions", "R-HDR-2", "w", data_offsets=[0.0, 24.0]),
            changed("a negative offset", "R-HDR-2", "w", data_offsets=[-24, 0]),
            bad("a tensor missing", "R-HDR-3", {name: good[name] for name in ("w", "b")}),
            bad("a tensor too many", "R-HDR-3", {**good, "x": {"dtype": "U8", "shape": [0], "data_offsets": [30, 30]}}),
            changed("another dtype", "R-HDR-4", "b", dtype="F16"),
            changed("another shape", "R-HDR-4", "w", shape=[3, 2]),
            changed("a span too short", "R-HDR-5", "w", data_offsets=[0, 23]),
            changed("an overlap", "R-HDR-5", "b", data_offsets=[23, 29]),
            bad(
                "a gap",
                "R-HDR-5",
                {
                    **good,
                    "b": {**good["b"], "data_offsets": [25, 31]},
                    "none": {**good["none"], "data_offsets": [31, 31]},
                },
                31,
            ),
            bad("a byte behind the last tensor", "R-HDR-6", good, 31),
            bad("a byte too few", "R-HDR-6", good, 29),
        ],
    }


def locks() -> Case:
    lock: dict[str, Any] = {
        "v": 1,
        "plan": OPEN_ID,
        "organiser": ORGANISER.peer_id,
        "assembler": ALICE.peer_id,
        "created": 1_800_000_000,
        "files": [{"path": "config.json", "length": 2, "blake3": blake3_hex(b"{}")}],
        "slots": [{"slot": "0", "author": ALICE.peer_id, "root": "b" * 64, "step": 50, "probe_loss": 0.25}],
        "missing": ["1", "router"],
    }
    file = lock["files"][0]

    def bad(name: str, rule: str, error: str, data: bytes) -> Case:
        return refused(name, rule, error, lock=b64(data))

    def field(name: str, /, **changes: Any) -> Case:
        return bad(name, "R-REC-1", "MalformedRecord", sealed(ALICE, "lock", {**lock, **changes}))

    good = sealed(ALICE, "lock", lock)
    return {
        "about": "lock.json (base64) -> its payload and its digest, the assembly digest.",
        "accept": [{"name": "a lock", "lock": b64(good), "digest": blake3_hex(good), "payload": lock}],
        "refuse": [
            bad("signed by another", "R-REC-2", "WrongSigner", sealed(BOB, "lock", lock)),
            field("a path that climbs", files=[{**file, "path": "../a"}]),
            field("the lock itself", files=[{**file, "path": "lock.json"}]),
            field("files not sorted", files=[{**file, "path": "b"}, {**file, "path": "a"}]),
            field("a slot twice", missing=["0"]),
        ],
    }
