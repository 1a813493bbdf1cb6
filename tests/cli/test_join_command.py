"""`--claim-cluster` alone means auto and never swallows INVITE, in whatever order people type."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.cli.verbs.join import JoinCommand, join, with_auto

INVITE = "paris:" + "a" * 64


def parsed(*words: str) -> dict[str, Any]:
    """What `join` would be called with."""
    app = typer.Typer()
    app.command(cls=JoinCommand)(join)
    command = typer.main.get_command(app)
    return command.make_context("join", list(words)).params


@pytest.mark.parametrize(
    ("words", "cluster"),
    [
        ([INVITE, "--claim-cluster"], "auto"),
        (["--claim-cluster", INVITE], "auto"),
        (["--claim-cluster", "auto", INVITE], "auto"),
        ([INVITE, "--claim-cluster", "auto"], "auto"),
        (["--claim-cluster", "3", INVITE], "3"),
        ([INVITE, "--claim-cluster", "3"], "3"),
        (["--claim-cluster=3", INVITE], "3"),
        (["--claim-cluster=auto", INVITE], "auto"),
        (["--claim-cluster", "--", INVITE], "auto"),
        (["--claim-cluster", "--data", "d", INVITE], "auto"),
        (["--data", "d", "--claim-cluster", INVITE], "auto"),
        (["--data", "d", INVITE, "--claim-cluster", "--claim-router"], "auto"),
        (["--home", "h", "--claim-cluster", INVITE, "--json"], "auto"),
        ([INVITE], None),
        (["--claim-router", INVITE], None),
    ],
)
def test_every_order(words: list[str], cluster: str | None) -> None:
    params = parsed(*words)
    assert params["invite"] == INVITE
    assert params["claim_cluster"] == cluster


def test_without_invite_the_last_swarm_is_meant() -> None:
    assert parsed("--claim-cluster")["invite"] is None
    assert parsed("--claim-cluster", "2")["claim_cluster"] == "2"


WORDS = st.sampled_from(["--claim-cluster", "auto", "7", INVITE, "--data", "d", "--json", "--claim-router"])


@given(st.lists(WORDS, max_size=8))
def test_only_auto_is_ever_added_and_nothing_is_lost(words: list[str]) -> None:
    out = with_auto(words)
    rest = iter(out)
    assert all(word in rest for word in words)  # the words, in their order
    assert out.count(INVITE) == words.count(INVITE)
    assert set(out) <= {*words, "auto"}
    assert with_auto(out) == out
