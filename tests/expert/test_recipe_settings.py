"""Recipes changed in a person's words, and what was added to recipes without changing those there were."""

from dataclasses import replace

import pytest

from paris_swarm.expert.recipe import DEMO, SIZES, ModelConfig, Recipe, StartWeights, TrainConfig, named_recipe
from paris_swarm.expert.settings import describe, setting_names, with_objective, with_settings, with_size
from paris_swarm.router.recipe import DEMO as ROUTER_DEMO

BEFORE = {
    "tiny": "53d32727bd1cc110673477b566517b1a66c60dacacbec4365199d27679b5b8ac",
    "S/2": "b8a68552da5cfa306d5526398ecb8031a030c2eefc02dd1b936b8c135658f6bf",
    "B/2": "96dd79f4fe5bf626eb2cf99bfcf3e81b0138ceb4359454a67edc55171bce26b6",
    "XL/2": "c58be250ca6b71d016aa41946eef83980b217c908ef2fbcb7f0a5f0f38617917",
}
"""Digests of the named recipes before there were precisions, start weights and limits."""


@pytest.mark.parametrize("name", SIZES)
def test_recipes_that_use_nothing_new_keep_their_digest_and_their_words(name: str) -> None:
    recipe = named_recipe(name)
    assert recipe.digest() == BEFORE[name]
    plain = recipe.to_dict()
    assert set(plain) == {"model", "train"}
    assert "data_limit" not in plain["model"] and "precision" not in plain["train"]
    assert "precision" not in ROUTER_DEMO.to_dict()["train"]
    assert Recipe.from_dict(plain) == recipe


def test_what_is_new_is_written_read_and_told_apart() -> None:
    start = StartWeights("DiT-XL-2.safetensors", "ab" * 32, 7)
    changed = replace(with_objective(DEMO, "noise").with_train(precision="bf16"), start=start)
    again = Recipe.from_dict(changed.to_dict())
    assert again == changed
    assert len({DEMO.digest(), changed.digest(), replace(changed, start=None).digest()}) == 3
    plain = changed.to_dict()
    plain["start"]["url"] = "https://example.org"
    with pytest.raises(ValueError, match="does not know: url"):
        Recipe.from_dict(plain)


@pytest.mark.parametrize(
    ("name", "digest", "length"), [("../up", "ab" * 32, 1), ("a", "AB" * 32, 1), ("a", "ab", 1), ("a", "ab" * 32, 0)]
)
def test_start_weights_are_a_plain_name_a_digest_and_a_length(name: str, digest: str, length: int) -> None:
    with pytest.raises(ValueError, match=r"start\."):
        StartWeights(name, digest, length)


def test_a_size_changes_the_network_alone() -> None:
    base = with_objective(named_recipe("tiny"), "noise")
    small = with_size(base, "S/2")
    assert (small.model.hidden, small.model.depth, small.model.patch) == (384, 12, 2)
    for name in ("channels", "resolution", "text_dim", "text_tokens", "output", "path", "data_limit"):
        assert getattr(small.model, name) == getattr(base.model, name)
    assert small.train == base.train


@pytest.mark.parametrize(
    ("settings", "output", "path", "loss", "times"),
    [
        ({"objective": "noise"}, "noise", "cosine", "noise", "uniform"),
        ({"objective": "noise", "path": "flow"}, "noise", "flow", "noise", "logit-normal"),
        ({"objective": "data"}, "data", "flow", "velocity", "logit-normal"),
        ({"objective": "data", "path": "cosine"}, "data", "cosine", "data", "uniform"),
        ({"objective": "velocity", "t_sampling": "uniform"}, "velocity", "flow", "velocity", "uniform"),
        ({"objective": "noise", "t_sampling": "logit-normal"}, "noise", "cosine", "noise", "logit-normal"),
    ],
)
def test_an_objective_brings_its_usual_path_loss_and_times_unless_told_otherwise(
    settings: dict[str, str], output: str, path: str, loss: str, times: str
) -> None:
    found = with_settings(DEMO, settings)
    assert (found.model.output, found.model.path) == (output, path)
    assert (found.train.loss, found.train.t_sampling) == (loss, times)


def test_data_read_out_of_noise_is_clipped_to_what_pixels_can_be_and_latents_have_room() -> None:
    assert with_objective(DEMO, "noise").model.data_limit == 1.0
    assert with_objective(named_recipe("XL/2"), "noise").model.data_limit == 20.0
    assert with_objective(with_objective(DEMO, "noise"), "velocity").model.data_limit == 20.0


def test_every_setting_is_named_once_and_the_data_s_are_not_among_them() -> None:
    names = setting_names()
    assert len(names) == len(set(names))
    assert {"size", "objective", "path", "precision", "lr", "steps", "adaln", "patch_skip"} <= set(names)
    assert not {"channels", "resolution", "text_dim", "text_tokens", "seed", "output"} & set(names)
    values = with_settings(DEMO, {"patch_skip": "false", "lr": "1e-4", "steps": "7", "precision": "fp32"})
    assert values.model.patch_skip is False
    assert (values.train.lr, values.train.steps, values.train.precision) == (1e-4, 7, "fp32")


def test_kinds_are_called_by_their_named_size_where_they_have_one() -> None:
    assert describe(named_recipe("B/2")) == {"size": "B/2", "objective": "velocity", "precision": "any"}
    own = Recipe(ModelConfig(hidden=96, heads=3, output="noise", path="cosine"), TrainConfig(loss="noise"))
    assert describe(own)["size"] == "96 x 4"
    assert describe(own)["objective"] == "noise, cosine path"
