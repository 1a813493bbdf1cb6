"""The provenance of sampled pictures as JSON, for scripts: what the PNG's text chunks say, and each picture alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paris_swarm.dht_schemas.digest import digest_file
from paris_swarm.router.draw import Pictures

VERSION = 1


def sidecar_path(png: Path) -> Path:
    """`grid.png` -> `grid.png.json`, beside it."""
    return png.with_name(f"{png.name}.json")


def sidecar(
    png: Path,
    pictures: Pictures,
    *,
    prompts: Sequence[str],
    seed: int,
    strategy: str,
    sampler: str,
    steps: int,
    guidance: float,
    plan_id: str,
    assembly: str,
    missing: Sequence[str] = (),
    precision: str = "fp32",
) -> dict[str, Any]:
    """Plain JSON values about the pictures of the grid in `png`, which is there already: its digest is named.

    pictures: n of each of P prompts, in that order, as `draw` gives them. Picture i starts from noise of (seed, i);
    `shares` is each expert's mean weight over its steps, `redirected` the probability that belonged to missing experts.

    Raises:
        ValueError: the pictures are not the same number of each prompt. OSError: `png` cannot be read.
    """
    count = len(pictures.images)
    if not prompts or count % len(prompts):
        raise ValueError(f"{count} pictures cannot be the same number of each of {len(prompts)} prompts")
    each = count // len(prompts)
    shares = pictures.shares.astype(float)
    return {
        "version": VERSION,
        "png": png.name,
        "blake3": digest_file(png),
        "prompts": list(prompts),
        "seed": seed,
        "strategy": strategy,
        "sampler": sampler,
        "steps": steps,
        "guidance": guidance,
        "precision": precision,
        "plan": plan_id,
        "assembly": assembly,
        "missing": list(missing),
        "pictures": [
            {
                "index": index,
                "prompt": prompts[index // each],
                "shares": {str(k): round(share, 6) for k, share in enumerate(shares[index].tolist())},
                "redirected": round(float(pictures.redirected[index]), 6),
            }
            for index in range(count)
        ],
        "software": "paris-swarm",
    }
