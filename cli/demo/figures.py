"""How recognisable the drawn pictures are, each figure beside the same one for real held-out pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PROMPTS_A_CLUSTER = 16


@dataclass(frozen=True)
class HeldOut:
    """Captions of held-out rows and what is true of them: rows [P] in the data, clusters int64 [P]."""

    captions: list[str]
    records: list[dict[str, Any]]
    rows: NDArray[np.int64]
    clusters: NDArray[np.int64]


@dataclass(frozen=True)
class Figures:
    """Shares between 0 and 1. ``left_out``: families whose real background figure is below 0.9, with that figure;
    ``preview``: some of the pictures side by side, uint8 [h, w, 3]."""

    cluster_accuracy: float
    cluster_accuracy_real: float
    background_accuracy: float | None
    background_accuracy_real: float | None
    left_out: dict[str, float]
    background_by_family: dict[str, tuple[float, float]]
    prompts: int
    example: str
    preview: NDArray[np.uint8]

    def as_dict(self) -> dict[str, Any]:
        return {
            "cluster_accuracy": self.cluster_accuracy,
            "cluster_accuracy_real": self.cluster_accuracy_real,
            "background_accuracy": self.background_accuracy,
            "background_accuracy_real": self.background_accuracy_real,
            "background_by_family": {name: list(pair) for name, pair in self.background_by_family.items()},
            "background_families_left_out": self.left_out,
            "prompts": self.prompts,
        }

    def lines(self) -> list[str]:
        """The figures for people."""
        lines = [
            f"Of {self.prompts} pictures from held-out prompts, {self.cluster_accuracy:.2f} fall into the prompt's "
            f"own cluster (real held-out pictures: {self.cluster_accuracy_real:.2f})."
        ]
        if self.background_accuracy is not None:
            lines.append(
                f"Where the prompt names a background colour, {self.background_accuracy:.2f} show it "
                f"(real: {self.background_accuracy_real:.2f})."
            )
        lines += [
            f"Left out of the background figure: {family} (real figure {real:.2f})"
            for family, real in self.left_out.items()
        ]
        return lines


def held_out_prompts(data_folder: Path, plan: Path, seed: int) -> HeldOut:
    """PROMPTS_A_CLUSTER captions a cluster from the sealed half of the probe set, cluster by cluster."""
    import numpy as np

    from paris_swarm.cli.plan_folder import open_plan_folder
    from paris_swarm.cli.planning import choose_probe_rows
    from paris_swarm.cli.row_labels import row_labels
    from paris_swarm.expert.data.shards import PreparedData

    data = PreparedData.open(data_folder)
    plan_folder = open_plan_folder(plan)
    clusters = plan_folder.opened.plan.clusters
    labels = row_labels(plan_folder, data)
    _, sealed = choose_probe_rows(data, labels, clusters, seed)
    rows = np.concatenate([chosen[:PROMPTS_A_CLUSTER] for chosen in sealed.values()])
    records = data.captions(rows)
    return HeldOut([record["text"] for record in records], records, rows, labels[rows])


def measure(png: Path, prompts: HeldOut, data_folder: Path, plan: Path) -> Figures:
    """Figures of the pictures in a grid drawn by `sample`, and of the real pictures of the same captions."""
    from paris_swarm.cli.plan_folder import open_plan_folder
    from paris_swarm.cli.verbs.sample import grid_columns
    from paris_swarm.expert.data.encoders import EfficientNetLite0
    from paris_swarm.expert.data.shards import PreparedData
    from paris_swarm.router.figures import background_accuracy, cluster_accuracy
    from paris_swarm.router.png import tile, untile

    data = PreparedData.open(data_folder)
    plan_folder = open_plan_folder(plan)
    centroids, biases = plan_folder.centroids(), plan_folder.biases()
    encoder = EfficientNetLite0()
    count = len(prompts.captions)
    drawn = untile(png, count=count, side=data.resolution, columns=grid_columns(count))
    real = data.pixels(prompts.rows)
    background = background_accuracy(drawn, real, prompts.records)
    return Figures(
        cluster_accuracy=cluster_accuracy(drawn, prompts.clusters, centroids, encoder, biases),
        cluster_accuracy_real=cluster_accuracy(real, prompts.clusters, centroids, encoder, biases),
        background_accuracy=background.drawn,
        background_accuracy_real=background.real,
        left_out=dict(background.left_out),
        background_by_family=dict(background.by_family),
        prompts=len(prompts.captions),
        example=prompts.captions[0],
        preview=tile(drawn[:: max(1, count // 8)][:8], columns=4),
    )
