"""Rows for a router where nobody may share data: pictures that the verified experts draw, labelled by who drew them.

An expert's flow carries noise to its own cluster's data, so what it draws stands for that cluster, and p(k | x_t, t,
caption) can be learned from drawn rows as from real ones (as good as the experts are: docs/results/router-2026-11.md).
Pictures are drawn without guidance: guided ones are sharper and less varied than the cluster.

Captions are of two kinds, for the cluster's own captions are private too. `null_share` of the rows is drawn, and
labelled, with the empty caption; the others with the captions of the plan's open probe rows of that cluster, which the
plan makes public. So on the open half a router made this way knows the captions (not the pictures) that it is judged
by: the sealed half and own rows are the stricter judges.

The result is a folder in the form that `prepare` writes, with a note "drawn" in its manifest; a router task reads it
as it reads any other, so training, checkpoints, announcing and audit are the same. Its features are zeros: labels come
from the order of the rows, cluster by cluster.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paris_swarm.dht_schemas.digest import digest_file
from paris_swarm.dht_schemas.files import atomic_write_json
from paris_swarm.expert.data import shards
from paris_swarm.expert.flow import from_pixels
from paris_swarm.expert.verify import Probe
from paris_swarm.router.plan_facts import encoder_facts, size_fact
from paris_swarm.router.samplers import euler, picture_noise

DRAWN = "drawn"
"""The manifest's field that tells drawn rows from prepared ones."""
PROGRESS = "drawing.json"
KINDS = ("states", "lengths", "features", "digests", "captions")
CHUNK_ROWS = 256


@dataclass(frozen=True)
class Drawing:
    """What is drawn: `counts` pictures of each cluster, by Euler's method with `steps` steps, noise from `seed`.

    experts: for each cluster the root of the checkpoint that draws; null_share: the share drawn with the empty caption.
    """

    plan: str
    experts: Mapping[str, str]
    counts: tuple[int, ...]
    steps: int = 30
    seed: int = 0
    null_share: float = 0.25

    def __post_init__(self) -> None:
        if len(self.counts) < 2 or min(self.counts) < 1 or set(self.experts) != set(map(str, range(len(self.counts)))):
            raise ValueError("rows for a router need an expert and at least one row of every cluster, two clusters up")
        if self.steps < 1 or self.seed < 0 or not 0 <= self.null_share <= 1:
            raise ValueError("steps must be at least 1, the seed not negative, null_share between 0 and 1")

    def note(self) -> dict[str, Any]:
        """The same as plain JSON values, for the manifest."""
        return {**asdict(self), "experts": dict(self.experts), "counts": list(self.counts)}


@dataclass(frozen=True)
class DrawnProgress:
    """`done` of `total` rows are on disk."""

    done: int
    total: int


def counts_by_share(shares: Sequence[float], total: int) -> tuple[int, ...]:
    """`total` rows shared out as the clusters' sizes are (the posterior carries them), at least 8 of each.

    Raises:
        ValueError: shares that are none.
    """
    whole = sum(shares)
    if len(shares) < 2 or min(shares) < 0 or whole <= 0:
        raise ValueError(f"clusters' shares are numbers of which one is above 0, got {list(shares)[:8]}")
    return tuple(max(8, round(total * share / whole)) for share in shares)


def planned_shares(data: Mapping[str, Any], clusters: int) -> list[float]:
    """The clusters' shares of a plan's `data`, as its partition reports them; equal ones where it reports none."""
    partition = data.get("partition")
    sizes = partition.get("sizes") if isinstance(partition, Mapping) else None
    if not isinstance(sizes, list | tuple) or len(sizes) != clusters:
        return [1.0] * clusters
    sound = all(type(size) is int and size >= 0 for size in sizes) and sum(sizes) > 0
    return [float(size) for size in sizes] if sound else [1.0] * clusters


def drawn_labels(manifest: Mapping[str, Any]) -> NDArray[np.int64] | None:
    """int64 [N], the cluster of every row of a drawn folder; None for a folder of prepared rows.

    Raises:
        ValueError: the note does not fit the rows.
    """
    note = manifest.get(DRAWN)
    if note is None:
        return None
    counts = note.get("counts") if isinstance(note, Mapping) else None
    sound = isinstance(counts, list) and all(type(count) is int and count > 0 for count in counts)
    if not sound or sum(counts) != manifest["count"]:  # type: ignore[arg-type]
        raise ValueError("the manifest's note on drawn rows does not fit its rows: draw them again")
    return np.repeat(np.arange(len(counts)), counts)  # type: ignore[arg-type]


def draw_rows(
    out: Path,
    drawing: Drawing,
    *,
    experts: Mapping[str, Callable[[], nn.Module]],
    captions: Mapping[str, Probe],
    data: Mapping[str, Any],
    batch: int = 64,
    device: str | torch.device = "cpu",
) -> Iterator[DrawnProgress]:
    """Draws the rows of `drawing` into the new folder `out`; reports after every batch.

    What was drawn before an interruption stays in a folder beside `out` and is not drawn again. experts: loaders of
    float networks (x, t, states, mask) -> velocity; captions: rows of the plan's probe set by cluster, for their
    captions and their shape; data: the plan's facts about its data (encoders, licences, resolution, channels).

    Raises:
        ValueError: `out` is there already, an expert draws no finite numbers, or the plan does not say of its data what
            a prepared folder must. OSError: no space or no permission.
    """
    _check_facts(data)
    vae = data.get("latents")  # what the plan says of the VAE between pictures and rows, where there is one
    out = Path(os.path.abspath(out))
    if os.path.lexists(out):
        raise ValueError(f"{out} is there already: choose a new folder")
    draft = out.with_name(f".{out.name}.drawing")
    finished = _begin(draft, drawing)
    total = sum(drawing.counts)
    labels = np.repeat(np.arange(len(drawing.counts)), drawing.counts)
    tokens, width = next(iter(captions.values())).states.shape[1:]
    held: tuple[str, nn.Module] | None = None
    for chunk, start in enumerate(range(0, total, CHUNK_ROWS)):
        rows = range(start, min(start + CHUNK_ROWS, total))
        if chunk < finished:
            yield DrawnProgress(rows.stop, total)
            continue
        pictures: list[NDArray[Any]] = []
        texts: list[str] = []
        states = np.zeros((len(rows), tokens, width), dtype=np.float16)
        lengths = np.zeros(len(rows), dtype=np.int16)
        for k in np.unique(labels[rows.start : rows.stop]).tolist():
            own = [row for row in rows if labels[row] == k]
            name = str(k)
            if held is None or held[0] != name:
                held = (name, experts[name]().eval().to(device))
            first = int(np.searchsorted(labels, k))
            for low in range(0, len(own), batch):
                part = own[low : low + batch]
                told = [_caption(captions[name], row - first, drawing) for row in part]
                places = [row - start for row in part]
                states[places] = torch.stack([each[0] for each in told]).numpy().astype(np.float16)
                lengths[places] = [int(each[1].sum()) for each in told]
                texts += [each[2] for each in told]
                x = _drawn(held[1], captions[name], told, part, drawing, device)  # [b, C, H, W]
                if not bool(torch.isfinite(x).all()):
                    raise ValueError(f"expert {name} draws no finite numbers: assemble again without its checkpoint")
                pictures.append((from_pixels(x) if vae is None else x.permute(0, 2, 3, 1).half()).numpy())
                yield DrawnProgress(part[-1] + 1, total)
        pixels = np.concatenate(pictures)
        arrays = {"pixels": pixels}
        if vae is not None:  # nobody looks at them: thumbnails stay black
            small = np.zeros((len(rows), int(vae["thumbnail"]), int(vae["thumbnail"]), 3))
            arrays = {"latents": pixels, "thumbnails": small}
        for kind, array in arrays.items():
            shards.write_rows(draft, kind, chunk, array)
        shards.write_rows(draft, "states", chunk, states)
        shards.write_rows(draft, "lengths", chunk, lengths)
        shards.write_rows(draft, "features", chunk, np.zeros((len(rows), int(data["features"]["dim"]))))
        digests = [shards.row_digest(picture, text) for picture, text in zip(pixels, texts, strict=True)]
        shards.write_rows(draft, "digests", chunk, np.stack(digests))
        records = [{"text": text, "file": f"{row}"} for row, text in zip(rows, texts, strict=True)]
        shards.write_captions(draft, chunk, records)
        for kind in (*arrays, *KINDS):
            _sync(draft / shards.shard_name(kind, chunk))
        atomic_write_json(draft / PROGRESS, {"drawing": drawing.note(), "chunks": chunk + 1})
    _finish(draft, out, drawing, captions["0"], data)


def _check_facts(data: Mapping[str, Any]) -> None:
    """Raise ValueError unless a plan says of its data what a drawn folder's manifest must: before anything is drawn."""
    for name, what in (("text", "its text encoder"), ("features", "its image encoder")):
        encoder_facts(data, name, what)
        size_fact(data, f"{name}.dim", f"how wide what {what} gives is")
    for name in ("resolution", "channels"):
        size_fact(data, name, "the shape of its rows")
    if data.get("latents") is not None:
        size_fact(data, "latents.thumbnail", "the size of its thumbnails")


def _caption(probe: Probe, number: int, drawing: Drawing) -> tuple[Tensor, Tensor, str]:
    """Caption of a cluster's row `number`: states float32 [L, D], mask bool [L], and what it is called."""
    # Evenly spread, so that every prefix of a cluster's rows has its share of empty captions.
    if int((number + 1) * drawing.null_share) > int(number * drawing.null_share):
        return probe.null[0][0], probe.null[1][0], f"row {number}, the empty caption"
    index = (number - int(number * drawing.null_share)) % len(probe)
    return probe.states[index], probe.mask[index], f"row {number}, caption of open probe row {index}"


@torch.no_grad()
def _drawn(
    expert: nn.Module,
    probe: Probe,
    told: list[tuple[Tensor, Tensor, str]],
    rows: list[int],
    drawing: Drawing,
    device: str | torch.device,
) -> Tensor:
    states = torch.stack([each[0] for each in told]).to(device)  # [b, L, D]
    mask = torch.stack([each[1] for each in told]).to(device)  # [b, L]
    noise = picture_noise(drawing.seed, rows, probe.x0.shape[1:]).to(device)  # [b, C, H, W]
    return euler(lambda x, t: expert(x, t, states, mask), noise, drawing.steps).cpu()  # [b, C, H, W]


def _begin(draft: Path, drawing: Drawing) -> int:
    """How many chunks an earlier attempt at the very same drawing left in the draft folder; else it is made empty."""
    if draft.is_dir():
        try:
            left = json.loads((draft / PROGRESS).read_text("utf-8"))
            if left["drawing"] == drawing.note():
                return int(left["chunks"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no note, or half of one: nothing here can be trusted to be of this drawing
        shutil.rmtree(draft)
    draft.mkdir(parents=True)
    atomic_write_json(draft / PROGRESS, {"drawing": drawing.note(), "chunks": 0})
    return 0


def _sync(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def _finish(draft: Path, out: Path, drawing: Drawing, probe: Probe, data: Mapping[str, Any]) -> None:
    shards.write_array(draft / shards.NULL_STATES, probe.null[0][0].numpy().astype(np.float16))
    _sync(draft / shards.NULL_STATES)
    paths = sorted(path for path in draft.iterdir() if path.name not in (PROGRESS, shards.MANIFEST))
    entries = [{"name": path.name, "length": path.stat().st_size, "digest": digest_file(path)} for path in paths]
    manifest = {
        "version": shards.VERSION,
        "count": sum(drawing.counts),
        "resolution": int(data["resolution"]),
        "channels": int(data["channels"]),
        "shards": [min(CHUNK_ROWS, sum(drawing.counts) - start) for start in range(0, sum(drawing.counts), CHUNK_ROWS)],
        "text": {**data["text"], "tokens": int(probe.states.shape[1])},
        "features": dict(data["features"]),
        "null_length": int(probe.null[1].sum()),
        "skipped": [],
        "files": entries,
        "source": {"kind": DRAWN},
        "licences": data.get("licences", []),
        **({"latents": dict(data["latents"])} if data.get("latents") is not None else {}),
        DRAWN: drawing.note(),
    }
    atomic_write_json(draft / shards.MANIFEST, manifest)
    (draft / PROGRESS).unlink()
    draft.rename(out)
