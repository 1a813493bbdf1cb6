"""Requests to p2pd over its control socket, and the libp2p streams that come of them."""

from __future__ import annotations

import asyncio

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from paris_swarm.swarm.socket_stream import BareSocket, SocketStream, taken_over
from paris_swarm.swarm.transport import TransportDown

CONTROL_S = 20.0
"""For how long p2pd may think about a request; it may dial for half of that."""


class Control:
    """Requests to p2pd over its Unix socket; every socket is closed, also when a request fails or is cancelled."""

    def __init__(self, p2p: P2P) -> None:
        self._path = p2p.daemon_listen_maddr.value_for_protocol("unix")

    async def request(self, request: p2pd_pb2.Request) -> p2pd_pb2.Response:
        """One request, one response. Raises TransportDown, or P2PDaemonError with p2pd's own words."""
        response, _reader, writer = await self._exchange(request)
        writer.close()
        return response

    async def open_stream(self, peer_id: str, protocol: str) -> SocketStream:
        """The request's own socket becomes the stream. Raises as ``request``."""
        opening = p2pd_pb2.StreamOpenRequest(peer=PeerID.from_base58(peer_id).to_bytes(), proto=[protocol])
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=opening)
        response, reader, writer = await self._exchange(request)
        return await stream_over(peer_id, response.streamInfo.addr, reader, writer)

    async def _exchange(
        self, request: p2pd_pb2.Request
    ) -> tuple[p2pd_pb2.Response, asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            reader, writer = await asyncio.open_unix_connection(self._path)
        except OSError as error:
            raise TransportDown(f"p2pd does not answer at {self._path} ({error}): start the node again") from error
        try:
            async with asyncio.timeout(CONTROL_S):
                await write_pbmsg(writer, request)
                response = p2pd_pb2.Response()
                await read_pbmsg_safe(reader, response)
            if response.type == p2pd_pb2.Response.ERROR:
                raise P2PDaemonError(response.error.msg)
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            writer.transport.abort()
            if isinstance(error, TimeoutError):
                raise P2PDaemonError(f"no answer within {CONTROL_S:g} s") from error
            raise TransportDown(f"p2pd closed its control connection ({error}): start the node again") from error
        except BaseException:
            writer.transport.abort()
            raise
        return response, reader, writer


async def stream_over(
    peer_id: str, remote: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> SocketStream:
    """Our stream over a socket that p2pd answers on. remote: where it is connected, a packed multiaddr."""
    sock, early = await taken_over(reader, writer)
    try:
        address = str(Multiaddr(remote)) if remote else ""
    except ValueError:
        address = ""
    return SocketStream(peer_id, BareSocket(peer_id, sock, early), remote=address)
