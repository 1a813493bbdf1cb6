"""Options shared by the verbs that read an assembled folder, draw from one, or write one."""

from __future__ import annotations

from typing import Annotated

import typer

PlanOption = Annotated[str | None, typer.Option("--plan", help="Plan id (or invite) that the folder must be of.")]
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
        help="Put the plan's text encoder (90 MB) into the folder, so that diffusers alone can take prompts.",
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
    """The plan id that ``--plan`` names, by itself or in an invite.

    Raises:
        ValueError: an invite that cannot be read.
    """
    from paris_swarm.dht_schemas.invite import Invite

    return Invite.parse(said).plan_id if said is not None and said.startswith("paris:") else said
