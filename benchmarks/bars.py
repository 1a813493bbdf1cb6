"""Do the two bars separate useful experts from useless ones? Trains small experts, spoils them, and measures.

    nice -n 10 python benchmarks/bars.py DATA --steps 320 --out docs/results --stem bars-2026-11

DATA is a folder written by `paris-swarm prepare dicebear`. The demo's recipe and partition: four clusters, the probe
set drawn as `init` draws it. One torch thread. Writes STEM.json (every figure) and STEM.svg (the plot); prints the
tables of docs/results/bars-2026-11.md. 320 steps take about eight CPU minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paris_swarm.cli.planning import choose_probe_rows
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.flow import velocity_target
from paris_swarm.expert.model import Expert, seeded
from paris_swarm.expert.recipe import Recipe, named_recipe
from paris_swarm.expert.rows import Rows, select_rows
from paris_swarm.expert.task import ExpertTask, build_expert
from paris_swarm.expert.training import TrainState
from paris_swarm.expert.verify import Probe, assemblable_bar, expert_probe_loss, probe_from_rows, resumable_bar
from paris_swarm.router.partition import partition
from paris_swarm.router.recipe import RouterRecipe, named_router_recipe
from paris_swarm.router.task import (
    RouterProbe,
    RouterTask,
    build_router,
    join_probes,
    router_assemblable_bar,
    router_probe_loss,
    router_resumable_bar,
)

CLUSTERS = 4
SHARES = (0.05, 0.2, 0.5, 1.0)
"""Shares of the training at which an expert is measured."""
NOISE = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Noise added to every tensor, in units of that tensor's own standard deviation."""
OVERFIT = 300
"""Steps of training on the open half."""


class OtherCaptions:
    """The same pictures, each with the caption of another row."""

    def __init__(self, data: PreparedData, seed: int) -> None:
        self._data = data
        self._other = np.random.default_rng(seed).permutation(data.count)
        self.count, self.null_states, self.manifest, self.digests = (
            data.count,
            data.null_states,
            data.manifest,
            data.digests,
        )

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        return self._data.pixels(rows)

    def states(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._data.states(self._other[rows])


@dataclass(frozen=True)
class World:
    """The data split as `init` splits it."""

    data: PreparedData
    labels: np.ndarray
    rows: dict[int, np.ndarray]
    open_rows: dict[str, np.ndarray]
    open: list[Probe]
    sealed: list[Probe]


def world_of(data: PreparedData, seed: int) -> World:
    """Clusters, training rows and both halves of the probe set."""
    labels = partition(data.features(), CLUSTERS, seed=seed).labels
    open_rows, sealed_rows = choose_probe_rows(data, labels, CLUSTERS, seed)
    digests = np.asarray(data.digests)
    held = [digests[row].tobytes() for half in (open_rows, sealed_rows) for rows in half.values() for row in rows]
    halves = [[uncut(data, half[str(k)], seed) for k in range(CLUSTERS)] for half in (open_rows, sealed_rows)]
    rows = {k: select_rows(data, labels, k, held) for k in range(CLUSTERS)}
    return World(data, labels, rows, open_rows, *halves)


def uncut(data: PreparedData, rows: np.ndarray, seed: int) -> Probe:
    """A probe of these rows whose captions keep the data's padding, so that probes can be joined."""
    probe = probe_from_rows(Rows(data, rows), seed)
    states, lengths = data.states(rows)
    mask = torch.arange(states.shape[1])[None] < torch.from_numpy(np.array(lengths)).long()[:, None]
    return replace(probe, states=torch.from_numpy(np.array(states)).float(), mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# training and spoiling
# ---------------------------------------------------------------------------------------------------------------------


def trained(task: Any, start: dict[str, Tensor] | None = None) -> Iterator[tuple[int, TrainState]]:
    """The state after every step of the task's schedule; `start` are weights to begin from."""
    state = TrainState(task, torch.device("cpu"))
    if start is not None:
        state.model.load_state_dict(start)
        state.ema.load_state_dict(start)
    for step in range(1, task.recipe.train.steps + 1):
        state.take_step(torch.float32)
        yield step, state


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def at_shares(task: Any) -> dict[str, dict[str, Tensor]]:
    """EMA weights ("ema 5 %" ...) and raw weights ("raw 5 %" ...) along one training."""
    steps = {max(1, round(share * task.recipe.train.steps)): share for share in SHARES}
    found = {}
    for step, state in trained(task):
        if step in steps:
            found[f"ema {steps[step]:.0%}"] = weights(state.ema)
            found[f"raw {steps[step]:.0%}"] = weights(state.model)
    return found


def with_noise(sound: dict[str, Tensor], level: float, seed: int) -> dict[str, Tensor]:
    """Every tensor plus `level` times its own standard deviation of normal noise."""
    dice = torch.Generator().manual_seed(seed)
    return {
        name: tensor + level * tensor.std(correction=0) * torch.randn(tensor.shape, generator=dice)
        for name, tensor in sound.items()
    }


def mean_picture_loss(train: Tensor, probe: Probe) -> float:
    """Loss of always guessing x_0 = the cluster's mean picture."""
    mean = train.mean(0, keepdim=True)
    total = 0.0
    for rows, x, t, noise in probe.noised():
        said = (x - mean) / t[:, None, None, None]
        total += float((said - velocity_target(probe.x0[rows], noise)).double().square().sum())
    return total / (probe.x0.numel() * len(probe.times))


def with_weights(recipe: Recipe, values: dict[str, Tensor]) -> Expert:
    model = seeded(Expert, recipe.model, 0)
    assert isinstance(model, Expert)
    model.load_state_dict(values)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# the experiment
# ---------------------------------------------------------------------------------------------------------------------


def experts(world: World, recipe: Recipe, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Losses on the open and the sealed half by variant and cluster, the bars, the K x K table, reproducibility."""
    bars: list[dict[str, float]] = []
    losses: dict[str, dict[int, tuple[float, float]]] = {}
    final: dict[int, dict[str, Tensor]] = {}

    def judge(variant: str, cluster: int, model: nn.Module) -> None:
        both = tuple(expert_probe_loss(model, half[cluster]) for half in (world.open, world.sealed))
        losses.setdefault(variant, {})[cluster] = both  # type: ignore[assignment]

    for cluster in range(CLUSTERS):
        rows = Rows(world.data, world.rows[cluster])
        probe = world.open[cluster]
        bars.append({"resumable": resumable_bar(recipe, probe), "assemblable": assemblable_bar(rows, probe, seed)})
        train = rows.batch(np.arange(min(512, len(rows)))).x0
        losses.setdefault("mean picture", {})[cluster] = (
            mean_picture_loss(train, probe),
            mean_picture_loss(train, world.sealed[cluster]),
        )
        losses.setdefault("scalar predictor", {})[cluster] = (
            assemblable_bar(rows, probe, seed),
            assemblable_bar(rows, world.sealed[cluster], seed),
        )
        judge("untrained", cluster, build_expert(recipe))
        zero = {name: torch.zeros_like(tensor) for name, tensor in weights(build_expert(recipe)).items()}
        judge("zero weights", cluster, with_weights(recipe, zero))
        for variant, values in at_shares(ExpertTask(recipe, rows, probe)).items():
            judge(variant, cluster, with_weights(recipe, values))
            if variant == "ema 100%":
                final[cluster] = values
        for level in NOISE:
            judge(f"noise {level:g}", cluster, with_weights(recipe, with_noise(final[cluster], level, seed)))
        say(f"cluster {cluster}: " + ", ".join(f"{name} {of[cluster][0]:.4f}" for name, of in losses.items()))

    cross = [
        [expert_probe_loss(with_weights(recipe, final[k]), world.open[j]) for j in range(CLUSTERS)]
        for k in range(CLUSTERS)
    ]
    for j in range(CLUSTERS):
        others = [(cross[k][j], k) for k in range(CLUSTERS) if k != j]
        judge("another cluster's expert (best)", j, with_weights(recipe, final[min(others)[1]]))
    say("another cluster's expert done")

    shuffled = Rows(OtherCaptions(world.data, seed), world.rows[0])
    for variant, values in at_shares(ExpertTask(recipe, shuffled, world.open[0])).items():
        if variant == "ema 100%":
            judge("other rows' captions", 0, with_weights(recipe, values))
    short = recipe.with_train(steps=OVERFIT)
    held = Rows(world.data, world.open_rows["0"])
    for name, start in (("honest, then the open half", final[0]), ("the open half alone", None)):
        for step, state in trained(ExpertTask(short, held, world.open[0]), start):
            if step in (OVERFIT // 3, OVERFIT):
                judge(f"{name}, {step} steps", 0, state.ema)
    say("cheats done")
    return {
        "bars": bars,
        "losses": losses,
        "cross": cross,
        "same number": reproducibility(with_weights(recipe, final[0]), world.open[0]),
    }


def reproducibility(model: nn.Module, probe: Probe) -> dict[str, float]:
    """Relative differences from the loss at one thread and the usual batch, one figure a change."""
    usual = expert_probe_loss(model, probe)
    found = {}
    for threads in (2, 4):
        torch.set_num_threads(threads)
        found[f"{threads} threads"] = expert_probe_loss(model, probe)
    torch.set_num_threads(1)
    for batch in (1, 5, 17):
        found[f"batches of {batch}"] = expert_probe_loss(model, probe, batch)
    torch.manual_seed(99)
    torch.randn(1000)
    found["another global seed"] = expert_probe_loss(model, probe)
    found["float64 weights and inputs"] = float64_loss(model, probe)
    return {name: abs(loss - usual) / usual for name, loss in found.items()}


@torch.no_grad()
def float64_loss(model: nn.Module, probe: Probe) -> float:
    """The loss with every product in double precision: what float32 rounds."""
    exact = seeded(Expert, model.config, 0).double().eval()  # type: ignore[arg-type]
    exact.load_state_dict(model.state_dict())
    total = 0.0
    for rows, x, t, noise in probe.noised():
        said = exact(x.double(), t.double(), probe.states[rows].double(), probe.mask[rows])
        total += float((said - velocity_target(probe.x0[rows], noise).double()).square().sum())
    return total / (probe.x0.numel() * len(probe.times))


def router(world: World, recipe: RouterRecipe, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The router's losses on both halves by variant, and its bars."""
    halves = [join_probes(half, seed) for half in (world.open, world.sealed)]
    rows = Rows(world.data, np.sort(np.concatenate(list(world.rows.values()))))
    losses: dict[str, tuple[float, ...]] = {}

    def judge(variant: str, model: nn.Module) -> None:
        losses[variant] = tuple(router_probe_loss(model, half) for half in halves)

    def rebuilt(values: dict[str, Tensor]) -> nn.Module:
        model = build_router(recipe)
        model.load_state_dict(values)
        return model

    judge("untrained", build_router(recipe))
    found = at_shares(RouterTask(recipe, rows, world.labels, halves[0]))
    for variant, values in found.items():
        judge(variant, rebuilt(values))
    for level in NOISE:
        judge(f"noise {level:g}", rebuilt(with_noise(found["ema 100%"], level, seed)))
    wrong = np.random.default_rng(seed).permutation(world.labels)
    for variant, values in at_shares(RouterTask(recipe, rows, wrong, halves[0])).items():
        if variant == "ema 100%":
            judge("labels of other rows", rebuilt(values))
    turned = RouterProbe(halves[0].rows, (halves[0].labels + 1) % CLUSTERS)
    losses["clusters named in another order"] = (router_probe_loss(rebuilt(found["ema 100%"]), turned),)
    say("router: " + ", ".join(f"{name} {loss[0]:.4f}" for name, loss in losses.items()))
    bars = {"resumable": router_resumable_bar(recipe, halves[0]), "assemblable": router_assemblable_bar(halves[0])}
    return {"bars": bars, "losses": losses}


# ---------------------------------------------------------------------------------------------------------------------
# tables and the plot
# ---------------------------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> str:
    """The tables as Markdown."""
    bars = result["experts"]["bars"]
    lines = [
        "| variant | " + " | ".join(f"{k}" for k in range(CLUSTERS)) + " | loss / assemblable | resume | assemble |"
    ]
    lines += ["|---" * (CLUSTERS + 4) + "|"]
    for kind in ("resumable", "assemblable"):
        shown = " | ".join(f"{bar[kind]:.4f}" for bar in bars)
        lines.append(f"| *{kind} bar* | {shown} | | | |")
    for variant, by_cluster in result["experts"]["losses"].items():
        shown = " | ".join(_pair(by_cluster.get(k)) for k in range(CLUSTERS))
        ratios = [of[0] / bars[k]["assemblable"] for k, of in by_cluster.items()]
        verdicts = [
            _verdict([of[0] < bars[k][kind] for k, of in by_cluster.items()]) for kind in ("resumable", "assemblable")
        ]
        share = f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else f"{ratios[0]:.2f}"
        lines.append(f"| {variant} | {shown} | {share} | {' | '.join(verdicts)} |")
    lines += [
        "",
        "| expert | " + " | ".join(f"probe {k}" for k in range(CLUSTERS)) + " |",
        "|---" * (CLUSTERS + 1) + "|",
    ]
    lines += [
        f"| {k} | " + " | ".join(f"{loss:.4f}" for loss in row) + " |"
        for k, row in enumerate(result["experts"]["cross"])
    ]
    of_router = result["router"]
    limits = of_router["bars"]
    lines += ["", "| router | open half | sealed half | loss / assemblable | resume | assemble |", "|---" * 6 + "|"]
    for variant, losses in of_router["losses"].items():
        sealed = f"{losses[1]:.4f}" if len(losses) > 1 else ""
        verdicts = [_verdict([losses[0] < limits[kind]]) for kind in ("resumable", "assemblable")]
        share = losses[0] / limits["assemblable"]
        lines.append(f"| {variant} | {losses[0]:.4f} | {sealed} | {share:.2f} | {' | '.join(verdicts)} |")
    lines += ["", "| the same number | relative difference |", "|---|---|"]
    lines += [f"| {name} | {value:.1e} |" for name, value in result["experts"]["same number"].items()]
    return "\n".join(lines)


def _pair(losses: tuple[float, float] | None) -> str:
    return "" if losses is None else f"{losses[0]:.4f} ({losses[1]:.4f})"


def _verdict(passes: list[bool]) -> str:
    return "passes" if all(passes) else "refused" if not any(passes) else f"passes {sum(passes)} of {len(passes)}"


def plot(result: dict[str, Any]) -> str:
    """SVG: the loss of every variant as a share of its cluster's assemblable bar, on a logarithmic axis."""
    bars = result["experts"]["bars"]
    points = {
        variant: [(of[0] / bars[k]["assemblable"], of[1] / bars[k]["assemblable"]) for k, of in by_cluster.items()]
        for variant, by_cluster in result["experts"]["losses"].items()
        if not variant.startswith("raw")
    }
    low, high, left, width, step, top = 0.08, 40.0, 230, 560, 20, 46
    height = top + step * len(points) + 40

    def at(value: float) -> float:
        share = (np.log(min(max(value, low), high)) - np.log(low)) / (np.log(high) - np.log(low))
        return float(left + width * share)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18">probe loss / assemblable bar: filled = open half, ring = sealed half</text>',
    ]
    for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20):
        out.append(
            f'<line x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{top - 12}" y2="{height - 30}" stroke="#dddddd"/>'
        )
        out.append(f'<text x="{at(tick):.1f}" y="{height - 14}" text-anchor="middle">{tick:g}</text>')
    resumable = [bar["resumable"] / bar["assemblable"] for bar in bars]
    left_edge, right_edge = at(min(resumable)), max(at(max(resumable)), at(min(resumable)) + 2)
    out.append(
        f'<rect x="{left_edge:.1f}" y="{top - 12}" width="{right_edge - left_edge:.1f}" height="{height - top - 18}" '
        'fill="#f2c078" opacity="0.6"/>'
    )
    out.append(f'<line x1="{at(1):.1f}" x2="{at(1):.1f}" y1="{top - 12}" y2="{height - 30}" stroke="#c0392b"/>')
    out.append(f'<text x="{at(1) - 4:.1f}" y="{top - 16}" text-anchor="end" fill="#c0392b">assemblable</text>')
    out.append(f'<text x="{right_edge + 4:.1f}" y="{top - 16}" fill="#a86b00">resumable</text>')
    for index, (variant, shares) in enumerate(points.items()):
        y = top + step * index + 8
        out.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{variant}</text>')
        for of_open, of_sealed in shares:
            colour = "#2d7d46" if of_open < 1 else "#c0392b"
            out.append(f'<circle cx="{at(of_sealed):.1f}" cy="{y}" r="5" fill="none" stroke="{colour}"/>')
            out.append(f'<circle cx="{at(of_open):.1f}" cy="{y}" r="3.5" fill="{colour}" opacity="0.75"/>')
    return "\n".join([*out, "</svg>", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of prepared data")
    parser.add_argument("--steps", type=int, default=320, help="steps of an expert (default: 320)")
    parser.add_argument("--router-steps", type=int, default=150, help="steps of the router (default: 150)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for the two files")
    parser.add_argument("--stem", default="bars", help="name of the two files, without ending")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    data = PreparedData.open(arguments.data)
    text = data.manifest["text"]
    shape = {"channels": 3, "resolution": data.resolution, "text_dim": text["dim"]}
    recipe = named_recipe("tiny").with_data(**shape, text_tokens=text["tokens"])
    recipe = recipe.with_train(steps=arguments.steps, seed=arguments.seed)
    router_recipe = named_router_recipe("tiny").with_data(**shape, clusters=CLUSTERS)
    router_recipe = router_recipe.with_train(steps=arguments.router_steps, seed=arguments.seed)

    def say(words: str) -> None:
        print(f"{time.process_time():.0f} CPU s: {words}", file=sys.stderr, flush=True)

    world = world_of(data, arguments.seed)
    say(f"rows to train on {[len(rows) for rows in world.rows.values()]}, probe rows {[len(p) for p in world.open]}")
    result = {
        "router": router(world, router_recipe, arguments.seed, say),
        "experts": experts(world, recipe, arguments.seed, say),
        "steps": arguments.steps,
        "cpu_seconds": round(time.process_time(), 1),
        "torch": torch.__version__,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / f"{arguments.stem}.svg").write_text(plot(result))
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
