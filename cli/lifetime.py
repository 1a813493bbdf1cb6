"""Running until told to stop: SIGINT and SIGTERM end a verb in order, a second Ctrl-C at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.transport import TransportDown


def on_signals(stop: Callable[[], None]) -> None:
    """Call ``stop`` on the first SIGINT or SIGTERM; a second one interrupts at once."""
    loop = asyncio.get_running_loop()

    def first(number: int) -> None:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.default_int_handler)
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, first, number)


async def until_interrupted(node: SwarmNode, *, check_every_s: float = 2.0) -> None:
    """Wait for a signal.

    Raises:
        TransportDown: the network daemon died.
        RecordError: this peer was revoked, or its key equivocated.
    """
    stopped = asyncio.Event()
    on_signals(stopped.set)
    while not stopped.is_set():
        try:
            await asyncio.wait_for(stopped.wait(), check_every_s)
        except TimeoutError:
            if not node.transport.alive():
                raise TransportDown("the network daemon (p2pd) ended again and again; start this again") from None
            node.check_own()
