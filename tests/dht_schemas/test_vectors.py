"""The committed test vectors: the script makes the same bytes, and the code does with each what it says."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paris_swarm.dht_schemas import (
    Identity,
    InviteError,
    OpenedPlan,
    RecordError,
    TensorSpec,
    TrustedSwarm,
    blake3_hex,
    canonical_json,
    check_safetensors_header,
    check_store,
    check_token,
    dht_id,
    open_manifest,
    open_plan,
    parse_json,
    public_key_bytes,
    seal,
    unseal,
)
from paris_swarm.dht_schemas.admission import check_delegation
from paris_swarm.dht_schemas.envelope import pae
from paris_swarm.dht_schemas.greeting import Greeting
from paris_swarm.dht_schemas.invite import Invite
from paris_swarm.dht_schemas.notice import open_notice
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.dht_schemas.trusted import check_proof
from paris_swarm.router.lock import open_lock
from paris_swarm.swarm import wire

HERE = Path(__file__).parent
VECTORS = {path.stem: json.loads(path.read_text("ascii")) for path in sorted((HERE / "vectors").glob("*.json"))}
Case = dict[str, Any]


def octets(value: Any) -> bytes:
    if isinstance(value, dict):
        return bytes.fromhex(value["repeat"]) * int(value["times"])
    return base64.b64decode(value, validate=True)


PLANS: dict[str, OpenedPlan] = {
    opened.plan_id: opened for opened in (open_plan(octets(case["plan"])) for case in VECTORS["plans"]["accept"])
}
OPEN = PLANS[VECTORS["values"]["plan_id"]]


# ---- how each kind of vector is put to the code ----------------------------------------------------------------------


def key(case: Case) -> None:
    if "seed" in case:
        identity = Identity(bytes.fromhex(case["seed"]))
        assert identity.peer_id == case["peer_id"]
        assert identity.to_protobuf().hex() == case["key_file"]
    assert public_key_bytes(case["peer_id"]).hex() == case.get("public_key")


def json_text(case: Case) -> None:
    value = parse_json(octets(case["text"]))
    assert canonical_json(value) == octets(case["canonical"])
    assert canonical_json(parse_json(octets(case["canonical"]))) == octets(case["canonical"])


def envelope(case: Case) -> None:
    sealed = unseal(octets(case["envelope"]), case["type"], max_bytes=case.get("max_bytes", 4096))
    assert sealed.payload == octets(case["payload"])
    assert sealed.digest == case["digest"]
    assert pae(case["type"], sealed.payload) == octets(case["pae"])
    identity = Identity(bytes.fromhex(case["seed"]))
    assert identity.sign(octets(case["pae"])).hex() == case["signature"]
    assert seal(identity, case["type"], sealed.payload) == octets(case["envelope"])


def plan(case: Case) -> None:
    data = octets(case["plan"])
    assert open_plan(data, plan_id=case["plan_id"]).plan_id == blake3_hex(data)
    assert parse_json(octets(parse_json(data)["payload"])) == case["payload"]


def record(case: Case) -> None:
    swarm = TrustedSwarm(PLANS[case["plan_id"]])
    feed: Callable[[bytes, float], Any] = swarm.feed_claim if case["kind"] == "claim" else swarm.feed_holding
    feed(octets(case["envelope"]), case["now"])


def admission(case: Case) -> None:
    if "delegation" in case:
        assert check_delegation(case["plan_id"], case["observer"], case["delegation"], case["now"]) == case["peer"]
    else:
        check_token(PLANS[case["plan_id"]].plan, case["plan_id"], case["peer"], case["token"])


def manifest(case: Case) -> None:
    announced = Announcement.model_validate(case["announcement"])
    TrustedSwarm(PLANS[case["plan_id"]]).feed_manifest(announced, octets(case["manifest"]))


def header(case: Case) -> None:
    table = [TensorSpec.model_validate(entry) for entry in VECTORS["headers"]["table"]]
    check_safetensors_header(octets(case["data"]), case["file_length"], table)


def store(case: Case) -> None:
    check_store(
        {plan_id: opened.plan for plan_id, opened in PLANS.items()},
        dht_id=dht_id(case["key"]),
        subkey=case["subkey"],
        value=None if case["value"] is None else octets(case["value"]),
        expiration=float(case["expiration"]),
        now=case["now"],
    )


def proof(case: Case) -> None:
    found = check_proof(OPEN.plan, OPEN.plan_id, octets(case["first"]), octets(case["second"]))
    assert found.signer == case["signer"]


def value(case: Case) -> None:
    template = VECTORS["manifests"]["accept"][0]["announcement"]
    announced = Announcement.model_validate({**template, "probe_loss": case["announced"]})
    TrustedSwarm(OPEN).feed_probe(announced, float(case["measured"]), bar=case["bar"])


def invite(case: Case) -> None:
    parsed = Invite.parse(case["invite"])
    assert (parsed.plan_id, list(parsed.peers), parsed.token) == (case["plan_id"], case["peers"], case["token"])


def notice(case: Case) -> None:
    open_notice(PLANS[case["plan_id"]].plan, case["plan_id"], octets(case["notice"]))


def greeting(case: Case) -> None:
    assert Greeting.of_bytes(octets(case["greeting"])).to_bytes() == octets(case["greeting"])


def frames(case: Case) -> None:
    data = bytes.fromhex(case["bytes"])
    for step in (len(data), 1):
        reader: wire.RequestReader | wire.ResponseReader
        if case["side"] == "client":
            reader = wire.RequestReader()
        else:
            reader = wire.ResponseReader()
            for _ in case.get("responses", [0]):
                reader.expect(0, case["expect"])
        came: list[Any] = []
        for start in range(0, len(data), step):
            came += reader.receive(data[start : start + step])
        answers = [
            {"status": int(item.status), "data": base64.b64encode(wire.decode_payload(item)).decode()}
            for item in came
            if isinstance(item, wire.Response)
        ]
        if "rule" in case:
            continue  # nothing was refused: the caller says so
        assert reader.greeting is not None
        assert (int(reader.greeting.verdict), reader.greeting.payload) == (case["verdict"], octets(case["greeting"]))
        if case["side"] == "client":
            assert came == [
                wire.Request(
                    wire.RequestKind(said["kind"]),
                    said["digest"],
                    said["file"],
                    said["chunk"],
                    said["offset"],
                    said["length"],
                )
                for said in case["requests"]
            ]
            assert reader.greeting.to_bytes() + b"".join(item.to_bytes() for item in came) == data
        else:
            assert answers == case["responses"]


def lock(case: Case) -> None:
    opened = open_lock(octets(case["lock"]))
    assert opened.digest == case["digest"]
    assert case["payload"].items() <= opened.lock.model_dump(mode="json").items()


JUDGES: dict[str, Callable[[Case], None]] = {
    "keys": key,
    "json": json_text,
    "envelopes": envelope,
    "plans": plan,
    "records": record,
    "admission": admission,
    "manifests": manifest,
    "headers": header,
    "dht": store,
    "sequences": proof,
    "values": value,
    "invites": invite,
    "notices": notice,
    "greetings": greeting,
    "wire": frames,
    "locks": lock,
}


def cases(*lists: str) -> list[Any]:
    return [
        pytest.param(kind, case, id=f"{kind}: {case['name']}")
        for kind, vectors in VECTORS.items()
        for name in lists
        for case in vectors.get(name, [])
    ]


# ---- tests -----------------------------------------------------------------------------------------------------------


def test_the_script_makes_the_committed_bytes() -> None:
    done = subprocess.run([sys.executable, str(HERE / "make_vectors.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_is_put_to_the_code() -> None:
    assert VECTORS.keys() == JUDGES.keys()


@pytest.mark.parametrize(("kind", "case"), cases("accept", "delegations", "proofs"))
def test_accepted(kind: str, case: Case) -> None:
    JUDGES[kind](case)


@pytest.mark.parametrize(("kind", "case"), cases("refuse"))
def test_refused_by_the_rule_it_names(kind: str, case: Case) -> None:
    with pytest.raises((RecordError, InviteError)) as caught:
        JUDGES[kind](case)
    assert type(caught.value).__name__ == case["error"]
    if isinstance(caught.value, RecordError):
        assert caught.value.rule == case["rule"]


@pytest.mark.parametrize("run", VECTORS["sequences"]["runs"], ids=lambda run: run["name"])
def test_runs_of_records(run: Case) -> None:
    swarm = TrustedSwarm(OPEN)
    for fed in run["feed"]:
        data = octets(fed["envelope"])
        feed: Callable[[bytes, float], Any] = swarm.feed_claim if b".claim." in data else swarm.feed_holding
        if fed["result"] == "accepted":
            feed(data, VECTORS["sequences"]["now"])
        else:
            with pytest.raises(RecordError) as caught:
                feed(data, VECTORS["sequences"]["now"])
            assert caught.value.rule == fed["result"]


def test_an_older_notice_is_refused() -> None:
    swarm = TrustedSwarm(OPEN)
    fed = VECTORS["notices"]["rollback"]
    for text in fed["feed"][:-1]:
        swarm.feed_notice(octets(text))
    with pytest.raises(RecordError) as caught:
        swarm.feed_notice(octets(fed["feed"][-1]))
    assert (type(caught.value).__name__, caught.value.rule) == (fed["error"], fed["rule"])


def test_dht_keys() -> None:
    for case in VECTORS["dht"]["keys"]:
        assert dht_id(case["key"]).hex() == case["id"]


def test_manifests_of_the_vectors_have_the_roots_they_name() -> None:
    """R-DIG-1"""
    for case in VECTORS["manifests"]["accept"]:
        data = octets(case["manifest"])
        assert blake3_hex(data) == case["announcement"]["root"]
        assert open_manifest(data, case["announcement"]["root"], cap_bytes=10**9).step == case["announcement"]["step"]
