"""The verification steps that need torch, handed to the peer and to `assemble` as one callable.

After envelope, admission, plan, slot, manifest root, chunks and header (dht_schemas): every value finite, and a probe
loss, recomputed with the plan's fixed seeds, that agrees with the announced one and beats the plan's bar.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from paris_swarm.cli.plan_folder import PlanFolder
from paris_swarm.cli.tasks import ROUTER
from paris_swarm.dht_schemas.errors import NotFinite
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.dht_schemas.trusted import TrustedSwarm

EMA_FILE = "ema.safetensors"


def check_weights(
    plan_folder: PlanFolder,
    slot: str,
    folder: Path,
    announcement: Announcement,
    purpose: Literal["resume", "assemble"],
) -> float:
    """Recompute the probe loss of a downloaded checkpoint.

    Raises:
        NotFinite: a tensor holds NaN or infinity; it is named.
        ProbeFailed: the loss disagrees with the announced one, or does not beat the bar for this purpose.
    """
    from paris_swarm.expert.verify import nonfinite_tensors

    for path in sorted(folder.glob("*.safetensors")):
        bad = next(nonfinite_tensors(path), None)
        if bad is not None:
            raise NotFinite(
                f"slot {slot}, checkpoint {announcement.root[:12]}: {bad} in {path.name} holds NaN or infinity"
            )
    loss = probe_loss(plan_folder, slot, folder / EMA_FILE)
    TrustedSwarm(plan_folder.opened).feed_probe(
        announcement, loss, bar="resumable" if purpose == "resume" else "assemblable"
    )
    return loss


def probe_loss(plan_folder: PlanFolder, slot: str, weights: Path) -> float:
    """Probe loss of EMA weights on the open half of the plan's probe set."""
    plan = plan_folder.opened.plan
    seed = plan.verification.probe_seed
    recipe = plan.slot_spec(slot).recipe
    if slot == ROUTER:
        from paris_swarm.router.recipe import RouterRecipe
        from paris_swarm.router.task import load_router_probe, router_probe_loss_of_file

        probe = load_router_probe(plan_folder.probe_path, plan.clusters, seed)
        return router_probe_loss_of_file(RouterRecipe.from_dict(recipe), weights, probe)
    from paris_swarm.expert.recipe import Recipe
    from paris_swarm.expert.verify import load_probe, probe_loss_of_file

    return probe_loss_of_file(Recipe.from_dict(recipe), weights, load_probe(plan_folder.probe_path, slot, seed))
