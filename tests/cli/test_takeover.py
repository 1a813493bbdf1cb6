"""A peer dies, or leaves, and others go on with what it had published. Real processes on loopback."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from swarm_processes import VerbProcess, VerbProcesses, done, events, eventually, lane, verb

from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.swarm.ledger import Ledger

STEPS = 240
LEASE_S = 6


class Town:
    """A plan with a short lease and a checkpoint every second, a bootstrap node, and homes by name."""

    def __init__(self, folder: Path, data: Path, processes: VerbProcesses) -> None:
        self.folder, self.data, self.processes = folder, data, processes
        arguments = ("-k", 2, "--steps", STEPS, "--router-steps", STEPS, "--batch", 8, "--lease", LEASE_S)
        arguments += ("--checkpoint-every", 1, "--grace", 120)
        made = done(verb("--home", folder / "seed", "init", data, "-o", folder / "plan", *arguments, "--json"))
        self.plan_id: str = made.json["plan"]
        seed = processes.start("seed", "--home", folder / "seed", "bootstrap", folder / "plan")
        self.invite: str = seed.wait_for(lambda line: line.get("event") == "ready")["invite"]

    def join(self, name: str, slot: str) -> VerbProcess:
        return self.processes.start(
            name, "join", self.invite, "--claim-cluster", slot, "--data", self.data, "--home", self.folder / name,
            "--threads", 1, "--device", "cpu",
        )  # fmt: skip

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [event for event in events(self.folder / name, self.plan_id) if event["event"] == kind]

    def published(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        """At least ``count`` checkpoints that this home announced."""
        found: list[dict[str, Any]] = self.eventually(
            lambda: len(self.events(name, "published")) >= count and self.events(name, "published"),
            limit_s=90,
            what=f"a checkpoint of {name}",
        )
        return found

    def eventually(self, condition: Callable[[], Any], *, limit_s: float, what: str) -> Any:
        """Wait for what is written on disk, and fail at once when a process has ended that was not told to."""

        def look() -> Any:
            for started in self.processes.started:
                assert started.ended or started.process.poll() is None, started.last_words()
            return condition()

        return eventually(look, limit_s=limit_s, what=what)

    def last(self, name: str, kind: str) -> str:
        """Root in the newest event of a kind; the home's name when there is none yet."""
        found = self.events(name, kind)
        return str(found[-1]["root"]) if found else name

    def announcement(self, name: str, slot: str) -> Announcement:
        """What this home announced last for a slot."""
        envelope = Ledger(self.folder / name / "swarms" / self.plan_id / "ledger.json").last("checkpoint", slot)
        assert envelope is not None
        return Announcement.open(envelope).record

    def status(self, slot: str) -> dict[str, Any]:
        report = done(verb("--home", self.folder / "watcher", "status", self.invite, "--json")).json
        return next(item for item in report["slots"] if item["slot"] == slot)


@pytest.fixture(scope="module")
def town(room: Path, data: Path) -> Iterator[Town]:
    folder = room / "town"
    with VerbProcesses(folder / "logs") as processes:
        yield Town(folder, data, processes)


def test_a_killed_peer_is_succeeded_from_its_last_published_checkpoint(town: Town) -> None:
    joined = {name: town.join(name, "0") for name in ("one", "two")}
    first = town.eventually(
        lambda: next((name for name in joined if town.events(name, "train")), None), limit_s=90, what="training"
    )
    heir = "two" if first == "one" else "one"
    town.published(first)
    for pid in joined[first].children("train_child"):
        os.kill(pid, signal.SIGSTOP)  # half way, and it stays there until it is killed
    joined[heir].wait_for(lambda line: lane(line).get("phase") == "waiting")  # it stands by, and keeps a copy
    town.eventually(lambda: town.last(heir, "copied") == town.last(first, "published"), limit_s=60, what="a copy")
    assert town.events(heir, "train") == [], "as long as the lease runs, the slot is the first peer's"
    joined[first].kill()
    died = town.published(first)[-1]
    assert died["step"] < STEPS, "the first peer was meant to die half way"

    joined[heir].wait_for(lambda line: lane(line).get("phase") == "training")
    begun = town.events(heir, "train")
    assert [event["parent"] for event in begun] == [died["root"]]
    assert died["root"] in begun[0]["resume"], "it starts from the verified copy"

    joined[heir].wait_for(lambda line: lane(line).get("published_step") == STEPS, limit_s=150)
    chain = town.published(heir)
    assert chain[0]["step"] > died["step"], "no step that was published is trained again"
    last = town.announcement(heir, "0")
    assert (last.step, last.root) == (STEPS, chain[-1]["root"])
    assert last.parent == (chain[-2]["root"] if len(chain) > 1 else died["root"])
    assert last.author != town.announcement(first, "0").author

    joined[heir].wait_for(lambda line: lane(line).get("phase") == "finished")
    checkpoint = town.status("0")["checkpoint"]
    assert (checkpoint["root"], checkpoint["step"]) == (last.root, STEPS)
    assert joined[heir].end() == 0


def test_leave_gives_the_slot_back_at_once_and_can_keep_serving(town: Town) -> None:
    home = town.folder / "guest"
    guest = town.join("guest", "1")
    own = guest.wait_for(lambda line: "peer" in line)["peer"]
    town.published("guest")
    answer = done(verb("leave", "--keep-serving", "--home", home, "--json"))
    assert answer.json == {"released": ["1"], "serving": True}
    guest.wait_for(lambda line: lane(line).get("phase") == "left")
    slot = town.status("1")
    assert slot["claims"] == [], "free at once, not at the end of the lease"
    assert slot["checkpoint"]["author"] == own
    assert slot["checkpoint"]["step"] == town.published("guest")[-1]["step"] < STEPS
    assert guest.process.poll() is None, "it serves on"

    done(verb("leave", "--home", home, "--json"))
    assert guest.wait() == 0


def test_leave_after_a_crash_releases_what_the_dead_process_still_claims(town: Town) -> None:
    home = town.folder / "guest"
    before = town.published("guest")[-1]
    guest = town.join("guest", "1")
    guest.wait_for(lambda line: lane(line).get("phase") == "training")
    resumed = town.events("guest", "train")[-1]
    assert resumed["parent"] == before["root"], "its own newest checkpoint is where it goes on"
    guest.kill()
    killed_at = time.time()
    answer = done(verb("leave", town.invite, "--home", home, "--json"))
    assert answer.json["serving"] is False
    if time.time() < killed_at + LEASE_S / 2:  # a slow machine may have let the lease run out by itself
        assert answer.json["released"] == ["1"]
    assert town.status("1")["claims"] == []
    assert done(verb("leave", town.invite, "--home", home, "--json")).json["released"] == [], "nothing is held any more"

    refused = verb("leave", "--keep-serving", "--home", home)
    assert refused.code == 2
    assert "needs a running `join`" in refused.said


def test_one_home_is_one_process(town: Town) -> None:
    answer = verb("bootstrap", town.folder / "plan", "--home", town.folder / "seed")
    assert answer.code == 2
    assert "is in use by process" in answer.said
    assert "--home" in answer.said


def test_watching_ends_in_order_on_ctrl_c(town: Town) -> None:
    watching = town.processes.start("watching", "--home", town.folder / "watcher", "status", town.invite, "--watch")
    watching.wait_for(lambda line: "slots" in line)
    assert watching.end(signal.SIGINT) == 0
