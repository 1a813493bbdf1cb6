"""A checkpoint from a peer that nobody can dial, through a relay: three network namespaces, no other road."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paris_swarm.dht_schemas.digest import CHUNK
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.swarm.store import ContentStore

CHUNKS = 4
SCRIPT = """
mount -t tmpfs none /run; mkdir -p /run/netns
for name in relay hidden receiver; do ip netns add $name; ip netns exec $name ip link set lo up; done
link() {  # an Ethernet cable from $1 to the relay, network $2.0/24
    ip link add v$1 type veth peer name r$1
    ip link set v$1 netns $1; ip link set r$1 netns relay
    ip netns exec $1 ip addr add $2.2/24 dev v$1; ip netns exec $1 ip link set v$1 up
    ip netns exec relay ip addr add $2.1/24 dev r$1; ip netns exec relay ip link set r$1 up
}
link hidden 41.1.1; link receiver 41.1.2
END="$PYTHON $HERE/relayed_end.py"
ip netns exec relay $END $RELAY $FOLDER /ip4/0.0.0.0/tcp/4001 > $FOLDER/relay.out &
until [ -s $FOLDER/relay.out ]; do sleep 0.2; done
ID=$(sed 's/.*\\/p2p\\/\\([^"]*\\)".*/\\1/' $FOLDER/relay.out)
ip netns exec hidden $END hidden $FOLDER /ip4/41.1.1.2/tcp/4001 /ip4/41.1.1.1/tcp/4001/p2p/$ID > $FOLDER/hidden.out &
until [ -s $FOLDER/hidden.out ]; do sleep 0.2; done
sed 's/.*"peer": "\\([^"]*\\)".*/\\1/' $FOLDER/hidden.out | tr -d '\\n' > $FOLDER/peer
cat $FOLDER/hidden.out
ip netns exec receiver $END $RECEIVER $FOLDER /ip4/41.1.2.2/tcp/4001 /ip4/41.1.2.1/tcp/4001/p2p/$ID
"""


def namespaces_work() -> bool:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    script = "mount -t tmpfs none /run; mkdir -p /run/netns; ip netns add a"
    tried = subprocess.run(["unshare", "-rnm", "sh", "-ec", script], check=False, capture_output=True)
    return tried.returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not namespaces_work(), reason="network namespaces are not allowed here")
@pytest.mark.parametrize(("relay", "receiver"), [("relay", "reader"), ("stingy", "receiver")])
def test_a_hidden_peers_checkpoint_comes_through_the_relay(tmp_path: Path, relay: str, receiver: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "big.bin").write_bytes(random.Random(0).randbytes(CHUNKS * CHUNK))
    _manifest, data, root = build_manifest(folder, ["big.bin"], "0")
    ContentStore(tmp_path / "held").put_folder(data, folder)
    (tmp_path / "manifest").write_bytes(data)
    (tmp_path / "root").write_text(root)
    done = subprocess.run(
        # A process namespace too: when the script ends, so does everything it started.
        ["unshare", "-rnmp", "--fork", "--kill-child", "sh", "-ec", SCRIPT],
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "HERE": str(Path(__file__).parent),
            "FOLDER": str(tmp_path),
            "RELAY": relay,
            "RECEIVER": receiver,
        },
        check=False,
        stdout=subprocess.PIPE,
        timeout=500,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, lines
    hidden, received = lines
    assert "p2p-circuit" in hidden["circuit"]
    assert received["right"]
    assert received["saved"] == CHUNKS * CHUNK
    if relay == "relay":
        assert received["streams"] == 1, "a relay of ours carries a checkpoint in one circuit"
        assert received["twice"] == 0
    else:
        assert received["streams"] > CHUNKS * CHUNK // (128 * 1024), "128 KiB a circuit"
        assert received["twice"] <= CHUNKS * CHUNK // 4, "half a part of eight or fewer a circuit, and the first cut"
        assert received["faults"] == [], "a limited source is not a faulty one"
    if table := os.environ.get("PARIS_SWARM_FAULTS_TABLE"):
        name = "a relay of ours" if relay == "relay" else "a relay that lets 128 KiB through a circuit"
        with open(f"{table}.{relay}", "w") as file:
            file.write(
                f"| source behind {name}, place found after {hidden['seconds']:.0f} s; {received['streams']} streams | "
                f"{received['twice'] / CHUNK:.2f} | 0.00 | {received['seconds']:.1f} s in all | whole |\n"
            )
