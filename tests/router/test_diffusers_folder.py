"""The assembled folder is a diffusers model: drawn from in a process that has never heard of paris_swarm."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from router_world import ASSEMBLER, DIM, K, World, make_world
from safetensors.torch import load_file, save_file

from paris_swarm.expert.memory import TooLarge
from paris_swarm.expert.recipe import ModelConfig, plain_record
from paris_swarm.router.bundle import CannotBundle, bundle
from paris_swarm.router.diffusers_folder import (
    TextEncoderFiles,
    code_here,
    components_source,
    load_pipeline,
    pipeline_source,
)
from paris_swarm.router.folder import open_folder
from paris_swarm.router.folder_errors import ChangedFile, LockDisagrees
from paris_swarm.router.folder_writing import write_folder
from paris_swarm.router.layout import COMPONENTS_FILE, MODEL_INDEX, PIPELINE_FILE, TEXT_WEIGHTS, weights_path
from paris_swarm.router.lock import LockedFile, open_lock, seal_lock
from paris_swarm.router.pipeline_code.components import DDMExperts, DDMRouter, WeightsRefused
from paris_swarm.router.pipeline_code.plain_blake3 import plain_blake3_hex
from paris_swarm.router.recipe import RouterConfig
from paris_swarm.router.verify import verify_folder

torch.set_num_threads(1)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "blue", "a", "flag"]
PROMPTS = ["a red flag", "blue"]


def tiny_text_encoder(folder: Path) -> TextEncoderFiles:
    """A random BERT of the made world's width, and a tokenizer of nine words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": DIM,
        "intermediate_size": 2 * DIM,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 16,
        "pad_token_id": 0,
    }
    torch.manual_seed(4)
    model = BertModel(BertConfig(**config)).eval()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return TextEncoderFiles(
        config, folder / "model.safetensors", folder / "tokenizer.json", max_tokens=8, special_tokens=special
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TextEncoderFiles:
    return tiny_text_encoder(tmp_path_factory.mktemp("text") / "bert")


def assemble(world: World, target: Path, text: TextEncoderFiles | None, without: tuple[str, ...] = ()) -> Path:
    slots = [source for slot, source in world.sources.items() if slot not in without]
    write_folder(
        target,
        identity=ASSEMBLER,
        plan=world.plan,
        plan_folder=world.plan_folder,
        slots=slots,
        created=5_000,
        text_encoder=text,
    )
    return target


@pytest.fixture(scope="module")
def whole(world, text, tmp_path_factory) -> Path:
    return assemble(world, tmp_path_factory.mktemp("whole") / "model", text)


@pytest.fixture(scope="module")
def partial(world, text, tmp_path_factory) -> Path:
    """A folder without expert 1."""
    return assemble(world, tmp_path_factory.mktemp("partial") / "model", text, without=("1",))


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


# ---------------------------------------------------------------------------------------------------------------------
# a process without paris_swarm
# ---------------------------------------------------------------------------------------------------------------------

ELSEWHERE = """
import json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"paris_swarm", "blake3", "hivemind", "pydantic"}:
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, Block())
import numpy as np
import torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
whole, partial, out, prompts = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])

try:
    DiffusionPipeline.from_pretrained(whole)
    untrusted = "loaded"
except ValueError as error:
    untrusted = str(error)

pipe = DiffusionPipeline.from_pretrained(whole, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
say = dict(num_inference_steps=4, seed=7, guidance_scale=2.0, output_type="np", num_images_per_prompt=2)
arrays = {}
for strategy in ("top-1", "top-2", "sample"):
    arrays[strategy] = pipe(prompts, strategy=strategy, **say).images
for sampler in ("euler", "heun", "dpm++"):
    arrays[sampler] = pipe(prompts, sampler=sampler, **say).images
arrays["negative"] = pipe(prompts, negative_prompt="a green flag", **say).images
plain = pipe(prompts[0], num_inference_steps=4, seed=7, guidance_scale=2.0)
plain.images[0].save(out + "/picture.png")
pipe.save_pretrained(out + "/saved")
again = DiffusionPipeline.from_pretrained(out + "/saved", trust_remote_code=True)
again.set_progress_bar_config(disable=True)
arrays["saved"] = again(prompts, **say).images

short = DiffusionPipeline.from_pretrained(partial, trust_remote_code=True, torch_dtype=torch.bfloat16)
short.set_progress_bar_config(disable=True)
low = short(prompts, strategy="full", **say)
arrays["bf16"] = low.images
short.experts.float(), short.router.float(), short.text_encoder.float()
high = short(prompts, strategy="full", **say)
arrays["fp32 of bf16"] = high.images
np.savez(out + "/arrays.npz", **arrays)
with open(out + "/said.json", "w") as file:
    json.dump({"untrusted": untrusted, "info": plain.info, "short": low.info, "weights": low.weights.tolist(),
        "modules": sorted(name for name in sys.modules if name.startswith("paris_swarm"))}, file)
"""


@pytest.fixture(scope="module")
def elsewhere(whole, partial, tmp_path_factory) -> tuple[dict[str, np.ndarray], dict, Path]:
    """What a fresh process drew: arrays uint8 [N, H, W, C] by name, what it said, and the folder it wrote into."""
    out = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(whole), str(partial), str(out), json.dumps(PROMPTS)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=out,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(out / "modules"), "HF_HOME": str(out / "hf")},
    )
    assert done.returncode == 0, done.stderr
    with np.load(out / "arrays.npz", allow_pickle=False) as arrays:
        images = {name: np.round(arrays[name] * 255).astype(np.uint8) for name in arrays}
    return images, json.loads((out / "said.json").read_text()), out


def drawn_here(folder: Path, text: TextEncoderFiles, **changes) -> np.ndarray:
    """What `paris-swarm sample` draws from the same prompts, encoded by the same encoder: uint8 [4, H, W, C]."""
    states, lengths = encoded(text, PROMPTS)
    asked = {"n": 2, "steps": 4, "seed": 7, "guidance": 2.0, **changes}
    return open_folder(folder, allow_missing=True).sample(states, lengths, **asked).images


def encoded(text: TextEncoderFiles, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**text.config)).eval()
    model.load_state_dict(load_file(text.weights))
    rows = [encoding.ids for encoding in Tokenizer.from_file(str(text.tokenizer)).encode_batch(prompts)]
    states = np.zeros((len(rows), max(map(len, rows)), DIM), dtype=np.float16)
    for place, row in enumerate(rows):  # one by one: nothing is padded
        with torch.inference_mode():
            states[place, : len(row)] = model(torch.tensor([row])).last_hidden_state[0].half().numpy()
    return states, np.array([len(row) for row in rows], dtype=np.int16)


@pytest.mark.parametrize("strategy", ["top-1", "top-2", "sample"])
def test_it_draws_what_sample_draws(elsewhere, whole, text, strategy):
    ours = drawn_here(whole, text, strategy=strategy)
    assert np.abs(elsewhere[0][strategy].astype(int) - ours).max() <= 1
    assert len({image.tobytes() for image in ours}) == 4


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++"])
def test_every_sampler_is_the_same_too(elsewhere, whole, text, sampler):
    assert np.abs(elsewhere[0][sampler].astype(int) - drawn_here(whole, text, sampler=sampler)).max() <= 1


def test_a_negative_prompt_longer_than_the_prompts_takes_the_place_of_the_null_caption(elsewhere):
    assert (elsewhere[0]["negative"] != elsewhere[0]["top-1"]).any(axis=(1, 2, 3)).all()


def test_code_in_a_folder_runs_only_when_trusted(elsewhere):
    assert "trust_remote_code=True" in elsewhere[1]["untrusted"]


def test_nothing_of_this_package_was_imported(elsewhere):
    assert elsewhere[1]["modules"] == []


def test_a_saved_pipeline_loads_again(elsewhere):
    assert np.abs(elsewhere[0]["saved"].astype(int) - elsewhere[0]["top-1"]).max() <= 1


def test_the_png_says_where_it_comes_from(elsewhere, world, whole):
    with Image.open(elsewhere[2] / "picture.png") as image:
        image.load()
        chunks = dict(image.text)
    assert chunks == elsewhere[1]["info"][0]
    assert chunks["prompt"] == PROMPTS[0]
    assert (chunks["seed"], chunks["strategy"], chunks["steps"], chunks["guidance"]) == ("7", "top-1", "4", "2")
    assert chunks["plan"] == world.plan.plan_id
    assert chunks["assembly"] == verify_folder(whole).digest
    assert "missing" not in chunks


def test_missing_experts_are_said_on_every_picture(elsewhere):
    said = elsewhere[1]["short"]
    assert [text["missing"] for text in said] == ["1"] * 4
    assert all(0 < float(text["redirected"]) < 1 for text in said)
    weights = np.array(elsewhere[1]["weights"])  # [N, steps, K]
    assert (weights[:, :, 1] == 0).all()
    np.testing.assert_allclose(weights.sum(axis=2), 1, atol=1e-5)


def test_bf16_draws_nearly_the_same(elsewhere, partial, text):
    low, high = (elsewhere[0][name].astype(int) for name in ("bf16", "fp32 of bf16"))
    assert (low != high).any()
    assert np.abs(low - high).mean() < 4
    ours = drawn_here(partial, text, strategy="full").astype(int)
    assert np.abs(low - ours).mean() < 4


# ---------------------------------------------------------------------------------------------------------------------
# with this package
# ---------------------------------------------------------------------------------------------------------------------


def test_our_own_loader_verifies_and_runs_no_code_of_the_folder(elsewhere, copied, text):
    pipe = load_pipeline(copied)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(PROMPTS, num_images_per_prompt=2, num_inference_steps=4, seed=7, guidance_scale=2.0, output_type="np")
    assert np.abs(np.round(drawn.images * 255) - elsewhere[0]["top-1"]).max() <= 1
    assert type(pipe).__module__ == "paris_swarm.router.pipeline_code.pipeline"
    (copied / PIPELINE_FILE).write_text("raise SystemExit('ran')\n")
    with pytest.raises(ChangedFile, match=PIPELINE_FILE):
        load_pipeline(copied)


def test_our_own_loader_takes_no_settings_that_the_assembler_made_up(world, tmp_path, monkeypatch):
    """They are his to sign, and diffusers would build what they say."""
    from paris_swarm.router import diffusers_folder

    endless = json.loads(diffusers_folder.scheduler_config()) | {"num_train_timesteps": 10**12}
    made_up = {
        "scheduler": ("scheduler_config", lambda: json.dumps(endless).encode()),
        "experts": ("experts_config", _with_guidance(diffusers_folder.experts_config)),
    }
    for part, (name, written) in made_up.items():
        with monkeypatch.context() as patch:
            patch.setattr(diffusers_folder, name, written)
            folder = assemble(world, tmp_path / part, None)
        verify_folder(folder)
        with pytest.raises(LockDisagrees, match=f"{part}/.*other settings"):
            load_pipeline(folder)


def test_a_folder_of_a_release_that_left_out_the_padding_is_told_from_one_with_made_up_settings(tmp_path, monkeypatch):
    from paris_swarm.router import diffusers_folder

    padded = make_world(tmp_path / "world", text={"name": "CLIPTextModel", "digest": "ab" * 32, "padded": True})
    written = diffusers_folder.experts_config

    def earlier(plan, slots, **more):
        said = json.loads(written(plan, slots))
        assert said.pop("pad_text") is True
        return json.dumps(said | more).encode()

    def assembled(name, config):
        with monkeypatch.context() as patch:
            patch.setattr(diffusers_folder, "experts_config", config)
            return assemble(padded, tmp_path / name, None)

    with pytest.raises(LockDisagrees, match=r"experts/.*written by an earlier release.*assemble the folder again"):
        load_pipeline(assembled("earlier", earlier))
    with pytest.raises(LockDisagrees, match=r"experts/.*other settings"):
        load_pipeline(assembled("made up", lambda plan, slots: earlier(plan, slots, guidance=90.0)))


def _with_guidance(written):
    return lambda plan, slots: json.dumps(json.loads(written(plan, slots)) | {"guidance": 90.0}).encode()


def test_code_that_an_assembler_wrote_himself_is_told_from_ours(world, whole, tmp_path, monkeypatch):
    from paris_swarm.router import diffusers_folder

    ours = {PIPELINE_FILE, f"experts/{COMPONENTS_FILE}", f"router/{COMPONENTS_FILE}"}
    assert code_here(verify_folder(whole)) == dict.fromkeys(ours, True)
    with monkeypatch.context() as patch:
        patch.setattr(diffusers_folder, "pipeline_source", lambda: b"import antigravity\n")
        folder = assemble(world, tmp_path / "model", None)
    assert code_here(verify_folder(folder)) == dict.fromkeys(ours, True) | {PIPELINE_FILE: False}


def test_minilm_is_compared_with_its_pinned_files(copied, monkeypatch):
    from dataclasses import replace

    from paris_swarm.expert.data import encoders
    from paris_swarm.router import diffusers_folder
    from paris_swarm.router.encoder_files import OtherEncoder

    verified = verify_folder(copied)
    said = verified.plan.plan.model_copy(update={"data": {"text": {"digest": encoders.MINILM_SHA256}}})
    swapped = replace(verified, plan=replace(verified.plan, plan=said))
    diffusers_folder._check_minilm(verified)  # of a plan with another text encoder: nothing to compare with
    with pytest.raises(OtherEncoder, match="text_encoder/"):
        diffusers_folder._check_minilm(swapped)
    for name, path in (("MINILM_SHA256", TEXT_WEIGHTS), ("MINILM_TOKENIZER_SHA256", "tokenizer/tokenizer.json")):
        monkeypatch.setattr(encoders, name, hashlib.sha256((copied / path).read_bytes()).hexdigest())
    said.data["text"]["digest"] = encoders.MINILM_SHA256
    with pytest.raises(OtherEncoder, match=r"text_encoder/config\.json"):
        diffusers_folder._check_minilm(swapped)
    config = json.loads((copied / "text_encoder" / "config.json").read_bytes())
    monkeypatch.setattr(diffusers_folder, "MINILM_CONFIG", config)
    diffusers_folder._check_minilm(swapped)


def test_the_code_of_a_folder_is_locked(copied):
    for path in (PIPELINE_FILE, f"experts/{COMPONENTS_FILE}", f"router/{COMPONENTS_FILE}", MODEL_INDEX, TEXT_WEIGHTS):
        data = (copied / path).read_bytes()
        (copied / path).write_bytes(data + b" ")
        with pytest.raises(ChangedFile, match=path):
            verify_folder(copied)
        (copied / path).write_bytes(data)


def relock(folder: Path, *gone: str) -> None:
    """What a careless assembler does: signs the folder again after taking files away."""
    lock = open_lock((folder / "lock.json").read_bytes()).lock
    for path in gone:
        (folder / path).unlink()
    kept = tuple(
        LockedFile(path=file.path, length=(folder / file.path).stat().st_size,
                   blake3=blake3((folder / file.path).read_bytes()).hexdigest())
        for file in lock.files if file.path not in gone
    )  # fmt: skip
    (folder / "lock.json").write_bytes(seal_lock(ASSEMBLER, lock.model_copy(update={"files": kept})))


def test_a_diffusers_model_is_whole_or_not_there(copied):
    relock(copied, "tokenizer/tokenizer.json")
    with pytest.raises(LockDisagrees, match=r"tokenizer\.json"):
        verify_folder(copied)


def test_folders_assembled_before_still_verify(copied):
    added = ["experts/config.json", f"experts/{COMPONENTS_FILE}", "experts/null_caption.safetensors"]
    added += [MODEL_INDEX, PIPELINE_FILE, f"router/{COMPONENTS_FILE}", "scheduler/scheduler_config.json"]
    added += [f"text_encoder/{name}" for name in ("config.json", "model.safetensors")]
    added += [f"tokenizer/{name}" for name in ("tokenizer.json", "tokenizer_config.json")]
    relock(copied, *added)
    for empty in ("scheduler", "text_encoder", "tokenizer"):
        (copied / empty).rmdir()
    verify_folder(copied)


def test_the_list_of_experts_must_be_that_of_the_lock(copied):
    path = copied / "experts" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "experts": [0, 1]}))
    relock(copied)
    with pytest.raises(LockDisagrees, match="experts"):
        verify_folder(copied)


# ---------------------------------------------------------------------------------------------------------------------
# strict loading
# ---------------------------------------------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> str:
    """Changes a weights file in one way; the name of the tensor it is about."""
    tensors = load_file(path)
    name = "final_layer.linear.weight"
    if how == "missing":
        del tensors[name]
    elif how == "extra":
        tensors[name := "more"] = torch.zeros(2)
    elif how == "shape":
        tensors[name] = tensors[name].T.contiguous()
    elif how == "nan":
        tensors[name][0, 0] = torch.nan
    elif how == "mixed":
        tensors[name] = tensors[name].half()
        name = "float16"
    else:
        tensors = {key: value.to(torch.int32) for key, value in tensors.items()}
        name = "int32"
    save_file(tensors, path)
    return name


@pytest.mark.parametrize("how", ["missing", "extra", "shape", "nan", "mixed", "whole numbers"])
@pytest.mark.parametrize("slot", ["2", "router"])
def test_other_tensors_are_refused_by_name(copied, slot, how):
    name = spoil(copied / weights_path(slot), how)
    kind, folder = (DDMRouter, copied / "router") if slot == "router" else (DDMExperts, copied / "experts")
    with pytest.raises(WeightsRefused, match=name) as caught:
        kind.from_pretrained(folder)
    assert str((copied / weights_path(slot)).parent.name) in str(caught.value)


def test_pickles_and_missing_files_are_refused(copied):
    weights = copied / weights_path("0")
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(WeightsRefused, match="safetensors"):
        DDMExperts.from_pretrained(copied / "experts")
    with pytest.raises(WeightsRefused, match="fp16"):
        DDMExperts.from_pretrained(copied / "experts", variant="fp16")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_experts": K, "experts": []},
        {"num_experts": K, "experts": [0, K]},
        {"num_experts": K, "experts": ["0"]},
    ],
)
def test_a_config_that_names_no_experts_is_refused(copied, config):
    (copied / "experts" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsRefused, match="expert"):
        DDMExperts.from_pretrained(copied / "experts")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "prompt"),
        ({"prompt": " "}, "empty"),
        ({"prompt": "red", "height": 64}, "height"),
        ({"prompt": "red", "output_type": "jpeg"}, "output_type"),
        ({"prompt": "red", "strategy": "top-9"}, "top-9"),
        ({"prompt": "red", "sampler": "guess"}, "guess"),
        ({"prompt": "red", "negative_prompt": ["a", "b"]}, "negative_prompt"),
        ({"prompt_embeds": torch.zeros(1, 2, DIM + 1)}, "prompt_embeds"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(whole, asked, said):
    pipe = load_pipeline(whole)
    with pytest.raises(ValueError, match=said):
        pipe(**asked)


def test_a_config_whose_network_does_not_fit_into_memory_is_refused():
    """R-PLAN-5: it is not built to find that out."""
    huge = {"hidden": 16_384, "depth": 512, "heads": 16}
    expert, router = replace(ModelConfig(), **huge), replace(RouterConfig(), **huge)
    with pytest.raises(TooLarge):
        DDMExperts(1, {"0": {"recipe": {"model": plain_record(expert)}}})
    with pytest.raises(TooLarge):
        DDMRouter({"model": plain_record(router)})


def test_a_scheduler_that_asks_twice_a_step_is_refused(whole):
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = load_pipeline(whole, scheduler=FlowMatchHeunDiscreteScheduler())
    with pytest.raises(ValueError, match="sampler="):
        pipe("red", num_inference_steps=4)


def test_without_a_text_encoder_captions_come_encoded(world, text, tmp_path):
    folder = assemble(world, tmp_path / "model", None)
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="no text encoder"):
        pipe("red")
    states, lengths = encoded(text, PROMPTS)
    drawn = pipe(
        prompt_embeds=torch.from_numpy(states), prompt_lengths=lengths.tolist(), num_inference_steps=4, seed=7,
        guidance_scale=2.0, num_images_per_prompt=2, output_type="np",
    )  # fmt: skip
    assert np.abs(np.round(drawn.images * 255) - drawn_here(folder, text)).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# the code in the folder
# ---------------------------------------------------------------------------------------------------------------------


def test_the_code_imports_nothing_but_what_diffusers_needs():
    allowed = {"torch", "diffusers", "transformers", "safetensors", "numpy", "PIL", *sys.stdlib_module_names}
    for source in (pipeline_source(), components_source()):
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [f"{node.module}"] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed
        assert pipeline_source() == pipeline_source()


def test_what_cannot_be_flattened_is_refused(tmp_path, monkeypatch):
    with pytest.raises(CannotBundle, match="nowhere"):
        bundle("paris_swarm.router.draw", ["nowhere"], heading="")
    monkeypatch.syspath_prepend(tmp_path)
    recipes = "from paris_swarm.expert.recipe import named_recipe\nfrom paris_swarm.router.recipe import DEMO\n"
    (tmp_path / "two_demos.py").write_text(f"{recipes}both = (named_recipe, DEMO)\n")
    with pytest.raises(
        CannotBundle, match=r"DEMO .*expert\.recipe.*router\.recipe|DEMO .*router\.recipe.*expert\.recipe"
    ):
        bundle("two_demos", ["both"], heading="")
    (tmp_path / "hidden_import.py").write_text(
        "def late():\n    from paris_swarm.router.draw import draw\n    return draw\n"
    )
    with pytest.raises(CannotBundle, match="within a function"):
        bundle("hidden_import", ["late"], heading="")


@given(st.binary(max_size=5000))
@settings(max_examples=60, deadline=None)
def test_plain_blake3_is_blake3(data):
    assert plain_blake3_hex(data) == blake3(data).hexdigest()
