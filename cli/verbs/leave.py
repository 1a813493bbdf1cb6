"""`paris-swarm leave`: give the slot back at once."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from paris_swarm.cli.settings import HomeOption, JsonOption, settings

WAIT_S = 60.0


def leave(
    context: typer.Context,
    invite: Annotated[str | None, typer.Argument(help="Invite; without one, the swarm last joined.")] = None,
    keep_serving: Annotated[
        bool, typer.Option("--keep-serving", help="Stop training, but let the running `join` serve its checkpoints on.")
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a claim with zero lease, so that another peer can take the slot now instead of at the lease's end.

    A `join` running in this home is asked to do it (after a last checkpoint); otherwise this command does it itself.
    """
    shared = settings(context, home, as_json)
    import asyncio
    import os
    import signal

    from paris_swarm.cli.connect import connected, resolve_invite
    from paris_swarm.cli.exits import Usage
    from paris_swarm.dht_schemas.records import Claim
    from paris_swarm.swarm.home import HomeBusy
    from paris_swarm.swarm.ledger import Ledger

    owner = shared.open_home()
    wanted = resolve_invite(invite, owner)
    ledger_path = owner.swarm(wanted.plan_id).path / "ledger.json"

    def held() -> list[Claim]:
        now = time.time()
        claims = [Claim.open(envelope).record for envelope in Ledger(ledger_path).signed("claim")]
        return [claim for claim in claims if not claim.released and claim.until > now]

    async def release() -> None:
        async with connected(owner, wanted, identity=owner.identity()) as here:
            for claim in held():
                await here.node.publish_claim(claim.slot, claim.progress, released=True)

    slots = [claim.slot for claim in held()]
    try:
        with owner.locked():
            if keep_serving:
                raise Usage("--keep-serving needs a running `join` in this home; there is none")
            if slots:
                asyncio.run(release())
    except HomeBusy:
        process = owner.holder()
        if process is None:
            raise
        os.kill(process, signal.SIGUSR1 if keep_serving else signal.SIGTERM)
        deadline = time.monotonic() + WAIT_S
        while held():
            if time.monotonic() > deadline:
                raise Usage(f"process {process} has not given {', '.join(slots)} back within {WAIT_S:.0f} s") from None
            time.sleep(0.2)
    shared.answer(
        {"released": slots, "serving": keep_serving},
        f"Gave back: {', '.join(slots)}." if slots else "No slot was held.",
    )
