"""The network as the rest of the room sees it: a DHT for small records, authenticated streams for files.

Two transports fulfil this interface and pass one contract suite (tests/swarm/test_transport_contract.py): the real one
(hivemind_transport) and an in-memory one with faults (memory.py).

Starting takes two steps, because a newcomer has to fetch the plan (over streams) before it can judge records:
the transport's own ``start`` makes streams work; ``join_dht(check)`` joins the DHT with a validator.

    TransportError             the world, not a peer's data (that is RecordError) nor the caller (ValueError)
     ├─ TransportDown          our own end does not run: not started, died, or closed
     ├─ Unreachable            a known address did not answer, or answered with another peer's key
     ├─ PeerNotFound           nobody we know knows an address of this peer
     ├─ StreamClosed           the other end closed before the bytes came (in libp2p a cut looks like a clean end)
     ├─ Stalled                no bytes within the stall time
     ├─ NotHeld                the peer does not hold these bytes (any more)
     ├─ TurnedAway             the peer does not let this node in
     ├─ Busy                   the peer serves as many streams as it wants to
     └─ NoSource               every source was tried; ``failures`` says what each one did
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Protocol

FILE_PROTOCOL = "/paris-swarm/files/3"
"""The one libp2p stream protocol of this project (wire.py)."""


class TransportError(Exception):
    """The network did not do what was asked; the message says which part of it and what to try."""


class TransportDown(TransportError):
    """This node's network daemon is not running: start the node again."""


class Unreachable(TransportError):
    """A peer did not answer at its address: check that it runs and that its port is open."""


class PeerNotFound(TransportError):
    """No address of this peer is known: it may have left, or this node has lost its seeds."""


class StreamClosed(TransportError):
    """The other end closed the stream before all bytes came."""


class Stalled(TransportError):
    """The other end sent or took nothing within the stall time."""


class NotHeld(TransportError):
    """The peer does not hold the bytes it was asked for."""


class TurnedAway(TransportError):
    """The peer does not let this node in: the swarm is closed and this peer id is not admitted, or no longer, or that
    peer blocks it. Ask the organiser for an invite made for this peer id (`paris-swarm identity show` prints it).
    """


class Busy(TransportError):
    """The peer already serves as many streams as it wants to: ask again later, or another peer."""


class NoSource(TransportError):
    """No peer could deliver; ``failures`` maps each peer tried to what it did."""

    def __init__(self, message: str, failures: Mapping[str, Exception] | None = None) -> None:
        super().__init__(message)
        self.failures: dict[str, Exception] = dict(failures or {})


class Stream(Protocol):
    """One bidirectional byte stream with an authenticated peer at the other end."""

    @property
    def peer_id(self) -> str:
        """The other end's peer id, proved by the channel's key exchange."""

    async def read_exactly(self, size: int) -> bytes:
        """Read ``size`` bytes. Raises StreamClosed when the stream ends before."""

    async def read_into(self, view: memoryview) -> int:
        """Read 1 to len(view) bytes, as many as there are. Raises StreamClosed when the stream ends before."""

    async def write(self, data: bytes | memoryview) -> None:
        """Write and wait until the buffer drains. Raises StreamClosed when the other end is gone."""

    async def close(self) -> None:
        """Close both directions; never raises; may be called twice."""


StreamHandler = Callable[[str, Stream], Awaitable[None]]
"""Called with (peer id, stream) for every incoming stream; the stream is closed when it returns or raises."""

RecordCheck = Callable[[bytes, "str | None", object, float], object]
"""``check(dht_id, subkey, value, expiration)``: raises to refuse; what it returns is ignored.

dht_id: 20 bytes. expiration: Unix seconds. The transports refuse by themselves what is not a str subkey with bytes.
"""


class Transport(Protocol):
    """One peer's end of the network."""

    @property
    def peer_id(self) -> str:
        """This peer's libp2p id."""

    # ---- records: after join_dht

    async def join_dht(self, check: RecordCheck, *, reserved: Collection[str] = ()) -> None:
        """Join the DHT; every record stored here or read from others passes ``check`` first.

        Args:
            reserved: subkeys that find room here even where a flood has filled a key (R-DHT-8).
        """

    async def store(self, key: str, subkey: str, value: bytes, until: float) -> bool:
        """Store a record on this node and on the nodes nearest to the key until ``until`` (Unix s).

        Returns:
            True when at least one OTHER node holds it now (or a newer one of this subkey). False: kept on this node
            only, because nobody else is reachable, or refused by the check.

        Raises:
            TransportDown: the DHT was not joined, or the daemon died.
            Stalled: the search took too long.
        """

    async def get(self, key: str) -> dict[str, tuple[bytes, float]]:
        """Every live record under ``key`` on any node the search reaches: subkey -> (value, until), newest of each.

        Raises:
            TransportDown: the DHT was not joined, or the daemon died.
            Stalled: the search took too long.
        """

    # ---- streams

    def serve(self, handler: StreamHandler) -> None:
        """Answer incoming streams of FILE_PROTOCOL with ``handler`` (replaces the handler before)."""

    async def open_stream(self, peer_id: str, *, addresses: Sequence[str] = ()) -> Stream:
        """Open a stream to a peer, found by its id alone, or dialled at ``addresses`` first when they are given.

        Raises:
            PeerNotFound, Unreachable: the peer cannot be reached.
            NotHeld: the peer is an observer and serves no files. (One that has not called ``serve`` yet ends the
                stream at once: StreamClosed on the first read.)
        """

    # ---- peers

    async def connect(self, address: str) -> str:
        """Dial a full multiaddr (ends in ``/p2p/<peer id>``) and keep it as a known address; returns the peer id.

        Raises:
            Unreachable: nothing answered, or another key did.
            ValueError: not a multiaddr with a peer id.
        """

    async def addresses(self) -> list[str]:
        """Full multiaddrs under which others can dial this node; empty for an observer."""

    async def connected_peers(self) -> list[str]:
        """Peer ids with an open connection."""

    async def known_addresses(self) -> list[str]:
        """Dialable full multiaddrs of connected peers, for the peer cache."""

    async def clock_offset(self) -> float | None:
        """Seconds to add to this clock to agree with the median peer; None when no peer answered."""

    def population(self) -> int:
        """Estimated number of nodes of the DHT, this one included (crowd.py); 1 before join_dht."""

    def alive(self) -> bool:
        """Whether the daemon runs. False after it died, however it died, and after close()."""

    async def close(self) -> None:
        """Stop everything this transport started; never raises; may be called twice."""
