"""A Stream over an asyncio reader and writer: what p2pd hands over once a libp2p stream is open."""

from __future__ import annotations

import asyncio

from paris_swarm.swarm.transport import StreamClosed

CLOSE_S = 2.0
"""How long a close waits for the last bytes to leave, seconds."""


class SocketStream:
    """See transport.Stream; ``peer_id`` is what the libp2p channel proved."""

    def __init__(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._peer_id, self._reader, self._writer = peer_id, reader, writer

    @property
    def peer_id(self) -> str:
        return self._peer_id

    async def read_exactly(self, size: int) -> bytes:
        try:
            return await self._reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            got = len(error.partial)
            raise StreamClosed(f"{self._peer_id} closed the stream after {got} of {size} bytes") from error
        except ConnectionError as error:
            raise StreamClosed(f"the stream with {self._peer_id} broke: {error}") from error

    async def write(self, data: bytes | memoryview) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except (ConnectionError, RuntimeError) as error:  # RuntimeError: the transport is already closing
            raise StreamClosed(f"{self._peer_id} closed the stream: {error}") from error

    async def close(self) -> None:
        self._writer.close()
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            self._writer.transport.abort()
