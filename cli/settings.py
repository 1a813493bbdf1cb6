"""Options every verb shares, and the two ways of answering: for people and for scripts."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from paris_swarm.cli.exits import Usage

if TYPE_CHECKING:
    from rich.console import Console

    from paris_swarm.swarm.home import Home

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        help="Folder of this peer: identity, peer cache, content store, swarms (env PARIS_SWARM_HOME).",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer in JSON on standard output.")]
AllowOption = Annotated[
    Path | None,
    typer.Option(
        "--allow", help="File of peer ids, one a line: only these count on this node (adds to HOME/allow.txt)."
    ),
]
BlockOption = Annotated[
    Path | None,
    typer.Option(
        "--block", help="File of peer ids, one a line: these are refused by this node (adds to HOME/block.txt)."
    ),
]
UploadOption = Annotated[
    str | None,
    typer.Option("--upload-limit", metavar="RATE", help="Most to send to others, such as 10MB/s; shared fairly."),
]
StoreLimitOption = Annotated[
    str | None,
    typer.Option("--store-limit", metavar="SIZE", help="Take in nothing more from others beyond this, such as 20GB."),
]
DirectOption = Annotated[
    bool,
    typer.Option("--direct/--no-direct", help="Carry files over a TLS connection of their own where a peer allows it."),
]
ListenOption = Annotated[
    str,
    typer.Option(
        "--listen",
        metavar="MULTIADDR",
        help="Where to listen; the default stays on this machine. /ip4/0.0.0.0/tcp/31337: every network it is in.",
    ),
]
AnnounceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--announce",
        metavar="MULTIADDR",
        help="Address that others are told instead of those listened on (a machine behind a one-to-one NAT, a "
        "forwarded port): /ip4/203.0.113.5/tcp/31337. May be given again.",
    ),
]


def _port_for_peers(port: int) -> int:
    """Refuse a port that no peer dials (R-TLS-1)."""
    if port:
        from paris_swarm.swarm.direct import LOWEST_PORT

        if port < LOWEST_PORT:
            raise typer.BadParameter(f"no peer dials port {port}; give 0 for any, or {LOWEST_PORT} to 65535")
    return port


DirectPortOption = Annotated[
    int,
    typer.Option(
        "--direct-port",
        min=0,
        max=65535,
        callback=_port_for_peers,
        help="TCP port for direct connections; 0: any; else 1024 to 65535.",
    ),
]
CompressOption = Annotated[
    Literal["auto", "never", "always"],
    typer.Option("--compress", help="Pack chunks before sending; auto: to peers slow enough for it to pay."),
]
MicroBatchOption = Annotated[
    int,
    typer.Option(
        "--micro-batch",
        min=0,
        help="Rows a forward pass; the rest of a batch follows and gradients add up: less memory. 0: the whole batch. "
        "Changes the last bits of training (recorded).",
    ),
]
RecomputeOption = Annotated[
    bool,
    typer.Option(
        "--recompute", help="Compute activations again in the backward pass: less memory, a third slower, same bits."
    ),
]
CompileOption = Annotated[
    bool,
    typer.Option(
        "--compile", help="torch.compile the network; needs a C++ compiler. Changes the last bits (recorded)."
    ),
]
ProcessesOption = Annotated[
    int,
    typer.Option(
        "--processes",
        min=1,
        help="Processes that share each batch, one to a GPU (needs the accelerate extra). Changes the last bits "
        "(recorded).",
    ),
]
DeterministicOption = Annotated[
    bool,
    typer.Option(
        "--deterministic", help="Only algorithms that give the same bits each time: on a GPU slower, and audits exact."
    ),
]
MetricsOption = Annotated[
    Literal["none", "jsonl", "tensorboard"],
    typer.Option("--metrics", help="Keep loss, loss by t and speed beside the checkpoints. Changes no bits."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]


@dataclass(frozen=True)
class Settings:
    """What the shared options came to."""

    home_path: Path
    as_json: bool

    def open_home(self) -> Home:
        from paris_swarm.swarm.home import Home

        return Home(self.home_path)

    @property
    def console(self) -> Console:
        """Where people read; standard error when standard output carries JSON."""
        from rich.console import Console

        return Console(stderr=self.as_json, highlight=False)

    def answer(self, report: dict[str, Any], text: str) -> None:
        """Print the report as one JSON line, or the text for people (no markup is read in it)."""
        if self.as_json:
            sys.stdout.write(json.dumps(report, sort_keys=True, allow_nan=False) + "\n")
            sys.stdout.flush()
        else:
            self.console.print(text, markup=False, soft_wrap=True)


def settings(context: typer.Context, home: Path | None, as_json: bool) -> Settings:
    """Shared options given before or after the verb; after wins."""
    shared: dict[str, Any] = context.obj or {}
    chosen = home or shared.get("home") or os.environ.get("PARIS_SWARM_HOME")
    if chosen is None:
        from platformdirs import user_data_dir

        chosen = user_data_dir("paris-swarm")
    return Settings(Path(chosen).expanduser().absolute(), as_json or bool(shared.get("json")))


def check_compiler() -> None:
    """Raises Usage where ``--compile`` would find no C++ compiler on this machine."""
    compilers = (os.environ.get("CXX", ""), "g++", "c++", "clang++")
    if not any(shutil.which(name) for name in compilers if name):
        raise Usage("--compile needs a C++ compiler (g++ or clang++), and none is on the PATH")


def pick_device(name: str) -> str:
    """The torch device for `--device`.

    Raises:
        ValueError: unknown name, or a device this machine does not have.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name not in available:
        raise ValueError(f"--device must be auto, cpu, cuda or mps, not {name!r}")
    if not available[name]:
        raise ValueError(f"--device {name}: torch finds no such device here; --device cpu always works")
    return name
