"""The content store: what goes in comes out, what was changed on disk is found, what was half fetched goes on."""

from __future__ import annotations

import errno
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from paris_swarm.dht_schemas.digest import CHUNK, blake3_hex
from paris_swarm.dht_schemas.errors import DigestMismatch
from paris_swarm.dht_schemas.manifest import FileEntry, build_manifest, file_entry
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.store_locks import InUse

SIZES = {"big.bin": 2 * CHUNK + 1000, "empty.bin": 0, "exact.bin": CHUNK, "small.json": 10}


def make_folder(folder: Path, sizes: dict[str, int] = SIZES) -> Path:
    folder.mkdir()
    for index, (name, size) in enumerate(sizes.items()):
        (folder / name).write_bytes(random.Random(index).randbytes(size))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "checkpoint")


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "store")


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def chunk_of(folder: Path, entry: FileEntry, index: int) -> bytes:
    return (folder / entry.name).read_bytes()[index * CHUNK : (index + 1) * CHUNK]


def fetched(store: ContentStore, root: str, entry: FileEntry, folder: Path) -> None:
    """Bring one file in as a download does."""
    with store.open_partial(root, entry) as partial:
        for index in partial.missing:
            partial.write(index, chunk_of(folder, entry, index))
        partial.finish()


# ---- blobs


def test_a_blob_comes_back_and_a_changed_one_is_set_aside(store: ContentStore) -> None:
    digest = store.put_blob(b"plan")
    assert digest == blake3_hex(b"plan")
    assert store.read_blob(digest) == b"plan"
    flip(store.folder / "blobs" / digest, 0)
    with pytest.raises(DigestMismatch, match=r"corrupt-1"):
        store.read_blob(digest)
    assert store.read_blob(digest) is None
    assert (store.folder / "blobs" / f"{digest}.corrupt-1").exists()
    assert store.put_blob(b"plan") == digest
    assert store.read_blob(digest) == b"plan"


def test_a_changed_blob_is_mended_by_putting_it_again(store: ContentStore) -> None:
    digest = store.put_blob(b"plan")
    flip(store.folder / "blobs" / digest, 0)
    store.put_blob(b"plan")
    assert store.read_blob(digest) == b"plan"


@pytest.mark.parametrize("digest", ["", "..", "../../etc/passwd", "A" * 64, "0" * 63])
def test_only_digests_name_blobs_and_roots(store: ContentStore, digest: str) -> None:
    with pytest.raises(ValueError, match="not a BLAKE3 digest"):
        store.read_blob(digest)
    with pytest.raises(ValueError, match="not a BLAKE3 digest"):
        store.has(digest)


def test_a_blob_larger_than_a_payload_is_refused(store: ContentStore) -> None:
    with pytest.raises(ValueError, match="store it as a file"):
        store.put_blob(bytes(CHUNK + 1))


# ---- whole files


def test_a_folder_goes_in_and_every_chunk_comes_out(store: ContentStore, folder: Path) -> None:
    manifest, data, root = build_manifest(folder, list(SIZES), "0")
    assert store.put_folder(data, folder) == root
    assert store.has(root)
    assert store.kind(root) == "checkpoint"
    assert store.missing(root) == {}
    assert store.read_blob(root) == data
    for number, entry in enumerate(manifest.files):
        assert store.path(root, entry.name).read_bytes() == (folder / entry.name).read_bytes()
        for index in range(len(entry.chunks)):
            assert store.read_chunk(root, number, index) == chunk_of(folder, entry, index)
        assert store.read_chunk(root, number, len(entry.chunks)) is None
    assert store.read_chunk(root, len(manifest.files), 0) is None
    assert store.read_chunk("0" * 64, 0, 0) is None
    assert store.verify(root) == []
    assert store.put_folder(data, folder) == root


def test_files_stay_when_their_source_is_deleted(store: ContentStore, folder: Path) -> None:
    _manifest, data, root = build_manifest(folder, list(SIZES), "0")
    expected = (folder / "big.bin").read_bytes()
    store.put_folder(data, folder)
    (folder / "big.bin").unlink()
    assert store.path(root, "big.bin").read_bytes() == expected


def test_where_links_are_impossible_files_are_copied(
    store: ContentStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_args: object, **_options: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", no_link)
    _manifest, data, root = build_manifest(folder, list(SIZES), "0")
    store.put_folder(data, folder)
    assert store.verify(root) == []
    assert not os.path.samefile(store.path(root, "big.bin"), folder / "big.bin")


def test_a_folder_that_is_not_what_its_manifest_says_is_refused(store: ContentStore, folder: Path) -> None:
    _manifest, data, root = build_manifest(folder, list(SIZES), "0")
    flip(folder / "big.bin", CHUNK + 5)
    with pytest.raises(DigestMismatch, match=r"big\.bin.*chunk 1"):
        store.put_folder(data, folder)
    assert not store.has(root)


def test_a_plan_folder_lies_under_the_plan_id_and_can_be_laid_out_again(
    store: ContentStore, folder: Path, tmp_path: Path
) -> None:
    entries = [file_entry(folder / name) for name in sorted(SIZES)]
    plan_id = store.put_blob(b"the envelope")
    store.put_files(plan_id, entries, folder, kind="plan")
    assert store.kind(plan_id) == "plan"
    for _ in range(2):
        store.link_into(plan_id, b"the envelope", "plan.json", tmp_path / "out")
        names = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert names == {"plan.json": b"the envelope", **{name: (folder / name).read_bytes() for name in SIZES}}


def test_a_file_changed_on_disk_is_not_served_but_set_aside(store: ContentStore, folder: Path) -> None:
    _manifest, data, root = build_manifest(folder, list(SIZES), "0")
    store.put_folder(data, folder)
    path = store.path(root, "big.bin")
    flip(path, 2 * CHUNK + 1)
    assert store.read_chunk(root, 0, 0) is not None
    with pytest.raises(DigestMismatch, match="chunk 2"):
        store.read_chunk(root, 0, 2)
    assert store.read_chunk(root, 0, 0) is None
    assert path.with_name("big.bin.corrupt-1").exists()
    assert store.missing(root) == {"big.bin": (0, 1, 2)}
    with pytest.raises(FileNotFoundError, match=r"big\.bin"):
        store.path(root, "big.bin")


@pytest.mark.parametrize("harm", ["flip", "cut", "grow"])
def test_verify_names_what_was_changed(store: ContentStore, folder: Path, harm: str) -> None:
    _manifest, data, root = build_manifest(folder, list(SIZES), "0")
    store.put_folder(data, folder)
    path = store.path(root, "exact.bin")
    if harm == "flip":
        flip(path, CHUNK - 1)
    else:
        os.truncate(path, CHUNK - 1 if harm == "cut" else CHUNK + 1)
    assert store.verify(root) == ["exact.bin"]
    assert store.verify(root) == []
    assert not store.has(root)
    assert path.with_name("exact.bin.corrupt-1").exists()


def test_a_damaged_index_makes_the_root_unknown_not_a_crash(store: ContentStore, folder: Path) -> None:
    _manifest, data, root = build_manifest(folder, list(SIZES), "0")
    store.put_folder(data, folder)
    index = store.folder / "roots" / root / "index.json"
    index.write_text('{"v": 1, "kind": "checkpoint", "files": [{"name": "../evil", "length": 0, "chunks": []}]}')
    assert not store.has(root)
    assert store.roots() == []
    assert index.with_name("index.json.corrupt-1").exists()
    store.put_folder(data, folder)
    assert store.has(root)


# ---- half-fetched files


def test_a_download_goes_on_where_it_was(store: ContentStore, folder: Path) -> None:
    manifest, _data, root = build_manifest(folder, list(SIZES), "0")
    entry = manifest.entry("big.bin")
    store.begin(root, manifest.files, kind="checkpoint")
    with store.open_partial(root, entry) as partial:
        assert partial.missing == [0, 1, 2]
        partial.write(1, chunk_of(folder, entry, 1))
        with pytest.raises(ValueError, match="still misses 2"):
            partial.finish()
    again = ContentStore(store.folder)
    assert again.missing(root)["big.bin"] == (0, 2)
    assert again.read_chunk(root, 0, 1) is None, "a half-fetched file is not served"
    fetched(again, root, entry, folder)
    assert again.path(root, "big.bin").read_bytes() == (folder / "big.bin").read_bytes()
    leftovers = [
        *(store.folder / "roots" / root / "partial").iterdir(),
        *(store.folder / "roots" / root / "maps").iterdir(),
    ]
    assert leftovers == []


def test_a_wrong_chunk_is_refused_and_leaves_no_trace(store: ContentStore, folder: Path) -> None:
    manifest, _data, root = build_manifest(folder, list(SIZES), "0")
    entry = manifest.entry("big.bin")
    store.begin(root, manifest.files, kind="checkpoint")
    with store.open_partial(root, entry) as partial:
        for wrong in (chunk_of(folder, entry, 1), b"", chunk_of(folder, entry, 0)[:-1]):
            with pytest.raises(DigestMismatch, match=r"chunk 0 of big\.bin"):
                partial.write(0, wrong)
        assert partial.missing == [0, 1, 2]


def test_a_chunk_changed_in_the_partial_file_is_fetched_again(store: ContentStore, folder: Path) -> None:
    manifest, _data, root = build_manifest(folder, list(SIZES), "0")
    entry = manifest.entry("big.bin")
    store.begin(root, manifest.files, kind="checkpoint")
    with store.open_partial(root, entry) as partial:
        partial.write(0, chunk_of(folder, entry, 0))
        partial.write(2, chunk_of(folder, entry, 2))
    flip(store.folder / "roots" / root / "partial" / "big.bin", 7)
    with store.open_partial(root, entry) as partial:
        assert partial.missing == [0, 1]


@pytest.mark.parametrize("bits", [b"", b"\xff", b"\xff" * 100], ids=["lost", "claims all", "too long"])
def test_a_wrong_chunk_map_costs_bytes_never_correctness(store: ContentStore, folder: Path, bits: bytes) -> None:
    manifest, _data, root = build_manifest(folder, list(SIZES), "0")
    entry = manifest.entry("big.bin")
    store.begin(root, manifest.files, kind="checkpoint")
    with store.open_partial(root, entry) as partial:
        partial.write(0, chunk_of(folder, entry, 0))
    (store.folder / "roots" / root / "maps" / "big.bin").write_bytes(bits)
    with store.open_partial(root, entry) as partial:
        assert partial.missing == ([1, 2] if bits else [0, 1, 2])
    fetched(store, root, entry, folder)
    assert store.verify(root) == []
    assert store.path(root, "big.bin").read_bytes() == (folder / "big.bin").read_bytes()


def test_what_was_reserved_for_a_file_that_did_not_come_is_given_back(store: ContentStore, folder: Path) -> None:
    """One announcement with large files that nobody sends, and another, and another, would fill the disk."""
    manifest, _data, root = build_manifest(folder, list(SIZES), "0")
    entry = manifest.entry("big.bin")
    store.begin(root, manifest.files, kind="checkpoint")
    path = store.folder / "roots" / root / "partial" / "big.bin"
    with store.open_partial(root, entry) as partial:
        assert path.stat().st_size == entry.length, "no space is said now, not after an hour"
        with pytest.raises(InUse):
            store.open_partial(root, entry)
        assert path.stat().st_size == entry.length, "who may not have it leaves it alone"
    assert path.stat().st_size == 0
    with store.open_partial(root, entry) as partial:
        partial.write(1, chunk_of(folder, entry, 1))
    assert path.stat().st_size == 2 * CHUNK
    if 512 * path.stat().st_blocks < 2 * CHUNK:  # a file system that has holes: the first chunk's room is back as well
        assert 512 * path.stat().st_blocks <= CHUNK + 65_536
    else:
        assert not sys.platform.startswith("linux"), "one chunk sent must not keep the room of all before it"
    limited = ContentStore(store.folder, limit=entry.length - 1)
    with pytest.raises(OSError, match="may hold"):
        limited.open_partial(root, entry)
    with store.open_partial(root, entry) as partial:
        assert partial.missing == [0, 2]
    fetched(store, root, entry, folder)
    assert store.verify(root) == []


def test_a_file_is_fetched_by_one_at_a_time(store: ContentStore, folder: Path) -> None:
    manifest, _data, root = build_manifest(folder, list(SIZES), "0")
    entry = manifest.entry("exact.bin")
    store.begin(root, manifest.files, kind="checkpoint")
    with store.open_partial(root, entry) as one:
        for other in (store, ContentStore(store.folder)):
            with pytest.raises(InUse, match=r"exact\.bin"):
                other.open_partial(root, entry)
        one.write(0, chunk_of(folder, entry, 0))
        assert one.finish() == one.finish() == store.path(root, "exact.bin")
    assert store.verify(root) == []
    assert list((store.folder / "roots" / root / "maps").iterdir()) == []


def test_what_is_used_is_not_deleted(store: ContentStore, folder: Path) -> None:
    _manifest, data, root = build_manifest(folder, list(SIZES), "0")
    store.put_folder(data, folder)
    other = ContentStore(store.folder)
    with other.use(root), other.use(root):
        assert store.in_use(root)
        with pytest.raises(InUse):
            store.delete(root)
        assert store.has(root)
    assert not store.in_use(root)
    store.delete(root)
    assert not store.has(root)


def test_a_limit_is_said_before_the_download_and_own_files_find_room(folder: Path, tmp_path: Path) -> None:
    manifest, data, root = build_manifest(folder, list(SIZES), "0")
    size = manifest.entry("big.bin").length
    store = ContentStore(tmp_path / "limited", limit=size + 10)
    store.begin(root, manifest.files, kind="checkpoint")
    fetched(store, root, manifest.entry("big.bin"), folder)
    fetched(store, root, manifest.entry("small.json"), folder)
    with pytest.raises(OSError, match=f"may hold {size + 10}.*store gc") as caught:
        store.open_partial(root, manifest.entry("exact.bin"))
    assert caught.value.errno == errno.EDQUOT
    store.put_folder(data, folder)
    assert store.has(root)
    assert store.used_bytes() == manifest.total_bytes


def test_no_space_is_said_before_the_download(
    store: ContentStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _data, root = build_manifest(folder, list(SIZES), "0")
    store.begin(root, manifest.files, kind="checkpoint")
    real = os.statvfs(store.folder)

    def nearly_full(free: int) -> None:
        left = SimpleNamespace(f_bavail=free, f_frsize=1, f_bsize=real.f_bsize)
        monkeypatch.setattr(os, "fstatvfs", lambda _fd: left)

    entry, before = manifest.entry("big.bin"), set(os.listdir("/proc/self/fd"))
    nearly_full(entry.length - 1)
    with pytest.raises(OSError, match="No space left"):
        store.open_partial(root, entry)
    assert set(os.listdir("/proc/self/fd")) == before
    nearly_full(entry.length)
    with store.open_partial(root, entry) as partial:
        # What one file was promised is not promised to the next.
        with pytest.raises(OSError, match="No space left"):
            store.open_partial(root, manifest.entry("exact.bin"))
        for index in partial.missing:
            partial.write(index, chunk_of(folder, entry, index))
        partial.finish()
    nearly_full(SIZES["exact.bin"])
    store.open_partial(root, manifest.entry("exact.bin")).close()


def test_a_symlink_in_place_of_a_partial_file_is_not_followed(
    store: ContentStore, folder: Path, tmp_path: Path
) -> None:
    manifest, _data, root = build_manifest(folder, list(SIZES), "0")
    store.begin(root, manifest.files, kind="checkpoint")
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (store.folder / "roots" / root / "partial" / "big.bin").symlink_to(victim)
    with pytest.raises(OSError):
        store.open_partial(root, manifest.entry("big.bin"))
    assert victim.read_bytes() == b"precious"


def test_two_files_of_one_name_are_refused(store: ContentStore, folder: Path) -> None:
    entry = file_entry(folder / "small.json")
    with pytest.raises(ValueError, match="twice"):
        store.begin("0" * 64, [entry, entry], kind="plan")


# ---- keeping and letting go


def test_what_is_stored_is_listed_pinned_and_deleted(store: ContentStore, folder: Path, tmp_path: Path) -> None:
    manifest, data, root = build_manifest(folder, list(SIZES), "0")
    store.put_folder(data, folder)
    other, _other_data, other_root = build_manifest(make_folder(tmp_path / "other", {"a": 5, "b": 7}), ["a", "b"], "1")
    store.begin(other_root, other.files, kind="checkpoint")
    fetched(store, other_root, other.entry("b"), tmp_path / "other")
    store.pin(root, "own checkpoint")

    listed = {stored.root: stored for stored in store.roots()}
    assert listed[root].complete
    assert (listed[root].bytes, listed[root].total) == (manifest.total_bytes, manifest.total_bytes)
    assert listed[root].pinned == "own checkpoint"
    assert not listed[other_root].complete
    assert (listed[other_root].bytes, listed[other_root].total) == (7, 12)
    assert listed[other_root].pinned is None

    with pytest.raises(ValueError, match="own checkpoint"):
        store.delete(root)
    store.delete(other_root)
    store.unpin(root)
    store.unpin(root)
    store.delete(root)
    store.delete(root)
    assert store.roots() == []
    assert not store.has(root)
    assert store.read_blob(root) is None
    assert not list(store.folder.glob("deleted-*"))


def test_a_damaged_pin_file_is_set_aside(store: ContentStore) -> None:
    (store.folder / "pins.json").write_text("{")
    assert store.pins() == {}
    assert (store.folder / "pins.json.corrupt-1").exists()
    store.pin("0" * 64, "why")
    assert store.pins() == {"0" * 64: "why"}
