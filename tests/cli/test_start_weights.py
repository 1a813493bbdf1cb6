"""Experts that start from a DiT: `init --start-from`, and peers and auditors who must have the very same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from swarm_processes import VerbProcesses, done, verb

from paris_swarm.cli import planning
from paris_swarm.cli.plan_folder import PlanFolder, open_plan_folder
from paris_swarm.cli.tasks import build_task, check_starts, expert_recipe
from paris_swarm.expert.audit import write_start
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.pretrained import StartRefused
from paris_swarm.expert.training import CheckpointReport, TrainJob, train

HIDDEN, DEPTH, PATCH = 32, 2, 6
SHAPE = f"all:hidden={HIDDEN},heads=2,depth={DEPTH},patch={PATCH},optimizer=adamw,lr=1e-4"


def dit(folder: Path, layout: str, seed: int = 0) -> Path:
    """A random DiT for 12 pixels in one of the two layouts: a file, or a folder as diffusers writes it."""
    draw = torch.Generator().manual_seed(seed)

    def part(name: str, *shape: int) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": torch.randn(shape, generator=draw) * 0.05,
            f"{name}.bias": torch.randn(shape[0], generator=draw) * 0.05,
        }

    d, original = HIDDEN, layout == "original"
    tensors = part("x_embedder.proj" if original else "pos_embed.proj", d, 3, PATCH, PATCH)
    for k in range(DEPTH):
        block = f"blocks.{k}." if original else f"transformer_blocks.{k}."
        time = "t_embedder.mlp." if original else f"{block}norm1.emb.timestep_embedder.linear_"
        for number, width in ((0, 256), (2, d)):
            tensors |= part(f"{time}{number if original else 1 + number // 2}", d, width)
        if original:
            tensors |= part(f"{block}attn.qkv", 3 * d, d)
        else:
            for third in "qkv":
                tensors |= part(f"{block}attn1.to_{third}", d, d)
        names = ("attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        theirs = ("attn1.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear")
        shapes = ((d, d), (4 * d, d), (d, 4 * d), (6 * d, d))
        for name, shape in zip(names if original else theirs, shapes, strict=True):
            tensors |= part(f"{block}{name}", *shape)
    if original:
        tensors["pos_embed"] = torch.randn(1, 4, d, generator=draw)
    path = folder / ("DiT-tiny.safetensors" if original else "transformer/diffusion_pytorch_model.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path if original else folder


def started(home: Path, data: Path, out: Path, start: Path, *more: object) -> dict[str, Any]:
    answer = verb(
        "--home", home, "init", data, "-o", out, "-k", 2, "--steps", 2, "--router-steps", 2, "--batch", 4,
        "--slot", SHAPE, "--start-from", start, *more, "--json",
    )  # fmt: skip
    return done(answer).json


def first_weights(folder: PlanFolder, data: Path, slot: str) -> dict[str, torch.Tensor]:
    model = build_task(folder, PreparedData.open(data), slot).build_model()
    build_task(folder, PreparedData.open(data), slot).begin(model)
    return model.state_dict()


def test_small_weights_travel_with_the_plan_and_training_starts_from_them(data: Path, tmp_path: Path) -> None:
    start = dit(tmp_path / "dit", "original")
    answer = started(tmp_path / "home", data, tmp_path / "plan", start, "--slot", "1:start=none")
    assert answer["start_weights_to_bring"] == []
    folder = open_plan_folder(tmp_path / "plan")
    plan = folder.opened.plan
    named = expert_recipe(plan, "0").start
    assert named is not None and named.name == "DiT-tiny.safetensors"
    assert expert_recipe(plan, "1").start is None
    assert [name for name in (entry.name for entry in plan.files) if name.startswith("start-")]
    begun, fresh = first_weights(folder, data, "0"), first_weights(folder, data, "1")
    theirs = load_file(start)
    assert torch.equal(begun["layers.0.mlp.0.weight"], theirs["blocks.0.mlp.fc1.weight"])
    assert torch.equal(begun["pos_embed"], theirs["pos_embed"])
    assert not torch.equal(fresh["layers.0.mlp.0.weight"], theirs["blocks.0.mlp.fc1.weight"])

    job = TrainJob(build_task(folder, PreparedData.open(data), "0"), tmp_path / "work", device="cpu", precision="fp32")
    report = [found for found in train(job) if isinstance(found, CheckpointReport)][-1]
    trained = load_file(report.folder / "model.safetensors")
    assert (trained["layers.0.mlp.0.weight"] - theirs["blocks.0.mlp.fc1.weight"]).abs().max() < 1e-3, "two small steps"
    write_start(tmp_path / "start", build_task(folder, PreparedData.open(data), "0"), 0, None)
    for name in ("model.safetensors", "ema.safetensors"):
        assert torch.equal(load_file(tmp_path / "start" / name)["pos_embed"], theirs["pos_embed"]), "an audit's start"
    assert done(verb("verify", tmp_path / "plan", "--probe", "--data", data, "--json")).json["ok"] is True


def test_large_weights_are_brought_by_every_peer_and_other_bytes_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "START_IN_PLAN", 1000)
    start = dit(tmp_path / "dit", "diffusers")
    answer = started(tmp_path / "home", data, tmp_path / "plan", start)
    assert answer["start_weights_to_bring"] == ["diffusion_pytorch_model.safetensors"]
    folder = open_plan_folder(tmp_path / "plan")
    with pytest.raises(StartRefused, match="give that file with --start-from"):
        check_starts(folder, ["0", "1"])
    file = start / "transformer" / "diffusion_pytorch_model.safetensors"
    renamed = shutil.copyfile(file, tmp_path / "another-name.safetensors")
    other = dit(tmp_path / "other", "diffusers", seed=1) / "transformer" / "diffusion_pytorch_model.safetensors"
    for path in (file, renamed):
        check_starts(PlanFolder(folder.path, folder.opened, (path,)), ["0", "1"])
    with pytest.raises(StartRefused, match="its digest is"):
        check_starts(PlanFolder(folder.path, folder.opened, (other,)), ["0"])

    job = TrainJob(build_task(folder, PreparedData.open(data), "0"), tmp_path / "work", device="cpu", precision="fp32")
    with pytest.raises(StartRefused, match="--start-from"):
        list(train(job))
    brought = PlanFolder(folder.path, folder.opened, (file,))
    first = TrainJob(
        build_task(brought, PreparedData.open(data), "0"), tmp_path / "first", device="cpu", precision="fp32", until=1
    )
    checkpoint = next(found for found in train(first) if isinstance(found, CheckpointReport))
    successor = TrainJob(
        build_task(folder, PreparedData.open(data), "0"),
        tmp_path / "successor",
        device="cpu",
        precision="fp32",
        resume=checkpoint.folder,
    )
    assert any(isinstance(found, CheckpointReport) for found in train(successor)), "who continues needs no start"

    said = done(verb("verify", tmp_path / "plan", "--probe", "--data", data)).said
    assert "the resumable bars of slot 0, 1 were not checked" in said
    report = done(verb("verify", tmp_path / "plan", "--probe", "--data", data, "--start-from", file, "--json")).json
    assert {bar["bar"] for bar in report["baselines"]["bars"] if bar["slot"] == "0"} >= {"resumable"}
    refused = verb("verify", tmp_path / "plan", "--probe", "--start-from", other)
    assert refused.code == 2 and "its digest is" in refused.err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--slot", "1:depth=3"], "2 blocks, the recipe 3"),
        (["--slot", "1:hidden=48"], "has shape"),
        (["--slot", "0:start=nowhere.safetensors"], "no .safetensors file"),
    ],
)
def test_a_start_that_does_not_fit_its_slot_is_refused_at_init(
    data: Path, tmp_path: Path, more: list[str], words: str
) -> None:
    start = dit(tmp_path / "dit", "original")
    answer = verb(
        "--home", tmp_path / "home", "init", data, "-o", tmp_path / "plan", "-k", 2, "--slot", SHAPE,
        "--start-from", start, *more,
    )  # fmt: skip
    assert answer.code == 2 and words in answer.said
    assert not (tmp_path / "plan").exists()


@pytest.mark.slow
def test_a_swarm_of_two_kinds_with_brought_weights_from_bootstrap_to_a_picture(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "START_IN_PLAN", 1000)
    start = dit(tmp_path / "dit", "diffusers") / "transformer" / "diffusion_pytorch_model.safetensors"
    noise = "1:start=none,objective=noise,optimizer=muon,lr=3e-3,hidden=48,depth=1,steps=200"
    kinds = ["--slot", "all:lr=3e-3,steps=200,precision=fp32", "--slot", noise, "--router-steps", 60, "--grace", 600]
    started(tmp_path / "home", data, tmp_path / "plan", start, *kinds)
    at = tmp_path / "peers"
    common = ["--data", data, "--threads", 1, "--device", "cpu", "--exit-when-done"]
    with VerbProcesses(tmp_path / "logs") as processes:
        seed = processes.start("seed", "--home", at / "seed", "bootstrap", tmp_path / "plan")
        invite = seed.wait_for(lambda line: line.get("event") == "ready")["invite"]
        lacking = processes.start("lacking", "--home", at / "x", "join", invite, "--claim-cluster", "0", *common)
        assert lacking.wait(limit_s=120) == 2
        assert "give that file with --start-from" in " ".join(lacking.log.read_text().split())
        keeper = processes.start(
            "alice", "--home", at / "a", "join", invite, "--claim-cluster", "0", "--claim-router", *common[:-1],
            "--start-from", start,
        )  # fmt: skip
        other = processes.start("bob", "--home", at / "b", "join", invite, "--claim-cluster", "1", *common[:-1])
        for peer in (keeper, other):
            peer.wait_for(
                lambda line: bool(line.get("lanes")) and all(lane["phase"] == "finished" for lane in line["lanes"]),
                limit_s=400,
            )
        done(verb("--home", at / "c", "assemble", invite, "-o", tmp_path / "model", "--no-text-encoder", "--json"))
        audit = ["audit", "0", invite, "--data", data, "--home", at / "c"]
        assert verb(*audit).code == 2, "the first checkpoint is audited from the start weights"
        assert done(verb(*audit, "--start-from", start, "--json")).json["verdict"] == "identical"
    assert done(verb("verify", tmp_path / "model", "--probe", "--json")).json["ok"] is True
    done(verb("sample", tmp_path / "model", "--prompt", "a flag, red above blue", "--steps", 4,
              "--strategy", "full", "-o", tmp_path / "grid.png"))  # fmt: skip
