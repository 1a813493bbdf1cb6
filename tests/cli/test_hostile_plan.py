"""A plan is its organiser's word: whatever it says, whoever opens it reads one sentence about it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from paris_swarm.cli import exits
from paris_swarm.cli.plan_folder import CENTROIDS_FILE, HELD_OUT_FILE, PlanFolder
from paris_swarm.cli.tasks import check_data


def opened(folder: Path, **data: Any) -> PlanFolder:
    plan = SimpleNamespace(plan_id="ab" * 32, plan=SimpleNamespace(data=data))
    return PlanFolder(folder, plan)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tensors",
    [
        None,
        {"others": np.zeros((2, 2), np.float32)},
        {"centroids": np.zeros(4, np.float32), "digests": np.zeros(16, np.uint8)},
        {"centroids": np.zeros((2, 2), np.int64), "digests": np.zeros((2, 16), np.int64)},
    ],
)
def test_tables_that_are_none_are_named(tmp_path: Path, tensors: dict[str, np.ndarray] | None) -> None:
    for name in (CENTROIDS_FILE, HELD_OUT_FILE):
        if tensors is not None:
            save_file(tensors, tmp_path / name)
    with pytest.raises(exits.Unverified, match=r"abababababab cannot be used: .*centroids"):
        opened(tmp_path).centroids()
    with pytest.raises(exits.Unverified, match=r"cannot be used: .*held_out"):
        opened(tmp_path).held_out()


def test_a_table_that_is_no_safetensors_file_is_named(tmp_path: Path) -> None:
    (tmp_path / CENTROIDS_FILE).write_bytes(b"\xff" * 100)
    for read in (opened(tmp_path).centroids, opened(tmp_path).biases):
        with pytest.raises(exits.Unverified, match="cannot be read"):
            read()


@pytest.mark.parametrize("said", ["minilm", ["x"], 7, None, {"name": "\x1b[2Jother"}, {"name": "x" * 60_000}])
def test_facts_of_any_form_are_compared_not_tripped_over(said: object) -> None:
    manifest = {
        "source": {},
        "licences": [],
        "channels": 3,
        "text": {"name": "minilm", "digest": "0", "dim": 4},
        "features": {"name": "lite0", "digest": "1", "dim": 4, "size": 80},
    }
    data = SimpleNamespace(manifest=manifest, count=1, resolution=8, folder="rows")
    plan = opened(Path(), resolution=8, channels=3, text=said, features=said, latents=said)
    with pytest.raises(ValueError, match="text encoder name minilm, the plan asks for") as refused:
        check_data(plan, data)  # type: ignore[arg-type]
    message = exits.words(refused.value)
    assert "\x1b" not in message and len(message) < 1000


def test_a_terminal_gets_nothing_to_act_on() -> None:
    assert exits.words(ValueError("two\nlines, Ünïcode")) == "two\nlines, Ünïcode"
    assert exits.words(ValueError("\x1b]0;title\x07 \u202eback \udcff")) == "\\x1b]0;title\\x07 \\u202eback \\udcff"
