"""Noto emoji as an ImageFolder: a second, harder data set for `prepare` and for the reproduction.

npm pack @iconify-json/noto@1.2.9                                  # 3 MB, Apache-2.0; any version will do
.venv/bin/python examples/emoji.py iconify-json-noto-1.2.9.tgz emoji
paris-swarm prepare emoji emoji-data --resolution 24
.venv/bin/python benchmarks/reproduce.py OUT --scale small --data emoji-data

A picture's caption is its Unicode name, its class one of nine Unicode groups. Any icon set of Iconify's form will do
(@iconify-json/twemoji, @iconify-json/fluent-emoji-flat): look at its licence first, which goes into LICENCE.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SKIN = re.compile(r"-(light|medium-light|medium|medium-dark|dark)-skin-tone")


def icons(package: Path) -> tuple[dict[str, Any], dict[str, list[str]], dict[str, Any]]:
    """What an Iconify package holds: its icons, names by group, and what it says of itself. Nothing is unpacked."""
    with tarfile.open(package) as archive:
        held = []
        for name in ("icons", "metadata", "info"):
            stream = archive.extractfile(f"package/{name}.json")
            if stream is None:
                raise SystemExit(f"{package} is no Iconify package: it has no {name}.json")
            held.append(json.load(stream))
    return held[0], held[1]["categories"], held[2]


def chosen(categories: Mapping[str, list[str]], skin_tones: bool, seed: int) -> list[tuple[str, str]]:
    """(name, group) of the pictures to draw, shuffled, so that the last ones are a fair sample of all."""
    named = {name: group for group, names in sorted(categories.items()) for name in names}
    kept = [(name, group) for name, group in sorted(named.items()) if skin_tones or not SKIN.search(name)]
    random.Random(seed).shuffle(kept)
    return kept


def svgs(drawn: Mapping[str, Any], names: list[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """(name, group, SVG on white) of every icon that is there."""
    for name, group in names:
        parent = drawn.get("aliases", {}).get(name, {}).get("parent", name)
        icon = drawn["icons"].get(parent)
        if icon is None:
            continue
        width, height = (int(icon.get(side, drawn.get(side, 16))) for side in ("width", "height"))
        yield (
            name,
            group,
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}"><rect width="{width}" height="{height}" fill="#fff"/>{icon["body"]}</svg>',
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="what `npm pack @iconify-json/noto` wrote")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--side", type=int, default=64, help="pixels (default: 64)")
    parser.add_argument("--skin-tones", action="store_true", help="keep the five variants of every person and hand")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    arguments = parser.parse_args()
    import resvg_py

    drawn, categories, info = icons(arguments.package)
    arguments.out.mkdir(parents=True)
    with open(arguments.out / "metadata.jsonl", "w") as lines:
        names = chosen(categories, arguments.skin_tones, arguments.seed)
        for number, (name, group, svg) in enumerate(svgs(drawn, names)):
            file = f"{number:05d}.png"
            png = resvg_py.svg_to_bytes(
                svg_string=svg, width=arguments.side, height=arguments.side, skip_system_fonts=True
            )
            (arguments.out / file).write_bytes(bytes(png))
            text = f"an emoji of {name.replace('-', ' ')}"
            lines.write(json.dumps({"file_name": file, "text": text, "class": group}) + "\n")
    (arguments.out / "LICENCE.json").write_text(json.dumps(info, indent=1) + "\n")
    print(f"{number + 1} pictures in {arguments.out}; licence: {info.get('license', {}).get('title', 'not stated')}")


if __name__ == "__main__":
    main()
