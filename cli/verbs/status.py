"""`paris-swarm status`: the swarm as seen from here."""

from __future__ import annotations

from typing import Annotated

import typer

from paris_swarm.cli.settings import HomeOption, JsonOption, settings


def status(
    context: typer.Context,
    invite: Annotated[str | None, typer.Argument(help="Invite; without one, the swarm last joined.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing; with --json one report a line.")] = False,
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between looks with --watch.")] = 2.0,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Who claims which cluster, how far they are, and which checkpoints are held. Reads only."""
    shared = settings(context, home, as_json)
    import asyncio

    from rich.live import Live

    from paris_swarm.cli.connect import observing, resolve_invite
    from paris_swarm.cli.lifetime import on_signals
    from paris_swarm.cli.views import dashboard
    from paris_swarm.swarm.status import SwarmStatus, swarm_status

    owner = shared.open_home()
    wanted = resolve_invite(invite, owner)

    async def look() -> None:
        stopped = asyncio.Event()
        async with observing(owner, wanted) as here:

            async def report() -> SwarmStatus:
                await here.node.refresh(here.node.plan.slots)
                return swarm_status(here.node)

            if not watch:
                seen = await report()
                if shared.as_json:
                    shared.answer(seen.as_dict(), "")
                else:
                    shared.console.print(dashboard(seen))
                return
            on_signals(stopped.set)
            with Live(console=shared.console, refresh_per_second=4) as live:
                while not stopped.is_set():
                    seen = await report()
                    if shared.as_json:
                        shared.answer(seen.as_dict(), "")
                    else:
                        live.update(dashboard(seen))
                    try:
                        await asyncio.wait_for(stopped.wait(), every)
                    except TimeoutError:
                        continue

    asyncio.run(look())
