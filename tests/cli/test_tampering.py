"""One byte changed: in a record, or in any file of an assembled folder. Refused, named, and the honest copy stays."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from swarm_processes import Answer, VerbProcesses, done, verb
from swarm_story import Story

from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.dht_rules import claim_key
from paris_swarm.dht_schemas.envelope import payload_type, seal
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.invite import Invite
from paris_swarm.dht_schemas.records import Claim, Progress

# ---- the assembled folder -----------------------------------------------------------------------------------------


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    """Change the lowest bit of the byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def refused(folder: Path, name: str) -> None:
    """`verify` and `sample` both end with code 4 and name the file; nothing is drawn."""
    answer = verb("verify", folder)
    assert (answer.code, answer.out) == (4, ""), name
    assert name in answer.said
    png = folder.parent / "drawn.png"
    answer = verb("sample", folder, "--prompt", "a flag", "-o", png, "--device", "cpu")
    assert (answer.code, answer.out) == (4, ""), name
    assert name in answer.said
    assert not png.exists()


def test_one_byte_of_any_file_is_refused_and_named(model: Path) -> None:
    names = files_of(model)
    assert {"lock.json", "plan.json"} < set(names)
    assert sum(name.endswith(".safetensors") for name in names) >= 3
    for name in names:
        honest = (model / name).read_bytes()
        flip(model / name)
        refused(model, name)
        (model / name).write_bytes(honest)
    done(verb("verify", model))  # every byte is back: the folder is the one that was assembled


def test_any_missing_file_is_refused_and_named(model: Path) -> None:
    for name in files_of(model):
        honest = (model / name).read_bytes()
        (model / name).unlink()
        refused(model, name)
        (model / name).write_bytes(honest)


@pytest.mark.parametrize("name", ["extra.txt", "experts/expert_0/model.pkl", "experts/expert_9/config.json", ".hidden"])
def test_an_extra_file_is_refused_and_named(name: str, model: Path) -> None:
    (model / name).parent.mkdir(parents=True, exist_ok=True)
    (model / name).write_bytes(b"not part of it")
    refused(model, name if (model / name).parent.name != "expert_9" else "experts/expert_9")  # nobody looks into it


def test_a_file_put_in_as_a_link_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_bytes((model / "plan.json").read_bytes())
    (model / "plan.json").unlink()
    (model / "plan.json").symlink_to(tmp_path / "elsewhere.json")
    refused(model, "plan.json")


def test_a_lock_signed_anew_by_somebody_else_does_not_pass_for_the_plan(story: Story, model: Path) -> None:
    """Whoever rewrites folder and lock can sign as an assembler, but not as the plan's organiser or as an author."""
    lock = json.loads((model / "lock.json").read_bytes())
    lock["signatures"][0]["keyid"] = Identity.generate().peer_id
    (model / "lock.json").write_text(json.dumps(lock))
    refused(model, "lock.json")


def test_a_folder_that_was_never_assembled(tmp_path: Path) -> None:
    answer = verb("verify", tmp_path)
    assert answer.code == 4
    assert "no lock.json" in answer.said
    assert str(tmp_path) in answer.said


# ---- records ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def invite(plan: Answer, room: Path) -> Iterator[Invite]:
    """A bootstrap node of its own."""
    with VerbProcesses(room / "tampering" / "logs") as processes:
        seed = processes.start("seed", "--home", room / "tampering" / "seed", "bootstrap", room / "plan")
        yield Invite.parse(seed.wait_for(lambda line: line.get("event") == "ready")["invite"])


def test_a_forged_record_of_a_rogue_node_changes_nothing(invite: Invite, room: Path, tmp_path: Path) -> None:
    """The rogue runs no validator: it stores forgeries under an honest peer's name, later and longer than the truth."""
    honest, rogue_key, now = Identity.generate(), Identity.generate(), time.time()
    key, until = claim_key(invite.plan_id, "0"), now + 60
    claim = Claim(
        plan=invite.plan_id,
        slot="0",
        peer=honest.peer_id,
        seq=int(now * 1000),
        until=until,
        progress=Progress(step=7, steps=24, loss=0.5, images_per_s=1.0, device="cpu"),
    )
    envelope = claim.seal(honest)
    changed = bytearray(envelope)
    changed[len(changed) // 3] ^= 1
    later = claim.model_copy(update={"seq": claim.seq + 1, "until": until + 60})
    forgeries = {
        "one byte changed": (bytes(changed), until + 30),
        "another signer": (seal(rogue_key, payload_type("claim"), canonical_json(later.model_dump())), until + 60),
        "its lease stretched": (envelope, until + 90),
        "rubbish": (b"rubbish", until + 90),
    }

    async def play() -> dict[str, bool]:
        from paris_swarm.swarm.hivemind_transport import HivemindTransport

        (tmp_path / "honest.key").write_bytes(honest.to_protobuf())
        (tmp_path / "rogue.key").write_bytes(rogue_key.to_protobuf())
        peer = await HivemindTransport.start(tmp_path / "honest.key", invite.peers, observer=True)
        rogue = await HivemindTransport.start(tmp_path / "rogue.key", invite.peers)
        try:
            await peer.join_dht(lambda *_: None)
            await rogue.join_dht(lambda *_: None)
            assert await peer.store(key, honest.peer_id, envelope, until)
            taken = {
                what: await rogue.store(key, honest.peer_id, value, end) for what, (value, end) in forgeries.items()
            }
            answer = await asyncio.to_thread(
                verb, "--home", room / "tampering" / "watcher", "status", str(invite), "--json"
            )
            slot = done(answer).json["slots"][0]
            assert [(c["peer"], c["step"]) for c in slot["claims"]] == [(honest.peer_id, 7)]
            assert slot["claims"][0]["lease_left_s"] <= 60
            return taken
        finally:
            await asyncio.gather(peer.close(), rogue.close())

    assert asyncio.run(play()) == dict.fromkeys(forgeries, False), "the seed's validator lets no forgery in"
