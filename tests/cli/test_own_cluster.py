"""`prepare --plan --cluster`: a peer keeps the rows of its own cluster and no others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from swarm_processes import Answer, done, verb

from paris_swarm.cli.own_cluster import claimed_cluster
from paris_swarm.cli.plan_folder import open_plan_folder
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.router.partition import nearest


@pytest.fixture(scope="module")
def kept(plan: Answer, own_folder: Path, room: Path) -> list[PreparedData]:
    """The two clusters of the plan, prepared apart."""
    folders = [room / f"own-{k}" for k in range(2)]
    for k, folder in enumerate(folders):
        said = done(
            verb("prepare", own_folder, folder, "--plan", room / "plan", "--cluster", k, "--workers", 1, "--json")
        )
        assert said.json["resolution"] == 12  # the plan's, unasked
    return [PreparedData.open(folder, verify=True) for folder in folders]


def test_the_clusters_prepared_apart_are_the_whole(kept: list[PreparedData], data: Path, room: Path) -> None:
    whole = PreparedData.open(data)
    labels = nearest(whole.features(), open_plan_folder(room / "plan").centroids())
    for k, part in enumerate(kept):
        own = {row.tobytes() for row in whole.digests[labels == k]}
        assert {row.tobytes() for row in part.digests} == own
        assert part.manifest["kept"]["of"] == whole.count
        rows = [int(np.flatnonzero((whole.digests == digest).all(1))[0]) for digest in part.digests]
        np.testing.assert_array_equal(part.pixels(range(part.count)), whole.pixels(rows))
    assert sum(part.count for part in kept) == whole.count
    leftovers = [path for path in kept[0].folder.parent.iterdir() if path.name.startswith(".own-")]
    assert not leftovers


def test_what_does_not_fit_the_plan_is_refused(plan: Answer, own_folder: Path, room: Path) -> None:
    for arguments, words in (
        (["--plan", room / "plan", "--cluster", 2], "clusters 0 to 1"),
        (["--plan", room / "plan", "--cluster", 0, "--resolution", 24], "12 pixels"),
        (["--cluster", 0], "--plan"),
        (["--plan", room / "nowhere", "--cluster", 0], "neither a plan folder"),
    ):
        said = verb("prepare", own_folder, room / "refused", *arguments)
        assert said.code == 2, said.said
        assert words in " ".join(said.said.split())
    assert not (room / "refused").exists()


def test_join_claims_the_cluster_the_data_was_kept_for(kept: list[PreparedData], data: Path) -> None:
    plan_id = json.loads((kept[1].folder / "manifest.json").read_text())["kept"]["plan"]
    assert claimed_cluster("auto", kept[1].folder, plan_id) == "1"
    assert claimed_cluster("1", kept[1].folder, plan_id) == "1"
    assert claimed_cluster("auto", data, plan_id) == "auto"
    assert claimed_cluster(None, kept[1].folder, plan_id) is None
    with pytest.raises(ValueError, match="cluster 1 only"):
        claimed_cluster("0", kept[1].folder, plan_id)
    with pytest.raises(ValueError, match="not of 000000000000"):
        claimed_cluster("auto", kept[1].folder, "0" * 64)
