"""How many records of strangers a node keeps (R-DHT-8)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

hivemind_transport = pytest.importorskip("paris_swarm.swarm.hivemind_transport")
from hivemind.dht.routing import DHTID  # noqa: E402

BoundedStorage = hivemind_transport.BoundedStorage
LATER = 4e9


def held(storage: object, key: str) -> set[str]:
    entry = storage.get(DHTID.generate(key))  # type: ignore[attr-defined]
    return set() if entry is None else set(entry.value.data)


def test_the_reserved_find_room_in_a_full_key() -> None:
    storage, place = BoundedStorage(2, reserved={"organiser"}), DHTID.generate("key")
    assert [storage.store_subkey(place, name, b"1", LATER) for name in "abc"] == [True, True, False]
    assert storage.store_subkey(place, "organiser", b"1", LATER)
    assert storage.store_subkey(place, "b", b"2", LATER + 1), "who is in it renews"
    assert held(storage, "key") == {"a", "b", "organiser"}


def test_a_flood_of_some_keys_leaves_the_others_their_share() -> None:
    storage = BoundedStorage(100, records=40)
    for number in range(60):
        storage.store_subkey(DHTID.generate("flooded"), f"a{number}", b"1", LATER)
    assert len(held(storage, "flooded")) == 40
    quiet = [storage.store_subkey(DHTID.generate("quiet"), f"b{number}", b"1", LATER) for number in range(60)]
    assert sum(quiet) == 20, "its share of two keys"
    assert not storage.store_subkey(DHTID.generate("flooded"), "late", b"1", LATER)
    assert storage.store_subkey(DHTID.generate("flooded"), "a0", b"2", LATER + 1)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), max_size=150))
def test_no_sequence_of_stores_passes_the_bounds(stores: list[tuple[int, int]]) -> None:
    storage = BoundedStorage(8, records=12, reserved={"0"})
    for key, name in stores:
        storage.store_subkey(DHTID.generate(f"key{key}"), str(name), b"1", LATER)
    sizes = [len(held(storage, f"key{key}")) for key in range(6)]
    assert max(sizes) <= 8 + 1
    # Each key may still fill its share once everything is full.
    assert sum(sizes) <= 12 + 12 + 6
