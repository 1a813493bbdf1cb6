"""Which published checkpoint a local one grew from, and what is left of old ones (over the in-memory network)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from test_peer_life import FILES, make_plan
from worlds import run

from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.dht_schemas.provenance import Environment
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.lane_state import RunningLane
from paris_swarm.swarm.memory import MemoryNetwork, MemoryTransport
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.slot_training import SlotTraining
from paris_swarm.swarm.trainer import TrainedCheckpoint


async def started(folder: Path) -> SwarmNode:
    home = Home(folder)
    identity = home.identity()
    transport = await MemoryTransport.start(MemoryNetwork(seed=0), identity.peer_id, seeds=[])
    node = SwarmNode(home, identity, transport, make_plan())
    await node.join()
    return node


def facts(code: str, since: int) -> dict[str, Any]:
    """What a trainer with this code says of its training since a step."""
    environment = Environment(
        device="cpu",
        chip="made up",
        precision="fp32",
        threads=1,
        flush_denormal=True,
        deterministic=False,
        tf32=False,
        torch="2",
        package=code,
    )
    rows = {"digest": "ab" * 32, "count": 3}
    said = {"v": 1, "seed": 0, "recipe": "cd" * 32, "rows": rows, "environment": environment.model_dump()}
    return {**said, "from_step": since}


async def published(node: SwarmNode, scratch: Path, step: int, parent: str | None, *, own: bool = True) -> str:
    """A checkpoint in the node's store: announced by it, or only fetched from somebody."""
    scratch.mkdir(exist_ok=True)
    for name in FILES:
        save_file({"w": np.array([step, 0], dtype=np.float32)}, scratch / name)
    manifest, data, root = build_manifest(scratch, FILES, "0", meta={"step": step, "parent": parent})
    node.store.put_folder(data, scratch)
    if own:
        size = manifest.total_bytes
        await node.announce("0", step=step, root=root, parent=parent, total_bytes=size, probe_loss=1.0 / step)
    return root


def test_a_local_checkpoint_grew_from_the_newest_of_ours_before_it(tmp_path: Path) -> None:
    async def story() -> None:
        node = await started(tmp_path / "home")
        assert node.grown_from("0", 5, None) is None, "nothing was published: fresh weights"
        ten = await published(node, tmp_path / "a", 10, None)
        twenty = await published(node, tmp_path / "b", 20, ten)
        assert node.grown_from("0", 25, None) == twenty
        assert node.grown_from("0", 20, None) == twenty
        assert node.grown_from("0", 15, None) == ten, "the newer local one was damaged: the one before it serves"
        assert node.grown_from("0", 5, None) is None
        await node.close()

    run(story())


def test_a_run_that_began_elsewhere_does_not_claim_our_earlier_one_as_its_parent(tmp_path: Path) -> None:
    async def story() -> None:
        node = await started(tmp_path / "home")
        mine = await published(node, tmp_path / "a", 10, None)
        fetched = await published(node, tmp_path / "b", 50, "ab" * 32, own=False)
        assert node.grown_from("0", 60, fetched) == fetched, "it crashed before it published anything of this run"
        next_one = await published(node, tmp_path / "c", 70, fetched)
        assert node.grown_from("0", 75, fetched) == next_one
        assert node.grown_from("0", 65, fetched) == fetched
        node.store.delete(fetched)
        assert node.grown_from("0", 75, fetched) == next_one, "its own, though nobody holds the first parent any more"
        assert node.grown_from("0", 65, fetched) == fetched
        assert mine not in (node.grown_from("0", 65, fetched), node.grown_from("0", 75, fetched))
        await node.close()

    run(story())


def test_steps_that_other_code_took_are_no_part_of_a_link_that_names_this_one(tmp_path: Path) -> None:
    """What an earlier run left is published first, under its own facts; where it cannot be, nothing is said."""

    def left(step: int, code: str, since: int) -> TrainedCheckpoint:
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        for name in FILES:
            save_file({"w": np.array([step, 0], dtype=np.float32)}, folder / name)
        return TrainedCheckpoint(step, folder, FILES, 1.0 / step, facts(code, since))

    async def story() -> None:
        node = await started(tmp_path / "home")
        training = SlotTraining(node, None, start_trainer=None, local_checkpoint=None, keep_checkpoints=2)  # type: ignore[arg-type]
        lane = RunningLane("a", ("0",), "0")
        ten = await training._publish(lane, "0", left(10, "old", 0), None)
        twenty = await training._publish(lane, "0", left(20, "new", 10), ten)
        assert twenty is not None and ten is not None
        said = [manifest.provenance for root in (ten, twenty) if (manifest := node.stored_manifest(root))]
        told = [(link.from_step, link.to_step, link.environment.package) for link in said if link is not None]
        assert told == [(0, 10, "old"), (10, 20, "new")]
        torn = await training._publish(lane, "0", left(40, "newest", 30), twenty)
        assert torn is not None
        manifest = node.stored_manifest(torn)
        assert manifest is not None
        assert (manifest.parent, manifest.step) == (twenty, 40)
        assert manifest.provenance is None, "steps 20 to 30 are somebody else's: better no word than a wrong one"
        await node.close()

    run(story())


def test_old_files_go_and_their_manifests_stay(tmp_path: Path) -> None:
    async def story() -> None:
        node = await started(tmp_path / "home")
        roots: list[str] = []
        for step in (10, 20, 30, 40):
            roots.append(await published(node, tmp_path / "w", step, roots[-1] if roots else None))
            node.forget_older("0", roots[-1], keep=2)
        assert [node.store.has(root) for root in roots] == [False, False, True, True]
        assert [node.stored_step(root) for root in roots] == [10, 20, 30, 40]
        assert node.stored_step(None) == 0
        assert node.stored_step("ab" * 32) is None
        await node.close()

    run(story())


def test_what_an_earlier_run_published_is_let_go_of_by_the_next(tmp_path: Path) -> None:
    async def story() -> None:
        roots: list[str | None] = [None]
        for run_of in range(2):
            node = await started(tmp_path / "home")
            for number in range(2):
                step = 10 * (2 * run_of + number + 1)
                root = await published(node, tmp_path / f"at-{step}", step, roots[-1])
                node.forget_older("0", root, keep=2)
                roots.append(root)
            await node.close()
        assert [node.store.has(root) for root in roots[1:] if root] == [False, False, True, True]

    run(story())
