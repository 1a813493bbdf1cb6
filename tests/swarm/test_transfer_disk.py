"""A disk that is full, read-only or over its quota: said before the download where that can be known, nothing lost.

Real file systems of a few megabytes, mounted in a namespace of their own where the system lets us.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paris_swarm.dht_schemas.digest import CHUNK
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.swarm.store import ContentStore

SIZE = 3 * CHUNK


def namespaces_work() -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], check=False, capture_output=True)
    return tried.returncode == 0


FETCH = """
import asyncio, json, sys
from pathlib import Path
from paris_swarm.dht_schemas.manifest import open_manifest
from paris_swarm.swarm.counters import Counters
from paris_swarm.swarm.fetching import FetchReport, fetch_files
from paris_swarm.swarm.memory import MemoryNetwork, MemoryTransport
from paris_swarm.swarm.serving import serve_files
from paris_swarm.swarm.store import ContentStore

async def main(held, received, root, limit):
    network, report = MemoryNetwork(), FetchReport()
    source = await MemoryTransport.start(network, "source")
    store = ContentStore(Path(held))
    source.serve(serve_files(store, Counters()))
    me = await MemoryTransport.start(network, "me", await source.addresses())
    entries = open_manifest(store.read_blob(root), root, cap_bytes=1 << 40).files
    try:
        target = ContentStore(Path(received), limit=int(limit) or None)
        await fetch_files(me, target, ["source"], root, entries, report=report)
        said, right = "", target.verify(root) == [] and target.has(root)
    except OSError as error:
        said, right = str(error), False
    print(json.dumps({"error": said, "saved": report.saved, "right": right}), flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def root(tmp_path: Path) -> str:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "big.bin").write_bytes(random.Random(0).randbytes(SIZE))
    _manifest, data, root = build_manifest(folder, ["big.bin"], "0")
    ContentStore(tmp_path / "held").put_folder(data, folder)
    (tmp_path / "fetch.py").write_text(FETCH)
    return root


def runs(tmp_path: Path, root: str, script: str, limit: int = 0) -> list[dict[str, object]]:
    """The JSON lines of a shell script in a mount namespace; $FETCH fetches into $DISK/store."""
    disk = tmp_path / "disk"
    disk.mkdir(exist_ok=True)
    fetch = f"{sys.executable} {tmp_path / 'fetch.py'} {tmp_path / 'held'} {disk / 'store'} {root} {limit}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-ec", script],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "FETCH": fetch, "DISK": str(disk)},
        check=True,
        capture_output=True,
        timeout=120,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


needs_namespaces = pytest.mark.skipif(not namespaces_work(), reason="mount namespaces are not allowed here")


@needs_namespaces
def test_a_full_disk_is_said_before_the_download_and_room_made_lets_it_go_on(tmp_path: Path, root: str) -> None:
    script = f"""
    mount -t tmpfs -o size={SIZE + CHUNK} none $DISK
    head -c {2 * CHUNK} /dev/zero > $DISK/ballast
    $FETCH
    rm $DISK/ballast
    $FETCH
    """
    full, later = runs(tmp_path, root, script)
    assert "No space left on device" in str(full["error"])
    assert f"{SIZE} bytes to come" in str(full["error"])
    assert full["saved"] == 0, "it was known before a byte came"
    assert later == {"error": "", "saved": SIZE, "right": True}


@needs_namespaces
def test_a_read_only_folder_is_named_and_what_was_stored_stays(tmp_path: Path, root: str) -> None:
    script = """
    mount -t tmpfs none $DISK
    $FETCH
    rm $DISK/store/roots/*/files/big.bin
    mount -o remount,ro $DISK
    $FETCH
    mount -o remount,rw $DISK
    $FETCH
    """
    first, refused, later = runs(tmp_path, root, script)
    assert first["right"]
    assert "Read-only file system" in str(refused["error"])
    assert str(tmp_path / "disk" / "store") in str(refused["error"])
    assert later == {"error": "", "saved": SIZE, "right": True}


@needs_namespaces
def test_a_quota_of_ours_stops_before_the_disk_does(tmp_path: Path, root: str) -> None:
    [refused] = runs(tmp_path, root, "mount -t tmpfs none $DISK; $FETCH", limit=SIZE - 1)
    assert f"may hold {SIZE - 1}" in str(refused["error"])
    assert refused["saved"] == 0
