"""What only the real transport can get wrong: p2pd's life, hivemind's storage, and peers that attack the DHT."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import HivemindWorld, accept_ok, p2pd_pid, process_runs, run, until

from paris_swarm.dht_schemas import (
    Bars,
    Claim,
    Identity,
    Plan,
    Policy,
    Progress,
    SlotSpec,
    TensorSpec,
    Verification,
    open_plan,
    seal_plan,
)
from paris_swarm.dht_schemas.dht_rules import check_store, claim_key, dht_id
from paris_swarm.dht_schemas.errors import LeaseTooLong
from paris_swarm.swarm.transport import PeerNotFound, Stream, TransportDown, TransportError

hivemind_transport = pytest.importorskip("paris_swarm.swarm.hivemind_transport")
from hivemind.dht.crypto import DHTRecord  # noqa: E402
from hivemind.dht.node import DHTNode  # noqa: E402
from hivemind.dht.routing import DHTID  # noqa: E402
from hivemind.dht.storage import DictionaryDHTValue  # noqa: E402
from hivemind.p2p import P2P, PeerID  # noqa: E402
from hivemind.utils import MSGPackSerializer  # noqa: E402
from hivemind.utils.timed_storage import ValueWithExpiration  # noqa: E402

BoundedStorage = hivemind_transport.BoundedStorage
HivemindTransport = hivemind_transport.HivemindTransport
RecordValidator = hivemind_transport.RecordValidator
pack = MSGPackSerializer.dumps


# ---- p2pd's life


def test_the_identity_file_is_the_peer_id(tmp_path: Path) -> None:
    identity = Identity.generate()
    path = tmp_path / "identity"
    path.write_bytes(identity.to_protobuf())

    async def scenario() -> None:
        for _ in range(2):
            node = await HivemindTransport.start(path)
            assert node.peer_id == identity.peer_id
            await node.close()
        nobody = await HivemindTransport.start(None, observer=True)
        assert nobody.peer_id != identity.peer_id
        await nobody.close()

    run(scenario())


def test_a_missing_or_damaged_identity_is_said_and_no_key_is_invented(tmp_path: Path) -> None:
    damaged = tmp_path / "identity"
    damaged.write_bytes(b"not a key")

    async def scenario() -> None:
        with pytest.raises(ValueError, match="no identity file"):
            await HivemindTransport.start(tmp_path / "missing")
        assert not (tmp_path / "missing").exists()
        with pytest.raises(TransportDown, match="p2pd did not start"):
            await HivemindTransport.start(damaged)
        with pytest.raises(ValueError, match="p2p"):
            await HivemindTransport.start(None, ["/ip4/127.0.0.1/tcp/1"])

    run(scenario())


def test_close_leaves_no_process_socket_or_file_behind(tmp_path: Path) -> None:
    sockets: list[Path] = []

    async def scenario() -> int:
        world = HivemindWorld(tmp_path)
        async with world:
            first, second = await world.nodes_in_line(2)
            await second.store("key", "me", b"ok", time.time() + 60)
            pids = [p2pd_pid(node) for node in (first, second)]
            ours = [first._p2p.daemon_listen_maddr, second._p2p.daemon_listen_maddr]
            sockets[:] = [Path(str(maddr.value_for_protocol("unix"))) for maddr in ours]
            assert all(map(process_runs, pids))
        assert not any(map(process_runs, pids))
        return len(os.listdir("/proc/self/fd"))

    before = None
    for _ in range(2):
        left = run(scenario())
        assert before is None or left <= before
        before = left
    assert len(sockets) == 2
    assert not any(path.exists() for path in sockets)


OWNER = """
import asyncio, sys
from paris_swarm.swarm.hivemind_transport import HivemindTransport

async def main():
    node = await HivemindTransport.start(None)
    print(node._p2p._child.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_p2pd_survives_a_ctrl_c_but_not_its_owner() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert process_runs(pid)
        assert os.getpgid(pid) == pid != os.getpgid(owner.pid), "a terminal's Ctrl-C goes to the owner's group only"
        owner.send_signal(signal.SIGKILL)
        owner.wait()

        async def gone() -> bool:
            return not process_runs(pid)

        run(until(gone))
    finally:
        owner.kill()
        owner.wait()
        if owner.stdout is not None:
            owner.stdout.close()


def test_p2pds_death_is_noticed_and_logged(hivemind_world: HivemindWorld, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with hivemind_world:
            node = await hivemind_world.node()
            await hivemind_world.kill(node)
            assert not node.alive()

            async def logged() -> bool:
                return "p2pd ended with exit status -9" in caplog.text

            await until(logged)

    run(scenario())


def test_streams_that_cannot_be_opened_leave_no_socket_open(hivemind_world: HivemindWorld) -> None:
    async def scenario() -> None:
        async with hivemind_world:
            first, second = await hivemind_world.nodes_in_line(2)

            async def deaf(_peer_id: str, stream: Stream) -> None:
                await stream.read_exactly(1)

            first.serve(deaf)
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(10):
                with pytest.raises(PeerNotFound):
                    await second.open_stream(Identity.generate().peer_id)
                opening = asyncio.create_task(second.open_stream(first.peer_id))
                await asyncio.sleep(0)
                opening.cancel()
                await asyncio.gather(opening, return_exceptions=True)

            async def closed() -> bool:
                return len(os.listdir("/proc/self/fd")) <= before

            await until(closed)

    run(scenario())


# ---- attacks on the DHT


ORGANISER = Identity(b"o" * 32)
ALICE = Identity(b"a" * 32)


def small_plan() -> Plan:
    table = [TensorSpec(name="w", dtype="F32", shape=(2, 3))]
    spec = SlotSpec(recipe={"steps": 100}, files={"ema.safetensors": table})
    return Plan(
        name="attacked",
        organiser=ORGANISER.peer_id,
        created=1_790_000_000,
        clusters=2,
        seed=7,
        data={"licence": "CC0-1.0"},
        expert=spec,
        router=spec,
        policy=Policy(lease_s=60, checkpoint_every_s=30, first_checkpoint_grace_s=90, checkpoint_cap_bytes=10_000_000),
        admission="open",
        verification=Verification(
            probe_seed=3, bars={slot: Bars(resumable=1.0, assemblable=0.5) for slot in ("0", "1", "router")}
        ),
    )


OPENED = open_plan(seal_plan(ORGANISER, small_plan()))


def check(dht_key: bytes, subkey: str | None, value: object, expiration: float) -> None:
    check_store(
        {OPENED.plan_id: OPENED.plan},
        dht_id=dht_key,
        subkey=subkey,
        value=value,
        expiration=expiration,
        now=time.time(),
    )


def claim(until_s: float, identity: Identity = ALICE, slot: str = "0", seq: int = 10) -> bytes:
    progress = Progress(step=5, steps=100, loss=0.25, images_per_s=46.5, device="cpu")
    return Claim(plan=OPENED.plan_id, slot=slot, peer=identity.peer_id, seq=seq, until=until_s, progress=progress).seal(
        identity
    )


KEY = claim_key(OPENED.plan_id, "0")


@asynccontextmanager
async def stock_node(*targets: Any) -> AsyncIterator[DHTNode]:
    """A node of plain hivemind, without any validator, that has met the targets: what an attacker runs."""
    seeds = [address for target in targets for address in await target.addresses()]
    p2p = await P2P.create(initial_peers=seeds, auto_nat=False, nat_port_map=False, use_relay=False, startup_timeout=60)
    try:
        node = await DHTNode.create(p2p=p2p, cache_nearest=0)
        for target in targets:
            assert await node.protocol.call_ping(PeerID.from_base58(target.peer_id)) is not None
        yield node
    finally:
        reader = p2p._reader_task
        await p2p.shutdown()
        await asyncio.gather(reader, return_exceptions=True)


async def store_at(attacker: DHTNode, target: Any, subkey: object, value: object, expiration: float) -> object:
    """Offer one record to one node, past all politeness."""
    answer = await attacker.protocol.call_store(
        PeerID.from_base58(target.peer_id), [DHTID.generate(KEY)], [pack(value)], [expiration], [subkey]
    )
    return None if answer is None else answer[0]


def test_the_validator_refuses_all_but_the_signers_own_claim(hivemind_world: HivemindWorld) -> None:
    async def scenario() -> None:
        async with hivemind_world:
            node = await hivemind_world.node(check=check)
            end = time.time() + 60.25
            good, me = claim(end), ALICE.peer_id
            async with stock_node(node) as attacker:
                offers: dict[str, tuple[object, object, float]] = {
                    "a plain value": (None, good, end),
                    "another's subkey": (Identity.generate().peer_id, good, end),
                    "a numbered subkey": (7, good, end),
                    "a bytes subkey": (me.encode(), good, end),
                    "a long subkey": ("x" * 1000, good, end),
                    "text": (me, good.decode(), end),
                    "a dictionary": (me, {"claim": good}, end),
                    "another slot's claim": (me, claim(end, slot="1"), end),
                    "a changed byte": (me, good.replace(b"signatures", b"signaturez"), end),
                    "too large": (me, good + b" " * 8192, end),
                    "a longer life": (me, good, end + 1),
                    "an endless life": (me, good, 1e18),
                    "infinity": (me, good, math.inf),
                    "not a number": (me, good, math.nan),
                    "junk": (me, b"\xff" * 100, end),
                }
                for name, (subkey, value, expiration) in offers.items():
                    assert not await store_at(attacker, node, subkey, value, expiration), name
                assert await node.get(KEY) == {}
                assert await store_at(attacker, node, me, good, end)
                assert await node.get(KEY) == {me: (good, end)}
                for name, (subkey, value, expiration) in offers.items():
                    assert not await store_at(attacker, node, subkey, value, expiration), name
                assert await node.get(KEY) == {me: (good, end)}, "nothing was wiped"
                raw = [b"\xc1", b"", b"\xdf\xff\xff\xff\xff", b"\x91" * 500, b"\xc7\x05\x50hello"]
                for value in raw:
                    answer = await attacker.protocol.call_store(
                        PeerID.from_base58(node.peer_id), [DHTID.generate(KEY)], [value], [end], [me]
                    )
                    assert answer == [False]
            assert node.alive()

    run(scenario())


def dictionary(items: list[tuple[object, object, object]], maxsize: object = None, latest: object = math.inf) -> Any:
    """A dictionary as an attacker writes it: any items, any bounds."""
    crafted = DictionaryDHTValue()
    crafted.packb = lambda: pack([maxsize, latest, [list(item) for item in items]])
    return crafted


def bounded_ok(place: bytes, subkey: str | None, value: object, expiration: float) -> None:
    """accept_ok, and leases of at most 900 s as in the real check."""
    accept_ok(place, subkey, value, expiration)
    if expiration > time.time() + 900:
        raise LeaseTooLong("for ever")


def mixed(soon: float) -> list[tuple[object, object, object]]:
    """Two valid records among what an attacker would add."""
    return [
        ("junk", pack(b"junk"), soon + 1),
        ("endless", pack(b"ok"), 1e18),
        ("valid", pack(b"ok"), soon),
        (7, pack(b"ok"), soon + 2),
        ("over", pack(b"ok"), time.time() - 1),
        ("not bytes", "ok", soon + 4),
        ("also valid", pack(b"ok"), soon + 3),
    ]


def test_a_handed_over_dictionary_keeps_its_valid_part(hivemind_world: HivemindWorld, soon: float) -> None:
    async def scenario() -> None:
        async with hivemind_world:
            node = await hivemind_world.node(check=bounded_ok)
            place = DHTID.generate("key")
            async with stock_node(node) as attacker:
                for offered in (dictionary(mixed(soon)), dictionary(mixed(soon), maxsize=1)):
                    await attacker.protocol.call_store(PeerID.from_base58(node.peer_id), [place], [offered], [1e18])
                    assert set(await node.get("key")) == {"valid", "also valid"}

    run(scenario())


def test_a_poisoned_answer_does_not_hide_what_honest_nodes_hold(hivemind_world: HivemindWorld, soon: float) -> None:
    async def scenario() -> None:
        async with hivemind_world:
            honest = await hivemind_world.node(check=bounded_ok)
            await honest.store("key", "honest", b"ok", soon)
            reader = await hivemind_world.node(honest, check=bounded_ok)
            place = DHTID.generate("key")
            async with stock_node(reader) as attacker:
                for answer, kept in [
                    (dictionary(mixed(soon)), {"valid", "also valid"}),
                    (dictionary(mixed(soon), maxsize=1), {"valid", "also valid"}),
                    (dictionary(mixed(soon), maxsize=math.nan), {"valid", "also valid"}),
                    (dictionary(mixed(soon), maxsize="many"), {"valid", "also valid"}),
                    (dictionary([("a", b"", soon), (7, b"", soon)]), set()),
                    (dictionary([("valid", pack(b"ok"), "soon")]), set()),
                    (dictionary([([], pack(b"ok"), soon)]), set()),
                    (dictionary([]), set()),
                ]:
                    attacker.protocol.storage.get = lambda _key, answer=answer: ValueWithExpiration(answer, math.inf)
                    reader._records.node.blacklist.clear()
                    await reader._records.meet([attacker.peer_id.to_base58()])
                    # hivemind ends a search at the first answer that claims to be the latest possible
                    heard = await reader._records.node.protocol.call_find(attacker.peer_id, [place])
                    newest = None if heard is None or heard[place][0] is None else heard[place][0].expiration_time
                    assert newest == (soon + 3 if kept else None)
                    found = await reader.get("key")
                    assert found["honest"] == (b"ok", soon)
                    assert set(found) == {"honest", *kept}
                attacker.protocol.storage.get = lambda _key: None
                assert await reader.get("key") == {"honest": (b"ok", soon)}, "nothing of it stayed"

    run(scenario())


@given(st.binary(max_size=200), st.binary(max_size=200), st.one_of(st.floats(), st.none(), st.text(max_size=3)))
def test_no_bytes_make_the_validator_raise(subkey: bytes, value: bytes, expiration: Any) -> None:
    validator = RecordValidator(accept_ok)
    record = DHTRecord(dht_id("key"), subkey, value, expiration)
    assert isinstance(validator.validate(record), bool)
    ok = DHTRecord(dht_id("key"), pack("me"), pack(b"ok" + value), 1e9)
    assert validator.validate(ok)


# ---- hivemind's storage, bounded


def test_a_dictionary_is_capped_but_those_in_it_renew(soon: float) -> None:
    storage, place = BoundedStorage(3), DHTID.generate("key")
    for name in "abc":
        assert storage.store_subkey(place, name, b"1", soon)
    assert not storage.store_subkey(place, "d", b"1", soon + 50)
    assert storage.store_subkey(place, "a", b"2", soon + 1)
    assert set(storage.get(place).value.data) == set("abc")
    assert not storage.store(place, b"plain", soon + 100), "a plain value never replaces a dictionary"
    assert not BoundedStorage(0).store_subkey(place, "a", b"1", soon), "that is how the cache is off"


def test_a_refused_older_record_does_not_shorten_the_newer_ones_life(soon: float) -> None:
    storage, place = BoundedStorage(3), DHTID.generate("key")
    now = time.time()
    assert storage.store_subkey(place, "a", b"new", soon)
    assert storage.store_subkey(place, "a", b"old", now + 0.05), "a newer one is held"
    assert not storage.store_subkey(place, "a", b"other", soon), "the first of two equal ones stays"
    assert storage.store_subkey(place, "a", b"new", soon), "the same again is held already"
    while time.time() < now + 0.06:
        pass
    assert storage.get(place).value.get("a").value == b"new"


def test_renewals_do_not_fill_memory(soon: float) -> None:
    storage, place = BoundedStorage(3), DHTID.generate("key")
    for number in range(2000):
        assert storage.store_subkey(place, "a", b"1", soon + number / 100)
    assert len(storage.data[place].value.expiration_heap) < 200
    assert len(storage.expiration_heap) < 200
    assert storage.get(place).value.get("a").expiration_time == soon + 19.99


def test_a_search_cannot_write_into_the_storage(soon: float) -> None:
    storage, place = BoundedStorage(3), DHTID.generate("key")
    storage.store_subkey(place, "a", b"1", soon)
    storage.get(place).value.store("b", b"2", soon)
    assert set(storage.get(place).value.data) == {"a"}


def test_both_sides_compute_the_same_dht_id() -> None:
    assert dht_id(KEY) == DHTID.generate(KEY).to_bytes()


# ---- staying connected


def empty_table(node: Any) -> None:
    table = node._records.node.protocol.routing_table
    for node_id in list(table.uid_to_peer_id):
        del table[node_id]


def test_an_empty_routing_table_fills_again(hivemind_world: HivemindWorld, soon: float) -> None:
    async def scenario() -> None:
        async with hivemind_world:
            first, second = await hivemind_world.nodes_in_line(2)
            await first.store("key", "first", b"ok", soon)
            empty_table(second)
            second._records.node.blacklist.register_failure(PeerID.from_base58(first.peer_id))
            second._records.node.protocol.storage.clear()

            async def found() -> bool:
                return "first" in await second.get("key")

            await until(found)

    run(scenario())


def test_a_peer_met_again_is_asked_again_at_once(hivemind_world: HivemindWorld) -> None:
    async def scenario() -> None:
        async with hivemind_world:
            first, second = await hivemind_world.nodes_in_line(2)
            peer = PeerID.from_base58(first.peer_id)
            second._records.node.blacklist.register_failure(peer)
            assert peer in second._records.node.blacklist
            await second._records.meet([first.peer_id])
            assert peer not in second._records.node.blacklist

    run(scenario())


def test_a_seed_that_comes_back_is_met_again(hivemind_world: HivemindWorld, tmp_path: Path, soon: float) -> None:
    async def scenario() -> None:
        async with hivemind_world:
            first, second = await hivemind_world.nodes_in_line(2)
            address = (await first.addresses())[0]
            await first.close()
            empty_table(second)
            assert await second.get("key") == {}
            head = address.rpartition("/p2p/")[0]
            again = await HivemindTransport.start(tmp_path / "identity-0", [address], listen=head)
            hivemind_world.nodes.append(again)
            assert again.peer_id == first.peer_id
            assert again.unreachable_seeds == {}, "its own address is no seed"
            await again.join_dht(accept_ok)
            await again.store("key", "again", b"ok", soon)

            async def found() -> bool:
                return "again" in await second.get("key")

            await until(found, limit_s=60)

    run(scenario())


def test_a_frozen_peer_costs_a_lookup_seconds_not_its_answer(hivemind_world: HivemindWorld, soon: float) -> None:
    async def scenario() -> None:
        async with hivemind_world:
            first, second, frozen = await hivemind_world.nodes_in_line(3)
            await first.store("key", "first", b"ok", soon)
            os.kill(p2pd_pid(frozen), signal.SIGSTOP)
            try:
                assert await second.get("key") == {"first": (b"ok", soon)}
                assert await second.store("key", "second", b"ok", soon)
            finally:
                os.kill(p2pd_pid(frozen), signal.SIGCONT)

    run(scenario())


def test_everything_else_of_the_room_imports_without_hivemind_or_torch() -> None:
    code = """
import pkgutil, sys, importlib
sys.modules["hivemind"] = sys.modules["torch"] = None
import paris_swarm.swarm as room
names = [m.name for m in pkgutil.iter_modules(room.__path__) if m.name not in ("hivemind_transport",)]
for name in names:
    importlib.import_module(f"paris_swarm.swarm.{name}")
assert {"transport", "memory", "wire", "store", "serving", "fetching"} <= set(names)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_errors_of_the_transport_are_transport_errors(hivemind_world: HivemindWorld) -> None:
    async def scenario() -> None:
        async with hivemind_world:
            node = await hivemind_world.node()
            with pytest.raises(TransportError):
                await node.open_stream(Identity.generate().peer_id)
            with pytest.raises(ValueError):
                await node.join_dht(accept_ok)

    run(scenario())
