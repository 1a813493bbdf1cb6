"""`paris-swarm store ls | verify | gc | pin | unpin`: what lies in this home's content store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paris_swarm.cli.exits import UNVERIFIED, Usage
from paris_swarm.cli.settings import HomeOption, JsonOption, settings

if TYPE_CHECKING:
    from paris_swarm.swarm.store import ContentStore

app = typer.Typer(
    help="Checkpoints and plans on this disk: list, check, pin, let go. Safe beside a running join.",
    no_args_is_help=True,
)

RootArgument = Annotated[str, typer.Argument(help="Root, or its first characters (at least six).")]


@app.command("ls")
def ls(context: typer.Context, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List what is stored, how much of it is here, and why it is kept."""
    shared = settings(context, home, as_json)
    from paris_swarm.cli.views import size
    from paris_swarm.swarm.garbage import kept_roots

    owner = shared.open_home()
    store = _store(owner.store_path)
    kept = kept_roots(owner)
    rows: list[dict[str, Any]] = []
    for stored in store.roots():
        about = _about(store, stored.root)
        why = [f"pinned: {stored.pinned}"] if stored.pinned is not None else []
        why += [kept[stored.root]] if stored.root in kept else []
        why += ["in use"] if store.in_use(stored.root) else []
        rows.append(
            {
                "root": stored.root,
                "kind": stored.kind,
                "slot": about[0],
                "step": about[1],
                "bytes": stored.bytes,
                "total": stored.total,
                "complete": stored.complete,
                "pinned": stored.pinned,
                "kept": why,
            }
        )
    used = store.used_bytes()
    lines = [
        f"{str(row['root'])[:12]}  {row['kind']:<10}  {_where(row['slot'], row['step']):<22}  "
        f"{size(row['bytes']):>9} of {size(row['total']):<9}  {'; '.join(row['kept']) or 'not kept'}"
        for row in rows
    ]
    shared.answer(
        {"store": str(store.folder), "bytes": used, "roots": rows},
        "\n".join([*lines, f"{len(rows)} in {store.folder}, {size(used)}."]),
    )


@app.command("verify")
def verify(
    context: typer.Context,
    root: Annotated[str | None, typer.Argument(help="Root, or its first characters; all when left out.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hash every file again. What was changed on disk is set aside and named; the exit code is then 4."""
    shared = settings(context, home, as_json)
    store = _store(shared.open_home().store_path)
    chosen = [stored.root for stored in store.roots()] if root is None else [_root(store, root)]
    bad = {name: files for name in chosen if (files := store.verify(name))}
    lines = [
        f"{name[:12]}: {', '.join(files)} changed on disk; set aside as *.corrupt-N, and fetched anew when needed"
        for name, files in bad.items()
    ]
    shared.answer(
        {"checked": len(chosen), "damaged": bad},
        "\n".join([*lines, f"{len(chosen)} checked, {len(bad)} damaged."]),
    )
    if bad:
        raise typer.Exit(UNVERIFIED)


@app.command("gc")
def gc(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    copies: Annotated[
        bool, typer.Option("--copies", help="Let go too of the copies that `assemble` keeps for others.")
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let go of what nobody in this home needs: old copies, downloads given up, damaged files set aside.

    Pinned, announced and used checkpoints stay, and so does what came in less than ten minutes ago.
    """
    shared = settings(context, home, as_json)
    import time

    from paris_swarm.cli.views import size
    from paris_swarm.swarm.garbage import collect, find_garbage, kept_roots

    owner = shared.open_home()
    store = _store(owner.store_path)
    if copies and not dry_run:
        for plan_id in owner.swarm_ids():
            owner.swarm(plan_id).drop_copies()
    kept = kept_roots(owner)
    if copies:
        kept = {root: why for root, why in kept.items() if not why.startswith("copy for others")}
    found = find_garbage(store, kept, now=time.time())
    gone, stayed = (found, {}) if dry_run else collect(store, found)
    freed = sum(item.freed for item in gone)
    lines = [f"{item.name[:60]}  {size(item.bytes)}  {item.why}" for item in gone]
    lines += [f"kept {name[:60]}: {why}" for name, why in stayed.items()]
    end = (
        f"Would let go of {len(gone)}, {size(freed)} of disk." if dry_run else f"{len(gone)} gone, {size(freed)} freed."
    )
    shared.answer(
        {
            "dry_run": dry_run,
            "freed": freed,
            "items": [
                {"kind": item.kind, "name": item.name, "bytes": item.bytes, "freed": item.freed, "why": item.why}
                for item in gone
            ],
            "stayed": stayed,
        },
        "\n".join([*lines, end]),
    )


@app.command("pin")
def pin(
    context: typer.Context,
    root: RootArgument,
    reason: Annotated[str, typer.Option(help="Why, for later.")] = "pinned by hand",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a checkpoint or plan whatever happens."""
    shared = settings(context, home, as_json)
    store = _store(shared.open_home().store_path)
    whole = _root(store, root)
    store.pin(whole, reason)
    shared.answer({"root": whole, "pinned": reason}, f"{whole} is pinned: {reason}.")


@app.command("unpin")
def unpin(context: typer.Context, root: RootArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Take a pin away; the files stay until `store gc`."""
    shared = settings(context, home, as_json)
    store = _store(shared.open_home().store_path)
    whole = _root(store, root)
    store.unpin(whole)
    shared.answer({"root": whole, "pinned": None}, f"{whole} is no longer pinned.")


def _store(path: Path) -> ContentStore:
    from paris_swarm.swarm.store import ContentStore

    return ContentStore(path)


def _root(store: ContentStore, text: str) -> str:
    """The one stored root that begins with ``text``."""
    found = [stored.root for stored in store.roots() if stored.root.startswith(text.lower())]
    if len(text) < 6 or len(found) != 1:
        what = "fewer than six characters" if len(text) < 6 else f"{len(found)} roots begin so"
        raise Usage(f"{text!r} names no one root ({what}): see `paris-swarm store ls --json`")
    return found[0]


def _about(store: ContentStore, root: str) -> tuple[str | None, int | None]:
    """Slot and step of a checkpoint, as far as its manifest is here."""
    from paris_swarm.dht_schemas.errors import RecordError
    from paris_swarm.dht_schemas.manifest import open_manifest

    try:
        data = store.read_blob(root) if store.kind(root) == "checkpoint" else None
        manifest = None if data is None else open_manifest(data, root, cap_bytes=1 << 62)
    except RecordError:
        return None, None
    return (None, None) if manifest is None else (manifest.slot, manifest.step)


def _where(slot: object, step: object) -> str:
    return "" if slot is None else f"slot {slot}, step {step}"
