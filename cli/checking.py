"""The verification steps that need torch, handed to the peer and to `assemble` as one callable.

After envelope, admission, plan, slot, manifest root, chunks and header (dht_schemas): every value finite, and a probe
loss, recomputed with the plan's fixed seeds, that agrees with the announced one and beats the plan's bar.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from paris_swarm.cli.plan_folder import PlanFolder
from paris_swarm.cli.probing import load_slot, open_half, slot_loss
from paris_swarm.cli.tasks import expert_recipe
from paris_swarm.dht_schemas.canonical import parse_json
from paris_swarm.dht_schemas.errors import MalformedRecord, NotFinite, quoted
from paris_swarm.dht_schemas.fields import ROUTER
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.dht_schemas.trusted import TrustedSwarm

EMA_FILE = "ema.safetensors"
MAX_STATE = 1 << 20
"""Bytes of a state.json that are read."""


def check_weights(
    plan_folder: PlanFolder,
    slot: str,
    folder: Path,
    announcement: Announcement,
    purpose: Literal["resume", "assemble"],
) -> float:
    """Recompute the probe loss of a downloaded checkpoint.

    Raises:
        MalformedRecord: nobody can continue from it (R-VAL-4), and ``purpose`` is to.
        NotFinite: a tensor holds NaN or infinity; it is named.
        ProbeFailed: the loss disagrees with the announced one, or does not beat the bar for this purpose.
    """
    from paris_swarm.expert.verify import nonfinite_tensors

    if purpose == "resume":
        check_state(plan_folder, slot, folder, announcement)
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


def check_state(plan_folder: PlanFolder, slot: str, folder: Path, announcement: Announcement) -> None:
    """Whether training can go on where a checkpoint's state.json says that it ended.

    A trainer believes that file: with another step in it a successor would sign steps that nobody trained, and be the
    one whom an audit convicts.

    Raises:
        MalformedRecord: too large, unreadable, of another step than announced, or of another recipe (R-VAL-4).
    """
    from paris_swarm.expert.checkpoint import STATE_FILE, CheckpointError, read_state
    from paris_swarm.router.recipe import RouterRecipe

    def refuse(what: str) -> MalformedRecord:
        return MalformedRecord(f"slot {slot}, checkpoint {announcement.root[:12]}: {what}", rule="R-VAL-4")

    path = folder / STATE_FILE
    try:
        size = path.stat().st_size
        if size > MAX_STATE:
            raise refuse(f"{STATE_FILE} has {size} bytes, at most {MAX_STATE} are read")
        parse_json(path.read_bytes())  # bounds its depth and numbers before anything else reads it
        state = read_state(folder)
    except FileNotFoundError as error:
        raise refuse(f"it has no {STATE_FILE}") from error
    except MalformedRecord as error:
        raise refuse(f"{STATE_FILE}: {error.detail}") from error
    except CheckpointError as error:
        raise refuse(quoted(str(error), 300)) from error
    if state.step != announcement.step:
        raise refuse(f"{STATE_FILE} says step {state.step}, the announcement {announcement.step}")
    plan = plan_folder.opened.plan
    asked = RouterRecipe.from_dict(plan.router.recipe) if slot == ROUTER else expert_recipe(plan, slot)
    recipe = asked.digest()
    if state.recipe != recipe:
        raise refuse(f"{STATE_FILE} is of recipe {quoted(state.recipe)}, the plan's is {recipe}")
    if not all(type(loss) in (int, float) for loss in state.losses):
        raise refuse(f"{STATE_FILE} has losses that are no numbers")


def probe_loss(plan_folder: PlanFolder, slot: str, weights: Path) -> float:
    """Probe loss of EMA weights on the open half of the plan's probe set."""
    loss = slot_loss(load_slot(plan_folder, slot, weights), slot, open_half(plan_folder, slot))
    assert loss is not None, "a plan's probe set has rows of every cluster"
    return loss
