"""The two ends of benchmarks/transfer.py: what a source process serves, what a receiving process times.

    python benchmarks/transfer_ends.py source FOLDER STORE
    python benchmarks/transfer_ends.py receiver METHOD PLACE

Each talks JSON, a line a message, on standard input and output, and ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hivemind.averaging.averager import DecentralizedAverager
from hivemind.compression import NoCompression
from hivemind.p2p import PeerID
from hivemind.utils import MSGPackSerializer, ValueWithExpiration

from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import open_manifest
from paris_swarm.swarm.counters import Counters
from paris_swarm.swarm.fetching import fetch_blob, fetch_files
from paris_swarm.swarm.hivemind_transport import HivemindTransport
from paris_swarm.swarm.serving import serve_files
from paris_swarm.swarm.store import ContentStore

RAW = "/benchmark/raw/1"
TENSOR = 4_000_000
"""Bytes of each tensor of the state that hivemind sends: a matrix of a DiT-B is 2.4 to 9.4 MB in fp32."""


class ShortStream(RuntimeError):
    """hivemind's stream ended before its bytes: it cannot tell an end from a loss, so the run is measured again."""


Run = Callable[[dict[str, Any]], Awaitable[int]]


# ---------------------------------------------------------------------------------------------------------------------
# memory
# ---------------------------------------------------------------------------------------------------------------------


class Growth:
    """How far this process's resident memory rises above where it stood. Linux: /proc."""

    def __init__(self) -> None:
        self._base = _status_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew

    @property
    def mb(self) -> float:
        """MB (10^6 bytes) between the highest point since the start and the start."""
        return round(max(0.0, _status_mb("VmHWM") - self._base), 1)


def _status_mb(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"/proc/self/status does not say {name}")


# ---------------------------------------------------------------------------------------------------------------------
# hivemind's own way to move a state: its own code, without the process and the DHT around it
# ---------------------------------------------------------------------------------------------------------------------


class StateEnd(DecentralizedAverager):  # type: ignore[misc]
    """Either end of ``load_state_from_peers``: `rpc_download_state` and `_load_state_from_peers` run as they are."""

    def __new__(cls, *_: object, **__: object) -> StateEnd:
        return object.__new__(cls)

    def __init__(self, p2p: Any, tensors: list[torch.Tensor], donor: str | None = None) -> None:
        self._allow_state_sharing = SimpleNamespace(value=True)
        self.state_compression = NoCompression()
        self.serializer = MSGPackSerializer
        self.next_chunk_timeout = None
        self.prefix = "benchmark"
        self._tensors, self._p2p = tensors, p2p
        self._matchmaking = SimpleNamespace(request_timeout=60.0, group_key_manager=SimpleNamespace(prefix="benchmark"))
        found = ValueWithExpiration({donor: ValueWithExpiration(1.0, time.time() + 1e6)}, time.time() + 1e6)
        self.dht = SimpleNamespace(get=lambda *_, **__: found, peer_id=p2p.peer_id)

    async def _get_current_state_from_host_process(self) -> tuple[bytes, list[torch.Tensor], None]:
        return MSGPackSerializer.dumps({"epoch": 1}), self._tensors, None

    async def load(self) -> list[torch.Tensor]:
        future: Future[Any] = Future()
        await self._load_state_from_peers(future)
        result = future.result()
        if result is None:
            raise RuntimeError("hivemind's _load_state_from_peers gave nothing")
        return list(result[1])

    def __del__(self) -> None:
        """Nothing was started, so there is nothing to shut down."""


# ---------------------------------------------------------------------------------------------------------------------
# ends
# ---------------------------------------------------------------------------------------------------------------------


async def start_transport(folder: Path, *, direct: bool) -> HivemindTransport:
    """A node of its own on loopback, with a fresh identity in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    key = folder / "identity"
    key.write_bytes(Identity.generate().to_protobuf())
    key.chmod(0o600)
    return await HivemindTransport.start(key, direct=direct)


async def messages() -> AsyncIterator[dict[str, Any]]:
    """JSON objects from standard input, until it ends."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        yield json.loads(line)


def say(**message: object) -> None:
    print(json.dumps(message), flush=True)


async def source(folder: Path, store_path: Path) -> None:
    """Serve ``folder`` in every way that is measured."""
    store = ContentStore(store_path)
    manifest = (folder / "manifest.json").read_bytes()
    names = [entry["name"] for entry in json.loads(manifest)["files"]]
    root = store.put_folder(manifest, folder)
    transport = await start_transport(store_path / "node", direct=True)
    transport.serve(serve_files(store, Counters()))

    async def raw(_info: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bytes of the same files as hivemind's stream takes them: no framing, no hash."""
        piece, limit = json.loads(await reader.readline())
        buffer = memoryview(bytearray(piece))
        for name in names:
            with open(folder / name, "rb", buffering=0) as file:
                while limit > 0 and (got := file.readinto(buffer[: min(piece, limit)])):
                    writer.write(bytes(buffer[:got]))
                    await writer.drain()
                    limit -= got
        writer.close()

    p2p = transport._p2p
    await p2p.add_binary_stream_handler(RAW, raw)
    total = sum((folder / name).stat().st_size for name in names)
    tensors = [torch.randn(TENSOR // 4) for _ in range(total // TENSOR)]
    await StateEnd(p2p, tensors).add_p2p_handlers(p2p, namespace="benchmark")
    say(peer=transport.peer_id, address=(await transport.addresses())[0], root=root)
    growth = Growth()
    async for _ask in messages():
        say(rss_growth_mb=growth.mb)
    await transport.close()


async def receiver(method: str, place: Path) -> None:
    """Time one method as often as asked. The first message names the sources; each further one is a run."""
    asked = messages()
    known = await anext(asked)
    transport = await start_transport(Path(tempfile.mkdtemp(dir=place)), direct=not method.endswith("-libp2p"))
    peers = [await transport.connect(found["address"]) for found in known["sources"]]
    root = known["sources"][0]["root"]

    async def verified(_message: dict[str, Any]) -> int:
        target = Path(tempfile.mkdtemp(dir=place))
        begun = time.perf_counter_ns()
        store = ContentStore(target)
        manifest = await fetch_blob(transport, peers, root, max_bytes=1 << 20)
        opened = open_manifest(manifest, root, cap_bytes=1 << 40)
        store.put_blob(manifest)
        await fetch_files(transport, store, peers, root, opened.files)
        took = time.perf_counter_ns() - begun
        await asyncio.to_thread(shutil.rmtree, target)
        return took

    async def raw(message: dict[str, Any]) -> int:
        """As many streams as there are sources, each for its part."""

        async def drain(peer: str) -> None:
            part = -(-message["size"] // len(peers))
            stream = await transport._p2p.call_binary_stream_handler(PeerID.from_base58(peer), RAW)
            _info, reader, writer = stream
            writer.write(json.dumps([message["piece"], part]).encode() + b"\n")
            while data := await reader.read(message["piece"]):
                part -= len(data)
            writer.close()
            if part:
                raise ShortStream(f"the raw stream ended {part} bytes early")

        begun = time.perf_counter_ns()
        await asyncio.gather(*map(drain, peers))
        return time.perf_counter_ns() - begun

    async def protobuf(_message: dict[str, Any]) -> int:
        end = StateEnd(transport._p2p, [], PeerID.from_base58(peers[0]).to_bytes())
        begun = time.perf_counter_ns()
        tensors = await end.load()
        took = time.perf_counter_ns() - begun
        if sum(tensor.numel() * 4 for tensor in tensors) < _message["size"] // TENSOR * TENSOR:
            raise RuntimeError("hivemind's state came short")
        return took

    run: Run = {"ours": verified, "raw": raw, "protobuf": protobuf}[method.split("-")[0]]
    say(ready=True)
    growth = Growth()
    async for message in asked:
        cpu = time.process_time()
        try:
            took = await run(message)
        except ShortStream as error:
            say(short=str(error))
            continue
        say(seconds=took / 1e9, rss_growth_mb=growth.mb, cpu_seconds=round(time.process_time() - cpu, 3))
    await transport.close()


def main() -> None:
    role, first, second = sys.argv[1:4]
    work = source(Path(first), Path(second)) if role == "source" else receiver(first, Path(second))
    asyncio.run(work)


if __name__ == "__main__":
    main()
