"""`paris-swarm init DATA -o PLAN`: partition the data and sign a plan."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
    router_recipe: Annotated[
        str,
        typer.Option(help="Named recipe of the router: tiny, S/2, B/2; with -blind behind it, it sees no captions."),
    ] = "tiny",
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
    partition: Annotated[
        str,
        typer.Option(help="clusters (of the features), or a control: random (shards), class (--class-key)."),
    ] = "clusters",
    class_key: Annotated[
        str | None,
        typer.Option(
            help="With --partition class: the field of a caption's record, or of its attributes (default: class, as "
            "prepared from class folders or a class column; else DiceBear's family)."
        ),
    ] = None,
    balance: Annotated[
        float | None,
        typer.Option(
            min=1, help="No cluster larger than this many times an even share, e.g. 1.25 (default: no bound)."
        ),
    ] = None,
    slot: Annotated[
        list[str] | None,
        typer.Option(
            "--slot",
            metavar="SLOTS:NAME=VALUE,...",
            help="What some experts have instead of --recipe, e.g. 0-1:objective=noise,size=S/2,precision=bf16; "
            "SLOTS may be all, NAME any field of the recipe, or start (weights, as --start-from). May be repeated.",
        ),
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            "--start-from", exists=True, help="Start the experts from an ImageNet DiT: .safetensors, or its folder."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Folder for the cluster report (default: OUT-clusters).")
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cluster the features, hold probe rows out, compute the bars, sign the plan, print the invite."""
    shared = settings(context, home, as_json)
    from paris_swarm.cli.partitioning import partition_dict
    from paris_swarm.cli.planning import PlanOptions, write_plan
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
        partition=partition,
        class_key=class_key,
        balance=balance,
        slots=tuple(slot or ()),
        start_from=start_from,
    )
    report_folder = report if report is not None else out.with_name(f"{out.name}-clusters")
    prepared = PreparedData.open(data)
    with shared.console.status("Preparing the plan ...") as status:
        written = write_plan(
            prepared,
            out,
            owner.identity(),
            options,
            sealed_folder=lambda plan_id: owner.swarm(plan_id).path,
            say=lambda text: status.update(f"{text[0].upper()}{text[1:]} ..."),
            report_folder=report_folder,
        )
    if invited:
        owner.swarm(written.plan_id).store_token(
            seal_token(owner.identity(), written.plan_id, owner.identity().peer_id)
        )
    invite = f"paris:{written.plan_id}"
    shared.console.print(partition_table(written.partition))
    shared.answer(
        {
            "plan": written.plan_id,
            "folder": str(out),
            "report": str(report_folder),
            "invite": invite,
            "organiser": owner.identity().peer_id,
            "admission": options.admission,
            "partition": partition_dict(written.partition),
            "bars": {slot: bars.model_dump() for slot, bars in written.bars.items()},
            "sealed_probe": str(written.sealed),
            "experts": written.kinds,
            "start_weights_to_bring": list(written.to_bring),
        },
        "\n".join(
            [
                *(f"Warning: {warning}" for warning in written.partition.warnings),
                *_kind_lines(written.kinds),
                *(
                    f"{start} is too large to travel with the plan: each peer needs it, `join --start-from {start}`"
                    for start in written.to_bring
                ),
                f"Plan written to {out}, signed by {owner.identity().peer_id}",
                f"The clusters, with pictures: {report_folder / 'index.html'}",
                f"The sealed half of the probe set stays with you: {written.sealed}",
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


def _kind_lines(kinds: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One line for each kind of expert, where there are several."""
    slots: dict[tuple[str, ...], list[str]] = {}
    for slot, kind in kinds.items():
        slots.setdefault(tuple(f"{name} {value}" for name, value in kind.items()), []).append(slot)
    return [f"Experts {', '.join(these)}: {'; '.join(kind)}" for kind, these in slots.items()] if len(slots) > 1 else []
