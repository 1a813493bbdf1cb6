"""`paris-swarm sample DIR --prompt TEXT`: draw locally from a verified folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from paris_swarm.cli.settings import DeviceOption, HomeOption, JsonOption, settings
from paris_swarm.cli.sizes import parse_size


def sample(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder written by `assemble`.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; may be given several times.")],
    count: Annotated[int, typer.Option("-n", min=1, help="Pictures for each prompt.")] = 1,
    strategy: Annotated[
        str, typer.Option(help="top-1, top-2, ..., full, threshold-TAU, adaptive, sample or nucleus-P.")
    ] = "top-1",
    sampler: Annotated[str, typer.Option(help="euler, heun or dpm++ (the last needs diffusers).")] = "euler",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 50,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale; 1 means none (default: what the plan recommends).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture i depends on (seed, i) and its prompt only.")] = 0,
    batch: Annotated[
        int, typer.Option(min=1, help="Pictures drawn at a time: fewer take less memory, and are the same pictures.")
    ] = 32,
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG to write (a grid where there are several).")] = Path(
        "samples.png"
    ),
    scale: Annotated[int, typer.Option(min=1, max=32, help="Enlarge every pixel this many times.")] = 6,
    memory_budget: Annotated[
        str | None, typer.Option(help="Expert weights kept in memory, e.g. 2GB (default: all that are used).")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="How expert weights are held: fp32, bf16 (half the memory) or int8 (a quarter).")
    ] = "fp32",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile: slow to begin, faster where many pictures are drawn.")
    ] = False,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Draw although experts are missing.")] = False,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="PNG to write beside it: which expert drew at which step.")
    ] = None,
    vae: Annotated[
        str | None, typer.Option("--vae", help="The plan's VAE, folder or hub name, where FOLDER holds none.")
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option("--text-encoder", help="The plan's text encoder, folder or hub name, where FOLDER holds none."),
    ] = None,
    device: DeviceOption = "auto",
    plan: Annotated[str | None, typer.Option("--plan", help="Plan id that the folder must be of.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify the folder, route every step of every picture to its experts, write the PNG with its provenance."""
    shared = settings(context, home, as_json)
    import numpy as np
    from rich.progress import Progress

    from paris_swarm.cli.settings import pick_device
    from paris_swarm.cli.text import encode_prompts
    from paris_swarm.cli.views import picture
    from paris_swarm.router.draw import DrawStep
    from paris_swarm.router.folder import open_folder
    from paris_swarm.router.layout import plan_guidance
    from paris_swarm.router.png import Origin, provenance, tile, write_grid

    if any(not text.strip() for text in prompt):
        raise ValueError("--prompt is empty: say what to draw")
    assembled = open_folder(
        folder,
        plan_id=plan,
        device=pick_device(device),
        allow_missing=allow_missing,
        precision=precision,
        compiled=compiled,
        memory_budget=None if memory_budget is None else parse_size(memory_budget, option="--memory-budget"),
        vae=vae,
    )
    if guidance is None:
        guidance = plan_guidance(assembled.verified.plan)
    states, lengths = encode_prompts(assembled.verified.plan, prompt, folder=folder, place=text_encoder)
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
    text = provenance(origin, shares=pictures.shares, redirected=float(pictures.redirected.mean()))
    columns = grid_columns(len(pictures.images))
    write_grid(out, pictures.images, columns=columns, scale=scale, text=text)
    if trace is not None:
        from paris_swarm.dht_schemas.files import atomic_write
        from paris_swarm.router.png import png_bytes
        from paris_swarm.router.trace import trace_picture

        atomic_write(
            trace, png_bytes(trace_picture(pictures.weights, [each for each in prompt for _ in range(count)]), text)
        )
    beside = None
    if shared.as_json:
        from paris_swarm.dht_schemas.files import atomic_write_json
        from paris_swarm.router.sidecar import sidecar, sidecar_path

        beside = sidecar_path(out)
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
            "missing": list(assembled.missing),
        },
        f"{len(pictures.images)} pictures in {out}"
        + (f" (experts missing: {', '.join(assembled.missing)})" if assembled.missing else ""),
    )


def grid_columns(count: int) -> int:
    """Columns of the grid that `sample` writes for ``count`` pictures: as square as can be."""
    return math.ceil(math.sqrt(count))
