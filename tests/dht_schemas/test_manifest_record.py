"""The manifest: one root for one set of files; names, lengths and contents are bound; no name leaves its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas import (
    CHUNK,
    MAX_MANIFEST,
    BadManifest,
    DigestMismatch,
    FileEntry,
    MalformedRecord,
    Manifest,
    RecordError,
    RecordTooLarge,
    blake3_hex,
    build_manifest,
    canonical_json,
    open_manifest,
)
from paris_swarm.dht_schemas.manifest import check_file_name

CAP = 10**9
HEX = "c" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ema.safetensors").write_bytes(b"weights")
    (tmp_path / "state.json").write_bytes(b"{}")
    (tmp_path / "empty.json").touch()
    return tmp_path


def raw(**changes: Any) -> dict[str, Any]:
    values = {
        "v": 1,
        "kind": "expert",
        "slot": "0",
        "files": [{"name": "a.json", "length": 3, "chunks": [HEX]}],
        "meta": {"step": 1, "parent": None},
    }
    return {**values, **changes}


def opened(value: object) -> Manifest:
    data = value if isinstance(value, bytes) else canonical_json(value)
    return open_manifest(data, blake3_hex(data), cap_bytes=CAP)


def test_build_and_open(folder: Path) -> None:
    meta = {"step": 7, "parent": HEX, "loss": 0.25}
    manifest, data, root = build_manifest(folder, ["state.json", "ema.safetensors", "empty.json"], "3", meta=meta)
    assert open_manifest(data, root, cap_bytes=CAP) == manifest
    assert [entry.name for entry in manifest.files] == ["ema.safetensors", "empty.json", "state.json"]
    assert (manifest.kind, manifest.slot, manifest.step, manifest.parent, manifest.total_bytes) == (
        "expert",
        "3",
        7,
        HEX,
        9,
    )
    assert manifest.entry("ema.safetensors").chunks == (blake3_hex(b"weights"),)
    assert build_manifest(folder, ["ema.safetensors", "empty.json", "state.json"], "3", meta=meta)[2] == root
    assert build_manifest(folder, ["state.json"], "router")[0].kind == "router"
    with pytest.raises(BadManifest):
        manifest.entry("other")


def test_the_root_binds_names_lengths_contents_and_meta(folder: Path) -> None:
    names = ["ema.safetensors", "state.json"]
    roots = {
        build_manifest(folder, names, slot, meta={"step": step, "parent": None})[2] for slot in "01" for step in (0, 1)
    }
    (folder / "state.json").write_bytes(b"[]")
    roots.add(build_manifest(folder, names, "0")[2])
    (folder / "state.json").rename(folder / "later.json")
    roots.add(build_manifest(folder, ["ema.safetensors", "later.json"], "0")[2])
    assert len(roots) == 6


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "a\\b", ".hidden", "A", "a..b", "..", "", "a\n", "a" * 65, "é", "con:x"]
)
def test_names_that_leave_the_folder_or_confuse_it(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        build_manifest(folder, [name], "0")
    with pytest.raises(BadManifest, match=r"files\.0\.name"):
        opened(raw(files=[{"name": name, "length": 3, "chunks": [HEX]}]))


@given(st.text(max_size=12))
def test_a_name_that_passes_stays_in_its_folder(name: str) -> None:
    try:
        check_file_name(name)
    except ValueError:
        return
    assert (Path("/folder") / name).resolve().parent == Path("/folder")


def test_links_and_folders_are_not_files(folder: Path) -> None:
    (folder / "link.json").symlink_to(folder / "state.json")
    (folder / "sub.json").mkdir()
    for name in ("link.json", "sub.json"):
        with pytest.raises(ValueError, match="plain file"):
            build_manifest(folder, [name], "0")
    with pytest.raises(FileNotFoundError):
        build_manifest(folder, ["missing.json"], "0")
    with pytest.raises(ValueError, match="twice"):
        build_manifest(folder, ["state.json", "state.json"], "0")


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"v": True},
        {"kind": "plan"},
        {"kind": "router"},
        {"slot": "router"},
        {"slot": "01"},
        {"files": []},
        {"files": {}},
        {"files": [{"name": f"f{i:02}", "length": 0, "chunks": []} for i in range(65)]},
        {"files": [{"name": "a", "length": 0, "chunks": []}] * 2},
        {"files": [{"name": "b", "length": 0, "chunks": []}, {"name": "a", "length": 0, "chunks": []}]},
        {"files": [{"name": "a", "length": 3, "chunks": []}]},
        {"files": [{"name": "a", "length": 3, "chunks": [HEX, HEX]}]},
        {"files": [{"name": "a", "length": CHUNK + 1, "chunks": [HEX]}]},
        {"files": [{"name": "a", "length": CHUNK, "chunks": [HEX, HEX]}]},
        {"files": [{"name": "a", "length": 0, "chunks": [HEX]}]},
        {"files": [{"name": "a", "length": -1, "chunks": []}]},
        {"files": [{"name": "a", "length": True, "chunks": [HEX]}]},
        {"files": [{"name": "a", "length": 3, "chunks": [HEX.upper()]}]},
        {"files": [{"name": "a", "length": 3, "chunks": [HEX + "\n"]}]},
        {"meta": {}},
        {"meta": {"step": 1}},
        {"meta": {"step": True, "parent": None}},
        {"meta": {"step": -1, "parent": None}},
        {"meta": {"step": 1, "parent": "x"}},
        {"meta": {"step": 1, "parent": 0}},
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_broken_rules(changes: dict[str, Any]) -> None:
    with pytest.raises(BadManifest):
        opened(raw(**changes))


def test_a_manifest_too_large_to_be_read_is_not_made(folder: Path) -> None:
    with pytest.raises(ValueError, match="at most"):
        build_manifest(folder, ["state.json"], "0", meta={"step": 1, "parent": None, "note": "x" * MAX_MANIFEST})


def test_sizes() -> None:
    with pytest.raises(RecordTooLarge):
        open_manifest(b" " * (MAX_MANIFEST + 1), HEX, cap_bytes=CAP)
    million = [{"name": f"f{i}", "length": 0, "chunks": []} for i in range(20_000)]
    with pytest.raises(BadManifest):
        opened(raw(files=million))
    huge = [{"name": "a", "length": 2**52, "chunks": [HEX]}]
    with pytest.raises(BadManifest):
        opened(raw(files=huge))
    data = canonical_json(raw())
    assert open_manifest(data, blake3_hex(data), cap_bytes=3).total_bytes == 3
    with pytest.raises(BadManifest) as caught:
        open_manifest(data, blake3_hex(data), cap_bytes=2)
    assert caught.value.rule == "R-MAN-5"


def test_another_manifest_under_this_root() -> None:
    with pytest.raises(DigestMismatch):
        open_manifest(canonical_json(raw()), HEX, cap_bytes=CAP)


def test_a_second_spelling_is_refused() -> None:
    data = canonical_json(raw())
    for other in (data + b"\n", data.replace(b'"v":1', b'"v": 1'), data.replace(b"expert", b"\\u0065xpert")):
        with pytest.raises(BadManifest) as caught:
            opened(other)
        assert caught.value.rule == "R-MAN-4"


def test_unknown_fields_are_kept() -> None:
    """R-ENV-7"""
    manifest = opened(raw(note=[1, {"x": None}]))
    assert manifest.model_dump()["note"] == [1, {"x": None}]


@given(st.binary(max_size=200))
def test_arbitrary_bytes(data: bytes) -> None:
    with pytest.raises(MalformedRecord):
        opened(data)


@given(st.data())
def test_any_changed_bit_is_refused(data: st.DataObject) -> None:
    good = canonical_json(raw())
    bit = data.draw(st.integers(0, len(good) * 8 - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DigestMismatch):
        open_manifest(bytes(bad), blake3_hex(good), cap_bytes=CAP)
    try:
        again = opened(bytes(bad))
    except RecordError:
        return
    assert canonical_json(again.model_dump()) == bytes(bad)


@given(st.integers(0, 5 * CHUNK))
def test_the_chunk_count_follows_from_the_length(length: int) -> None:
    count = (length + CHUNK - 1) // CHUNK
    assert FileEntry(name="a", length=length, chunks=[HEX] * count).length == length  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunks"):
        FileEntry(name="a", length=length, chunks=(HEX,) * (count + 1))
