"""`paris-swarm identity show | export | import`: the key that is the peer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paris_swarm.cli.settings import HomeOption, JsonOption, settings

app = typer.Typer(help="The key that is this peer: show, back up, restore.", no_args_is_help=True)


@app.command("show")
def show(context: typer.Context, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Print the peer id and where the key lies (made on first use)."""
    shared = settings(context, home, as_json)
    owner = shared.open_home()
    identity = owner.identity()
    shared.answer(
        {"peer": identity.peer_id, "path": str(owner.identity_path)},
        f"Peer id  {identity.peer_id}\nKey      {owner.identity_path} (mode 0600; whoever reads it is this peer)\n"
        "The organiser of a closed swarm needs the peer id to make your invite.\n"
        "Back it up with: paris-swarm identity export FILE",
    )


@app.command("export")
def export(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="File to write (0600).")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a copy of the key."""
    shared = settings(context, home, as_json)
    from paris_swarm.dht_schemas.files import atomic_write

    identity = shared.open_home().identity(create=False)
    if file.exists():
        raise ValueError(f"{file} exists: choose a new name, a key is never overwritten")
    atomic_write(file, identity.to_protobuf(), mode=0o600)
    shared.answer(
        {"peer": identity.peer_id, "path": str(file)},
        f"Key of {identity.peer_id} written to {file} (0600). Never run two homes on one key at once.",
    )


@app.command("import")
def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="File written by `identity export`.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a key into this home; never overwrites another one."""
    shared = settings(context, home, as_json)
    from paris_swarm.dht_schemas.identity import Identity

    try:
        identity = Identity.from_protobuf(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not an Ed25519 identity: {error}") from error
    owner = shared.open_home()
    owner.write_identity(identity)
    shared.answer(
        {"peer": identity.peer_id, "path": str(owner.identity_path)},
        f"{owner.path} is now {identity.peer_id}.",
    )
