"""Draw from an assembled folder as a library, without the command line.

.venv/bin/python examples/draw.py demo-out/model "A green background with a blue planet." out.png
"""

from __future__ import annotations

import sys

from paris_swarm.expert.data.encoders import MiniLMTextEncoder
from paris_swarm.router.folder import open_folder
from paris_swarm.router.png import write_grid


def main(folder: str, prompt: str, png: str) -> None:
    """Four pictures of one prompt; nothing is loaded that does not verify."""
    model = open_folder(folder)  # every digest and signature is checked here
    states, lengths = MiniLMTextEncoder().encode([prompt])
    pictures = model.sample(states, lengths, n=4, strategy="top-2", guidance=1.5, steps=30, seed=7)
    write_grid(png, pictures.images, columns=2, scale=6, text={"prompt": prompt, "assembly": model.digest})
    for expert, share in enumerate(pictures.shares.mean(axis=0)):
        print(f"expert {expert}: {share:.0%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
