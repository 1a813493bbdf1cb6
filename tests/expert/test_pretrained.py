"""Starting an expert from an ImageNet DiT: both layouts, both kinds of AdaLN, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paris_swarm.expert.model import Expert, seeded
from paris_swarm.expert.pretrained import (
    NotADiT,
    StartRefused,
    start_file,
    start_from_dit,
    start_of_file,
    untrained_expert,
)
from paris_swarm.expert.recipe import SIZES, Recipe

CONFIG = replace(SIZES["S/2"], resolution=8, hidden=48, depth=2, heads=4, text_dim=24, text_tokens=6)


def original_dit(depth: int = 2, hidden: int = 48) -> dict[str, torch.Tensor]:
    """The tensors of the published DiT's own layout."""
    draw = torch.Generator().manual_seed(4)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw) * 0.05

    found = {
        "x_embedder.proj.weight": make(hidden, 4, 2, 2),
        "x_embedder.proj.bias": make(hidden),
        "pos_embed": make(1, 16, hidden),
        "t_embedder.mlp.0.weight": make(hidden, 256),
        "t_embedder.mlp.0.bias": make(hidden),
        "t_embedder.mlp.2.weight": make(hidden, hidden),
        "t_embedder.mlp.2.bias": make(hidden),
        "y_embedder.embedding_table.weight": make(1001, hidden),
        "final_layer.linear.weight": make(32, hidden),
    }
    for k in range(depth):
        for name, shape in {
            "attn.qkv": (3 * hidden, hidden),
            "attn.proj": (hidden, hidden),
            "mlp.fc1": (4 * hidden, hidden),
            "mlp.fc2": (hidden, 4 * hidden),
            "adaLN_modulation.1": (6 * hidden, hidden),
        }.items():
            found[f"blocks.{k}.{name}.weight"] = make(*shape)
            found[f"blocks.{k}.{name}.bias"] = make(shape[0])
    return found


def stored(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "dit.safetensors"
    save_file(tensors, path)
    return path


def build(adaln: str) -> Expert:
    model = seeded(Expert, replace(CONFIG, adaln=adaln), 0)
    assert isinstance(model, Expert)
    return model


@pytest.mark.parametrize("adaln", ["single", "zero"])
def test_patch_positions_and_blocks_are_kept_and_the_rest_is_new(tmp_path: Path, adaln: str) -> None:
    tensors = original_dit()
    model, untouched = build(adaln), build(adaln)
    report = start_from_dit(model, stored(tmp_path, tensors))
    weights, before = model.state_dict(), untouched.state_dict()
    assert torch.equal(weights["patch_embed.weight"], tensors["x_embedder.proj.weight"])
    assert torch.equal(weights["pos_embed"], tensors["pos_embed"])
    assert torch.equal(weights["layers.1.attn.in_proj_weight"], tensors["blocks.1.attn.qkv.weight"])
    assert torch.equal(weights["layers.0.mlp.2.bias"], tensors["blocks.0.mlp.fc2.bias"])
    for name in ("final_layer.linear.weight", "text_proj.weight", "layers.0.cross_attn.in_proj_weight"):
        assert name in report.fresh
        assert torch.equal(weights[name], before[name])
    assert set(report.kept) | set(report.fresh) == set(dict(model.named_parameters()))


def test_the_modulation_of_the_middle_of_the_path_survives_sharing(tmp_path: Path) -> None:
    """AdaLN-Single's one shared map plus tables says at t = 0.5 what every block said there."""
    path = stored(tmp_path, original_dit())
    single, zero = build("single"), build("zero")
    start_from_dit(single, path)
    start_from_dit(zero, path)
    embedding = single.time_embed(torch.tensor([0.5]))
    shared = single.t_block(embedding).reshape(1, 6, -1)
    for k in range(CONFIG.depth):
        own = zero.layers[k].adaln(embedding).reshape(1, 6, -1)
        torch.testing.assert_close(shared + single.layers[k].scale_shift_table[None], own, rtol=1e-4, atol=1e-5)


def test_diffusers_layout_gives_the_same_weights(tmp_path: Path) -> None:
    tensors = original_dit()
    theirs: dict[str, torch.Tensor] = {}
    for kind in ("weight", "bias"):
        theirs[f"pos_embed.proj.{kind}"] = tensors[f"x_embedder.proj.{kind}"]
        for k in range(2):
            block = f"transformer_blocks.{k}."
            for third, value in zip("qkv", tensors[f"blocks.{k}.attn.qkv.{kind}"].chunk(3), strict=True):
                theirs[f"{block}attn1.to_{third}.{kind}"] = value.clone()
            for name, source in {
                "attn1.to_out.0": "attn.proj",
                "ff.net.0.proj": "mlp.fc1",
                "ff.net.2": "mlp.fc2",
                "norm1.linear": "adaLN_modulation.1",
            }.items():
                theirs[f"{block}{name}.{kind}"] = tensors[f"blocks.{k}.{source}.{kind}"].clone()
            for ours, source in (("linear_1", "mlp.0"), ("linear_2", "mlp.2")):
                theirs[f"{block}norm1.emb.timestep_embedder.{ours}.{kind}"] = tensors[
                    f"t_embedder.{source}.{kind}"
                ].clone()
    one, other = build("zero"), build("zero")
    start_from_dit(one, stored(tmp_path, {**tensors}))
    start_from_dit(other, stored(tmp_path, theirs))
    for name, value in one.state_dict().items():
        if name != "pos_embed":  # diffusers computes positions instead of storing them
            assert torch.equal(value, other.state_dict()[name]), name


def test_the_blocks_answer_as_diffusers_own_transformer_does(tmp_path: Path) -> None:
    """Positions, time, self-attention and MLP of a DiT, through every block: nothing was put elsewhere."""
    pytest.importorskip("diffusers")
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import Timesteps

    torch.manual_seed(8)
    theirs = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_eps=1e-6,
    )  # fmt: skip
    first = theirs.transformer_blocks[0].norm1.emb.timestep_embedder
    for block in theirs.transformer_blocks:
        block.norm1.emb.class_embedder.embedding_table.weight.data.zero_()  # ours has no classes
        block.norm1.emb.timestep_embedder.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)  # as DiT was trained
    theirs.save_pretrained(tmp_path / "dit" / "transformer", safe_serialization=True)
    model = build("zero")
    start_from_dit(model, start_file(tmp_path / "dit"))

    seen: dict[str, torch.Tensor] = {}
    for name, last in (("theirs", theirs.transformer_blocks[-1]), ("ours", model.layers[-1])):
        last.register_forward_hook(lambda _module, _inputs, out, name=name: seen.update({name: out}))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs.eval()(x, timestep=torch.tensor([300.0, 900.0]), class_labels=torch.tensor([1, 2]))
        model(x, torch.tensor([300.0, 900.0]) / 999, torch.zeros(2, 6, 24), torch.ones(2, 6, dtype=torch.bool))
    torch.testing.assert_close(seen["ours"], seen["theirs"], rtol=1e-4, atol=1e-4)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADiT, match=r"no \.safetensors file"):
        start_of_file(tmp_path)


def test_only_the_bytes_that_the_recipe_names_are_a_start(tmp_path: Path) -> None:
    path = stored(tmp_path, original_dit())
    recipe = replace(Recipe(model=CONFIG), start=start_of_file(path))
    assert recipe.start is not None
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.digest() != replace(recipe, start=None).digest()
    begun, fresh = untrained_expert(recipe, path), untrained_expert(replace(recipe, start=None))
    assert not torch.equal(begun.layers[0].mlp[0].weight, fresh.layers[0].mlp[0].weight)
    assert torch.equal(begun.text_proj.weight, fresh.text_proj.weight)
    with pytest.raises(StartRefused, match="--start-from"):
        untrained_expert(recipe)
    other = tmp_path / "other.safetensors"
    save_file({**original_dit(), "pos_embed": torch.ones(1, 16, 48)}, other)
    with pytest.raises(StartRefused, match=f"is not dit.safetensors.*{recipe.start.digest[:16]}"):
        untrained_expert(recipe, other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("blocks.1.attn.qkv.weight"), "in_proj_weight"),
        (lambda t: t.update({"x_embedder.proj.weight": torch.zeros(48, 3, 2, 2)}), "shape"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.1.")], "1 blocks"),
        (lambda t: (t.clear(), t.update({"conv.weight": torch.zeros(1)})), "no DiT"),
    ],
)
def test_another_checkpoint_is_refused_and_nothing_is_changed(tmp_path: Path, change: object, words: str) -> None:
    tensors = original_dit()
    assert callable(change)
    change(tensors)
    model, untouched = build("zero"), build("zero")
    with pytest.raises(NotADiT, match=words):
        start_from_dit(model, stored(tmp_path, tensors))
    for name, value in model.state_dict().items():
        assert torch.equal(value, untouched.state_dict()[name]), name


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "DiT-XL-2-256x256.pt"
    path.write_bytes(b"\x80\x04\x95" + b"\x00" * 64)
    with pytest.raises(NotADiT, match="safetensors"):
        start_from_dit(build("zero"), path)
