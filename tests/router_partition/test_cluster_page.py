"""The report that an organiser opens in a browser, though captions in it come from strangers."""

from __future__ import annotations

import html.parser
import json

import numpy as np
import pytest
from sklearn.metrics import davies_bouldin_score

from paris_swarm.router.cluster_page import report_files
from paris_swarm.router.cluster_report import cluster_report, davies_bouldin, example_grid
from paris_swarm.router.partition import Partition, directions

HOSTILE = [
    '<script>alert("x")</script>',
    "</ul></section><img src=https://example.org/x.png onerror=alert(1)>",
    "\u202eright to left \x1b[31m & <b>bold</b> 'quoted' \"too\"",
]


class Page(html.parser.HTMLParser):
    """Tags, and what they would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.handlers: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def made(families: bool = True) -> tuple[np.ndarray, Partition, list[dict[str, str]]]:
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    features = (3 * np.eye(8)[labels] + generator.normal(size=(100, 8))).astype(np.float32)
    captions = [
        {"text": HOSTILE[row % 3], **({"family": "<i>odd</i>" if row % 2 else "b"} if families else {})}
        for row in range(100)
    ]
    return features, Partition(directions(features, labels, 3), labels, 0, 0), captions


def files_of(families: bool = True) -> dict[str, bytes]:
    features, found, captions = made(families)
    report = cluster_report(features, found, captions=captions, examples=4)
    grids = [example_grid(np.full((4, 6, 6, 3), 80 * k, dtype=np.uint8)) for k in range(3)]
    texts = [[captions[row]["text"] for row in rows] for rows in report.examples]
    return report_files(report, title="<b>swarm</b>", grids=grids, captions=texts)


@pytest.mark.parametrize("families", [True, False])
def test_the_page_runs_and_fetches_nothing_that_a_caption_says(families: bool) -> None:
    files = files_of(families)
    page = Page()
    page.feed(files["index.html"].decode("utf-8"))
    assert not {"script", "iframe", "object", "embed", "link", "b", "i", "svg"} & set(page.tags)
    assert page.handlers == []
    assert all(where.startswith(("data:image/png;base64,", "#cluster-")) for where in page.fetched)
    assert page.tags.count("img") == 3
    assert page.tags.count("meta") == 2
    assert HOSTILE[0] in page.text
    assert "\u202e" not in page.text
    assert "\x1b" not in page.text
    assert ("<i>odd</i>" in page.text) == families
    assert "<b>swarm</b>" in page.text


def test_figures_and_grids_lie_beside_the_page() -> None:
    files = files_of()
    assert sorted(files) == ["cluster-0.png", "cluster-1.png", "cluster-2.png", "clusters.json", "index.html"]
    figures = json.loads(files["clusters.json"])
    assert figures["sizes"] == [50, 30, 20]
    assert figures["method"] == "clusters"
    assert files["cluster-1.png"].startswith(b"\x89PNG")
    report = cluster_report(*made()[:2])
    with pytest.raises(ValueError, match="3 clusters"):
        report_files(report, title="x", grids=[], captions=[])


def test_davies_bouldin_is_scikit_learns_and_reads_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, found, _ = made()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    monkeypatch.setattr("paris_swarm.router.partition._PIECE", 7)
    assert davies_bouldin(features, found.labels, 3) == pytest.approx(
        davies_bouldin_score(unit, found.labels), rel=1e-5
    )
    assert davies_bouldin(features, np.zeros(100, dtype=np.int64), 1) is None
    assert davies_bouldin(np.ones((4, 3), dtype=np.float32), np.array([0, 1, 0, 1]), 2) is None


def test_random_shards_are_called_a_control() -> None:
    features, found, _ = made()
    shards = Partition(found.centroids, np.arange(100) % 3, 0, 0, "random")
    report = cluster_report(features, shards)
    assert len(report.warnings) == 1
    assert "a control" in report.warnings[0]
    assert report.davies_bouldin is not None
    assert report.davies_bouldin > 5 * (cluster_report(features, found).davies_bouldin or 0)
