"""Fetching from peers that die, stall, lie or know nothing: honest bytes come through, and who sent others is named."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zstandard
from worlds import MemoryWorld, World, run, until

from paris_swarm.dht_schemas.digest import CHUNK
from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.manifest import FileEntry, build_manifest
from paris_swarm.swarm import wire
from paris_swarm.swarm.counters import Counters
from paris_swarm.swarm.door import OpenDoor
from paris_swarm.swarm.fetch_session import Session
from paris_swarm.swarm.fetch_sources import FetchSources
from paris_swarm.swarm.fetching import BadChunk, FetchReport, fetch_blob, fetch_files
from paris_swarm.swarm.file_download import FileDownload
from paris_swarm.swarm.memory import StreamFaults
from paris_swarm.swarm.parts import Part
from paris_swarm.swarm.scheduling import ChunkScheduler, FetchPolicy
from paris_swarm.swarm.serving import ServingLimits, serve_files
from paris_swarm.swarm.sources import SourceBook
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.transport import Busy, NoSource, NotHeld, Stalled, Stream, StreamClosed

HEADERS = len(wire.OPENING) + 12
"""Bytes a server sends before the first payload."""


@dataclass
class Checkpoint:
    """A checkpoint in a folder: 3 chunks of noise, 2 of zeros, an empty and a small file."""

    folder: Path
    data: bytes
    root: str
    entries: tuple[FileEntry, ...]

    def held_by(self, folder: Path) -> ContentStore:
        store = ContentStore(folder)
        store.put_folder(self.data, self.folder)
        return store

    def content(self) -> dict[str, bytes]:
        return {entry.name: (self.folder / entry.name).read_bytes() for entry in self.entries}


NOISE = 2 * CHUNK + 1000
ZEROS = CHUNK + 5


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "empty.bin").touch()
    (folder / "noise.bin").write_bytes(random.Random(0).randbytes(NOISE))
    (folder / "state.json").write_bytes(b"{}")
    (folder / "zeros.bin").write_bytes(bytes(ZEROS))
    manifest, data, root = build_manifest(folder, [path.name for path in folder.iterdir()], "0")
    return Checkpoint(folder, data, root, manifest.files)


@dataclass
class Receiver:
    """A node with an empty store, and what it saw."""

    node: Any
    store: ContentStore
    counters: Counters
    faults: list[tuple[str, Exception]]

    async def fetch(self, checkpoint: Checkpoint, peers: list[str], **options: Any) -> dict[str, Path]:
        options.setdefault("stall_s", 20.0)
        return await fetch_files(
            self.node,
            self.store,
            peers,
            checkpoint.root,
            checkpoint.entries,
            counters=self.counters,
            on_fault=lambda peer, error: self.faults.append((peer, error)),
            **options,
        )


class Cast:
    """The nodes of one scenario: a seed that serves nothing, sources, a receiver."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.folder = folder
        self.served: dict[str, Counters] = {}
        self.stores: dict[str, ContentStore] = {}

    async def source(self, checkpoint: Checkpoint | None, **limits: Any) -> Any:
        node = await self.world.node(*self.world.nodes[:1], check=None)
        counters = self.served[node.peer_id] = Counters()
        folder = self.folder / f"store-{len(self.world.nodes)}"
        store = ContentStore(folder) if checkpoint is None else checkpoint.held_by(folder)
        self.stores[node.peer_id] = store
        node.serve(serve_files(store, counters, limits=ServingLimits(**limits)))
        return node

    async def liar(self, handler: Callable[[str, Stream], Awaitable[None]]) -> Any:
        node = await self.world.node(*self.world.nodes[:1], check=None)
        node.serve(handler)
        return node

    async def receiver(self) -> Receiver:
        node = await self.world.node(*self.world.nodes[:1], check=None)
        return Receiver(node, ContentStore(self.folder / "received"), Counters(), [])


def read_all(paths: dict[str, Path]) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in paths.items()}


# ---- in both worlds


def test_every_file_arrives_and_both_sides_count_the_same_bytes(
    world: World, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with world:
            cast = Cast(world, tmp_path)
            source = await cast.source(checkpoint, compress="always")
            receiver = await cast.receiver()
            manifest = await fetch_blob(
                receiver.node, [source.peer_id], checkpoint.root, max_bytes=1 << 20, counters=receiver.counters
            )
            assert manifest == checkpoint.data
            steps: list[tuple[int, int]] = []
            paths = await receiver.fetch(checkpoint, [source.peer_id], on_progress=lambda *step: steps.append(step))
            assert read_all(paths) == checkpoint.content()

            total = NOISE + ZEROS + 2
            assert (steps[0], steps[-1]) == ((0, total), (total, total))
            assert steps == sorted(steps)
            got = receiver.counters.received[source.peer_id]
            assert cast.served[source.peer_id].sent == {receiver.node.peer_id: got}
            assert got["checkpoint"].logical == total
            assert got["checkpoint"].count == 6
            assert NOISE < got["checkpoint"].wire < NOISE + 2000, "noise goes raw, zeros next to nothing"
            assert got["blob"].logical == len(checkpoint.data)
            assert receiver.counters.sent == {}

            await receiver.fetch(checkpoint, [])
            assert receiver.counters.received[source.peer_id]["checkpoint"].count == 6, "nothing is fetched twice"

    run(scenario())


def test_a_source_that_dies_on_the_way_is_replaced_and_nothing_is_fetched_twice(
    world: World, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with world:
            cast = Cast(world, tmp_path)
            first, second = await cast.source(checkpoint), await cast.source(checkpoint)
            await first.connect((await second.addresses())[0])
            receiver = await cast.receiver()
            await receiver.node.connect((await second.addresses())[0])
            killing: list[asyncio.Task[None]] = []

            def kill_after_first_chunk(_here: int, _total: int) -> None:
                if first.peer_id in receiver.counters.received and not killing:
                    killing.append(asyncio.create_task(world.kill(first)))

            paths = await receiver.fetch(
                checkpoint, [first.peer_id, second.peer_id], on_progress=kill_after_first_chunk
            )
            await killing[0]
            assert read_all(paths) == checkpoint.content()
            received = receiver.counters.total("received", "checkpoint")
            assert received.logical <= NOISE + ZEROS + 2 + 2 * CHUNK, "at most what was in flight comes twice"
            assert receiver.counters.received[first.peer_id]["checkpoint"].count >= 1

    run(scenario())


def test_a_changed_byte_on_a_sources_disk_is_refused_and_the_honest_copy_gets_through(
    world: World, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with world:
            cast = Cast(world, tmp_path)
            # The honest one is slow, or it might bring everything before the other one is asked for the chunk.
            damaged, honest = await cast.source(checkpoint), await cast.source(checkpoint, upload=CHUNK)
            path = cast.stores[damaged.peer_id].path(checkpoint.root, "noise.bin")
            content = bytearray(path.read_bytes())
            content[CHUNK] ^= 1
            path.unlink()  # the stores of this test share files by hard links
            path.write_bytes(content)
            receiver = await cast.receiver()
            paths = await receiver.fetch(checkpoint, [damaged.peer_id, honest.peer_id])
            assert read_all(paths) == checkpoint.content()
            # A newcomer may not find the way to either at once: that is nobody's fault and tried again.
            [(peer, error)] = [fault for fault in receiver.faults if isinstance(fault[1], RecordError)]
            assert peer == damaged.peer_id
            assert isinstance(error, BadChunk)
            assert "changed on disk" in str(error)
            assert path.with_name("noise.bin.corrupt-1").exists()

    run(scenario())


def test_an_unknown_root_is_not_held_by_anyone(world: World, tmp_path: Path, checkpoint: Checkpoint) -> None:
    async def scenario() -> None:
        async with world:
            cast = Cast(world, tmp_path)
            source = await cast.source(None)
            receiver = await cast.receiver()
            with pytest.raises(NoSource, match=source.peer_id) as caught:
                await receiver.fetch(checkpoint, [source.peer_id])
            assert isinstance(caught.value.failures[source.peer_id], NotHeld)
            with pytest.raises(NoSource):
                await fetch_blob(receiver.node, [source.peer_id], checkpoint.root, max_bytes=1 << 20)
            with pytest.raises(NoSource, match="no peer is known"):
                await fetch_blob(receiver.node, [], checkpoint.root, max_bytes=1 << 20)

    run(scenario())


# ---- liars


def test_a_flipped_byte_on_the_way_names_the_liar_and_costs_one_chunk(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            liar, honest = await cast.source(checkpoint), await cast.source(checkpoint)
            second_chunk = HEADERS + CHUNK + 12
            memory_world.network.set_faults(liar.peer_id, StreamFaults(flip_at=second_chunk + 99))
            receiver = await cast.receiver()
            paths = await receiver.fetch(checkpoint, [liar.peer_id, honest.peer_id])
            assert read_all(paths) == checkpoint.content()
            [(peer, error)] = receiver.faults
            assert peer == liar.peer_id
            assert isinstance(error, BadChunk)
            assert error.peer == liar.peer_id
            assert "chunk 1 of noise.bin" in str(error)
            honest_chunks = receiver.counters.received[honest.peer_id]["checkpoint"].count
            assert honest_chunks <= 5, "the chunk before the bad one was kept"

    run(scenario())


def test_without_an_honest_source_the_bad_chunk_is_the_error(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            empty, liar = await cast.source(None), await cast.source(checkpoint)
            memory_world.network.set_faults(liar.peer_id, StreamFaults(flip_at=HEADERS))
            receiver = await cast.receiver()
            with pytest.raises(BadChunk, match=liar.peer_id):
                await receiver.fetch(checkpoint, [empty.peer_id, liar.peer_id])
            with pytest.raises(BadChunk, match=liar.peer_id):
                await fetch_blob(receiver.node, [liar.peer_id], checkpoint.root, max_bytes=1 << 20)
            memory_world.network.set_faults(liar.peer_id, None)
            paths = await receiver.fetch(checkpoint, [liar.peer_id])
            assert read_all(paths) == checkpoint.content()

    run(scenario())


def answer(*parts: bytes) -> Callable[[str, Stream], Awaitable[None]]:
    """A source that answers the first request with these bytes, then listens until the other side leaves."""

    async def handle(_peer_id: str, stream: Stream) -> None:
        await stream.read_exactly(len(wire.OPENING))
        await stream.write(wire.OPENING)
        await stream.read_exactly(wire.REQUEST_SIZE)
        for part in parts:
            await stream.write(part)
        try:
            while True:
                await stream.read_exactly(1)
        except StreamClosed:
            return

    return handle


def whole(response: wire.Response) -> bytes:
    return response.header() + response.payload


def packed(length: int, payload: bytes) -> bytes:
    return whole(wire.Response(wire.Status.OK, wire.Encoding.ZSTD, length, payload))


@pytest.mark.parametrize(
    "lie",
    [
        packed(CHUNK, zstandard.compress(bytes(64 << 20))),
        packed(CHUNK, zstandard.compress(bytes(CHUNK))),
        packed(1 << 30, zstandard.compress(bytes(1000))),
        packed(CHUNK, b"no frame at all"),
        whole(wire.encode_payload(bytes(1000))),
        whole(wire.Response(wire.Status.OK, wire.Encoding.RAW, CHUNK, bytes(CHUNK))),
        b"\xff" * 64,
        b"HTTP/1.1 200 OK\r\n\r\n",
        whole(wire.Response(wire.Status.DAMAGED)),
    ],
    ids=["bomb", "other bytes", "1 GiB", "no frame", "short", "raw zeros", "rubbish", "another protocol", "damaged"],
)
def test_lies_are_named_and_the_honest_source_is_asked(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint, lie: bytes
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            honest = await cast.source(checkpoint)
            liar = await cast.liar(answer(lie))
            receiver = await cast.receiver()
            paths = await receiver.fetch(checkpoint, [liar.peer_id, honest.peer_id], names=["noise.bin"])
            assert read_all(paths) == {"noise.bin": checkpoint.content()["noise.bin"]}
            [(peer, error)] = receiver.faults
            assert peer == liar.peer_id
            assert isinstance(error, RecordError)
            assert liar.peer_id in str(error)

    run(scenario())


def test_a_blob_is_taken_only_when_it_is_the_one(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            honest = await cast.source(None)
            blob = b"a plan" * 1000
            digest = cast.stores[honest.peer_id].put_blob(blob)
            liars = [
                await cast.liar(answer(whole(wire.encode_payload(lie))))
                for lie in (b"another plan", bytes(20_000), b"")
            ]
            receiver = await cast.receiver()
            peers = [*(liar.peer_id for liar in liars), honest.peer_id]
            faults: dict[str, Exception] = {}
            fetched = await fetch_blob(
                receiver.node, peers, digest, max_bytes=10_000, on_fault=faults.__setitem__, counters=receiver.counters
            )
            assert fetched == blob
            assert {type(error) for error in faults.values()} == {BadChunk}
            assert set(faults) == {liar.peer_id for liar in liars}
            with pytest.raises(BadChunk, match=r"6000 bytes where 0 to 100"):
                await fetch_blob(receiver.node, [honest.peer_id], digest, max_bytes=100)

    run(scenario())


# ---- the world


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        (StreamFaults(truncate_after=3), StreamClosed),
        (StreamFaults(truncate_after=HEADERS - 1), StreamClosed),
        (StreamFaults(truncate_after=HEADERS + CHUNK + 12 + 50_000), StreamClosed),
        (StreamFaults(stall_after=0), Stalled),
        (StreamFaults(stall_after=HEADERS + CHUNK + 12 + 50_000), Stalled),
    ],
    ids=["cut in the hello", "cut in a header", "cut in a chunk", "silent from the start", "silent in a chunk"],
)
def test_a_source_that_stops_is_left_for_the_next(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint, faults: StreamFaults, error: type[Exception]
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            bad, good = await cast.source(checkpoint), await cast.source(checkpoint)
            memory_world.network.set_faults(bad.peer_id, faults)
            receiver = await cast.receiver()
            paths = await receiver.fetch(checkpoint, [bad.peer_id, good.peer_id], stall_s=0.5)
            assert read_all(paths) == checkpoint.content()
            seen = {(peer, type(fault)) for peer, fault in receiver.faults}
            # A silent one may be outrun before it is left: its chunks are taken over.
            assert seen == {(bad.peer_id, error)} or (error is Stalled and not seen)

    run(scenario())


def test_a_source_that_is_cut_again_and_again_is_used_while_it_helps(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            only = await cast.source(checkpoint)
            memory_world.network.set_faults(only.peer_id, StreamFaults(truncate_after=HEADERS + CHUNK + 12 + 10))
            receiver, report = await cast.receiver(), FetchReport()
            paths = await receiver.fetch(checkpoint, [only.peer_id], report=report)
            assert read_all(paths) == checkpoint.content()
            assert len(receiver.faults) + report.resumed >= 2

    run(scenario())


LIMIT = 110_000


def limited(world: MemoryWorld, *sources: Any) -> None:
    """Every stream from these ends after LIMIT bytes, as through a relay."""
    for source in sources:
        world.network.set_faults(source.peer_id, StreamFaults(truncate_after=LIMIT))


def test_a_checkpoint_comes_through_streams_that_each_carry_less_than_a_chunk(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    """R-WIRE-10"""

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            only = await cast.source(checkpoint)
            limited(memory_world, only)
            receiver, book, report = await cast.receiver(), SourceBook(), FetchReport()
            manifest = await fetch_blob(receiver.node, [only.peer_id], checkpoint.root, max_bytes=1 << 20, book=book)
            assert manifest == checkpoint.data
            paths = await receiver.fetch(checkpoint, [only.peer_id], book=book, report=report)
            assert read_all(paths) == checkpoint.content()
            assert receiver.faults == [], "a limited source is not a faulty one"
            assert report.saved == NOISE + ZEROS + 2
            assert NOISE // LIMIT < report.resumed < 2 * NOISE // LIMIT
            assert report.twice < NOISE // 5
            assert book.of(only.peer_id).success == 1.0

    run(scenario())


def test_parts_asked_for_on_many_streams_are_read_one_at_a_time(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs its reader 48 bytes and the server a chunk to read and hash (R-WIRE-10)."""

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source = await cast.source(checkpoint)
            store, others, together = cast.stores[source.peer_id], threading.Barrier(2), []
            read_chunk = store.read_chunk

            def reading(root: str, file: int, chunk: int) -> bytes | None:
                try:
                    others.wait(timeout=0.2)
                    together.append((file, chunk))
                except threading.BrokenBarrierError:
                    others.reset()
                return read_chunk(root, file, chunk)

            monkeypatch.setattr(store, "read_chunk", reading)
            index = next(at for at, entry in enumerate(checkpoint.entries) if entry.name == "noise.bin")
            reader = (await cast.receiver()).node

            async def ask(chunk: int) -> wire.Response:
                session = Session(source.peer_id, "a part", await reader.open_stream(source.peer_id), 10.0)
                await session.greet(OpenDoor())
                part = wire.Request(wire.RequestKind.CHUNK, checkpoint.root, index, chunk, length=wire.PART)
                await session.ask(part, 0, wire.PART)
                return await session.answer()

            answers = await asyncio.gather(*(ask(chunk) for chunk in range(3)))
            assert [answer.length for answer in answers] == [wire.PART, wire.PART, 1000]
            assert together == []

    run(scenario())


def test_a_blob_longer_than_a_stream_carries_comes_whole(memory_world: MemoryWorld, tmp_path: Path) -> None:
    """R-WIRE-10"""

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            only = await cast.source(None)
            blob = random.Random(1).randbytes(700_001)
            digest = cast.stores[only.peer_id].put_blob(blob)
            limited(memory_world, only)
            receiver = await cast.receiver()
            for most in (700_001, 1 << 20):
                assert await fetch_blob(receiver.node, [only.peer_id], digest, max_bytes=most) == blob
            with pytest.raises(BadChunk):
                await fetch_blob(receiver.node, [only.peer_id], digest, max_bytes=700_000)

    run(scenario())


def test_limited_sources_and_an_ordinary_one_bring_a_checkpoint_together(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            sources = [await cast.source(checkpoint) for _ in range(3)]
            limited(memory_world, *sources[:2])
            receiver, report = await cast.receiver(), FetchReport()
            paths = await receiver.fetch(checkpoint, [source.peer_id for source in sources], report=report)
            assert read_all(paths) == checkpoint.content()
            assert report.saved == NOISE + ZEROS + 2
            assert all(isinstance(error, StreamClosed) for _peer, error in receiver.faults)

    run(scenario())


def test_parts_asked_for_before_a_chunk_was_given_up_do_not_ban_who_sent_them(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    """A liar brings the same chunk whole while an honest source is half through: what is still on its way from that
    one must not be joined to what came before, when the chunk is asked of it again.
    """

    async def scenario() -> None:
        async with memory_world:
            node = await memory_world.node(check=None)
            store, book = ContentStore(tmp_path / "received"), SourceBook()
            entry = next(entry for entry in checkpoint.entries if entry.name == "noise.bin")
            first = FileEntry(name=entry.name, length=CHUNK, chunks=entry.chunks[:1])
            store.begin(checkpoint.root, [first], kind="checkpoint")
            sources = FetchSources(node, {}, None, 10.0, OpenDoor(), book)
            scheduler = ChunkScheduler({}, policy=FetchPolicy(), book=book)
            download = FileDownload(
                store, checkpoint.root, "checkpoint", {0: first}, sources, scheduler, Counters(), None, FetchReport()
            )
            await download._open_files()
            for peer in ("honest", "liar"):
                scheduler.add_source(peer)
                scheduler.engage(peer, 0.0)
            book.of("honest").part = CHUNK // 4
            book.delivered("liar", CHUNK, 0.1)  # known to be fast: it takes over
            noise = (checkpoint.folder / "noise.bin").read_bytes()[:CHUNK]

            def come(part: Part) -> asyncio.Task[None] | None:
                response = wire.encode_payload(noise[part.offset : part.offset + part.length])
                return download._take_answer("honest", part, response, upcoming)

            upcoming: deque[Part] = deque()
            asked = [download._next_part("honest", upcoming) for _ in range(3)]  # the last one is still to be asked for
            assert all(asked) and come(asked[0]) is None  # type: ignore[arg-type]
            assert scheduler.take("liar", 0.0) == (0, 0)
            assert scheduler.delivered("liar", (0, 0), 0.1)
            assert come(asked[1]) is None  # given up, for the other copy is here  # type: ignore[arg-type]
            scheduler.refused("liar", (0, 0), "other bytes")
            saving = None
            while (part := download._next_part("honest", upcoming)) is not None:
                asked.append(part)
            for part in asked[2:]:
                saving = come(part) or saving
            assert saving is not None
            await saving
            assert (list(book.banned()), scheduler.done) == (["liar"], True)
            await asyncio.to_thread(download.close)

    run(scenario())


def test_a_source_that_sends_next_to_nothing_a_stream_does_not_hold_a_download(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            only = await cast.source(checkpoint)
            # The head of an answer and a byte: no part ever comes whole, whatever is asked for.
            memory_world.network.set_faults(only.peer_id, StreamFaults(truncate_after=HEADERS + 1))
            receiver, report = await cast.receiver(), FetchReport()
            with pytest.raises(NoSource):
                await receiver.fetch(checkpoint, [only.peer_id], names=["noise.bin"], report=report)
            assert report.resumed == 0

    run(scenario())


def test_parts_that_do_not_make_up_the_chunk_are_their_senders_fault(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    """R-WIRE-10"""

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            liar = await cast.source(checkpoint)
            memory_world.network.set_faults(liar.peer_id, StreamFaults(truncate_after=LIMIT, flip_at=LIMIT // 2))
            receiver, book = await cast.receiver(), SourceBook()
            with pytest.raises(BadChunk, match="noise"):
                await receiver.fetch(checkpoint, [liar.peer_id], names=["noise.bin"], book=book)
            assert list(book.banned()) == [liar.peer_id]

    run(scenario())


def test_a_busy_source_says_so_and_the_next_is_asked(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            busy, free = await cast.source(checkpoint, streams=0), await cast.source(checkpoint, streams_per_peer=1)
            receiver = await cast.receiver()
            paths = await receiver.fetch(checkpoint, [busy.peer_id, free.peer_id])
            assert read_all(paths) == checkpoint.content()
            assert [(peer, type(fault)) for peer, fault in receiver.faults] == [(busy.peer_id, Busy)]
            holding = await receiver.node.open_stream(free.peer_id)
            await holding.write(wire.OPENING)
            assert await holding.read_exactly(len(wire.OPENING)) == wire.OPENING
            with pytest.raises(NoSource, match="as many streams as it can"):
                await fetch_blob(receiver.node, [free.peer_id], checkpoint.root, max_bytes=1 << 20)
            await holding.close()

    run(scenario())


def test_a_server_lets_go_of_readers_that_do_nothing(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source = await cast.source(checkpoint, idle_s=0.1, stall_s=0.1)
            receiver = await cast.receiver()
            silent = await receiver.node.open_stream(source.peer_id)
            with pytest.raises(StreamClosed):
                await silent.read_exactly(1)
            deaf = await receiver.node.open_stream(source.peer_id)
            noise = next(i for i, entry in enumerate(checkpoint.entries) if entry.name == "noise.bin")
            request = wire.Request(wire.RequestKind.CHUNK, checkpoint.root, noise, 0)
            await deaf.write(wire.OPENING + request.to_bytes())
            await asyncio.gather(*source._serving)
            with pytest.raises(StreamClosed):
                await deaf.read_exactly(CHUNK)
            assert cast.served[source.peer_id].sent == {}, "what was not taken in full is not counted"

    run(scenario())


# ---- the receiver


def test_only_the_wanted_files_come(memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source = await cast.source(checkpoint)
            receiver = await cast.receiver()
            assert list(await receiver.fetch(checkpoint, [source.peer_id], names=["state.json"])) == ["state.json"]
            assert receiver.counters.received[source.peer_id]["checkpoint"].logical == 2
            assert not receiver.store.has(checkpoint.root)
            with pytest.raises(ValueError, match=r"no file named weights\.bin"):
                await receiver.fetch(checkpoint, [source.peer_id], names=["weights.bin"])
            paths = await receiver.fetch(checkpoint, [source.peer_id], kind="plan")
            assert read_all(paths) == checkpoint.content()
            assert receiver.counters.received[source.peer_id]["plan"].logical == NOISE + ZEROS
            assert receiver.store.has(checkpoint.root)

    run(scenario())


def test_who_fetched_can_serve(memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source = await cast.source(checkpoint)
            middle = await cast.source(None)
            await fetch_files(
                middle, cast.stores[middle.peer_id], [source.peer_id], checkpoint.root, checkpoint.entries
            )
            await memory_world.kill(source)
            await middle.connect((await memory_world.nodes[1].addresses())[0])
            receiver = await memory_world.node(middle, check=None)
            store = ContentStore(tmp_path / "last")
            paths = await fetch_files(receiver, store, [middle.peer_id], checkpoint.root, checkpoint.entries)
            assert read_all(paths) == checkpoint.content()

    run(scenario())


def test_a_whole_file_changed_on_disk_is_fetched_anew(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source = await cast.source(checkpoint)
            receiver = await cast.receiver()
            paths = await receiver.fetch(checkpoint, [source.peer_id])
            paths["zeros.bin"].write_bytes(bytes(ZEROS - 1) + b"x")
            paths = await receiver.fetch(checkpoint, [source.peer_id])
            assert read_all(paths) == checkpoint.content()
            assert receiver.counters.received[source.peer_id]["checkpoint"].count == 6 + 2

    run(scenario())


def test_a_full_disk_ends_the_fetch_and_a_later_one_goes_on(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source = await cast.source(checkpoint)
            receiver = await cast.receiver()
            writes: list[int] = []
            pwrite = os.pwrite

            def filling(fd: int, data: Any, offset: int) -> int:
                nonlocal writes
                writes += [offset] if len(data) > 1 else []  # one byte: the chunk map
                if len(writes) == 2:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return pwrite(fd, data, offset)

            monkeypatch.setattr(os, "pwrite", filling)
            with pytest.raises(OSError, match="No space left"):
                await receiver.fetch(checkpoint, [source.peer_id])
            assert receiver.faults == [], "the source is not to blame"
            monkeypatch.setattr(os, "pwrite", pwrite)
            before = receiver.counters.received[source.peer_id]["checkpoint"].count
            paths = await receiver.fetch(checkpoint, [source.peer_id])
            assert read_all(paths) == checkpoint.content()
            assert receiver.counters.received[source.peer_id]["checkpoint"].count - before == 5

    run(scenario())


def test_a_cancelled_fetch_keeps_what_came(memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source = await cast.source(checkpoint)
            receiver = await cast.receiver()
            memory_world.network.set_faults(source.peer_id, StreamFaults(stall_after=HEADERS + 2 * (CHUNK + 12)))
            first_chunk = asyncio.Event()
            fetching = asyncio.create_task(
                receiver.fetch(
                    checkpoint, [source.peer_id], on_progress=lambda here, _: first_chunk.set() if here else None
                )
            )
            await first_chunk.wait()
            fetching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetching
            held = 3 - len(receiver.store.missing(checkpoint.root)["noise.bin"])
            assert held >= 1
            memory_world.network.set_faults(source.peer_id, None)
            before = receiver.counters.total("received", "checkpoint").count
            paths = await receiver.fetch(checkpoint, [source.peer_id])
            assert read_all(paths) == checkpoint.content()
            assert receiver.counters.total("received", "checkpoint").count - before == 6 - held

    run(scenario())


def test_two_fetches_of_one_root_at_once_both_succeed(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source = await cast.source(checkpoint)
            receiver = await cast.receiver()
            for paths in await asyncio.gather(*(receiver.fetch(checkpoint, [source.peer_id]) for _ in range(2))):
                assert read_all(paths) == checkpoint.content()
            assert receiver.store.verify(checkpoint.root) == []

    run(scenario())


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from paris_swarm.dht_schemas.manifest import open_manifest
from paris_swarm.swarm.counters import Counters
from paris_swarm.swarm.fetching import fetch_files
from paris_swarm.swarm.memory import MemoryNetwork, MemoryTransport
from paris_swarm.swarm.serving import serve_files
from paris_swarm.swarm.store import ContentStore

def die_in_the_middle(here, total):
    if here > 0:
        os.kill(os.getpid(), signal.SIGKILL)

async def main(root, held, received):
    network = MemoryNetwork()
    source = await MemoryTransport.start(network, "source")
    store = ContentStore(Path(held))
    source.serve(serve_files(store, Counters()))
    me = await MemoryTransport.start(network, "me", await source.addresses())
    entries = open_manifest(store.read_blob(root), root, cap_bytes=1 << 40).files
    await fetch_files(me, ContentStore(Path(received)), ["source"], root, entries, on_progress=die_in_the_middle)

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_receiver_killed_on_the_way_goes_on_where_it_was(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    checkpoint.held_by(tmp_path / "held")
    folders = [str(tmp_path / "held"), str(tmp_path / "received")]
    done = subprocess.run([sys.executable, "-c", KILLED, checkpoint.root, *folders], check=False, timeout=60)
    assert done.returncode == -9

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source = await cast.source(checkpoint)
            receiver = await cast.receiver()
            missing = sum(map(len, receiver.store.missing(checkpoint.root).values()))
            assert missing < 6
            paths = await receiver.fetch(checkpoint, [source.peer_id])
            assert read_all(paths) == checkpoint.content()
            assert receiver.counters.received[source.peer_id]["checkpoint"].count == missing

    run(scenario())


def test_bad_chunk_names_its_peer() -> None:
    error = BadChunk("chunk 3 of ema.safetensors from 12D3: digest", peer="12D3")
    assert error.rule == "R-WIRE-2"
    assert error.peer == "12D3"
    assert "12D3" in str(error)


# ---- several sources at once


@pytest.fixture
def large(tmp_path: Path) -> Checkpoint:
    """12 chunks of noise."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "noise.bin").write_bytes(random.Random(1).randbytes(12 * CHUNK))
    manifest, data, root = build_manifest(folder, ["noise.bin"], "0")
    return Checkpoint(folder, data, root, manifest.files)


def test_three_sources_share_one_download(memory_world: MemoryWorld, tmp_path: Path, large: Checkpoint) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            sources = [await cast.source(large) for _ in range(3)]
            receiver = await cast.receiver()
            report = FetchReport()
            paths = await receiver.fetch(large, [source.peer_id for source in sources], report=report)
            assert read_all(paths) == large.content()
            assert set(report.chunks) == {source.peer_id for source in sources}, "all of them were put to use"
            assert report.saved == 12 * CHUNK
            assert report.twice <= 3 * CHUNK
            assert report.faults == []

    run(scenario())


def test_each_file_comes_from_whoever_has_it(memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            sources = [await cast.source(checkpoint) for _ in range(2)]
            for source, lacking in zip(sources, (("noise.bin",), ("zeros.bin", "state.json")), strict=True):
                for name in lacking:
                    cast.stores[source.peer_id].path(checkpoint.root, name).unlink()
            receiver = await cast.receiver()
            paths = await receiver.fetch(checkpoint, [source.peer_id for source in sources])
            assert read_all(paths) == checkpoint.content()

    run(scenario())


def test_a_liar_is_not_asked_in_a_later_download_of_the_same_node(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint, large: Checkpoint
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            liar, honest = await cast.source(large), await cast.source(large)
            cast.stores[honest.peer_id].put_folder(checkpoint.data, checkpoint.folder)
            cast.stores[liar.peer_id].put_folder(checkpoint.data, checkpoint.folder)
            memory_world.network.set_faults(liar.peer_id, StreamFaults(flip_at=HEADERS))
            receiver, book = await cast.receiver(), SourceBook()
            peers = [liar.peer_id, honest.peer_id]
            assert read_all(await receiver.fetch(large, peers, book=book)) == large.content()
            assert set(book.banned()) == {liar.peer_id}
            memory_world.network.set_faults(liar.peer_id, None)
            await receiver.fetch(checkpoint, peers, book=book)
            await fetch_blob(receiver.node, peers, checkpoint.root, max_bytes=1 << 20, book=book)
            assert "blob" not in cast.served[liar.peer_id].sent.get(receiver.node.peer_id, {})
            with pytest.raises(NoSource, match="was banned"):
                await fetch_blob(receiver.node, peers[:1], checkpoint.root, max_bytes=1 << 20, book=book)

    run(scenario())


def test_a_peer_whose_disk_failed_is_no_liar(memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source = await cast.source(checkpoint)
            path = cast.stores[source.peer_id].path(checkpoint.root, "noise.bin")
            path.unlink()
            path.write_bytes(bytes(NOISE))
            receiver, book = await cast.receiver(), SourceBook()
            with pytest.raises(BadChunk, match="own copy was changed"):
                await receiver.fetch(checkpoint, [source.peer_id], book=book)
            assert book.banned() == {}

    run(scenario())


def test_a_source_that_trickles_is_left_when_another_comes_and_kept_while_it_is_alone(
    memory_world: MemoryWorld, tmp_path: Path, large: Checkpoint
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            slow = await cast.source(large, upload=4 * CHUNK)
            receiver, report = await cast.receiver(), FetchReport()
            policy = FetchPolicy(min_rate=1e9, rate_window_s=0.2)

            async def none() -> list[str]:
                return []

            paths = await receiver.fetch(large, [slow.peer_id], policy=policy, report=report, more_sources=none)
            assert read_all(paths) == large.content()
            assert report.faults == [], "the only source is kept, however slow"

            other = Receiver(receiver.node, ContentStore(tmp_path / "again"), Counters(), [])
            fast = await cast.source(large)
            report = FetchReport()
            paths = await other.fetch(large, [slow.peer_id, fast.peer_id], policy=policy, report=report)
            assert read_all(paths) == large.content()
            assert report.chunks[fast.peer_id] > report.chunks.get(slow.peer_id, 0)

    run(scenario())


def test_who_appears_during_a_download_is_put_to_use(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            empty, late = await cast.source(None), await cast.source(checkpoint)
            receiver = await cast.receiver()

            async def more() -> list[str]:
                return [empty.peer_id, late.peer_id]

            paths = await receiver.fetch(checkpoint, [empty.peer_id], more_sources=more)
            assert read_all(paths) == checkpoint.content()

    run(scenario())


def test_patience_waits_for_a_source_to_come_back(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source = await cast.source(checkpoint)
            receiver = await cast.receiver()
            memory_world.network.partition([receiver.node.peer_id])
            fetching = asyncio.create_task(
                receiver.fetch(checkpoint, [source.peer_id], patience_s=30.0, policy=FetchPolicy(backoff_s=0.05))
            )

            async def refused() -> bool:
                return len(receiver.faults) >= 2

            await until(refused)
            memory_world.network.heal()
            assert read_all(await fetching) == checkpoint.content()

    run(scenario())


def test_upload_is_limited_and_shared_between_peers_not_streams(
    memory_world: MemoryWorld, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source = await cast.source(checkpoint, upload=6 * CHUNK)
            greedy, modest = await cast.receiver(), await cast.receiver()
            stores = [ContentStore(tmp_path / f"store-of-{name}") for name in ("g1", "g2", "g3", "m")]
            done: list[str] = []

            async def fetch(receiver: Receiver, store: ContentStore, name: str) -> None:
                await fetch_files(
                    receiver.node, store, [source.peer_id], checkpoint.root, checkpoint.entries, ["noise.bin"]
                )
                done.append(name)

            began = asyncio.get_running_loop().time()
            await asyncio.gather(
                *(fetch(greedy, store, "greedy") for store in stores[:3]), fetch(modest, stores[3], "modest")
            )
            # Eight chunks at six a second: faster would break the limit. A peer with one stream gets half of it, not
            # a quarter, so it is done with its two before any of the other's three streams is.
            assert asyncio.get_running_loop().time() - began >= 1.2
            assert done[0] == "modest"

    run(scenario())
