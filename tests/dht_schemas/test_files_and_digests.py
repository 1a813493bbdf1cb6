"""Writes are whole or absent; damaged files are set aside; digests do not depend on how a file is read."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas import (
    CHUNK,
    atomic_write,
    atomic_write_json,
    blake3_hex,
    chunk_count,
    chunk_digests,
    digest_file,
    quarantine,
)
from paris_swarm.dht_schemas.files import sync

EMPTY = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"  # BLAKE3's own test vector


def test_write_and_replace(tmp_path: Path) -> None:
    path = tmp_path / "record"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["record"]


def test_keys_are_private_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    replace = os.replace

    def observed(source: Path, target: Path) -> None:
        modes.append(stat.S_IMODE(os.stat(source).st_mode))
        replace(source, target)

    monkeypatch.setattr(os, "replace", observed)
    path = tmp_path / "identity"
    path.write_bytes(b"old and readable")
    path.chmod(0o644)
    atomic_write(path, b"secret", mode=0o600)
    assert modes == [0o600]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_sync_reaches_the_disk_and_hides_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"bytes")
    synced: list[int] = []

    def observed(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", observed)
    sync(path)
    sync(tmp_path)
    assert synced == [path.stat().st_ino, tmp_path.stat().st_ino]
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "missing")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        sync(path)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record"
    atomic_write(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["record"]


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    link = tmp_path / "link"
    link.symlink_to(target)
    atomic_write(link, b"new")
    assert (target.read_bytes(), link.read_bytes(), link.is_symlink()) == (b"mine", b"new", False)


def test_json_is_readable_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    atomic_write_json(path, {"b": 1, "a": "é"})
    assert path.read_text("utf-8").splitlines()[1] == '  "a": "é",'
    assert json.loads(path.read_bytes()) == {"a": "é", "b": 1}
    for bad in (float("nan"), {1, 2}):
        with pytest.raises(ValueError, match=r".+"):
            atomic_write_json(path, bad)
    assert json.loads(path.read_bytes()) == {"a": "é", "b": 1}


def test_quarantine_keeps_every_damaged_copy(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for text in ("first", "second"):
        path.write_text(text)
        quarantine(path)
    assert not path.exists()
    assert (tmp_path / "state.json.corrupt-1").read_text() == "first"
    assert (tmp_path / "state.json.corrupt-2").read_text() == "second"
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    assert quarantine(folder) == tmp_path / "checkpoint.corrupt-1"


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert digest_file(path) == blake3_hex(b"") == EMPTY
    assert chunk_digests(path) == ()


@given(data=st.binary(max_size=200), chunk=st.integers(1, 70))
def test_chunks_are_the_pieces_in_order(tmp_path_factory: pytest.TempPathFactory, data: bytes, chunk: int) -> None:
    path = tmp_path_factory.getbasetemp() / "chunked"
    path.write_bytes(data)
    pieces = [data[start : start + chunk] for start in range(0, len(data), chunk)]
    assert chunk_digests(path, chunk) == tuple(map(blake3_hex, pieces))
    assert len(pieces) == chunk_count(len(data), chunk)
    assert digest_file(path) == blake3_hex(data)


def test_chunks_of_four_mebibytes(tmp_path: Path) -> None:
    path = tmp_path / "big"
    data = bytes(CHUNK) + b"x"
    path.write_bytes(data)
    assert chunk_digests(path) == (blake3_hex(bytes(CHUNK)), blake3_hex(b"x"))
    assert digest_file(path) == blake3_hex(data)
    with pytest.raises(ValueError, match="chunk"):
        chunk_digests(path, 0)
