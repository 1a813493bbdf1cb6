"""`--claim-cluster` alone means auto and never swallows INVITE, in whatever order people type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.cli import exits
from paris_swarm.cli.app import run
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


@pytest.mark.parametrize("word", ["three", "-1", "1.5", "", "²"])
def test_a_cluster_that_is_no_number_is_said(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = [INVITE, f"--claim-cluster={word}", "--data", str(tmp_path), "--home", str(tmp_path / "home")]
    assert run(["join", *said]) == exits.USAGE
    assert f"--claim-cluster {word}: a cluster's number, auto, or nothing" in capsys.readouterr().err


def test_a_direct_port_that_no_peer_would_dial_is_refused() -> None:
    """R-TLS-1"""
    for port in ("1", "80", "1023"):
        with pytest.raises(typer.BadParameter, match="1024 to 65535"):
            parsed("--direct-port", port)
    for port in ("0", "1024", "65535"):
        assert parsed("--direct-port", port)["direct_port"] == int(port)


WORDS = st.sampled_from(["--claim-cluster", "auto", "7", INVITE, "--data", "d", "--json", "--claim-router"])


@given(st.lists(WORDS, max_size=8))
def test_only_auto_is_ever_added_and_nothing_is_lost(words: list[str]) -> None:
    out = with_auto(words)
    rest = iter(out)
    assert all(word in rest for word in words)  # the words, in their order
    assert out.count(INVITE) == words.count(INVITE)
    assert set(out) <= {*words, "auto"}
    assert with_auto(out) == out
