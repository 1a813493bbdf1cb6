"""Letting go of what nobody needs: pinned, announced, used and new things stay; everything that goes is named."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.swarm.garbage import GRACE_S, collect, find_garbage, kept_roots
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.store import ContentStore

PLAN = "ab" * 32


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def store(home: Home) -> ContentStore:
    return ContentStore(home.store_path)


def put(store: ContentStore, folder: Path, name: str, size: int = 1000) -> str:
    """A checkpoint of one file, in the store alone."""
    source = folder / name
    source.mkdir()
    (source / "ema.safetensors").write_bytes(random.Random(name).randbytes(size))
    _manifest, data, root = build_manifest(source, ["ema.safetensors"], "0")
    store.put_folder(data, source)
    (source / "ema.safetensors").unlink()
    return root


def announcement(root: str, slot: str = "0") -> bytes:
    author = Identity(b"a" * 32)
    return Announcement(
        plan=PLAN, slot=slot, author=author.peer_id, seq=1, step=1, parent=None, root=root, bytes=1000, probe_loss=0.5
    ).seal(author)


def later() -> float:
    return time.time() + GRACE_S + 60


def test_only_what_nobody_needs_goes(home: Home, store: ContentStore, tmp_path: Path) -> None:
    roots = {name: put(store, tmp_path, name) for name in ("held", "copy", "own", "pinned", "used", "old")}
    swarm = home.swarm(PLAN)
    swarm.hold("0", announcement(roots["held"]))
    swarm.keep_copy("1", announcement(roots["copy"], "1"))
    swarm.ledger.record("checkpoint", "2", 1, announcement(roots["own"], "2"))
    store.pin(roots["pinned"], "mine")
    with store.use(roots["used"]):
        kept = kept_roots(home)
        assert {kept[roots[name]] for name in ("held", "copy", "own")} == {
            "announced, slot 0", "copy for others, slot 1", "last own checkpoint, slot 2",
        }  # fmt: skip
        assert find_garbage(store, kept, now=time.time()) == [], "what just came in stays"
        garbage = find_garbage(store, kept, now=later())
    assert [item.name for item in garbage] == [roots["old"]]
    assert garbage[0].bytes >= 1000
    assert garbage[0].freed > 0
    gone, stayed = collect(store, garbage)
    assert (gone, stayed) == (garbage, {})
    assert not store.has(roots["old"])
    assert all(store.has(roots[name]) for name in roots if name != "old")
    assert store.read_blob(roots["old"]) is not None, "a manifest is part of the history of others"
    assert swarm.drop_copies() == 1
    assert roots["copy"] in {item.name for item in find_garbage(store, kept_roots(home), now=later())}


def test_what_is_taken_into_use_or_pinned_meanwhile_stays(home: Home, store: ContentStore, tmp_path: Path) -> None:
    roots = [put(store, tmp_path, name) for name in ("used", "pinned")]
    garbage = find_garbage(store, kept_roots(home), now=later())
    assert {item.name for item in garbage} == set(roots)
    store.pin(roots[1], "mine")
    with ContentStore(store.folder).use(roots[0]):
        gone, stayed = collect(store, garbage)
    assert gone == []
    assert set(stayed) == set(roots)
    assert all(store.has(root) for root in roots)


def test_downloads_going_on_stay_and_given_up_ones_go(home: Home, store: ContentStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.bin").write_bytes(b"x" * 5000)
    manifest, _data, root = build_manifest(source, ["a.bin"], "0")
    store.begin(root, manifest.files, kind="checkpoint")
    with store.use(root), store.open_partial(root, manifest.files[0]):
        assert find_garbage(store, {}, now=later()) == []
    [item] = find_garbage(store, {}, now=later())
    assert item.why == "a download that was not finished"
    collect(store, [item])
    assert store.roots() == []


def test_damaged_and_half_deleted_things_are_named_before_they_go(
    home: Home, store: ContentStore, tmp_path: Path
) -> None:
    root = put(store, tmp_path, "kept")
    path = store.path(root, "ema.safetensors")
    path.write_bytes(b"y" * 1000)
    assert store.verify(root) == ["ema.safetensors"]
    (store.folder / "deleted-xyz").mkdir()
    (store.folder / "deleted-xyz" / "rest").write_bytes(b"z" * 10)
    garbage = find_garbage(store, {root: "announced"}, now=later())
    assert [(item.kind, os.path.basename(item.name)) for item in garbage] == [
        ("damaged", "ema.safetensors.corrupt-1"),
        ("half-deleted", "deleted-xyz"),
    ]
    collect(store, garbage)
    assert find_garbage(store, {root: "announced"}, now=later()) == []
    assert store.entries(root)


def test_a_file_linked_elsewhere_frees_nothing(home: Home, store: ContentStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.bin").write_bytes(b"x" * 50_000)
    _manifest, data, root = build_manifest(source, ["a.bin"], "0")
    store.put_folder(data, source)
    [item] = find_garbage(store, {}, now=later())
    assert item.name == root
    assert item.bytes >= 50_000
    assert item.freed < 50_000
