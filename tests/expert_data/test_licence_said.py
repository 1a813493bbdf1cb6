"""What a person says of their own pictures goes into the manifest, and from there into the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paris_swarm.cli.tasks import data_facts
from paris_swarm.expert.data.prepare import prepare
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.data.sources import MAX_LICENCE, MAX_ORIGIN, PrepareError, Stated


def test_licence_and_origin_are_in_the_manifest_and_in_what_a_plan_says(
    photo_folder: Callable[..., Path], encoders: dict[str, Any], tmp_path: Path
) -> None:
    source = photo_folder()
    said = {"licence": "CC-BY-4.0", "origin": "https://example.org/my-photos"}
    prepare(source, tmp_path / "data", resolution=16, **encoders, **said)
    facts = data_facts(PreparedData.open(tmp_path / "data"))
    assert facts["licences"] == [
        {"what": "the images of the folder, as said by who prepared them", "name": "CC-BY-4.0"}
    ]
    assert facts["source"]["origin"] == "https://example.org/my-photos"
    assert facts["source"]["kind"] == "imagefolder"
    prepare(source, tmp_path / "silent", resolution=16, **encoders)
    silent = data_facts(PreparedData.open(tmp_path / "silent"))
    assert [item["name"] for item in silent["licences"]] == ["not stated"]
    assert "origin" not in silent["source"]


def test_a_licence_that_the_source_names_is_kept_beside_it() -> None:
    facts = {"source": {"kind": "datasets"}, "licences": [{"what": "the images of the dataset", "name": "mit"}]}
    said = Stated("all rights reserved").added(facts)
    assert [item["name"] for item in said["licences"]] == ["mit", "all rights reserved"]
    assert said["source"] == {"kind": "datasets"}
    assert [item["name"] for item in facts["licences"]] == ["mit"], "what was handed in is left as it was"


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("licence", ""),
        ("licence", "  "),
        ("licence", "x" * (MAX_LICENCE + 1)),
        ("licence", "MIT\nlicense: cc0-1.0"),
        ("origin", "o" * (MAX_ORIGIN + 1)),
        ("origin", "\x1b[31mred"),
        ("origin", "a right-to-left \u202e mark"),
        ("origin", "\udcff"),
    ],
)
def test_what_is_said_is_one_short_line_of_plain_text(tmp_path: Path, option: str, text: str) -> None:
    with pytest.raises(PrepareError, match=f"--{option}"):
        prepare(tmp_path, tmp_path / "out", **{option: text})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_drawn_pictures_speak_for_themselves(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="pictures of your own"):
        prepare("dicebear", tmp_path / "out", licence="MIT")
