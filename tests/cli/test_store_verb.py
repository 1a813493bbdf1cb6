"""`paris-swarm store`: what lies on the disk is listed, checked, pinned and let go, in words and in JSON."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from swarm_processes import done, verb

from paris_swarm.cli import exits
from paris_swarm.cli.sizes import parse_limits, parse_rate, parse_size
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.store import ContentStore

PLAN = "cd" * 32


def put(home: Path, folder: Path, slot: str, *, old: bool = True) -> str:
    """A checkpoint of one small file, in the store alone, that came in long ago."""
    source = folder / f"source-{slot}"
    source.mkdir()
    (source / "ema.safetensors").write_bytes(random.Random(slot).randbytes(100_000))
    store = ContentStore(home / "store")
    _manifest, data, root = build_manifest(source, ["ema.safetensors"], slot, meta={"step": 7, "parent": None})
    store.put_folder(data, source)
    (source / "ema.safetensors").unlink()
    if old:
        hour_ago = time.time() - 3600
        os.utime(store.folder / "roots" / root / "index.json", (hour_ago, hour_ago))
    return root


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_what_is_kept_is_told_and_only_the_rest_goes(home: Path, tmp_path: Path) -> None:
    kept, copy, loose, fresh = (put(home, tmp_path, slot, old=slot != "3") for slot in ("0", "1", "2", "3"))
    author = Identity(b"a" * 32)
    swarm = Home(home).swarm(PLAN)
    for slot, root, keep in (("0", kept, swarm.hold), ("1", copy, swarm.keep_copy)):
        announcement = Announcement(
            plan=PLAN, slot=slot, author=author.peer_id, seq=1, step=7, parent=None, root=root, bytes=1, probe_loss=0.5
        )
        keep(slot, announcement.seal(author))

    listed = done(verb("--home", home, "store", "ls", "--json")).json
    rows = {row["root"]: row for row in listed["roots"]}
    assert rows[kept]["kept"] == ["announced, slot 0"]
    assert rows[copy]["kept"] == ["copy for others, slot 1"]
    assert (rows[loose]["kept"], rows[loose]["slot"], rows[loose]["step"]) == ([], "2", 7)
    assert rows[loose]["complete"]
    assert listed["bytes"] == 400_000
    said = done(verb("--home", home, "store", "ls")).said
    assert "announced, slot 0" in said
    assert loose[:12] in said

    planned = done(verb("--home", home, "store", "gc", "--dry-run", "--json")).json
    assert [item["name"] for item in planned["items"]] == [loose]
    assert planned["freed"] >= 100_000
    assert ContentStore(home / "store").has(loose), "--dry-run changes nothing"
    went = done(verb("--home", home, "store", "gc", "--json")).json
    assert went["items"] == planned["items"]
    store = ContentStore(home / "store")
    assert [store.has(root) for root in (kept, copy, loose, fresh)] == [True, True, False, True]

    assert [
        item["name"]
        for item in done(verb("--home", home, "store", "gc", "--copies", "--dry-run", "--json")).json["items"]
    ] == [copy]
    assert swarm.copies(), "--dry-run keeps the copies"
    done(verb("--home", home, "store", "gc", "--copies"))
    assert not store.has(copy)
    assert swarm.copies() == {}
    assert store.has(kept)


def test_a_pin_keeps_until_it_is_taken_away(home: Path, tmp_path: Path) -> None:
    root = put(home, tmp_path, "0")
    done(verb("--home", home, "store", "pin", root[:8], "--reason", "for the paper"))
    assert done(verb("--home", home, "store", "ls", "--json")).json["roots"][0]["pinned"] == "for the paper"
    assert done(verb("--home", home, "store", "gc", "--json")).json["items"] == []
    done(verb("--home", home, "store", "unpin", root))
    assert [item["name"] for item in done(verb("--home", home, "store", "gc", "--json")).json["items"]] == [root]


def test_verify_names_what_was_changed_and_ends_with_its_code(home: Path, tmp_path: Path) -> None:
    good, bad = put(home, tmp_path, "0"), put(home, tmp_path, "1")
    path = ContentStore(home / "store").path(bad, "ema.safetensors")
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    assert done(verb("--home", home, "store", "verify", good, "--json")).json == {"checked": 1, "damaged": {}}
    answer = verb("--home", home, "store", "verify", "--json")
    assert answer.code == exits.UNVERIFIED
    assert answer.json == {"checked": 2, "damaged": {bad: ["ema.safetensors"]}}
    assert done(verb("--home", home, "store", "verify")).code == exits.OK, "it was set aside: what is left is right"
    items = done(verb("--home", home, "store", "gc", "--dry-run", "--json")).json["items"]
    assert {item["kind"] for item in items} == {"root"}, "the damaged file goes with its root"


@pytest.mark.parametrize("prefix", ["ab", "ffffffff", ""])
def test_a_prefix_that_names_no_one_root_is_an_error_that_says_so(home: Path, tmp_path: Path, prefix: str) -> None:
    put(home, tmp_path, "0")
    answer = verb("--home", home, "store", "pin", prefix)
    assert answer.code == exits.USAGE
    assert "names no one root" in answer.said


def test_a_file_in_the_stores_place_is_an_error_that_names_it(home: Path) -> None:
    home.mkdir()
    (home / "store").write_bytes(b"a file where a folder should be")
    answer = verb("--home", home, "store", "ls")
    assert answer.code == exits.USAGE
    assert str(home / "store") in answer.said


def test_amounts_as_people_type_them() -> None:
    assert parse_size("20GB", option="--store-limit") == 20_000_000_000
    assert parse_size(" 1.5 mb ", option="--store-limit") == 1_500_000
    assert parse_rate("10MB/s", option="--upload-limit") == 1e7
    assert parse_rate("500k", option="--upload-limit") == 5e5
    assert parse_limits(None, None) == (None, None)
    for text in ("", "0", "-1", "fast", "10 MiB/s", "nan", "1e9"):
        with pytest.raises(ValueError, match="--upload-limit"):
            parse_rate(text, option="--upload-limit")


def test_a_limit_that_is_no_rate_is_said_before_anything_starts(home: Path) -> None:
    answer = verb("--home", home, "join", "--upload-limit", "fast")
    assert answer.code == exits.USAGE
    assert "500kB/s" in answer.said
