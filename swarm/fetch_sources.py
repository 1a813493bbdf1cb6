"""How a fetch reaches the peers it asks, and what each of them did last."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.swarm.door import Door
from paris_swarm.swarm.fetch_session import BadChunk, DamagedCopy, Session, SpareMemory
from paris_swarm.swarm.sources import SourceBook
from paris_swarm.swarm.transport import NoSource, Transport, TurnedAway

log = logging.getLogger(__name__)

OnFault = Callable[[str, Exception], None]
"""Called with (peer id, what it did) whenever a source is left."""

Addresses = Mapping[str, Sequence[str]]
"""Multiaddrs to dial, by peer id."""


@dataclass
class FetchSources:
    """How to reach peers, and what each did last."""

    transport: Transport
    addresses: Addresses
    on_fault: OnFault | None
    stall_s: float
    door: Door
    book: SourceBook
    memory: SpareMemory = field(default_factory=SpareMemory)
    failures: dict[str, Exception] = field(default_factory=dict)

    @asynccontextmanager
    async def session(
        self, peer: str, what: str, *, arriving: Callable[[int], None] | None = None
    ) -> AsyncIterator[Session]:
        stream = await self.transport.open_stream(peer, addresses=self.addresses.get(peer, ()))
        try:
            session = Session(peer, what, stream, self.stall_s, arriving=arriving, memory=self.memory)
            await session.greet(self.door)
            yield session
        finally:
            await stream.close()

    def resume(self, peer: str, error: Exception) -> None:
        """Keep what ended a stream that was of use: another one is opened at once."""
        log.debug("another stream to %s: %s", peer, error)
        self.failures[peer] = error

    def note(self, peer: str, error: Exception) -> None:
        """Keep what a peer did; whoever sent wrong bytes is banned."""
        log.warning("left %s: %s", peer, error)
        self.failures[peer] = error
        if isinstance(error, BadChunk) and not isinstance(error, DamagedCopy):
            self.book.ban(peer, error.detail)
        if self.on_fault is not None:
            self.on_fault(peer, error)

    def error(self, what: str) -> Exception:
        """The error to end with: wrong bytes outrank absence, since only they need somebody's attention."""
        for error in self.failures.values():
            if isinstance(error, RecordError):
                return error
        if self.failures and all(isinstance(error, TurnedAway) for error in self.failures.values()):
            return next(iter(self.failures.values()))
        tried = "; ".join(f"{peer}: {error}" for peer, error in self.failures.items())
        banned = "; ".join(f"{peer} was banned: {why}" for peer, why in self.book.banned().items())
        why = "; ".join(part for part in (tried, banned) if part) or "no peer is known to hold it"
        return NoSource(f"{what}: nobody could deliver ({why}); try again when a holder is online", self.failures)
