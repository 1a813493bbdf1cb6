import pytest
import torch
from tests.expert.synthetic import small_task

from paris_swarm.expert.optim import POLAR_EXPRESS, Optimiser, orthogonalise


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 96, 24), (2, 24, 96)])
def test_orthogonalised_matrices_keep_directions_and_lose_lengths(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    polar = orthogonalise(matrices, 5)
    u, lengths, v = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.linalg.svdvals(polar)
    large = lengths > 0.02 * lengths[:, :1]  # directions much fainter than that stay short
    assert values.max() < 1.3
    assert (values[:, : int(large.sum(1).min())] > 0.5).all()
    assert (polar - u @ v).norm() < 0.3 * (u @ v).norm()


@pytest.mark.parametrize("spectrum", ["even", "falling to 1e-4", "of rank one", "zero"])
@pytest.mark.parametrize("shape", [(2, 48, 48), (2, 192, 48), (2, 48, 192)])
def test_the_short_way_for_wide_matrices_says_what_the_plain_iteration_says(
    shape: tuple[int, int, int], spectrum: str
) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    count = min(shape[1:])
    lengths = {
        "even": torch.ones(count),
        "falling to 1e-4": torch.logspace(0, -4, count),
        "of rank one": torch.eye(count)[0],
        "zero": torch.zeros(count),
    }[spectrum]
    matrices = u @ torch.diag(lengths) @ v
    x = matrices.double()
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT if shape[1] <= shape[2] else x.mT @ x
        factor = b * gram + c * gram @ gram
        x = a * x + (factor @ x if shape[1] <= shape[2] else x @ factor)
    assert (orthogonalise(matrices, 5).double() - x).norm() <= 2e-3 * x.norm()


def test_the_three_projections_of_attention_are_orthogonalised_each_for_itself() -> None:
    task = small_task(optimizer="muon", matrix_lr=1.0, momentum=0.0, grad_clip=0.0)
    model = task.build_model()
    optimiser = Optimiser(model, task.recipe.train)
    weight = model.layers[0].attn.in_proj_weight
    before = weight.detach().clone()
    draw = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    scale = torch.tensor([1.0, 100.0, 1e-3]).repeat_interleave(16)[:, None]
    weight.grad = torch.randn(weight.shape, generator=draw) * scale
    optimiser.step(1.0)
    for third in (before - weight.detach()).chunk(3):
        assert 0.5 < torch.linalg.svdvals(third).median() < 1.3


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_has_all_its_tensors_before_the_first_step(kind: str) -> None:
    task = small_task(optimizer=kind)
    model = task.build_model()
    optimiser = Optimiser(model, task.recipe.train)
    before = {name: tensor.shape for name, tensor in optimiser.state().items()}
    loss = task.loss(model, task.batch(0), torch.Generator().manual_seed(0))
    loss.backward()
    optimiser.step(1.0)
    assert {name: tensor.shape for name, tensor in optimiser.state().items()} == before
    covered = {name.split(".", 1)[1] for name in before}
    assert covered == set(dict(model.named_parameters()))
    muon = {name for name in before if name.startswith("momentum.")}
    assert bool(muon) == (kind == "muon")
    assert all(".scale_shift_table" not in name and "final_layer" not in name for name in muon)
