"""Preparing on Ray (arXiv 1712.05889): each part of a preparation is one row of a Ray Data set, made where Ray puts it.

Ray brings the machines and the retries; what a part is, how a killed one goes on and how parts are joined is that of
prepare.py and parts.py, so the result has the bytes of one run. Source and output must lie where every machine sees
them. Needs the extra `ray`.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.expert.data.encoders import FeatureEncoder, LatentEncoder, TextEncoder
from paris_swarm.expert.data.parts import merge
from paris_swarm.expert.data.prepare import (
    DICEBEAR,
    NO_COUNT_OF_PARTS,
    Part,
    PrepareReport,
    check_out,
    opened_source,
    prepare,
)
from paris_swarm.expert.data.shard_maker import Progress
from paris_swarm.expert.data.shards import MANIFEST, SHARD_ROWS
from paris_swarm.expert.data.sources import PrepareError
from paris_swarm.expert.data.unfinished import recover

LOCAL = "local"
"""The address that means: a Ray of this machine's cores, ended with the work."""
MAX_PARTS = 128
"""So many parts unless asked otherwise: a part costs a look through the source's metadata before its first row."""

_OF_SOURCE = ("resolution", "count", "seed", "families", "image_column", "text_column", "class_column")
"""Which of `prepare`'s options say what the source is."""

EncoderMaker = Callable[[], tuple[TextEncoder, FeatureEncoder, LatentEncoder | None]]
"""Loads the encoders, in the process that will use them."""


@dataclass(frozen=True)
class RayOptions:
    """Where and how wide. address: LOCAL, "auto" (the cluster this machine belongs to), or HOST:PORT.

    parts: how many, None for as many as there are shards but at most MAX_PARTS; cores, gpus: what each worker takes.
    """

    address: str = LOCAL
    parts: int | None = None
    cores: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if (self.parts is not None and self.parts < 1) or self.cores < 1:
            raise PrepareError(f"parts and cores must be at least 1, got {self.parts} and {self.cores}")


class PartMaker:
    """Makes parts, one after another, with encoders that are loaded once: what runs in a Ray worker.

    options: `prepare`'s others. What goes wrong for a reason that will not pass is an answer, so that the person reads
    our sentence and not Ray's traces; a worker that dies is Ray's to start again.
    """

    def __init__(
        self, source: str, folder: str, of: int, make_encoders: EncoderMaker, options: Mapping[str, Any]
    ) -> None:
        self._source, self._folder, self._of = source, Path(folder), of
        self._make_encoders, self._options = make_encoders, dict(options)
        self._encoders: tuple[TextEncoder, FeatureEncoder, LatentEncoder | None] | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """{"id": [a part's number from 0]} -> {"part": [from 1], "why": ["" or what went wrong]}."""
        index = int(batch["id"][0]) + 1
        why = ""
        try:
            self._make(Part(index, self._of))
        except (ValueError, OSError) as error:  # PrepareError, EncoderError, and the disk's own
            why = f"on {socket.gethostname()}: {error}"
        return {"part": [index], "why": [why]}

    def _make(self, part: Part) -> None:
        if not self._folder.is_dir():
            raise PrepareError(
                f"{self._folder} is not there: source and OUT must lie where every machine of the cluster sees them"
            )
        if (self._folder / part.folder / MANIFEST).is_file():  # by an earlier attempt; `merge` looks into it
            return
        if self._encoders is None:
            self._encoders = self._make_encoders()
        text, features, vae = self._encoders
        encoders = {"text_encoder": text, "feature_encoder": features, "vae": vae}
        prepare(self._source, self._folder, part=part, **encoders, **self._options)


def prepare_on_ray(
    source: str | Path,
    out: str | Path,
    make_encoders: EncoderMaker,
    ray_options: RayOptions,
    *,
    about: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
    **options: Any,
) -> PrepareReport:
    """`prepare` of ``source`` to ``out`` on Ray, with the bytes of one run.

    make_encoders, options: sent to the workers; options are `prepare`'s but its encoders, ``part`` and ``workers``.
    about: what else decides the rows and only `make_encoders` knows, as plain JSON values: an attempt that
    differs in it starts anew. Finished parts lie beside ``out`` under a hidden name until all are done; the same call
    goes on there. A Ray that is already connected in this process is used and left as it is.

    Raises PrepareError: Ray is not installed or not reached, a part cannot be made (where, and why), or what `prepare`
    and `parts.merge` raise it for. PreparedDataError. OSError.
    """
    out = Path(out)
    if options.get("count") is not None and str(source) != DICEBEAR:
        raise PrepareError(NO_COUNT_OF_PARTS)
    recover(out)
    check_out(out)
    place, images = opened_source(source, **{name: options[name] for name in _OF_SOURCE if name in options})
    shard_rows = int(options.get("shard_rows", SHARD_ROWS))
    parts = ray_options.parts or max(1, min(MAX_PARTS, -(-images.total() // shard_rows)))
    plain = {name: value for name, value in options.items() if name != "only"}
    if (only := options.get("only")) is not None:
        plain |= {"only": only.note}
    settings = {
        "place": place,
        "fingerprint": images.fingerprint(),
        "parts": parts,
        "options": plain,
        "about": dict(about or {}),
    }
    name = blake3_hex(json.dumps(settings, sort_keys=True).encode())[:12]
    folder = (out.parent / f".{out.name[:100]}.{name}.parts").absolute()
    maker = (place, str(folder), parts, make_encoders, options | {"workers": ray_options.cores})
    done = 0
    try:
        with _connected(ray_options) as ray:
            folder.mkdir(parents=True, exist_ok=True)
            for part, why in _made(ray, maker, parts, ray_options):
                if why:
                    raise PrepareError(f"part {part}/{parts} was not made {why}")
                done += 1
                if on_progress is not None:
                    on_progress("parts", done, parts)
    finally:
        with suppress(OSError):
            folder.rmdir()  # where no part was begun
    report = merge(folder, out)
    shutil.rmtree(folder, ignore_errors=True)
    left = sorted(out.parent.glob(f".{out.name[:100]}.????????????.parts"))
    return replace(report, unfinished=(*report.unfinished, *left))


def _made(ray: Any, maker: tuple[Any, ...], parts: int, asked: RayOptions) -> Iterator[tuple[int, str]]:
    """(part, why not) of every part as it ends; maker: what `PartMaker` takes. Raises PrepareError: Ray gave up."""
    there = ray.cluster_resources()
    room = int(there.get("CPU", 0) // asked.cores)
    if asked.gpus:
        room = min(room, int(there.get("GPU", 0) // asked.gpus))
    if room < 1:
        wanted = f"{asked.cores} cores" + (f" and {asked.gpus} GPU" if asked.gpus else "")
        raise PrepareError(f"Ray has {there.get('CPU', 0):.0f} cores and {there.get('GPU', 0):.0f} GPUs, less than the "
                           f"{wanted} of one worker: ask for fewer with --workers, or for --device cpu")  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours is drawn
    # One part in flight for each worker: another waiting behind it could be made elsewhere meanwhile.
    workers = ray.data.ActorPoolStrategy(size=min(parts, room), max_tasks_in_flight_per_actor=1)
    # Items, not a range: a range is read by a task that needs a core, and the workers hold them all.
    rows = ray.data.from_items([{"id": index} for index in range(parts)], override_num_blocks=parts).map_batches(
        PartMaker,
        fn_constructor_args=maker,
        batch_size=1,
        compute=workers,
        num_cpus=asked.cores,
        num_gpus=asked.gpus,
    )
    try:
        for row in rows.iter_rows():
            yield int(row["part"]), str(row["why"])
    except ray.exceptions.RayError as error:
        last = str(error).strip().split("\n")[-1][:300]
        raise PrepareError(
            f"Ray gave up ({last}): when its workers are well give the same command again, finished parts are kept"
        ) from error


@contextmanager
def _connected(asked: RayOptions) -> Iterator[Any]:
    """The module `ray`, connected. Raises PrepareError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    if asked.address == LOCAL and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # Ray listens on this machine's address: whoever lacks the token, of which no file is written, gets nothing
        # there. It reads both when it is imported.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise PrepareError("preparing on Ray needs Ray Data: pip install 'paris-swarm[ray]'") from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # its plan of execution says nothing to who prepares
    if ray.is_initialized():
        yield ray
        return
    try:
        if asked.address == LOCAL:
            cores = max(asked.cores, os.cpu_count() or 1)
            ray.init(
                address=LOCAL,
                num_cpus=cores,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        else:
            ray.init(address=asked.address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        first = str(error).strip().split("\n")[0][:200]
        raise PrepareError(
            f"no Ray at {asked.address} ({first}): start one (ray start --head), or give `--ray local`"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
