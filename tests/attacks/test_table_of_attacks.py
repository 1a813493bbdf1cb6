"""Every attack test is in docs/attacks.md, and every row there is an attack test."""

from __future__ import annotations

import json
import re

from attack_table import FIGURES, PAGE, page, rows

from paris_swarm import dht_schemas


def test_the_page_is_what_the_tests_and_the_last_figures_say() -> None:
    assert PAGE.read_text("utf-8") == page(json.loads(FIGURES.read_text("utf-8"))), (
        "docs/attacks.md is out of date: run tests/attacks/attack_table.py (its docstring says how)"
    )


def test_every_attack_has_a_figure_and_every_figure_an_attack() -> None:
    names = [row.test for _title, attacks in rows() for row in attacks]
    assert len(names) == len(set(names))
    assert set(json.loads(FIGURES.read_text("utf-8"))) == set(names)


def test_the_rules_named_exist() -> None:
    from importlib.resources import files

    spec = files(dht_schemas).joinpath("SPEC.md").read_text("utf-8")
    for _title, attacks in rows():
        for row in attacks:
            for rule in re.findall(r"R-[A-Z]+-[0-9]+", row.rule):
                assert f"**{rule}**" in spec, f"{row.test} names {rule}"
