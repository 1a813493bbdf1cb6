"""What a node takes in and keeps of other peers' records: hivemind's validator, dictionaries and storage, made safe."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable
from typing import Any

from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import TimedStorage, ValueWithExpiration

from paris_swarm.swarm.raw_record import passes
from paris_swarm.swarm.transport import RecordCheck

MAX_SUBKEYS = 256
"""Records under one key that a node keeps; further signers are refused while these leases run (R-DHT-8)."""
MAX_RECORDS = 32_768
"""Records that a node keeps in all, beyond which only keys with less than their share take in more (R-DHT-8)."""


class BoundedStorage(DHTLocalStorage):  # type: ignore[misc]
    """hivemind's record storage, dictionaries only, at most ``subkeys`` records under a key and ``records`` in all.

    ``store_subkey`` is True when this record (or a newer one of its subkey) is held afterwards. An older record never
    shortens the life of a newer one. When it is full, those in it can renew and the ``reserved`` subkeys find room;
    newcomers are refused until a lease ends (R-DHT-8).
    """

    def __init__(self, subkeys: int, *, records: int = MAX_RECORDS, reserved: Collection[str] = ()) -> None:
        super().__init__()
        self._subkeys = subkeys
        self._records = records
        self._reserved = frozenset(reserved)

    def store(self, key: DHTID, value: object, expiration_time: float, subkey: object = None) -> bool:
        return subkey is not None and self.store_subkey(key, subkey, value, expiration_time)

    def get(self, key: DHTID) -> Any:
        """A copy: hivemind's search merges what others answer into the dictionary it starts from."""
        entry = super().get(key)
        if entry is None:
            return None
        copy = DictionaryDHTValue()
        for subkey, (value, expiration) in entry.value.items():
            copy.store(subkey, value, expiration)
        return ValueWithExpiration(copy, entry.expiration_time)

    def store_subkey(self, key: DHTID, subkey: object, value: object, expiration_time: float) -> bool:
        entry = super().get(key)
        records = entry.value if entry is not None else DictionaryDHTValue()
        standing = records.get(subkey)
        if standing is not None and standing.expiration_time >= expiration_time:
            return bool(standing.expiration_time > expiration_time or standing.value == value)
        if standing is None and subkey not in self._reserved and not self._has_room(len(records)):
            return False
        if not records.store(subkey, value, expiration_time):
            return False
        if entry is None or expiration_time > entry.expiration_time:
            TimedStorage.store(self, key, records, expiration_time)
        for storage in (self, records):
            # Every renewal leaves its old place in the heap until that expires; a busy signer must not fill memory.
            if len(storage.expiration_heap) > 2 * len(storage.key_to_heap) + 64:
                storage.expiration_heap = list(storage.key_to_heap.values())
                heapq.heapify(storage.expiration_heap)
        return True

    def _has_room(self, under_key: int) -> bool:
        """Whether a key with so many records may take in a newcomer. A flood of some keys leaves the others theirs."""
        if under_key >= self._subkeys:
            return False
        share = self._records // max(1, len(self.data))
        return under_key < share or sum(len(entry.value) for entry in self.data.values()) < self._records


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """hivemind's validator interface around ``check``: False for everything that is not a well-formed, valid record."""

    def __init__(self, check: RecordCheck) -> None:
        self._check = check

    def validate(self, record: DHTRecord) -> bool:
        return passes(self._check, record.key, record.subkey, record.value, record.expiration_time)


class RecordGuard:
    """What a hivemind protocol does with dictionaries that come in: keep the valid records of each, drop the rest."""

    def __init__(self, protocol: Any, *, subkeys: int, reserved: Collection[str]) -> None:
        self._protocol = protocol
        self._find = protocol.call_find
        protocol.storage = BoundedStorage(subkeys, reserved=reserved)
        protocol.cache = BoundedStorage(0)
        protocol._validate_dictionary = self.keep_valid
        protocol.call_find = self.call_find

    def keep_valid(self, key: bytes, dictionary: object) -> bool:
        """Called for every dictionary that a peer stores or answers with; changes it in place."""
        if not isinstance(dictionary, DictionaryDHTValue):
            return False
        offered = sorted(dictionary.data.items(), key=lambda item: -item[1].expiration_time)[: 2 * MAX_SUBKEYS]
        dictionary.clear()
        dictionary.maxsize, dictionary.latest_expiration_time = math.inf, -math.inf
        for subkey, (value, expiration) in offered:
            if isinstance(subkey, str) and self._protocol._validate_record(
                key, self._protocol.serializer.dumps(subkey), value, expiration
            ):
                dictionary.store(subkey, value, expiration)
        return True

    async def call_find(self, peer: PeerID, keys: Iterable[DHTID]) -> object:
        """Ask a peer for keys; the answer's expiration becomes that of its newest valid record."""
        answer = await self._find(peer, keys)
        if answer is None:
            return None
        for key, (found, nearest) in answer.items():
            if found is None or not isinstance(found.value, DictionaryDHTValue) or not found.value.data:
                answer[key] = (None, nearest)
            else:
                answer[key] = (ValueWithExpiration(found.value, found.value.latest_expiration_time), nearest)
        return answer
