"""A home folder: one process at a time, a ledger that is on disk before anything is sent, damaged files set aside."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_peer_life import make_plan

from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.records import Holding, Progress
from paris_swarm.swarm.home import PEER_CACHE, Home, HomeBusy, HomeError
from paris_swarm.swarm.ledger import SPARE_LINES, Ledger
from paris_swarm.swarm.memory import MemoryNetwork, MemoryTransport
from paris_swarm.swarm.node import SwarmNode

PLAN = "a" * 64

HOLD = """
import sys
from pathlib import Path
from paris_swarm.swarm.home import Home
with Home(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


# ---- lock ---------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_went(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(home.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(HomeBusy, match=f"in use by process {other.pid}.*--home"), home.locked():
            pass
        assert home.holder() == other.pid
        other.kill()
        other.wait()
    with home.locked():  # no stale lock file: the kernel let go of it
        assert home.holder() == os.getpid()


def test_two_homes_do_not_lock_each_other_out(tmp_path: Path) -> None:
    with Home(tmp_path / "one").locked(), Home(tmp_path / "two").locked():
        pass


# ---- ledger -------------------------------------------------------------------------------------------------------


@given(
    clocks=st.lists(st.floats(min_value=0, max_value=4e9), min_size=1, max_size=20),
    seen=st.integers(min_value=0, max_value=2**52),
)
def test_sequences_only_grow_whatever_the_clock_does(
    clocks: list[float], seen: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.json")
    last = 0
    for now in clocks:
        seq = ledger.next_sequence("claim", "0", now=now, seen=seen)
        assert seq > last
        assert seq > seen
        assert seq >= int(now * 1000)
        ledger.record("claim", "0", seq, b"{}")
        last = seq


def test_sequences_are_kept_apart_by_kind_and_slot_and_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    ledger = Ledger(path)
    ledger.record("claim", "0", 5_000, b'{"claim": 0}')
    ledger.record("checkpoint", "0", 7_000, b'{"checkpoint": 0}')
    ledger.record("claim", "router", 9_000, b'{"claim": "router"}')
    again = Ledger(path)
    assert again.next_sequence("claim", "0", now=0.0) == 5_001
    assert again.next_sequence("checkpoint", "0", now=0.0) == 7_001
    assert again.next_sequence("claim", "1", now=0.0) == 1
    assert again.last("claim", "router") == b'{"claim": "router"}', "the very bytes, to be sent again"
    assert sorted(again.signed("claim")) == [b'{"claim": "router"}', b'{"claim": 0}']
    assert again.last("claim", "1") is None


def test_what_was_seen_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    highest = {(Identity.generate().peer_id, "claim", "0"): (12, "d" * 64)}
    Ledger(path).remember(highest)
    assert Ledger(path).highest() == highest


def test_what_is_seen_costs_a_line_and_outdated_lines_do_not_pile_up(tmp_path: Path) -> None:
    path, seen = tmp_path / "ledger.json", tmp_path / "ledger.seen"
    ledger = Ledger(path)
    highest = {("peer", "claim", str(slot)): (1, "d" * 64) for slot in range(100)}
    ledger.remember(highest)
    whole = seen.stat().st_size
    for seq in range(2, 2 * SPARE_LINES):
        highest["peer", "claim", "7"] = (seq, "e" * 64)
        before = seen.stat()
        ledger.remember(highest)
        assert seen.stat().st_size - before.st_size <= 2 * whole / 100
        ledger.remember(highest)
        assert seen.stat().st_size <= 20 * whole + 100 * SPARE_LINES
    assert Ledger(path).highest() == highest


@pytest.mark.parametrize("torn", [b'["peer", "claim", "1", 9', b"\xff\n", b"null\n", b"[1]\n"])
def test_half_a_line_of_what_was_seen_costs_that_line_only(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    first, second = {("peer", "claim", "0"): (12, "d" * 64)}, {("peer", "claim", "1"): (13, "e" * 64)}
    Ledger(path).remember(first)
    with open(tmp_path / "ledger.seen", "ab") as seen:
        seen.write(torn)
    again = Ledger(path)
    assert again.highest() == first
    again.remember(first | second)
    assert Ledger(path).highest() == first | second
    assert [aside.read_bytes().endswith(torn) for aside in tmp_path.glob("ledger.seen.corrupt-*")] == [True]


def test_a_disk_that_filled_up_within_a_line_costs_no_later_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.json"
    ledger = Ledger(path)
    highest = {("peer", "claim", "0"): (12, "d" * 64)}
    ledger.remember(highest)

    def full(descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - 9)
        raise OSError(errno.ENOSPC, "no space")

    highest["peer", "claim", "0"] = (13, "e" * 64)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            ledger.remember(highest)
    highest["peer", "claim", "1"] = (14, "f" * 64)
    ledger.remember(highest)
    assert Ledger(path).highest() == highest


def test_a_crash_while_a_torn_file_is_written_anew_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.json"
    highest = {("peer", "claim", "0"): (12, "d" * 64)}
    Ledger(path).remember(highest)
    with open(tmp_path / "ledger.seen", "ab") as seen:
        seen.write(b'["peer", "cl')

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("paris_swarm.swarm.ledger.atomic_write", crash)
        with pytest.raises(KeyboardInterrupt):
            Ledger(path).remember(highest)
    assert Ledger(path).highest() == highest


def test_an_older_line_after_a_newer_one_sets_nobody_back(tmp_path: Path) -> None:
    """Observers share one file, and any of them may know less than another."""
    path = tmp_path / "observer.json"
    behind = Ledger(path)
    Ledger(path).remember({("peer", "claim", "0"): (13, "e" * 64)})
    behind.remember({("peer", "claim", "0"): (12, "d" * 64)})
    assert Ledger(path).highest() == {("peer", "claim", "0"): (13, "e" * 64)}


def test_what_an_earlier_version_saw_is_taken_over_and_never_lost_between(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps({"signed": {}, "seen": {"peer/claim/0": [12, "d" * 64]}}))
    known = {("peer", "claim", "0"): (12, "d" * 64)}
    ledger = Ledger(path)
    ledger.record("claim", "0", 5, b"{}")
    assert Ledger(path).highest() == known, "before the first look"
    ledger.remember(ledger.highest())
    assert Ledger(path).highest() == known
    assert "seen" not in json.loads(path.read_bytes())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="which file is synced is read from /proc")
def test_a_statement_is_synced_to_disk_before_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which things happen to one claim: bytes written, file synced, then the network."""
    made = make_plan()
    home, happened = Home(tmp_path / "home"), []
    really_sync, really_store = os.fsync, MemoryTransport.store

    def sync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        happened.append("sync" if "ledger.json" in name else "sync of another file")
        really_sync(descriptor)

    async def store(transport: MemoryTransport, key: str, subkey: str, value: bytes, until: float) -> bool:
        on_disk = json.loads((home.swarm(made.plan_id).path / "ledger.json").read_bytes())
        assert on_disk["signed"]["claim/0"]["envelope"].encode() == value
        happened.append("sent")
        return await really_store(transport, key, subkey, value, until)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(MemoryTransport, "store", store)

    async def play() -> None:
        identity = home.identity()
        node = SwarmNode(home, identity, await MemoryTransport.start(MemoryNetwork(), identity.peer_id), made)
        await node.join()
        happened.clear()
        await node.publish_claim("0", Progress(step=0, steps=4, loss=None, images_per_s=0.0, device="cpu"))
        await node.close()

    asyncio.run(play())
    assert "sent" in happened
    assert "sync" in happened[: happened.index("sent")]


def test_a_key_without_its_ledger_goes_on_above_what_is_seen_of_it(tmp_path: Path) -> None:
    """R-REC-9: its home came back from nothing but the key, on a machine whose clock is behind."""
    made, identity, now = make_plan(), Identity.generate(), [1_800_000_000.0]

    async def node(name: str) -> SwarmNode:
        transport = await MemoryTransport.start(MemoryNetwork(), identity.peer_id)
        return SwarmNode(Home(tmp_path / name), identity, transport, made, clock=lambda: now[0])

    async def play() -> None:
        lost, again = await node("lost"), await node("again")
        for speaker in (lost, again):
            said = await speaker.announce(
                "0", step=1, root="ab" * 32, parent=None, total_bytes=1, probe_loss=1.0 + now[0] % 2
            )
            holding = speaker.files.ledger.last("holding", "0")
            assert holding is not None
            if speaker is lost:
                first, first_holding = said, Holding.open(holding).record
                again.sightings.feed_holding(holding, now[0])
                now[0] -= 3.0
        assert said.seq > first.seq
        assert Holding.open(holding).record.seq > first_holding.seq
        await lost.close()
        await again.close()

    asyncio.run(play())


@pytest.mark.parametrize("torn", [b"", b'{"signed": {"cla', b"\xff\xfe", b"null", b"[]"])
def test_a_torn_ledger_is_set_aside_and_never_deleted(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    path.write_bytes(torn)
    ledger = Ledger(path)
    assert ledger.signed("claim") == []
    ledger.record("claim", "0", 1, b"{}")
    assert Ledger(path).last("claim", "0") == b"{}"
    if torn not in (b"null", b"[]"):  # JSON, though not ours, is replaced by the next write
        assert [aside.read_bytes() for aside in tmp_path.glob("ledger.json.corrupt-*")] == [torn]


# ---- identity, peer cache, last swarm -----------------------------------------------------------------------------


def test_the_key_is_written_privately_before_it_is_used(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    made = home.identity()
    assert home.identity_path.stat().st_mode & 0o777 == 0o600
    assert home.identity().peer_id == made.peer_id
    with pytest.raises(HomeError, match="never overwritten"):
        home.write_identity(Identity.generate())
    assert home.identity().peer_id == made.peer_id


def test_the_peer_cache_keeps_the_newest_and_survives_being_torn(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.remember_peers([f"/ip4/127.0.0.1/tcp/{port}" for port in range(1, 101)])
    home.remember_peers(["/ip4/127.0.0.1/tcp/4001"])
    known = home.known_peers()
    assert known[0] == "/ip4/127.0.0.1/tcp/4001"
    assert len(known) == PEER_CACHE
    (home.path / "peers.json").write_bytes(b'["/ip4/127')
    assert home.known_peers() == []
    assert len(list(home.path.glob("peers.json.corrupt-*"))) == 1
    (home.path / "peers.json").write_text('["/ip4/127.0.0.1/tcp/1", 7, null]')
    assert home.known_peers() == ["/ip4/127.0.0.1/tcp/1"]


def test_the_last_invite_is_the_last_one(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert home.last_invite() is None
    home.remember_invite("paris:one")
    home.remember_invite("paris:two")
    assert Home(home.path).last_invite() == "paris:two"


def test_held_checkpoints_are_kept_by_slot(tmp_path: Path) -> None:
    swarm = Home(tmp_path / "home").swarm(PLAN)
    swarm.hold("0", b"first")
    swarm.hold("0", b"second")
    swarm.hold("router", b"other")
    assert swarm.held() == {"0": b"second", "router": b"other"}


def test_events_are_one_json_line_each(tmp_path: Path) -> None:
    swarm = Home(tmp_path / "home").swarm(PLAN)
    written: list[dict[str, Any]] = [{"event": "train", "slot": "0"}, {"event": "published", "step": 3}]
    for event in written:
        swarm.log_event(event)
    assert [json.loads(line) for line in (swarm.path / "events.jsonl").read_text().splitlines()] == written


def test_a_path_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HomeError, match="is not a folder: choose another with --home"):
        Home(tmp_path / "file")
    with pytest.raises(HomeError, match="is not a folder"):
        Home(tmp_path / "file" / "below")
