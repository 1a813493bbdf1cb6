"""What an audit needs before anything is trained again: the checkpoint, its parent, the chain behind them, the rows.

A root that this home holds, with its parent, is audited without a network; otherwise both come from the swarm. The
manifests of older checkpoints are followed as far as somebody gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paris_swarm.cli.exits import Incomplete, Unverified, Usage
from paris_swarm.cli.plan_folder import PlanFolder
from paris_swarm.cli.tasks import build_task
from paris_swarm.dht_schemas.errors import NotFinite
from paris_swarm.dht_schemas.manifest import Manifest, open_manifest
from paris_swarm.dht_schemas.provenance import Chain, Provenance, check_link, walk_chain
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.node import SwarmNode
from paris_swarm.swarm.store import ContentStore
from paris_swarm.swarm.transport import TransportError

if TYPE_CHECKING:
    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.expert.task import Task

Progress = Callable[[int, int], None]
WALKED = 1_000
"""Manifests that a walk fetches over the network; what lies further back is said to be unknown."""


@dataclass(frozen=True)
class Evidence:
    """A checkpoint to audit. ``parent_folder`` is None where it began from fresh weights; ``announcement`` is None
    where this home knows the checkpoint by its root alone, so nobody's name stands behind it.
    """

    root: str
    manifest: Manifest
    folder: Path
    parent_folder: Path | None
    chain: Chain
    announcement: Announcement | None
    files: tuple[str, ...]

    @property
    def slot(self) -> str:
        return self.manifest.slot

    @property
    def provenance(self) -> Provenance:
        """Raises Incomplete when the author gave none (R-PROV-5): then nobody can say what to train again."""
        found = self.manifest.provenance
        if found is None:
            raise Incomplete(
                f"NOT DECIDED: checkpoint {self.root[:12]} of slot {self.slot} cannot be audited. Its manifest does "
                "not say how it was trained (an older version of paris-swarm, a run upgraded in the middle, or an "
                "author who would not say). That accuses nobody and vouches for nobody: do not take it for reproduced; "
                "audit another of this author's checkpoints"
            )
        return found


# ---- from this home -----------------------------------------------------------------------------------------------


def held_evidence(
    home: Home, plan_folder: PlanFolder, wanted: str, announced: Mapping[str, Announcement]
) -> Evidence | None:
    """The checkpoint ``wanted`` (a root, its beginning, or a slot) from this home alone; None unless its files and
    those of its parent are all here. ``announced``: further announcements by root, from an assembled folder.

    Raises:
        Usage: several checkpoints begin with this.
        RecordError: a manifest or the chain is wrong.
    """
    store = ContentStore(home.store_path)
    known = {**announcements_here(home, plan_folder), **announced}
    plan = plan_folder.opened.plan

    def read(root: str) -> Manifest | None:
        data = store.read_blob(root)
        return None if data is None else open_manifest(data, root, cap_bytes=plan.policy.checkpoint_cap_bytes)

    if plan.has_slot(wanted):
        of_slot = [entry for entry in known.values() if entry.slot == wanted and store.has(entry.root)]
        found = [entry.root for entry in sorted(of_slot, key=lambda entry: (entry.probe_loss, entry.root))[:1]]
    else:
        held = [entry.root for entry in store.roots() if entry.kind == "checkpoint" and entry.complete]
        found = [root for root in held if root.startswith(wanted)]
    root = only_one(found, wanted)
    manifest = read(root) if root is not None else None
    if root is None or manifest is None:
        return None
    parent = manifest.parent
    if parent is not None and not (store.has(parent) and read(parent) is not None):
        return None
    for each in (root, parent):
        if each is not None and (damaged := store.verify(each)):
            raise Unverified(f"{', '.join(damaged)} of {each[:12]} was changed on disk and set aside; fetch it again")
    return Evidence(
        root=root,
        manifest=manifest,
        folder=_folder(store, root),
        parent_folder=None if parent is None else _folder(store, parent),
        chain=walk_chain(root, read),
        announcement=known.get(root),
        files=weights_of(plan_folder, manifest.slot),
    )


def announcements_here(home: Home, plan_folder: PlanFolder) -> dict[str, Announcement]:
    """Announcements that this home holds or made, by root; their signatures were checked when they were kept."""
    swarm = home.swarm(plan_folder.plan_id)
    found = [Announcement.open(envelope).record for envelope in swarm.held().values()]
    found += [Announcement.open(envelope).record for envelope in swarm.ledger.signed("checkpoint")]
    return {entry.root: entry for entry in found}


def announcements_in(model: Path, plan_id: str) -> dict[str, Announcement]:
    """Announcements that an assembled folder carries, by root, once the whole folder has been verified.

    Raises:
        FolderError: it is not as its lock says, or of another plan.
    """
    from paris_swarm.router.layout import announcement_path
    from paris_swarm.router.verify import verify_folder

    verified = verify_folder(model, plan_id=plan_id)
    envelopes = [bytes(verified.read(announcement_path(slot.slot))) for slot in verified.lock.slots]
    found = [Announcement.open(envelope).record for envelope in envelopes]
    return {entry.root: entry for entry in found}


def _folder(store: ContentStore, root: str) -> Path:
    return store.path(root, store.entries(root)[0].name).parent


# ---- from the swarm -----------------------------------------------------------------------------------------------


async def fetched_evidence(
    node: SwarmNode, plan_folder: PlanFolder, wanted: str, on_progress: Callable[[str], Progress]
) -> Evidence:
    """The same from the swarm; ``on_progress`` gives a callback (bytes here, bytes in all) for each named download.

    Raises:
        Incomplete: nobody holds the checkpoint, or its parent.
        Usage: several checkpoints begin with this.
        RecordError: what came breaks a rule, or the chain does.
    """
    await node.refresh(node.plan.slots)
    slots = [wanted] if node.plan.has_slot(wanted) else list(node.plan.slots)
    candidates = [candidate for slot in slots for candidate in node.candidates(slot)]
    if not node.plan.has_slot(wanted):
        candidates = [candidate for candidate in candidates if candidate.announcement.root.startswith(wanted)]
        only_one([candidate.announcement.root for candidate in candidates], wanted)
    holders = _everyone(node)
    announcement = None
    try:
        if candidates:
            announcement, root = candidates[0].announcement, candidates[0].announcement.root
            manifest, _ = await node.fetch_manifest(candidates[0])
            folder = await node.fetch_checkpoint(candidates[0], on_progress=on_progress(f"step {announcement.step}"))
        elif len(wanted) == 64:  # an older checkpoint: no longer announced, perhaps still held
            root = wanted
            manifest = await node.manifest_by_root(root, holders)
            folder = await node.fetch_by_root(root, holders, on_progress=on_progress(f"step {manifest.step}"))
        else:
            raise Incomplete(
                f"no checkpoint that begins with {wanted} is announced now; give the whole root of an older"
            )
    except TransportError as error:
        raise Incomplete(f"nobody who can be reached holds {wanted[:12]} whole: {error}") from error
    parent_folder = None
    if manifest.parent is not None:
        try:
            check_link(manifest, await node.manifest_by_root(manifest.parent, holders))
            parent_folder = await node.fetch_by_root(manifest.parent, holders, on_progress=on_progress("its parent"))
        except TransportError as error:
            raise Incomplete(
                f"nobody who can be reached holds {manifest.parent[:12]}, the parent of {root[:12]}, whole any more; "
                "peers keep their newest two (`join --keep-checkpoints` keeps more), so audit a newer checkpoint. "
                f"[{error}]"
            ) from error
    return Evidence(
        root=root,
        manifest=manifest,
        folder=folder,
        parent_folder=parent_folder,
        chain=await _walk(node, root, holders),
        announcement=announcement,
        files=weights_of(plan_folder, manifest.slot),
    )


def _everyone(node: SwarmNode) -> list[str]:
    """Who may hold an older checkpoint: holders and claimants, and the peers they mention as authors."""
    found: dict[str, None] = {}
    for slot in node.plan.slots:
        for candidate in node.candidates(slot):
            found |= dict.fromkeys((*candidate.holders, candidate.announcement.author))
        found |= dict.fromkeys(node.trusted.claims.get(slot, {}))
    return list(found)


async def _walk(node: SwarmNode, root: str, holders: Iterable[str]) -> Chain:
    """Fetch manifests back to the first, then check every link."""
    sources = list(holders)
    seen: dict[str, Manifest] = {}
    wanted: str | None = root
    while wanted is not None and len(seen) < WALKED:
        try:
            seen[wanted] = await node.manifest_by_root(wanted, sources)
        except TransportError:
            break
        wanted = seen[wanted].parent
    return walk_chain(root, seen.get)


# ---- either way ---------------------------------------------------------------------------------------------------


def only_one(roots: Iterable[str], wanted: str) -> str | None:
    """The one root among ``roots``, None when there is none. Raises Usage for several."""
    found = sorted(set(roots))
    if len(found) > 1:
        raise Usage(f"{len(found)} checkpoints begin with {wanted}: {', '.join(root[:16] for root in found[:4])}")
    return found[0] if found else None


def weights_of(plan_folder: PlanFolder, slot: str) -> tuple[str, ...]:
    """The weights files that the plan asks of a slot's checkpoint."""
    return tuple(sorted(plan_folder.opened.plan.slot_spec(slot).files))


def check_finite(evidence: Evidence) -> None:
    """Raises NotFinite, naming the tensor, before anything is compared."""
    from paris_swarm.expert.verify import nonfinite_tensors

    for name in evidence.files:
        bad = next(nonfinite_tensors(evidence.folder / name), None)
        if bad is not None:
            raise NotFinite(f"checkpoint {evidence.root[:12]}: {bad} in {name} holds NaN or infinity")


def checked_task(plan_folder: PlanFolder, data: PreparedData, evidence: Evidence) -> Task:
    """The slot's training task on the auditor's rows, once recipe, seed and rows are those the author committed to.

    Raises:
        Unverified: one of them is another; both values are named.
        ValueError: the data does not fit the plan.
    """
    said = evidence.provenance
    task = build_task(plan_folder, data, evidence.slot)
    asked = task.recipe.train.precision
    if asked not in ("any", said.environment.precision):
        raise Unverified(
            f"{evidence.root[:12]} was trained in {said.environment.precision}, the plan asks for {asked} in slot "
            f"{evidence.slot}"
        )
    for name, theirs, ours in (
        ("recipe", said.recipe, task.recipe.digest()),
        ("seed", said.seed, task.recipe.train.seed),
    ):
        if theirs != ours:
            raise Unverified(f"{evidence.root[:12]} was trained with {name} {theirs}, the plan says {ours}")
    rows = task.rows_used()
    if rows != said.rows:
        raise Unverified(
            f"{evidence.root[:12]} was trained on {said.rows.count} rows with digest {said.rows.digest[:16]}..., "
            f"{data.folder} has {rows.count} rows of slot {evidence.slot} with digest {rows.digest[:16]}...: these are "
            "not the same rows. Prepare the author's rows; who prepared them on other hardware may have drawn the line "
            "between clusters elsewhere (docs/decisions/0005-what-an-audit-proves.md)"
        )
    return task


__all__ = [
    "Evidence",
    "check_finite",
    "checked_task",
    "fetched_evidence",
    "held_evidence",
]
