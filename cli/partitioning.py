"""`init`'s first half: which row belongs to which cluster, what the plan says about it, and the report for people."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from paris_swarm.cli.row_labels import all_captions
from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.files import atomic_write

if TYPE_CHECKING:
    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.router.cluster_report import ClusterReport
    from paris_swarm.router.partition import Partition

FAMILIES_NAMED = 16
"""Families a cluster that the plan names; the report on disk names all."""
CLASS_KEYS = ("class", "family")
"""Fields that name a class, where none is asked for: `prepare`'s from a source with classes, and DiceBear's styles."""
CLASSES_BYTES = 32 * 1024
"""The table of classes travels in the plan's field `data`, of at most 64 KiB."""


def find_partition(
    data: PreparedData,
    clusters: int,
    *,
    seed: int,
    method: str = "clusters",
    class_key: str | None = None,
    balance: float | None = None,
) -> Partition:
    """The partition that `init --partition` asks for; labels follow the rule that peers will (`router.row_rule`).

    class_key: the field of the caption records that names a class, None for the first of CLASS_KEYS that the first row
    has.

    Raises:
        ValueError: an unknown method, a bound on sizes that only clusters can have, or data that cannot be so divided.
    """
    import numpy as np

    from paris_swarm.router.partition import METHODS, partition
    from paris_swarm.router.row_rule import class_partition, random_partition

    if method not in METHODS:
        raise ValueError(f"--partition must be one of {', '.join(METHODS)}, got {method!r}")
    if balance is not None and method != "clusters":
        raise ValueError(f"--balance bounds the sizes of clusters; with --partition {method} leave it out")
    if method == "random":
        return random_partition(data.features(), np.asarray(data.digests), clusters, seed)
    if method == "class":
        class_key = class_key or _class_key(data)
        found = class_partition(data.features(), all_captions(data), clusters, seed, class_key)
        size = len(canonical_json(dict(found.classes)))
        if size > CLASSES_BYTES:
            raise ValueError(
                f"{class_key!r} has {len(found.classes)} values, {size} bytes of names; a plan has room for "
                f"{CLASSES_BYTES}: name a coarser field with --class-key"
            )
        return found
    return partition(data.features(), clusters, seed=seed, balance=balance)


def _class_key(data: PreparedData) -> str:
    record = data.captions([0])[0]
    for key in CLASS_KEYS:
        if key in record:
            return key
    raise ValueError(
        f"the rows in {data.folder} have no class: prepare them from folders of classes or a source with a class "
        "(`prepare --class-column`), or name another field of their caption records with --class-key"
    )


def partition_dict(report: ClusterReport) -> dict[str, Any]:
    """The cluster report as plain JSON values, without the example rows and all but the largest families."""
    value = {key: item for key, item in asdict(report).items() if key != "examples"}
    if report.families is not None:
        value["families"] = [dict(list(named.items())[:FAMILIES_NAMED]) for named in report.families]
    return cast(dict[str, Any], json.loads(json.dumps(value)))


def partition_facts(found: Partition, report: ClusterReport, balance: float | None) -> dict[str, Any]:
    """What the plan says: the report's figures, and what peers need to find the cluster of a row."""
    rule: dict[str, Any] = {"seed": found.seed}
    if found.method == "class":
        rule |= {"class_key": found.class_key, "classes": dict(found.classes)}
    if balance is not None:
        rule["balance"] = balance
    return partition_dict(report) | rule


def check_report_folder(folder: Path) -> None:
    """Refuse a place where something else lies, before any work is done: an earlier report is removed, whole.

    Raises:
        ValueError: the folder holds anything but an earlier report.
    """
    from paris_swarm.router.cluster_page import FIGURES, PAGE

    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is not a folder: choose another place with --report")
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(name for name in found - {FIGURES, PAGE} if not re.fullmatch(r"cluster-\d+\.png", name))
    if found and (others or FIGURES not in found):
        named = f", such as {others[0]}" if others else ""
        raise ValueError(f"{folder} holds other things{named}: choose another place with --report")


def write_report(folder: Path, data: PreparedData, report: ClusterReport, *, title: str, grids: list[bytes]) -> None:
    """Write the page, the grids and the figures; an earlier report there gives way, whole.

    Raises:
        ValueError: as `check_report_folder`.
    """
    from paris_swarm.router.cluster_page import report_files

    check_report_folder(folder)
    captions = [[str(record["text"]) for record in data.captions(rows)] for rows in report.examples]
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in report_files(report, title=title, grids=grids, captions=captions).items():
            atomic_write(draft / name, content)
        draft.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
