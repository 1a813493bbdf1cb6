"""`paris-swarm leave`: give the slot back at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from paris_swarm.cli.exits import Usage
from paris_swarm.cli.settings import HomeOption, JsonOption, settings

LIMIT_S = 900.0
"""How long a running `join` is waited for: its trainer ends a step and writes a last checkpoint first, and gets several
minutes for it (`trainer.TrainerProcess.stop_seconds`)."""
SAY_EVERY_S = 15.0
LOOK_EVERY_S = 0.2


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

    A `join` running in this home is asked to do it, and waited for: a last checkpoint comes first, which may take
    minutes. Otherwise this command does it itself.
    """
    shared = settings(context, home, as_json)
    import asyncio
    import contextlib
    import os
    import signal

    from paris_swarm.cli.connect import connected, resolve_invite
    from paris_swarm.dht_schemas.records import Claim
    from paris_swarm.swarm.home import HomeBusy
    from paris_swarm.swarm.ledger import Ledger

    owner = shared.open_home()
    wanted = resolve_invite(invite, owner)
    ledger_path = owner.swarm(wanted.plan_id).path / "ledger.json"

    def unreleased() -> list[Claim]:
        """Claims that were not given back; a `join` that is ending renews none, so they may have run out meanwhile."""
        claims = [Claim.open(envelope).record for envelope in Ledger(ledger_path).signed("claim")]
        return [claim for claim in claims if not claim.released]

    def held() -> list[Claim]:
        now = time.time()
        return [claim for claim in unreleased() if claim.until > now]

    async def release() -> None:
        async with connected(owner, wanted, identity=owner.identity()) as here:
            for claim in held():
                await here.node.publish_claim(claim.slot, claim.progress, released=True)

    def freed() -> bool:
        """Give back what is held, where no process speaks as this peer; False where one does."""
        try:
            with owner.locked():
                if held():
                    asyncio.run(release())
        except HomeBusy:
            return False
        return True

    slots = [claim.slot for claim in held()]
    serving = False
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
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(process, signal.SIGUSR1 if keep_serving else signal.SIGTERM)

        def say(text: str) -> None:
            shared.console.print(text, markup=False, soft_wrap=True)

        lives = until_given_back(
            lambda: [claim.slot for claim in unreleased() if claim.slot in slots],
            lambda: not freed(),
            say,
            process=process,
        )
        serving = keep_serving and lives
    shared.answer(
        {"released": slots, "serving": serving},
        f"Gave back: {', '.join(slots)}." if slots else "No slot was held.",
    )


def until_given_back(
    held: Callable[[], Sequence[str]],
    running: Callable[[], bool],
    say: Callable[[str], None],
    *,
    process: int,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Wait for a `join` that was asked to give its slots back: True once it holds none, False once it no longer runs.

    held: the slots that it has not given back yet, run out or not; running: whether it lives; say: is told now and
    then what is waited for; clock, sleep: seconds.

    Raises:
        Usage: it holds one after LIMIT_S; it goes on by itself all the same.
    """
    began = clock()
    told = began
    while slots := held():
        if not running():
            return False
        now = clock()
        what = f"slot{'s' if len(slots) > 1 else ''} {', '.join(slots)}"
        given = f"{what} {'are' if len(slots) > 1 else 'is'} given back once that is done"
        if now - began >= LIMIT_S:
            raise Usage(
                f"process {process} is still writing its last checkpoint after {LIMIT_S / 60:.0f} minutes: {given}. "
                "Let it: a second `leave` would end it at once, without that checkpoint"
            )
        if now - told >= SAY_EVERY_S:
            told = now
            say(f"Waiting for process {process}, which writes a last checkpoint: {given} ({now - began:.0f} s so far).")
        sleep(LOOK_EVERY_S)
    return True
