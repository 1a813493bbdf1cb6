"""An honest crash never looks like equivocation (SPEC.md, R-REC-9); two homes on one key do (R-SET-3)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from closed_world import PROGRESS, Closed, closed, closed_plan

from paris_swarm.dht_schemas.envelope import payload_type, unseal
from paris_swarm.dht_schemas.errors import Equivocation
from paris_swarm.dht_schemas.greeting import Greeting
from paris_swarm.dht_schemas.records import Claim, Holding
from paris_swarm.swarm.ledger import Ledger
from paris_swarm.swarm.status import swarm_status

NOW = 1_900_000_000.0
PLAN = closed_plan(admission="open")


class Peers:
    """Starts peers in processes of their own; see crashing_peer.py."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder, self._process = folder, process

    def live(self, home: Path, action: str, number: int, *, fatal: int = 0) -> bool:
        """One life of the peer of ``home``; True when it was killed, at step ``fatal``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        case = {"home": str(home), "log": str(log_of(home)), "action": action, "number": number, "fatal": fatal}
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert answer["code"] in (0, -9)
        return bool(answer["killed"])


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    program = Path(__file__).with_name("crashing_peer.py")
    with subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Peers(tmp_path, process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0


def log_of(home: Path) -> Path:
    return home.with_suffix(".sent")


def sent(home: Path) -> list[bytes]:
    return log_of(home).read_bytes().splitlines() if log_of(home).exists() else []


def statements(envelopes: list[bytes]) -> dict[tuple[str, str, int], set[str]]:
    """(kind, slot, sequence) -> payload digests, announcements inside holdings included."""
    said: dict[tuple[str, str, int], set[str]] = {}
    for envelope in envelopes:
        sealed = unseal(envelope, (payload_type("claim"), payload_type("holding")), max_bytes=4096)
        kind: Any = Claim if sealed.payload_type == payload_type("claim") else Holding
        record = kind.of_sealed(sealed).record
        said.setdefault((kind.KIND, record.slot, record.seq), set()).add(sealed.digest)
        if kind is Holding:
            inner = record.open_announcement()
            said.setdefault(("checkpoint", inner.record.slot, inner.record.seq), set()).add(inner.sealed.digest)
    return said


def signed_last(home: Path) -> list[bytes]:
    """What the ledger says was signed last, one of each kind, and could have been sent."""
    ledger = Ledger(home / "swarms" / PLAN.plan_id / "ledger.json")
    return [envelope for kind in ("claim", "holding") for envelope in ledger.signed(kind)]


@pytest.mark.parametrize(("action", "steps"), [("claim", 4), ("announce", 7)])
def test_a_peer_killed_between_any_two_steps_never_contradicts_itself(peers: Peers, action: str, steps: int) -> None:
    for fatal in range(1, steps + 1):
        home = peers.folder / f"{action}-{fatal}"
        assert not peers.live(home, action, 1), "a first life, so that there is something to come back to"
        # Coming back, it sends again what it signed last: for a claim 2 steps, for a holding that and its renewal.
        before = 2 if action == "claim" else 6
        assert peers.live(home, action, 2, fatal=before + fatal)
        owed = signed_last(home)
        said = len(sent(home))
        assert peers.live(home, action, 3, fatal=1 + fatal % 3), "and it is killed while it comes back"
        owed_still = signed_last(home)
        assert not peers.live(home, action, 4)
        again = sent(home)[said:]
        assert again[0] in owed or again[0] in owed_still
        assert set(owed_still) <= set(again), "the very same bytes are sent again"
        for statement, payloads in statements(sent(home)).items():
            assert len(payloads) == 1, f"two different {statement} were sent"


def test_every_step_of_the_way_is_tried(peers: Peers) -> None:
    """The numbers of steps above are all there are: one more is never reached."""
    for action, steps, before in (("claim", 4, 2), ("announce", 7, 6)):
        home = peers.folder / action
        assert not peers.live(home, action, 1)
        assert not peers.live(home, action, 2, fatal=before + steps + 1)


def test_two_homes_on_one_key_prove_it_and_are_out(tmp_path: Path) -> None:
    async def story(swarm: Closed) -> None:
        one = await swarm.node("one", clock=lambda: NOW)
        await one.publish_claim("0", PROGRESS)
        await swarm.close(one)
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        said = []
        for step, name in enumerate(("one", "two"), start=1):
            node = await swarm.node(name, clock=lambda: NOW)
            await node.publish_claim("0", PROGRESS.model_copy(update={"step": step}))
            said.append(node.files.ledger.last("claim", "0"))
            await swarm.close(node)

        watcher = await swarm.node("watcher", clock=lambda: NOW)
        watcher.trusted.feed_claim(said[0], NOW)
        with pytest.raises(Equivocation):
            watcher.trusted.feed_claim(said[1], NOW)
        watcher.news.keep()
        report = swarm_status(watcher)
        cheat = Claim.open(said[0]).record
        assert [(out.peer, out.kind, out.slot, out.seq) for out in report.outlaws] == [
            (cheat.peer, "claim", "0", cheat.seq)
        ]
        assert report.slots[0].claims == ()
        kept = json.loads((watcher.files.path / "proofs" / f"{cheat.peer}.json").read_bytes())
        assert [kept["first"].encode(), kept["second"].encode()] == said

        again = await swarm.node("one", clock=lambda: NOW)
        again.door.admit(watcher.transport.peer_id, Greeting(proofs=((kept["first"], kept["second"]),)).to_bytes())
        with pytest.raises(Equivocation, match="one key must run in one place"):
            again.check_own()

    closed(tmp_path, story, PLAN)


def test_a_ledger_writes_before_it_lets_go(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.json")
    ledger.record("claim", "0", 7, b"{}")
    assert Ledger(tmp_path / "ledger.json").last("claim", "0") == b"{}"
    assert Ledger(tmp_path / "ledger.json").next_sequence("claim", "0", now=0.0) == 8
