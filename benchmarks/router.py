"""Three ways to a router, and what each is worth: from data, from the experts alone, by a head for one more expert.

    paris-swarm prepare dicebear DATA --count 4096 && paris-swarm prepare dicebear FRESH --count 512 --seed 1
    nice -n 10 python benchmarks/router.py DATA FRESH --work WORK --out docs/results --stem router-2026-11

Experts of the demo's recipe on four clusters, drawn as `init` draws them; routers of the demo's recipe. Everything is
judged on FRESH: pictures that no expert and no router has seen, labelled by the plan's centroids. Resumable: what is
trained or drawn in WORK is not done again. One torch thread, about a quarter of an hour. Writes STEM.json (every
figure) and STEM.png (accuracy and calibration); prints the tables of docs/results/router-2026-11.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paris_swarm.cli.planning import choose_probe_rows
from paris_swarm.expert.checkpoint import load_weights
from paris_swarm.expert.data.encoders import EfficientNetLite0
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.model import Expert
from paris_swarm.expert.recipe import Recipe, named_recipe
from paris_swarm.expert.rows import Rows, drop_captions, select_rows
from paris_swarm.expert.task import ExpertTask, build_expert
from paris_swarm.expert.training import DoneReport, TrainJob, train
from paris_swarm.expert.verify import Probe, probe_from_rows
from paris_swarm.router.calibration import REPORT_TIMES, RouterReport, router_report
from paris_swarm.router.calibration_picture import calibration_picture
from paris_swarm.router.draw import draw
from paris_swarm.router.drawn_rows import Drawing, draw_rows, drawn_labels
from paris_swarm.router.ensemble import Ensemble, NullText
from paris_swarm.router.figures import cluster_hits
from paris_swarm.router.heads import HeadInputs, fit_head, head_inputs, joined, with_expert, without_expert
from paris_swarm.router.labelled_rows import LabelledBatch
from paris_swarm.router.model import Router
from paris_swarm.router.partition import nearest, partition
from paris_swarm.router.png import png_bytes
from paris_swarm.router.recipe import RouterRecipe, named_router_recipe
from paris_swarm.router.task import RouterProbe, RouterTask, build_router

CLUSTERS = 4
PROMPTS = 16
"""Prompts a cluster."""
HEAD_BATCHES = 40
SHOWN_TIMES = (0.02, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class World:
    """The data split as `init` splits it, and the fresh rows."""

    data: PreparedData
    labels: np.ndarray
    centroids: np.ndarray
    held: list[bytes]
    open: dict[str, Probe]
    fresh: PreparedData
    fresh_labels: np.ndarray
    judge: RouterProbe


def uncut(data: PreparedData, rows: np.ndarray, seed: int) -> Probe:
    """A probe of these rows whose captions keep the data's padding."""
    probe = probe_from_rows(Rows(data, rows), seed)
    states, lengths = data.states(rows)
    mask = torch.arange(states.shape[1])[None] < torch.from_numpy(np.array(lengths)).long()[:, None]
    return replace(probe, states=torch.from_numpy(np.array(states)).float(), mask=mask)


def world_of(data: PreparedData, fresh: PreparedData, seed: int) -> World:
    """Clusters, both halves of the probe set, and the fresh rows with the cluster of each."""
    found = partition(data.features(), CLUSTERS, seed=seed)
    halves = choose_probe_rows(data, found.labels, CLUSTERS, seed)
    digests = np.asarray(data.digests)
    held = [digests[row].tobytes() for half in halves for rows in half.values() for row in rows]
    seen = {digest.tobytes() for digest in digests}
    if any(digest.tobytes() in seen for digest in np.asarray(fresh.digests)):
        raise ValueError("FRESH shares rows with DATA: prepare it with another --seed")
    labels = nearest(fresh.features(), found.centroids)
    probe = uncut(fresh, np.arange(fresh.count), seed)
    return World(
        data=data,
        labels=found.labels,
        centroids=found.centroids,
        held=held,
        open={slot: uncut(data, rows, seed) for slot, rows in halves[0].items()},
        fresh=fresh,
        fresh_labels=labels,
        judge=RouterProbe(probe, torch.from_numpy(labels.astype(np.int64))),
    )


# ---------------------------------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------------------------------


def trained(task: Any, folder: Path) -> Path:
    """EMA weights after the task's whole schedule; goes on with what lies in `folder`."""
    job = TrainJob(task, folder, device="cpu", precision="fp32", checkpoint_every_s=60.0, keep=1)
    done = next(report for report in train(job) if isinstance(report, DoneReport))
    return done.folder / "ema.safetensors"


def experts_of(world: World, recipe: Recipe, work: Path, seed: int) -> dict[str, Expert]:
    """One expert a cluster."""
    found = {}
    for k in range(CLUSTERS):
        rows = Rows(world.data, select_rows(world.data, world.labels, k, world.held))
        found[str(k)] = build_expert(recipe)
        load_weights(found[str(k)], trained(ExpertTask(recipe, rows, world.open[str(k)]), work / f"expert-{k}"))
        found[str(k)].eval().requires_grad_(False)
    return found


def router_of(
    data: PreparedData, rows: np.ndarray, labels: np.ndarray, recipe: RouterRecipe, probe: Probe, folder: Path
) -> Router:
    """A router of `recipe` on labelled rows. probe: any rows; its loss is not looked at."""
    judge = RouterProbe(probe, torch.zeros(len(probe), dtype=torch.int64))
    model = build_router(recipe)
    load_weights(model, trained(RouterTask(recipe, Rows(data, rows), labels, judge), folder))
    return model.eval().requires_grad_(False)


def renumbered(labels: np.ndarray, gone: int) -> np.ndarray:
    """Labels among the clusters other than `gone`; those of `gone` become -1."""
    return np.where(labels == gone, -1, labels - (labels > gone))


# ---------------------------------------------------------------------------------------------------------------------
# one expert more, one fewer
# ---------------------------------------------------------------------------------------------------------------------


def inputs_for_head(model: Router, rows: Rows, labels: np.ndarray, recipe: RouterRecipe, gone: int) -> HeadInputs:
    """What the trunk of a router without cluster `gone` makes of labelled rows of all clusters."""
    parts, dice = [], torch.Generator().manual_seed(1)
    order = np.random.default_rng(1)
    for _ in range(HEAD_BATCHES):
        positions = order.integers(0, len(rows), recipe.train.batch)
        batch = rows.batch(positions)
        dropped = drop_captions(batch.states, batch.mask, rows.null, recipe.train.condition_dropout, dice)
        marked = torch.from_numpy(labels[rows.rows[positions]].astype(np.int64))
        t = torch.rand(len(positions), generator=dice)
        noise = torch.randn(batch.x0.shape, generator=dice)
        parts.append(head_inputs(model, LabelledBatch(batch.x0, *dropped, marked), gone, t, noise))
    return joined(parts)


def last_is(report_of: Router, gone: int) -> Router:
    """The router with its last head moved to place `gone`, so that it answers in the order of the labels."""
    order = [*range(gone), report_of.config.clusters - 1, *range(gone, report_of.config.clusters - 1)]
    head = report_of.final_layer.linear
    head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    return report_of


def heads(
    world: World, whole: Router, recipe: RouterRecipe, drawn: PreparedData, work: Path, say: Callable[[str], None]
) -> dict[str, list[Any]]:
    """For each cluster: removal and addition by a head against routers trained anew."""
    every = select_rows(world.data, None, None, world.held)
    drawn_by = drawn_labels(drawn.manifest)
    assert drawn_by is not None
    fewer = replace(recipe, model=replace(recipe.model, clusters=CLUSTERS - 1))
    found: dict[str, list[Any]] = {name: [] for name in ("anew, fewer", "head removed", "anew", "head, real rows")}
    found["head, drawn rows"] = []
    for gone in range(CLUSTERS):
        labels = renumbered(world.labels, gone)
        rest = every[labels[every] >= 0]
        folder = work / f"router-without-{gone}-{recipe.model.text}"
        base = router_of(world.data, rest, labels, fewer, world.open["0"], folder)
        left = np.flatnonzero(world.fresh_labels != gone)
        among = RouterProbe(
            uncut(world.fresh, left, world.judge.rows.seed),
            torch.from_numpy(renumbered(world.fresh_labels, gone)[left].astype(np.int64)),
        )
        found["anew, fewer"].append(router_report(base, among))
        found["head removed"].append(router_report(without_expert(whole, gone), among))
        found["anew"].append(router_report(whole, world.judge))
        for name, rows, marks in (
            ("head, real rows", Rows(world.data, every), world.labels),
            ("head, drawn rows", Rows(drawn, np.arange(drawn.count)), drawn_by),
        ):
            begun = time.process_time()
            head = fit_head(inputs_for_head(base, rows, marks, recipe, gone))
            took = time.process_time() - begun
            found[name].append(router_report(last_is(with_expert(base, *head), gone), world.judge))
            say(f"{name} for cluster {gone} ({recipe.model.text}): {took:.1f} CPU s")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# does it follow the prompt?
# ---------------------------------------------------------------------------------------------------------------------


def following(world: World, experts: dict[str, Expert], router: Router, strategy: str, seed: int) -> dict[str, Any]:
    """Prompts of fresh rows: the weight that their own cluster's expert got, and pictures that lie in it."""
    order = [np.flatnonzero(world.fresh_labels == k)[:PROMPTS] for k in range(CLUSTERS)]
    rows = np.concatenate(order)
    labels = world.fresh_labels[rows]
    states, lengths = world.fresh.states(rows)
    null = NullText(torch.from_numpy(np.array(world.fresh.null_states)).float(), world.fresh.null_length)
    ensemble = Ensemble(CLUSTERS, {k: lambda k=k: experts[str(k)] for k in range(CLUSTERS)}, router, null)
    side = world.data.resolution
    pictures = draw(
        ensemble, states, lengths, shape=(3, side, side), strategy=strategy, steps=30, guidance=1.5, seed=seed
    )
    own = pictures.weights[np.arange(len(rows)), :, labels]  # [N, steps]
    hits = cluster_hits(pictures.images, labels, world.centroids, EfficientNetLite0())
    return {"strategy": strategy, "prompts": len(rows), "weight": float(own.mean()), "cluster": float(hits.mean())}


# ---------------------------------------------------------------------------------------------------------------------
# tables
# ---------------------------------------------------------------------------------------------------------------------


def plain(report: RouterReport) -> dict[str, Any]:
    """A report as JSON values of five digits, without the bins of single times."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: short(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [short(part) for part in value]
        return round(value, 5) if isinstance(value, float) else value

    whole = asdict(report)
    for _, figures in whole["by_time"]:
        del figures["bins"]
    found: dict[str, Any] = short(whole)
    return found


def report_lines(reports: dict[str, RouterReport]) -> list[str]:
    """Accuracy by t, then the whole, one line a router."""
    shown = [t for t in REPORT_TIMES if t in SHOWN_TIMES]
    lines = ["| router | " + " | ".join(f"t = {t:g}" for t in shown) + " | all t | ECE | cross-entropy |"]
    lines.append("|---" * (len(shown) + 4) + "|")
    for name, report in reports.items():
        by_time = dict(report.by_time)
        cells = [f"{by_time[t].accuracy:.3f} ({by_time[t].ece:.3f})" for t in shown]
        whole = report.overall
        cells += [f"{whole.accuracy:.3f}", f"{whole.ece:.3f}", f"{whole.cross_entropy:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def head_lines(found: dict[str, dict[str, list[Any]]]) -> list[str]:
    """Mean over the clusters that come or go."""
    lines = ["| router | input | accuracy | at t = 0.8 | ECE | cross-entropy |", "|---" * 6 + "|"]
    for text, by_name in found.items():
        for name, reports in by_name.items():
            figures = [report.overall for report in reports]
            noisy = [dict(report.by_time)[0.8].accuracy for report in reports]
            means = [np.mean([getattr(one, part) for one in figures]) for part in ("accuracy", "ece", "cross_entropy")]
            lines.append(
                f"| {name} | {text} | {means[0]:.3f} | {np.mean(noisy):.3f} | {means[1]:.3f} | {means[2]:.3f} |"
            )
    return lines


def following_lines(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| router | strategy | weight of the prompt's expert | pictures in the prompt's cluster |",
        "|---" * 4 + "|",
    ]
    for name, figures in found.items():
        lines += [f"| {name} | {one['strategy']} | {one['weight']:.3f} | {one['cluster']:.3f} |" for one in figures]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of prepared data")
    parser.add_argument("fresh", type=Path, help="folder of prepared data with another seed")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and drawn rows")
    parser.add_argument("--steps", type=int, default=320, help="steps of an expert (default: 320)")
    parser.add_argument("--router-steps", type=int, default=400, help="steps of a router (default: 400)")
    parser.add_argument("--count", type=int, default=4096, help="rows to draw (default: 4096)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for the two files")
    parser.add_argument("--stem", default="router", help="name of the two files, without ending")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    seed, work = arguments.seed, arguments.work
    data, fresh = PreparedData.open(arguments.data), PreparedData.open(arguments.fresh)
    text = data.manifest["text"]
    shape = {"channels": 3, "resolution": data.resolution, "text_dim": text["dim"]}
    recipe = named_recipe("tiny").with_data(**shape, text_tokens=text["tokens"])
    recipe = recipe.with_train(steps=arguments.steps, seed=seed)
    recipes = {
        name: named_router_recipe(size)
        .with_data(**shape, clusters=CLUSTERS)
        .with_train(steps=arguments.router_steps, seed=seed)
        for name, size in (("pooled", "tiny"), ("blind", "tiny-blind"))
    }

    def say(words: str) -> None:
        print(f"{time.process_time():.0f} CPU s: {words}", file=sys.stderr, flush=True)

    world = world_of(data, fresh, seed)
    say(f"fresh rows by cluster {np.bincount(world.fresh_labels).tolist()}")
    experts = experts_of(world, recipe, work, seed)
    say("experts are there")
    routers: dict[str, Router] = {}
    every = select_rows(data, None, None, world.held)
    for name, of in recipes.items():
        routers[f"data, {name}"] = router_of(data, every, world.labels, of, world.open["0"], work / f"router-{name}")
    say("routers from data are there")
    sizes = tuple((np.bincount(world.labels[every]) * arguments.count // len(every)).tolist())
    for folder, share in (("drawn", 0.25), ("drawn-null", 1.0)):
        if not (work / folder).exists():
            note = Drawing("benchmark", {str(k): "" for k in range(CLUSTERS)}, sizes, seed=seed, null_share=share)
            facts = {"resolution": data.resolution, "channels": 3, "text": text, "features": data.manifest["features"]}
            loaders = {slot: (lambda slot=slot: experts[slot]) for slot in experts}
            for _ in draw_rows(work / folder, note, experts=loaders, captions=world.open, data=facts):
                pass
        say(f"{folder} rows are there")
    drawn = {name: PreparedData.open(work / name) for name in ("drawn", "drawn-null")}
    for name, source, of in (
        ("experts, pooled", "drawn", "pooled"),
        ("experts, pooled, empty captions only", "drawn-null", "pooled"),
        ("experts, blind", "drawn", "blind"),
    ):
        labels = drawn_labels(drawn[source].manifest)
        assert labels is not None
        rows = np.arange(drawn[source].count)
        folder = work / f"router-{source}-{of}"
        routers[name] = router_of(drawn[source], rows, labels, recipes[of], world.open["0"], folder)
    say("routers from the experts are there")

    told = {name: router_report(model, world.judge) for name, model in routers.items()}
    untold = {
        name: router_report(model, world.judge, captions="null") for name, model in routers.items() if "pooled" in name
    }
    exchange = {
        name: heads(world, routers[f"data, {name}"], of, drawn["drawn"], work, say) for name, of in recipes.items()
    }
    follow = {
        name: [following(world, experts, model, strategy, seed) for strategy in ("top-1", "top-2", "full")]
        for name, model in routers.items()
    }
    say("pictures drawn")
    result = {
        "with captions": {name: plain(report) for name, report in told.items()},
        "empty caption": {name: plain(report) for name, report in untold.items()},
        "one expert more or fewer": {
            text: {name: [plain(report) for report in reports] for name, reports in by_name.items()}
            for text, by_name in exchange.items()
        },
        "prompts": follow,
        "cpu_seconds": round(time.process_time(), 1),
        "torch": torch.__version__,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.stem}.json").write_text(json.dumps(result) + "\n")
    (arguments.out / f"{arguments.stem}.png").write_bytes(png_bytes(calibration_picture(told)))
    print("\n".join([*report_lines(told), "", *report_lines(untold), "", *head_lines(exchange), ""]))
    print("\n".join(following_lines(follow)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
