"""The cluster report as files for a person: one HTML page that needs nothing else, PNG grids, the figures as JSON.

Captions come from strangers. They are shown as text only, without characters that a reader does not see; the page has
no script, and forbids any by its policy.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from paris_swarm.dht_schemas.fields import is_printable
from paris_swarm.router.cluster_report import ClusterReport

PAGE = "index.html"
FIGURES = "clusters.json"
CAPTIONS_SHOWN = 12
CAPTION_LENGTH = 200

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; }
td, th { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #d9dee4; }
td.name, th.name { text-align: left; }
.bar { display: inline-block; height: .7em; background: #4878a8; }
.warning { background: #fff4ce; border-left: 4px solid #c79500; padding: .5rem .75rem; margin: .5rem 0; }
section { margin-top: 2.5rem; }
section img { image-rendering: pixelated; max-width: 100%; border: 1px solid #d9dee4; }
ul { color: #4a525c; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def grid_name(cluster: int) -> str:
    """The file of one cluster's example pictures."""
    return f"cluster-{cluster}.png"


def report_files(
    report: ClusterReport, *, title: str, grids: Sequence[bytes], captions: Sequence[Sequence[str]]
) -> dict[str, bytes]:
    """File name -> content. grids: a PNG for each cluster; captions: texts of each cluster's example rows.

    Raises:
        ValueError: not one grid and one list of captions a cluster.
    """
    if not len(grids) == len(captions) == len(report.sizes):
        raise ValueError(f"{len(report.sizes)} clusters need as many grids and lists of captions")
    page = _page(report, title, grids, captions)
    figures = json.dumps(asdict(report), indent=1, sort_keys=True, allow_nan=False) + "\n"
    pictures = {grid_name(cluster): png for cluster, png in enumerate(grids)}
    return {PAGE: page.encode("utf-8"), FIGURES: figures.encode("utf-8"), **pictures}


def _page(report: ClusterReport, title: str, grids: Sequence[bytes], captions: Sequence[Sequence[str]]) -> str:
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY)}">',
        f"<title>{_text(title)}: clusters</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(title)}: {len(report.sizes)} clusters</h1>",
        f"<p>{sum(report.sizes)} rows, partition: {_text(report.method)}. Silhouette {_score(report.silhouette)} "
        "(&minus;1 to 1, higher is more separate, cosine, on a sample), Davies-Bouldin "
        f"{_score(report.davies_bouldin)} (lower is more separate).</p>",
        *(f'<p class="warning">{_text(words)}</p>' for words in report.warnings),
        '<table><tr><th>cluster</th><th>rows</th><th>share</th><th class="name"></th><th>silhouette</th>'
        '<th class="name">mostly</th></tr>',
        *(_row(report, cluster) for cluster in range(len(report.sizes))),
        "</table>",
    ]
    if report.purity is not None and report.nmi is not None:
        parts.append(
            f"<p>{report.purity:.1%} of the rows are of their cluster's main family; normalised mutual information of "
            f"clusters and families {report.nmi:.2f}.</p>"
        )
    for cluster, (png, texts) in enumerate(zip(grids, captions, strict=True)):
        picture = base64.b64encode(png).decode("ascii")
        shown = "".join(f"<li>{_text(text[:CAPTION_LENGTH])}</li>" for text in texts[:CAPTIONS_SHOWN])
        parts.append(
            f'<section id="cluster-{cluster}"><h2>Cluster {cluster}</h2><p>{len(report.examples[cluster])} of '
            f'{report.sizes[cluster]} rows, drawn at random</p><img alt="example pictures of cluster {cluster}" '
            f'src="data:image/png;base64,{picture}"><ul>{shown}</ul></section>'
        )
    return "\n".join([*parts, "</body></html>\n"])


def _row(report: ClusterReport, cluster: int) -> str:
    families: Mapping[str, Any] = (report.families or [{}] * len(report.sizes))[cluster]
    rows, share = report.sizes[cluster], report.shares[cluster]
    mostly = ", ".join(f"{name} {count / rows:.0%}" for name, count in list(families.items())[:3])
    width = 12 * share / max(report.shares)
    return (
        f'<tr><td><a href="#cluster-{cluster}">{cluster}</a></td><td>{rows}</td><td>{share:.1%}</td>'
        f'<td class="name"><span class="bar" style="width:{width:.2f}rem"></span></td>'
        f'<td>{_score(report.silhouettes[cluster])}</td><td class="name">{_text(mostly)}</td></tr>'
    )


def _text(words: str) -> str:
    shown = "".join(letter if is_printable(letter) else "\N{REPLACEMENT CHARACTER}" for letter in words)
    return html.escape(shown)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
