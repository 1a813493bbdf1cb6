"""Rows that experts draw: whose picture, whose label, which caption, and that an interruption costs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from router_world import COLOURS, DIM, PIXELS, ROUTER_RECIPE, TOKENS, K, LabelledData, with_train, write_probe
from torch import Tensor, nn

from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.rows import Rows
from paris_swarm.expert.verify import Probe, load_probe
from paris_swarm.router import drawn_rows
from paris_swarm.router.drawn_rows import Drawing, counts_by_share, draw_rows, drawn_labels
from paris_swarm.router.task import RouterTask, load_router_probe

FACTS = {
    "resolution": PIXELS,
    "channels": 3,
    "licences": ["CC0"],
    "text": {"name": "made", "digest": "0" * 64, "dim": DIM, "tokens": TOKENS},
    "features": {"name": "made", "digest": "1" * 64, "dim": 6, "size": 8},
}
NOTE = Drawing("p" * 64, {str(k): f"{k}" * 64 for k in range(K)}, (30, 20, 14), steps=4, seed=3, null_share=0.25)


class Painter(nn.Module):
    """The exact flow to one colour: every path ends in it. Remembers the captions it was given."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.goal = nn.Parameter(torch.from_numpy(COLOURS[k] / 127.5 - 1).float()[None, :, None, None])
        self.pictures = 0
        self.captions: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        if float(t[0]) == 1.0:
            self.pictures += len(x)
            self.captions.append(states)
        return (x - self.goal) / t[:, None, None, None]


@pytest.fixture(scope="module")
def probe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "probe.safetensors"
    write_probe(path, LabelledData())
    return path


@pytest.fixture(scope="module")
def captions(probe_path: Path) -> dict[str, Probe]:
    return {str(k): load_probe(probe_path, str(k), 5) for k in range(K)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_rows, "CHUNK_ROWS", 16)


def drawn(
    out: Path, captions: dict[str, Probe], painters: dict[str, Painter], note: Drawing = NOTE, stop_after: int = 10**9
) -> None:
    loaders: dict[str, Callable[[], nn.Module]] = {slot: (lambda p=p: p) for slot, p in painters.items()}  # type: ignore[misc]
    for number, _ in enumerate(draw_rows(out, note, experts=loaders, captions=captions, data=FACTS, batch=5), start=1):
        if number == stop_after:
            return


def painters() -> dict[str, Painter]:
    return {str(k): Painter(k) for k in range(K)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, captions: dict[str, Probe]) -> Path:
    out = tmp_path_factory.mktemp("rows") / "drawn"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn_rows, "CHUNK_ROWS", 16)
        drawn(out, captions, painters())
    return out


def test_every_row_is_drawn_by_the_expert_whose_label_it_has(whole: Path) -> None:
    data = PreparedData.open(whole, verify=True)
    labels = drawn_labels(data.manifest)
    assert labels is not None
    assert np.bincount(labels).tolist() == [30, 20, 14]
    np.testing.assert_allclose(data.pixels(np.arange(64)).mean((1, 2)), COLOURS[labels], atol=1.0)
    assert data.manifest["drawn"]["experts"] == dict(NOTE.experts)
    assert len(np.unique(np.asarray(data.digests), axis=0)) == 64
    assert not any(path.name.startswith(".") for path in whole.parent.iterdir())


def test_captions_are_the_clusters_public_ones_or_the_empty_one(whole: Path, captions: dict[str, Probe]) -> None:
    data = PreparedData.open(whole)
    labels = drawn_labels(data.manifest)
    assert labels is not None
    states, lengths = data.states(np.arange(64))
    null, null_mask = (part[0] for part in captions["0"].null)
    empty = 0
    for row in range(64):
        told = torch.from_numpy(np.array(states[row])).float()
        told = torch.nn.functional.pad(told, (0, 0, 0, TOKENS - len(told)))
        public = captions[str(labels[row])]
        if torch.equal(told, null) and lengths[row] == int(null_mask.sum()):
            empty += 1
        else:
            assert any(
                torch.equal(told, one.half().float()) and lengths[row] == int(mask.sum())
                for one, mask in zip(public.states, public.mask, strict=True)
            )
    assert empty == sum(int(count * NOTE.null_share) for count in NOTE.counts)


def test_what_is_drawn_with_a_caption_is_stored_with_it(captions: dict[str, Probe], tmp_path: Path) -> None:
    artists = painters()
    drawn(tmp_path / "drawn", captions, artists)
    data = PreparedData.open(tmp_path / "drawn")
    given_to = torch.cat([part for artist in artists.values() for part in artist.captions])
    stored = torch.from_numpy(np.array(data.states(np.arange(64))[0])).float()
    torch.testing.assert_close(stored, given_to[:, : stored.shape[1]].half().float())


@pytest.mark.parametrize("stop_after", [1, 5, 9])
def test_an_interrupted_drawing_goes_on_to_the_same_bytes(
    whole: Path, captions: dict[str, Probe], tmp_path: Path, stop_after: int
) -> None:
    out = tmp_path / "drawn"
    drawn(out, captions, painters(), stop_after=stop_after)
    assert not out.exists()
    again = painters()
    drawn(out, captions, again)
    assert contents(out) == contents(whole)
    drawn_again = sum(artist.pictures for artist in again.values())
    assert drawn_again == 64 if stop_after == 1 else drawn_again < 64


def test_another_drawing_starts_afresh_and_a_torn_note_too(
    whole: Path, captions: dict[str, Probe], tmp_path: Path
) -> None:
    out = tmp_path / "drawn"
    drawn(out, captions, painters(), replace(NOTE, seed=4), stop_after=9)
    drawn(out, captions, painters())
    assert contents(out) == contents(whole)
    torn = tmp_path / "torn"
    drawn(torn, captions, painters(), stop_after=9)
    (tmp_path / ".torn.drawing" / drawn_rows.PROGRESS).write_text('{"drawing": {')
    drawn(torn, captions, painters())
    assert contents(torn) == contents(whole)


def test_latents_stay_what_the_experts_drew(captions: dict[str, Probe], tmp_path: Path) -> None:
    out = tmp_path / "drawn"
    facts = {**FACTS, "latents": {"name": "made", "digest": "2" * 64, "scale": 1.0, "shift": 0.0, "thumbnail": 4}}
    loaders: dict[str, Callable[[], nn.Module]] = {slot: (lambda p=p: p) for slot, p in painters().items()}  # type: ignore[misc]
    list(draw_rows(out, NOTE, experts=loaders, captions=captions, data=facts))
    data = PreparedData.open(out, verify=True)
    labels = drawn_labels(data.manifest)
    assert labels is not None
    latents = data.pixels(np.arange(64))
    assert latents.dtype == np.float16
    np.testing.assert_allclose(latents.mean((1, 2)), COLOURS[labels] / 127.5 - 1, atol=2e-3)


def test_an_expert_that_draws_nonsense_is_named(captions: dict[str, Probe], tmp_path: Path) -> None:
    artists = painters()
    with torch.no_grad():
        artists["1"].goal.fill_(float("nan"))
    with pytest.raises(ValueError, match="expert 1 draws no finite numbers"):
        drawn(tmp_path / "drawn", captions, artists)
    assert not (tmp_path / "drawn").exists()


def test_nothing_is_drawn_over_what_is_there(captions: dict[str, Probe], whole: Path) -> None:
    with pytest.raises(ValueError, match="is there already"):
        drawn(whole, captions, painters())


def test_a_router_task_on_drawn_rows_says_who_drew_them(whole: Path, probe_path: Path) -> None:
    data = PreparedData.open(whole)
    labels = drawn_labels(data.manifest)
    assert labels is not None
    probe = load_router_probe(probe_path, K, 5)
    recipe = with_train(ROUTER_RECIPE, batch=32)
    rows = Rows(data, np.arange(data.count))
    task = RouterTask(recipe, rows, labels, probe, data.manifest["drawn"]["experts"])
    used = task.rows_used()
    assert used.model_dump()["drawn_by"] == dict(NOTE.experts)
    assert used != RouterTask(recipe, rows, labels, probe).rows_used()
    batch = task.batch(0)
    colours = torch.from_numpy(COLOURS / 127.5 - 1).float()
    said = torch.cdist(batch.x0.mean((2, 3)), colours).argmin(1)
    assert torch.equal(said, batch.labels)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=40), st.integers(16, 10_000))
def test_clusters_get_rows_as_they_are_large_and_none_goes_empty(shares: list[float], total: int) -> None:
    if sum(shares) < 1e-6:
        with pytest.raises(ValueError, match="shares"):
            counts_by_share([0.0] * len(shares), total)
        return
    counts = counts_by_share(shares, total)
    assert min(counts) >= 8
    assert all(count == max(8, round(total * share / sum(shares))) for count, share in zip(counts, shares, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"counts": (4,), "experts": {"0": "a"}},
        {"counts": (4, 0, 3)},
        {"experts": {"0": "a", "1": "b"}},
        {"steps": 0},
        {"null_share": 1.5},
    ],
)
def test_a_drawing_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"need|must"):
        replace(NOTE, **change)


@pytest.mark.parametrize("counts", [None, [3], [64, 0], [True, 63], "64", [40.0, 24]])
def test_a_note_that_does_not_fit_its_rows_is_refused(whole: Path, counts: Any) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    with pytest.raises(ValueError, match="draw them again"):
        drawn_labels({**manifest, "drawn": {"counts": counts}})
    assert drawn_labels({"count": 64}) is None
