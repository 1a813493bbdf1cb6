"""Weights held in fewer bits, networks filled again and again, batch sizes a compiler has seen before."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from paris_swarm.expert.model import Expert, seeded
from paris_swarm.expert.recipe import ModelConfig
from paris_swarm.router.resident import weight_bytes
from paris_swarm.router.weights import (
    STABLE_SIZES,
    EightBit,
    Skeleton,
    StableShapes,
    TensorsDiffer,
    hold,
    stable_pieces,
    tensors_in_place,
)

CONFIG = ModelConfig(resolution=8, patch=2, hidden=96, depth=2, heads=3, text_dim=40, text_tokens=5, output="residual")


def network(seed: int = 0) -> nn.Module:
    made = seeded(Expert, CONFIG, seed)
    for parameter in made.parameters():
        if not parameter.any():  # an untrained last layer says zero, in any precision
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(seed))
    return made.eval().requires_grad_(False)


def asked(count: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    states = torch.randn(count, 5, 40, generator=generator)
    return x, torch.linspace(0.1, 0.9, count), states, torch.ones(count, 5, dtype=torch.bool)


def filled(seed: int = 0) -> nn.Module:
    return Skeleton(lambda: seeded(Expert, CONFIG, 3)).filled(network(seed).state_dict())


def test_a_skeleton_is_filled_with_any_weights_and_keeps_none() -> None:
    skeleton = Skeleton(lambda: seeded(Expert, CONFIG, 3))
    first, second = skeleton.filled(network(1).state_dict()), skeleton.filled(network(2).state_dict())
    for made, seed in ((first, 1), (second, 2)):
        torch.testing.assert_close(made(*asked()), network(seed)(*asked()), rtol=0, atol=0)
        assert not any(parameter.requires_grad for parameter in made.parameters())
    weights = network(1).state_dict()
    weights["text_proj.bias"] += 1
    assert not torch.equal(first(*asked()), skeleton.filled(weights)(*asked()))


MIXED = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(7),
    "d": torch.empty(0, 3),
    "e": torch.tensor([1, 2, 3], dtype=torch.uint8),
}


def test_tensors_are_used_where_they_lie_in_the_file() -> None:
    data = bytearray(save(MIXED, metadata={"format": "pt"}))
    found = tensors_in_place(data)
    assert found.keys() == MIXED.keys()
    for name, tensor in MIXED.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)
    assert found["a"].data_ptr() - found["e"].data_ptr() == data.index(MIXED["a"].numpy().tobytes()) - data.index(
        bytes([1, 2, 3])
    )


def test_tensors_at_odd_places_are_copied_out() -> None:
    data = save({"a": torch.arange(5.0)})
    length = int.from_bytes(data[:8], "little")
    odd = (length + 3).to_bytes(8, "little") + data[8 : 8 + length] + b"   " + data[8 + length :]
    assert torch.equal(tensors_in_place(bytearray(odd))["a"], torch.arange(5.0))


@given(st.integers(0, 400), st.binary(max_size=9))
def test_a_damaged_file_is_refused_or_read_as_safetensors_reads_it(place: int, junk: bytes) -> None:
    whole = save(MIXED)
    data = whole[: place % len(whole)] + junk + whole[place % len(whole) + len(junk) :]
    try:
        right = load(data)
    except SafetensorError:
        with contextlib.suppress(SafetensorError):
            tensors_in_place(bytearray(data))
        return
    found = tensors_in_place(bytearray(data))
    assert found.keys() == right.keys()
    for name in right:
        assert torch.equal(found[name].flatten().view(torch.uint8), right[name].flatten().view(torch.uint8))


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_of_another_network_are_refused(change: str) -> None:
    tensors = dict(network().state_dict())
    if change == "missing":
        del tensors["pos_embed"]
    elif change == "extra":
        tensors["pos_embed_2"] = tensors["pos_embed"]
    else:
        tensors["pos_embed"] = tensors["pos_embed"][:, :-1]
    with pytest.raises(TensorsDiffer, match="pos_embed"):
        Skeleton(lambda: seeded(Expert, CONFIG, 3)).filled(tensors)


@pytest.mark.parametrize(
    ("precision", "share", "error"), [("fp32", 1.0, 0.0), ("bf16", 0.51, 0.02), ("int8", 0.32, 0.02)]
)
def test_fewer_bits_take_less_memory_and_say_almost_the_same(precision: str, share: float, error: float) -> None:
    exact = network()(*asked())
    held = hold(filled(), precision)
    said = held(*asked())
    assert said.dtype == torch.float32
    assert float((said - exact).norm() / exact.norm()) <= error
    assert weight_bytes(held) <= share * weight_bytes(network())
    if precision != "fp32":
        assert not torch.equal(said, exact)  # it is held as it says


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize(("output", "path"), [("noise", "cosine"), ("data", "cosine"), ("noise", "flow")])
def test_experts_of_every_objective_can_be_held_in_fewer_bits(precision: str, output: str, path: str) -> None:
    config = replace(CONFIG, output=output, path=path, data_limit=1.0)
    exact = seeded(Expert, config, 0).eval().requires_grad_(False)
    exact.load_state_dict(network().state_dict())
    x, t, states, mask = asked()
    said = hold(copy.deepcopy(exact), precision)(x, t, states, mask)
    assert said.dtype == torch.float32
    assert float((said - exact(x, t, states, mask)).norm() / exact(x, t, states, mask).norm()) <= 0.02


class Watched(bytearray):
    """Bytes that tell when they are let go."""


@pytest.mark.parametrize(("precision", "kept"), [("fp32", True), ("bf16", False), ("int8", False)])
def test_a_file_read_is_let_go_once_its_weights_are_held_in_fewer_bits(precision: str, kept: bool) -> None:
    data = Watched(save(network().state_dict()))
    watched = weakref.ref(data)
    skeleton = Skeleton(lambda: seeded(Expert, CONFIG, 3))
    held = hold(skeleton.filled(tensors_in_place(data)), precision)
    del data
    gc.collect()
    assert (watched() is not None) == kept
    torch.testing.assert_close(held(*asked()), network()(*asked()), rtol=0.1, atol=0.1)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="fp32, bf16, int8"):
        hold(filled(), "fp4")


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 40))
def test_an_eight_bit_number_is_off_by_half_a_step_at_most(seed: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10 ** torch.randn(rows, 1, generator=generator)
    weight[0] = 0
    whole, scale = EightBit().right_inverse(weight)
    assert whole.dtype == torch.int8
    assert scale.shape == (rows, 1)
    assert bool(((EightBit()(whole, scale) - weight).abs() <= 0.5001 * scale).all())


@settings(deadline=None)
@given(st.integers(1, 2000))
def test_stable_sizes_are_few_and_at_most_two_thirds_too_large(count: int) -> None:
    pieces = stable_pieces(count)
    assert set(pieces) <= set(STABLE_SIZES)
    assert count <= sum(pieces) <= max(count * 5 / 3, count + 1)
    assert sum(pieces[:-1]) < count, "the last piece has a row of its own"


def test_filled_up_groups_give_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def compiler(inner: nn.Module, *, dynamic: bool) -> object:
        assert dynamic is False

        def call(x: Tensor, *rest: Tensor) -> Tensor:
            sizes.append(len(x))
            return inner(x, *rest)

        return call

    monkeypatch.setattr(torch, "compile", compiler)
    stable = StableShapes(network())
    for count in (1, 4, 5, 7, 45):
        torch.testing.assert_close(stable(*asked(count)), network()(*asked(count)))
    assert sizes == [1, 4, 8, 8, 32, 16]
    assert weight_bytes(stable) == weight_bytes(network())


class Answering(nn.Module):
    """What little of a network torch needs to compile it as it compiles an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        caption = (states * mask[..., None]).mean((1, 2))
        return self.layer(x) * (t + caption)[:, None, None, None]


@pytest.mark.parametrize("build", [Answering, pytest.param(network, marks=pytest.mark.slow)])
def test_whatever_groups_come_torch_compiles_all_of_them(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[], nn.Module]
) -> None:
    """Beyond its limit torch goes back to eager without an error: then these rows would not reach the backend."""
    graphs, rows = 0, 0

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1

        def call(*arguments: Tensor) -> object:
            nonlocal rows
            (out,) = graph.forward(*arguments)
            rows += len(out)
            return (out,)

        return call

    weights = build().state_dict()
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    asked_rows = 0
    with torch.inference_mode():  # as in `draw`, which loads experts when a picture needs them
        skeleton = Skeleton(build)
        for _ in range(2):
            made = StableShapes(skeleton.filled(weights))
            for count in (*range(1, 34), 64, 150):
                made(*asked(count))
                asked_rows += sum(stable_pieces(count))
    torch.compiler.reset()
    assert graphs == len(STABLE_SIZES) <= torch._dynamo.config.recompile_limit
    assert rows == asked_rows


@pytest.mark.slow
def test_compiled_experts_share_one_compilation() -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    with torch.inference_mode():
        for seed in range(3):
            for count in (3, 5, 8):
                torch.testing.assert_close(
                    StableShapes(network(seed))(*asked(count)), network(seed)(*asked(count)), rtol=1e-4, atol=1e-4
                )
    assert counters["stats"]["unique_graphs"] == 2  # two batch sizes, whatever the number of experts
