"""Accuracy and calibration of a router: what the figures say of routers whose faults are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_world import K, LabelledData, write_probe
from torch import Tensor, nn

from paris_swarm.router.calibration import REPORT_TIMES, figures_of, router_logits, router_report
from paris_swarm.router.calibration_picture import calibration_picture
from paris_swarm.router.task import RouterProbe, load_router_probe


def stated(sure: float, rows: int, clusters: int = 4) -> Tensor:
    """Logits that give cluster 0 the probability `sure`, the rest sharing what is left."""
    rest = math.log((1 - sure) / (clusters - 1))
    return torch.tensor([[math.log(sure)] + [rest] * (clusters - 1)]).expand(rows, -1)


def test_one_who_is_right_as_often_as_it_says_is_calibrated() -> None:
    labels = torch.tensor([0] * 88 + [1] * 12)
    found = figures_of(stated(0.88, 100), labels)
    assert found.accuracy == pytest.approx(0.88)
    assert found.ece == pytest.approx(0, abs=1e-6)
    assert found.cross_entropy == pytest.approx(-(0.88 * math.log(0.88) + 0.12 * math.log(0.12 / 3)), abs=1e-5)
    (filled,) = [part for part in found.bins if part.count]
    assert (filled.low, filled.high, filled.count, filled.accuracy) == (0.8, 0.9, 100, pytest.approx(0.88))


def test_the_error_is_the_gap_between_what_is_said_and_what_is_so() -> None:
    labels = torch.tensor([0] * 60 + [1] * 40)
    found = figures_of(stated(0.95, 100), labels)
    assert found.confidence - found.accuracy == pytest.approx(0.35, abs=1e-6)
    assert found.ece == pytest.approx(0.35, abs=1e-6)


def test_gaps_of_opposite_sign_do_not_cancel() -> None:
    logits = torch.cat([stated(0.95, 50), stated(0.55, 50)])
    labels = torch.tensor([0] * 38 + [1] * 12 + [0] * 37 + [1] * 13)
    found = figures_of(logits, labels)
    assert abs(found.confidence - found.accuracy) < 0.01
    assert found.ece == pytest.approx((0.95 - 0.76 + 0.74 - 0.55) / 2, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(2, 6), st.integers(1, 15), st.integers(0, 2**31))
def test_figures_lie_where_they_must(rows: int, clusters: int, bins: int, seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, clusters, generator=dice)
    labels = torch.randint(0, clusters, (rows,), generator=dice)
    found = figures_of(logits, labels, bins)
    assert sum(part.count for part in found.bins) == found.count == rows
    assert 0 <= found.ece <= 1 and 0 <= found.accuracy <= 1
    assert 1 / clusters - 1e-9 <= found.confidence <= 1
    assert found.ece >= abs(found.confidence - found.accuracy) - 1e-9
    again = figures_of(logits.flip(0), labels.flip(0), bins)
    assert again.ece == pytest.approx(found.ece) and again.accuracy == found.accuracy
    for part in found.bins:
        assert not part.count or part.low - 1e-9 <= part.confidence <= part.high + 1e-9


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(ValueError, match="labels"):
        figures_of(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="logits"):
        figures_of(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))


class ReadsCaption(nn.Module):
    """Knows the cluster from the caption's first token (as LabelledData writes it), and nothing from the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        return self.scale * states[:, 0, :K]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> RouterProbe:
    path = tmp_path_factory.mktemp("plan") / "probe.safetensors"
    write_probe(path, LabelledData())
    return load_router_probe(path, K, 5)


def test_a_report_has_every_time_and_their_sum(probe: RouterProbe) -> None:
    report = router_report(ReadsCaption(), probe)
    assert [t for t, _ in report.by_time] == list(REPORT_TIMES)
    assert report.overall.count == len(REPORT_TIMES) * report.rows
    assert report.overall.accuracy == 1.0
    assert report.guess == pytest.approx(1 / K)
    assert report.entropy == pytest.approx(math.log(K))


def test_without_captions_such_a_router_guesses(probe: RouterProbe) -> None:
    blind = router_report(ReadsCaption(), probe, captions="null")
    assert blind.overall.accuracy == pytest.approx(1 / K)
    assert blind.overall.cross_entropy == pytest.approx(math.log(K))
    with pytest.raises(ValueError, match="captions"):
        router_report(ReadsCaption(), probe, captions="some")


def test_batches_change_nothing_and_the_mode_is_left_alone(probe: RouterProbe) -> None:
    model = ReadsCaption().train()
    for (t, one), (same, other) in zip(router_logits(model, probe), router_logits(model, probe, batch=5), strict=True):
        assert t == same
        torch.testing.assert_close(one, other)
    assert model.training


def test_the_picture_has_a_colour_and_a_line_for_each_report(probe: RouterProbe) -> None:
    reports = {name: router_report(ReadsCaption(), probe, captions=name) for name in ("own", "null")}
    one, both = calibration_picture({"own": reports["own"]}), calibration_picture(reports)
    assert both.dtype == np.uint8 and both.shape[0] > one.shape[0] and both.shape[1:] == one.shape[1:]
    with pytest.raises(ValueError, match="report"):
        calibration_picture({})
