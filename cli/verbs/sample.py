"""`paris-swarm sample DIR --prompt TEXT`: draw locally from a verified folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from paris_swarm.cli.folder_options import (
    AllowMissingOption,
    FolderVaeOption,
    GuidanceOption,
    MemoryBudgetOption,
    PlanOption,
    SamplerOption,
    StepsOption,
    pinned_plan,
)
from paris_swarm.cli.settings import DeviceOption, HomeOption, JsonOption, settings
from paris_swarm.cli.sizes import parse_size

SHOWN_SIDE = 144
"""Pixels along a side that small pictures are enlarged to, about."""
MOST_SCALE = 32


def sample(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder written by `assemble`.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; may be given several times.")],
    count: Annotated[int, typer.Option("-n", min=1, help="Pictures for each prompt.")] = 1,
    strategy: Annotated[
        str,
        typer.Option(
            help="Which experts draw a step, by the router's probabilities: top-1 (the likeliest), top-2, ... (the "
            "likeliest, mixed), full (all, mixed), threshold-0.05 (all of at least 0.05, mixed), adaptive (as many as "
            "the router is in doubt about, mixed), sample (one, drawn), nucleus-0.9 (one, drawn from the likeliest "
            "that make up 0.9)."
        ),
    ] = "top-1",
    sampler: SamplerOption = "euler",
    steps: StepsOption = 50,
    guidance: GuidanceOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture i depends on (seed, i) and its prompt only.")] = 0,
    batch: Annotated[
        int, typer.Option(min=1, help="Pictures drawn at a time: fewer take less memory, and are the same pictures.")
    ] = 32,
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG to write (a grid where there are several).")] = Path(
        "samples.png"
    ),
    scale: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_SCALE,
            help=f"Enlarge every pixel this many times (default: to about {SHOWN_SIDE} pixels a side).",
        ),
    ] = None,
    memory_budget: MemoryBudgetOption = None,
    precision: Annotated[
        str, typer.Option(help="How expert weights are held: fp32, bf16 (half the memory) or int8 (a quarter).")
    ] = "fp32",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile: slow to begin, faster where many pictures are drawn.")
    ] = False,
    allow_missing: AllowMissingOption = False,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="PNG to write beside it: which expert drew at which step.")
    ] = None,
    vae: FolderVaeOption = None,
    text_encoder: Annotated[
        str | None,
        typer.Option("--text-encoder", help="The plan's text encoder, folder or hub name, where FOLDER holds none."),
    ] = None,
    device: DeviceOption = "auto",
    plan: PlanOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify the folder, route every step of every picture to its experts, write the PNG with its provenance."""
    shared = settings(context, home, as_json)
    import numpy as np
    from rich.progress import Progress

    from paris_swarm.cli.exits import Usage
    from paris_swarm.cli.outputs import check_files
    from paris_swarm.cli.settings import check_compiler, pick_device
    from paris_swarm.cli.text import encode_prompts
    from paris_swarm.cli.views import picture
    from paris_swarm.router.draw import DrawStep
    from paris_swarm.router.folder import open_folder
    from paris_swarm.router.layout import plan_guidance
    from paris_swarm.router.png import Origin, provenance, tile, write_grid
    from paris_swarm.router.samplers import named_sampler
    from paris_swarm.router.sidecar import sidecar, sidecar_path
    from paris_swarm.router.strategies import Strategy
    from paris_swarm.router.weights import check_precision

    beside = sidecar_path(out) if shared.as_json else None
    check_files({"-o": out, "--trace": trace, "--json, beside -o,": beside}, folder=folder)
    for each in prompt:
        if not each.strip():
            raise Usage("--prompt is empty: say what to draw")
        if any("\ud800" <= letter <= "\udfff" for letter in each):
            raise Usage("--prompt is no UTF-8 text: type it in a terminal whose locale is UTF-8")
    if Strategy.parse(strategy, None).kind == "oracle":
        raise Usage(
            "--strategy oracle needs the true cluster of a picture, which a prompt does not say: `paris-swarm "
            "evaluate` measures it on rows whose cluster is known"
        )
    named_sampler(sampler)
    check_precision(precision)
    if compiled:
        check_compiler()
    assembled = open_folder(
        folder,
        plan_id=pinned_plan(plan),
        device=pick_device(device),
        allow_missing=allow_missing,
        precision=precision,
        compiled=compiled,
        memory_budget=None if memory_budget is None else parse_size(memory_budget, option="--memory-budget"),
        vae=vae,
    )
    if guidance is None:
        guidance = plan_guidance(assembled.verified.plan)

    def note(text: str) -> None:
        shared.console.print(text, markup=False, style="yellow", soft_wrap=True)

    if vae is not None and assembled.verified.plan.plan.data.get("latents") is None:
        note("--vae is not used: the plan's experts draw pixels.")
    states, lengths = encode_prompts(assembled.verified.plan, prompt, folder=folder, place=text_encoder, note=note)
    with Progress(console=shared.console, transient=True) as bars:
        task = bars.add_task("drawing", total=None)

        def on_step(done: DrawStep) -> None:
            bars.update(task, completed=(done.batch - 1) * done.steps + done.step, total=done.batches * done.steps)

        pictures = assembled.sample(
            states,
            lengths,
            n=count,
            strategy=strategy,
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            seed=seed,
            batch=batch,
            on_step=on_step,
        )
    origin = Origin(
        prompts=tuple(prompt),
        seed=seed,
        strategy=strategy,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        plan_id=assembled.plan_id,
        assembly=assembled.digest,
        missing=assembled.missing,
        precision=precision,
    )
    said = provenance(origin, shares=pictures.shares, redirected=float(pictures.redirected.mean()))
    if scale is None:
        scale = min(MOST_SCALE, max(1, SHOWN_SIDE // pictures.images.shape[2]))
    columns = grid_columns(len(pictures.images))
    write_grid(out, pictures.images, columns=columns, scale=scale, text=said)
    if trace is not None:
        from paris_swarm.dht_schemas.files import atomic_write
        from paris_swarm.router.png import png_bytes
        from paris_swarm.router.trace import trace_picture

        whose = [each for each in prompt for _ in range(count)]
        atomic_write(trace, png_bytes(trace_picture(pictures.weights, whose), said))
    if beside is not None:
        from paris_swarm.dht_schemas.files import atomic_write_json

        atomic_write_json(beside, sidecar(out, pictures, origin))
    if not shared.as_json and shared.console.is_terminal:
        width = shared.console.width
        fits = max(1, min(columns, width // (pictures.images.shape[2] + 2)))
        shared.console.print(picture(tile(pictures.images[: fits * 2], fits), columns=width))
    shares = np.round(pictures.shares, 4).tolist()
    shared.answer(
        {
            "png": str(out),
            "sidecar": None if beside is None else str(beside),
            "trace": None if trace is None else str(trace),
            "prompts": prompt,
            "seed": seed,
            "strategy": strategy,
            "sampler": sampler,
            "steps": steps,
            "guidance": guidance,
            "precision": precision,
            "plan": assembled.plan_id,
            "assembly": assembled.digest,
            "shares": shares,
            "redirected": np.round(pictures.redirected, 4).tolist(),
            "missing": list(assembled.missing),
        },
        f"{len(pictures.images)} picture{'s' * (len(pictures.images) > 1)} in {out}"
        + (_lost(assembled.missing, float(pictures.redirected.mean())) if assembled.missing else ""),
    )


def _lost(missing: Sequence[str], redirected: float) -> str:
    return (
        f" (experts missing: {', '.join(missing)}; {redirected:.0%} of the router's weight was theirs, others drew it)"
    )


def grid_columns(count: int) -> int:
    """Columns of the grid that `sample` writes for ``count`` pictures: as square as can be."""
    return math.ceil(math.sqrt(count))
