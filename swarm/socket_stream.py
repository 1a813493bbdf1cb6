"""A Stream over a plain socket of this process: what p2pd hands over once a libp2p stream is open.

No asyncio transport in between: bytes go from the kernel into the buffer that they are hashed and written from, and out
of the buffer they were read into, with no copy on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Protocol

from paris_swarm.swarm.transport import StreamClosed

SEND_BUFFER = 1 << 20
"""Bytes the kernel may hold for p2pd: enough for a whole piece, so that a write seldom waits twice."""


class BareSocket:
    """Reads and writes of one non-blocking socket on the running loop; ``abort`` ends those under way.

    At most one read and one write at a time. ``name`` is who is at the other end, for messages.
    """

    def __init__(self, name: str, sock: socket.socket, early: bytes = b"") -> None:
        """``early``: bytes that were already read from the socket, to be given out first."""
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX:  # TCP finds its own size, up to what the path can hold
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.name = name
        self._sock, self._early = sock, memoryview(early)
        self._closed, self._under_way = False, 0

    async def receive(self, view: memoryview) -> int:
        """Read 1 to len(view) bytes; 0 at the end of the stream. Raises StreamClosed."""
        if self._early:
            size = min(len(view), len(self._early))
            view[:size], self._early = self._early[:size], self._early[size:]
            return size
        with self._working():
            return await asyncio.get_running_loop().sock_recv_into(self._sock, view)

    async def send(self, data: bytes | memoryview) -> None:
        """Hand all of ``data`` to the kernel. Raises StreamClosed."""
        with self._working():
            await asyncio.get_running_loop().sock_sendall(self._sock, data)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        if self._closed:
            raise StreamClosed(f"the stream with {self.name} is closed")
        self._under_way += 1
        try:
            yield
        except OSError as error:
            raise StreamClosed(f"the stream with {self.name} broke: {error}") from error
        finally:
            self._under_way -= 1
            if self._closed and not self._under_way:
                self._sock.close()

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        """Both directions end now; a read or write under way finds the end and then lets go of the descriptor."""
        if self._closed:
            return
        self._closed = True
        if self._under_way:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        else:
            self._sock.close()


class Channel(Protocol):
    """What a SocketStream reads from and writes to."""

    async def receive(self, view: memoryview) -> int:
        """Read 1 to len(view) bytes; 0 at the end. Raises StreamClosed."""

    async def send(self, data: bytes | memoryview) -> None:
        """Send all of ``data``. Raises StreamClosed."""

    async def close(self) -> None:
        """Close both directions; never raises."""


class SocketStream:
    """See transport.Stream. peer_id: proved by whoever made the channel. remote: the other end's multiaddr, or ""."""

    def __init__(self, peer_id: str, channel: Channel, *, remote: str = "") -> None:
        self._peer_id, self._channel = peer_id, channel
        self.remote = remote

    @property
    def peer_id(self) -> str:
        return self._peer_id

    async def read_into(self, view: memoryview) -> int:
        size = await self._channel.receive(view)
        if size == 0:
            raise StreamClosed(f"{self._peer_id} closed the stream")
        return size

    async def read_exactly(self, size: int) -> bytes:
        buffer, got = bytearray(size), 0
        while got < size:
            try:
                got += await self.read_into(memoryview(buffer)[got:])
            except StreamClosed as error:
                raise StreamClosed(f"{error} after {got} of {size} bytes") from error
        return bytes(buffer)

    async def write(self, data: bytes | memoryview) -> None:
        await self._channel.send(data)

    async def close(self) -> None:
        await self._channel.close()


async def taken_over(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[socket.socket, bytes]:
    """The socket under an asyncio stream, ours alone from now on, and the bytes that were already read from it.

    Raises StreamClosed when it is closed already.
    """
    transport = writer.transport
    try:
        transport.pause_reading()  # type: ignore[attr-defined]
        sock = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
    except (RuntimeError, OSError) as error:
        raise StreamClosed(f"the stream is closed: {error}") from error
    reader.feed_eof()
    early = await reader.read()
    transport.abort()  # closes its own descriptor; ours is another one of the same socket
    return sock, early
