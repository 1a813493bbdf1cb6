"""One end of a relayed download, run in a network namespace of its own: ``relayed_end.py ROLE FOLDER LISTEN [SEED]``.

relay: prints its address. hidden: serves FOLDER/held, prints its address once a relay has a place for it. receiver:
fetches ROOT (a file in FOLDER) from the peer named in FOLDER/peer, and prints what it cost as one JSON line.
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
from paris_swarm.swarm.fetching import FetchReport, fetch_files
from paris_swarm.swarm.hivemind_transport import HivemindTransport
from paris_swarm.swarm.serving import serve_files
from paris_swarm.swarm.store import ContentStore


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


async def main(role: str, folder: Path, listen: str, *seeds: str) -> None:
    identity = folder / f"{role}.key"
    identity.write_bytes(Identity.generate().to_protobuf())
    node = await HivemindTransport.start(
        identity,
        list(seeds),
        listen=listen,
        public=True,
        reachability="public" if role == "relay" else "private",
    )
    if role == "relay":
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
    entries = open_manifest((folder / "manifest").read_bytes(), root, cap_bytes=1 << 40).files
    report, store, began = FetchReport(), ContentStore(folder / "received"), time.monotonic()
    await fetch_files(node, store, [peer], root, entries, report=report, patience_s=60.0)
    seconds = time.monotonic() - began
    say(right=store.has(root) and store.verify(root) == [], saved=report.saved, twice=report.twice, seconds=seconds)
    await node.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
