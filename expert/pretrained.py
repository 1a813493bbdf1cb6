"""A head start for an expert: the weights of an ImageNet DiT, as Paris' experts could be started.

What carries over is the patch embedding, the positions, the time embedding and the blocks (self-attention and MLP);
the last layer, the caption projection and cross-attention are new, as is whatever the checkpoint does not have. Both
layouts in use are read, from safetensors only: the original (`x_embedder.proj.weight`, `blocks.N.attn.qkv.weight`, ...)
and diffusers' DiTTransformer2DModel (`pos_embed.proj.weight`, `transformer_blocks.N.attn1.to_q.weight`, ...).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from paris_swarm.dht_schemas.digest import digest_file
from paris_swarm.expert.memory import check_forward
from paris_swarm.expert.model import Expert, grid_waves, seeded
from paris_swarm.expert.recipe import Recipe, StartWeights

_THIRDS = ("to_q", "to_k", "to_v")


class NotADiT(ValueError):
    """The file does not hold the weights of a DiT of this shape: give a DiT checkpoint in safetensors of the recipe's
    width, depth and patch."""


class StartRefused(ValueError):
    """The weights that the recipe starts from are not at hand, or are not those whose digest it names."""


@dataclass(frozen=True)
class HeadStart:
    """kept: tensors of the expert that were taken over; fresh: those that start as the recipe's seed made them."""

    kept: tuple[str, ...]
    fresh: tuple[str, ...]


def start_of_file(path: Path) -> StartWeights:
    """What a recipe says of the DiT checkpoint at `path`: a .safetensors file, or a folder that holds one as diffusers
    writes it (transformer/diffusion_pytorch_model.safetensors).

    Raises:
        NotADiT: there is no such file, or its name could not stand in a recipe.
    """
    file = start_file(path)
    try:
        return StartWeights(file.name, digest_file(file), file.stat().st_size)
    except ValueError as error:
        raise NotADiT(f"{file} cannot be named in a recipe: {error}") from error


def start_file(path: Path) -> Path:
    """The checkpoint that `path`, a file or a folder, means. Raises NotADiT when there is none."""
    candidates = [path, *(path / folder / "diffusion_pytorch_model.safetensors" for folder in ("transformer", "."))]
    candidates += sorted(path.glob("*.safetensors"))[:1] if path.is_dir() else []
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise NotADiT(f"{path} is no .safetensors file, and no folder that holds one")
    return found


def missing_start(named: StartWeights) -> StartRefused:
    """Says which file must be brought."""
    return StartRefused(
        f"the plan starts its experts from {named.name} ({named.length} bytes, BLAKE3 {named.digest}), which does not "
        "travel with it: give that file with --start-from"
    )


def check_start(path: Path, start: StartWeights) -> None:
    """Compares a file with what the recipe names.

    Raises:
        StartRefused: other bytes; both digests are named. OSError: it cannot be read.
    """
    found = digest_file(path)
    if found != start.digest:
        raise StartRefused(
            f"{path} is not {start.name} as the plan names it: its digest is {found[:16]}..., the plan's "
            f"{start.digest[:16]}... ({start.length} bytes)"
        )


def untrained_expert(recipe: Recipe, start: Path | None = None) -> Expert:
    """The weights that training starts with: a function of `recipe.train.seed` and, where the recipe names any, of the
    start weights, whose file is `start`.

    Raises:
        StartRefused: they are not at hand, or other bytes. NotADiT: they do not fit the recipe. TooLarge: this machine
            has no memory for them.
    """
    check_forward(recipe.model)
    model = seeded(Expert, recipe.model, recipe.train.seed)
    assert isinstance(model, Expert)
    if recipe.start is not None:
        head_start(model, recipe.start, start)
    return model


def head_start(model: Expert, named: StartWeights, path: Path | None) -> HeadStart:
    """`start_from_dit` once the bytes are those that the recipe names.

    Raises:
        StartRefused: there is no file, or it holds other bytes. NotADiT: it does not fit the recipe.
    """
    if path is None:
        raise missing_start(named)
    check_start(path, named)
    return start_from_dit(model, path)


def start_from_dit(model: Expert, path: Path) -> HeadStart:
    """Write the weights of the DiT at `path` (a .safetensors file) into `model`, in place, in the model's dtype.

    AdaLN: an `adaln: zero` expert keeps each block's own modulation; an `adaln: single` one shares the mean of all
    blocks' modulations and keeps what each adds to it at t = 0.5 in its table, a first guess that training refines.

    Raises:
        NotADiT: not safetensors, neither layout, or another width, depth, patch or number of channels.
    """
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise NotADiT(
            f"{path} cannot be read as safetensors ({error}); convert a .pt or .bin checkpoint first"
        ) from error
    theirs = _in_one_layout(stored, model.config.depth, path)
    ours = dict(model.named_parameters())
    values: dict[str, Tensor] = {}
    for name in ("patch_embed.weight", "patch_embed.bias"):
        values[name] = _take(theirs, name, path)
    values["pos_embed"] = theirs.get("pos_embed", dit_positions(model.config.tokens, model.config.hidden))
    for layer in ("time_embed.mlp.0", "time_embed.mlp.2"):
        for kind in ("weight", "bias"):
            values[f"{layer}.{kind}"] = _take(theirs, f"{layer}.{kind}", path)
    for index in range(model.config.depth):
        for part in ("attn.in_proj_", "attn.out_proj.", "mlp.0.", "mlp.2."):
            for kind in ("weight", "bias"):
                name = f"layers.{index}.{part}{kind}"
                values[name] = _take(theirs, name, path)
    values.update(_modulation(model, theirs, values, path))
    for name, value in values.items():
        if value.shape != ours[name].shape:
            raise NotADiT(f"{path}: {name} has shape {tuple(value.shape)}, the recipe needs {tuple(ours[name].shape)}")
    with torch.no_grad():
        for name, value in values.items():
            ours[name].copy_(value)
    return HeadStart(tuple(sorted(values)), tuple(sorted(set(ours) - set(values))))


def dit_positions(tokens: int, hidden: int) -> Tensor:
    """[1, N, D]: the positions that a DiT was trained with, where the checkpoint does not hold them: the waves
    of a token's column come first, then those of its row; ours are the other way round.
    """
    rows, columns = grid_waves(tokens, hidden).chunk(2, dim=2)  # each [1, N, D/2]
    return torch.cat([columns, rows], dim=2)


def _modulation(
    model: Expert, theirs: Mapping[str, Tensor], values: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """The blocks' AdaLN weights under the names of this expert's kind of AdaLN."""
    weights = [_take(theirs, f"layers.{k}.adaln.1.weight", path) for k in range(model.config.depth)]  # each [6D, D]
    biases = [_take(theirs, f"layers.{k}.adaln.1.bias", path) for k in range(model.config.depth)]  # each [6D]
    if model.config.adaln == "zero":
        return {
            f"layers.{k}.adaln.1.{kind}": value
            for k, (weight, bias) in enumerate(zip(weights, biases, strict=True))
            for kind, value in (("weight", weight), ("bias", bias))
        }
    mean_weight, mean_bias = torch.stack(weights).mean(0), torch.stack(biases).mean(0)
    found = {"t_block.1.weight": mean_weight, "t_block.1.bias": mean_bias}
    middle = _time_state(model, values)  # [D]
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        rest = (weight - mean_weight) @ middle + bias - mean_bias  # [6D]
        found[f"layers.{k}.scale_shift_table"] = rest.reshape(6, -1)
    return found


def _time_state(model: Expert, values: Mapping[str, Tensor]) -> Tensor:
    """SiLU of the checkpoint's own time embedding at t = 0.5: [D]."""
    embed = model.time_embed
    stock = {name.removeprefix("time_embed."): value for name, value in values.items() if name.startswith("time_embed")}
    with torch.no_grad():
        out = torch.func.functional_call(embed, stock, (torch.tensor([0.5]),))[0]  # [D]
    return torch.nn.functional.silu(out.float())


def _take(theirs: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    try:
        return theirs[name].float()
    except KeyError:
        raise NotADiT(f"{path}: no weights for {name}; is it a DiT of at least this depth?") from None


def _in_one_layout(stored: Mapping[str, Tensor], depth: int, path: Path) -> dict[str, Tensor]:
    """Either layout under our names. Raises NotADiT for neither, and for more blocks than `depth`."""
    if "x_embedder.proj.weight" in stored:
        found = {_from_original(name): value for name, value in stored.items()}
        blocks = {int(m[1]) for name in stored if (m := re.match(r"blocks\.(\d+)\.", name))}
    elif "pos_embed.proj.weight" in stored:
        found = _from_diffusers(stored)
        blocks = {int(m[1]) for name in stored if (m := re.match(r"transformer_blocks\.(\d+)\.", name))}
    else:
        raise NotADiT(f"{path} has neither x_embedder.proj.weight nor pos_embed.proj.weight: it is no DiT checkpoint")
    if len(blocks) != depth:
        raise NotADiT(f"{path} has {len(blocks)} blocks, the recipe {depth}")
    return found


def _from_original(name: str) -> str:
    for theirs, ours in (
        ("x_embedder.proj.", "patch_embed."),
        ("t_embedder.mlp.", "time_embed.mlp."),
        ("blocks.", "layers."),
        (".attn.qkv.", ".attn.in_proj_"),
        (".attn.proj.", ".attn.out_proj."),
        (".mlp.fc1.", ".mlp.0."),
        (".mlp.fc2.", ".mlp.2."),
        (".adaLN_modulation.1.", ".adaln.1."),
    ):
        name = name.replace(theirs, ours)
    return name


def _from_diffusers(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        found[f"patch_embed.{kind}"] = stored[f"pos_embed.proj.{kind}"]
    for name, value in stored.items():
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None:
            continue
        block, part, kind = match.groups()
        ours = {
            "attn1.to_out.0": "attn.out_proj.",
            "ff.net.0.proj": "mlp.0.",
            "ff.net.2": "mlp.2.",
            "norm1.linear": "adaln.1.",
        }.get(part)
        if ours is not None:
            found[f"layers.{block}.{ours}{kind}"] = value
        elif part == "attn1.to_q":
            names = [f"transformer_blocks.{block}.attn1.{third}.{kind}" for third in _THIRDS]
            if all(third in stored for third in names):
                found[f"layers.{block}.attn.in_proj_{kind}"] = torch.cat([stored[third] for third in names])
        elif block == "0" and part.startswith("norm1.emb.timestep_embedder.linear_"):
            # Every block carries a copy of the one time embedding; the first block's is taken.
            layer = {"1": "0", "2": "2"}[part[-1]]
            found[f"time_embed.mlp.{layer}.{kind}"] = value
    return found
