"""The rows of one cluster as batches that are a pure function of (seed, step).

No loader state exists, so a run that was killed continues with the very rows it would have seen: the data position IS
the step. Rows are taken in the order of their digests, so a batch depends on the set of rows alone, not on how shards
happen to be sorted: whoever has the same rows can train the same steps again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor

from paris_swarm.dht_schemas.provenance import RowsUsed
from paris_swarm.expert.flow import to_pixels

PRELOAD_BYTES = 1 << 29
"""Row sets up to this size are held in memory; larger ones are read from the memory-mapped shards batch by batch."""


class RowSource(Protocol):
    """What is needed of prepared data (`expert.data.shards.PreparedData` has it)."""

    @property
    def count(self) -> int: ...
    @property
    def null_states(self) -> NDArray[np.float16]: ...
    @property
    def manifest(self) -> Any: ...
    def pixels(self, rows: NDArray[np.int64]) -> NDArray[np.uint8] | NDArray[np.float16]: ...
    def states(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float16], NDArray[np.int16]]: ...
    @property
    def digests(self) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class Batch:
    """x0 float32 [B, C, H, W], pixels in -1..1 or latents at unit scale; states float32 [B, L, D]; mask bool [B, L];
    rows int64 [B] (in the data)."""

    x0: Tensor
    states: Tensor
    mask: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        if self.x0.device == device:
            return self
        return Batch(self.x0.to(device), self.states.to(device), self.mask.to(device), self.rows.to(device))


def select_rows(
    data: RowSource, labels: NDArray[np.integer[Any]] | None, cluster: int | None, held_out: Iterable[bytes] = ()
) -> NDArray[np.int64]:
    """Row numbers of one cluster (all rows when `cluster` is None) without the held-out ones, sorted by row digest.

    labels [N], the cluster of each row; held_out: 16-byte row digests that must never be trained on (the plan's probe
    rows; a digest covers pixels and caption, so copies of a probe row are left out as well).

    Raises:
        ValueError: no row is left, or a digest does not have 16 bytes.
    """
    if cluster is None:
        chosen = np.arange(data.count, dtype=np.int64)
    elif labels is None or len(labels) != data.count:
        raise ValueError(f"one label a row is needed: {data.count} rows, {0 if labels is None else len(labels)} labels")
    else:
        chosen = np.flatnonzero(np.asarray(labels) == cluster).astype(np.int64)
    digests = np.asarray(data.digests)
    refused = set(held_out)
    if any(len(digest) != 16 for digest in refused):
        raise ValueError("a held-out row digest must have 16 bytes")
    if refused:
        kept = [row for row in chosen.tolist() if digests[row].tobytes() not in refused]
        chosen = np.asarray(kept, dtype=np.int64)
    if not len(chosen):
        which = "the data" if cluster is None else f"cluster {cluster}"
        raise ValueError(f"no training rows are left in {which} once the held-out rows are taken out")
    high, low = np.ascontiguousarray(digests[chosen]).view(">u8").T
    return chosen[np.lexsort((low, high))]


def mask_of(lengths: Tensor, tokens: int) -> Tensor:
    """int [B] lengths -> bool [B, tokens], True for a real token."""
    return torch.arange(tokens, device=lengths.device)[None] < lengths[:, None].to(torch.int64)


class Rows:
    """Training rows of one task: what a batch of given positions looks like.

    Positions count within `rows`, 0 .. len(rows) - 1. Token states are cut to the longest caption among the rows, so
    padding that no row uses costs nothing; the null caption's tokens are always kept.
    """

    def __init__(self, data: RowSource, rows: NDArray[np.int64]) -> None:
        if not len(rows):
            raise ValueError("a task needs at least one row")
        self._data = data
        self.rows = np.asarray(rows, dtype=np.int64)
        null_length = int(data.manifest["null_length"])
        self._null_states = torch.from_numpy(np.array(data.null_states)).float()
        self._null_length = null_length
        first_pixels = data.pixels(self.rows[:1])
        first_states, _ = data.states(self.rows[:1])
        self._held: tuple[Tensor, Tensor, Tensor] | None = None
        if len(self.rows) * (first_pixels.nbytes + first_states.nbytes) <= PRELOAD_BYTES:
            states, lengths = data.states(self.rows)
            longest = max(int(np.asarray(lengths).max()), null_length)
            self._held = (
                torch.from_numpy(np.array(data.pixels(self.rows))),
                torch.from_numpy(np.array(states[:, :longest])),
                torch.from_numpy(np.array(lengths)),
            )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def null(self) -> tuple[Tensor, Tensor]:
        """The null caption: states float32 [1, L, D] and mask bool [1, L], uncut."""
        length = torch.tensor([self._null_length])
        return self._null_states[None], mask_of(length, self._null_states.shape[0])

    def used(self, labels: NDArray[np.integer[Any]] | None = None) -> RowsUsed:
        """Which rows these are, whatever their order: BLAKE3 over their sorted digests (SPEC.md, section 9).

        labels [len(self)]: each row's cluster, where it is part of what is learned.
        """
        digests = np.ascontiguousarray(np.asarray(self._data.digests)[self.rows])
        if labels is not None:
            marks = np.asarray(labels, dtype="<u4").reshape(-1, 1).view(np.uint8)
            digests = np.concatenate([digests, marks], axis=1)
        whole = b"".join(sorted(row.tobytes() for row in digests))
        return RowsUsed(digest=blake3(whole).hexdigest(), count=len(self.rows))

    def batch(self, positions: NDArray[np.int64]) -> Batch:
        """The batch of these positions [B], on the CPU, states cut to its own longest caption."""
        if self._held is not None:
            at = torch.from_numpy(np.asarray(positions, dtype=np.int64))
            pixels, states, lengths = (part[at] for part in self._held)
        else:
            rows = self.rows[positions]
            raw_states, raw_lengths = self._data.states(rows)
            pixels = torch.from_numpy(np.array(self._data.pixels(rows)))
            states, lengths = torch.from_numpy(np.array(raw_states)), torch.from_numpy(np.array(raw_lengths))
        longest = max(int(lengths.max()), self._null_length)
        return Batch(
            x0=to_pixels(pixels),
            states=states[:, :longest].float(),
            mask=mask_of(lengths, longest),
            rows=torch.from_numpy(self.rows[positions]),
        )


def drop_captions(
    states: Tensor, mask: Tensor, null: tuple[Tensor, Tensor], probability: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Each caption replaced by the null caption with `probability` (classifier-free guidance, arXiv 2207.12598).

    states [B, L, D], mask [B, L], null as `Rows.null` gives it (its length at most L) -> the same shapes.
    """
    tokens = states.shape[1]
    gone = torch.rand(states.shape[0], generator=generator, device=states.device) < probability
    null_states, null_mask = (part[:, :tokens].to(states.device) for part in null)
    return torch.where(gone[:, None, None], null_states.to(states.dtype), states), torch.where(
        gone[:, None], null_mask, mask
    )


class BatchOrder:
    """Which positions make up the batch of a step: shuffled epochs, a pure function of (seed, step)."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        if count < 1 or batch < 1:
            raise ValueError(f"an order needs rows and a batch size, got {count} rows and batches of {batch}")
        self.count = count
        self.batch = batch
        self.seed = seed
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    def positions(self, step: int) -> NDArray[np.int64]:
        """int64 [batch], the positions of `step` (from 0). Batches run across the ends of epochs."""
        numbers = np.arange(step * self.batch, (step + 1) * self.batch, dtype=np.int64)
        epochs, within = numbers // self.count, numbers % self.count
        out = np.empty(self.batch, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            out[chosen] = self._epoch(epoch)[within[chosen]]
        return out

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if self._cached is None or self._cached[0] != epoch:
            source = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._cached = (epoch, source.permutation(self.count).astype(np.int64))
        return self._cached[1]
