"""Vectors of DHT places, sequences, probe losses, invites, notices, greetings and the frames of the file protocol."""

from __future__ import annotations

import base64
import struct
from typing import Any

from vector_records import Case, refused
from vector_world import (
    ALICE,
    BOB,
    INVITED_ID,
    NOW,
    OPEN_ID,
    ORGANISER,
    announcement,
    b64,
    claim,
    holding,
    repeated,
    sealed,
    token,
)

from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.dht_rules import checkpoint_key, claim_key, dht_id
from paris_swarm.dht_schemas.digest import blake3_hex


def dht() -> Case:
    """Stores to a node that takes part in the open and the invited plan."""
    good = sealed(ALICE, "claim", claim())
    held = sealed(BOB, "holding", holding())
    until = NOW + 60.25

    def case(name: str, value: bytes | None, **changes: Any) -> Case:
        values = {
            "key": claim_key(OPEN_ID, "0"),
            "subkey": ALICE.peer_id,
            "value": None if value is None else b64(value),
            "expiration": until,
            "now": NOW,
        }
        return {"name": name, **values, **changes}

    def bad(name: str, rule: str, error: str, value: bytes | None, **changes: Any) -> Case:
        return {**refused(name, rule, error), **case(name, value, **changes)}

    stranger = "d" * 64
    return {
        "about": "DHT keys -> hivemind's ids (hex). Stores: `expiration` is a number or a text that is none; a null "
        "`value` is a value that is no bytes; a null `subkey` is none.",
        "keys": [
            {"key": key, "id": dht_id(key).hex()}
            for key in (
                claim_key(OPEN_ID, "0"),
                claim_key(OPEN_ID, "router"),
                checkpoint_key(OPEN_ID, "0"),
                checkpoint_key(INVITED_ID, "1"),
            )
        ],
        "accept": [
            case("a claim", good),
            case("a holding", held, key=checkpoint_key(OPEN_ID, "0"), subkey=BOB.peer_id),
        ],
        "refuse": [
            bad("a value that is no bytes", "R-DHT-1", "MalformedRecord", None),
            bad("a plain value", "R-DHT-2", "WrongKey", good, subkey=None),
            bad("the key of another slot", "R-DHT-3", "WrongKey", good, key=claim_key(OPEN_ID, "1")),
            bad("the key of another kind", "R-DHT-3", "WrongKey", good, key=checkpoint_key(OPEN_ID, "0")),
            bad("the key of another plan", "R-DHT-3", "WrongKey", good, key=claim_key(INVITED_ID, "0")),
            bad("an announcement by itself", "R-ENV-4", "WrongKind", sealed(ALICE, "checkpoint", announcement())),
            bad("another's subkey", "R-DHT-4", "WrongSigner", good, subkey=BOB.peer_id),
            bad("a subkey with something behind", "R-DHT-4", "WrongSigner", good, subkey=ALICE.peer_id + "|x"),
            bad("a later expiration than signed", "R-DHT-5", "LeaseMismatch", good, expiration=until + 0.25),
            bad("no end", "R-REC-6", "LeaseTooLong", good, expiration="inf"),
            bad("no number", "R-REC-6", "LeaseTooLong", good, expiration="nan"),
            bad("1e18", "R-REC-6", "LeaseTooLong", good, expiration=1e18),
            bad("ended", "R-REC-5", "LeaseExpired", good, now=until),
            bad(
                "of a plan that the node does not know",
                "R-REC-3",
                "WrongPlan",
                sealed(ALICE, "claim", claim(plan=stranger)),
                key=claim_key(stranger, "0"),
            ),
            bad(
                "no token",
                "R-ADM-1",
                "NotAdmitted",
                sealed(ALICE, "claim", claim(plan=INVITED_ID)),
                key=claim_key(INVITED_ID, "0"),
            ),
        ],
    }


def sequences() -> Case:
    def fed(envelope: bytes, result: str = "accepted") -> Case:
        return {"envelope": b64(envelope), "result": result}

    def claimed(**changes: Any) -> bytes:
        return sealed(ALICE, "claim", claim(**changes))

    def held(inner: Case, **changes: Any) -> bytes:
        return sealed(BOB, "holding", holding(sealed(ALICE, "checkpoint", inner), **changes))

    one, other = claimed(), claimed(until=NOW + 50)
    return {
        "about": "Envelopes fed one after another to a reader of the open plan at `now`: accepted, or the rule.",
        "now": NOW,
        "plan_id": OPEN_ID,
        "runs": [
            {"name": "the same again", "feed": [fed(one), fed(one)]},
            {"name": "rollback of a claim", "feed": [fed(claimed(seq=11)), fed(one, "R-SET-2")]},
            {
                "name": "rollback of a holding",
                "feed": [fed(held(announcement(), seq=11)), fed(held(announcement()), "R-SET-2")],
            },
            {
                "name": "an older announcement is no rollback",
                "feed": [fed(held(announcement(seq=20))), fed(held(announcement(), seq=11))],
            },
            {
                "name": "equivocation, and out",
                "feed": [
                    fed(one),
                    fed(other, "R-SET-3"),
                    fed(claimed(seq=12), "R-SET-4"),
                    fed(held(announcement()), "R-SET-4"),
                ],
            },
            {"name": "the same sequence in another slot", "feed": [fed(one), fed(claimed(slot="1"))]},
        ],
        "proofs": [{"name": "two claims", "first": b64(one), "second": b64(other), "signer": ALICE.peer_id}],
        "refuse": [
            refused("the same twice", "R-SET-6", "NotAProof", first=b64(one), second=b64(one)),
            refused(
                "two sequences", "R-SET-6", "NotAProof", first=b64(one), second=b64(claimed(seq=11, until=NOW + 50))
            ),
            refused(
                "two signers",
                "R-SET-6",
                "NotAProof",
                first=b64(one),
                second=b64(sealed(BOB, "claim", claim(peer=BOB.peer_id))),
            ),
        ],
    }


def values() -> Case:
    def case(name: str, announced: float, measured: float | str, bar: str) -> Case:
        return {"name": name, "announced": announced, "measured": measured, "bar": bar}

    def bad(
        name: str, rule: str, error: str, announced: float, measured: float | str, bar: str = "assemblable"
    ) -> Case:
        return {**refused(name, rule, error), **case(name, announced, measured, bar)}

    return {
        "about": "Probe losses against the open plan: tolerance 0.01, bars 1.0 (resumable) and 0.5 (assemblable).",
        "plan_id": OPEN_ID,
        "accept": [
            case("as announced", 0.25, 0.25, "assemblable"),
            case("within the tolerance", 0.25, 0.252, "assemblable"),
            case("good enough to go on from", 0.75, 0.75, "resumable"),
        ],
        "refuse": [
            bad("no number", "R-VAL-1", "NotFinite", 0.25, "nan"),
            bad("no end", "R-VAL-1", "NotFinite", 0.25, "inf"),
            bad("worse than announced", "R-VAL-2", "ProbeFailed", 0.25, 0.253),
            bad("better than announced", "R-VAL-2", "ProbeFailed", 0.25, 0.247),
            bad("at the bar", "R-VAL-3", "ProbeFailed", 0.5, 0.5),
            bad("above the other bar", "R-VAL-3", "ProbeFailed", 1.0, 1.0, "resumable"),
        ],
    }


def invites() -> Case:
    first = f"/ip4/203.0.113.5/tcp/4001/p2p/{ALICE.peer_id}"
    second = f"/dns4/swarm.example/udp/4001/quic-v1/p2p/{BOB.peer_id}"
    plain = f"paris:{OPEN_ID}?peer={first}"
    text = base64.urlsafe_b64encode(token(BOB).encode()).decode().rstrip("=")

    def bad(name: str, invite: str) -> Case:
        return refused(name, "R-INV-1", "InviteError", invite=invite)

    return {
        "about": "Invites -> plan id, addresses and token.",
        "accept": [
            {"name": "one peer", "invite": plain, "plan_id": OPEN_ID, "peers": [first], "token": None},
            {
                "name": "two peers",
                "invite": f"{plain}&peer={second}",
                "plan_id": OPEN_ID,
                "peers": [first, second],
                "token": None,
            },
            {"name": "nobody yet", "invite": f"paris:{OPEN_ID}", "plan_id": OPEN_ID, "peers": [], "token": None},
            {
                "name": "percent-encoded, quoted",
                "invite": f" '{plain.replace('/', '%2F')}' ",
                "plan_id": OPEN_ID,
                "peers": [first],
                "token": None,
            },
            {
                "name": "for bob",
                "invite": f"paris:{INVITED_ID}?peer={first}&token={text}",
                "plan_id": INVITED_ID,
                "peers": [first],
                "token": token(BOB),
            },
        ],
        "refuse": [
            bad("empty", ""),
            bad("another scheme", plain.replace("paris:", "http:")),
            bad("a plan id cut short", plain.replace(OPEN_ID, OPEN_ID[:-1])),
            bad("a plan id in capitals", plain.replace(OPEN_ID, OPEN_ID.upper())),
            bad("no peer id", f"paris:{OPEN_ID}?peer=/ip4/203.0.113.5/tcp/4001"),
            bad("a peer id that is none", f"paris:{OPEN_ID}?peer=/ip4/203.0.113.5/tcp/4001/p2p/alice"),
            bad("an address that is none", f"paris:{OPEN_ID}?peer=/ip4/203.0.113/tcp/4001/p2p/{ALICE.peer_id}"),
            bad("a field that is none", f"{plain}&name=x"),
            bad(
                "33 peers",
                f"paris:{OPEN_ID}?"
                + "&".join(f"peer=/ip4/203.0.113.5/tcp/{port}/p2p/{ALICE.peer_id}" for port in range(1, 34)),
            ),
            bad("8,193 characters", f"paris:{OPEN_ID}?peer=" + "/" * 8116),
            bad("a token of another plan", f"{plain}&token={text}"),
            bad("a damaged token", f"paris:{INVITED_ID}?peer={first}&token={text[:-5]}"),
        ],
    }


def notices() -> Case:
    notice: Case = {"plan": OPEN_ID, "number": 1, "state": "running", "revoked": [], "message": ""}
    both = sorted([ALICE.peer_id, BOB.peer_id])

    def bad(name: str, rule: str, error: str, data: bytes | Case) -> Case:
        return refused(name, rule, error, plan_id=OPEN_ID, notice=data if isinstance(data, dict) else b64(data))

    def field(name: str, /, **changes: Any) -> Case:
        return bad(name, "R-NOT-1", "MalformedRecord", sealed(ORGANISER, "notice", {**notice, **changes}))

    def good(name: str, **changes: Any) -> Case:
        return {"name": name, "plan_id": OPEN_ID, "notice": b64(sealed(ORGANISER, "notice", {**notice, **changes}))}

    return {
        "about": "Notices of the open plan. `rollback`: fed in this order, the last one is refused.",
        "accept": [
            good("nothing new"),
            good("two keys revoked", number=2, revoked=both),
            good("paused", number=3, state="paused", message="back on Monday"),
            good("ended", number=4, state="ended"),
        ],
        "rollback": {
            "rule": "R-NOT-3",
            "error": "Rollback",
            "feed": [b64(sealed(ORGANISER, "notice", {**notice, "number": number})) for number in (2, 1)],
        },
        "refuse": [
            bad("64 KiB and a byte", "R-ENV-1", "RecordTooLarge", repeated(b"[", 2**16 + 1)),
            bad("of a peer", "R-NOT-2", "WrongSigner", sealed(ALICE, "notice", notice)),
            bad("of another plan", "R-REC-3", "WrongPlan", sealed(ORGANISER, "notice", {**notice, "plan": INVITED_ID})),
            field("number 0", number=0),
            field("a state that is none", state="stopped"),
            field("not ascending", revoked=both[::-1]),
            field("a key twice", revoked=[both[0], both[0]]),
            field("the organiser", revoked=[ORGANISER.peer_id]),
            field("a message that clears the screen", message="\x1b[2J"),
            field("a message of 501 characters", message="a" * 501),
        ],
    }


def greetings() -> Case:
    full = {
        "delegation": sealed(
            ALICE, "delegation", {"observer": BOB.peer_id, "peer": ALICE.peer_id, "plan": INVITED_ID, "until": NOW + 60}
        ).decode(),
        "plan": INVITED_ID,
        "token": token(ALICE),
    }
    pair = [sealed(ALICE, "claim", claim()).decode(), sealed(ALICE, "claim", claim(until=NOW + 50)).decode()]

    def bad(name: str, rule: str, error: str, data: bytes | Case) -> Case:
        return refused(name, rule, error, greeting=data if isinstance(data, dict) else b64(data))

    return {
        "about": "The payload of a greeting frame (base64).",
        "accept": [
            {"name": "nothing said", "greeting": ""},
            {"name": "a plan", "greeting": b64(canonical_json({"plan": OPEN_ID}))},
            {"name": "an observer's", "greeting": b64(canonical_json(full))},
            {"name": "a proof", "greeting": b64(canonical_json({"plan": OPEN_ID, "proofs": [pair]}))},
        ],
        "refuse": [
            bad("128 KiB and a byte", "R-GRT-1", "RecordTooLarge", repeated(b" ", 2**17 + 1)),
            bad("not canonical", "R-GRT-2", "MalformedRecord", b'{"plan": "%b"}' % OPEN_ID.encode()),
            bad("not an object", "R-GRT-2", "MalformedRecord", b"[]"),
            bad("a plan id that is none", "R-GRT-2", "MalformedRecord", b'{"plan":"x"}'),
            bad("five proofs", "R-GRT-2", "MalformedRecord", canonical_json({"proofs": [pair] * 5})),
            bad("half a proof", "R-GRT-2", "MalformedRecord", canonical_json({"proofs": [pair[:1]]})),
            bad("not JSON", "R-ENV-2", "MalformedRecord", b"{]"),
        ],
    }


def _zstd_run(byte: bytes, count: int) -> bytes:
    """A zstd frame (RFC 8878) of one byte repeated, made by hand so that no library's version decides its bytes: single
    segment, content size in 2 bytes (256 to 65,791), one last block of kind RLE.
    """
    return (
        b"\x28\xb5\x2f\xfd\x60"
        + struct.pack("<H", count - 256)
        + (count << 3 | 1 << 1 | 1).to_bytes(3, "little")
        + byte
    )


def _zstd_halves(first: bytes, second: bytes, count: int) -> bytes:
    """As above, with two blocks: ``count`` times the one byte, then ``count`` times the other."""
    blocks = ((count << 3 | 1 << 1 | last).to_bytes(3, "little") + byte for last, byte in ((0, first), (1, second)))
    return b"\x28\xb5\x2f\xfd\x60" + struct.pack("<H", 2 * count - 256) + b"".join(blocks)


def wire_frames() -> Case:
    hello = b"PSWF" + struct.pack(">HH", 3, 0)
    greeting = canonical_json({"plan": OPEN_ID})
    opening = hello + struct.pack(">BBHI", 0, 0, 0, len(greeting)) + greeting
    empty = hello + bytes(8)
    digest = bytes.fromhex(blake3_hex(b"abc"))
    most = 4_194_304
    blob = struct.pack(">BBHIII32s", 1, 0, 0, 0, 0, most, digest)
    chunk = struct.pack(">BBHIII32s", 2, 0, 3, 70_000, 0, most, digest)
    part = struct.pack(">BBHIII32s", 2, 0, 3, 70_000, 49_152, 20_000, digest)
    raw = struct.pack(">BBHII", 0, 0, 0, 3, 3) + b"abc"
    packed = _zstd_run(b"\x00", 1000)
    planes = _zstd_halves(b"a", b"b", 500)
    zstd = struct.pack(">BBHII", 0, 1, 0, 1000, len(packed)) + packed

    def asked(kind: int, file: int, piece: int, offset: int = 0, length: int = most) -> Case:
        return {
            "kind": kind,
            "digest": digest.hex(),
            "file": file,
            "chunk": piece,
            "offset": offset,
            "length": length,
        }

    def bad_part(name: str, offset: int, length: int) -> Case:
        data = empty + struct.pack(">BBHIII32s", 2, 0, 0, 0, offset, length, digest)
        return refused(name, "R-WIRE-10", "BadFrame", side="client", expect=1000, bytes=data.hex())

    def got(status: int, data: bytes) -> Case:
        return {"status": status, "data": b64(data)}

    def bad(name: str, side: str, data: bytes, expect: int = 1000) -> Case:
        return refused(name, "R-WIRE-1", "BadFrame", side=side, expect=expect, bytes=data.hex())

    def answer(*head: int, payload: bytes = b"") -> bytes:
        return empty + struct.pack(">BBHII", *head) + payload

    return {
        "about": "All that one side sends (hex). client: a greeting, then requests. server: a greeting, then responses "
        "to requests whose answers have at most `expect` bytes each.",
        "accept": [
            {
                "name": "a greeting and three requests",
                "side": "client",
                "bytes": (opening + blob + chunk + part).hex(),
                "verdict": 0,
                "greeting": b64(greeting),
                "requests": [asked(1, 0, 0), asked(2, 3, 70_000), asked(2, 3, 70_000, 49_152, 20_000)],
            },
            {
                "name": "an empty greeting",
                "side": "client",
                "bytes": empty.hex(),
                "verdict": 0,
                "greeting": "",
                "requests": [],
            },
            {
                "name": "raw, zstd and each refusal",
                "side": "server",
                "expect": 1000,
                "bytes": (
                    empty + raw + zstd + b"".join(struct.pack(">BBHII", status, 0, 0, 0, 0) for status in (1, 2, 3))
                ).hex(),
                "verdict": 0,
                "greeting": "",
                "responses": [got(0, b"abc"), got(0, bytes(1000)), got(1, b""), got(2, b""), got(3, b"")],
            },
            {
                "name": "two planes of one byte each",
                "side": "server",
                "expect": 1000,
                "bytes": (empty + struct.pack(">BBHII", 0, 2, 0, 1000, len(planes)) + planes).hex(),
                "verdict": 0,
                "greeting": "",
                "responses": [got(0, b"ab" * 500)],
            },
            {
                "name": "turned away",
                "side": "server",
                "expect": 0,
                "bytes": (hello + struct.pack(">BBHI", 1, 0, 0, 0)).hex(),
                "verdict": 1,
                "greeting": "",
                "responses": [],
            },
        ],
        "refuse": [
            bad("another protocol", "client", b"GET / HTTP/1.1\r\n"),
            bad("version 2", "client", b"PSWF" + struct.pack(">HH", 2, 0) + bytes(8)),
            bad("a reserved bit in the hello", "client", b"PSWF" + struct.pack(">HH", 3, 1) + bytes(8)),
            bad("a verdict that is none", "client", hello + struct.pack(">BBHI", 2, 0, 0, 0)),
            bad("a reserved bit in the greeting", "client", hello + struct.pack(">BBHI", 0, 1, 0, 0)),
            bad("a greeting of 128 KiB and a byte", "client", hello + struct.pack(">BBHI", 0, 0, 0, 2**17 + 1)),
            bad(
                "a kind of request that is none",
                "client",
                empty + struct.pack(">BBHIII32s", 3, 0, 0, 0, 0, most, digest),
            ),
            bad(
                "a reserved bit in a request", "client", empty + struct.pack(">BBHIII32s", 1, 1, 0, 0, 0, most, digest)
            ),
            bad("a blob with a chunk", "client", empty + struct.pack(">BBHIII32s", 1, 0, 0, 1, 0, most, digest)),
            bad_part("a part that begins nowhere", 16_383, most),
            bad_part("a part from behind the longest chunk", most, most),
            bad_part("less than a part", 0, 16_383),
            bad_part("more than a chunk", 0, most + 1),
            bad("a status that is none", "server", answer(4, 0, 0, 0, 0)),
            bad("an encoding that is none", "server", answer(0, 4, 0, 1000, 3, payload=b"abc")),
            bad("a reserved bit in a response", "server", answer(0, 0, 1, 3, 3, payload=b"abc")),
            bad("a refusal that carries something", "server", answer(1, 0, 0, 0, 3, payload=b"abc")),
            bad("more than was asked for", "server", answer(0, 0, 0, 1001, 1001), 1000),
            bad("raw, but shorter than it says", "server", answer(0, 0, 0, 4, 3, payload=b"abc")),
            bad("zstd that is no smaller", "server", answer(0, 1, 0, 3, 3, payload=b"abc")),
            bad("zstd that is none", "server", answer(0, 1, 0, 1000, 3, payload=b"abc")),
            bad("zstd that states another size", "server", answer(0, 1, 0, 999, len(packed), payload=packed)),
            bad(
                "zstd with something behind it", "server", answer(0, 1, 0, 1000, len(packed) + 1, payload=packed + b"x")
            ),
            bad("an answer to nothing", "server", empty + raw + raw, 3),
        ],
    }
