"""`prepare --plan`: the rows of one cluster, so that nobody needs all the data and private data stays where it is."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paris_swarm.cli.exits import Usage
from paris_swarm.cli.plan_folder import PLAN_FILE, PlanFolder, open_plan_folder
from paris_swarm.cli.row_labels import row_rule
from paris_swarm.swarm.home import Home

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from paris_swarm.expert.data.shard_maker import OnlyRows


def wanted_rows(
    home: Home, plan: str, cluster: int | None, resolution: int | None
) -> tuple[int, OnlyRows | None, Mapping[str, Any]]:
    """(the plan's resolution, which rows to keep: None for all, the plan's ``data``) for ``--plan`` and ``--cluster``.

    plan: a plan folder, or an invite, whose plan is fetched when this home does not have it.

    Raises:
        Usage: the plan has no such cluster, or asks for another resolution than was given.
        ValueError: the plan does not say how large its pictures are.
        Unverified, InviteError, TransportError, RecordError: the plan cannot be had or is not what it should be.
    """
    from paris_swarm.expert.data.shard_maker import OnlyRows
    from paris_swarm.router.plan_facts import picture_side

    folder = plan_folder_of(home, plan)
    signed = folder.opened.plan
    side = picture_side(signed.data)
    if resolution is not None and resolution != side:
        raise Usage(f"--resolution {resolution}: the plan asks for {side} pixels; leave the option out")
    if cluster is None:
        return side, None, signed.data
    if cluster >= signed.clusters:
        raise Usage(f"--cluster {cluster}: the plan has clusters 0 to {signed.clusters - 1}")
    rule = row_rule(folder)

    def keeps(
        features: NDArray[np.float32], digests: NDArray[np.uint8], records: Sequence[Mapping[str, Any]]
    ) -> NDArray[np.bool_]:
        kept: NDArray[np.bool_] = rule.labels(features, digests, lambda: records) == cluster
        return kept

    return side, OnlyRows(keeps, {"plan": folder.plan_id, "cluster": str(cluster)}), signed.data


def plan_folder_of(home: Home, plan: str) -> PlanFolder:
    """The checked plan folder that a path or an invite names; an invite's is fetched into the home when need be."""
    path = Path(plan)
    if (path / PLAN_FILE).is_file():
        return open_plan_folder(path)
    if not plan.startswith("paris:"):
        raise Usage(f"--plan {plan}: neither a plan folder (it has no {PLAN_FILE}) nor an invite (paris:...)")
    from paris_swarm.dht_schemas.invite import Invite

    invite = Invite.parse(plan)
    cached = home.swarm(invite.plan_id).plan_path
    if (cached / PLAN_FILE).is_file():
        return open_plan_folder(cached, plan_id=invite.plan_id)
    from paris_swarm.cli.connect import observing

    async def fetched() -> PlanFolder:
        async with observing(home, invite) as here:
            return here.plan_folder

    return asyncio.run(fetched())


def claimed_cluster(asked: str | None, data: Path | None, plan_id: str) -> str | None:
    """The cluster that `join` claims: the one asked for, or for "auto" the only one that ``data`` was kept for.

    Raises:
        ValueError: the data was kept for another cluster, or by another plan's clusters.
    """
    if asked is None or data is None:
        return asked
    from paris_swarm.expert.data.shards import PreparedData

    kept = PreparedData.open(data).manifest.get("kept")
    if kept is None:
        return asked
    if kept["plan"] != plan_id:
        raise ValueError(
            f"{data} holds the rows of one cluster of plan {kept['plan'][:12]}, not of {plan_id[:12]}: "
            "run `paris-swarm prepare --plan ... --cluster N` for this plan"
        )
    if asked not in ("auto", kept["cluster"]):
        raise ValueError(
            f"{data} holds the rows of cluster {kept['cluster']} only: leave out the number after --claim-cluster, or "
            f"prepare the rows of cluster {asked}"
        )
    return str(kept["cluster"])
