"""Parts of one preparation, made apart (`prepare --part I/N`), joined to what one run would have made.

Byte for byte the same, the manifest included, when all parts were encoded by the same kind of machine: a shard is a
function of its range of items, and parts are cut between shards. A picture that came in an earlier part with the same
caption is dropped here, as one run would have done; only the order in which a shard's duplicates are named may differ.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from paris_swarm.dht_schemas.files import atomic_write_json
from paris_swarm.expert.data import shards
from paris_swarm.expert.data.pictures import SeenNumbers
from paris_swarm.expert.data.prepare import MAX_NAMED, Part, PrepareReport, check_out
from paris_swarm.expert.data.shard_maker import AGAIN
from paris_swarm.expert.data.sources import PrepareError, Skipped
from paris_swarm.expert.data.unfinished import file_entry, put_in_place, recover

_OWN = ("count", "shards", "skipped", "skipped_count", "files", "part")
"""Fields of a manifest in which parts of one whole differ, beside the longest caption and the rows looked at."""


@dataclass(frozen=True)
class _PartFolder:
    """One part: where it lies and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def part(self) -> Part:
        return Part(self.manifest["part"]["index"], self.manifest["part"]["of"])

    @classmethod
    def open(cls, path: Path) -> _PartFolder:
        """A part whose files are all there, as long and of the shapes that its manifest says.

        Raises PrepareError: a whole, or a part whose manifest does not say which. PreparedDataError.
        """
        manifest = shards.read_manifest(path, empty=True)
        if "part" not in manifest:
            raise PrepareError(f"{path} is a whole, not a part: move it out of {path.parent}")
        try:
            said = manifest["part"]
            numbers = [said["index"], said["of"], said["first_shard"] + 1, said["total"], manifest["skipped_count"] + 1]
            named, items = said["skipped_in"], [(item["file"], item["why"]) for item in manifest["skipped"]]
            sound = (
                all(type(number) is int and number > 0 for number in (*numbers, *(place + 1 for place in named)))
                and said["index"] <= said["of"]
                and len(named) == len(items)
                and ("kept" not in manifest or type(manifest["kept"]["of"]) is int)
                and any(entry["name"] == shards.NULL_STATES for entry in manifest["files"])
            )
        except (KeyError, TypeError):
            sound = False
        if not sound:
            raise PrepareError(f"{path / shards.MANIFEST} does not say which part it is: prepare it again")
        if manifest["count"]:
            shards.PreparedData.open(path)
        return cls(path, manifest)

    def common(self) -> dict[str, Any]:
        """What all parts of one whole must have in common."""
        facts = {name: value for name, value in self.manifest.items() if name not in _OWN}
        facts["text"] = {name: value for name, value in facts["text"].items() if name != "tokens"}
        if "kept" in facts:
            facts["kept"] = {name: value for name, value in facts["kept"].items() if name != "of"}
        facts["parts"] = {name: self.manifest["part"][name] for name in ("of", "total")}
        facts["null"] = next(entry for entry in self.manifest["files"] if entry["name"] == shards.NULL_STATES)["digest"]
        return facts


def merge(folder: str | Path, out: str | Path) -> PrepareReport:
    """Join the parts in ``folder`` to the prepared folder ``out``. Their files are linked, or copied where they cannot
    be: the parts may be removed afterwards.

    Raises PrepareError: a part is missing or not of the same whole, or there is something else at ``out``.
    PreparedDataError: a part's manifest cannot be read. OSError.
    """
    folder, out = Path(folder), Path(out)
    parts = _parts(folder)
    recover(out)
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}.", suffix=".merge", dir=out.parent))
    try:
        draft.chmod(0o755)  # mkdtemp's 0700 would follow the folder to its final name
        manifest = _joined(parts, draft)
        if not manifest["count"]:
            raise PrepareError(f"no usable image in any of the {len(parts)} parts: {manifest['skipped_count']} skipped")
        atomic_write_json(draft / shards.MANIFEST, manifest)
        put_in_place(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    vae = manifest.get("latents")
    return PrepareReport(
        folder=out,
        count=manifest["count"],
        resolution=manifest["resolution"] if vae is None else vae["pixels"],
        skipped=tuple(Skipped(item["file"], item["why"]) for item in manifest["skipped"]),
        skipped_count=manifest["skipped_count"],
        text_tokens=manifest["text"]["tokens"],
        bytes=sum(entry["length"] for entry in manifest["files"]),
    )


def _parts(folder: Path) -> list[_PartFolder]:
    """Every part, in order. Raises PrepareError."""
    if not folder.is_dir():
        raise PrepareError(f"{folder} is no folder: give the one that `prepare --part` wrote into")
    found = []
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and (path / shards.MANIFEST).is_file():
            found.append(_PartFolder.open(path))
    if not found:
        raise PrepareError(f"{folder} holds no finished part: run prepare with --part 1/N to --part N/N into it first")
    found.sort(key=lambda each: each.part.index)
    whole = found[0].common()
    for other in found[1:]:
        theirs = other.common()
        odd = sorted(name for name in whole.keys() | theirs.keys() if whole.get(name) != theirs.get(name))
        if odd:
            raise PrepareError(
                f"{other.path.name} is of another whole than {found[0].path.name}: {odd[0]} is {theirs.get(odd[0])}, "
                f"not {whole.get(odd[0])}"
            )
    here = [each.part.index for each in found]
    of = found[0].part.of
    if missing := list(islice((index for index in range(1, of + 1) if index not in here), 8)):
        raise PrepareError(f"{folder} lacks part {', '.join(f'{index}/{of}' for index in missing)}: prepare it first")
    if len(here) != of:
        raise PrepareError(f"{folder} holds a part twice: {sorted(path.path.name for path in found)}")
    return found


def _joined(parts: list[_PartFolder], draft: Path) -> dict[str, Any]:
    """Put the files of all parts into ``draft`` under their numbers in the whole; the whole's manifest."""
    seen = SeenNumbers()
    entries: list[dict[str, Any]] = []
    sizes: list[int] = []
    skipped: list[Skipped] = []
    count, tokens = 0, parts[0].manifest["null_length"]
    for each in parts:
        first = each.manifest["part"]["first_shard"]
        if first != len(sizes):
            raise PrepareError(f"{each.path.name} begins at shard {first}, the parts before it end at {len(sizes)}")
        named = list(_named_by_shard(each.manifest))
        count += each.manifest["skipped_count"]
        own = {entry["name"]: entry for entry in each.manifest["files"]}
        for local, rows in enumerate(each.manifest["shards"]):
            skipped += [item for number, item in named if number == local]
            fresh = _fresh(each.path, local, rows, seen)
            if fresh.all():
                entries += _linked(each.path, own, local, draft, first + local) if rows else []
            else:
                again = shards.read_captions(each.path, local)
                twins = [record for record, is_fresh in zip(again, fresh.tolist(), strict=True) if not is_fresh]
                skipped += [Skipped(record["file"], AGAIN) for record in twins]
                count += len(twins)
                entries += _without(each.path, own, local, draft, first + local, fresh)
            sizes.append(int(fresh.sum()))
            if sizes[-1]:
                lengths = np.load(draft / shards.shard_name("lengths", first + local), allow_pickle=False)
                tokens = max(tokens, int(lengths.max()))
    _link(parts[0].path / shards.NULL_STATES, draft / shards.NULL_STATES)
    entries.append(next(entry for entry in parts[0].manifest["files"] if entry["name"] == shards.NULL_STATES))
    manifest = {name: value for name, value in parts[0].manifest.items() if name != "part"}
    manifest |= {
        "count": sum(sizes),
        "shards": sizes,
        "text": manifest["text"] | {"tokens": tokens},
        "skipped": [{"file": item.file, "why": item.why} for item in skipped[:MAX_NAMED]],
        "skipped_count": count,
        "files": sorted(entries, key=lambda entry: entry["name"]),
    }
    if "kept" in manifest:
        manifest["kept"] = manifest["kept"] | {"of": sum(each.manifest["kept"]["of"] for each in parts)}
    return manifest


def _named_by_shard(manifest: dict[str, Any]) -> Iterator[tuple[int, Skipped]]:
    for number, item in zip(manifest["part"]["skipped_in"], manifest["skipped"], strict=True):
        yield number, Skipped(item["file"], item["why"])


def _fresh(folder: Path, number: int, rows: int, seen: SeenNumbers) -> np.ndarray:
    """bool [rows]: which rows of a shard came in no earlier one."""
    if not rows:
        return np.ones(0, dtype=bool)
    digests = np.load(folder / shards.shard_name("digests", number), allow_pickle=False)
    return np.array([seen.add(digest.tobytes()) for digest in digests], dtype=bool)


def _linked(
    folder: Path, own: dict[str, dict[str, Any]], local: int, draft: Path, number: int
) -> Iterator[dict[str, Any]]:
    for kind in shards.kinds():
        if entry := own.get(shards.shard_name(kind, local)):
            name = shards.shard_name(kind, number)
            _link(folder / entry["name"], draft / name)
            yield entry | {"name": name}


def _without(
    folder: Path, own: dict[str, dict[str, Any]], local: int, draft: Path, number: int, fresh: np.ndarray
) -> Iterator[dict[str, Any]]:
    """The shard's files without the rows that are not fresh; none when no row is left."""
    if not fresh.any():
        return
    lengths = np.load(folder / shards.shard_name("lengths", local), allow_pickle=False)[fresh]
    for kind in shards.kinds():
        name = shards.shard_name(kind, local)
        if name not in own:
            continue
        if kind == "captions":
            records = shards.read_captions(folder, local)
            shards.write_captions(draft, number, (record for record, keep in zip(records, fresh, strict=True) if keep))
        else:
            array = np.load(folder / name, mmap_mode="r", allow_pickle=False)[fresh]
            if kind == "states":
                array = array[:, : int(lengths.max())]
            shards.write_rows(draft, kind, number, array)
        yield file_entry(draft / shards.shard_name(kind, number))


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where links are not possible. Finished files are never written to."""
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
