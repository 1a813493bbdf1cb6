"""Moving 1 GB between processes on this machine: our verified fetch against three other ways, in one run.

    python benchmarks/transfer.py                      # five repetitions of 1 GB, about ten minutes
    python benchmarks/transfer.py --size 64 --runs 1   # a smoke test
    python benchmarks/transfer.py --json               # the five figures only

Every way gets processes of its own (real p2pd daemons on both sides where libp2p is used); the repetitions are
interleaved, in another order each time; figures are medians. The bytes are normal random fp32 numbers, which no
lossless coder shrinks by a tenth.

  ours            fetch_blob + fetch_files into a content store on disk: every chunk hashed on both sides, fsynced
  ours-three      the same from three source processes
  ours-libp2p     the same with the direct connection switched off: everything through both p2pd
  raw             hivemind's binary stream, one, as `call_binary_stream_handler` gives it; read and dropped: no framing,
                  no hash, nothing written. At several sizes of a write; the fastest median counts
  raw-three       three such streams from three sources, a third of the bytes each
  protobuf        hivemind's own `load_state_from_peers` (tensors of 4 MB, parts of 64 KiB), into memory
  https           curl from nginx over TLS 1.3 into a file
  tcp             a plain TCP socket in Python, sendfile to recv_into: what this machine's loopback gives

`--json` prints vs_raw_one_source (ours / raw), vs_raw_three_sources (ours-three / raw-three), vs_protobuf and vs_https
(ours / theirs), as ratios of throughput, and rss_growth_mb: by how much the receiving process of `ours` and
`ours-three` grew at most. vs_https is null where nginx or curl is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.swarm.direct_tls import ephemeral_certificate

ENDS = Path(__file__).with_name("transfer_ends.py")
PIECES = (64 * 1024, 256 * 1024, 1024 * 1024)
"""Sizes of a write tried for the raw stream, bytes."""
MB = 1_000_000
LOST_AT_MOST = 10
"""Runs of one way that may come short of their bytes before the benchmark gives up."""


class End:
    """A process of transfer_ends.py."""

    def __init__(self, *arguments: str) -> None:
        self.name = arguments[1] if arguments[0] == "receiver" else "source"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(ENDS), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} process ended; its message is above")
        return dict(json.loads(line))

    def ask(self, **message: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


def make_folder(folder: Path, size: int) -> None:
    """A checkpoint's shape: EMA and weights a quarter each, optimiser a half, and its manifest."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for name, share in (("ema", 4), ("model", 4), ("optimizer", 2)):
        with open(folder / f"{name}.safetensors", "wb") as file:
            left = size // share
            while left:
                part = generator.standard_normal(min(left, 1 << 22) // 4, dtype=np.float32).tobytes()
                file.write(part[:left])
                left -= len(part)
    _manifest, data, _root = build_manifest(folder, [path.name for path in folder.iterdir()], "0")
    (folder / "manifest.json").write_bytes(data)


class Nginx:
    """nginx over TLS on loopback, serving ``folder``; two workers, sendfile, no log."""

    def __init__(self, work: Path, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        certificate = ephemeral_certificate()
        (work / "key.pem").touch(mode=0o600)
        (work / "key.pem").write_bytes(certificate.key_pem)
        (work / "certificate.pem").write_bytes(certificate.certificate_pem)
        (work / "nginx.conf").write_text(
            f"""
            pid {work}/nginx.pid; error_log {work}/nginx.log; worker_processes 2; daemon off; user root;
            events {{ worker_connections 64; }}
            http {{ access_log off; sendfile on; tcp_nopush on; server {{
                listen 127.0.0.1:{self.port} ssl; ssl_protocols TLSv1.3;
                ssl_certificate {work}/certificate.pem; ssl_certificate_key {work}/key.pem; root {folder}; }} }}
            """
        )
        command = ["nginx", "-c", str(work / "nginx.conf"), "-p", str(work)]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise SystemExit(f"nginx did not start; see {work}/nginx.log")

    def fetch(self, names: list[str], target: Path) -> float:
        target.mkdir()
        urls = [part for name in names for part in ("-o", name, f"https://127.0.0.1:{self.port}/{name}")]
        begun = time.perf_counter()
        subprocess.run(["curl", "-sSkf", *urls], cwd=target, check=True)
        took = time.perf_counter() - begun
        shutil.rmtree(target)
        return took

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


def plain_tcp(paths: list[Path]) -> float:
    """Seconds for the same bytes over a plain TCP socket, the sender a process of its own."""
    size = sum(path.stat().st_size for path in paths)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = os.fork()
        if child == 0:
            with socket.create_connection(listener.getsockname()) as sender:
                for path in paths:
                    with open(path, "rb") as file:
                        sender.sendfile(file)
            os._exit(0)
        begun = time.perf_counter()
        receiver, _address = listener.accept()
        buffer = memoryview(bytearray(1 << 20))
        with receiver:
            while got := receiver.recv_into(buffer):
                size -= got
        took = time.perf_counter() - begun
        os.waitpid(child, 0)
    if size:
        raise SystemExit(f"plain TCP came {size} bytes short")
    return took


def in_turn(ways: Sequence[str], run: int) -> list[str]:
    """The ways in the order of one run. What ran just before leaves a machine behind, with more or less memory given
    back to the host: each run goes round in other steps, so a way begins elsewhere and follows other ones.
    """
    steps = [step for step in range(1, len(ways)) if math.gcd(step, len(ways)) == 1]
    step = steps[run % len(steps)]
    return [ways[(2 * run + step * place) % len(ways)] for place in range(len(ways))]


def measure(size: int, runs: int, work: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Every way, ``runs`` times in turn. Returns throughput in MB/s and memory growth in MB by way."""
    folder = work / "data"
    make_folder(folder, size)
    names = [path.name for path in sorted(folder.glob("*.safetensors"))]
    size = sum((folder / name).stat().st_size for name in names)
    sources = [End("source", str(folder), str(work / f"source-{index}")) for index in range(3)]
    nginx = Nginx(work, folder) if shutil.which("nginx") and shutil.which("curl") else None
    ends: list[End] = list(sources)
    try:
        known = [end.hear() for end in sources]
        receivers: dict[str, End] = {}
        for name, count in (
            ("ours", 1),
            ("ours-three", 3),
            ("ours-libp2p", 1),
            ("ours-three-libp2p", 3),
            ("raw", 1),
            ("raw-three", 3),
            ("protobuf", 1),
        ):
            end = receivers[name] = End("receiver", name, str(work))
            ends.append(end)
            end.ask(sources=known[:count])
        took: dict[str, list[float]] = {}
        growth: dict[str, float] = {}
        cpu: dict[str, list[float]] = {}
        lost: dict[str, int] = {}

        def record(name: str, seconds: float) -> None:
            took.setdefault(name, []).append(seconds)
            note(f"  {name:20} {size / MB / seconds:7.0f} MB/s")

        def timed(end: End, name: str, size: int, piece: int) -> dict[str, Any]:
            """A whole run; a raw stream that lost bytes is counted, named and measured again."""
            while "short" in (report := end.ask(size=size, piece=piece)):
                note(f"  {name:20} measured again: {report['short']}")
                lost[name] = lost.get(name, 0) + 1
                if lost[name] > LOST_AT_MOST:
                    raise SystemExit(f"{name}: {lost[name]} runs came short; is the machine out of memory?")
            return report

        def once(name: str) -> None:
            """One run of one way; the raw streams at every size of a write."""
            if name == "tcp":
                record(name, plain_tcp([folder / file for file in names]))
                return
            if name == "https":
                assert nginx is not None
                record(name, nginx.fetch(names, work / "https"))
                return
            for piece in PIECES if name.startswith("raw") else PIECES[:1]:
                report = timed(receivers[name], name, size, piece)
                record(f"{name} {piece >> 10}K" if name.startswith("raw") else name, report["seconds"])
                growth[name] = max(growth.get(name, 0.0), report["rss_growth_mb"])
                cpu.setdefault(name, []).append(report["cpu_seconds"])

        for run in range(runs):
            note(f"run {run + 1} of {runs}")
            for name in in_turn([*receivers, *(["https"] if nginx is not None else []), "tcp"], run):
                once(name)
        growth["source (most of three)"] = max(end.ask(ask="rss")["rss_growth_mb"] for end in sources)
    finally:
        for closing in [threading.Thread(target=end.close) for end in ends]:
            closing.start()
        if nginx is not None:
            nginx.close()
    speed = {name: size / MB / statistics.median(seconds) for name, seconds in took.items()}
    for name in ("raw", "raw-three"):
        speed[name] = max(speed[f"{name} {piece >> 10}K"] for piece in PIECES)
    return {
        "bytes": size,
        "runs": runs,
        "mb_per_s": {name: round(value, 1) for name, value in speed.items()},
        "receiver_cpu_s": {name: round(statistics.median(values), 2) for name, values in cpu.items()},
        "rss_growth_mb": growth,
        "came_short": lost,
    }


def summary(detail: dict[str, Any]) -> dict[str, float | None]:
    """The five figures."""
    speed, growth = detail["mb_per_s"], detail["rss_growth_mb"]
    return {
        "vs_raw_one_source": round(speed["ours"] / speed["raw"], 3),
        "vs_raw_three_sources": round(speed["ours-three"] / speed["raw-three"], 3),
        "vs_protobuf": round(speed["ours"] / speed["protobuf"], 3),
        "vs_https": round(speed["ours"] / speed["https"], 3) if "https" in speed else None,
        "rss_growth_mb": max(growth["ours"], growth["ours-three"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1000, help="MB to move (default: 1000)")
    parser.add_argument("--runs", type=int, default=5, help="repetitions of every way (default: 5)")
    parser.add_argument("--json", action="store_true", help="print the five figures and nothing else")
    parser.add_argument("--detail", type=Path, help="write every figure here as JSON")
    parser.add_argument(
        "--work", type=Path, help="where to work; about seven times the size (default: a temporary folder)"
    )
    arguments = parser.parse_args()
    if arguments.size < 8 or arguments.runs < 1:
        parser.error("at least 8 MB and one run")

    def note(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="transfer-", dir=arguments.work) as work:
        detail = measure(arguments.size * MB, arguments.runs, Path(work), note)
    figures = summary(detail)
    if arguments.detail:
        arguments.detail.write_text(json.dumps({**figures, "detail": detail}, indent=2) + "\n")
    print(
        json.dumps(figures if arguments.json else {**figures, "detail": detail}, indent=None if arguments.json else 2)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
