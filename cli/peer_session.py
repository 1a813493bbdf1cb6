"""One run of `join`: node, peer, trainer processes and the live dashboard, until it is told to leave."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.live import Live

from paris_swarm.cli.checking import check_weights
from paris_swarm.cli.connect import Connected, Roads, connected, warn_of_loopback
from paris_swarm.cli.exits import Usage
from paris_swarm.cli.lifetime import on_signals
from paris_swarm.cli.plan_folder import PlanFolder
from paris_swarm.cli.settings import Settings, pick_device
from paris_swarm.cli.tasks import ROUTER, check_data, check_memory, check_recipes, check_starts, target_steps
from paris_swarm.cli.trainer import TrainerChoices, TrainerProcess, TrainJobFile, check_choices
from paris_swarm.cli.views import dashboard
from paris_swarm.dht_schemas.admission import PeerLists
from paris_swarm.dht_schemas.invite import Invite
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.peer import Peer
from paris_swarm.swarm.status import swarm_status
from paris_swarm.swarm.trainer import Purpose
from paris_swarm.swarm.transport import TransportDown, TransportError

SHOW_EVERY_S = 1.0
SLOTS_SHOWN = 16


@dataclass(frozen=True)
class SessionOptions:
    """What `join` was asked to do."""

    invite: Invite
    cluster: str | None
    router: bool
    data: Path | None
    device: str
    threads: int
    listen: str
    public: bool
    exit_when_done: bool
    keep_checkpoints: int = 2
    upload_limit: float | None = None
    store_limit: int | None = None
    lists: PeerLists = field(default_factory=PeerLists)
    roads: Roads = field(default_factory=Roads)
    trainer: TrainerChoices = field(default_factory=TrainerChoices)
    start_from: tuple[Path, ...] = ()
    announce: tuple[str, ...] = ()


async def run_session(shared: Settings, home: Home, options: SessionOptions) -> None:
    """Live as a peer until a signal, the end of the work (`--exit-when-done`) or an error.

    Raises:
        TransportError: the swarm cannot be reached, or does not let this peer in, or the network daemon died.
        RecordError, Unverified: the plan is not what the invite names; or this peer was revoked, or equivocated.
        ValueError: the data or the start weights do not fit the plan, or the cluster does not exist, or a recipe's
            network does not fit this machine (TooLarge) or any.
    """
    device = pick_device(options.device)
    warn_of_loopback(options.listen, options.invite.peers)
    async with connected(
        home,
        options.invite,
        identity=home.identity(),
        listen=options.listen,
        announce=options.announce,
        public=options.public,
        lists=options.lists,
        upload_limit=options.upload_limit,
        store_limit=options.store_limit,
        roads=options.roads,
    ) as here:
        home.remember_invite(str(options.invite))
        await asyncio.to_thread(_check_wishes, here, options, device)
        peer = _peer(here, options, device)
        living = asyncio.create_task(peer.run())
        leaving = asyncio.Event()

        def stop() -> None:
            leaving.set()
            peer.leave()

        on_signals(stop)
        with contextlib.suppress(ValueError):  # `leave --keep-serving`
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, peer.leave)
        try:
            await _show_until_done(shared, here, peer, living, leaving, options.exit_when_done)
        finally:
            peer.leave()
            await asyncio.gather(living, return_exceptions=True)
        if living.exception() is not None:
            raise living.exception()  # type: ignore[misc]


def _check_wishes(here: Connected, options: SessionOptions, device: str) -> None:
    check_recipes(here.plan_folder)
    slots = here.plan_folder.opened.plan.slots
    if options.cluster not in (None, "auto") and options.cluster not in slots:
        raise Usage(f"--claim-cluster {options.cluster}: the plan has clusters 0 to {len(slots) - 2}")
    if options.data is not None:
        from paris_swarm.expert.data.shards import PreparedData

        only_router = options.router and options.cluster is None
        check_data(here.plan_folder, PreparedData.open(options.data), slot=ROUTER if only_router else None)
    if options.cluster is not None:
        plan_folder = replace(here.plan_folder, brought=options.start_from)
        check_starts(plan_folder, slots[:-1] if options.cluster == "auto" else [options.cluster])
    wanted = list(slots[:-1]) if options.cluster == "auto" else [options.cluster] if options.cluster else []
    wanted += [ROUTER] if options.router else []
    if wanted:
        plan = here.plan_folder.opened.plan
        check_choices(options.trainer, device, [int(plan.slot_spec(slot).recipe["train"]["batch"]) for slot in wanted])
        check_memory(here.plan_folder, wanted, device, options.trainer.micro_batch, options.trainer.processes)


def _peer(here: Connected, options: SessionOptions, device: str) -> Peer:
    plan_folder = here.plan_folder
    checkpoint_every_s = plan_folder.opened.plan.policy.checkpoint_every_s

    async def start_trainer(slot: str, work: Path, resume: Path | None, parent: str | None) -> TrainerProcess:
        return await TrainerProcess.start(
            TrainJobFile(
                plan_folder=str(plan_folder.path.absolute()),
                plan_id=plan_folder.plan_id,
                data=str(options.data),
                slot=slot,
                work=str(work.absolute()),
                resume=str(resume.absolute()) if resume else None,
                parent=parent,
                device=device,
                threads=options.threads,
                checkpoint_every_s=checkpoint_every_s,
                **asdict(options.trainer),
                start_from=tuple(str(path) for path in options.start_from),
            )
        )

    async def check(slot: str, folder: Path, announcement: Announcement, purpose: Purpose) -> float:
        return await asyncio.to_thread(_checked_here, plan_folder, slot, folder, announcement, purpose)

    return Peer(
        here.node,
        cluster=options.cluster,
        router=options.router,
        start_trainer=start_trainer,
        check=check,
        local_checkpoint=newest_local_checkpoint,
        target_steps=target_steps(plan_folder),
        device=device,
        keep_checkpoints=options.keep_checkpoints,
    )


def _checked_here(
    plan_folder: PlanFolder, slot: str, folder: Path, announcement: Announcement, purpose: Purpose
) -> float:
    from paris_swarm.expert.memory import TooLarge

    try:
        return check_weights(plan_folder, slot, folder, announcement, purpose)
    except TooLarge as error:  # as a full disk: not the checkpoint's fault
        raise OSError(errno.ENOMEM, str(error)) from error


def newest_local_checkpoint(work: Path) -> tuple[Path, int, str | None] | None:
    """The newest whole checkpoint this home wrote for a slot, its step, and the root that its run began from; damaged
    ones are set aside.
    """
    from paris_swarm.expert.checkpoint import newest_whole, read_state

    folder, _torn = newest_whole(work)
    if folder is None:
        return None
    state = read_state(folder)
    return folder, state.step, state.parent


async def _show_until_done(
    shared: Settings,
    here: Connected,
    peer: Peer,
    living: asyncio.Task[None],
    leaving: asyncio.Event,
    exit_when_done: bool,
) -> None:
    """The dashboard (or, with --json, a line whenever a lane changes) until the session should end."""
    node = here.node
    lease_s = node.plan.policy.lease_s
    shown: object = None
    looked_at = 0.0
    live = None
    if not shared.as_json and shared.console.is_terminal:
        live = Live(console=shared.console, refresh_per_second=2)
        live.start()
    try:
        while not leaving.is_set() and not (living.done() and living.exception() is not None):
            if not node.transport.alive():
                raise TransportDown(
                    "the network daemon (p2pd) ended again and again; start `paris-swarm join` again to go on"
                )
            node.check_own()
            if (
                live is not None
                and node.clock() - looked_at > max(3.0, lease_s / 6)
                and len(node.plan.slots) <= SLOTS_SHOWN
            ):
                looked_at = node.clock()
                with contextlib.suppress(TransportError):
                    await node.refresh(node.plan.slots)
            if live is not None:
                live.update(dashboard(swarm_status(node), lanes=peer.lanes, own=node.identity.peer_id))
            else:
                now = [(lane.lane, lane.phase, lane.slot, lane.published_step, lane.note) for lane in peer.lanes]
                if now != shown:
                    shown = now
                    lanes = [asdict(lane) for lane in peer.lanes]
                    text = "; ".join(_lane_line(*line) for line in now) or "serving"
                    shared.answer({"event": "state", "peer": node.identity.peer_id, "lanes": lanes}, text)
            if exit_when_done and peer.finished and peer.lanes:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(leaving.wait(), SHOW_EVERY_S)
    finally:
        if live is not None:
            live.stop()


def _lane_line(lane: str, phase: str, slot: str | None, published: int, note: str) -> str:
    where = f" {slot}" if slot is not None else ""
    extra = f", published step {published}" if published else ""
    return f"{lane}: {phase}{where}{extra}{': ' + note if note else ''}"
