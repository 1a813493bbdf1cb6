"""A peer's home folder: identity, lock, peer cache, content store and one folder for each swarm.

HOME/identity.key         libp2p private key (Ed25519), 0600; it is the peer
HOME/lock                 held (flock) by the one process that speaks as this peer
HOME/peers.json           multiaddrs of peers seen, newest first: a way back in when the invite's peers are gone
HOME/store/               content store, shared by all swarms of this home
HOME/last_swarm           invite of the swarm last joined
HOME/allow.txt, block.txt peer ids, one a line, `#` begins a comment: whom this node alone lets in, or keeps out
HOME/swarms/<plan id>/    plan/, ledger.json and .seen, held/, copies/, work/<slot>/, traffic.json, events.jsonl,
                          events.1.jsonl (the one before it),
                          token (admission to a closed swarm), notice.json (the organiser's newest notices),
                          proofs/<peer id>.json (equivocation), roots.txt (checkpoints of this swarm in the store),
                          published.json (our own of them)
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paris_swarm.dht_schemas.admission import PeerLists, parse_peer_list
from paris_swarm.dht_schemas.files import atomic_write, atomic_write_json, quarantine
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.swarm.ledger import Ledger, read_json

PEER_CACHE = 64
MAX_EVENTS = 16 << 20
"""Bytes of events.jsonl at which a new one is begun; the one before it is kept."""


class HomeError(Exception):
    """Something about the home folder that its owner can mend; the message says what, where and how."""


class HomeBusy(HomeError):
    """Another process already speaks as this peer: two on one key would look like equivocation."""


class Home:
    """Paths and files of one home.

    Args:
        path: created (0700) when missing.

    Raises:
        HomeError: the path is a file, or cannot be created or written (no space, no permission).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except (FileExistsError, NotADirectoryError) as error:
            raise HomeError(f"{path} is not a folder: choose another with --home") from error
        except OSError as error:
            raise HomeError(
                f"cannot create the home folder {path} ({error.strerror}): choose another with --home"
            ) from error

    @property
    def identity_path(self) -> Path:
        return self.path / "identity.key"

    @property
    def store_path(self) -> Path:
        return self.path / "store"

    def swarm(self, plan_id: str, *, ledger: str = "ledger.json") -> SwarmHome:
        return SwarmHome(self.path / "swarms" / plan_id, plan_id, ledger)

    def identity(self, *, create: bool = True) -> Identity:
        """The peer's key; made on first use, written 0600 before it is used.

        Raises:
            HomeError: unreadable, not an Ed25519 key, open to others, or missing with ``create=False``.
        """
        path = self.identity_path
        if path.exists():
            mode = path.stat().st_mode & 0o777
            if mode & 0o077:
                raise HomeError(f"{path} can be read by others (mode {mode:04o}): run `chmod 600 {path}`")
            try:
                return Identity.from_protobuf(path.read_bytes())
            except PermissionError as error:
                raise HomeError(f"{path} cannot be read ({error.strerror}): check who owns it") from error
            except ValueError as error:
                raise HomeError(
                    f"{path} is not an Ed25519 identity ({error}): restore it with `paris-swarm identity import`, "
                    "or move it away to start as a new peer"
                ) from error
        if not create:
            raise HomeError(f"no identity in {self.path}: it is made by `join`, or by `paris-swarm identity show`")
        identity = Identity.generate()
        self.write_identity(identity)
        return identity

    def write_identity(self, identity: Identity) -> None:
        """Store ``identity`` (0600, fsynced). Refuses to overwrite another key.

        Raises:
            HomeError: a different identity is already there.
        """
        if self.identity_path.exists():
            if self.identity().peer_id == identity.peer_id:
                return
            raise HomeError(
                f"{self.identity_path} already holds {self.identity().peer_id}: move it away first, "
                "an identity is never overwritten"
            )
        atomic_write(self.identity_path, identity.to_protobuf(), mode=0o600)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the home for as long as this process speaks as its peer (released by the kernel, however it dies).

        Raises:
            HomeBusy: another live process holds it.
        """
        path = self.path / "lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise HomeBusy(
                    f"{self.path} is in use by process {self.holder() or 'unknown'}: "
                    "stop that one, or give this one its own --home"
                ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def holder(self) -> int | None:
        """Process id written by the last holder of the lock; meaningful while the lock is held."""
        try:
            return int((self.path / "lock").read_text("ascii"))
        except (OSError, ValueError):
            return None

    # ---- peers seen before ------------------------------------------------

    def known_peers(self) -> list[str]:
        """Multiaddrs seen in earlier runs, newest first; empty when there is no readable cache."""
        cached = read_json(self.path / "peers.json")
        return [item for item in cached if isinstance(item, str)] if isinstance(cached, list) else []

    def remember_peers(self, multiaddrs: Iterable[str]) -> None:
        merged = list(dict.fromkeys([*multiaddrs, *self.known_peers()]))[:PEER_CACHE]
        if merged != self.known_peers():
            atomic_write_json(self.path / "peers.json", merged)

    def last_invite(self) -> str | None:
        path = self.path / "last_swarm"
        return path.read_text("utf-8").strip() or None if path.exists() else None

    def peer_lists(self, allow: Path | None = None, block: Path | None = None) -> PeerLists:
        """Whom this node allows and blocks: allow.txt and block.txt, and the two files given beside them.

        Raises:
            HomeError: a file that was given is missing, or a line is no peer id.
        """
        allowed = [*_peer_list(self.path / "allow.txt", needed=False), *_peer_list(allow, needed=True)]
        blocked = [*_peer_list(self.path / "block.txt", needed=False), *_peer_list(block, needed=True)]
        return PeerLists(allowed=frozenset().union(*allowed) if allowed else None, blocked=frozenset().union(*blocked))

    def swarm_ids(self) -> list[str]:
        """Plan ids of the swarms this home has been part of."""
        folder = self.path / "swarms"
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    def foreign_roots(self, plan_id: str) -> frozenset[str]:
        """Plan ids, and roots in the store, of the other swarms of this home."""
        found: set[str] = set()
        for folder in (self.path / "swarms").iterdir():
            if folder.name != plan_id:
                found |= {folder.name, *_lines(folder / "roots.txt")}
        return frozenset(found)

    def remember_invite(self, invite: str) -> None:
        if self.last_invite() != invite:
            atomic_write(self.path / "last_swarm", invite.encode() + b"\n")


class SwarmHome:
    """The part of a home that belongs to one swarm."""

    def __init__(self, path: Path, plan_id: str, ledger: str) -> None:
        self.path = path
        self.plan_id = plan_id
        (path / "held").mkdir(parents=True, exist_ok=True, mode=0o700)
        self.ledger = Ledger(path / ledger)
        self._roots = set(_lines(path / "roots.txt"))

    @property
    def plan_path(self) -> Path:
        return self.path / "plan"

    def work(self, slot: str) -> Path:
        folder = self.path / "work" / slot
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def held(self) -> dict[str, bytes]:
        """Author envelopes of the checkpoints this home serves, by slot."""
        return {path.stem: path.read_bytes() for path in sorted((self.path / "held").glob("*.json"))}

    def hold(self, slot: str, envelope: bytes) -> None:
        atomic_write(self.path / "held" / f"{slot}.json", envelope)

    # ---- trust ------------------------------------------------------------

    def copies(self) -> dict[str, bytes]:
        """Author envelopes of checkpoints that this home assembled and keeps for others, by slot."""
        return {path.stem: path.read_bytes() for path in sorted((self.path / "copies").glob("*.json"))}

    def keep_copy(self, slot: str, envelope: bytes) -> None:
        """Keep a verified checkpoint for others: whatever process of this home serves announces it."""
        (self.path / "copies").mkdir(exist_ok=True, mode=0o700)
        atomic_write(self.path / "copies" / f"{slot}.json", envelope)

    def drop_copies(self) -> int:
        """Stop keeping copies for others (their files stay until `store gc`); returns how many there were."""
        paths = list((self.path / "copies").glob("*.json"))
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)

    def token(self) -> str | None:
        """The admission token of this home's peer; None where it was given none."""
        path = self.path / "token"
        return path.read_text("utf-8").strip() or None if path.exists() else None

    def store_token(self, token: str) -> None:
        if self.token() != token:
            atomic_write(self.path / "token", token.encode("utf-8") + b"\n", mode=0o600)

    def notices(self) -> list[bytes]:
        """Envelopes of the organiser's newest notices, as written; whoever reads them verifies them."""
        stored = read_json(self.path / "notice.json")
        return [item.encode("utf-8") for item in stored if isinstance(item, str)] if isinstance(stored, list) else []

    def write_notices(self, envelopes: Iterable[bytes]) -> None:
        atomic_write_json(self.path / "notice.json", [envelope.decode("utf-8") for envelope in envelopes])

    @contextmanager
    def notices_locked(self) -> Iterator[None]:
        """Hold notice.json for a moment: `paris-swarm notice` may write it while a node of this home runs."""
        with open(self.path / "notice.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def proofs(self) -> list[tuple[bytes | None, bytes]]:
        """Pairs of envelopes kept as proofs of equivocation. The first is missing where only its digest was known."""
        found: list[tuple[bytes | None, bytes]] = []
        for path in sorted((self.path / "proofs").glob("*.json")):
            match read_json(path):
                case {"first": str(first), "second": str(second)}:
                    found.append((first.encode("utf-8"), second.encode("utf-8")))
                case {"first": None, "second": str(second)}:
                    found.append((None, second.encode("utf-8")))
                case None:
                    continue
                case _:
                    quarantine(path)
        return found

    def keep_proof(self, signer: str, first: bytes | None, second: bytes) -> bool:
        """Write a proof down under its signer; False when there is one already."""
        path = self.path / "proofs" / f"{signer}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            said = None if first is None else first.decode("utf-8")
            atomic_write_json(path, {"first": said, "second": second.decode("utf-8")})
            return True
        return False

    def drop_proof(self, signer: str) -> None:
        (self.path / "proofs" / f"{signer}.json").unlink(missing_ok=True)

    def note_root(self, root: str) -> None:
        """A checkpoint of this swarm lies, or soon will, in the store that all swarms of this home share."""
        if root not in self._roots:
            self._roots.add(root)
            with open(self.path / "roots.txt", "ab") as roots:
                roots.write(root.encode("ascii") + b"\n")

    def published(self) -> dict[str, list[str]]:
        """Roots of our own checkpoints whose files still lie in the store, by slot, oldest first."""
        stored = read_json(self.path / "published.json")
        if not isinstance(stored, dict):
            return {}
        return {str(slot): [str(root) for root in roots] for slot, roots in stored.items() if isinstance(roots, list)}

    def keep_published(self, published: dict[str, list[str]]) -> None:
        """Write `published` down: what an earlier run left in the store must be found again to be let go of."""
        atomic_write_json(self.path / "published.json", published)

    def write_traffic(self, traffic: dict[str, Any]) -> None:
        atomic_write_json(self.path / "traffic.json", traffic)

    def log_event(self, event: dict[str, Any]) -> None:
        """Append one JSON line to events.jsonl (for people and tests; never read back for decisions).

        Other peers cause many of its lines, so it is bounded: a full one becomes events.1.jsonl.
        """
        path = self.path / "events.jsonl"
        with open(path, "ab") as log:
            log.write(json.dumps(event, sort_keys=True).encode() + b"\n")
            full = log.tell() >= MAX_EVENTS
        if full:
            os.replace(path, self.path / "events.1.jsonl")


def _lines(path: Path) -> list[str]:
    return path.read_text("ascii", "replace").split() if path.exists() else []


def _peer_list(path: Path | None, *, needed: bool) -> list[frozenset[str]]:
    """The list in a file; none when there is no such file."""
    if path is None or not (needed or path.exists()):
        return []
    try:
        return [parse_peer_list(path.read_text("utf-8"))]
    except OSError as error:
        raise HomeError(f"{path} cannot be read ({error.strerror}): name an existing file of peer ids") from error
    except ValueError as error:
        raise HomeError(
            f"{path}: {error}; write one peer id a line, as `paris-swarm identity show` prints it"
        ) from error
