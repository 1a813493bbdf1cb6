"""Coverage-guided fuzzing of every parser with atheris (libFuzzer): `make fuzz`.

    python tests/fuzz/fuzz_run.py [TARGET ...] [--inputs N] [--seconds S] [--json FILE] [--keep]

The inputs (10 million unless told) are shared out evenly; a target stops at its share or after its seconds (1,200
unless told), whichever comes first, and what it leaves is shared out among those that follow. Each runs in a process
of its own whose memory is capped. One input in 256 is run under tracemalloc: its peak may be 64 bytes for each byte of
input and 256 KiB. A fault is kept in tests/fuzz/faults/TARGET/, where test_fuzz_seeds.py replays it ever after. --keep
replaces the committed seeds by those inputs that reached something new.

Exit code 0: nothing found. 1: faults, each named. 2: atheris is not there.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEEDS = HERE / "seeds"
FAULTS = HERE / "faults"

INSIDE = "--inside"
"""First argument of the process of one target: its name and libFuzzer's options follow."""
ADDRESS_SPACE = 3 << 30
"""Bytes of address space a target's process may have, libraries included."""
RESIDENT_MB = 768
SLOW_S = 10
"""Seconds after which one input counts as a fault."""
HUNG_S = 3600
"""Seconds after which a target's process is given up."""
KEPT_BYTES = 40_000
"""Bytes of a target's committed seeds, as base64."""
_SAMPLE = 256


def main() -> int:
    if sys.argv[1:2] == [INSIDE]:
        return _fuzz_here(sys.argv[2], sys.argv[3:])
    arguments = _arguments()
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("fuzzing needs atheris: pip install -e '.[fuzz]' (Linux, Python 3.11 to 3.13)", file=sys.stderr)
        return 2
    sys.path.insert(0, str(HERE))
    from fuzz_targets import TARGETS

    names = arguments.targets or list(TARGETS)
    unknown = sorted(set(names) - set(TARGETS))
    if unknown:
        print(f"no target {unknown[0]}; there are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    left = arguments.inputs
    for number, name in enumerate(names):
        target = TARGETS[name]
        row = _fuzz(
            name, target.seeds, target.longest, left // (len(names) - number), arguments.seconds, keep=arguments.keep
        )
        left -= row["inputs"]
        rows.append(row)
        print(_line(row), flush=True)
        if arguments.json:
            _write_report(Path(arguments.json), rows)
    total = sum(row["inputs"] for row in rows)
    print(f"{total:,} inputs, {sum(len(row['faults']) for row in rows)} faults")
    return 1 if any(row["faults"] for row in rows) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--inputs", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=int, default=1200)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--keep", action="store_true")
    return parser.parse_args()


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['target']:<14}{row['inputs']:>12,} inputs {row['seconds']:>7.0f} s {row['per_second']:>8,.0f}/s"
        f"  {row['accepted']:>10,} accepted  {row['edges']:>6,} edges  {len(row['faults'])} faults"
    )


def _write_report(path: Path, rows: list[dict[str, Any]]) -> None:
    report = {"inputs": sum(row["inputs"] for row in rows), "targets": rows}
    path.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def stored(name: str) -> list[bytes]:
    """The committed seeds of a target."""
    path = SEEDS / f"{name}.json"
    return [base64.b64decode(text) for text in json.loads(path.read_text("utf-8"))] if path.exists() else []


def faults(name: str) -> list[Path]:
    """Inputs that once were faults."""
    return sorted((FAULTS / name).glob("*")) if (FAULTS / name).is_dir() else []


def _fuzz(
    name: str, seeds: tuple[bytes, ...], longest: int, inputs: int, seconds: int, *, keep: bool
) -> dict[str, Any]:
    known = {path.name for path in faults(name)}
    (FAULTS / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        corpus, count = Path(scratch) / "corpus", Path(scratch) / "count"
        corpus.mkdir()
        for number, seed in enumerate([*seeds, *stored(name)]):
            (corpus / f"seed-{number:04}").write_bytes(seed)
        began = time.monotonic()
        log = _libfuzzer(
            name,
            count,
            f"-runs={inputs}",
            f"-max_total_time={seconds}",
            f"-max_len={longest}",
            f"-timeout={SLOW_S}",
            f"-rss_limit_mb={RESIDENT_MB}",
            f"-artifact_prefix={FAULTS / name}/",
            "-print_final_stats=1",
            "-reload=0",
            str(corpus),
        )
        took = time.monotonic() - began
        ran, accepted = (int(part) for part in count.read_text().split()) if count.exists() else (0, 0)
        done = re.findall(r"stat::number_of_executed_units: +([0-9]+)", log) or re.findall(r"Done ([0-9]+) runs", log)
        edges = re.findall(r"cov: ([0-9]+)", log)
        if keep:
            _keep(name, corpus)
    found = [path.name for path in faults(name) if path.name not in known]
    if not found and not done:
        print(log[-3000:], file=sys.stderr)
        raise SystemExit(f"the fuzzer of {name} did not come to an end: see above")
    if not any((FAULTS / name).iterdir()):
        (FAULTS / name).rmdir()
    executed = int(done[-1]) if done else ran
    return {
        "target": name,
        "inputs": executed,
        "seconds": round(took, 1),
        "per_second": round(executed / took, 1),
        "accepted": accepted,
        "edges": int(edges[-1]) if edges else 0,
        "faults": found,
    }


def _libfuzzer(name: str, count: Path, *options: str) -> str:
    command = [sys.executable, str(Path(__file__)), INSIDE, name, *options]
    environment = {**os.environ, "FUZZ_COUNT": str(count)}
    # libFuzzer stops by itself at its time; the margin is for a process that it cannot stop.
    done = subprocess.run(command, capture_output=True, env=environment, check=False, timeout=HUNG_S)
    return done.stderr.decode("utf-8", "replace") + done.stdout.decode("utf-8", "replace")


def _keep(name: str, corpus: Path) -> None:
    """Commit what libFuzzer kept, each input for what it alone reached: the shortest first, up to KEPT_BYTES."""
    kept: list[str] = []
    for data in sorted({path.read_bytes() for path in corpus.iterdir()}, key=lambda data: (len(data), data)):
        text = base64.b64encode(data).decode("ascii")
        if sum(map(len, kept)) + len(text) > KEPT_BYTES:
            break
        kept.append(text)
    SEEDS.mkdir(exist_ok=True)
    (SEEDS / f"{name}.json").write_text(json.dumps(kept, indent=0) + "\n", "ascii")


def _fuzz_here(name: str, options: list[str]) -> int:
    """Inside the process of one target."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    import tracemalloc

    import atheris

    sys.path.insert(0, str(HERE))
    with atheris.instrument_imports(
        include=["paris_swarm.dht_schemas", "paris_swarm.swarm.wire", "paris_swarm.router.lock"]
    ):
        from fuzz_targets import TARGETS

    run = TARGETS[name].run
    count = Path(os.environ["FUZZ_COUNT"])
    ran = accepted = 0

    def one(data: bytes) -> None:
        nonlocal ran, accepted
        ran += 1
        sampled = ran % _SAMPLE == 0
        if sampled:
            tracemalloc.start()
        accepted += run(data)
        if sampled:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak <= memory_limit(len(data)), f"{peak} bytes of memory for {len(data)} of input"
        if ran % 1000 == 0:
            count.write_text(f"{ran} {accepted}")

    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()
    return 0


def memory_limit(length: int) -> int:
    """Bytes of memory that an input of ``length`` bytes may cost at any moment."""
    return 256 * 1024 + 64 * length


if __name__ == "__main__":
    sys.exit(main())
