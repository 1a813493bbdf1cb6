"""What outranks single records: the organiser's notices and proofs of equivocation, heard, kept on disk and passed on.

They travel in greetings (`greeting.SwarmDoor`), never in the DHT. What an earlier run wrote down is verified again,
like anybody's word.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable

from paris_swarm.dht_schemas.errors import RecordError, Rollback
from paris_swarm.dht_schemas.trusted import TrustedSwarm
from paris_swarm.swarm.greeting import Delegate, SwarmDoor, greet_peer
from paris_swarm.swarm.home import SwarmHome
from paris_swarm.swarm.transport import Transport

log = logging.getLogger(__name__)


class News:
    """Notices and proofs of one swarm, in ``trusted`` and on disk.

    Args:
        dice: chooses whom to greet, and which news to tell.
        delegate: an observer's: makes the delegation by which it reads in a peer's name (SPEC.md, R-ADM-3).
        serves: whether what the store has under a digest is for the peers of this swarm.
    """

    def __init__(
        self,
        trusted: TrustedSwarm,
        files: SwarmHome,
        *,
        clock: Callable[[], float],
        dice: random.Random,
        delegate: Delegate | None,
        serves: Callable[[str], bool],
    ) -> None:
        self._trusted, self._files, self._clock, self._dice = trusted, files, clock, dice
        self._proofs_kept: set[str] = set()
        self._standing_logged = trusted.standing
        self.door = SwarmDoor(
            trusted,
            token=files.token(),
            clock=clock,
            dice=dice,
            delegate=delegate,
            on_news=self.keep,
            serves=serves,
        )
        self._recall()

    def _recall(self) -> None:
        """What was proven and what the organiser said in earlier runs."""
        for first, second in self._files.proofs():
            try:
                if (proof := self._trusted.feed_own_proof(first, second)) is not None:
                    self._proofs_kept.add(proof.signer)
            except RecordError as error:
                log.warning("a proof kept in %s does not hold: %s", self._files.path, error)
        for envelope in self._files.notices():
            try:
                self._trusted.feed_notice(envelope)
            except RecordError as error:
                log.warning("a notice kept in %s does not hold: %s", self._files.path, error)

    def reload_notices(self) -> None:
        """Take in what `paris-swarm notice` wrote beside this process."""
        known = self._trusted.notices
        with self._files.notices_locked():
            for envelope in self._files.notices():
                with contextlib.suppress(Rollback):
                    self._trusted.feed_notice(envelope)
        if self._trusted.notices != known:
            self.keep()

    def keep(self) -> None:
        """Notices and proofs on disk before anything follows from them; whoever is out has its streams closed."""
        with self._files.notices_locked():
            for envelope in self._files.notices():
                with contextlib.suppress(RecordError):
                    self._trusted.feed_notice(envelope)  # never an older one over a newer one
            if notices := [notice.sealed.envelope for notice in self._trusted.notices]:
                self._files.write_notices(notices)
        self._keep_proofs()
        standing = self._trusted.standing
        if standing.number and standing != self._standing_logged:
            self._standing_logged = standing
            self._files.log_event(
                {
                    "event": "notice",
                    "number": standing.number,
                    "state": standing.state,
                    "revoked": sorted(standing.revoked),
                    "message": standing.message,
                    "time": self._clock(),
                }
            )
        self.door.close_unwelcome()

    def _keep_proofs(self) -> None:
        for signer in self._proofs_kept - self._trusted.outlaws:
            self._proofs_kept.discard(signer)
            self._files.drop_proof(signer)  # others made it give way: there is room for a bounded number (R-SET-7)
        for proof in self._trusted.proofs:
            if proof.signer in self._trusted.notable and proof.signer not in self._proofs_kept:
                self._proofs_kept.add(proof.signer)
                if self._files.keep_proof(proof.signer, proof.first, proof.second):
                    self._files.log_event(
                        {
                            "event": "equivocation",
                            "peer": proof.signer,
                            "kind": proof.kind,
                            "slot": proof.slot,
                            "seq": proof.seq,
                            "time": self._clock(),
                        }
                    )

    @property
    def halted(self) -> str:
        """Why nobody trains now, for people; empty while the swarm runs."""
        standing = self._trusted.standing
        if standing.state == "running":
            return ""
        return f"the organiser {standing.state} the swarm" + (f": {standing.message}" if standing.message else "")

    async def exchange(self, transport: Transport, own: str) -> str | None:
        """Greet one random peer of those known: from live records, or connected. Returns its id; None without any.

        Raises:
            TransportError: it could not be reached, or turned this node away.
            RecordError: this node wants nothing from it.
        """
        peers = {peer for claims in self._trusted.claims.values() for peer in claims}
        peers |= {holder for holdings in self._trusted.holdings.values() for holder in holdings}
        peers |= set(await transport.connected_peers())
        peers -= {transport.peer_id, own}
        welcome = [peer for peer in sorted(peers) if self.door.welcomes(peer)]
        if not welcome:
            return None
        chosen = self._dice.choice(welcome)
        await greet_peer(transport, chosen, self.door)
        return chosen
