"""A source of files as a process of its own, which can be told to go wrong at an exact byte.

Run as a script: ``faulty_source.py IDENTITY STORE PORT``. It prints one JSON line {"peer", "addresses", "p2pd"} and
then takes one JSON line a command: {"fault": NAME or null, "at": bytes of answers sent}. What was sent counts from the
command on, over all streams: headers and payloads of chunks.

    die       SIGKILL to this process and its p2pd
    freeze    SIGSTOP to both; only a SIGCONT from outside helps
    truncate  the stream is closed, as if all had been said
    flip      the lowest bit of one byte is flipped
    mute      this stream sends nothing more, and stays open
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from paris_swarm.swarm.counters import Counters
from paris_swarm.swarm.serving import serve_files
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.transport import Stream, StreamHandler


class Plot:
    """What is to go wrong, and how far it is until then."""

    def __init__(self) -> None:
        self.fault: str | None = None
        self.left = 0

    def set(self, fault: str | None, at: int) -> None:
        self.fault, self.left = fault, at

    def cut(self, size: int) -> int | None:
        """Where in the next ``size`` bytes it happens; None: not there."""
        if self.fault is None:
            return None
        at, self.left = self.left, self.left - size
        return at if 0 <= at < size else None


class FaultyStream:
    """A stream whose writes go wrong as plotted. The greeting (the first write) is left alone."""

    def __init__(self, inner: Stream, plot: Plot, victims: list[int]) -> None:
        self._inner, self._plot, self._victims, self._greeted = inner, plot, victims, False

    @property
    def peer_id(self) -> str:
        return self._inner.peer_id

    async def read_exactly(self, size: int) -> Any:
        return await self._inner.read_exactly(size)

    async def read_into(self, view: memoryview) -> int:
        return await self._inner.read_into(view)

    async def close(self) -> None:
        await self._inner.close()

    async def write(self, data: bytes | memoryview) -> None:
        at = self._plot.cut(len(data)) if self._greeted else None
        self._greeted = True
        if at is None:
            await self._inner.write(data)
            return
        fault, self._plot.fault = self._plot.fault, None
        whole = bytearray(data)
        if fault == "flip":
            whole[at] ^= 1
            await self._inner.write(bytes(whole))
            return
        await self._inner.write(bytes(whole[:at]))
        if fault in ("die", "freeze"):
            for victim in self._victims:
                os.kill(victim, signal.SIGKILL if fault == "die" else signal.SIGSTOP)
            if fault == "die":
                await asyncio.Event().wait()  # whoever is left says nothing more
        elif fault == "truncate":
            await self._inner.close()
        elif fault == "mute":
            await asyncio.Event().wait()


def faulty(handler: StreamHandler, plot: Plot, victims: list[int]) -> StreamHandler:
    """``handler`` over streams that go wrong."""

    async def handle(peer_id: str, stream: Stream) -> None:
        await handler(peer_id, FaultyStream(stream, plot, victims))

    return handle


async def main(identity: str, folder: str, port: str) -> None:
    from paris_swarm.swarm.hivemind_transport import HivemindTransport

    plot = Plot()
    node: Any = await HivemindTransport.start(Path(identity), listen=f"/ip4/127.0.0.1/tcp/{port}")
    p2pd = int(node._p2p._child.pid)
    # This process last: nobody else is left to carry out the rest.
    node.serve(faulty(serve_files(ContentStore(Path(folder)), Counters()), plot, [p2pd, os.getpid()]))
    print(json.dumps({"peer": node.peer_id, "addresses": await node.addresses(), "p2pd": p2pd}), flush=True)
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        command = json.loads(line)
        plot.set(command["fault"], command["at"])
        print(json.dumps({"set": command["fault"]}), flush=True)
    await node.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
