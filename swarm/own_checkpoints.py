"""The checkpoints that a home published itself: which one continues which, and which of them the store still needs.

Their manifests stay for ever: they are small, and the chain of parents can only be followed through them.
"""

from __future__ import annotations

import logging

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.dht_schemas.manifest import Manifest, open_manifest
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.swarm.home import SwarmHome
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.store_locks import InUse, Use

log = logging.getLogger(__name__)


class OwnCheckpoints:
    """Published checkpoints of one home in one swarm.

    Args:
        cap_bytes: the plan's limit of a checkpoint.
    """

    def __init__(self, files: SwarmHome, store: ContentStore, cap_bytes: int) -> None:
        self._files, self._store, self._cap_bytes = files, store, cap_bytes
        self._published = files.published()
        self._uses: dict[str, Use] = {}

    def last_root(self, slot: str) -> str | None:
        """Root of the checkpoint of ``slot`` this peer published last, if any."""
        envelope = self._files.ledger.last("checkpoint", slot)
        return Announcement.open(envelope).record.root if envelope else None

    def own_blob(self, digest: str) -> bytes | None:
        """From our own store: a copy held here must do when every other holder is gone."""
        try:
            return self._store.read_blob(digest)
        except RecordError as error:  # changed on disk and set aside: as good as absent
            log.warning("%s", error)
            return None

    def stored_manifest(self, root: str) -> Manifest | None:
        """The manifest of a checkpoint that this home holds, or once held; None when it is not here."""
        data = self.own_blob(root)
        return None if data is None else open_manifest(data, root, cap_bytes=self._cap_bytes)

    def stored_step(self, root: str | None) -> int | None:
        """The step of a stored checkpoint, 0 for None (fresh weights); None when its manifest is not here."""
        if root is None:
            return 0
        manifest = self.stored_manifest(root)
        return None if manifest is None else manifest.step

    def grown_from(self, slot: str, step: int, origin: str | None) -> str | None:
        """Root of the published checkpoint that our local one of ``slot`` at ``step`` continues.

        ``origin`` is the root that its run began from (None: fresh weights). What we published since then, up to that
        step, lies in between; after a crash the newest local checkpoint may be older than the newest published.
        """
        root, found = self.last_root(slot), None
        while root is not None:
            manifest = self.stored_manifest(root)
            if manifest is None:
                if root == origin:  # somebody else's, and no longer here: what we published since is what matters
                    return found or origin
                break
            if found is None and manifest.step <= step:
                found = root
            if root == origin:
                return found
            root = manifest.parent
        return found if origin is None and root is None else origin

    def use(self, root: str) -> None:
        """Keep a root's files in the store until `forget_older` or `release`: they are still to be checked and used."""
        if root not in self._uses:
            self._uses[root] = self._store.use(root)

    def drop(self, root: str) -> None:
        """Let go of a root's files that are of no use to anybody; kept where another process is at work on them."""
        if use := self._uses.pop(root, None):
            use.release()
        try:
            self._store.delete(root, blob=False)
        except (InUse, ValueError, OSError) as error:
            log.info("kept %s: %s", root[:12], error)

    def release(self) -> None:
        """This node is closed: another process may let go of what it used."""
        for use in self._uses.values():
            use.release()

    def forget_older(self, slot: str, root: str, *, keep: int) -> None:
        """Drop the files of all but the newest ``keep`` of our own published checkpoints of a slot from the store."""
        roots = list(dict.fromkeys([*self._published.get(slot, []), root]))
        for old in roots[:-keep]:
            if use := self._uses.pop(old, None):
                use.release()
            try:
                self._store.delete(old, blob=False)
            except (InUse, ValueError) as error:  # another process is at work on it, or somebody pinned it
                log.info("kept %s: %s", old[:12], error)
        self._published[slot] = roots[-keep:]
        self._files.keep_published(self._published)
