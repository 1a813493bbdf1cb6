"""One end of a relayed download, run in a network namespace of its own: ``relayed_end.py ROLE FOLDER LISTEN [SEED]``.

relay: prints its address. stingy: the same, with libp2p's own limit of 128 KiB a circuit. hidden: serves FOLDER/held,
prints its address once a relay has a place for it. receiver: fetches ROOT (a file in FOLDER) from the peer named in
FOLDER/peer, and prints what it cost as one JSON line. reader: the same as an observer, as `assemble` and `status` are.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import open_manifest
from paris_swarm.swarm.counters import Counters
from paris_swarm.swarm.fetching import FetchReport, fetch_blob, fetch_files
from paris_swarm.swarm.hivemind_transport import HivemindTransport, p2pd_process
from paris_swarm.swarm.serving import serve_files
from paris_swarm.swarm.sources import SourceBook
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.transport import NoSource


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


async def main(role: str, folder: Path, listen: str, *seeds: str) -> None:
    identity = folder / f"{role}.key"
    identity.write_bytes(Identity.generate().to_protobuf())
    if role == "stingy":
        p2pd_process._RELAYED_BYTES = 128 * 1024
    node = await HivemindTransport.start(
        identity,
        list(seeds),
        listen=listen,
        public=role != "reader",
        reachability=None if role == "reader" else "public" if role in ("relay", "stingy") else "private",
        observer=role == "reader",
    )
    if role in ("relay", "stingy"):
        say(address=next(address for address in await node.addresses() if "/ip4/127." not in address))
        await asyncio.Event().wait()
    if role == "hidden":
        node.serve(serve_files(ContentStore(folder / "held"), Counters()))
        began = time.monotonic()
        while not (circuits := [address for address in await node.addresses() if "p2p-circuit" in address]):
            await asyncio.sleep(1.0)
        say(peer=node.peer_id, circuit=circuits[0], seconds=time.monotonic() - began)
        await asyncio.Event().wait()
    peer, root = (folder / "peer").read_text(), (folder / "root").read_text()
    book, report, store, began = SourceBook(), FetchReport(), ContentStore(folder / "received"), time.monotonic()
    while True:  # the relay may know of its guest's place before it knows of the address
        try:
            manifest = await fetch_blob(node, [peer], root, max_bytes=1 << 20, book=book)
            break
        except NoSource:
            if time.monotonic() - began > 60.0:
                raise
            await asyncio.sleep(1.0)
    entries = open_manifest(manifest, root, cap_bytes=1 << 40).files
    await fetch_files(node, store, [peer], root, entries, report=report, patience_s=60.0, book=book)
    say(
        right=store.has(root) and store.verify(root) == [],
        saved=report.saved,
        twice=report.twice,
        streams=1 + report.resumed + len(report.faults),
        faults=[str(error) for _peer, error in report.faults],
        seconds=time.monotonic() - began,
    )
    await node.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
