"""The demo from first to last step; every step is a verb that people type too."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from paris_swarm.cli.demo.figures import PROMPTS_A_CLUSTER, Figures, held_out_prompts, measure
from paris_swarm.cli.demo.pace import Pace, choose_pace
from paris_swarm.cli.demo.processes import Processes, Running, ask_verb
from paris_swarm.cli.demo.traffic import Wire
from paris_swarm.cli.exits import ProcessFailed
from paris_swarm.cli.views import dashboard, picture, size
from paris_swarm.dht_schemas.files import atomic_write_json
from paris_swarm.swarm.status import SwarmStatus, status_from_dict

MARKER = ".paris-swarm-demo"
START_SECONDS = 120.0
LATE_FACTOR = 4.0
"""Give up when training takes this many times the minutes asked for."""
ONE_ROAD = "--no-direct"
"""Direct connections are short and many; only those of p2pd last, so that their counters are read in full."""


@dataclass(frozen=True)
class DemoOptions:
    """What `paris-swarm demo` was asked for."""

    out: Path
    minutes: float
    peers: int
    clusters: int
    count: int
    resolution: int
    steps: int | None
    seed: int
    guidance: float
    sample_steps: int
    device: str


@dataclass(frozen=True)
class Sent:
    """Bytes sent before assembly: chunks of checkpoints and files of the plan (own counters), and all (kernel)."""

    checkpoints: int
    plan_files: int
    wire: int


class Demo:
    """One run. ``out`` gets samples.png, model/, swarm/ (homes and logs) and report.json."""

    def __init__(self, options: DemoOptions, console: Console) -> None:
        self.options = options
        self.console = console
        self.out = options.out.absolute()
        self.homes = self.out / "swarm"
        self.wire = Wire()
        self.begun = time.monotonic()

    def run(self) -> dict[str, Any]:
        """All steps; returns the report.

        Raises:
            ProcessFailed: a process of the swarm ended in error.
            ValueError: the output folder holds something else.
        """
        self._make_room()
        data, plan = self.out / "data", self.out / "plan"
        self._headline("1. Captioned images: drawn, encoded, sharded")
        prepared = ask_verb(
            [
                *("prepare", "dicebear", str(data), "--seed", str(self.options.seed)),
                *("--count", str(self.options.count), "--resolution", str(self.options.resolution)),
            ]
        )
        licences = "; ".join(f"{item['what']}: {item['name']}" for item in prepared["licences"])
        self.console.print(f"{prepared['count']} pictures of {prepared['resolution']} px. {licences}.")
        self._headline("2. A plan: clusters, probe set, recipe, signature")
        pace = choose_pace(self.options, data)
        self.console.print(pace.explanation)
        ask_verb(self._init_arguments(data, plan, pace))
        with Processes(self.homes / "logs") as processes:
            invite = self._start_seed(processes, plan)
            self._headline(f"3. A swarm: one bootstrap node, {self.options.peers} peers, each its own process and home")
            self.console.print(f"Invite: {invite}", soft_wrap=True)
            self._start_peers(processes, invite, data, pace)
            final = self._watch(processes, invite, pace)
            sent = Sent(self._files_sent("checkpoint"), self._files_sent("plan", "blob"), self.wire.total())
            pairs = self.wire.pairs()
            self._headline("4. A home that trained nothing assembles, verifies and draws")
            artist = ["--home", str(self.homes / "artist")]
            assembled = ask_verb([*artist, "assemble", invite, "-o", str(self.out / "model")])
        ask_verb([*artist, "verify", str(self.out / "model"), "--plan", invite])
        prompts = held_out_prompts(data, plan, self.options.seed)
        drawn = self._draw(artist, prompts.captions)
        figures = measure(drawn, prompts, data, plan)
        return self._report(figures, assembled, final, sent, pairs, pace)

    # ---- steps -----------------------------------------------------------------

    def _make_room(self) -> None:
        if self.out.exists() and any(self.out.iterdir()):
            if not (self.out / MARKER).exists():
                raise ValueError(f"{self.out} holds other things: choose another folder with -o")
            self.console.print(f"Replacing the demo of an earlier run in {self.out}.")
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / MARKER).touch()

    def _init_arguments(self, data: Path, plan: Path, pace: Pace) -> list[str]:
        return [
            *("--home", str(self.homes / "bootstrap"), "init", str(data), "-o", str(plan)),
            *("--name", "demo", "--clusters", str(self.options.clusters), "--seed", str(self.options.seed)),
            *("--steps", str(pace.steps), "--router-steps", str(pace.router_steps)),
            *("--lease", "45", "--checkpoint-every", str(pace.checkpoint_every_s), "--grace", "600"),
        ]

    def _start_seed(self, processes: Processes, plan: Path) -> str:
        arguments = ["--home", str(self.homes / "bootstrap"), "bootstrap", str(plan), ONE_ROAD, "--json"]
        seed = processes.start("bootstrap", arguments)
        return str(seed.wait_line(START_SECONDS)["invite"])

    def _start_peers(self, processes: Processes, invite: str, data: Path, pace: Pace) -> None:
        for number in range(1, self.options.peers + 1):
            name = f"peer-{number}"
            arguments = ["--home", str(self.homes / name), "join", invite, "--claim-cluster", "--data", str(data)]
            arguments += ["--threads", str(pace.threads), "--device", self.options.device, ONE_ROAD, "--json"]
            if number == 1:
                arguments.append("--claim-router")
            processes.start(name, arguments)

    def _watch(self, processes: Processes, invite: str, pace: Pace) -> SwarmStatus:
        """Show the dashboard until every slot's last checkpoint is published."""
        watcher = processes.start(
            "dashboard",
            ["--home", str(self.homes / "dashboard"), "status", invite, "--watch", "--every", "4", "--json"],
        )
        watcher.wait_line(START_SECONDS)
        sampled = {running.name: running.process.pid for running in processes.running}
        deadline = time.monotonic() + LATE_FACTOR * 60 * self.options.minutes + START_SECONDS
        with Live(console=self.console, refresh_per_second=2, transient=not self.console.is_terminal) as live:
            while True:
                processes.check()
                self.wire.sample(sampled)
                status = status_from_dict(watcher.wait_line(START_SECONDS))
                live.update(dashboard(status))
                if _finished(status, pace):
                    return status
                if time.monotonic() > deadline:
                    raise ProcessFailed(
                        f"training is not done after {LATE_FACTOR * self.options.minutes:.0f} minutes: "
                        f"see {self.homes / 'logs'}"
                    )
                _wait_for_news(watcher, seconds=2.0)

    def _draw(self, artist: list[str], captions: list[str]) -> Path:
        png = self.out / "samples.png"
        arguments = [*artist, "sample", str(self.out / "model"), "-o", str(png), "--seed", str(self.options.seed)]
        arguments += ["--guidance", str(self.options.guidance), "--steps", str(self.options.sample_steps)]
        for caption in captions:
            arguments += ["--prompt", caption]
        ask_verb([*arguments, "--device", self.options.device])
        return png

    def _files_sent(self, *kinds: str) -> int:
        """Bytes of these kinds that the homes have sent so far, by their own counters on disk."""
        total = 0
        for path in self.homes.glob("*/swarms/*/traffic.json"):
            sent = json.loads(path.read_bytes())["sent"]
            total += sum(of_peer[kind]["wire"] for of_peer in sent.values() for kind in kinds if kind in of_peer)
        return total

    # ---- the end ----------------------------------------------------------------

    def _report(
        self,
        figures: Figures,
        assembled: dict[str, Any],
        final: SwarmStatus,
        sent: Sent,
        pairs: dict[str, int],
        pace: Pace,
    ) -> dict[str, Any]:
        report: dict[str, Any] = {
            "seconds": round(time.monotonic() - self.begun, 1),
            **figures.as_dict(),
            "bytes": {
                "records": sent.wire - sent.checkpoints or None,
                "plan_files": sent.plan_files,
                "files_before_assembly": sent.checkpoints,
                "files": assembled["bytes"],
                "gradients": 0 if self.wire.trainer_sockets == 0 else None,
            },
            "slots": assembled["slots"],
            "trainers": {
                "processes": len(self.wire.trainers_seen),
                "looks": self.wire.looks,
                "internet_sockets": self.wire.trainer_sockets,
            },
            "sent_while_training": pairs,
            "plan": final.plan,
            "assembly": assembled["digest"],
            "steps": pace.steps,
            "router_steps": pace.router_steps,
        }
        atomic_write_json(self.out / "report.json", report)
        self._say(report, figures)
        return report

    def _say(self, report: dict[str, Any], figures: Figures) -> None:
        def say(text: object = "") -> None:
            self.console.print(text, soft_wrap=True)

        if self.console.is_terminal:
            say(picture(figures.preview, columns=self.console.width))
        self._headline("What happened")
        for slot in report["slots"]:
            say(
                f"  slot {slot['slot']:<6} trained by {slot['peer']}  step {slot['step']}  "
                f"root {slot['root'][:16]}  probe {slot['probe_loss']:.4f}"
            )
        sent, trainers = report["bytes"], report["trainers"]
        records = "not counted on this system" if sent["records"] is None else size(sent["records"])
        say()
        say(
            f"Sent while training: {records} of records and protocol ({size(sent['plan_files'])} of them the plan's "
            f"files), {sent['files_before_assembly']} bytes of checkpoints. Sent for assembly: {size(sent['files'])} "
            "of files, each chunk verified."
        )
        if sent["gradients"] == 0:
            say(
                f"Gradients: 0 bytes. They exist only in the {trainers['processes']} trainer processes, and in "
                f"{trainers['looks']} looks at /proc none of these had an internet socket."
            )
        else:
            say("Gradients: not shown to be 0: a trainer process had an internet socket open.")
        say()
        for line in figures.lines():
            say(line)
        say()
        say(f"Pictures  {_relative(self.out / 'samples.png')}")
        say(f"Model     {_relative(self.out / 'model')}")
        say(f"Report    {_relative(self.out / 'report.json')}")
        say(f"Time      {report['seconds'] / 60:.1f} minutes")
        say()
        say(
            f"Next: {_paris_swarm()} sample {_relative(self.out / 'model')} "
            f'--prompt "{figures.example}" -n 4 -o mine.png'
        )

    def _headline(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/bold]  [dim]{time.monotonic() - self.begun:.0f} s[/dim]")


def _finished(status: SwarmStatus, pace: Pace) -> bool:
    targets = {slot.slot: pace.router_steps if slot.slot == "router" else pace.steps for slot in status.slots}
    return all(slot.checkpoint is not None and slot.checkpoint.step >= targets[slot.slot] for slot in status.slots)


def _wait_for_news(watcher: Running, seconds: float) -> None:
    with watcher.arrived:
        watcher.arrived.wait(seconds)


def _paris_swarm() -> str:
    return ".venv/bin/paris-swarm" if Path(".venv/bin/paris-swarm").exists() else "paris-swarm"


def _relative(path: Path) -> str:
    return os.path.relpath(path)


__all__ = ["PROMPTS_A_CLUSTER", "Demo", "DemoOptions"]
