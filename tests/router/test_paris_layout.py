"""The released Paris layout: written, read strictly, and the same pictures after the round trip."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import router_world
import torch
from router_world import ASSEMBLER, PIXELS, K, make_world, prompts
from safetensors.torch import load_file, save_file

from paris_swarm.router.diffusers_folder import pipeline_source
from paris_swarm.router.folder import open_folder
from paris_swarm.router.folder_writing import write_folder
from paris_swarm.router.paris_import import NotParis, import_paris, read_paris
from paris_swarm.router.paris_layout import export_paris
from paris_swarm.router.pipeline_code.components import DDMExperts, DDMRouter
from paris_swarm.router.pipeline_code.pipeline import DDMPipeline

torch.set_num_threads(1)
PUBLISHED_BLOCK = {
    "scale_shift_table", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias",
    "cross_attn.in_proj_weight", "cross_attn.in_proj_bias", "cross_attn.out_proj.weight", "cross_attn.out_proj.bias",
    "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias",
}  # fmt: skip
PUBLISHED_REST = {
    "patch_embed.weight", "patch_embed.bias", "pos_embed", "time_embed.mlp.0.weight", "time_embed.mlp.0.bias",
    "time_embed.mlp.2.weight", "time_embed.mlp.2.bias", "text_proj.weight", "text_proj.bias", "t_block.1.weight",
    "t_block.1.bias", "final_layer.linear.weight", "final_layer.linear.bias", "final_layer.scale_shift_table",
}  # fmt: skip


def assembled(folder: Path, monkeypatch: pytest.MonkeyPatch, *, plain: bool) -> Path:
    """A folder of tiny networks; plain: nothing in them that the released layout has no words for."""
    if plain:
        expert, router, task = router_world.EXPERT_RECIPE, router_world.ROUTER_RECIPE, router_world.router_task
        blind = replace(router, model=replace(router.model, text="none"))
        monkeypatch.setattr(
            router_world, "EXPERT_RECIPE", replace(expert, model=replace(expert.model, pooled_text=False))
        )
        monkeypatch.setattr(router_world, "router_task", lambda data, probe: task(data, probe, blind))
    world = make_world(folder / "world")
    values = {"identity": ASSEMBLER, "plan": world.plan, "plan_folder": world.plan_folder, "created": 5_000}
    write_folder(folder / "model", slots=world.all_sources(), **values)
    return folder / "model"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return assembled(tmp_path_factory.mktemp("plain"), patch, plain=True)


@pytest.fixture(scope="module")
def exported(plain, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("exported") / "paris"
    export_paris(open_folder(plain), target)
    return target


@pytest.fixture
def paris(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "paris"))


def test_the_layout_is_the_released_one(exported):
    folders = ["router", *(f"expert_{k}" for k in range(K))]
    files = {f"{each}/{name}" for each in folders for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    found = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert found == files | {"config.json", "model_index.json"}
    assert json.loads((exported / "model_index.json").read_text())["_class_name"] == "DDMPipeline"
    said = json.loads((exported / "expert_1" / "config.json").read_text())
    assert (said["model_type"], said["expert_id"], said["hidden_size"], said["num_layers"]) == ("dit_expert", 1, 16, 1)
    assert (said["text_embed_dim"], said["use_adaln_single"], said["cfg_dropout_prob"]) == (8, True, 0.1)
    tensors = load_file(exported / "expert_1" / "diffusion_pytorch_model.safetensors")
    assert set(tensors) == PUBLISHED_REST | {f"layers.0.{name}" for name in PUBLISHED_BLOCK}


def test_weights_are_exported_byte_for_byte(plain, exported):
    for ours, theirs in (("experts/expert_2", "expert_2"), ("router", "router")):
        name = "diffusion_pytorch_model.safetensors"
        assert (plain / ours / name).read_bytes() == (exported / theirs / name).read_bytes()


def test_an_imported_folder_draws_the_same_pictures(plain, exported, tmp_path):
    import_paris(read_paris(exported), tmp_path / "imported")
    parts = {"experts": DDMExperts.from_pretrained(tmp_path / "imported" / "experts")}
    parts["router"] = DDMRouter.from_pretrained(tmp_path / "imported" / "router")
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = DDMPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "imported/scheduler"), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    states, lengths = prompts(2)
    # There is no null caption in the released layout, so guidance 1: the conditional velocity alone.
    parts["experts"].null_caption = torch.zeros(1, states.shape[2])
    drawn = pipe(
        prompt_embeds=torch.from_numpy(states), prompt_lengths=lengths.tolist(), num_inference_steps=3, seed=5,
        guidance_scale=1.0, output_type="np",
    )  # fmt: skip
    ours = open_folder(plain).sample(states, lengths, steps=3, seed=5, guidance=1.0).images
    assert np.abs(np.round(drawn.images * 255) - ours).max() <= 1
    assert (tmp_path / "imported" / "pipeline.py").read_bytes() == pipeline_source()
    index = json.loads((tmp_path / "imported" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "DDMPipeline"]


def test_the_router_may_have_its_other_released_name(paris):
    weights = paris / "router" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("pytorch_model.safetensors"))
    assert read_paris(paris).router_weights.name == "pytorch_model.safetensors"
    shutil.copy(weights.with_name("pytorch_model.safetensors"), weights)
    with pytest.raises(NotParis, match="one of"):
        read_paris(paris)


@pytest.mark.parametrize("part", ["expert_2", "router"])
@pytest.mark.parametrize("how", ["missing", "extra", "shape", "nan", "dtype", "torn"])
def test_other_tensors_are_refused_by_name(paris, part, how):
    path, name = paris / part / "diffusion_pytorch_model.safetensors", "final_layer.linear.weight"
    tensors = load_file(path)
    if how == "missing":
        del tensors[name]
    elif how == "extra":
        tensors[name := "more"] = torch.zeros(1)
    elif how == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    elif how == "nan":
        tensors[name][0, 0] = torch.inf
    elif how == "dtype":
        tensors[name], name = tensors[name].double(), "F64"
    if how == "torn":
        path.write_bytes(path.read_bytes()[:-1])
        name = "safetensors"
    else:
        save_file(tensors, path)
    with pytest.raises(NotParis, match=name) as caught:
        read_paris(paris)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        ("config.json", "num_experts", 0),
        ("config.json", "num_experts", K + 1),
        ("config.json", "num_experts", "3"),
        ("config.json", "image_size", PIXELS * 2),
        ("expert_0/config.json", "model_type", "unet"),
        ("expert_0/config.json", "expert_id", 1),
        ("expert_0/config.json", "hidden_size", 17),
        ("expert_0/config.json", "use_adaln_single", False),
        ("router/config.json", "num_clusters", K + 1),
        ("router/config.json", "architecture", "cnn"),
    ],
)
def test_configs_that_do_not_fit_are_refused(paris, where, field, value):
    path = paris / where
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(NotParis):
        read_paris(paris)


@pytest.mark.parametrize("written", ["[" * 100_000, "[]", "{", '{"num_experts": 1e999}'])
def test_a_config_that_is_no_object_is_refused(tmp_path, written):
    (tmp_path / "config.json").write_text(written)
    with pytest.raises(NotParis, match=r"config\.json"):
        read_paris(tmp_path)


def test_no_folder_of_this_layout_is_named(tmp_path):
    with pytest.raises(NotParis, match=r"config\.json"):
        read_paris(tmp_path)


def test_what_the_layout_has_no_words_for_is_refused_or_marked(tmp_path, monkeypatch):
    model = open_folder(assembled(tmp_path, monkeypatch, plain=False))
    with pytest.raises(ValueError, match=r"pooled_text=True.*router text=pooled.*--extended"):
        export_paris(model, tmp_path / "paris")
    assert not (tmp_path / "paris").exists()
    export_paris(model, tmp_path / "paris", extended=True)
    said = json.loads((tmp_path / "paris" / "expert_0" / "config.json").read_text())
    assert said["model_type"] == "dit_expert_extended"
    source = read_paris(tmp_path / "paris")
    assert asdict(source.experts[0]) == asdict(model.recipe.model)
    assert source.router.text == "pooled"


def test_a_folder_that_holds_things_is_left_alone(plain, exported, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other things"):
        export_paris(open_folder(plain), tmp_path / "mine")
    with pytest.raises(ValueError, match="holds other things"):
        import_paris(read_paris(exported), tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_pickles_beside_a_stock_component_stay_behind(exported, tmp_path):
    stock = tmp_path / "clip"
    stock.mkdir()
    (stock / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    (stock / "pytorch_model.bin").write_bytes(b"a pickle")
    written = import_paris(read_paris(exported), tmp_path / "imported", stock={"text_encoder": stock})
    assert "text_encoder/config.json" in written
    assert not list((tmp_path / "imported").rglob("*.bin"))
    index = json.loads((tmp_path / "imported" / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_a_link_to_a_file_of_the_importer_is_not_copied(paris, tmp_path, linked):
    """Somebody's folder may arrive with links: what they lead to would go out again as part of a model."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text('{"architectures": ["CLIPTextModel"], "token": "secret"}')
    if linked == "file":
        (paris / "text_encoder").mkdir()
        (paris / "text_encoder" / "config.json").symlink_to(own / "config.json")
    else:
        (paris / "text_encoder").symlink_to(own)
    with pytest.raises(NotParis, match="outside"):
        import_paris(read_paris(paris), tmp_path / "imported")
    assert not (tmp_path / "imported").exists()
    import_paris(read_paris(paris), tmp_path / "asked-for", stock={"text_encoder": own})  # named by its owner


def test_links_of_the_hugging_face_cache_are_followed(exported, tmp_path):
    cache = tmp_path / "models--owner--name"
    snapshot = Path(shutil.copytree(exported, cache / "snapshots" / "0123"))
    blob, weights = cache / "blobs" / "abcd", snapshot / "expert_1" / "diffusion_pytorch_model.safetensors"
    blob.parent.mkdir()
    shutil.move(weights, blob)
    weights.symlink_to(Path("../../../blobs/abcd"))
    import_paris(read_paris(snapshot), tmp_path / "imported")
    copied = tmp_path / "imported" / "experts" / "expert_1" / "diffusion_pytorch_model.safetensors"
    assert copied.read_bytes() == blob.read_bytes() and not copied.is_symlink()


def test_a_stock_folder_that_names_its_class_oddly_is_refused(exported, tmp_path):
    stock = tmp_path / "clip"
    stock.mkdir()
    (stock / "config.json").write_text('{"architectures": {"0": "CLIPTextModel"}}')
    with pytest.raises(ValueError, match="does not say which class"):
        import_paris(read_paris(exported), tmp_path / "imported", stock={"text_encoder": stock})
