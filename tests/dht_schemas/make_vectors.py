"""Makes the test vectors of SPEC.md, the same bytes each time.

python tests/dht_schemas/make_vectors.py           write tests/dht_schemas/vectors/*.json
python tests/dht_schemas/make_vectors.py --check   compare them with what is there, byte for byte; 1 if they differ
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vector_frames import dht, greetings, invites, notices, sequences, values, wire_frames
from vector_records import admission, envelopes, headers, json_texts, keys, locks, manifests, plans, records

VECTORS = Path(__file__).parent / "vectors"

KINDS = {
    "keys": keys,
    "json": json_texts,
    "envelopes": envelopes,
    "plans": plans,
    "records": records,
    "admission": admission,
    "manifests": manifests,
    "headers": headers,
    "dht": dht,
    "sequences": sequences,
    "values": values,
    "invites": invites,
    "notices": notices,
    "greetings": greetings,
    "wire": wire_frames,
    "locks": locks,
}


def build() -> dict[str, bytes]:
    """File name -> bytes."""
    return {
        f"{name}.json": (json.dumps(make(), indent=1, ensure_ascii=True) + "\n").encode("ascii")
        for name, make in KINDS.items()
    }


def main() -> int:
    made = build()
    if sys.argv[1:] == ["--check"]:
        there = {path.name: path.read_bytes() for path in VECTORS.glob("*.json")}
        wrong = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
        for name in wrong:
            print(f"{VECTORS / name} is not what the code makes: run {Path(__file__).name} and look at the difference")
        return 1 if wrong else 0
    if sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        return 2
    VECTORS.mkdir(exist_ok=True)
    for name, data in made.items():
        (VECTORS / name).write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
