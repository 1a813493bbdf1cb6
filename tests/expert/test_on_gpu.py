"""What must hold on a CUDA card (`make gpu`): exact resume, precision, and steps taken in pieces."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.expert.synthetic import small_task

from paris_swarm.expert.step import StepSettings, TrainState
from paris_swarm.expert.training import CheckpointReport, TrainJob, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA card"),
]
WEIGHTS = ("ema.safetensors", "model.safetensors", "optimizer.safetensors")


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_killed_run_continues_to_the_same_bits(tmp_path: Path, precision: str, kind: str) -> None:
    def job(name: str) -> TrainJob:
        task = small_task(optimizer=kind, steps=8, batch=8)
        chosen = StepSettings(micro_batch=4, recompute=True)
        return TrainJob(
            task, tmp_path / name, checkpoint_every_steps=4, device="cuda", precision=precision, settings=chosen
        )

    straight = [r for r in train(job("straight")) if isinstance(r, CheckpointReport)][-1]
    for report in train(job("killed")):
        if isinstance(report, CheckpointReport):
            break
    resumed = [r for r in train(job("killed")) if isinstance(r, CheckpointReport)][-1]
    for name in WEIGHTS:
        assert (straight.folder / name).read_bytes() == (resumed.folder / name).read_bytes(), name


def after(steps: int, device: str, precision: torch.dtype, chosen: StepSettings | None = None) -> TrainState:
    state = TrainState(small_task(batch=8, lr=1e-3), torch.device(device), settings=chosen)
    for _ in range(steps):
        state.take_step(precision)
    return state


def test_bf16_moves_weights_as_fp32_does() -> None:
    start, exact, rough = (
        after(0, "cuda", torch.float32),
        after(5, "cuda", torch.float32),
        after(5, "cuda", torch.bfloat16),
    )
    moved = {name: exact.model.state_dict()[name] - tensor for name, tensor in start.model.state_dict().items()}
    for name, tensor in rough.model.state_dict().items():
        assert tensor.dtype == torch.float32
        apart = (tensor - exact.model.state_dict()[name]).norm()
        assert apart <= 0.5 * moved[name].norm() + 1e-6, name


def test_pieces_recomputing_and_compiling_stay_within_rounding() -> None:
    plain = after(4, "cuda", torch.float32)
    for chosen in (StepSettings(micro_batch=3), StepSettings(recompute=True), StepSettings(compiled=True)):
        other = after(4, "cuda", torch.float32, chosen)
        for (name, one), two in zip(plain.model.state_dict().items(), other.model.state_dict().values(), strict=True):
            torch.testing.assert_close(one, two, rtol=2e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_checkpoint_of_a_gpu_run_loads_on_a_cpu(tmp_path: Path) -> None:
    saved = [r for r in train(TrainJob(small_task(), tmp_path, device="cuda")) if isinstance(r, CheckpointReport)][-1]
    state = TrainState(small_task(), torch.device("cpu"))
    state.load(saved.folder)
    assert all(
        torch.equal(tensor, load_file(saved.folder / "model.safetensors")[name])
        for name, tensor in state.model.state_dict().items()
    )
