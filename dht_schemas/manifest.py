"""The file manifest: the names, lengths and chunk digests of a checkpoint's files, named by the BLAKE3 root of its
bytes.

A manifest is canonical JSON, so one set of files has one root, and the root binds names, lengths and contents
together.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from paris_swarm.dht_schemas.canonical import MAX_INT, canonical_json
from paris_swarm.dht_schemas.digest import CHUNK, blake3_hex, chunk_count, chunk_digests
from paris_swarm.dht_schemas.errors import BadManifest, DigestMismatch, RecordTooLarge, described, quoted
from paris_swarm.dht_schemas.fields import ROUTER, Digest, Model, Slot, array, is_digest, read_model
from paris_swarm.dht_schemas.provenance import Provenance, read_provenance

MAX_MANIFEST = 1024 * 1024
"""Bytes of a manifest."""
MAX_FILES = 64
"""Files in a manifest."""
MAX_CHUNKS = 16384
"""Chunks in a file: more digests than fit a manifest or a plan."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


def check_file_name(name: str) -> str:
    """Return ``name`` when it is safe as a file name in one flat folder; ValueError otherwise (R-MAN-1)."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"{quoted(name)} is not a file name of the form [a-z0-9][a-z0-9_.-]{{0,63}} without '..'")
    return name


FileName = Annotated[str, AfterValidator(check_file_name)]


class FileEntry(Model):
    """One file: its name, its length in bytes, and the BLAKE3 digest of each chunk of 4 MiB."""

    name: FileName
    length: Annotated[int, Field(ge=0, le=MAX_INT)]
    chunks: Annotated[tuple[Digest, ...], *array(MAX_CHUNKS)]

    @model_validator(mode="after")
    def _exact_chunks(self) -> Self:
        if len(self.chunks) != chunk_count(self.length):
            raise ValueError(f"{self.length} bytes have {chunk_count(self.length)} chunks, not {len(self.chunks)}")
        return self


def check_unique_names(entries: Sequence[FileEntry]) -> None:
    """Raises ValueError when a name appears twice."""
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise ValueError(f"file name {entry.name} appears twice")
        seen.add(entry.name)


class Manifest(Model):
    """A checkpoint's files, sorted by name; ``meta`` says which checkpoint of which slot they are."""

    v: Literal[1] = 1
    kind: Literal["expert", "router"]
    slot: Slot
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1), *array(MAX_FILES)]
    meta: dict[str, Any]
    """``step`` (int), ``parent`` (manifest root or None), ``provenance`` where the author gives it, and any further
    fields.
    """

    @property
    def step(self) -> int:
        """Optimiser steps that the weights have seen."""
        return int(self.meta["step"])

    @property
    def parent(self) -> str | None:
        """Manifest root of the checkpoint this one continued from."""
        parent = self.meta["parent"]
        return None if parent is None else str(parent)

    @property
    def provenance(self) -> Provenance | None:
        """What the checkpoint was trained on, where it says so. Raises BadManifest (R-PROV-1, R-PROV-2)."""
        return read_provenance(self.slot, self.step, self.parent, self.meta)

    @property
    def total_bytes(self) -> int:
        """Sum of the files' lengths."""
        return sum(entry.length for entry in self.files)

    def entry(self, name: str) -> FileEntry:
        """The entry of a file. Raises BadManifest when there is none of that name."""
        for entry in self.files:
            if entry.name == name:
                return entry
        raise BadManifest(f"no file {quoted(name)}", rule="R-MAN-6")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.kind == "router") != (self.slot == ROUTER):
            raise ValueError(f"a manifest of kind {self.kind} cannot be of slot {self.slot}")
        check_unique_names(self.files)
        if list(self.files) != sorted(self.files, key=lambda entry: entry.name):
            raise ValueError("the files are not sorted by name")
        step, parent = self.meta.get("step"), self.meta.get("parent", 0)
        if type(step) is not int or not 0 <= step <= MAX_INT:
            raise ValueError("meta.step must be a whole number")
        if parent is not None and not (isinstance(parent, str) and is_digest(parent)):
            raise ValueError("meta.parent must be a manifest root or null")
        return self


def build_manifest(
    folder: str | os.PathLike[str], names: Sequence[str], slot: str, *, meta: Mapping[str, Any] | None = None
) -> tuple[Manifest, bytes, str]:
    """Read the named files of ``folder`` and return the manifest, its bytes and its root.

    ``meta`` holds at least ``step`` and ``parent`` (0 and None when not given). Raises ValueError for an unsafe or
    repeated name, a symlink or a name that is not a plain file; OSError when a file cannot be read.
    """
    entries = [file_entry(Path(folder) / check_file_name(name)) for name in sorted(names)]
    try:
        manifest = Manifest(
            kind="router" if slot == ROUTER else "expert",
            slot=slot,
            files=tuple(entries),
            meta={"step": 0, "parent": None, **(meta or {})},
        )
    except ValidationError as problem:
        raise ValueError(described(problem.errors(include_url=False))) from None
    try:
        _ = manifest.provenance
    except BadManifest as problem:
        raise ValueError(problem.detail) from None
    data = canonical_json(manifest.model_dump())
    if len(data) > MAX_MANIFEST:
        raise ValueError(f"the manifest would have {len(data)} bytes, at most {MAX_MANIFEST} are allowed")
    return manifest, data, blake3_hex(data)


def file_entry(path: str | os.PathLike[str]) -> FileEntry:
    """The entry of one file. Raises ValueError for a symlink or what is not a plain file, OSError when it cannot be
    read.
    """
    path = Path(path)
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is a link or not a plain file")  # R-MAN-8
    return FileEntry(name=path.name, length=status.st_size, chunks=chunk_digests(path, CHUNK))


def open_manifest(data: bytes, root: str, *, cap_bytes: int) -> Manifest:
    """Read the manifest that ``root`` names, whose files may have ``cap_bytes`` together.

    Raises RecordTooLarge, DigestMismatch, MalformedRecord (not JSON), BadManifest.
    """
    if len(data) > MAX_MANIFEST:
        raise RecordTooLarge(f"a manifest of {len(data)} bytes, at most {MAX_MANIFEST} are allowed", rule="R-MAN-3")
    found = blake3_hex(data)
    if found != root:
        raise DigestMismatch(f"the manifest has root {found}, not {quoted(root, 70)}", rule="R-MAN-2")
    manifest = read_model(Manifest, data, error=BadManifest, rule="R-MAN-1")
    if canonical_json(manifest.model_dump()) != data:
        raise BadManifest("not in canonical form", rule="R-MAN-4")
    _ = manifest.provenance  # R-PROV-1, R-PROV-2
    if manifest.total_bytes > cap_bytes:
        raise BadManifest(
            f"the files have {manifest.total_bytes} bytes, at most {cap_bytes} are allowed", rule="R-MAN-5"
        )
    return manifest
