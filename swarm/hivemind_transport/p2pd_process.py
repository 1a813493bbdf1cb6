"""p2pd as a process of ours: started until its relay is the one with our limit, ended with all that hivemind runs."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from paris_swarm.swarm import p2pd_launch
from paris_swarm.swarm.hivemind_transport.p2pd_control import CONTROL_S, Control
from paris_swarm.swarm.relay_limit import HOP_PROTOCOL, circuit_bytes
from paris_swarm.swarm.transport import TransportDown, TransportError

log = logging.getLogger(__name__)

_RELAYED_BYTES = 1 << 30
"""What a relay of ours lets through one circuit."""
_RELAY_STARTS = 16
"""p2pd v0.5.0 registers a second relay service, with libp2p's 128 KiB, while the one that knows our limit starts;
whichever comes last answers, in about half of all starts ours (docs/results/transfer-faults-2026-11.md).
"""


class LaunchedP2P(P2P):  # type: ignore[misc]
    """P2P whose daemon is started through p2pd_launch.py, and whose calls fail at once when the daemon is gone.

    Attributes:
        closing: set when its end is wanted; from then on it counts as gone.
    """

    closing = False
    _gone = False

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        command: list[str] = P2P._make_process_args(*args, **kwargs)
        if kwargs.get("relay"):
            command += ["-relayService=1", f"-relayDataLimit={_RELAYED_BYTES}"]
        if not sys.executable:
            return command
        return [sys.executable, "-I", "-S", p2pd_launch.__file__, str(os.getpid()), *command]

    async def _call_unary_protobuf_handler(self, *args: Any) -> Any:
        if self._gone:
            raise P2PDaemonError("p2pd is not running")
        return await super()._call_unary_protobuf_handler(*args)

    def alive(self) -> bool:
        """Whether the daemon runs and is to go on."""
        return not self.closing and self._child.returncode is None

    def need_up(self) -> None:
        """Raises TransportDown unless ``alive``."""
        if not self.alive():
            raise TransportDown("p2pd is not running: start the node again")

    def fail_calls(self) -> None:
        """End every call that waits for an answer, and every later one: searches over many peers end with them."""
        self._gone = True
        for answer in list(self._client.control._pending_calls.values()) if self._client is not None else []:
            if not answer.done():
                answer.set_exception(P2PDaemonError("p2pd is not running"))


async def launched(**options: Any) -> LaunchedP2P:
    """Start p2pd; one that is to relay is started until the relay service in charge is the one with our limit.

    Raises:
        P2PDaemonError, OSError, TimeoutError: it does not start.
    """
    if not options["use_relay"] or options["force_reachability"] != "public":
        plain: LaunchedP2P = await LaunchedP2P.create(**options)
        return plain
    for left in reversed(range(_RELAY_STARTS)):
        relay: LaunchedP2P = await LaunchedP2P.create(**options)
        try:
            limit = await _circuit_limit(relay, options["host_maddrs"])
        except BaseException:
            await ended(relay)
            raise
        if limit is None or limit == 0 or limit >= _RELAYED_BYTES:
            break
        if left:
            await ended(relay)
        else:
            log.warning("this relay lets %d bytes through a circuit: files through it come in small parts", limit)
    return relay


async def _circuit_limit(relay: LaunchedP2P, listen: Sequence[str]) -> int | None:
    """What a relay on this host lets through a circuit, bytes, as it tells a peer that asks; None: not found out."""
    # A new one each time: one that knew the relay before it was started again still takes itself to be connected.
    probe: LaunchedP2P = await LaunchedP2P.create(
        no_listen=True,
        dht_mode="client",
        auto_nat=False,
        nat_port_map=False,
        use_relay=False,
        check_if_identity_free=False,
        startup_timeout=CONTROL_S,
    )
    try:
        identified = await Control(relay).request(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        # What it announces may lead here from outside only; what it listens on leads here from this host.
        here = [address.replace("/0.0.0.0/", "/127.0.0.1/").replace("/ip6/::/", "/ip6/::1/") for address in listen]
        addresses = [*(Multiaddr(address).to_bytes() for address in here), *identified.identify.addrs]
        target = p2pd_pb2.ConnectRequest(peer=relay.peer_id.to_bytes(), addrs=addresses, timeout=int(CONTROL_S / 2))
        control = Control(probe)
        await control.request(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=target))
        stream = await control.open_stream(relay.peer_id.to_base58(), HOP_PROTOCOL)
        try:
            async with asyncio.timeout(CONTROL_S):
                return await circuit_bytes(stream)
        finally:
            await stream.close()
    except (P2PDaemonError, TransportError, TimeoutError, ValueError) as error:
        log.warning("what this relay lets through a circuit could not be asked for: %s", error)
        return None
    finally:
        await ended(probe)


async def ended(p2p: LaunchedP2P, tasks: Iterable[asyncio.Task[Any]] = ()) -> None:
    """End a p2pd, what hivemind runs for it, and ``tasks``."""
    control = p2p._client.control if p2p._client is not None else None
    theirs = [p2p._listen_task, p2p._reader_task]
    theirs += [control._read_task, control._write_task] if control is not None else []
    every = [task for task in (*tasks, *theirs) if task is not None]
    child = p2p._child
    p2p.fail_calls()
    p2p._terminate()
    for task in every:
        task.cancel()
    await asyncio.gather(*every, return_exceptions=True)
    try:
        async with asyncio.timeout(5.0):
            await child.wait()
    except TimeoutError:
        child.kill()
        await child.wait()
    child._transport.close()
