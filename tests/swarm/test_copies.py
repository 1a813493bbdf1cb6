"""Copies that an assembler keeps: announced by whatever process of its home serves, so that they outlive the author."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_peer_life import FILES, Swarm, told, until
from worlds import until as until_true

from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.memory import MemoryTransport
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.transport import NoSource


async def node_of(swarm: Swarm, home: Home, *, observer: bool = False, limit: int | None = None) -> SwarmNode:
    identity = Identity.generate() if observer else home.identity()
    seeds = [address for life in swarm.lives[:1] for address in await life.node.transport.addresses()]
    transport = await MemoryTransport.start(swarm.network, identity.peer_id, seeds=seeds, observer=observer)
    node = SwarmNode(home, identity, transport, swarm.plan, observer=observer, store_limit=limit)
    await node.join()
    return node


def test_what_was_assembled_outlives_its_author(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        await swarm.join("seed", cluster="1")
        author = await swarm.join("author", cluster="0")
        await until(author.is_training)
        author.open(1)
        await until(lambda: author.peer.lanes[0].published_step == 1)
        home = Home(tmp_path / "assembler")
        serving = await node_of(swarm, home)  # a `join` or `bootstrap` of this home that runs already
        assembling = await node_of(swarm, home, observer=True)
        reader = await node_of(swarm, Home(tmp_path / "reader"))
        try:
            await assembling.refresh(["0"])
            [candidate] = assembling.candidates("0")
            await assembling.fetch_checkpoint(candidate, names=[FILES[0]])
            await assembling.keep_copy("0", candidate.envelope)
            assert assembling.store.in_use(candidate.announcement.root)
            await assembling.close()
            assert not serving.store.in_use(candidate.announcement.root)

            holders: list[tuple[str, ...]] = []

            async def announced() -> bool:
                await reader.refresh(["0"])
                holders[:] = [found.holders for found in reader.candidates("0")]
                return bool(holders) and serving.identity.peer_id in holders[0]

            await until_true(announced)
            swarm.kill(author)
            [found] = reader.candidates("0")
            assert found.announcement.author == author.node.identity.peer_id
            folder = await reader.fetch_checkpoint(found, names=[FILES[0]])
            assert (folder / FILES[0]).exists()
            with pytest.raises(NoSource):
                await reader.fetch_checkpoint(found)  # a copy for sampling is not all that a successor needs
        finally:
            await serving.close()
            await reader.close()

    told(tmp_path, story)


def test_a_peers_own_checkpoint_comes_before_a_copy(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        author = await swarm.join("author", cluster="0")
        await until(author.is_training)
        author.open(1)
        await until(lambda: author.peer.lanes[0].published_step == 1)
        node = author.node
        [first] = node.candidates("0")
        author.open(1)
        await until(lambda: author.peer.lanes[0].published_step == 2)
        await node.keep_copy("0", first.envelope)
        assert node.voice.to_announce()["0"] == node.files.held()["0"]
        assert first.envelope != node.files.held()["0"]

    told(tmp_path, story)


def test_a_full_quota_keeps_no_copy_and_ends_no_peer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story(swarm: Swarm) -> None:
        author = await swarm.join("author", cluster="0")
        await until(author.is_training)
        idle = await swarm.join("idle", cluster="0", start=False)
        idle.node.store.limit = 10
        idle.start()
        author.open(1)
        await until(lambda: author.peer.lanes[0].published_step == 1)
        await until(lambda: "no copy of" in caplog.text)
        assert idle.running is not None
        assert not idle.running.done()
        assert not idle.node.store.has(author.node.last_root("0") or "")
        idle.node.store.limit = None
        root = author.node.last_root("0")
        assert root is not None
        await until(lambda: idle.node.store.has(root))

    told(tmp_path, story)


def test_a_ledger_that_cannot_be_written_does_not_end_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was seen of others is kept in memory, and written down by the next look that can."""

    async def story(swarm: Swarm) -> None:
        author = await swarm.join("author", cluster="0")
        await until(author.is_training)
        reader = await node_of(swarm, Home(tmp_path / "reader"))

        def full(_highest: object) -> None:
            raise OSError(28, "No space left on device")

        try:
            with monkeypatch.context() as broken:
                broken.setattr(reader.files.ledger, "remember", full)
                await reader.refresh(["0"])
            signer = author.node.identity.peer_id
            assert reader.slot_view("0").live(reader.clock()).keys() == {signer}
            await reader.refresh(["0"])
            assert any(author[0] == signer for author in reader.files.ledger.highest())
        finally:
            await reader.close()

    told(tmp_path, story)
