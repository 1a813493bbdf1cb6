"""`paris-swarm demo`: what `make demo` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paris_swarm.cli.settings import DeviceOption, HomeOption, JsonOption, settings


def demo(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for pictures, model, homes, logs and report.json.")
    ] = Path("demo-out"),
    minutes: Annotated[float, typer.Option(min=0.2, help="About how long the experts train.")] = 3.5,
    peers: Annotated[int, typer.Option(min=1, help="Peers that train.")] = 4,
    clusters: Annotated[int, typer.Option(min=2, help="Experts.")] = 4,
    count: Annotated[int, typer.Option(min=64, help="Pictures to draw for training.")] = 4096,
    resolution: Annotated[int, typer.Option(min=8, help="Side of the pictures, in pixels.")] = 24,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of an expert, instead of what fits into --minutes.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale of the pictures.")] = 1.5,
    sample_steps: Annotated[int, typer.Option(min=1, help="Euler steps of the pictures.")] = 30,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: DeviceOption = "auto",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """A real swarm on this machine: separate processes claim, train, publish; a home that trained nothing draws.

    Everything speaks to loopback only and lands in one folder; Ctrl-C stops every process it started.
    """
    shared = settings(context, home, as_json)
    import signal

    from paris_swarm.cli.demo.story import Demo, DemoOptions

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    options = DemoOptions(
        out=out,
        minutes=minutes,
        peers=peers,
        clusters=clusters,
        count=count,
        resolution=resolution,
        steps=steps,
        seed=seed,
        guidance=guidance,
        sample_steps=sample_steps,
        device=device,
    )
    report = Demo(options, shared.console).run()
    if shared.as_json:
        shared.answer(report, "")
