"""`paris-swarm init DATA -o PLAN`: partition the data and sign a plan."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from paris_swarm.cli.settings import HomeOption, JsonOption, settings


def init(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="Folder written by `prepare`.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Plan folder to write.")],
    name: Annotated[str, typer.Option(help="What people will call the swarm.")] = "paris-swarm",
    clusters: Annotated[int, typer.Option("-k", "--clusters", min=2, max=1024, help="Number of experts.")] = 8,
    recipe: Annotated[str, typer.Option(help="Named recipe of the experts: tiny, S/2, B/2, XL/2.")] = "tiny",
    router_recipe: Annotated[str, typer.Option(help="Named recipe of the router: tiny, S/2, B/2.")] = "tiny",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of an expert (default: the recipe's).")] = None,
    router_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the router (default: the recipe's).")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images a step (default: the recipe's).")] = None,
    lease: Annotated[float, typer.Option(min=3, max=900, help="Seconds a claim lasts unless renewed.")] = 300,
    checkpoint_every: Annotated[float, typer.Option(min=1, help="Seconds between published checkpoints.")] = 600,
    grace: Annotated[
        float | None, typer.Option(help="Seconds a claim holds before its first checkpoint (default: two cadences).")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=0, help="Guidance scale that `sample` defaults to (default: 1.5 for tiny, else 7.5)."),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Protected claims a slot may have.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the partition, the probe set and the initial weights.")] = 0,
    invited: Annotated[
        bool, typer.Option("--invited", help="A closed swarm: only peers admitted with `paris-swarm invite` count.")
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cluster the features, hold probe rows out, compute the bars, sign the plan, print the invite."""
    shared = settings(context, home, as_json)
    from paris_swarm.cli.planning import PlanOptions, partition_dict, write_plan
    from paris_swarm.cli.views import partition_table
    from paris_swarm.dht_schemas.admission import seal_token
    from paris_swarm.expert.data.shards import PreparedData

    owner = shared.open_home()
    options = PlanOptions(
        name=name,
        clusters=clusters,
        seed=seed,
        recipe=recipe,
        router_recipe=router_recipe,
        steps=steps,
        router_steps=router_steps,
        batch=batch,
        lease_s=lease,
        checkpoint_every_s=checkpoint_every,
        grace_s=grace if grace is not None else 2 * checkpoint_every,
        replicas=replicas,
        guidance=guidance if guidance is not None else 1.5 if recipe == "tiny" else 7.5,
        created=int(time.time()),
        admission="invited" if invited else "open",
    )
    prepared = PreparedData.open(data)
    with shared.console.status("Preparing the plan ...") as status:
        report = write_plan(
            prepared,
            out,
            owner.identity(),
            options,
            sealed_folder=lambda plan_id: owner.swarm(plan_id).path,
            say=lambda text: status.update(f"{text[0].upper()}{text[1:]} ..."),
        )
    if invited:
        owner.swarm(report.plan_id).store_token(seal_token(owner.identity(), report.plan_id, owner.identity().peer_id))
    invite = f"paris:{report.plan_id}"
    shared.console.print(partition_table(report.partition))
    shared.answer(
        {
            "plan": report.plan_id,
            "folder": str(out),
            "invite": invite,
            "organiser": owner.identity().peer_id,
            "admission": options.admission,
            "partition": partition_dict(report.partition),
            "bars": {slot: bars.model_dump() for slot, bars in report.bars.items()},
            "sealed_probe": str(report.sealed),
        },
        "\n".join(
            [
                *(f"Warning: {warning}" for warning in report.partition.warnings),
                f"Plan written to {out}, signed by {owner.identity().peer_id}; example pictures: {out}/cluster-*.png",
                f"The sealed half of the probe set stays with you: {report.sealed}",
                "Publish that file when training has ended: anyone can then `paris-swarm verify MODEL --sealed FILE`.",
                f"Invite (nobody serves it yet): {invite}",
                f"Next: paris-swarm bootstrap {out}",
                *(
                    [f"Only invited peers get in: paris-swarm invite PEER_ID --plan {out} prints a peer's own invite"]
                    if invited
                    else []
                ),
            ]
        ),
    )
