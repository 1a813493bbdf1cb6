"""Weights files that are not what the plan says, not finite, or of no use: published by mallory, fetched by bob."""

from __future__ import annotations

import json
import pickle  # noqa: TID251 - the attack itself
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arena import HONEST_WEIGHTS, WEIGHTS, Arena, Stage, best_verified, small_plan
from fixture_types import NamedRule, Timed
from safetensors.numpy import save

from paris_swarm.dht_schemas.errors import NotFinite, ProbeFailed
from paris_swarm.dht_schemas.trusted import TrustedSwarm
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.sightings import Candidate

Check = Callable[[Candidate, Path], None]
GOOD = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, dtype=np.float32)}


def play(
    arena: Arena,
    stage: Stage,
    liar: SwarmNode,
    timed: Timed,
    named_rule: NamedRule,
    *files: bytes,
    check: Check | None = None,
    probe_loss: float = 0.1,
) -> None:
    """Each bad file is announced with a better loss than alice's, fetched, refused; then alice's is fetched."""

    async def scenario() -> None:
        await arena.publish(arena.alice, stage.slot, probe_loss=0.25)
        for data in files:
            made = await arena.publish(liar, stage.slot, {WEIGHTS: data, "state.json": b"{}"}, probe_loss=probe_loss)
            await arena.bob.refresh([stage.slot])
            assert arena.bob.candidates(stage.slot)[0].announcement == made
            with timed():
                best, refusals = await best_verified(arena.bob, stage.slot, check)
            (refusal,) = refusals
            named_rule(refusal)
            assert best is not None and best.announcement.author == arena.alice.identity.peer_id
            assert arena.bob.store.path(best.announcement.root, WEIGHTS).read_bytes() == HONEST_WEIGHTS

    arena.run(scenario())


def crafted(header: dict[str, Any] | bytes, data: bytes = bytes(36), *, length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_header_of_100_mb(arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: safetensors header of 100 MB (and of 2^63 bytes, and longer than the file)
    Rule: R-HDR-1 (BadHeader): its length is judged before it is read
    Seen: alice's checkpoint
    """
    lengths = (100_000_000, 2**63, 4_000_000, 1)
    play(arena, stage, liar, timed, named_rule, *(crafted(b"{}", length=length) for length in lengths))


def test_overlapping_tensors(arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: overlapping tensors, gaps between them, offsets before the data or behind the file
    Rule: R-HDR-5, R-HDR-6, R-HDR-2 (BadHeader)
    Seen: alice's checkpoint
    """
    play(
        arena,
        stage,
        liar,
        timed,
        named_rule,
        crafted({"w": entry(0, 24, [2, 3]), "b": entry(12, 24, [3])}, bytes(24)),
        crafted({"w": entry(0, 24, [2, 3]), "b": entry(28, 40, [3])}, bytes(40)),
        crafted({"w": entry(-12, 12, [2, 3]), "b": entry(12, 24, [3])}, bytes(24)),
        crafted({"w": entry(0, 24, [2, 3]), "b": entry(24, 36, [3])}, bytes(37)),
        crafted({"w": entry(0, 24, [2, 3]), "b": entry(24, 36, [3])}, bytes(30)),
        crafted({"w": entry(0, 2**60, [2, 3]), "b": entry(24, 36, [3])}),
    )


def test_missing_tensors(arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: missing tensors: a file without one, and one without any
    Rule: R-HDR-3 (BadHeader)
    Seen: alice's checkpoint
    """
    play(arena, stage, liar, timed, named_rule, save({"w": GOOD["w"]}), crafted({}, b""))


def test_extra_tensor(arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: extra tensor beside those of the plan
    Rule: R-HDR-3 (BadHeader)
    Seen: alice's checkpoint
    """
    play(arena, stage, liar, timed, named_rule, save({**GOOD, "backdoor": np.zeros(1, dtype=np.float32)}))


def test_wrong_dtype_or_shape(arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: wrong dtype or shape of the same number of bytes
    Rule: R-HDR-4 (BadHeader)
    Seen: alice's checkpoint
    """
    play(
        arena,
        stage,
        liar,
        timed,
        named_rule,
        save({**GOOD, "b": np.ones(3, dtype=np.int32)}),
        save({**GOOD, "b": np.ones(6, dtype=np.float16)}),
        save({**GOOD, "w": np.ones((3, 2), dtype=np.float32)}),
        save({**GOOD, "w": np.ones(6, dtype=np.float32)}),
    )


class Exploit:
    """What a pickle can be: code that runs when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("the pickle was opened",)


def test_pickle_renamed(arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: a pickle renamed to .safetensors, alone, and behind a header that passes for one
    Rule: R-HDR-1, R-HDR-2 (BadHeader); nothing here ever opens a pickle
    Seen: alice's checkpoint; the code in it did not run
    """
    exploit = pickle.dumps(Exploit(), protocol=2)
    play(arena, stage, liar, timed, named_rule, exploit, struct.pack("<Q", len(exploit)) + exploit)


def test_header_of_strange_json(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule
) -> None:
    """
    Attack: a header with a tensor named twice, nested a thousand deep, with metadata that is not text, or no object
    Rule: R-HDR-2 (BadHeader)
    Seen: alice's checkpoint
    """
    good = {"w": entry(0, 24, [2, 3]), "b": entry(24, 36, [3])}
    twice = json.dumps(good).encode().replace(b'{"w"', b'{"w": {}, "w"', 1)
    deep = b'{"w":' + b"[" * 1000 + b"]" * 1000 + b"}"
    play(
        arena,
        stage,
        liar,
        timed,
        named_rule,
        crafted(twice),
        crafted(deep),
        crafted({**good, "__metadata__": {"format": [1]}}),
        crafted(b"[1, 2]"),
        crafted({**good, "w": {**good["w"], "strides": [1]}}),
        crafted({**good, "w": entry(0, 24, [2, True])}),
    )


def finite(_candidate: Candidate, folder: Path) -> None:
    """The step that needs torch, as cli/checking.py hands it in."""
    from paris_swarm.expert.verify import nonfinite_tensors

    for name in nonfinite_tensors(folder / WEIGHTS):
        raise NotFinite(f"{name} holds NaN or infinity")


def test_nan_weights(arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: NaN weights, one value among good ones, and infinities
    Rule: R-VAL-1 (NotFinite)
    Seen: alice's checkpoint
    """
    files = []
    for bad in (np.nan, np.inf, -np.inf):
        weights = {name: tensor.copy() for name, tensor in GOOD.items()}
        weights["w"][1, 2] = bad
        files.append(save(weights))
    play(arena, stage, liar, timed, named_rule, *files, check=finite)


def test_lie_about_the_probe_loss(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule
) -> None:
    """
    Attack: probe-loss lie: announced better than it is, negative, or minus zero
    Rule: R-VAL-2 (ProbeFailed)
    Seen: alice's checkpoint
    """

    def check(candidate: Candidate, _folder: Path) -> None:
        arena.bob.trusted.feed_probe(candidate.announcement, 0.25)

    other = save({**GOOD, "b": np.zeros(3, dtype=np.float32)})
    for lie in (0.2, -1e9, -0.0):
        play(arena, stage, liar, timed, named_rule, other, check=check, probe_loss=lie)


def test_probe_loss_that_is_no_number(arena: Arena, stage: Stage, timed: Timed, named_rule: NamedRule) -> None:
    """
    Attack: NaN probe loss, announced, or provoked by weights that are finite and overflow in the model
    Rule: R-ENV-2 (MalformedRecord), R-VAL-1 (NotFinite): NaN compares with nothing, so it is refused by itself
    Seen: alice's claim; a loss that cannot be compared never wins
    """
    said = arena.announcement(stage.slot)
    text = json.dumps(said.model_dump())
    envelope = forged(arena, text.replace('"probe_loss": 0.25', '"probe_loss": NaN').encode())
    holding = arena.holding(stage.slot, envelope)
    with timed():
        with pytest.raises(Exception) as caught:
            arena.bob.trusted.feed_holding(holding.seal(arena.mallory), holding.until - 60)
        named_rule(caught.value)
        for measured in (float("nan"), float("inf"), float("-inf")):
            with pytest.raises(NotFinite) as refused:
                arena.bob.trusted.feed_probe(said, measured)
            named_rule(refused.value)


def forged(arena: Arena, payload: bytes) -> bytes:
    from arena import forge

    return forge(arena.mallory, "checkpoint", payload)


def test_finite_and_useless_weights(timed: Timed, named_rule: NamedRule, tmp_path: Path) -> None:
    """
    Attack: finite and useless weights, honestly announced: an untrained model, and one that says nothing
    Rule: R-VAL-3 (ProbeFailed): the probe loss is not below the bar that untrained weights set
    Seen: the slot without a checkpoint to continue from, or the next best one
    """
    import torch
    from safetensors.torch import save_file
    from tests.expert.synthetic import SyntheticData, small_probe, small_recipe

    from paris_swarm.expert.model import Expert, seeded
    from paris_swarm.expert.verify import probe_loss_of_file, resumable_bar

    recipe, probe = small_recipe(), small_probe(SyntheticData())
    bar = resumable_bar(recipe, probe)
    opened = small_plan(clusters=1, bar=bar)
    swarm = TrustedSwarm(opened)
    for name, seed, scale in (("untrained", 99, 1.0), ("silent", 1, 0.0)):
        weights = {
            key: (tensor * scale).contiguous()
            for key, tensor in seeded(Expert, recipe.model, seed).state_dict().items()
        }
        path = tmp_path / f"{name}.safetensors"
        save_file(weights, path)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
        with timed():
            measured = probe_loss_of_file(recipe, path, probe)
            said = announced(opened.plan_id, measured)
            with pytest.raises(ProbeFailed) as caught:
                swarm.feed_probe(said, measured, bar="resumable")
        named_rule(caught.value)


def announced(plan_id: str, loss: float) -> Any:
    from paris_swarm.dht_schemas import Announcement, Identity

    return Announcement(
        plan=plan_id,
        slot="0",
        author=Identity(b"a" * 32).peer_id,
        seq=1,
        step=100,
        parent=None,
        root="a" * 64,
        bytes=1000,
        probe_loss=loss,
    )
