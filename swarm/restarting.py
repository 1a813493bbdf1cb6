"""A transport that comes back: when its daemon dies, it is started again, same identity and port, and joins anew.

p2pd is another process: the out-of-memory killer, a crash or a careless ``kill`` can end it while training goes
on. Streams that were open end (downloads go on with what they have), calls made meanwhile raise TransportDown, and what
this node holds is announced again by its own timers. After ``attempts`` starts in a row that did not last the transport
is given up, and ``alive`` says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Sequence

from paris_swarm.swarm.transport import RecordCheck, Stream, StreamHandler, Transport, TransportError

log = logging.getLogger(__name__)

Launch = Callable[[int | None, Sequence[str]], Awaitable[Transport]]
"""``launch(port, seeds)`` starts the daemon: on ``port`` (None: as asked for at first), dialling ``seeds`` besides
the ones it was asked for at first.
"""

LASTED_S = 60.0
"""A daemon that ran for so long was well: failures are counted anew."""


class RestartingTransport:
    """See transport.Transport; make it with ``await RestartingTransport.start(launch)``.

    Attributes:
        restarts: how often the daemon was started again.
    """

    def __init__(
        self, launch: Launch, inner: Transport, *, attempts: int, check_every_s: float, backoff_s: float
    ) -> None:
        self._launch, self._inner = launch, inner
        self._attempts, self._check_every_s, self._backoff_s = attempts, check_every_s, backoff_s
        self._handler: StreamHandler | None = None
        self._joined: tuple[RecordCheck, Collection[str]] | None = None
        self._known: list[str] = []
        self._port: int | None = None
        self._given_up = self._closed = False
        self._watching: asyncio.Task[None] | None = None
        self.restarts = 0

    @classmethod
    async def start(
        cls, launch: Launch, *, attempts: int = 5, check_every_s: float = 0.5, backoff_s: float = 0.5
    ) -> RestartingTransport:
        """Start for the first time; what goes wrong then is raised, not tried again.

        Raises:
            TransportDown, ValueError: as ``launch`` does.
        """
        inner = await launch(None, ())
        self = cls(launch, inner, attempts=attempts, check_every_s=check_every_s, backoff_s=backoff_s)
        try:
            await self._note_port()
        except BaseException:
            await inner.close()
            raise
        self._watching = asyncio.create_task(self._watch())
        return self

    async def _note_port(self) -> None:
        with contextlib.suppress(TransportError):
            for address in await self._inner.addresses():
                if found := re.search(r"/(?:tcp|udp)/(\d+)(?:/|$)", address):
                    self._port = int(found[1])
                    return

    # ---- coming back

    async def _watch(self) -> None:
        clock = asyncio.get_running_loop().time
        failures, began = 0, clock()
        while True:
            await asyncio.sleep(self._check_every_s)
            if self._inner.alive():
                continue
            failures = 1 if clock() - began > LASTED_S else failures + 1
            if failures > self._attempts:
                log.error("the network daemon ended %d times in a row: given up", failures)
                self._given_up = True
                return
            log.warning("the network daemon ended: starting it again (%d of %d)", failures, self._attempts)
            await asyncio.sleep(self._backoff_s * 2.0 ** (failures - 1) if failures > 1 else 0.0)
            # Others know this node by its port; when it cannot be had again, any other is better than none.
            began = clock()
            await self._come_back(self._port if failures <= 2 else None)

    async def _come_back(self, port: int | None) -> None:
        await self._inner.close()
        try:
            inner = await self._launch(port, self._known)
        except (TransportError, OSError) as error:
            log.warning("the network daemon did not start: %s", error)
            return
        self._inner = inner
        if self._handler is not None:
            inner.serve(self._handler)
        try:
            if self._joined is not None:
                check, reserved = self._joined
                await inner.join_dht(check, reserved=reserved)
        except TransportError as error:
            log.warning("the network daemon started and did not join: %s", error)
            await inner.close()
            return
        self.restarts += 1
        await self._note_port()

    # ---- the interface

    @property
    def peer_id(self) -> str:
        return self._inner.peer_id

    async def join_dht(self, check: RecordCheck, *, reserved: Collection[str] = ()) -> None:
        await self._inner.join_dht(check, reserved=reserved)
        self._joined = check, reserved

    async def store(self, key: str, subkey: str, value: bytes, until: float) -> bool:
        return await self._inner.store(key, subkey, value, until)

    async def get(self, key: str) -> dict[str, tuple[bytes, float]]:
        return await self._inner.get(key)

    def population(self) -> int:
        return self._inner.population()

    def serve(self, handler: StreamHandler) -> None:
        self._handler = handler
        self._inner.serve(handler)

    async def open_stream(self, peer_id: str, *, addresses: Sequence[str] = ()) -> Stream:
        return await self._inner.open_stream(peer_id, addresses=addresses)

    async def connect(self, address: str) -> str:
        peer_id = await self._inner.connect(address)
        self._known = list(dict.fromkeys([address, *self._known]))[:64]
        return peer_id

    async def addresses(self) -> list[str]:
        return await self._inner.addresses()

    async def connected_peers(self) -> list[str]:
        return await self._inner.connected_peers()

    async def known_addresses(self) -> list[str]:
        known = await self._inner.known_addresses()
        self._known = list(dict.fromkeys([*known, *self._known]))[:64]
        return known

    async def clock_offset(self) -> float | None:
        return await self._inner.clock_offset()

    def alive(self) -> bool:
        return not self._closed and not self._given_up

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._inner.close()
