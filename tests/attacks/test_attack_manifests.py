"""Manifests that name files they should not: announced by mallory's node, fetched over streams by bob's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from arena import HONEST_WEIGHTS, WEIGHTS, Arena, Stage, best_verified
from fixture_types import NamedRule, Timed

from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.swarm import wire
from paris_swarm.swarm.node import SwarmNode

Change = Callable[[dict[str, Any]], None]


async def honest_manifest(arena: Arena, stage: Stage) -> dict[str, Any]:
    """Alice publishes a checkpoint; its manifest, to be spoilt."""
    made = await arena.publish(arena.alice, stage.slot, probe_loss=0.4)
    data = arena.alice.store.read_blob(made.root)
    assert data is not None
    manifest: dict[str, Any] = json.loads(data)
    return manifest


async def announce(liar: SwarmNode, slot: str, manifest: dict[str, Any], data: bytes | None = None, **said: Any) -> str:
    """Mallory serves these bytes as a manifest, and announces it with a better loss than alice's."""
    data = canonical_json(manifest) if data is None else data
    root = liar.store.put_blob(data)
    lengths = [entry["length"] for entry in manifest["files"] if isinstance(entry["length"], int)]
    facts = {"step": 50, "parent": None, "total_bytes": max(1, sum(lengths))} | said
    await liar.announce(slot, root=root, probe_loss=0.1, **facts)
    return root


def play(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule, *changes: Change, **said: Any
) -> None:
    """Each spoilt manifest comes first among bob's candidates, is refused, and alice's checkpoint is fetched."""

    async def scenario() -> None:
        template = json.dumps(await honest_manifest(arena, stage))
        for change in changes:
            manifest = json.loads(template)
            change(manifest)
            root = await announce(liar, stage.slot, manifest, **said)
            there = arena.bob.store.has(root)  # with another slot it may be what a test before this one published there
            await arena.bob.refresh([stage.slot])
            first = arena.bob.candidates(stage.slot)[0]
            assert first.announcement.root == root
            with timed():
                best, refusals = await best_verified(arena.bob, stage.slot)
            (refusal,) = refusals
            named_rule(refusal)
            assert best is not None and best.announcement.author == arena.alice.identity.peer_id
            assert there or root == best.announcement.root or not arena.bob.store.has(root)
            fetched = arena.bob.store.path(best.announcement.root, WEIGHTS)
            assert fetched.read_bytes() == HONEST_WEIGHTS

    arena.run(scenario())


def renamed(name: str) -> Change:
    """The second file gets another name, and the list its order back."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][1]["name"] = name
        manifest["files"].sort(key=lambda entry: entry["name"])

    return change


def test_manifest_with_dot_dot(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule
) -> None:
    """
    Attack: manifest with ../ in a name, to write beside or above the store
    Rule: R-MAN-1 (BadManifest)
    Seen: alice's checkpoint; nothing of the other was written
    """
    names = ("../state.json", "a/../../state.json", "..", "a..json", "./state.json")
    play(arena, stage, liar, timed, named_rule, *map(renamed, names))


def test_manifest_with_an_absolute_path(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule
) -> None:
    """
    Attack: manifest with an absolute path, a drive letter, a back slash
    Rule: R-MAN-1 (BadManifest)
    Seen: alice's checkpoint; nothing of the other was written
    """
    play(arena, stage, liar, timed, named_rule, *map(renamed, ("/etc/cron.d/x", "c:state.json", "a\\state.json")))


def test_manifest_with_unicode_names(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule
) -> None:
    """
    Attack: names that look or fold alike: capitals, full-width dots, combining marks, a zero byte, a trailing line end
    Rule: R-MAN-1 (BadManifest): names are [a-z0-9_.-], so no file system can confuse two
    Seen: alice's checkpoint
    """
    names = ("State.json", "state\uff0ejson", "e\u0301.json", "state.json\n", "a\x00.json", "\u202enosj.json")
    play(arena, stage, liar, timed, named_rule, *map(renamed, names))


def test_manifest_with_a_duplicate_name(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule
) -> None:
    """
    Attack: duplicate name: the same file twice, once honest, once not
    Rule: R-MAN-1 (BadManifest)
    Seen: alice's checkpoint
    """

    def twice(manifest: dict[str, Any]) -> None:
        manifest["files"].insert(0, {**manifest["files"][0], "length": 0, "chunks": []})

    play(arena, stage, liar, timed, named_rule, twice)


def test_manifest_with_a_symlink(arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, tmp_path: Path) -> None:
    """
    Attack: symlink: an entry that asks to be made a link, and a folder published through a link
    Rule: R-MAN-8: fetched files are always plain; an author's links are refused when the manifest is built
    Seen: a plain file of exactly the digested bytes, or alice's checkpoint
    """
    secret = tmp_path / "secret"
    secret.write_bytes(b"do not publish")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / WEIGHTS).symlink_to(secret)
    with pytest.raises(ValueError, match="link"):
        build_manifest(folder, [WEIGHTS], "0")

    async def scenario() -> None:
        manifest = await honest_manifest(arena, stage)
        manifest["files"][0] |= {"link": str(secret), "mode": "120777", "type": "symlink"}
        data = canonical_json(manifest)
        source = tmp_path / "source"
        source.mkdir()
        (source / WEIGHTS).write_bytes(HONEST_WEIGHTS)
        (source / "state.json").write_bytes(b"{}")
        root = liar.store.put_folder(data, source)
        await liar.announce(
            stage.slot, step=50, parent=None, root=root, total_bytes=len(HONEST_WEIGHTS) + 2, probe_loss=0.1
        )
        await arena.bob.refresh([stage.slot])
        with timed():
            best, refusals = await best_verified(arena.bob, stage.slot)
        assert best is not None and best.announcement.root == root and refusals == []
        path = arena.bob.store.path(root, WEIGHTS)
        assert not path.is_symlink() and path.read_bytes() == HONEST_WEIGHTS
        assert secret.read_bytes() == b"do not publish"

    arena.run(scenario())


def test_manifest_with_a_million_entries(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule
) -> None:
    """
    Attack: 10^6 entries (36 MB, which zstd makes tiny), and 65 in a manifest of lawful size
    Rule: R-MAN-3 (RecordTooLarge), R-WIRE-2 (BadChunk): refused by its stated length; R-MAN-1 (BadManifest): at most 64
    Seen: alice's checkpoint; nothing was unpacked
    """
    entries = ",".join(['{"chunks":[],"length":0,"name":"a"}'] * 10**6)
    huge = f'{{"files":[{entries}],"kind":"expert","meta":{{}},"slot":"0","v":1}}'.encode()

    async def scenario() -> None:
        manifest = await honest_manifest(arena, stage)
        await announce(liar, stage.slot, manifest, data=b"{}" + b" " * 100)
        served = wire.Response(wire.Status.OK, wire.Encoding.ZSTD, len(huge), b"\x28\xb5\x2f\xfd" + bytes(50))

        async def answer(_request: wire.Request, stream: Any) -> None:
            await stream.write(served.header() + served.payload)

        liar.transport.serve(hostile(answer))
        await arena.bob.refresh([stage.slot])
        with timed():
            best, refusals = await best_verified(arena.bob, stage.slot)
        (refusal,) = refusals
        named_rule(refusal)
        assert best is not None and best.announcement.author == arena.alice.identity.peer_id

    from test_attack_streams import hostile

    announcement = arena.announcement(stage.slot, root=blake3_hex(huge))
    with pytest.raises(RecordError) as caught:
        arena.bob.trusted.feed_manifest(announcement, huge)
    named_rule(caught.value)
    arena.run(scenario())

    def many(manifest: dict[str, Any]) -> None:
        manifest["files"] += [{"chunks": [], "length": 0, "name": f"x{number:02}.json"} for number in range(63)]

    template = json.loads(canonical_json({"files": [{"chunks": [], "length": 0, "name": WEIGHTS}] * 2}))
    manifest = {"kind": "expert", "meta": {"parent": None, "step": 50}, "slot": stage.slot, "v": 1, **template}
    many(manifest)
    data = canonical_json(manifest)
    with pytest.raises(RecordError) as caught:
        arena.bob.trusted.feed_manifest(arena.announcement(stage.slot, root=blake3_hex(data)), data)
    named_rule(caught.value)


def test_manifest_that_disagrees_with_its_announcement(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule
) -> None:
    """
    Attack: announced with one byte, served with as many as the disk holds; or with another step, slot or parent
    Rule: R-MAN-6, R-MAN-1 (BadManifest): length, step, slot and parent are those announced, before any file is fetched
    Seen: alice's checkpoint
    """

    def nothing(_manifest: dict[str, Any]) -> None:
        return None

    play(arena, stage, liar, timed, named_rule, nothing, total_bytes=1)

    def other_slot(manifest: dict[str, Any]) -> None:
        manifest["slot"] = "0" if stage.slot != "0" else "1"

    def other_step(manifest: dict[str, Any]) -> None:
        manifest["meta"]["step"] = 7

    def fewer_chunks(manifest: dict[str, Any]) -> None:
        manifest["files"][1]["length"] = 2**40

    play(arena, stage, liar, timed, named_rule, other_slot, other_step)
    play(arena, stage, liar, timed, named_rule, fewer_chunks, total_bytes=10_000)


def test_checkpoint_beyond_the_cap(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule
) -> None:
    """
    Attack: a checkpoint larger than the plan allows, truthfully announced or hidden behind a smaller number
    Rule: R-REC-8 (CheckpointTooLarge), R-MAN-5 (BadManifest)
    Seen: alice's checkpoint; not a byte of the large one is fetched
    """
    big = arena.announcement(stage.slot, bytes=10**9).seal(arena.mallory)
    with pytest.raises(RecordError) as caught:
        arena.bob.trusted.feed_holding(
            (holding := arena.holding(stage.slot, big)).seal(arena.mallory), holding.until - 60
        )
    named_rule(caught.value)

    def hidden(manifest: dict[str, Any]) -> None:
        chunk = manifest["files"][0]["chunks"][0]
        manifest["files"][1] |= {"length": 5 * (4 << 20), "chunks": [chunk] * 5}

    play(arena, stage, liar, timed, named_rule, hidden, total_bytes=10_000)


def test_manifest_without_the_weights(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule
) -> None:
    """
    Attack: a manifest without the plan's weights file, or with a program or a pickle beside it
    Rule: R-MAN-7 (BadManifest)
    Seen: alice's checkpoint
    """

    def missing(manifest: dict[str, Any]) -> None:
        manifest["files"][0]["name"] = "model.json"

    play(arena, stage, liar, timed, named_rule, missing, *map(renamed, ("model.pkl", "run.sh", "model.bin")))


def test_manifest_that_is_no_json(
    arena: Arena, stage: Stage, liar: SwarmNode, timed: Timed, named_rule: NamedRule
) -> None:
    """
    Attack: a megabyte of brackets, a name twice in an object, spaces between the fields, and bytes that are not UTF-8
    Rule: R-ENV-2 (MalformedRecord), R-MAN-4, R-MAN-1 (BadManifest)
    Seen: alice's checkpoint; the parser is bounded in depth and size
    """

    async def scenario() -> None:
        manifest = await honest_manifest(arena, stage)
        text = canonical_json(manifest)
        for data in (
            b"[" * 900_000,
            text.replace(b'{"files"', b'{"files":[],"files"', 1),
            text.replace(b":", b": ", 1),
            b"\xff" + text,
        ):
            assert data != text
            await announce(liar, stage.slot, manifest, data=data)
            await arena.bob.refresh([stage.slot])
            with timed():
                best, refusals = await best_verified(arena.bob, stage.slot)
            (refusal,) = refusals
            named_rule(refusal)
            assert best is not None and best.announcement.author == arena.alice.identity.peer_id

    arena.run(scenario())
