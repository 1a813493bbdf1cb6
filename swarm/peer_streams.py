"""File streams of one node, over libp2p or a direct connection: which way they are opened, and who serves them.

What libp2p itself does is the caller's (hivemind_transport): it opens a stream of a protocol to a peer, and hands
over those that come in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from paris_swarm.swarm.direct import DIRECT_PROTOCOL, DirectStreams, host_of
from paris_swarm.swarm.socket_stream import SocketStream
from paris_swarm.swarm.transport import (
    FILE_PROTOCOL,
    NotHeld,
    PeerNotFound,
    Stream,
    StreamHandler,
    TransportDown,
    TransportError,
    Unreachable,
)

log = logging.getLogger(__name__)

_OFFER_S = 20.0
"""For how long a direct connection may be asked for on one stream."""

OpenLibp2p = Callable[[str, str], Awaitable[SocketStream]]
"""Called with (peer id, protocol). Raises NotHeld, PeerNotFound, Unreachable, TransportDown."""


class PeerStreams:
    """Opens and serves.

    Args:
        open_libp2p: opens a libp2p stream.
        direct: use direct connections where both ends want one and can (direct.py).

    Attributes:
        handler: serves incoming streams; without one they are closed.
    """

    def __init__(self, open_libp2p: OpenLibp2p, *, direct: bool) -> None:
        self._open_libp2p = open_libp2p
        self._direct = DirectStreams() if direct else None
        self.handler: StreamHandler | None = None
        self._incoming: set[asyncio.Task[None]] = set()
        self._closing = False

    async def open(self, peer_id: str) -> Stream:
        """A file stream to a peer. Raises as ``open_libp2p``."""
        return await self._open_direct(peer_id) or await self._open_libp2p(peer_id, FILE_PROTOCOL)

    async def _open_direct(self, peer_id: str) -> Stream | None:
        """A direct connection when both ends want one and can; whatever stands in its way, libp2p has the last word."""
        if self._direct is None or not self._direct.worth_trying(peer_id):
            return None
        try:
            control = await self._open_libp2p(peer_id, DIRECT_PROTOCOL)
        except NotHeld:
            self._direct.avoid(peer_id)
            return None
        except (PeerNotFound, Unreachable):
            return None
        try:
            return await self._direct.dial(control, control.remote)
        finally:
            await control.close()

    async def listen(self, listen: str | Sequence[str], port: int) -> bool:
        """Accept direct connections on the first address; False where there are none, and libp2p carries everything.

        Raises:
            TransportDown: the port asked for cannot be used.
        """
        first = listen if isinstance(listen, str) else next(iter(listen), "")
        host = host_of(first)
        if self._direct is None or host is None:
            return False
        try:
            await self._direct.listen(host, port, self._serve)
        except OSError as error:
            if port:
                raise TransportDown(f"port {port} for direct connections cannot be used: {error}") from error
            log.warning("no direct connections, files go through libp2p: %s", error)
            return False
        return True

    async def incoming(self, stream: SocketStream, protocol: str) -> None:
        """Serve a libp2p stream that a peer opened, to its end; never raises but for cancellation."""
        task = asyncio.current_task()
        assert task is not None
        self._incoming.add(task)
        try:
            if protocol == DIRECT_PROTOCOL and self._direct is not None:
                async with asyncio.timeout(_OFFER_S):
                    await self._direct.offer(stream, stream.remote)
            else:
                await self._serve(stream.peer_id, stream)
        except (TransportError, TimeoutError) as error:
            log.info("a stream from %s ended: %s", stream.peer_id, error)
        finally:
            self._incoming.discard(task)
            await stream.close()

    async def _serve(self, peer_id: str, stream: Stream) -> None:
        if self.handler is not None and not self._closing:
            await self.handler(peer_id, stream)

    def abandon(self) -> None:
        """Cut every direct stream: whoever reads or writes finds out."""
        if self._direct is not None:
            self._direct.abandon()

    async def close(self) -> None:
        """End all of them, and whoever serves them; may be called twice."""
        self._closing = True
        if self._direct is not None:
            await self._direct.close()
        tasks = list(self._incoming)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
