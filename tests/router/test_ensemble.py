"""The decomposition law in two dimensions, and what an ensemble owes its caller."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paris_swarm.router.ensemble import Ensemble, MissingExperts, NullText, decide
from paris_swarm.router.samplers import euler
from paris_swarm.router.strategies import Strategy

torch.set_num_threads(1)

# Clusters as Gaussian mixtures in the plane: [K clusters][their components] = (weight, mean, standard deviation).
CLUSTERS: list[list[tuple[float, tuple[float, float], float]]] = [
    [(0.20, (-2.0, 1.0), 0.30), (0.05, (-1.0, 2.5), 0.15)],
    [(0.25, (2.0, 1.5), 0.40)],
    [(0.30, (0.5, -2.0), 0.20), (0.10, (1.5, -1.0), 0.50)],
    [(0.10, (-1.5, -1.5), 0.25)],
]
K = len(CLUSTERS)
NULL = NullText(torch.zeros(1, 1, dtype=torch.float64), 1)


def log_density(x: Tensor, t: Tensor, components: list[tuple[float, tuple[float, float], float]]) -> Tensor:
    """Log of sum_j w_j N(x; (1 - t) m_j, ((1 - t)^2 s_j^2 + t^2) I): x [B, 2], t [B] -> [B]."""
    terms = []
    for weight, mean, sd in components:
        variance = (1 - t) ** 2 * sd**2 + t**2
        distance = (x - (1 - t)[:, None] * torch.tensor(mean, dtype=x.dtype)).square().sum(1)
        terms.append(torch.log(torch.tensor(weight, dtype=x.dtype)) - distance / (2 * variance) - variance.log())
    return torch.logsumexp(torch.stack(terms), dim=0)


def exact_expert(components: list[tuple[float, tuple[float, float], float]], calls: list[int] | None = None):
    """E[eps - x_0 | x_t] for one cluster, from the conditional means of Gaussians (no score anywhere)."""

    def velocity(x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        if calls is not None:
            calls.append(len(x))
        logs, flows = [], []
        for component in components:
            _, mean, sd = component
            variance = ((1 - t) ** 2 * sd**2 + t**2)[:, None]
            m = torch.tensor(mean, dtype=x.dtype)
            offset = x - (1 - t)[:, None] * m
            flows.append((t[:, None] - (1 - t)[:, None] * sd**2) * offset / variance - m)
            logs.append(log_density(x, t, [component]))
        share = torch.stack(logs).softmax(0)
        return (share[..., None] * torch.stack(flows)).sum(0)

    return velocity


def exact_router(x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([log_density(x, t, cluster) for cluster in CLUSTERS], dim=1)


def marginal_flow(x: Tensor, t: Tensor) -> Tensor:
    """The whole mixture's flow by another road: from the score of its density, u = (-t score - x) / (1 - t)."""
    x = x.detach().requires_grad_()
    everything = [component for cluster in CLUSTERS for component in cluster]
    (score,) = torch.autograd.grad(log_density(x, t, everything).sum(), x)
    return ((-t[:, None] * score - x) / (1 - t)[:, None]).detach()


def exact_ensemble(**kwargs) -> Ensemble:
    return Ensemble(K, {k: (lambda k=k: exact_expert(CLUSTERS[k])) for k in range(K)}, exact_router, NULL, **kwargs)


def captions(count: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(count, 1, 1, dtype=torch.float64), torch.ones(count, 1, dtype=torch.bool)


def points(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64) * 1.5
    t = torch.rand(count, generator=generator, dtype=torch.float64) * 0.97 + 0.01
    return x, t


def test_exact_posterior_times_exact_experts_is_the_exact_marginal_flow():
    x, t = points(500)
    states, mask = captions(500)
    ensemble = exact_ensemble()
    decision = ensemble.route(x, t, states, mask, strategy="full")
    got = ensemble.velocity(x, t, states, mask, decision)
    torch.testing.assert_close(got, marginal_flow(x, t), rtol=1e-9, atol=1e-9)


def test_sampling_the_exact_ensemble_lands_on_the_clusters_in_their_proportions():
    ensemble = exact_ensemble()
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    states, mask = captions(2000)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return ensemble.velocity(x, t, states, mask, ensemble.route(x, t, states, mask, strategy="full"))

    x = euler(velocity, noise, 100)
    means = torch.tensor([m for cluster in CLUSTERS for _, m, _ in cluster], dtype=torch.float64)
    owner = torch.tensor([k for k, cluster in enumerate(CLUSTERS) for _ in cluster])
    nearest, index = torch.cdist(x, means).min(dim=1)
    share = torch.bincount(owner[index], minlength=K) / len(x)
    prior = torch.tensor([sum(w for w, _, _ in cluster) for cluster in CLUSTERS])
    assert (share - prior).abs().max() < 0.04
    assert nearest.median() < 0.5


@pytest.mark.parametrize("strategy", ["top-1", "top-2", "top-3", "full"])
def test_weights_are_the_largest_renormalised(strategy):
    x, t = points(64)
    decision = exact_ensemble().route(x, t, *captions(64), strategy=strategy)
    kept = K if strategy == "full" else int(strategy.removeprefix("top-"))
    posterior = exact_router(x, t, *captions(64)).softmax(1)
    assert (decision.weights > 0).sum(1).max() <= kept
    torch.testing.assert_close(decision.weights.sum(1), torch.ones(64, dtype=torch.float64))
    assert torch.equal(decision.weights.argmax(1), posterior.argmax(1))
    ratio = decision.weights / posterior
    for row, used in zip(ratio, decision.weights > 0, strict=True):
        torch.testing.assert_close(row[used], row[used][0].expand(int(used.sum())))
    assert decision.redirected.abs().max() == 0


def test_experts_run_once_a_step_on_their_own_samples_only():
    calls: dict[int, list[int]] = {k: [] for k in range(K)}
    loads: list[int] = []

    def load(k: int):
        loads.append(k)
        return exact_expert(CLUSTERS[k], calls[k])

    ensemble = Ensemble(K, {k: (lambda k=k: load(k)) for k in range(K)}, exact_router, NULL)
    x, t = points(100)
    states, mask = captions(100)
    for _ in range(2):
        decision = ensemble.route(x, t, states, mask, strategy="top-1")
        got = ensemble.velocity(x, t, states, mask, decision)
    used = decision.in_use()
    assert loads == used  # each loaded once, though two steps used it
    assert sum(calls[k][0] for k in used) == 100
    assert all(len(calls[k]) == (2 if k in used else 0) for k in range(K))
    for row in range(100):  # what a loop over the samples would have said
        k = int(decision.weights[row].argmax())
        alone = exact_expert(CLUSTERS[k])(x[row : row + 1], t[row : row + 1], states[:1], mask[:1])
        torch.testing.assert_close(got[row : row + 1], alone)


def test_guided_and_unguided_share_one_decision_and_one_batch():
    seen: list[tuple[int, Tensor]] = []

    def expert_for(k: int):
        def expert(x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
            seen.append((k, states[:, 0, 0].clone()))
            return (k + 1) * states[:, :1, 0] * torch.ones_like(x)

        return expert

    routed: list[Tensor] = []

    def router(x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        routed.append(states.clone())
        return torch.stack([states[:, 0, 0], -states[:, 0, 0]], dim=1)

    null = NullText(torch.full((1, 1), 0.25, dtype=torch.float64), 1)
    ensemble = Ensemble(2, {k: (lambda k=k: expert_for(k)) for k in range(2)}, router, null)
    states = torch.tensor([3.0, -3.0, 3.0], dtype=torch.float64)[:, None, None]
    mask = torch.ones(3, 1, dtype=torch.bool)
    x, t = torch.zeros(3, 2, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    decision = ensemble.route(x, t, states, mask, strategy="top-1")
    got = ensemble.velocity(x, t, states, mask, decision, guidance=4.0)
    assert len(routed) == 1  # the router never saw the null caption
    assert [k for k, _ in seen] == [0, 1]
    torch.testing.assert_close(seen[0][1], torch.tensor([3.0, 3.0, 0.25, 0.25], dtype=torch.float64))
    expected = [1 * (0.25 + 4 * 2.75), 2 * (0.25 + 4 * -3.25), 1 * (0.25 + 4 * 2.75)]
    torch.testing.assert_close(got[:, 0], torch.tensor(expected, dtype=torch.float64))

    for guidance, unit in ((1.0, [3.0, -3.0, 3.0]), (0.0, [0.25, 0.25, 0.25])):  # one half is enough
        seen.clear()
        got = ensemble.velocity(x, t, states, mask, decision, guidance=guidance)
        assert [len(states) for _, states in seen] == [2, 1]
        assert got[:, 0].tolist() == [unit[0], 2 * unit[1], unit[2]]


def test_missing_experts_are_refused_and_named():
    experts = {k: (lambda k=k: exact_expert(CLUSTERS[k])) for k in (0, 3)}
    with pytest.raises(MissingExperts, match="expert 1, expert 2") as caught:
        Ensemble(K, experts, exact_router, NULL)
    assert caught.value.missing == ("1", "2")
    assert "allow missing experts" in str(caught.value)
    with pytest.raises(MissingExperts, match=r"the router.*router rows") as caught:
        Ensemble(K, experts, None, NULL, allow_missing=True)
    assert "allow missing" not in str(caught.value), "it would not help"
    with pytest.raises(MissingExperts, match="without any expert") as caught:
        Ensemble(K, {}, exact_router, NULL, allow_missing=True)
    assert "allow missing" not in str(caught.value)
    with pytest.raises(ValueError, match="numbered 0 to 3"):
        Ensemble(K, {7: lambda: exact_expert(CLUSTERS[0])}, exact_router, NULL)


def test_allowed_missing_experts_are_reported_with_the_weight_they_lost():
    experts = {k: (lambda k=k: exact_expert(CLUSTERS[k])) for k in (0, 3)}
    ensemble = Ensemble(K, experts, exact_router, NULL, allow_missing=True)
    x, t = points(200)
    states, mask = captions(200)
    posterior = exact_router(x, t, states, mask).softmax(1)
    for strategy in ("top-1", "top-2", "full"):
        decision = ensemble.route(x, t, states, mask, strategy=strategy)
        torch.testing.assert_close(decision.redirected, posterior[:, 1:3].sum(1))
        assert decision.weights[:, 1:3].abs().max() == 0
        torch.testing.assert_close(decision.weights.sum(1), torch.ones(200, dtype=torch.float64))
    assert decision.redirected.max() > 0.99


def test_weight_on_missing_experts_alone_still_gives_a_finite_decision():
    decision = decide(torch.tensor([[0.0, 900.0, 1.0]]), Strategy("full"), torch.tensor([True, False, True]))
    assert decision.redirected.item() == 1.0
    torch.testing.assert_close(decision.weights[0, 2] / decision.weights[0, 0], torch.tensor(1.0).exp())


def test_one_cluster_needs_no_router():
    ensemble = Ensemble(1, {0: lambda: exact_expert(CLUSTERS[0])}, None, NULL)
    x, t = points(5)
    states, mask = captions(5)
    decision = ensemble.route(x, t, states, mask, strategy="full")
    got = ensemble.velocity(x, t, states, mask, decision)
    torch.testing.assert_close(got, exact_expert(CLUSTERS[0])(x, t, states, mask))


def test_a_null_caption_longer_than_the_prompts_is_refused():
    null = NullText(torch.zeros(4, 1), 3)
    with pytest.raises(ValueError, match="3 tokens"):
        null.rows(2, 2, torch.zeros(1))
    states, mask = null.rows(2, 6, torch.zeros(1))
    assert states.shape == (2, 6, 1)
    assert mask.sum(1).tolist() == [3, 3]


def test_the_order_of_experts_does_not_matter():
    """Renumbering the experts, and the router with them, gives the same velocity but for rounding."""
    x, t = (part.float() for part in points(64))
    states, mask = captions(64)
    states = states.float()
    got = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]):

        def router(x: Tensor, t: Tensor, s: Tensor, m: Tensor, order: list[int] = order) -> Tensor:
            return exact_router(x, t, s, m)[:, order]

        experts = {at: (lambda k=k: exact_expert(CLUSTERS[k])) for at, k in enumerate(order)}
        ensemble = Ensemble(K, dict(reversed(experts.items())), router, NULL)
        decision = ensemble.route(x, t, states, mask, strategy="full")
        got.append(ensemble.velocity(x, t, states, mask, decision))
    torch.testing.assert_close(got[1], got[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[2], got[0], rtol=1e-4, atol=1e-5)
