"""Peers that lie, stall, flood or vanish on the streams that files travel over."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import zstandard
from arena import HONEST_WEIGHTS, WEIGHTS, Arena, Rogue, Stage, best_verified
from fixture_types import NamedRule, Timed

from paris_swarm.dht_schemas.digest import CHUNK
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.swarm import wire
from paris_swarm.swarm.counters import Counters
from paris_swarm.swarm.door import OpenDoor, greet_client
from paris_swarm.swarm.fetch_session import BadChunk
from paris_swarm.swarm.fetching import fetch_blob, fetch_files
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.serving import ServingLimits, serve_files
from paris_swarm.swarm.sightings import Candidate
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.transport import Stream, StreamClosed, StreamHandler, TransportError


async def ended(stream: Stream) -> None:
    """Wait until the other end closes the stream, whatever it still sends."""
    with contextlib.suppress(StreamClosed):
        while True:
            await stream.read_exactly(1)


Answer = Callable[[wire.Request, Stream], Awaitable[None]]


def hostile(answer: Answer) -> StreamHandler:
    """A server that greets as it should and then answers each request as it likes."""

    async def handle(_peer_id: str, stream: Stream) -> None:
        reader = wire.RequestReader()
        try:
            await greet_client(stream, reader, OpenDoor(), stall_s=5.0)
            while True:
                for request in reader.receive(await stream.read_exactly(reader.wants)):
                    await answer(request, stream)
        except TransportError:
            return

    return handle


async def both_hold(arena: Arena, stage: Stage, liar: SwarmNode) -> Announcement:
    """Alice published a checkpoint; mallory says that she holds it too."""
    made = await arena.publish(arena.alice, stage.slot)
    envelope = arena.alice.files.ledger.last("checkpoint", stage.slot)
    assert envelope is not None
    holding = arena.holding(stage.slot, envelope)
    for target in (arena.alice, arena.bob):
        assert await arena.rogue.offer(
            target, stage.ckpt_key, arena.mallory.peer_id, holding.seal(arena.mallory), holding.until
        )
    return made


async def fetched_from_the_liar_first(
    arena: Arena, stage: Stage, liar: SwarmNode, made: Announcement, folder: Path, *, stall_s: float = 1.0
) -> tuple[bytes, list[tuple[str, Exception]]]:
    """The weights of alice's checkpoint, mallory asked before alice; and what each source did wrong."""
    store = ContentStore(folder)
    manifest = arena.alice.store.read_blob(made.root)
    assert manifest is not None
    entries = list(arena.bob.trusted.feed_manifest(made, manifest).files)
    store.put_blob(manifest)
    faults: list[tuple[str, Exception]] = []
    paths = await fetch_files(
        arena.bob.transport,
        store,
        [liar.transport.peer_id, arena.alice.transport.peer_id],
        made.root,
        entries,
        stall_s=stall_s,
        on_fault=lambda peer, error: faults.append((peer, error)),
    )
    return paths[WEIGHTS].read_bytes(), faults


def play(arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, folder: Path, answer: Answer) -> list[Exception]:
    """Fetch from the liar and alice; the bytes are alice's. What the liar did wrong."""

    async def scenario() -> list[Exception]:
        made = await both_hold(arena, stage, liar)
        liar.transport.serve(hostile(answer))
        with timed():
            data, faults = await fetched_from_the_liar_first(arena, stage, liar, made, folder)
        assert data == HONEST_WEIGHTS
        assert all(peer == liar.transport.peer_id for peer, _error in faults), "the honest holder did nothing wrong"
        return [error for _peer, error in faults]

    return arena.run(scenario())


def test_liar_serving_wrong_chunks(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule, tmp_path: Path
) -> None:
    """
    Attack: a liar serving wrong chunks: right length, other bytes, under a checkpoint it says it holds
    Rule: R-WIRE-2 (BadChunk): hashed before it is kept; the liar is named and asked no more
    Seen: alice's checkpoint, fetched whole from alice
    """

    async def answer(request: wire.Request, stream: Stream) -> None:
        size = len(HONEST_WEIGHTS) if request.file == 0 else 2
        await stream.write(wire.Response(wire.Status.OK, length=size).header()[:8] + size.to_bytes(4, "big"))
        await stream.write(bytes(size))

    for error in (errors := play(arena, stage, liar, timed, tmp_path, answer)):
        assert isinstance(error, BadChunk)
        named_rule(error)
    assert errors


def test_lying_holder_does_not_discredit_the_root(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, tmp_path: Path
) -> None:
    """
    Attack: the same liar while the honest holder is away: wrong bytes, so that readers drop alice's root for good
    Rule: R-WIRE-2 (BadChunk), R-REC-11: other bytes than the root names are the holder's fault, never the root's
    Seen: alice's checkpoint again two leases later, or from any holder that serves it
    """

    async def answer(_request: wire.Request, stream: Stream) -> None:
        await stream.write(wire.Response(wire.Status.OK, wire.Encoding.RAW, 4, b"rong").header() + b"rong")

    offset = 0.0

    async def scenario() -> None:
        nonlocal offset
        reader = await arena.node("away", liar, observer=True, clock=lambda: time.time() + offset)
        envelope = arena.announcement(stage.slot, arena.alice.identity).seal(arena.alice.identity)
        holding = arena.holding(stage.slot, envelope, until=time.time() + 600)
        assert await arena.rogue.offer(
            arena.bob, stage.ckpt_key, arena.mallory.peer_id, holding.seal(arena.mallory), holding.until
        )
        liar.transport.serve(hostile(answer))
        await reader.refresh([stage.slot])
        with timed():
            best, refusals = await best_verified(reader, stage.slot)
        assert best is None and len(refusals) == 1
        assert isinstance(refusals[0], BadChunk)
        assert reader.candidates(stage.slot) == []
        offset = 2 * arena.opened.plan.policy.lease_s + 1
        assert [candidate.envelope for candidate in reader.candidates(stage.slot)] == [envelope]
        await arena.close_nodes(reader)

    arena.run(scenario())


def test_chunk_bomb(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule, tmp_path: Path
) -> None:
    """
    Attack: chunk bomb: a zstd frame of a few bytes that expands a thousandfold, with and without stating its size
    Rule: R-WIRE-1 (BadFrame), R-WIRE-2 (BadChunk): nothing longer than asked for is ever allocated
    Seen: alice's checkpoint, fetched whole from alice
    """
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1000 * len(HONEST_WEIGHTS)))
    size = len(HONEST_WEIGHTS)
    assert len(bomb) < size

    async def answer(request: wire.Request, stream: Stream) -> None:
        length = size if request.file == 0 else 2
        payload = bomb if request.file == 0 else b"{}"
        encoding = wire.Encoding.ZSTD if request.file == 0 else wire.Encoding.RAW
        await stream.write(wire.Response(wire.Status.OK, encoding, length, payload).header() + payload)

    errors = play(arena, stage, liar, timed, tmp_path, answer)
    assert len(errors) == 1
    named_rule(errors[0])
    unstated = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000 * size))
    for payload in (bomb, unstated):
        with pytest.raises(wire.BadFrame) as caught:
            wire.decode_payload(wire.Response(wire.Status.OK, wire.Encoding.ZSTD, size, payload))
        named_rule(caught.value)
    with pytest.raises(ValueError):
        wire.encode_payload(bytes(CHUNK + 1))


def test_answer_longer_than_asked(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule, tmp_path: Path
) -> None:
    """
    Attack: an answer of 4 GiB where 200 bytes were asked for, and a manifest of 100 MB
    Rule: R-WIRE-1, R-WIRE-2 (BadChunk): the header of the answer is refused, its bytes are never read
    Seen: alice's checkpoint, fetched whole from alice
    """

    async def answer(_request: wire.Request, stream: Stream) -> None:
        huge = (2**32 - 1).to_bytes(4, "big")
        await stream.write(b"\x00\x00\x00\x00" + huge + huge)

    for error in (errors := play(arena, stage, liar, timed, tmp_path, answer)):
        named_rule(error)
    assert errors

    async def manifest() -> None:
        with pytest.raises(BadChunk) as caught:
            await fetch_blob(arena.bob.transport, [liar.transport.peer_id], "a" * 64, max_bytes=1 << 20)
        named_rule(caught.value)

    arena.run(manifest())


def test_slow_loris_server(arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, tmp_path: Path) -> None:
    """
    Attack: slow loris, serving: greets, takes requests, and never answers
    Rule: swarm/scheduling.py: several sources at once, and a stall time after which a silent one is left
    Seen: alice's checkpoint, fetched whole from alice
    """

    async def answer(_request: wire.Request, _stream: Stream) -> None:
        await asyncio.Event().wait()

    errors = play(arena, stage, liar, timed, tmp_path, answer)
    assert all(isinstance(error, TransportError) for error in errors), errors


def test_holder_that_never_serves(arena: Arena, stage: Stage, timed: Timed) -> None:
    """
    Attack: a holder that never serves: signs holdings of alice's checkpoint without having it, or without existing
    Rule: none; a source without bytes is left for the next one
    Seen: alice's checkpoint, fetched whole from alice; the holder is only a name more
    """

    async def scenario() -> None:
        made = await arena.publish(arena.alice, stage.slot)
        envelope = arena.alice.files.ledger.last("checkpoint", stage.slot)
        assert envelope is not None
        ghost = type(arena.mallory).generate()
        holding = arena.holding(stage.slot, envelope, ghost)
        assert await arena.rogue.offer(arena.alice, stage.ckpt_key, ghost.peer_id, holding.seal(ghost), holding.until)
        await arena.bob.refresh([stage.slot])
        (candidate,) = arena.bob.candidates(stage.slot)
        assert set(candidate.holders) == {ghost.peer_id, arena.alice.identity.peer_id}
        with timed():
            best, refusals = await best_verified(arena.bob, stage.slot)
        assert isinstance(best, Candidate) and best.announcement == made and refusals == []

    arena.run(scenario())


def test_slow_loris_client_and_stream_flood(arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed) -> None:
    """
    Attack: slow loris and stream flood, asking: forty streams from one peer that greet and then say nothing
    Rule: swarm/serving.py: four streams a peer, a time limit on greeting and on idling
    Seen: alice serves bob meanwhile, and the flood's streams are closed
    """
    limits = ServingLimits(idle_s=1.0)

    async def scenario() -> None:
        made = await arena.publish(arena.alice, stage.slot)
        await arena.bob.refresh([stage.slot])
        arena.alice.transport.serve(serve_files(arena.alice.store, Counters(), limits=limits))
        flood = [await liar.transport.open_stream(arena.alice.transport.peer_id) for _ in range(40)]
        for number, stream in enumerate(flood):
            if number % 2:
                await stream.write(wire.OPENING)
        with timed():
            data = await fetch_blob(arena.bob.transport, [arena.alice.transport.peer_id], made.root, max_bytes=1 << 20)
        assert data == arena.alice.store.read_blob(made.root)

        await asyncio.gather(*map(ended, flood))
        await asyncio.gather(*(stream.close() for stream in flood))

    arena.run(scenario())


def test_reader_that_stops_reading(arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, tmp_path: Path) -> None:
    """
    Attack: asks for chunk after chunk and reads nothing, so that the server's memory fills
    Rule: swarm/serving.py: two prepared answers a stream, and a stall time for who takes nothing
    Seen: alice goes on serving; the stream is closed
    """
    limits = ServingLimits(stall_s=0.5, idle_s=5.0)
    big = random.Random(0).randbytes(2 << 20)

    async def scenario() -> None:
        made = await arena.publish(arena.alice, stage.slot, {WEIGHTS: HONEST_WEIGHTS, "state.json": big})
        arena.alice.transport.serve(serve_files(arena.alice.store, Counters(), limits=limits))
        stream = await liar.transport.open_stream(arena.alice.transport.peer_id)
        await stream.write(wire.OPENING)
        request = wire.Request(wire.RequestKind.CHUNK, made.root, 1, 0).to_bytes()

        async def ask_for_ever() -> None:
            with contextlib.suppress(TransportError):
                while True:
                    await stream.write(request * 64)

        asking = asyncio.ensure_future(ask_for_ever())
        with timed():
            blob = await fetch_blob(arena.bob.transport, [arena.alice.transport.peer_id], made.root, max_bytes=1 << 20)
            assert blob == arena.alice.store.read_blob(made.root)
        # Nothing is read for as long as the server waits; from then on the rest of what it sent, and the end.
        await asyncio.wait([asking], timeout=2.0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await ended(stream)
        await stream.close()

    arena.run(scenario())


def test_bytes_of_another_protocol(arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed) -> None:
    """
    Attack: rubbish on a stream: another protocol, requests before a greeting, requests of no known kind
    Rule: R-WIRE-1 (BadFrame): the stream ends
    Seen: alice serves everybody else
    """

    async def scenario() -> None:
        made = await arena.publish(arena.alice, stage.slot)
        request = wire.Request(wire.RequestKind.BLOB, made.root).to_bytes()
        with timed():
            for rubbish in (b"GET / HTTP/1.1\r\n\r\n" * 9, request * 4, wire.OPENING + b"\x09" * len(request)):
                stream = await liar.transport.open_stream(arena.alice.transport.peer_id)
                await stream.write(rubbish)
                await ended(stream)
                await stream.close()
            blob = await fetch_blob(arena.bob.transport, [arena.alice.transport.peer_id], made.root, max_bytes=1 << 20)
        assert blob == arena.alice.store.read_blob(made.root)

    arena.run(scenario())


def test_eclipse_by_one_evil_seed(arena: Arena, stage: Stage, timed: Timed) -> None:
    """
    Attack: eclipse: a seed that hides every record and names nobody; and one that names a thousand peers who are not
    Rule: none against a newcomer whose only seed is evil (SPEC 15, Hiding); one honest seed or cached peer beside it
    ends the eclipse
    Seen: with the evil seed alone nothing; with one honest seed more alice's claim
    """

    async def scenario() -> None:
        rogue = await Rogue.start(arena.alice, arena.bob, names_peers=False)
        evil = (await rogue.addresses())[0]
        table = rogue.node.protocol.routing_table
        table.get_nearest_neighbors = lambda *_args, **_kwargs: []
        try:
            with rogue.answering([]):
                alone = await arena.node("eclipsed", evil, observer=True)
                assert await alone.transport.get(stage.key) == {}
                await arena.close_nodes(alone)
                with timed():
                    both = await arena.node("rescued", evil, arena.bob, observer=True)
                    assert arena.alice.identity.peer_id in await both.transport.get(stage.key)
                table.get_nearest_neighbors = lambda *_args, **_kwargs: invented
                await arena.check_honest_claim(stage)
                assert arena.alice.identity.peer_id in await both.transport.get(stage.key)
                await arena.close_nodes(both)
        finally:
            await rogue.stop()

    from hivemind.dht.routing import DHTID
    from hivemind.p2p import PeerID

    identity = type(arena.mallory)
    invented = [(DHTID.generate(), PeerID.from_base58(identity.generate().peer_id)) for _ in range(1000)]
    arena.run(scenario())
