"""The door of a node of one swarm: who it lets in, what it tells them, what it learns from them, and the gossip.

Every stream opens with a greeting from either side (dht_schemas/greeting.py; SPEC.md, R-GRT). What comes is verified
before it is used: the organiser's notice, proofs of equivocation, and, in a closed swarm, the sender's admission
(R-GRT-4).
So news needs no third kind of DHT record: a node greets one random peer every third of a lease, and what one of N peers
knows all of them know after about log N rounds, at a constant cost to each.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from paris_swarm.dht_schemas.admission import Delegation, PeerLists, check_token, open_delegation
from paris_swarm.dht_schemas.errors import RecordError, Rollback, WrongPlan
from paris_swarm.dht_schemas.greeting import MAX_PROOFS, Greeting
from paris_swarm.dht_schemas.trusted import TrustedSwarm
from paris_swarm.swarm import wire
from paris_swarm.swarm.door import Door, OpenDoor, greet_server
from paris_swarm.swarm.transport import Stream, Transport

MAX_OBSERVERS = 1024
"""Observers whose peer is remembered: those that greeted last."""

Delegate = Callable[[], str]
"""Makes the delegation of an observer, valid from now."""


class SwarmDoor:
    """See door.Door. Judges by what ``trusted`` knows, and feeds it what greetings bring.

    Args:
        token: admission token of the peer this node is, or reads for; None where there is none.
        delegate: an observer's only.
        on_news: called after a greeting brought a notice or a proof that was not known here.
        serves: whether a digest belongs to this swarm; without it, everything in the store does.
    """

    def __init__(
        self,
        trusted: TrustedSwarm,
        *,
        token: str | None,
        clock: Callable[[], float],
        dice: random.Random,
        delegate: Delegate | None = None,
        on_news: Callable[[], None] = lambda: None,
        serves: Callable[[str], bool] = lambda _digest: True,
    ) -> None:
        self.token = token
        self._trusted = trusted
        self._clock = clock
        self._dice = dice
        self._delegate = delegate
        self._on_news = on_news
        self._serves = serves
        self._speaks_for: dict[str, str] = {}
        self._ends: dict[str, float] = {}
        self._endings: dict[int, asyncio.TimerHandle] = {}
        self._streams: dict[str, list[Stream]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    # ---- what this node says --------------------------------------------------

    def greeting(self) -> bytes:
        trusted = self._trusted
        proofs = trusted.notable_proofs()
        return Greeting(
            plan=trusted.plan_id,
            token=self.token,
            delegation=self._delegate() if self._delegate is not None else None,
            notice=self._notice(),
            proofs=tuple(
                (proof.first.decode("utf-8"), proof.second.decode("utf-8"))
                for proof in self._dice.sample(proofs, min(MAX_PROOFS, len(proofs)))
                if proof.first is not None
            ),
        ).to_bytes()

    def refusal(self, peer_id: str) -> bytes:
        """Nothing, but for a revoked peer: the notice that revokes it."""
        revoked = self._trusted.standing.revoked
        if peer_id in revoked or self._speaks_for.get(peer_id) in revoked:
            return Greeting(notice=self._notice()).to_bytes()
        return b""

    def _notice(self) -> str | None:
        """One of the newest: there are two where the organiser contradicts himself, and both must spread."""
        notices = self._trusted.notices
        return self._dice.choice(notices).sealed.envelope.decode("utf-8") if notices else None

    # ---- what others say ------------------------------------------------------

    def admit(self, peer_id: str, greeting: bytes) -> None:
        trusted = self._trusted
        known = (trusted.notices, len(trusted.proofs))
        try:
            said = Greeting.of_bytes(greeting)
            if said.plan not in (None, trusted.plan_id):
                raise WrongPlan(f"a greeting about plan {said.plan}, not {trusted.plan_id}", rule="R-GRT-3")
            if said.notice is not None:
                self._hear(said.notice.encode("utf-8"))
            self._judge(peer_id, said)
            for first, second in said.proofs:
                trusted.feed_proof(first.encode("utf-8"), second.encode("utf-8"))
            self.check(peer_id)
        finally:
            if known != (trusted.notices, len(trusted.proofs)):
                self._on_news()

    def _hear(self, notice: bytes) -> None:
        if any(notice == known.sealed.envelope for known in self._trusted.notices):
            return
        try:
            self._trusted.feed_notice(notice)
        except Rollback:
            return  # it has not heard yet: our own greeting tells it

    def _judge(self, peer_id: str, said: Greeting) -> None:
        """Raises RecordError unless the peer, and the peer it reads for, are admitted."""
        trusted = self._trusted
        lent = None
        if said.delegation is not None:
            lent = open_delegation(trusted.plan_id, peer_id, said.delegation, self._clock())
        lender = None if lent is None else lent.peer
        try:
            self._check(peer_id, lender)
            check_token(trusted.plan, trusted.plan_id, lender or peer_id, said.token)
        except RecordError:
            # A greeting that is refused must not loosen what binds an observer's open streams to its peer.
            if peer_id not in self._streams:
                self._bind(peer_id, lent)  # so that it is told whom the notice revokes
            raise
        self._bind(peer_id, lent)

    def _bind(self, peer_id: str, lent: Delegation | None) -> None:
        self._speaks_for.pop(peer_id, None)
        self._ends.pop(peer_id, None)
        if lent is not None:
            self._speaks_for[peer_id] = lent.peer
            self._ends[peer_id] = lent.until
            self._forget_observers()

    def _forget_observers(self) -> None:
        """Beyond MAX_OBSERVERS forget who greeted first; never one with an open stream, which R-GRT-5 may close."""
        spare = len(self._speaks_for) - MAX_OBSERVERS
        for observer in [peer for peer in self._speaks_for if peer not in self._streams][: max(0, spare)]:
            del self._speaks_for[observer], self._ends[observer]

    def check(self, peer_id: str) -> None:
        self._check(peer_id, self._speaks_for.get(peer_id))

    def _check(self, peer_id: str, speaker: str | None) -> None:
        trusted = self._trusted
        if speaker is None:
            trusted.check_signer(peer_id)
            return
        # An observer's throw-away key is on nobody's allow list: whoever it reads for decides. A key that is out stays
        # out, whoever lends it a name.
        if peer_id in trusted.outlaws or peer_id in trusted.standing.revoked or peer_id in trusted.lists.blocked:
            trusted.check_signer(peer_id)
        trusted.check_signer(speaker)

    def welcomes(self, peer_id: str) -> bool:
        """``check`` as an answer."""
        try:
            self.check(peer_id)
        except RecordError:
            return False
        return True

    def serves(self, digest: str) -> bool:
        return self._serves(digest)

    # ---- open streams ---------------------------------------------------------

    def enter(self, peer_id: str, stream: Stream) -> None:
        self._streams.setdefault(peer_id, []).append(stream)
        if (until := self._ends.get(peer_id)) is not None:
            # It ends with the delegation it was greeted with, also while it is idle; a new one greets with a new one.
            left = max(0.0, until - self._clock())
            self._endings[id(stream)] = asyncio.get_running_loop().call_later(left, self._close, stream)

    def leave(self, peer_id: str, stream: Stream) -> None:
        if (ending := self._endings.pop(id(stream), None)) is not None:
            ending.cancel()
        left = [other for other in self._streams.get(peer_id, []) if other is not stream]
        if left:
            self._streams[peer_id] = left
        else:
            self._streams.pop(peer_id, None)

    def close_unwelcome(self) -> None:
        """Close the streams of everybody who is no longer welcome (R-GRT-5)."""
        for peer_id, streams in list(self._streams.items()):
            for stream in () if self.welcomes(peer_id) else streams:
                self._close(stream)

    def _close(self, stream: Stream) -> None:
        closing = asyncio.ensure_future(stream.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


class NewcomerDoor(OpenDoor):
    """Before the plan is here: says which plan is wanted, and on whose invitation. The plan id protects what comes."""

    def __init__(
        self, plan_id: str, *, token: str | None, delegate: Delegate | None = None, lists: PeerLists | None = None
    ) -> None:
        self._plan_id = plan_id
        self._token = token
        self._delegate = delegate
        self._lists = lists or PeerLists()

    def greeting(self) -> bytes:
        delegation = self._delegate() if self._delegate is not None else None
        return Greeting(plan=self._plan_id, token=self._token, delegation=delegation).to_bytes()

    def check(self, peer_id: str) -> None:
        self._lists.check(peer_id)


async def greet_peer(transport: Transport, peer_id: str, door: Door, *, stall_s: float = 10.0) -> None:
    """Open a stream to a peer, exchange greetings, close it.

    Raises:
        TransportError: it cannot be reached, or turned this node away.
        RecordError: this node wants nothing from it.
    """
    stream = await transport.open_stream(peer_id)
    try:
        await greet_server(stream, wire.ResponseReader(), door, stall_s=stall_s)
    finally:
        await stream.close()
