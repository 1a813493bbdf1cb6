"""`paris-swarm import PARIS_FOLDER -o DIR`: the released Paris layout, checked, as a diffusers model that loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paris_swarm.cli.settings import HomeOption, JsonOption, settings


def import_(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder of the released Paris layout.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("imported"),
    text_encoder: Annotated[
        Path | None, typer.Option(help="Folder of the text encoder (transformers), where it is not in FOLDER.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of its tokenizer.")] = None,
    vae: Annotated[Path | None, typer.Option(help="Folder of the AutoencoderKL that latents are decoded by.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every tensor with its config, then write a folder that `DiffusionPipeline.from_pretrained` reads.

    Nobody signed such a folder and it has no lock, so `verify` and `sample` do not take it.
    """
    shared = settings(context, home, as_json)
    from paris_swarm.router.paris_import import import_paris, read_paris

    stock = {"text_encoder": text_encoder, "tokenizer": tokenizer, "vae": vae}
    with shared.console.status("Comparing every tensor ..."):
        source = read_paris(folder)
        written = import_paris(source, out, stock={name: path for name, path in stock.items() if path is not None})
    here = {path.split("/")[0] for path in written}
    absent = [name for name in stock if name not in here]
    shared.answer(
        {"folder": str(out), "experts": len(source.experts), "files": written, "absent": absent},
        f"Imported {len(source.experts)} experts and a router into {out}.\n"
        + (f"Not in it: {', '.join(absent)}; give them to from_pretrained, or import again with them.\n" * bool(absent))
        + f"Next: DiffusionPipeline.from_pretrained({str(out)!r}, trust_remote_code=True)",
    )
