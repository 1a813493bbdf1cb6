"""A download as a process that dies at an exact point: ``faulty_receiver.py STORE ROOT MANIFEST PEER ADDRESS PHASE``.

Phases: begin (before anything is noted), chunk (half of the fourth chunk is written), map (it is written, and not in
the map yet), rename (the last chunk is written, the file not in its place), renamed (it is, and the map is still
there), announce (all is whole, and nobody has been told).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from paris_swarm.dht_schemas.manifest import open_manifest
from paris_swarm.swarm.fetching import fetch_files
from paris_swarm.swarm.hivemind_transport import HivemindTransport
from paris_swarm.swarm.store import ContentStore

CHUNK_OF_DEATH = 4


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(phase: str) -> None:
    """Put death in place of one call of the operating system."""
    pwrite, replace, chunks = os.pwrite, os.replace, 0

    def deadly_pwrite(descriptor: int, data: Any, offset: int) -> int:
        nonlocal chunks
        chunks += len(data) > 1  # a single byte is the map's
        if chunks == CHUNK_OF_DEATH:
            if phase == "chunk":
                pwrite(descriptor, memoryview(data)[: len(data) // 2], offset)
                die()
            elif phase == "map" and len(data) == 1:
                die()
        return pwrite(descriptor, data, offset)

    def deadly_replace(source: Any, target: Any) -> None:
        big = str(target).endswith("files/big.bin")
        if big and phase == "rename":
            die()
        replace(source, target)
        if big and phase == "renamed":
            die()

    os.pwrite, os.replace = deadly_pwrite, deadly_replace  # type: ignore[assignment]


async def main(folder: str, root: str, manifest: str, peer: str, address: str, phase: str) -> None:
    store = ContentStore(Path(folder))
    entries = open_manifest(Path(manifest).read_bytes(), root, cap_bytes=1 << 40).files
    node = await HivemindTransport.start(None, observer=True)
    arm(phase)
    if phase == "begin":
        die()
    await fetch_files(node, store, [peer], root, entries, addresses={peer: [address]})
    if phase == "announce":
        die()
    await node.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
