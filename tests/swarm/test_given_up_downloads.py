"""A download that is cancelled holds nothing afterwards: no root, no file."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest
from test_fetch_bounds import made, noise
from test_fetching import Cast
from worlds import MemoryWorld, run

from paris_swarm.dht_schemas.digest import CHUNK
from paris_swarm.swarm import partial_file
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.store_locks import Use


def test_one_cancelled_as_it_begins_to_use_its_root_lets_go_of_it(
    memory_world: MemoryWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise `store gc` could not delete the root while this process lives."""
    wanted = made(tmp_path / "checkpoint", {"noise.bin": noise(0, 100)})
    taken = threading.Event()

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source, receiver = await cast.source(wanted), await cast.receiver()
            use = receiver.store.use

            def using(root: str) -> Use:
                found = use(root)
                taken.set()
                return found

            monkeypatch.setattr(receiver.store, "use", using)
            given_up = asyncio.create_task(receiver.fetch(wanted, [source.peer_id]))
            await asyncio.sleep(0)
            assert taken.wait(30)  # the loop stands still: the download has not been told
            given_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await given_up
            assert not receiver.store.in_use(wanted.root)
            assert not ContentStore(receiver.store.folder).in_use(wanted.root)

    run(scenario())


def test_a_file_that_is_let_go_can_be_taken_up_at_once_though_it_is_still_being_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = made(tmp_path / "checkpoint", {"noise.bin": noise(0, 2 * CHUNK)})
    (entry,), data = wanted.entries, (wanted.folder / "noise.bin").read_bytes()
    flushing, go_on = threading.Event(), threading.Event()
    real = os.fdatasync

    def slow(descriptor: int) -> None:
        flushing.set()
        assert go_on.wait(30)
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)
    monkeypatch.setattr(partial_file, "SYNC_BYTES", CHUNK)
    store = ContentStore(tmp_path / "store")
    store.begin(wanted.root, wanted.entries, kind="checkpoint")
    first = store.open_partial(wanted.root, entry)
    try:
        first.write(0, data[:CHUNK])
        assert flushing.wait(30)
        first.close()
        with ContentStore(store.folder).open_partial(wanted.root, entry) as second:
            assert second.missing == [1]
            go_on.set()
            second.write(1, data[CHUNK:])
            second.finish()
    finally:
        go_on.set()
    assert store.path(wanted.root, "noise.bin").read_bytes() == data
