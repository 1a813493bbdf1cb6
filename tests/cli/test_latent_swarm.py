"""A swarm of latent experts as people run it: every verb, real processes, tiny random encoders in local folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from swarm_processes import VerbProcesses, done, nothing_left_to_train, verb
from tests.expert_data.tiny_encoders import centred_vae, tiny_clip, tiny_dinov2

from paris_swarm.expert.data.pictures import decode

pytestmark = pytest.mark.slow
STEPS = ("-k", 2, "--steps", 80, "--router-steps", 80, "--batch", 8)


def test_from_pictures_in_parts_to_a_picture_through_the_vae(own_folder: Path, tmp_path: Path) -> None:
    # In folders, as without internet.
    seen = np.stack([decode(path, 24) for path in sorted(own_folder.glob("picture-*.png"))])
    vae, clip, dinov2 = centred_vae(tmp_path / "v", seen), tiny_clip(tmp_path / "c"), tiny_dinov2(tmp_path / "d")
    encoders = ["--vae", vae, "--text-encoder", clip, "--feature-encoder", dinov2, "--device", "cpu", "--workers", 1]
    for part in ("2/2", "1/2"):
        done(verb("prepare", own_folder, tmp_path / "parts", "--part", part, "--resolution", 24, *encoders))
    joined = done(verb("prepare", tmp_path / "parts", tmp_path / "data", "--merge", "--json")).json
    assert (joined["count"], joined["resolution"], joined["skipped_count"]) == (120, 12, 4)
    plan = done(
        verb("--home", tmp_path / "organiser", "init", tmp_path / "data", "-o", tmp_path / "plan", *STEPS, "--json")
    ).json
    assert verb("prepare", own_folder, tmp_path / "no", "--plan", tmp_path / "plan", "--cluster", 0).code == 2
    with VerbProcesses(tmp_path / "logs") as processes:
        seed = processes.start("bootstrap", "--home", tmp_path / "bootstrap", "bootstrap", tmp_path / "plan")
        invite = seed.wait_for(lambda line: line.get("event") == "ready")["invite"]
        words = ["join", "--claim-cluster", invite, "--data", tmp_path / "data", "--threads", 1, "--device", "cpu"]
        peers = [
            processes.start("alice", "--home", tmp_path / "alice", *words, "--claim-router"),
            processes.start("bob", "--home", tmp_path / "bob", *words),
        ]
        for peer in peers:
            peer.wait_for(nothing_left_to_train, limit_s=240)
        artist = ["--home", tmp_path / "artist"]
        where = ["--vae", vae, "--text-encoder-from", clip]
        model = done(verb(*artist, "assemble", invite, "-o", tmp_path / "model", *where, "--json")).json
        assert (model["plan"], model["missing"]) == (plan["plan"], [])
    out = tmp_path / "out.png"
    done(verb("sample", tmp_path / "model", "--prompt", "a red disc", "--steps", 4, "--scale", 1, "-o", out))
    with Image.open(out) as image:
        assert min(image.size) >= 24
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert done(verb("verify", tmp_path / "model", "--probe", "--json")).code == 0
