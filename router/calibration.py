"""How good a router is, and whether its probabilities mean what they say, at each noise level.

Accuracy: how often the likeliest cluster is the true one. Expected calibration error (ECE; Guo et al., "On Calibration
of Modern Neural Networks", arXiv 1706.04599): samples are sorted into bins by the probability of the likeliest cluster,
and the bins' gaps between that probability and the accuracy are averaged by how many samples they hold. A router that
says 0.9 and is right in 9 of 10 cases has an ECE of 0. Experts are weighed by these probabilities, so it matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from paris_swarm.expert.verify import BATCH, check_times
from paris_swarm.router.task import RouterProbe

REPORT_TIMES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Where a router is judged for a report: evenly along the path, pure noise included."""
BINS = 10


@dataclass(frozen=True)
class ReliabilityBin:
    """Samples whose likeliest cluster has a probability in (low, high]: how many, its mean, and how often it is right
    (both 0 for an empty bin).
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class RouterFigures:
    """A router on `count` judgements: cross-entropy in nats; accuracy, mean confidence and ECE in 0..1."""

    count: int
    cross_entropy: float
    accuracy: float
    confidence: float
    ece: float
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class RouterReport:
    """A router on labelled rows, at every time and over all of them.

    captions: whether it was given each row's own caption ("own") or the empty one ("null"). guess: the accuracy of
    always naming the most frequent cluster; entropy: the cross-entropy of always saying the clusters' shares.
    """

    captions: str
    rows: int
    guess: float
    entropy: float
    by_time: tuple[tuple[float, RouterFigures], ...]
    overall: RouterFigures


def figures_of(logits: Tensor, labels: Tensor, bins: int = BINS) -> RouterFigures:
    """Figures of logits [n, K] against labels int64 [n], in bins of equal width.

    Raises:
        ValueError: no rows, not one label a row, or no bins.
    """
    if logits.ndim != 2 or not len(logits) or labels.shape != logits.shape[:1] or bins < 1:
        raise ValueError(f"logits [n, K] and labels [n] are needed, got {list(logits.shape)} and {list(labels.shape)}")
    log_p = logits.double().log_softmax(dim=1)  # [n, K]
    confidence, said = log_p.exp().max(dim=1)  # [n] each
    right = (said == labels).double()  # [n]
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1  # [n], a probability on a border counts below it
    counts = torch.bincount(place, minlength=bins)  # [bins]
    full = counts.clamp(min=1)
    sure = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, confidence) / full  # [bins]
    true = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right) / full  # [bins]
    gap = ((sure - true).abs() * counts).sum() / len(labels)
    return RouterFigures(
        count=len(labels),
        cross_entropy=float(torch.nn.functional.nll_loss(log_p, labels)),
        accuracy=float(right.mean()),
        confidence=float(confidence.mean()),
        ece=float(gap),
        bins=tuple(
            ReliabilityBin(b / bins, (b + 1) / bins, int(counts[b]), float(sure[b]), float(true[b]))
            for b in range(bins)
        ),
    )


@torch.no_grad()
def router_logits(
    model: nn.Module, probe: RouterProbe, *, captions: str = "own", batch: int = BATCH
) -> list[tuple[float, Tensor]]:
    """(t, logits float32 [n, K]) of every probe row at each of the probe's times, in their order.

    captions: "own" gives every row its caption, "null" all of them the empty one.

    Raises:
        ValueError: captions is neither.
    """
    if captions not in ("own", "null"):
        raise ValueError(f'captions must be "own" or "null", got {captions!r}')
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    states, mask = probe.rows.states, probe.rows.mask
    if captions == "null":
        states, mask = (part[:, : states.shape[1]].expand(len(states), *part.shape[1:]) for part in probe.rows.null)
    said: list[Tensor] = []
    with torch.autocast(device.type, enabled=False):
        for rows, x, t, _noise in probe.rows.noised(batch):
            logits = model(x.to(device), t.to(device), states[rows].to(device), mask[rows].to(device))
            said.append(logits.float().cpu())  # [b, K]
    model.train(training)
    whole = torch.cat(said).reshape(len(probe.rows.times), len(probe.labels), -1)  # [T, n, K]
    return list(zip(probe.rows.times, whole.unbind(0), strict=True))


def router_report(
    model: nn.Module, probe: RouterProbe, *, captions: str = "own", times: Sequence[float] = REPORT_TIMES
) -> RouterReport:
    """Accuracy, calibration and cross-entropy of a router on the rows of `probe`, at `times` instead of the probe's.

    The probe's seed decides the noise, so the report is one number for everybody, rounding apart.

    Raises:
        ValueError: no times, or captions other than "own" and "null".
    """
    moved = RouterProbe(replace(probe.rows, times=check_times(times)), probe.labels)
    judged = router_logits(model, moved, captions=captions)
    share = torch.bincount(probe.labels).double() / len(probe.labels)
    every = torch.cat([logits for _, logits in judged])
    return RouterReport(
        captions=captions,
        rows=len(probe.labels),
        guess=float(share.max()),
        entropy=float(-torch.special.xlogy(share, share).sum()),
        by_time=tuple((t, figures_of(logits, probe.labels)) for t, logits in judged),
        overall=figures_of(every, probe.labels.repeat(len(judged))),
    )
