"""Where a checkpoint comes from: the part of a manifest's ``meta`` that lets anyone train the same steps again.

``meta.provenance`` says which steps were trained since the parent, on which rows, with which seed and recipe, and on
what kind of machine. The root commits to the manifest, the announcement's signature to the root and every manifest to
its parent's root, so the newest announcement signs the whole chain behind it (SPEC.md, "Training provenance").

The chain is checked here; whether the steps between two checkpoints give the later one is a question for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from paris_swarm.dht_schemas.errors import BadManifest, BrokenChain, described, quoted
from paris_swarm.dht_schemas.fields import Count, Digest, Model, printable

if TYPE_CHECKING:
    from paris_swarm.dht_schemas.manifest import Manifest

MAX_CHAIN = 100_000
"""Checkpoints in a chain that a walk follows before it gives up."""


class RowsUsed(Model):
    """The rows a checkpoint was trained on."""

    digest: Digest
    """BLAKE3 of the rows' 16-byte digests (for the router each with its cluster, 4 bytes, little-endian), sorted."""
    count: Annotated[Count, Field(ge=1)]


class Environment(Model):
    """What decides the rounding of a training step; two machines that agree on all of it give the same bits."""

    device: Annotated[str, *printable(32)]
    """torch's device type: "cpu", "cuda", "mps"."""
    chip: Annotated[str, *printable(128)]
    """Kind of processor and the instruction set torch uses, or the accelerator's name."""
    precision: Literal["fp32", "bf16"]
    """What matrices are multiplied in; weights are always float32."""
    threads: Annotated[Count, Field(ge=1)]
    flush_denormal: bool
    deterministic: bool
    """Whether torch was told to refuse algorithms that are not deterministic."""
    tf32: bool
    torch: Annotated[str, *printable(64)]
    package: Annotated[str, *printable(64)]
    """Version of paris-swarm, and what tells the code that trains from that of another build."""
    micro_batch: Count = 0
    """Rows a forward pass where the batch was taken in pieces, 0 where it was taken whole."""
    processes: Annotated[Count, Field(ge=1)] = 1
    """Processes that shared each batch, an equal part each."""
    compiled: bool = False
    """Whether torch.compile made the kernels."""


class Provenance(Model):
    """``meta.provenance`` of a manifest, version 1."""

    v: Literal[1] = 1
    from_step: Count
    """The parent's step; 0 where there is no parent."""
    to_step: Annotated[Count, Field(ge=1)]
    seed: Count
    """Of the initial weights, the order of rows, and every step's noise."""
    recipe: Digest
    rows: RowsUsed
    environment: Environment


def read_provenance(slot: str, step: int, parent: str | None, meta: dict[str, Any]) -> Provenance | None:
    """The provenance in a manifest's ``meta``, or None when there is none, or one of a version not known here.

    Raises BadManifest: its form is wrong (R-PROV-1), or it contradicts the manifest (R-PROV-2).
    """
    value = meta.get("provenance")
    if value is None:
        return None
    if isinstance(value, dict) and type(value.get("v")) is int and value["v"] > 1:
        return None
    if isinstance(value, dict) and type(value.get("v", 1)) is not int:  # True would pass as 1
        raise BadManifest(f"meta.provenance of slot {slot}: v must be a whole number", rule="R-PROV-1")
    try:
        found = Provenance.model_validate(value)
    except ValidationError as problem:
        raise BadManifest(
            f"meta.provenance of slot {slot}: "
            + described(problem.errors(include_url=False, include_context=False, include_input=False)),
            rule="R-PROV-1",
        ) from None
    if found.to_step != step:
        raise BadManifest(f"the provenance ends at step {found.to_step}, the manifest says {step}", rule="R-PROV-2")
    if found.from_step >= step:
        raise BadManifest(f"the provenance begins at step {found.from_step} and ends at {step}", rule="R-PROV-2")
    if parent is None and found.from_step != 0:
        raise BadManifest(f"there is no parent, but training begins at step {found.from_step}", rule="R-PROV-2")
    return found


def check_link(child: Manifest, parent: Manifest) -> None:
    """Whether ``child`` can follow from ``parent``: one slot, later steps, and what both say of the training agrees.

    Raises BrokenChain, naming what differs (R-PROV-3).
    """

    def refuse(what: str) -> None:
        raise BrokenChain(f"slot {child.slot}, step {child.step}: {what}", rule="R-PROV-3")

    if child.slot != parent.slot:
        refuse(f"its parent is a checkpoint of slot {parent.slot}")
    if child.step <= parent.step:
        refuse(f"its parent is at step {parent.step}")
    mine, theirs = child.provenance, parent.provenance
    if mine is None:
        return
    if mine.from_step != parent.step:
        refuse(f"it says that it began at step {mine.from_step}, its parent is at {parent.step}")
    if theirs is not None:
        for name in ("recipe", "seed"):
            if getattr(mine, name) != getattr(theirs, name):
                refuse(f"its {name} is {getattr(mine, name)}, its parent's {getattr(theirs, name)}")


@dataclass(frozen=True)
class Chain:
    """A walk from one checkpoint towards the first.

    links: (root, step), newest first, each compared with its neighbour. missing: the root of the next parent when
    nobody gave its manifest; None when the walk reached a checkpoint without a parent.
    """

    links: tuple[tuple[str, int], ...]
    missing: str | None

    @property
    def complete(self) -> bool:
        """Whether it reaches the first checkpoint."""
        return self.missing is None


def walk_chain(root: str, read: Callable[[str], Manifest | None]) -> Chain:
    """Follow parents from ``root``; ``read`` gives the manifest of a root (its bytes already compared with the root),
    or None when it cannot be had.

    Raises BrokenChain: a link does not hold, or there are more than MAX_CHAIN (steps fall with every link, so a chain
    cannot run in a circle).
    """
    links: list[tuple[str, int]] = []
    newer: Manifest | None = None
    wanted: str | None = root
    while wanted is not None:
        manifest = read(wanted)
        if manifest is None:
            return Chain(tuple(links), wanted)
        if newer is not None:
            try:
                check_link(newer, manifest)
            except BrokenChain as error:
                raise BrokenChain(
                    f"between {quoted(links[-1][0][:12])} and its parent {quoted(wanted[:12])}: {error.detail}",
                    rule=error.rule,
                ) from None
        links.append((wanted, manifest.step))
        if len(links) > MAX_CHAIN:
            raise BrokenChain(f"more than {MAX_CHAIN} checkpoints before {quoted(root[:12])}", rule="R-PROV-4")
        newer, wanted = manifest, manifest.parent
    return Chain(tuple(links), None)
