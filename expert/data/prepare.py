"""``prepare``: captioned images in, the shard folder of ``expert/data/shards.py`` out.

The same input gives the same bytes, whatever the number of workers and however often the run was killed and started
again: a shard is a function of its range of the source's items alone. Memory does not grow with the number of rows but
by a few bytes each. The folder appears whole or not at all (unfinished.py); parts of it can be made apart (parts.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from paris_swarm.expert.data import shards
from paris_swarm.expert.data.classfolders import ClassFolderSource, class_folders
from paris_swarm.expert.data.dicebear import DEFAULT_FAMILIES, DiceBearSource
from paris_swarm.expert.data.encoders import (
    FeatureEncoder,
    LatentEncoder,
    TextEncoder,
    encoder_record,
    named_feature_encoder,
    named_text_encoder,
)
from paris_swarm.expert.data.imagefolder import METADATA, ImageFolderSource
from paris_swarm.expert.data.published import THUMBNAIL
from paris_swarm.expert.data.shard_maker import Encoders, OnlyRows, Progress, ShardMaker
from paris_swarm.expert.data.sources import PrepareError, Skipped, Source, Stated
from paris_swarm.expert.data.tables import TableSource, is_saved_dataset, parquet_files
from paris_swarm.expert.data.tars import TarSource, tar_files
from paris_swarm.expert.data.unfinished import ShardRecord, UnfinishedFolder, file_entry, recover

DICEBEAR = "dicebear"
DEFAULT_COUNT = 4096
MIN_RESOLUTION, MAX_RESOLUTION = 8, 1024
MAX_NAMED = 1000
"""So many skipped rows are named in a manifest; all are counted."""
NO_COUNT_OF_PARTS = "a part cannot know how many rows the others keep: leave the count out, or prepare it whole"


@dataclass(frozen=True)
class PrepareReport:
    """What ``prepare`` did. ``skipped`` names the first MAX_NAMED of ``skipped_count`` rows that were left out.

    ``seconds`` holds each stage's time in this process; ``resumed`` how many shards an earlier run had finished;
    ``unfinished`` the folders of other runs for the same output that never ended.
    """

    folder: Path
    count: int
    resolution: int
    skipped: tuple[Skipped, ...]
    skipped_count: int
    text_tokens: int
    bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    resumed: int = 0
    unfinished: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Part:
    """Part ``index`` of ``of``, from 1: a run of neighbouring shards of the whole."""

    index: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.of:
            raise PrepareError(f"part {self.index} of {self.of}: parts are numbered from 1")

    @classmethod
    def parse(cls, text: str) -> Part:
        """A part from "3/8". Raises PrepareError."""
        index, slash, of = text.partition("/")
        if not slash or not (index.isdecimal() and of.isdecimal()):
            raise PrepareError(f"--part {text}: say which of how many, for example 3/8")
        return cls(int(index), int(of))

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"part-{self.index:05d}-of-{self.of:05d}"

    def shards(self, of_all: int) -> tuple[int, int]:
        """Its first shard, and the first one behind it."""
        return of_all * (self.index - 1) // self.of, of_all * self.index // self.of


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    resolution: int = 24,
    count: int | None = None,
    seed: int = 0,
    strict: bool = False,
    families: Sequence[str] = DEFAULT_FAMILIES,
    image_column: str | None = None,
    text_column: str | None = None,
    class_column: str | None = None,
    licence: str | None = None,
    origin: str | None = None,
    workers: int = 1,
    text_encoder: TextEncoder | None = None,
    feature_encoder: FeatureEncoder | None = None,
    vae: LatentEncoder | None = None,
    shard_rows: int = shards.SHARD_ROWS,
    only: OnlyRows | None = None,
    part: Part | None = None,
    on_progress: Progress | None = None,
) -> PrepareReport:
    """Write the images of ``source`` to the folder ``out``; a run that was killed goes on where it was.

    ``source``: "dicebear"; a folder in ImageFolder form, or of folders of classes; parquet files or a folder saved by
    `datasets`, whose columns may be named; or webdataset tars. A row's class, from ``class_column`` or where one is
    known, goes into its caption record. ``count`` defaults to 4096 drawn images, or to all there are. ``seed`` and
    ``families`` are for "dicebear"; ``licence`` and ``origin`` are what a person says of other pictures (`Stated`), for
    manifest and plan; ``strict`` refuses a source with a row that would be skipped. ``workers``
    processes draw and as many threads encode (with more than one, call from under ``if __name__ == "__main__"``). A
    previous output of ``prepare`` at ``out`` is replaced, anything else there is refused. With ``vae`` rows hold
    latents of pictures of ``resolution`` pixels. A shard takes ``shard_rows`` items. ``only`` keeps some rows: what is
    not kept costs its decoding and its features, and leaves nothing on disk. With ``part`` only that part is made, in
    the folder `Part.folder` of ``out``; `parts.merge` joins them.

    Raises PrepareError (what is wrong with the source, an argument or ``out``), EncoderError (an encoder is not
    installed or not the pinned one), OSError (no space, no permission).
    """
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
        raise PrepareError(f"resolution must be {MIN_RESOLUTION} to {MAX_RESOLUTION} pixels, got {resolution}")
    if count is not None and count < 1:
        raise PrepareError(f"count must be at least 1, got {count}")
    if shard_rows < 1 or workers < 1:
        raise PrepareError(f"shard_rows and workers must be at least 1, got {shard_rows} and {workers}")
    if vae is not None and resolution % vae.factor:
        raise PrepareError(f"resolution must be a multiple of {vae.factor} with this VAE, got {resolution}")
    stated = Stated(licence, origin)
    if str(source) == DICEBEAR and stated != Stated():
        raise PrepareError("--licence and --origin are for pictures of your own: what is drawn says both itself")
    out = Path(out) / part.folder if part is not None else Path(out)
    recover(out)
    check_out(out)
    place, images = opened_source(
        source,
        resolution=resolution,
        count=count,
        seed=seed,
        families=families,
        workers=workers,
        image_column=image_column,
        text_column=text_column,
        class_column=class_column,
    )
    if place == DICEBEAR:
        count = None  # the source has no more
    if count is not None and part is not None:
        raise PrepareError(NO_COUNT_OF_PARTS)
    encoders = Encoders(text_encoder or named_text_encoder(None), feature_encoder or named_feature_encoder(None), vae)
    run = _Run(images, encoders, resolution, shard_rows, only, part, images.total(), stated)
    settings = run.manifest_facts() | {
        "place": place,
        "fingerprint": images.fingerprint(),
        "count": count,
        "strict": strict,
        "part": None if part is None else [part.index, part.of],
    }
    unfinished = UnfinishedFolder(out, settings)
    seconds: dict[str, float] = {}
    try:
        unfinished.take()
        others = tuple(unfinished.others())
        resumed = len(unfinished.records)
        if not unfinished.whole:
            maker = ShardMaker(unfinished.path, encoders, only, strict=strict, workers=workers)
            run.make(maker, unfinished, count, on_progress or _silent)
            seconds = maker.seconds
        check_out(out)  # again: the run may have taken days
        unfinished.put_in_place()
    except PrepareError:
        if unfinished.records and not sum(record.rows for record in unfinished.records):
            unfinished.discard()
        raise
    finally:
        unfinished.leave()
    manifest = json.loads((out / shards.MANIFEST).read_text("utf-8"))
    return PrepareReport(
        folder=out,
        count=manifest["count"],
        resolution=resolution,
        skipped=tuple(Skipped(item["file"], item["why"]) for item in manifest["skipped"]),
        skipped_count=manifest["skipped_count"],
        text_tokens=manifest["text"]["tokens"],
        bytes=sum(entry["length"] for entry in manifest["files"]),
        seconds=seconds,
        resumed=resumed,
        unfinished=others,
    )


def opened_source(
    source: str | Path,
    *,
    resolution: int,
    count: int | None = None,
    seed: int = 0,
    families: Sequence[str] = DEFAULT_FAMILIES,
    workers: int = 1,
    **columns: str | None,
) -> tuple[str, Source]:
    """(DICEBEAR or the whole path, the source there) of what `prepare` is given; columns: as `own_images` takes them.

    Raises PrepareError.
    """
    if str(source) == DICEBEAR:
        if named := [f"--{name.replace('_', '-')}" for name, column in columns.items() if column is not None]:
            raise PrepareError(f"drawn pictures have no columns to name: leave {' and '.join(named)} out")
        drawn = DiceBearSource(
            count=count or DEFAULT_COUNT, resolution=resolution, seed=seed, families=families, workers=workers
        )
        return DICEBEAR, drawn
    return str(Path(source).resolve()), own_images(Path(source), resolution=resolution, **columns)


def own_images(
    place: Path,
    *,
    resolution: int,
    image_column: str | None = None,
    text_column: str | None = None,
    class_column: str | None = None,
) -> Source:
    """The source that fits what lies at ``place``: metadata beside images, a saved dataset, parquet files, tars, or
    folders of classes.

    Raises PrepareError: nothing there that is known, or names of columns or fields for a source that has none.
    """
    named = image_column is not None or text_column is not None
    table = is_saved_dataset(place) or bool(parquet_files(place))
    if any((place / name).is_file() for name in METADATA) or not (table or tar_files(place)):
        if named:
            raise PrepareError(f"{place} has no columns to name: --image-column and --text-column are for tables")
        if not any((place / name).is_file() for name in METADATA) and class_folders(place):
            if class_column is not None:
                raise PrepareError(
                    f"{place} has no metadata in which {class_column!r} could name a picture's class: there each "
                    "folder's name is the class; leave --class-column out, or write metadata.jsonl"
                )
            return ClassFolderSource(place, resolution=resolution)
        return ImageFolderSource(place, resolution=resolution, class_column=class_column)
    if table:
        return TableSource(
            place,
            resolution=resolution,
            image_column=image_column,
            text_column=text_column,
            class_column=class_column,
        )
    if named:
        raise PrepareError(f"{place} has no columns to name: --image-column and --text-column are for tables")
    return TarSource(place, resolution=resolution, class_column=class_column)


@dataclass(frozen=True)
class _Run:
    """Which shards are made of which items, and what the manifest says of them."""

    source: Source
    encoders: Encoders
    resolution: int
    shard_rows: int
    only: OnlyRows | None
    part: Part | None
    total: int
    stated: Stated

    def make(
        self,
        maker: ShardMaker,
        folder: UnfinishedFolder,
        count: int | None,
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        """Make the shards that are missing, then the manifest."""
        first, behind = 0, -(-self.total // self.shard_rows)
        if self.part is not None:
            first, behind = self.part.shards(behind)
        end = min(behind * self.shard_rows, self.total)
        begun = len(folder.records)
        maker.remember(folder.path, folder.records)
        usable = sum(record.usable for record in folder.records)
        null = folder.path / shards.NULL_STATES
        null_length = maker.write_null(null)
        if not (begun and folder.records[-1].last):
            with maker.reading(self.source, start=(first + begun) * self.shard_rows) as items:
                for number in range(begun, behind - first):
                    start = (first + number) * self.shard_rows
                    size = min(self.shard_rows, end - start)
                    progress = _within(
                        on_progress, start - first * self.shard_rows, end - first * self.shard_rows, count
                    )
                    record = maker.make(number, items, size, None if count is None else count - usable, progress)
                    usable += record.usable
                    folder.commit(record)
                    if record.last:
                        break
        records = folder.records
        rows = sum(record.rows for record in records)
        if not rows and self.part is None:
            self._refuse_nothing(records)
        entries = sorted(
            [file_entry(null), *chain.from_iterable(record.files for record in records)],
            key=lambda entry: entry["name"],
        )
        named = [(record.number, item) for record in records for item in record.skipped][:MAX_NAMED]
        facts = self.manifest_facts()
        facts["text"]["tokens"] = max([null_length, *(record.tokens for record in records)])
        manifest = facts | {
            "count": rows,
            "shards": [record.rows for record in records],
            "null_length": null_length,
            "skipped": [{"file": item.file, "why": item.why} for _, item in named],
            "skipped_count": sum(len(record.skipped) for record in records),
            "files": entries,
        }
        if self.only is not None:
            manifest["kept"] = {**self.only.note, "of": sum(record.looked_at for record in records)}
        if self.part is not None:
            manifest["part"] = {
                "index": self.part.index,
                "of": self.part.of,
                "first_shard": first,
                "total": self.total,
                "skipped_in": [number for number, _ in named],
            }
        folder.finish(manifest)

    def manifest_facts(self) -> dict[str, Any]:
        """What a manifest says whatever was found in the source."""
        text, features, vae = self.encoders.text, self.encoders.features, self.encoders.vae
        facts: dict[str, Any] = {
            "version": shards.VERSION,
            "resolution": self.resolution if vae is None else self.resolution // vae.factor,
            "channels": 3 if vae is None else vae.channels,
            "shard_rows": self.shard_rows,
            "text": encoder_record(text, dim=text.dim),
            "features": encoder_record(features, dim=features.dim, size=features.size),
            **self.stated.added(self.source.describe()),
        }
        if vae is not None:
            units = {"scale": vae.scale, "shift": vae.shift}
            facts["latents"] = encoder_record(vae, **units, pixels=self.resolution, thumbnail=THUMBNAIL)
        return facts

    def _refuse_nothing(self, records: Iterable[ShardRecord]) -> None:
        records = list(records)
        looked_at = sum(record.looked_at for record in records)
        if self.only is not None and looked_at:
            raise PrepareError(f"none of the {looked_at} usable images is one of those to keep")
        skipped = [item for record in records for item in record.skipped]
        reasons = "; ".join(f"{item.file} {item.why}" for item in skipped[:3])
        raise PrepareError(f"no usable image: {len(skipped)} skipped ({reasons or 'the source is empty'})")


def _within(on_progress: Progress, before: int, total: int, count: int | None) -> Callable[[int], None]:
    """Progress within a shard as progress of the run, in items."""
    whole = max(1, total if count is None else min(count, total))
    return lambda done: on_progress("images", before + done, max(whole, before + done))


def check_out(out: Path) -> None:
    """Raise PrepareError unless ``out`` is free: absent, empty, or a previous output with nothing else in it."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise PrepareError(f"{out} is not a folder: choose another OUT")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    try:
        manifest: Mapping[str, Any] = json.loads((out / shards.MANIFEST).read_text(encoding="utf-8"))
        own = {entry["name"] for entry in manifest["files"]} | {shards.MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        raise PrepareError(
            f"{out} is not empty and was not written by prepare: choose another OUT or move its files away"
        ) from None
    if stray := sorted(names - own):
        raise PrepareError(
            f"{out} also holds {stray[0]}, which prepare did not write: move it away or choose another OUT"
        )


def _silent(stage: str, done: int, total: int) -> None:
    """The progress callback when nobody listens."""
