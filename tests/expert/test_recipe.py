from dataclasses import replace

import pytest

from paris_swarm.expert.recipe import DEMO, SIZES, ModelConfig, Recipe, TrainConfig, named_recipe


def test_a_recipe_survives_the_plan() -> None:
    for name in SIZES:
        recipe = named_recipe(name)
        again = Recipe.from_dict(recipe.to_dict())
        assert again == recipe
        assert again.digest() == recipe.digest()


def test_any_changed_value_changes_the_digest() -> None:
    assert DEMO.with_train(seed=1).digest() != DEMO.digest()
    assert replace(DEMO, model=replace(DEMO.model, mlp_ratio=2.0)).digest() != DEMO.digest()


@pytest.mark.parametrize(
    ("part", "field", "value", "word"),
    [
        ("model", "hidden", "192", "model.hidden must be int"),
        ("model", "hidden", True, "model.hidden must be int"),
        ("model", "colour", 1, "does not know: colour"),
        ("train", "lr", None, "train.lr must be float"),
        ("train", "optimizer", "sgd", "adamw, muon"),
        ("train", "steps", 0, "train.steps must be at least 1"),
        ("train", "ema", 1.0, "train.ema"),
        ("train", "t_mean", float("inf"), "train.t_mean"),
        ("model", "patch", 5, "does not divide"),
    ],
)
def test_a_wrong_field_is_named(part: str, field: str, value: object, word: str) -> None:
    plain = DEMO.to_dict()
    plain[part][field] = value
    with pytest.raises(ValueError, match=word):
        Recipe.from_dict(plain)


def test_a_missing_field_is_named() -> None:
    plain = DEMO.to_dict()
    del plain["train"]["batch"]
    with pytest.raises(ValueError, match="train lacks: batch"):
        Recipe.from_dict(plain)


def test_whole_numbers_serve_as_floats() -> None:
    plain = DEMO.to_dict()
    plain["train"]["weight_decay"] = 0
    assert Recipe.from_dict(plain).train.weight_decay == 0.0


def test_an_unknown_recipe_lists_the_names() -> None:
    with pytest.raises(ValueError, match="XL/2"):
        named_recipe("huge")


def test_rates_warm_up_hold_and_end_near_zero() -> None:
    config = TrainConfig(steps=100, warmup_steps=9, schedule="wsd", decay_share=0.5)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == rates[50] == 1.0
    assert 0 < rates[99] <= 0.02
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_a_cosine_schedule_falls_from_one_to_nothing() -> None:
    config = TrainConfig(steps=100, warmup_steps=0, schedule="cosine")
    rates = [config.rate(step) for step in range(101)]
    assert rates[0] == 1.0 and rates[50] == pytest.approx(0.5) and rates[100] == pytest.approx(0.0)
    assert rates == sorted(rates, reverse=True)


def test_the_average_forgets_the_initial_weights_first() -> None:
    config = TrainConfig(ema=0.999)
    assert config.ema_decay(0) == pytest.approx(0.1)
    assert config.ema_decay(10**6) == 0.999


def test_tokens_are_counted() -> None:
    assert ModelConfig(resolution=24, patch=4).tokens == 36
