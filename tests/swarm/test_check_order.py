"""Plan, admission, announcement, manifest, chunks, header: each has its own error, and nothing later is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from closed_world import Closed, closed
from safetensors.numpy import save_file

from paris_swarm.dht_schemas.errors import BadHeader, BadManifest, NotAdmitted, RecordError, Revoked
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.swarm.fetching import BadChunk
from paris_swarm.swarm.memory import StreamFaults
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.transport import Stream


class Watched:
    """Two guests of a closed swarm: one announces, the other's streams and header reads are counted."""

    def __init__(self, swarm: Closed, author: SwarmNode, reader: SwarmNode) -> None:
        self.swarm, self.author, self.reader = swarm, author, reader
        self.streams = 0
        self.headers = 0
        opening, feeding = reader.transport.open_stream, reader.trusted.feed_header

        async def open_stream(peer_id: str, *, addresses: Sequence[str] = ()) -> Stream:
            self.streams += 1
            return await opening(peer_id, addresses=addresses)

        def feed_header(*arguments: Any) -> None:
            self.headers += 1
            feeding(*arguments)

        reader.transport.open_stream = open_stream  # type: ignore[method-assign]
        reader.trusted.feed_header = feed_header  # type: ignore[method-assign]

    async def publish(self, *, shape: int = 2, step: int = 4, announced: int = 4) -> None:
        folder = self.swarm.folder / "checkpoint"
        folder.mkdir()
        save_file({"w": np.zeros(shape, dtype=np.float32)}, folder / "ema.safetensors")
        manifest, data, root = build_manifest(folder, ["ema.safetensors"], "0", meta={"step": step, "parent": None})
        self.author.store.put_folder(data, folder)
        await self.author.announce(
            "0", step=announced, root=root, parent=None, total_bytes=manifest.total_bytes, probe_loss=1.0
        )
        await self.reader.refresh(["0"])

    @property
    def chunk_bytes(self) -> int:
        return self.reader.counters.total("received", "checkpoint").wire

    async def fetched(self) -> None:
        [candidate] = self.reader.candidates("0")
        await self.reader.fetch_checkpoint(candidate)


def watched(tmp_path: Path, story: Any) -> None:
    async def told(swarm: Closed) -> None:
        swarm.invite("author")
        swarm.invite("reader")
        author, reader = await swarm.node("author"), await swarm.node("reader")
        await reader.gossip()  # the greeting at the start is over
        await story(Watched(swarm, author, reader))

    closed(tmp_path, told)


def test_a_good_checkpoint_passes_every_step(tmp_path: Path) -> None:
    async def story(seen: Watched) -> None:
        await seen.publish()
        await seen.fetched()
        assert (seen.headers, seen.chunk_bytes > 0, seen.streams > 0) == (1, True, True)

    watched(tmp_path, story)


@pytest.mark.parametrize("why", ["not admitted", "revoked"])
def test_nothing_is_asked_for_in_the_name_of_an_author_who_does_not_count(tmp_path: Path, why: str) -> None:
    async def story(seen: Watched) -> None:
        if why == "revoked":
            seen.reader.trusted.feed_notice(seen.swarm.notice(1, seen.author))
        else:
            seen.author.door.token = None
            seen.author.sightings.feed_holding = lambda *_: None  # type: ignore[assignment, method-assign, return-value]
        await seen.publish()
        error: type[RecordError] = Revoked if why == "revoked" else NotAdmitted
        holding = seen.author.files.ledger.last("holding", "0")
        assert holding is not None
        with pytest.raises(error):
            seen.reader.trusted.feed_holding(holding, seen.reader.clock())
        assert seen.reader.candidates("0") == []
        assert seen.streams == 0

    watched(tmp_path, story)


def test_no_chunk_is_asked_for_when_the_manifest_is_not_what_was_announced(tmp_path: Path) -> None:
    async def story(seen: Watched) -> None:
        await seen.publish(step=4, announced=5)
        with pytest.raises(BadManifest, match="step 5"):
            await seen.fetched()
        assert (seen.chunk_bytes, seen.headers) == (0, 0)

    watched(tmp_path, story)


def test_no_header_is_read_when_a_chunk_does_not_match(tmp_path: Path) -> None:
    async def story(seen: Watched) -> None:
        await seen.publish()
        [candidate] = seen.reader.candidates("0")
        _manifest, data = await seen.reader.fetch_manifest(candidate)
        seen.reader.store.put_blob(data)
        greeting = len(seen.author.door.greeting()) + 16
        seen.swarm.network.set_faults(seen.author.transport.peer_id, StreamFaults(flip_at=greeting + 12 + 20))
        with pytest.raises(BadChunk):
            await seen.reader.fetch_checkpoint(candidate)
        assert seen.headers == 0

    watched(tmp_path, story)


def test_weights_of_other_shapes_than_the_plans_are_refused_by_their_header(tmp_path: Path) -> None:
    async def story(seen: Watched) -> None:
        await seen.publish(shape=3)
        with pytest.raises(BadHeader):
            await seen.fetched()
        assert seen.headers == 1

    watched(tmp_path, story)
