"""The whole path with latents and CLIP captions: prepare, plan, train, assemble, draw; the same through diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from PIL import Image
from router_world import ASSEMBLER, CHECKPOINT_FILES, ORGANISER, PEERS
from safetensors.torch import load_file, save_file
from tests.cli.own_pictures import draw_folder
from tests.expert_data.tiny_encoders import tiny_clip, tiny_dinov2, tiny_vae

from paris_swarm.cli.app import run
from paris_swarm.cli.encoders import chosen_encoders, folder_encoders
from paris_swarm.cli.plan_folder import PlanFolder, open_plan_folder
from paris_swarm.cli.planning import PlanOptions, write_plan
from paris_swarm.cli.tasks import build_task, check_data
from paris_swarm.cli.text import encode_prompts
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.expert.data.prepare import prepare
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.data.weights_folder import EncoderError
from paris_swarm.expert.training import CheckpointReport, TrainJob, train
from paris_swarm.router.diffusers_folder import load_pipeline
from paris_swarm.router.encoder_files import OtherEncoder
from paris_swarm.router.folder import open_folder
from paris_swarm.router.folder_errors import LockDisagrees
from paris_swarm.router.folder_writing import SlotSource, write_folder
from paris_swarm.router.verify import verify_folder

PROMPTS = ["a red disc", "a flag blue"]


def announced(plan: PlanFolder, slot: str, folder: Path) -> SlotSource:
    """A checkpoint as its trainer announces it, just below the bar: two steps teach nobody to draw."""
    manifest, data, root = build_manifest(folder, CHECKPOINT_FILES, slot, meta={"step": 2, "parent": None})
    said = Announcement(
        plan=plan.plan_id,
        slot=slot,
        author=PEERS[slot].peer_id,
        seq=1,
        step=2,
        parent=None,
        root=root,
        bytes=manifest.total_bytes,
        probe_loss=0.9 * plan.opened.plan.verification.bars[slot].assemblable,
    )
    return SlotSource(said.seal(PEERS[slot]), data, folder / "ema.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A swarm of two latent experts and a router: its encoders, data, plan and assembled folder."""
    torch.set_num_threads(1)
    room = tmp_path_factory.mktemp("latents")
    vae, clip, dinov2 = tiny_vae(room / "vae"), tiny_clip(room / "clip"), tiny_dinov2(room / "dinov2")
    chosen = chosen_encoders(str(clip), str(dinov2), str(vae), device="cpu", asked=None)
    encoders = {"text_encoder": chosen.text, "feature_encoder": chosen.features, "vae": chosen.vae}
    prepare(draw_folder(room / "pictures", good=64, bad=False), room / "data", resolution=24, **encoders)
    data = PreparedData.open(room / "data")
    options = PlanOptions(
        name="latents", clusters=2, seed=0, recipe="tiny", router_recipe="tiny", steps=2, router_steps=2, batch=4,
        lease_s=300, checkpoint_every_s=600, grace_s=1200, replicas=1, guidance=1.5, created=1_000,
    )  # fmt: skip
    (room / "home").mkdir()
    write_plan(data, room / "plan", ORGANISER, options, sealed_folder=lambda _plan: room / "home")
    plan = open_plan_folder(room / "plan")
    sources = []
    for slot in plan.opened.plan.slots:
        job = TrainJob(build_task(plan, data, slot), room / "work" / slot, device="cpu", precision="fp32")
        report = next(each for each in train(job) if isinstance(each, CheckpointReport))
        sources.append(announced(plan, slot, report.folder))
    made = SimpleNamespace(room=room, vae=vae, clip=clip, encoders=encoders, data=data, plan=plan, sources=sources)
    made.model = assembled(made, room / "model", str(clip), str(vae))
    return made


def assembled(made: SimpleNamespace, target: Path, text: str | None, vae: str | None) -> Path:
    text_files, vae_files, _ = folder_encoders(made.plan.opened, text, vae, with_text=text is not None)
    write_folder(
        target, identity=ASSEMBLER, plan=made.plan.opened, plan_folder=made.plan.path, slots=made.sources,
        created=5_000, text_encoder=text_files, vae=vae_files,
    )  # fmt: skip
    return target


def drawn(made: SimpleNamespace, model: Path, *, vae: str | None = None, text: str | None = None) -> np.ndarray:
    states, lengths = encode_prompts(made.plan.opened, PROMPTS, folder=model, place=text)
    return open_folder(model, vae=vae).sample(states, lengths, n=2, steps=3, seed=7, guidance=2.0).images


def test_what_is_learned_are_latents_and_what_is_drawn_are_pictures(made: SimpleNamespace) -> None:
    plan = made.plan.opened.plan
    assert plan.data["latents"] == made.data.manifest["latents"]
    model = plan.expert.recipe["model"]
    assert (model["channels"], model["resolution"], model["text_dim"], model["text_tokens"]) == (4, 12, 16, 12)
    images = drawn(made, made.model)
    assert (images.shape, images.dtype) == ((4, 24, 24, 3), np.uint8)
    assert len({image.tobytes() for image in images}) == 4


def test_the_verb_draws_it_too(made: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    words = ["sample", str(made.model), "--prompt", PROMPTS[0], "--steps", "2", "--scale", "1", "-o", str(out)]
    assert run([*words, "--home", str(tmp_path / "home"), "--device", "cpu"]) == 0
    with Image.open(out) as image:
        assert image.size[0] >= 24


def test_evaluate_judges_the_decoded_pictures_by_the_held_out_rows(made: SimpleNamespace, tmp_path: Path) -> None:
    plain = {name: encoder for name, encoder in made.encoders.items() if name != "vae"}
    prepare(made.room / "pictures", tmp_path / "pixels", resolution=24, **plain)
    out = tmp_path / "figures"
    words = ["evaluate", made.model, "--data", tmp_path / "pixels", "-o", out, "--features", made.room / "dinov2"]
    asked = ["--strategy", "top-1", "--seeds", 1, "--pictures", 6, "--steps", 2, "--device", "cpu"]
    assert run([str(word) for word in (*words, *asked, "--home", tmp_path / "home")]) == 0
    report = json.loads((out / "evaluation.json").read_text())
    assert (report["pictures"], report["held_out"], report["floor"]["cluster_accuracy"]) == (6, True, 1.0)
    kept = np.load(out / "pictures" / "top-1-seed-0.npy", allow_pickle=False)
    assert (kept.shape, kept.dtype) == ((6, 24, 24, 3), np.uint8)  # not the latents, 12 x 12 of 4 channels
    page = (out / "evaluation.md").read_text()
    assert "one seed of the noise: no interval" in page and "±" not in page
    other = ["evaluate", made.model, "--data", made.room / "data", "-o", out, "--features", made.room / "dinov2"]
    assert run([str(word) for word in (*other, "--home", tmp_path / "home")]) == 2  # latents: nothing to compare with


def test_the_folder_is_a_diffusers_model_with_its_vae_and_its_clip(made: SimpleNamespace) -> None:
    index = json.loads((made.model / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    AutoencoderKL.from_pretrained(made.model / "vae")
    CLIPTextModel.from_pretrained(made.model / "text_encoder")
    pipe = load_pipeline(made.model)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_images_per_prompt": 2, "num_inference_steps": 3, "seed": 7, "guidance_scale": 2.0}
    images = pipe(PROMPTS, output_type="np", **options).images
    assert np.abs(np.round(images * 255) - drawn(made, made.model)).max() <= 2
    assert pipe(PROMPTS, output_type="latent", **options).images.shape == (4, 4, 12, 12)
    assert pipe(PROMPTS, height=24, **options).images[0].size == (24, 24)
    with pytest.raises(ValueError, match="height must be 24"):
        pipe(PROMPTS, height=12, **options)


def test_without_a_vae_in_the_folder_one_may_be_brought(made: SimpleNamespace, tmp_path: Path) -> None:
    bare = assembled(made, tmp_path / "bare", None, None)
    with pytest.raises(EncoderError, match="give its folder with --vae"):
        drawn(made, bare, text=str(made.clip))
    with pytest.raises(EncoderError, match=r"give its folder with --text-encoder$"):
        drawn(made, bare)
    np.testing.assert_array_equal(drawn(made, bare, vae=str(made.vae), text=str(made.clip)), drawn(made, made.model))
    _, _, notes = folder_encoders(made.plan.opened, None, None, with_text=True)
    assert ["No text encoder" in notes[0], "No VAE" in notes[1]] == [True, True]
    assert notes[0].endswith("give its folder with --text-encoder-from")  # where --text-encoder is yes or no


def test_other_weights_are_told_apart_by_everybody(made: SimpleNamespace, tmp_path: Path) -> None:
    other_vae, other_clip = str(tiny_vae(tmp_path / "vae", seed=1)), str(tiny_clip(tmp_path / "clip", seed=1))
    facts = made.plan.opened.plan.data
    digest = facts["latents"]["digest"]
    with pytest.raises(OtherEncoder, match=f"VAE has digest {digest}, this one has"):
        drawn(made, made.model, vae=other_vae)
    with pytest.raises(OtherEncoder, match="text encoder has digest"):
        drawn(made, made.model, text=other_clip)
    with pytest.raises(OtherEncoder, match="VAE has digest"):
        folder_encoders(made.plan.opened, str(made.clip), other_vae, with_text=True)
    with pytest.raises(OtherEncoder, match="VAE has digest"):  # before any picture is read
        chosen_encoders(str(made.clip), str(made.room / "dinov2"), other_vae, device="cpu", asked=facts)
    with pytest.raises(ValueError, match=f"digest {digest}: give its folder with --vae"):
        chosen_encoders(str(made.clip), str(made.room / "dinov2"), None, device="cpu", asked=facts)
    other = chosen_encoders(str(made.clip), str(made.room / "dinov2"), other_vae, device="cpu", asked=None)
    encoders = {**made.encoders, "vae": other.vae}
    prepare(made.room / "pictures", tmp_path / "data", resolution=24, count=8, **encoders)
    with pytest.raises(ValueError, match=f"VAE digest {other.vae.digest}, the plan asks for {digest}"):
        check_data(made.plan, PreparedData.open(tmp_path / "data"))
    prepare(made.room / "pictures", tmp_path / "pixels", resolution=24, count=8, **{**encoders, "vae": None})
    with pytest.raises(ValueError, match="has resolution 24, the plan asks for 12"):
        check_data(made.plan, PreparedData.open(tmp_path / "pixels"))


def test_a_recipe_that_does_not_fit_the_pictures_is_said_with_those_that_do(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, vae, shape in (
        ("latents", made.encoders["vae"], "latents of 8 x 8 cells"),
        ("pixels", None, "pictures of 16 x 16 pixels"),
    ):
        encoders = {**made.encoders, "vae": vae}
        prepare(made.room / "pictures", tmp_path / name, resolution=16, count=8, **encoders)
        words = ["init", tmp_path / name, "-o", tmp_path / "plan", "-k", 2, "--home", tmp_path / "home"]
        assert run([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert f"--recipe tiny does not fit {shape}" in said and "6 x 6" in said
        assert "--recipe S/2, B/2 or XL/2" in said and "--resolution 12" in said
    assert not (tmp_path / "plan").exists()


def test_a_vae_swapped_after_signing_or_half_there_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    model = shutil.copytree(made.model, tmp_path / "model")
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    states, lengths = encode_prompts(made.plan.opened, PROMPTS, folder=model)
    with pytest.raises(Exception, match="vae/diffusion_pytorch_model"):
        open_folder(model)
    from tests.router.test_diffusers_folder import relock

    relock(model)  # a dishonest assembler signs what he likes
    with pytest.raises(OtherEncoder, match="VAE has digest"):
        open_folder(model).sample(states, lengths, steps=1)
    with pytest.raises(OtherEncoder, match="VAE has digest"):
        load_pipeline(model)
    relock(model, "vae/config.json")
    with pytest.raises(LockDisagrees, match=r"vae/config\.json"):
        verify_folder(model)


def test_a_text_encoder_that_a_dishonest_assembler_swapped_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    from tests.router.test_diffusers_folder import relock

    model = shutil.copytree(made.model, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    for name, odd in (("text_encoder", "AutoModel"), ("tokenizer", "AutoTokenizer")):
        (model / "model_index.json").write_text(json.dumps({**index, name: ["transformers", odd]}))
        relock(model)
        with pytest.raises(LockDisagrees, match=name):
            load_pipeline(model)
    (model / "model_index.json").write_text(json.dumps(index))
    weights = model / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, (name := sorted(tensors)[0]): tensors[name] + 1}, weights, metadata={"format": "pt"})
    relock(model)
    with pytest.raises(OtherEncoder, match="text encoder has digest"):
        encode_prompts(made.plan.opened, PROMPTS, folder=model)
    with pytest.raises(OtherEncoder, match="text encoder has digest"):
        load_pipeline(model)
