"""Where a verb is to write, looked at before hours of work: a wrong place should cost nobody a drawing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from paris_swarm.cli.exits import Usage


def check_files(files: Mapping[str, Path | None], *, folder: Path) -> None:
    """Looks at the files that will be written, by the option that names each (None: that one will not be).

    Raises:
        Usage: one is a folder, lies in a folder that is not there or in the assembled ``folder``, or two are the same.
    """
    seen: dict[Path, str] = {}
    for option, file in files.items():
        if file is None:
            continue
        place = file.absolute()
        if place.is_dir():
            raise Usage(f"{option} {file} is a folder: name a file in it")
        if not place.parent.is_dir():
            raise Usage(f"{option} {file}: {place.parent} is no folder; make it first, or choose another place")
        check_outside(file, folder, option)
        if (other := seen.setdefault(place.resolve(), option)) != option:
            raise Usage(f"{other} and {option} name the same file, {file}: choose two")


def check_outside(place: Path, folder: Path, option: str) -> None:
    """Refuses a place in an assembled folder.

    Raises:
        Usage: ``place`` is ``folder`` or lies in it: the folder would hold what nobody signed, and verify no longer.
    """
    if place.resolve().is_relative_to(folder.resolve()):
        raise Usage(f"{option} {place} lies in {folder}, which would no longer verify: choose a place outside it")
