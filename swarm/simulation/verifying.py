"""Verification, real but memoised: ten thousand peers in one process would verify the same envelopes over and over.

`SignedRecord.open` and `check_store` run once for each distinct envelope. What depends on the moment (is the lease
running?) runs every time. The number of verifications that separate peers would have done is counted beside.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from paris_swarm.dht_schemas import dht_rules, fields, identity, records
from paris_swarm.dht_schemas.dht_rules import check_lease, check_store
from paris_swarm.dht_schemas.envelope import Sealed, payload_type, unseal
from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.plan import Plan
from paris_swarm.dht_schemas.records import MAX_RECORD, Announcement, Claim, Holding, Progress, SignedRecord

_KEPT = 100_000


class Memo:
    """Results by key; the oldest half is dropped when there are too many."""

    def __init__(self) -> None:
        self._young: dict[Any, Any] = {}
        self._old: dict[Any, Any] = {}

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result for ``key``: made once; a RecordError is a result too, and raised."""
        found = self._young.get(key)
        if found is None:
            found = self._old.get(key)
            if found is None:
                try:
                    found = make()
                except RecordError as error:
                    found = error
            self._young[key] = found
            if len(self._young) > _KEPT:
                self._old, self._young = self._young, {}
        if isinstance(found, RecordError):
            raise found.with_traceback(None)
        return found


class Verifier:
    """The rules of the records for every simulated peer."""

    def __init__(self, plans: dict[str, Plan]) -> None:
        self._plans = plans
        self._opened, self._stored = Memo(), Memo()
        self.count = 0
        """Envelopes that separate peers would have verified (an announcement inside a holding counts too)."""

    def admit(self, dht_id: bytes, subkey: str | None, value: object, until: float, now: float) -> None:
        """What the validator of a DHT node does; raises a RecordError to refuse."""
        self.count += 1
        check_lease(until, now)
        self._stored.get(
            (dht_id, subkey, value, until),
            lambda: check_store(
                self._plans, dht_id=dht_id, subkey=subkey, value=value, expiration=until, now=min(now, until - 1e-3)
            ),
        )

    @contextmanager
    def memoised(self) -> Iterator[None]:
        """Within this block each envelope is unsealed, and each record read, once; `open` is counted.

        Other threads may have real nodes: what they verify meanwhile is not the simulated peers' doing.
        """
        real_open = SignedRecord.__dict__["open"]
        simulating = threading.get_ident()

        def counted_open(cls: type[SignedRecord], data: bytes) -> Any:
            if threading.get_ident() != simulating:
                return real_open.__func__(cls, data)
            self.count += 1
            return self._opened.get((cls.KIND, data), lambda: real_open.__func__(cls, data))

        unseal, decode = _unseal_once(), _once(identity.public_key_bytes)
        replaced: list[tuple[Any, str, Any]] = [
            (SignedRecord, "open", classmethod(counted_open)),
            (records, "unseal", unseal),
            (dht_rules, "unseal", unseal),
            (identity, "public_key_bytes", decode),
            (fields, "public_key_bytes", decode),
        ]
        before = [(owner, name, owner.__dict__[name]) for owner, name, _ in replaced]
        try:
            for owner, name, function in replaced:
                setattr(owner, name, function)
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)


def _once(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A pure function that remembers."""
    memo = Memo()
    return lambda argument: memo.get(argument, lambda: function(argument))


def _unseal_once() -> Callable[..., Sealed]:
    """`unseal` that remembers what was sealed as any kind of record."""
    memo = Memo()
    kinds = [payload_type(kind) for kind in (Claim.KIND, Announcement.KIND, Holding.KIND)]

    def unseal_once(data: bytes, wanted: str | Collection[str], *, max_bytes: int) -> Sealed:
        sealed: Sealed = memo.get(data, lambda: unseal(data, kinds, max_bytes=MAX_RECORD))
        if sealed.payload_type == wanted or (not isinstance(wanted, str) and sealed.payload_type in wanted):
            return sealed
        return unseal(data, wanted, max_bytes=max_bytes)

    return unseal_once


def verification_s(samples: int = 300) -> float:
    """CPU seconds of verifying one claim, the median of ``samples`` on this machine."""
    signer = Identity(b"v" * 32)
    progress = Progress(step=1, steps=1000, loss=0.5, images_per_s=10.0, device="cpu")
    took = []
    for seq in range(samples):
        data = Claim(plan="0" * 64, slot="0", peer=signer.peer_id, seq=seq, until=1e9, progress=progress).seal(signer)
        begun = time.process_time()
        Claim.open(data)
        took.append(time.process_time() - begun)
    return sorted(took)[samples // 2]
