"""How a machine takes its steps: in pieces, recomputing, given up half-way, shared. What they learn stays the same."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.expert.synthetic import small_task
from torch import nn

from paris_swarm.expert.processes import Alone
from paris_swarm.expert.provenance import environment
from paris_swarm.expert.step import TIME_BINS, GivenUp, StepSettings, TrainState, clip_gradients
from paris_swarm.expert.training import CheckpointReport, StepReport, TrainJob, train

CPU = torch.device("cpu")
WEIGHTS = ("ema.safetensors", "model.safetensors", "optimizer.safetensors")


def state_after(steps: int, chosen: StepSettings, **recipe: object) -> TrainState:
    state = TrainState(small_task(batch=8, **recipe), CPU, settings=chosen)
    for _ in range(steps):
        state.take_step(torch.float32)
    return state


def weights_of(state: TrainState) -> list[torch.Tensor]:
    return [*state.model.state_dict().values(), *state.ema.state_dict().values(), *state.optimiser.state().values()]


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 50])
def test_a_batch_in_pieces_teaches_what_the_whole_batch_teaches(micro_batch: int) -> None:
    whole = state_after(4, StepSettings(), lr=1e-3)
    pieces = state_after(4, StepSettings(micro_batch=micro_batch), lr=1e-3)
    for one, other in zip(weights_of(whole), weights_of(pieces), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-6)
    moved = [
        not torch.equal(a, b)
        for a, b in zip(weights_of(whole), weights_of(state_after(0, StepSettings())), strict=True)
    ]
    assert sum(moved) > len(moved) / 2


def test_recomputed_activations_change_no_bit() -> None:
    kept, again = (state_after(3, StepSettings(micro_batch=4, recompute=flag)) for flag in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(weights_of(kept), weights_of(again), strict=True))
    assert list(kept.model.state_dict()) == list(again.model.state_dict())


def test_recomputing_keeps_less_for_the_backward_pass() -> None:
    def kept_numbers(chosen: StepSettings) -> int:
        state = TrainState(small_task(batch=8, steps=8), CPU, settings=chosen)
        seen: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        examples = state.task.draw(state.task.batch(0), torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            state.task.losses(state.model, examples).sum()
        weights = {p.untyped_storage().data_ptr() for p in state.model.parameters()}
        return sum(size for place, size in seen.items() if place not in weights)

    assert kept_numbers(StepSettings(recompute=True)) < 0.5 * kept_numbers(StepSettings())


def test_a_run_in_pieces_that_was_killed_continues_to_the_same_bits(tmp_path: Path) -> None:
    chosen = StepSettings(micro_batch=3, recompute=True)

    def job(name: str) -> TrainJob:
        task = small_task(batch=8, steps=6, optimizer="muon")
        return TrainJob(task, tmp_path / name, checkpoint_every_steps=2, settings=chosen)

    straight = [r for r in train(job("straight")) if isinstance(r, CheckpointReport)]
    for report in train(job("killed")):
        if isinstance(report, CheckpointReport):
            break
    (*_, last) = [r for r in train(job("killed")) if isinstance(r, CheckpointReport)]
    assert last.step == straight[-1].step == 6
    for name in WEIGHTS:
        assert (straight[-1].folder / name).read_bytes() == (last.folder / name).read_bytes()
    assert last.facts["environment"]["micro_batch"] == 3


def test_a_step_given_up_between_two_pieces_never_happened(tmp_path: Path) -> None:
    untouched = state_after(2, StepSettings(micro_batch=2))
    asked = iter([False, True])
    with pytest.raises(GivenUp):
        untouched.take_step(torch.float32, give_up=lambda: next(asked))
    assert untouched.step == 2
    expected = state_after(2, StepSettings(micro_batch=2))
    assert all(torch.equal(a, b) for a, b in zip(weights_of(untouched), weights_of(expected), strict=True))
    untouched.take_step(torch.float32)
    expected.take_step(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(untouched), weights_of(expected), strict=True))
    calls = iter([False, False, False, True])  # before step 1, after pieces 1 and 2 of 4, after piece 3
    reports = list(train(TrainJob(small_task(batch=8), tmp_path, settings=StepSettings(2), stop=lambda: next(calls))))
    assert reports[-1].stopped and reports[-1].step == 0 and reports[-1].folder.is_dir()


def test_losses_by_time_add_up_to_the_loss(tmp_path: Path) -> None:
    task = small_task(batch=8, steps=5)
    reports = [r for r in train(TrainJob(task, tmp_path, report_every_s=1e9)) if isinstance(r, StepReport)]
    (report,) = reports
    assert len(report.by_time) == TIME_BINS
    assert sum(rows for _, rows in report.by_time) == 5 * 8
    total = sum(mean * rows for mean, rows in report.by_time if mean is not None)
    assert total / 40 == pytest.approx(report.loss, rel=1e-5)
    assert all((mean is None) == (rows == 0) for mean, rows in report.by_time)


@pytest.mark.parametrize("objective", ["velocity", "residual"])
def test_a_rows_loss_is_its_own(objective: str) -> None:
    task = small_task(objective, batch=6)
    model = task.build_model()
    examples = task.draw(task.batch(0), torch.Generator().manual_seed(4))
    together = task.losses(model, examples)
    alone = torch.cat([task.losses(model, examples.rows(i, i + 1)) for i in range(6)])
    assert together.shape == (6,)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_clipping_gives_the_numbers_of_torch(size: float, longest: float) -> None:
    draw = torch.Generator().manual_seed(1)
    ours, theirs = ([nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5))] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn(a.shape, generator=draw) * size
        b.grad = a.grad.clone()
    clip_gradients(ours, longest)
    nn.utils.clip_grad_norm_(theirs, longest, foreach=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


def test_how_steps_are_taken_stands_in_the_provenance() -> None:
    assert environment(CPU, torch.float32, state_after(0, StepSettings())).micro_batch == 0
    in_pieces = environment(CPU, torch.float32, state_after(0, StepSettings(micro_batch=2, recompute=True)))
    assert (in_pieces.micro_batch, in_pieces.processes, in_pieces.compiled) == (2, 1, False)


def test_shares_that_are_not_equal_are_refused() -> None:
    class Three(Alone):
        count = 3

    with pytest.raises(ValueError, match="8 rows does not divide into 3"):
        TrainState(small_task(batch=8), CPU, processes=Three())
    with pytest.raises(ValueError, match="at least one row"):
        StepSettings(micro_batch=-1)


@pytest.mark.slow
def test_compiled_steps_stay_within_rounding_and_keep_the_names() -> None:
    plain, compiled = (state_after(3, StepSettings(compiled=flag), lr=1e-3) for flag in (False, True))
    assert list(plain.model.state_dict()) == list(compiled.model.state_dict())
    for one, other in zip(weights_of(plain), weights_of(compiled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-6)
    assert environment(CPU, torch.float32, compiled).compiled
