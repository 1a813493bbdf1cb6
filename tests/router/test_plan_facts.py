"""What a plan must say of its data, and the sentence where it does not."""

from __future__ import annotations

from typing import Any

import pytest

from paris_swarm.cli.exits import USAGE, exit_code
from paris_swarm.router.plan_facts import encoder_facts, picture_side, size_fact

SAID = {"name": "a", "digest": "b", "dim": 8}


@pytest.mark.parametrize(
    "data", [{}, {"text": None}, {"text": "clip"}, {"text": {"name": "a"}}, {"text": SAID | {"digest": 1}}]
)
def test_an_encoder_that_is_not_named_is_an_error_of_usage(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"does not say its text encoder \(its data\.text\.name") as told:
        encoder_facts(data, "text", "its text encoder")
    assert exit_code(told.value) == USAGE
    assert encoder_facts({"text": SAID}, "text", "its text encoder") == SAID


@pytest.mark.parametrize("value", [None, 0, -1, 2.0, True, "8", 1 << 40])
def test_a_size_is_a_whole_number_of_a_kind_that_fits_in_memory(value: object) -> None:
    with pytest.raises(ValueError, match=r"data\.text\.dim"):
        size_fact({"text": {"dim": value}}, "text.dim", "how wide it is")
    for data in ({}, {"text": 3}):
        with pytest.raises(ValueError, match=r"data\.text\.dim"):
            size_fact(data, "text.dim", "how wide it is")
    assert size_fact({"text": SAID}, "text.dim", "how wide it is") == 8


def test_the_side_of_a_picture_is_the_vaes_where_there_is_one() -> None:
    assert picture_side({"resolution": 24}) == 24
    assert picture_side({"resolution": 32, "latents": {"pixels": 256}}) == 256
    for data in ({}, {"resolution": 32, "latents": {}}, {"latents": {"pixels": "256"}}):
        with pytest.raises(ValueError, match="the size of its pictures"):
            picture_side(data)
