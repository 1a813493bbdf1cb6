"""The provenance of sampled pictures as JSON, for scripts: what the PNG's text chunks say, and each picture alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paris_swarm.dht_schemas.digest import digest_file
from paris_swarm.router.draw import Pictures
from paris_swarm.router.png import Origin

VERSION = 1


def sidecar_path(png: Path) -> Path:
    """`grid.png` -> `grid.png.json`, beside it."""
    return png.with_name(f"{png.name}.json")


def sidecar(png: Path, pictures: Pictures, origin: Origin) -> dict[str, Any]:
    """Plain JSON values about the pictures of the grid in `png`, which is there already: its digest is named.

    pictures: n of each of `origin`'s prompts, in that order, as `draw` gives them. Picture i starts from noise of
    (seed, i); `shares` is each expert's mean weight over its steps, `redirected` the probability that belonged to
    missing experts.

    Raises:
        ValueError: the pictures are not the same number of each prompt. OSError: `png` cannot be read.
    """
    prompts = origin.prompts
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
        "seed": origin.seed,
        "strategy": origin.strategy,
        "sampler": origin.sampler,
        "steps": origin.steps,
        "guidance": origin.guidance,
        "precision": origin.precision,
        "plan": origin.plan_id,
        "assembly": origin.assembly,
        "missing": list(origin.missing),
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
