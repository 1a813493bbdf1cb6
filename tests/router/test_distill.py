"""Distillation: who teaches what, that the student learns it, and that a killed run goes on bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from router_world import COLOURS, EXPERT_RECIPE, K, LabelledData, write_probe
from torch import Tensor, nn

from paris_swarm.expert.checkpoint import load_weights
from paris_swarm.expert.recipe import Recipe
from paris_swarm.expert.rows import Rows, select_rows
from paris_swarm.expert.task import build_expert
from paris_swarm.expert.training import CheckpointReport, DoneReport, TrainJob, train
from paris_swarm.expert.verify import Probe
from paris_swarm.router.distill import DistillRecipe, DistillTask, mean_weights
from paris_swarm.router.task import load_router_probe

ROOTS = {str(k): f"{k}" * 64 for k in range(K)}


class Painter(nn.Module):
    """The exact flow to one colour, kept finite near the data. Remembers the captions it was given."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.goal = torch.from_numpy(COLOURS[k] / 127.5 - 1).float()[None, :, None, None]
        self.captions: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        self.captions.append(states)
        return (x - self.goal) / t[:, None, None, None].clamp(min=0.2)


@pytest.fixture(scope="module")
def data() -> LabelledData:
    torch.set_num_threads(1)
    return LabelledData()


@pytest.fixture(scope="module")
def probe(data: LabelledData, tmp_path_factory: pytest.TempPathFactory) -> Probe:
    path = tmp_path_factory.mktemp("plan") / "probe.safetensors"
    write_probe(path, data)
    return load_router_probe(path, K, 5).rows


def recipe(start: str = "fresh", **train: Any) -> DistillRecipe:
    values = {"steps": 6, "batch": 12, "lr": 5e-3, "seed": 3, **train}
    return DistillRecipe(EXPERT_RECIPE.with_train(**values), ROOTS, start)


def task(data: LabelledData, probe: Probe, teachers: list[nn.Module], asked: DistillRecipe | None = None) -> Any:
    rows = Rows(data, select_rows(data, None, None, data.held_out))
    return DistillTask(asked or recipe(), rows, data.labels, teachers.__getitem__, probe)


def painters() -> list[nn.Module]:
    return [Painter(k) for k in range(K)]


def experts() -> list[nn.Module]:
    """Networks that differ; untrained ones would all say nothing."""
    made: list[nn.Module] = []
    for k in range(K):
        expert = build_expert(EXPERT_RECIPE.with_train(seed=k))
        nn.init.normal_(expert.final_layer.linear.weight, std=0.2, generator=torch.Generator().manual_seed(k))
        made.append(expert)
    return made


def examples(distilling: DistillTask, step: int = 0) -> Any:
    return distilling.draw(distilling.batch(step), torch.Generator().manual_seed(step))


def test_each_row_is_taught_by_the_expert_of_its_own_cluster(data: LabelledData, probe: Probe) -> None:
    teachers = painters()
    distilling = task(data, probe, teachers)
    drawn = examples(distilling)
    taught = distilling.taught(drawn)
    labels = drawn.parts["labels"]
    assert set(labels.tolist()) == set(range(K))
    for row, k in enumerate(labels.tolist()):
        alone = [part[row : row + 1] for part in (drawn.parts["x"], drawn.t, drawn.parts["states"])]
        torch.testing.assert_close(taught[row : row + 1], teachers[k](*alone, drawn.parts["mask"][row : row + 1]))
    of_rows = data.labels[select_rows(data, None, None, data.held_out)]
    assert np.bincount(distilling._rows.labels).tolist() == np.bincount(of_rows).tolist()


def test_a_teacher_sees_the_caption_that_the_student_sees(data: LabelledData, probe: Probe) -> None:
    teachers = painters()
    distilling = task(data, probe, teachers, recipe(condition_dropout=1.0))
    distilling.taught(examples(distilling))
    seen = torch.cat([part for teacher in teachers for part in teacher.captions])
    null = torch.from_numpy(data.null_states).float()
    assert torch.equal(seen, null[: seen.shape[1]].expand_as(seen))


def test_no_gradient_reaches_a_teacher(data: LabelledData, probe: Probe) -> None:
    teachers = experts()
    distilling = task(data, probe, teachers)
    student = distilling.build_model()
    distilling.losses(student, examples(distilling)).mean().backward()
    assert all(parameter.grad is None for teacher in teachers for parameter in teacher.parameters())
    assert student.final_layer.linear.weight.grad.abs().sum() > 0


def test_the_student_comes_near_its_teachers(data: LabelledData, probe: Probe, tmp_path: Path) -> None:
    # Noise passes through a narrow network only beside it.
    model = replace(EXPERT_RECIPE.model, output="residual", patch_skip=True)
    asked = recipe(steps=80, batch=24, ema=0.9)
    distilling = task(data, probe, painters(), replace(asked, student=replace(asked.student, model=model)))
    fixed = examples(distilling, 1_000)

    def distance(network: nn.Module) -> float:
        with torch.no_grad():
            return float(distilling.losses(network, fixed).mean())

    before = distance(distilling.build_model())
    last = list(train(TrainJob(distilling, tmp_path, device="cpu", precision="fp32")))[-1]
    assert isinstance(last, DoneReport)
    student = distilling.build_model()
    load_weights(student, last.folder / "ema.safetensors")
    assert distance(student) < before / 2
    assert distilling.probe(student) < distilling.probe(distilling.build_model())


def test_a_run_that_was_cut_short_goes_on_bit_for_bit(data: LabelledData, probe: Probe, tmp_path: Path) -> None:
    teachers = experts()

    def job(name: str, **more: Any) -> TrainJob:
        return TrainJob(task(data, probe, teachers), tmp_path / name, device="cpu", precision="fp32", **more)

    whole = list(train(job("whole")))[-1]
    for report in train(job("cut", checkpoint_every_steps=2)):
        if isinstance(report, CheckpointReport) and report.step == 4:
            break  # as if killed: nothing after the checkpoint is kept
    rest = list(train(job("cut")))
    assert isinstance(whole, DoneReport) and isinstance(rest[-1], DoneReport)
    assert whole.step == rest[-1].step == 6
    for name in ("ema.safetensors", "model.safetensors", "optimizer.safetensors"):
        assert (whole.folder / name).read_bytes() == (rest[-1].folder / name).read_bytes()


def test_a_checkpoint_of_other_teachers_is_not_gone_on_with(data: LabelledData, probe: Probe, tmp_path: Path) -> None:
    def job(asked: DistillRecipe) -> TrainJob:
        return TrainJob(task(data, probe, painters(), asked), tmp_path, device="cpu", precision="fp32", until=2)

    list(train(job(recipe())))
    with pytest.raises(ValueError, match="another recipe"):
        list(train(job(replace(recipe(), teachers={**ROOTS, "2": "f" * 64}))))


def test_the_mean_start_is_the_mean_of_the_experts_weights(data: LabelledData, probe: Probe) -> None:
    teachers = experts()
    distilling = task(data, probe, teachers, recipe("mean"))
    student = distilling.build_model()
    distilling.begin(student)
    wanted = torch.stack([teacher.patch_embed.weight for teacher in teachers]).mean(0)
    torch.testing.assert_close(student.patch_embed.weight, wanted)
    wider = Recipe(replace(EXPERT_RECIPE.model, hidden=32), EXPERT_RECIPE.train)
    with pytest.raises(ValueError, match="start fresh"):
        mean_weights(build_expert(wider), teachers)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"start": "half"}, "fresh or mean"),
        ({"teachers": {}}, "at least one"),
        ({"teachers": {"1": "a"}}, "numbered"),
        (
            {
                "student": Recipe(
                    replace(EXPERT_RECIPE.model, path="cosine", output="noise"),
                    replace(EXPERT_RECIPE.train, loss="noise"),
                )
            },
            "straight path",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(recipe(), **change)


def test_rows_without_a_teacher_are_refused(data: LabelledData, probe: Probe) -> None:
    rows = Rows(data, select_rows(data, None, None, data.held_out))
    for labels, said in ((data.labels[:10], "one label a row"), (data.labels + 1, "must lie in 0..2")):
        with pytest.raises(ValueError, match=said):
            DistillTask(recipe(), rows, labels, painters().__getitem__, probe)
