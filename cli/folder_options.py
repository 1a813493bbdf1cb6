"""Options shared by the verbs that read an assembled folder, draw from one, or write one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paris_swarm.cli.exits import Usage

PlanOption = Annotated[
    str | None, typer.Option("--plan", help="Plan id, invite or plan folder that the folder must be of.")
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="How strongly a caption is followed (classifier-free guidance): 1 takes it as it is, 0 ignores it "
        "(default: what the plan recommends).",
    ),
]
SamplerOption = Annotated[
    str,
    typer.Option(
        help="euler; heun (two network calls a step, of second order); dpm++ (second order at one call a step; needs "
        "diffusers)."
    ),
]
StepsOption = Annotated[int, typer.Option(min=1, help="Steps of the sampler: more are slower and closer to the flow.")]
MemoryBudgetOption = Annotated[
    str | None, typer.Option(help="Expert weights kept in memory, e.g. 2GB (default: all that are used).")
]
AllowMissingOption = Annotated[
    bool,
    typer.Option("--allow-missing", help="Draw although experts are missing; what was theirs goes to the others."),
]
FolderVaeOption = Annotated[
    str | None, typer.Option("--vae", help="The plan's VAE, folder or hub name, where FOLDER holds none.")
]
WrittenTextEncoderOption = Annotated[
    bool,
    typer.Option(
        "--text-encoder/--no-text-encoder",
        help="Put the plan's text encoder (MiniLM: 90 MB) into the folder, so that diffusers alone can take prompts.",
    ),
]
TextEncoderFromOption = Annotated[
    str | None,
    typer.Option("--text-encoder-from", help="Where the plan's CLIP text encoder lies: a folder or a hub name."),
]
WrittenVaeOption = Annotated[
    str | None,
    typer.Option("--vae", help="Where the plan's VAE lies, if its experts draw latents: a folder or a hub name."),
]


def pinned_plan(said: str | None) -> str | None:
    """The plan id that ``--plan`` names: by itself, in an invite, or by a plan folder or its plan.json.

    Raises:
        Usage: none of these.
        ValueError: an invite that cannot be read.
        RecordError: a folder's plan is not signed by its organiser.
    """
    from paris_swarm.cli.plan_folder import PLAN_FILE
    from paris_swarm.dht_schemas.fields import is_digest
    from paris_swarm.dht_schemas.invite import Invite
    from paris_swarm.dht_schemas.plan import open_plan

    if said is None or is_digest(said):
        return said
    if said.startswith("paris:"):
        return Invite.parse(said).plan_id
    path = Path(said)
    plan_file = path if path.name == PLAN_FILE else path / PLAN_FILE
    if not plan_file.is_file():
        raise Usage(f"--plan {said}: neither a plan's id, nor an invite (paris:...), nor a plan folder")
    return open_plan(plan_file.read_bytes()).plan_id
