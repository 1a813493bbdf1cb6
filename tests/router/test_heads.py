"""Experts that come and go: what a head may change, what it must leave alone, and that a fitted one works."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from router_world import ROUTER_RECIPE, K, LabelledData, router_task, with_train, write_probe

from paris_swarm.expert.checkpoint import load_weights
from paris_swarm.expert.rows import Rows
from paris_swarm.expert.training import DoneReport, TrainJob, train
from paris_swarm.router.heads import HeadInputs, fit_head, head_inputs, with_expert, without_expert
from paris_swarm.router.model import Router
from paris_swarm.router.task import LabelledBatch, RouterTask, build_router, load_router_probe

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data() -> LabelledData:
    return LabelledData(480)


@pytest.fixture(scope="module")
def trained(data: LabelledData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Router, Router]:
    """A router of all three clusters, and one of the first two."""
    folder = tmp_path_factory.mktemp("heads")
    write_probe(folder / "probe.safetensors", data)
    probe = load_router_probe(folder / "probe.safetensors", K, 5)
    recipe = with_train(ROUTER_RECIPE, steps=80, batch=32)
    fewer = replace(recipe, model=replace(recipe.model, clusters=K - 1))
    rest = Rows(data, np.flatnonzero(data.labels < K - 1))
    two = replace(probe, labels=probe.labels.clip(max=K - 2))
    found = []
    tasks = (router_task(data, folder / "probe.safetensors", recipe), RouterTask(fewer, rest, data.labels, two))
    for number, task in enumerate(tasks):
        job = TrainJob(task, folder / str(number), device="cpu", precision="fp32")
        done = next(report for report in train(job) if isinstance(report, DoneReport))
        model = build_router(task.recipe)
        load_weights(model, done.folder / "ema.safetensors")
        found.append(model.eval())
    return found[0], found[1]


def batch_of(data: LabelledData, rows: range) -> tuple[LabelledBatch, torch.Tensor, torch.Tensor]:
    whole = Rows(data, np.arange(data.count)).batch(np.arange(rows.start, rows.stop))
    dice = torch.Generator().manual_seed(rows.start)
    labels = torch.from_numpy(data.labels[rows.start : rows.stop].astype(np.int64))
    times = 0.8 * torch.rand(len(rows), generator=dice)
    noise = torch.randn(whole.x0.shape, generator=dice)
    return LabelledBatch(whole.x0, whole.states, whole.mask, labels), times, noise


def answers(model: Router, batch: LabelledBatch, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.lerp(batch.x0, noise, t[:, None, None, None]), t, batch.states, batch.mask)


def test_removing_an_expert_renormalises_the_others_exactly(data: LabelledData, trained: tuple[Router, Router]) -> None:
    whole, _ = trained
    here = batch_of(data, range(40))
    before = answers(whole, *here).softmax(dim=1)
    for gone in range(K):
        rest = [k for k in range(K) if k != gone]
        after = answers(without_expert(whole, gone), *here).softmax(dim=1)
        torch.testing.assert_close(after, before[:, rest] / before[:, rest].sum(1, keepdim=True))
    for wrong in (-1, K):
        with pytest.raises(ValueError, match="cannot be removed"):
            without_expert(whole, wrong)


def test_adding_an_expert_leaves_the_odds_of_the_others_alone(
    data: LabelledData, trained: tuple[Router, Router]
) -> None:
    _, two = trained
    here = batch_of(data, range(40))
    weight = torch.randn(two.config.hidden, generator=torch.Generator().manual_seed(0))
    more = with_expert(two, weight, torch.tensor(0.5))
    assert more.config.clusters == K
    torch.testing.assert_close(answers(more, *here)[:, : K - 1], answers(two, *here))
    again = without_expert(more, K - 1)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in two.state_dict().items())


def test_a_fitted_head_knows_its_cluster(data: LabelledData, trained: tuple[Router, Router]) -> None:
    """Fitted on 300 rows, judged on others; trained anew is the router to hold it against."""
    whole, two = trained
    fitted = fit_head(head_inputs(two, batch_of(data, range(300))[0], K - 1, *batch_of(data, range(300))[1:]))
    grown = with_expert(two, *fitted)
    batch, t, noise = batch_of(data, range(300, 468))
    right = {
        name: float((answers(model, batch, t, noise).argmax(1) == batch.labels).float().mean())
        for name, model in (("anew", whole), ("head", grown))
    }
    assert right["anew"] > 0.95
    assert right["head"] > right["anew"] - 0.05


def test_a_share_that_is_not_that_of_the_rows_shifts_the_odds() -> None:
    """With nothing to see in h, a new expert gets its share, and with a share of the whole data, that one."""
    inputs = HeadInputs(torch.zeros(400, 3), torch.zeros(400, 2), torch.arange(400) % 4 == 0)
    for share, wanted in ((None, 0.25), (0.1, 0.1), (0.6, 0.6)):
        weight, bias = fit_head(inputs, share=share)
        got = torch.cat([torch.zeros(2), (weight * 0).sum() + bias.reshape(1)]).softmax(0)[-1]
        assert float(got) == pytest.approx(wanted, abs=1e-3)


def test_the_fit_is_the_same_whatever_the_scale_of_a_direction() -> None:
    dice = torch.Generator().manual_seed(4)
    h, old = torch.randn(300, 5, generator=dice), torch.randn(300, 3, generator=dice)
    fresh = h[:, 0] + 0.5 * torch.randn(300, generator=dice) > 0.4
    scale = torch.tensor([1.0, 30.0, 0.02, 1.0, 5.0])
    plain, stretched = fit_head(HeadInputs(h, old, fresh)), fit_head(HeadInputs(h * scale, old, fresh))
    torch.testing.assert_close(h @ plain[0] + plain[1], (h * scale) @ stretched[0] + stretched[1], rtol=1e-2, atol=2e-2)


def test_a_head_needs_rows_of_both_kinds() -> None:
    for fresh in (torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="missing"):
            fit_head(HeadInputs(torch.zeros(4, 2), torch.zeros(4, 2), fresh))
    both = HeadInputs(torch.zeros(4, 2), torch.zeros(4, 2), torch.tensor([True, False, False, False]))
    with pytest.raises(ValueError, match="share"):
        fit_head(both, share=1.0)
