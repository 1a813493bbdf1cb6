"""What one hostile source can cost a download, and one hostile reader a server; what is not fetched twice."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from test_fetching import Cast, Checkpoint, read_all
from worlds import MemoryWorld, run

from paris_swarm.dht_schemas.digest import CHUNK, blake3_hex
from paris_swarm.dht_schemas.errors import DigestMismatch
from paris_swarm.dht_schemas.manifest import FileEntry, build_manifest
from paris_swarm.swarm import file_download, partial_file, serving, wire
from paris_swarm.swarm.counters import Counters
from paris_swarm.swarm.door import OpenDoor
from paris_swarm.swarm.fetch_session import Session, SpareMemory
from paris_swarm.swarm.fetching import FetchReport, fetch_blob
from paris_swarm.swarm.partial_file import PartialFile
from paris_swarm.swarm.scheduling import FetchPolicy
from paris_swarm.swarm.serving import MAX_REFUSED_PER_PEER, RECENT_CHUNKS, RECENT_PER_PEER, RecentChunks, serve_files
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.transport import Busy, NoSource, Stream, StreamClosed


def made(folder: Path, files: dict[str, bytes], **meta: Any) -> Checkpoint:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest, data, root = build_manifest(folder, list(files), "0", meta=meta)
    return Checkpoint(folder, data, root, manifest.files)


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


# ---- a source that gives something, and never enough -----------------------------------------------------------------


async def trickle(_peer_id: str, stream: Stream) -> None:
    """Greets, begins an answer, sends some thousand bytes of it, and nothing more; the stream stays open."""
    reader = wire.RequestReader()
    while reader.greeting is None:
        reader.receive(await stream.read_exactly(reader.wants))
    await stream.write(wire.OPENING)
    (request,) = reader.receive(await stream.read_exactly(reader.wants))
    size = min(CHUNK, request.length)
    await stream.write(wire.Response(wire.Status.OK, length=size, payload=bytes(size)).header() + bytes(9000))
    while True:
        await stream.read_exactly(1)


def test_the_only_source_holds_a_download_no_longer_than_a_chunk_may_take(
    memory_world: MemoryWorld, tmp_path: Path
) -> None:
    """It sends enough not to look stalled; there is nobody else. SPEC.md section 15."""
    wanted = made(tmp_path / "checkpoint", {"noise.bin": noise(0, 2 * CHUNK)})
    policy = FetchPolicy(chunk_s=0.5, stall_s=60.0)

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            hostile, receiver = await cast.liar(trickle), await cast.receiver()
            with pytest.raises(NoSource, match="no whole chunk within"):
                await receiver.fetch(wanted, [hostile.peer_id], policy=policy)
            with pytest.raises(NoSource, match=r"did not send blob .* within"):
                await fetch_blob(receiver.node, [hostile.peer_id], wanted.root, max_bytes=CHUNK, within_s=0.2)

            async def by_now() -> list[str]:
                return [honest.peer_id]

            honest = await cast.source(wanted)
            paths = await receiver.fetch(wanted, [hostile.peer_id], policy=policy, more_sources=by_now)
            assert read_all(paths) == wanted.content(), "and goes on with whoever else turns up"

    run(scenario())


def test_sources_that_take_turns_at_giving_nothing_do_not_hold_a_download(
    memory_world: MemoryWorld, tmp_path: Path
) -> None:
    """There is no moment at which nobody is being asked, and no chunk either."""
    wanted = made(tmp_path / "checkpoint", {"noise.bin": noise(0, CHUNK)})
    policy = FetchPolicy(chunk_s=0.4, stall_s=60.0, backoff_s=0.01, backoff_max_s=0.01)
    greeted: list[str] = []

    async def late(peer_id: str, stream: Stream) -> None:
        greeted.append(peer_id)
        if len(greeted) > 1:
            await trickle(peer_id, stream)
        else:
            await asyncio.sleep(0.5)  # out of step with the other

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            peers = [(await cast.liar(handler)).peer_id for handler in (trickle, late)]
            receiver = await cast.receiver()
            with pytest.raises(NoSource, match="no whole chunk within"):
                await asyncio.wait_for(receiver.fetch(wanted, peers, policy=policy), 8)

    run(scenario())


def test_a_blob_does_not_wait_for_one_who_trickles_while_others_may_have_it(
    memory_world: MemoryWorld, tmp_path: Path
) -> None:
    """Holders cost a key each, and all of them would be asked before the honest one, 15 minutes each."""
    wanted = made(tmp_path / "checkpoint", {"noise.bin": noise(0, 100)})
    late_s = 0.6

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            hostile = [(await cast.liar(trickle)).peer_id for _ in range(3)]
            honest, receiver = await cast.source(wanted), await cast.receiver()
            serve = serve_files(cast.stores[honest.peer_id], Counters())

            async def late(peer_id: str, stream: Stream) -> None:
                await asyncio.sleep(late_s)
                await serve(peer_id, stream)

            bounds = {"max_bytes": CHUNK, "within_s": 60.0, "hurry_s": late_s / 4, "stall_s": 60.0}
            for peers in ([*hostile, honest.peer_id], [honest.peer_id, *hostile]):
                found = fetch_blob(receiver.node, peers, wanted.root, **bounds)
                assert await asyncio.wait_for(found, 20) == wanted.data
            slow = await cast.liar(late)
            found = fetch_blob(receiver.node, [slow.peer_id, *hostile], wanted.root, **bounds)
            assert await asyncio.wait_for(found, 20) == wanted.data, "a slow one is asked again after the others"

    run(scenario())


# ---- chunks that are here already ------------------------------------------------------------------------------------


def test_what_successive_checkpoints_share_is_not_fetched_twice(memory_world: MemoryWorld, tmp_path: Path) -> None:
    frozen, tail, changed = noise(1, 2 * CHUNK + 70), noise(2, CHUNK), noise(3, 3 * CHUNK)
    parent = made(tmp_path / "one", {"ema.bin": frozen, "model.bin": changed, "null.bin": b"null"})
    child = made(
        tmp_path / "two",
        {"ema.bin": frozen, "model.bin": tail + changed[CHUNK:], "null.bin": b"null"},
    )

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source, receiver = await cast.source(parent), await cast.receiver()
            cast.stores[source.peer_id].put_folder(child.data, child.folder)
            await receiver.fetch(parent, [source.peer_id])
            before, report = receiver.counters.total("received", "checkpoint").logical, FetchReport()
            paths = await receiver.fetch(child, [source.peer_id], report=report)
            assert read_all(paths) == child.content()
            assert receiver.counters.total("received", "checkpoint").logical - before == CHUNK == report.saved
            assert report.reused == len(frozen) + 2 * CHUNK + 4

    run(scenario())


def test_a_shared_chunk_that_was_changed_on_disk_is_fetched(memory_world: MemoryWorld, tmp_path: Path) -> None:
    shared = noise(1, CHUNK)
    parent = made(tmp_path / "one", {"ema.bin": shared})
    child = made(tmp_path / "two", {"ema.bin": shared, "state.bin": b"more"})

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source, receiver = await cast.source(child), await cast.receiver()
            receiver.store.put_folder(parent.data, parent.folder)
            here = receiver.store.path(parent.root, "ema.bin")
            here.unlink()  # a link to the test's own file
            here.write_bytes(b"x" * CHUNK)
            report = FetchReport()
            assert read_all(await receiver.fetch(child, [source.peer_id], report=report)) == child.content()
            assert (report.reused, report.saved) == (0, CHUNK + 4)
            assert not receiver.store.holds_some(parent.root), "set aside"

    run(scenario())


def test_chunks_of_another_swarm_are_not_taken_over(memory_world: MemoryWorld, tmp_path: Path) -> None:
    """R-GRT-7: what is written under a root is served under it; digests must not give away another swarm's chunks."""
    secret = made(tmp_path / "one", {"weights.bin": noise(1, CHUNK)})
    bait = made(tmp_path / "two", {"weights.bin": noise(1, CHUNK), "more.bin": b"more"})

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            baiting, receiver = await cast.source(None), await cast.receiver()
            receiver.store.put_folder(secret.data, secret.folder)
            report = FetchReport()
            with pytest.raises(NoSource):
                await receiver.fetch(bait, [baiting.peer_id], report=report, foreign=lambda: {secret.root})
            assert report.reused == 0
            assert not receiver.store.holds_some(bait.root)

    run(scenario())


def test_each_index_of_the_store_is_read_once_a_download(
    memory_world: MemoryWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan has up to 2,048 files, a store that has lived a while hundreds of roots."""
    others = [made(tmp_path / f"other-{n}", {"ema.bin": noise(n, 50)}) for n in range(30)]
    wanted = made(tmp_path / "wanted", {f"file-{n}.bin": noise(n, 50) for n in range(25, 40)})
    opened: list[str] = []
    read_bytes = Path.read_bytes

    def counted(path: Path) -> bytes:
        opened.extend([path.parent.name] if path.name == "index.json" else [])
        return read_bytes(path)

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source, receiver = await cast.source(wanted), await cast.receiver()
            for other in others:
                receiver.store.put_folder(other.data, other.folder)
            monkeypatch.setattr(Path, "read_bytes", counted)
            report = FetchReport()
            paths = await receiver.fetch(wanted, [source.peer_id], report=report)
            monkeypatch.undo()
            assert read_all(paths) == wanted.content()
            assert (report.reused, report.saved) == (5 * 50, 10 * 50)
            theirs = [root for root in opened if root != wanted.root]
            assert len(theirs) == len(set(theirs)), "each once"
            assert len(theirs) >= len(others) - 17, "the newest were known from before"

            opened.clear()
            monkeypatch.setattr(Path, "read_bytes", counted)
            assert read_all(await receiver.fetch(wanted, [source.peer_id])) == wanted.content()
            assert {*opened} <= {wanted.root}, "a checkpoint that is here whole needs nothing of others"

    run(scenario())


def test_what_another_swarm_fetched_while_a_download_looked_round_is_not_taken_over(tmp_path: Path) -> None:
    """R-GRT-7: a root is noted as the other swarm's before its files come; whose it is is asked after the look."""
    secret = made(tmp_path / "one", {"weights.bin": noise(1, CHUNK)})
    store, noted = ContentStore(tmp_path / "store"), set[str]()
    store.begin(secret.root, secret.entries, kind="checkpoint")
    holds_whole = store._whole

    def coming(root: str, entry: FileEntry) -> bool:
        noted.add(secret.root)
        if not holds_whole(root, entry):
            store.put_files(secret.root, secret.entries, secret.folder, kind="checkpoint")
        return holds_whole(root, entry)

    store._whole = coming  # type: ignore[method-assign]
    digests = set(secret.entries[0].chunks)
    assert store.chunks_of_other_roots("0" * 64, digests, foreign=lambda: noted) == {}
    noted_nowhere = store.chunks_of_other_roots("0" * 64, digests)
    assert noted_nowhere == {secret.entries[0].chunks[0]: (secret.root, secret.entries[0], 0)}


def test_a_shared_chunk_that_cannot_be_read_is_fetched(
    memory_world: MemoryWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = made(tmp_path / "one", {"ema.bin": noise(1, 100)})
    child = made(tmp_path / "two", {"ema.bin": noise(1, 100), "more.bin": b"more"})

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source, receiver = await cast.source(child), await cast.receiver()
            receiver.store.put_folder(parent.data, parent.folder)

            def broken(*_place: object) -> bytes:
                raise OSError(5, "Input/output error")

            monkeypatch.setattr(receiver.store, "read_chunk_of", broken)
            assert read_all(await receiver.fetch(child, [source.peer_id])) == child.content()

    run(scenario())


def test_a_download_that_is_given_up_while_it_opens_a_file_lets_go_of_it(
    memory_world: MemoryWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that opens it is not waited for: the next download of the same file would wait for ever."""
    wanted = made(tmp_path / "checkpoint", {"noise.bin": noise(0, 100)})
    opened, go_on = threading.Event(), threading.Event()
    opening = file_download.open_wanted

    def slow(*args: Any) -> Any:
        found = opening(*args)
        opened.set()
        go_on.wait(30)
        return found

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source, receiver = await cast.source(wanted), await cast.receiver()
            with monkeypatch.context() as patched:
                patched.setattr(file_download, "open_wanted", slow)
                given_up = asyncio.create_task(receiver.fetch(wanted, [source.peer_id]))
                await asyncio.to_thread(opened.wait, 30)
                given_up.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await given_up
            go_on.set()
            again = receiver.fetch(wanted, [source.peer_id])
            assert read_all(await asyncio.wait_for(again, 10)) == wanted.content()

    run(scenario())


# ---- the server's side -----------------------------------------------------------------------------------------------


def test_readers_that_ask_for_nothing_give_their_places_up(memory_world: MemoryWorld, tmp_path: Path) -> None:
    """Eight keys with four streams each would keep everybody else out, for a request every two minutes."""
    wanted = made(tmp_path / "checkpoint", {"noise.bin": noise(0, CHUNK), "state.bin": b"state"})

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source = await cast.source(wanted, streams=2, yield_s=0.0)
            for _ in range(2):
                idler = (await cast.receiver()).node
                session = Session(source.peer_id, "a blob", await idler.open_stream(source.peer_id), 10.0)
                await session.greet(OpenDoor())
                await session.ask(wire.Request(wire.RequestKind.BLOB, wanted.root), 0, CHUNK)
                assert (await session.answer()).payload
            receiver = await cast.receiver()
            assert read_all(await receiver.fetch(wanted, [source.peer_id])) == wanted.content()
            assert receiver.faults == []

    run(scenario())


def test_streams_that_never_greet_give_their_places_up(
    memory_world: MemoryWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "MAX_REFUSED", 2)
    monkeypatch.setattr(serving, "GREETING_YIELDS_S", 0.0)
    wanted = made(tmp_path / "checkpoint", {"state.bin": b"state"})

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source = await cast.source(wanted)
            silent = [await (await cast.receiver()).node.open_stream(source.peer_id) for _ in range(2)]
            receiver = await cast.receiver()
            assert read_all(await receiver.fetch(wanted, [source.peer_id])) == wanted.content()
            assert receiver.faults == []
            with pytest.raises(StreamClosed):
                await silent[0].read_exactly(1)

    run(scenario())


def test_streams_that_come_together_share_the_places_of_their_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All places to greet are taken: each newcomer waits until a silent stream has left, and is counted meanwhile."""
    monkeypatch.setattr(serving, "MAX_REFUSED", 12)
    monkeypatch.setattr(serving, "GREETING_YIELDS_S", 0.0)
    greeting: set[Silent] = set()

    class Silent:
        """A stream on which nothing comes, and that takes a moment to close."""

        def __init__(self, peer_id: str) -> None:
            self.peer_id, self.closed = peer_id, asyncio.Event()

        async def read_exactly(self, size: int) -> bytes:
            greeting.add(self)
            try:
                await self.closed.wait()
            finally:
                greeting.discard(self)
            raise StreamClosed("closed")

        async def close(self) -> None:
            for _ in range(10):
                await asyncio.sleep(0)
            self.closed.set()

    async def scenario() -> None:
        handle = serve_files(ContentStore(tmp_path / "store"), Counters())
        tasks: list[asyncio.Task[None]] = []

        async def come(peers: list[str]) -> None:
            tasks.extend(asyncio.create_task(handle(peer, Silent(peer))) for peer in peers)  # type: ignore[arg-type]
            for _ in range(200):
                await asyncio.sleep(0)

        await come([f"peer {number // 4}" for number in range(12)])
        assert len(greeting) == 12
        await come(["eager"] * 10)
        assert sum(stream.peer_id == "eager" for stream in greeting) == MAX_REFUSED_PER_PEER
        assert len(greeting) == 12, "and nobody else's were given up for those that were refused"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(scenario())


def test_a_reader_that_is_being_sent_something_keeps_its_place(memory_world: MemoryWorld, tmp_path: Path) -> None:
    wanted = made(tmp_path / "checkpoint", {"noise.bin": noise(0, CHUNK)})

    async def scenario() -> None:
        async with memory_world:
            cast = Cast(memory_world, tmp_path)
            source = await cast.source(wanted, streams=1, yield_s=0.0, upload=2 * CHUNK)
            sessions = []
            for reader in (await cast.receiver(), await cast.receiver()):
                session = Session(source.peer_id, "a chunk", await reader.node.open_stream(source.peer_id), 10.0)
                await session.greet(OpenDoor())
                await session.ask(wire.Request(wire.RequestKind.CHUNK, wanted.root), CHUNK, CHUNK)
                if not sessions:
                    await session._receive()  # the head of the answer: it is being sent from here on
                sessions.append(session)
            with pytest.raises(Busy):
                await sessions[1].answer()
            assert len((await sessions[0].answer()).payload) == CHUNK

    run(scenario())


def test_a_reader_of_parts_does_not_put_out_the_chunks_of_another(tmp_path: Path) -> None:
    chunks = RECENT_CHUNKS + 2
    folder = tmp_path / "checkpoint"
    checkpoint = made(folder, {"noise.bin": noise(0, chunks * CHUNK)})
    store, read = checkpoint.held_by(tmp_path / "store"), []
    read_chunk = store.read_chunk

    def counted(root: str, file: int, chunk: int) -> bytes | None:
        read.append(chunk)
        return read_chunk(root, file, chunk)

    store.read_chunk = counted  # type: ignore[method-assign]
    recent = RecentChunks(store)

    def ask(peer: str, chunk: int, part: int = 0) -> None:
        kind, length = wire.RequestKind.CHUNK, wire.PART
        request = wire.Request(kind, checkpoint.root, 0, chunk, offset=part * length, length=length)
        expected = (folder / "noise.bin").read_bytes()[chunk * CHUNK :][part * length :][:length]
        assert recent.part(peer, request) == expected

    ask("patient", 0)
    for chunk in range(1, chunks):
        ask("greedy", chunk)
    ask("patient", 0, part=1)
    assert read == list(range(chunks)), "the patient one's chunk was still there"
    ask("greedy", chunks - RECENT_PER_PEER)
    assert len(read) == chunks, "and the newest of the greedy one's"
    for peer in range(RECENT_CHUNKS - 2):
        ask(f"peer {peer}", chunks - 1)
    ask("patient", 0, part=2)
    assert len(read) == chunks, "whoever has most gives up first"
    assert len(recent._kept) <= RECENT_CHUNKS


# ---- memory and disk -------------------------------------------------------------------------------------------------


def test_memory_of_whole_chunks_comes_back_and_no_more_than_a_few() -> None:
    memory = SpareMemory()
    first = memory.take(CHUNK)
    memory.give_back(first)
    assert memory.take(CHUNK) is first
    memory.give_back(memory.take(CHUNK - 1))
    assert len(memory.take(CHUNK)) == CHUNK
    given = [memoryview(bytearray(CHUNK)) for _ in range(20)]
    for payload in given:
        memory.give_back(payload)
    assert sum(any(memory.take(CHUNK) is one for one in given) for _ in range(20)) <= 4


def entry_of(data: bytes) -> FileEntry:
    chunks = tuple(blake3_hex(data[start : start + CHUNK]) for start in range(0, len(data), CHUNK))
    return FileEntry(name="noise.bin", length=len(data), chunks=chunks)


def test_a_disk_that_fails_behind_the_writer_is_not_taken_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flush runs in a thread of its own: what it met is said by the next write, and by the end."""
    data = noise(0, 3 * CHUNK)
    monkeypatch.setattr(partial_file, "SYNC_BYTES", CHUNK)

    def failing(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing)
    store = ContentStore(tmp_path)
    store.begin("ab" * 32, [entry_of(data)], kind="checkpoint")
    with store.open_partial("ab" * 32, entry_of(data)) as partial:
        with pytest.raises(DigestMismatch):
            partial.write(0, data[CHUNK : 2 * CHUNK])
        with pytest.raises(OSError, match="Input/output"):  # noqa: PT012 - at whichever write it is heard of
            for index in (0, 1, 2):
                partial.write(index, data[index * CHUNK : (index + 1) * CHUNK])
            partial.finish()
        with pytest.raises(OSError, match="Input/output"):
            finish_after_all(partial, data)
    assert not (tmp_path / "roots" / ("ab" * 32) / "files" / "noise.bin").exists()


def finish_after_all(partial: PartialFile, data: bytes) -> None:
    for index in partial.missing:
        partial.write(index, data[index * CHUNK : (index + 1) * CHUNK])
    partial.finish()


def test_a_reader_fills_its_space_and_takes_no_more() -> None:
    data = noise(0, 5000)
    for step in (1, 7, 4999, 5000):
        reader = wire.ResponseReader()
        reader.expect(0, 5000)
        reader.expect(0, 5000)
        assert len(reader.space) == 0, "the greeting comes first, and is read as before"
        reader.receive(wire.OPENING)
        for _ in range(2):
            assert reader.receive(wire.Response(wire.Status.OK, length=5000, payload=data).header()) == []
            got: list[wire.Response] = []
            while not got:
                space = reader.space
                assert len(space) == reader.wants
                size = min(step, len(space))
                space[:size] = data[5000 - len(space) :][:size]
                got = reader.filled(size)
            assert got == [wire.Response(wire.Status.OK, length=5000, payload=data)]
        with pytest.raises(ValueError, match="space of 0"):
            reader.filled(1)


def test_a_stream_hands_over_what_there_is(memory_world: MemoryWorld) -> None:
    async def scenario() -> None:
        async with memory_world:
            server = await memory_world.node(check=None)
            client = await memory_world.node(server, check=None)

            async def three_bytes(_peer_id: str, stream: Stream) -> None:
                await stream.write(b"abc")
                await stream.read_exactly(1)

            server.serve(three_bytes)
            stream = await client.open_stream(server.peer_id)
            room = bytearray(10)
            assert await asyncio.wait_for(stream.read_into(memoryview(room)), 10) == 3
            assert room[:3] == b"abc"
            await stream.close()

    run(scenario())
