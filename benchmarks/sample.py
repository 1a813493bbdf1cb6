"""What sampling from an ensemble costs beside one dense expert of the same size, in one run.

    python benchmarks/sample.py                # d=384, depth 12, 64 tokens, batch 64, fp32, guidance on; CPU
    python benchmarks/sample.py --quick        # small networks: whether it runs, not what it costs
    python benchmarks/sample.py --precisions   # bf16 and int8 weights as well
    python benchmarks/sample.py --compile      # both sides compiled
    python benchmarks/sample.py --json         # {"top1_vs_dense", "top2_vs_dense", "grouped_vs_loop", "budget2_vs_all"}

Eight experts and a router of a twelfth of an expert's work (the published pair: 26 of 308 GFLOPs), weights on disk in
safetensors, loaded by the code that loads an assembled folder's. Each sample's caption names the experts the router's
logits are to favour, eight samples an expert; the router's own network runs all the same. One *step* is a routing
decision and the velocity of the whole batch. `grouped_vs_loop` is the same Top-1 step against one call for each sample.
`budget2_vs_all` is Top-1 through `router.draw`, several Euler steps, with room for two experts against room for all:
the larger of two figures, with routing that stays (steady) and routing that is another at every step and for every
picture (restless), each against the same with room for all.

Settings take turns within a round, so a machine that is busy for a while slows all of them; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.expert.model import Expert, parameter_count, seeded
from paris_swarm.expert.recipe import ModelConfig
from paris_swarm.router.draw import draw
from paris_swarm.router.ensemble import Decision, Ensemble, NullText
from paris_swarm.router.model import Router
from paris_swarm.router.recipe import RouterConfig
from paris_swarm.router.resident import weight_bytes
from paris_swarm.router.weights import Skeleton, StableShapes, hold, tensors_in_place

EXPERTS = 8
GUIDANCE = 7.5
TOKENS, WIDTH = 77, 768


@dataclass(frozen=True)
class Setting:
    """One size: width, depth, heads, resolution (patch 2); the router's width, depth, heads; pictures a batch."""

    hidden: int
    depth: int
    heads: int
    resolution: int
    router: tuple[int, int, int]
    batch: int
    rounds: int
    steps: int

    def expert(self) -> ModelConfig:
        return ModelConfig(
            channels=4,
            resolution=self.resolution,
            patch=2,
            hidden=self.hidden,
            depth=self.depth,
            heads=self.heads,
            text_dim=WIDTH,
            text_tokens=TOKENS,
            pooled_text=False,
        )

    def router_config(self) -> RouterConfig:
        hidden, depth, heads = self.router
        return RouterConfig(
            clusters=EXPERTS,
            channels=4,
            resolution=self.resolution,
            patch=2,
            hidden=hidden,
            depth=depth,
            heads=heads,
            text_dim=WIDTH,
        )


FULL = Setting(384, 12, 6, 16, (192, 4, 3), batch=64, rounds=5, steps=2)
QUICK = Setting(64, 2, 2, 8, (32, 2, 1), batch=16, rounds=2, steps=2)


# ---------------------------------------------------------------------------------------------------------------------
# the ensemble
# ---------------------------------------------------------------------------------------------------------------------


class NamedByCaption(nn.Module):
    """The router's network runs, then its logits give way to those that each caption asks for.

    The first number of a caption's states names the likeliest expert, the next expert comes second. restless: at every
    step a different one, and each caption, told by its second number, goes its own way.
    """

    def __init__(self, network: nn.Module, restless: bool = False) -> None:
        super().__init__()
        self.network = network
        self.restless = restless

    def forward(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        logits = self.network(x, t, states, mask)  # [B, K]
        first = states[:, 0, 0].round().to(torch.int64)  # [B]
        if self.restless:
            caption = states[:, 0, 1].round().to(torch.int64)  # [B]
            first = caption * 5 + (t * 1009).to(torch.int64) * (1 + caption % 7)
        first = first % EXPERTS
        wanted = torch.zeros_like(logits)
        wanted.scatter_(1, first[:, None], 4.0).scatter_(1, (first[:, None] + 1) % EXPERTS, 3.0)
        return wanted + 0.0 * logits


class OnDisk:
    """Expert weights in files, loaded as `router.folder` does: compared with a digest, then used where they lie."""

    def __init__(self, folder: Path, config: ModelConfig, precision: str, compiled: bool) -> None:
        self._paths = {k: folder / f"expert-{k}.safetensors" for k in range(EXPERTS)}
        self._skeleton = Skeleton(lambda: seeded(Expert, config, 0))
        self._precision, self._compiled = precision, compiled
        self._digests: dict[int, str] = {}
        for k, path in self._paths.items():
            if not path.exists():
                network = seeded(Expert, config, k)
                for name, parameter in network.named_parameters():
                    if not parameter.any():  # zero initial weights would make a quantised and a plain network equal
                        nn.init.normal_(parameter, std=0.02)
                    assert torch.isfinite(parameter).all(), name
                save_file(network.state_dict(), path)
            self._digests[k] = blake3_hex(path.read_bytes())

    def load(self, k: int) -> nn.Module:
        with open(self._paths[k], "rb") as stream:
            data = bytearray(self._paths[k].stat().st_size)
            stream.readinto(data)
        if blake3_hex(data) != self._digests[k]:
            raise RuntimeError(f"{self._paths[k]} was changed")
        network = hold(self._skeleton.filled(tensors_in_place(data)), self._precision)
        return StableShapes(network) if self._compiled else network

    def ensemble(self, router: nn.Module | None, *, experts: int = EXPERTS, budget: int | None = None) -> Ensemble:
        null = NullText(torch.zeros(2, WIDTH), 2)
        loaders = {k: (lambda k=k: self.load(k)) for k in range(experts)}
        return Ensemble(experts, loaders, router, null, memory_budget=budget)


@dataclass(frozen=True)
class Batch:
    """What one step is asked with."""

    x: Tensor
    t: Tensor
    states: Tensor
    mask: Tensor

    @classmethod
    def made(cls, setting: Setting) -> Batch:
        generator = torch.Generator().manual_seed(0)
        count, side = setting.batch, setting.resolution
        states = torch.randn(count, TOKENS, WIDTH, generator=generator)
        states[:, 0, 0] = torch.arange(count) % EXPERTS
        states[:, 0, 1] = torch.arange(count)
        x = torch.randn(count, 4, side, side, generator=generator)
        return cls(x, torch.full((count,), 0.6), states, torch.ones(count, TOKENS, dtype=torch.bool))


def step(ensemble: Ensemble, batch: Batch, strategy: str) -> Tensor:
    """A routing decision and the guided velocity of the whole batch."""
    decision = ensemble.route(batch.x, batch.t, batch.states, batch.mask, strategy=strategy)
    return ensemble.velocity(batch.x, batch.t, batch.states, batch.mask, decision, guidance=GUIDANCE)


def looped(ensemble: Ensemble, batch: Batch) -> Tensor:
    """The same Top-1 step, one call for each sample."""
    decision = ensemble.route(batch.x, batch.t, batch.states, batch.mask, strategy="top-1")
    parts = []
    for row in range(len(batch.x)):
        own = slice(row, row + 1)
        single = Decision(decision.weights[own], decision.redirected[own])
        parts.append(
            ensemble.velocity(batch.x[own], batch.t[own], batch.states[own], batch.mask[own], single, guidance=GUIDANCE)
        )
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------------
# measuring
# ---------------------------------------------------------------------------------------------------------------------


def interleaved(
    settings: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float], *, warm: bool = True
) -> dict[str, float]:
    """Median seconds of each, in turns; one unmeasured call first where `warm`."""
    for call in settings.values() if warm else ():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(rounds):
        for name, call in settings.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def gigaflops(call: Callable[[], object], pictures: int) -> float:
    """Of matrix products and attention, for one picture and step."""
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops() / pictures / 1e9


def run(
    setting: Setting, folder: Path, precisions: tuple[str, ...], compiled: bool, clock: Callable[[], float], warm: bool
) -> dict[str, Any]:
    batch = Batch.made(setting)
    few = Batch.made(replace(setting, batch=EXPERTS))
    network = seeded(Router, setting.router_config(), 0).eval().requires_grad_(False)
    router = NamedByCaption(StableShapes(network) if compiled else network)
    restless = NamedByCaption(router.network, restless=True)
    config = setting.expert()
    held = OnDisk(folder, config, "fp32", compiled)
    dense, everything = held.ensemble(None, experts=1), held.ensemble(router)
    room = 2 * weight_bytes(held.load(0))
    captions = (batch.states, [TOKENS] * setting.batch)

    def drawn(ensemble: Ensemble) -> object:
        shape = (4, setting.resolution, setting.resolution)
        options: dict[str, Any] = {"shape": shape, "steps": setting.steps, "guidance": GUIDANCE}
        return draw(ensemble, *captions, batch=setting.batch, decode=_bytes, **options)

    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: step(dense, batch, "top-1"),
        "top-1": lambda: step(everything, batch, "top-1"),
        "top-2": lambda: step(everything, batch, "top-2"),
        "top-1 loop": lambda: looped(everything, batch),
        "router": lambda: everything.route(batch.x, batch.t, batch.states, batch.mask),
    }
    coarser: dict[str, Callable[[], Any]] = {}
    for precision in precisions:
        other = OnDisk(folder, config, precision, compiled).ensemble(router)
        coarser[f"top-1 {precision}"] = lambda other=other: step(other, batch, "top-1")
    small, small_restless = held.ensemble(router, budget=room), held.ensemble(restless, budget=room)
    all_restless = held.ensemble(restless)
    draws: dict[str, Callable[[], object]] = {
        "draw": lambda: drawn(everything),
        "draw, room for two": lambda: drawn(small),
        "draw, restless": lambda: drawn(all_restless),
        "draw, restless, room for two": lambda: drawn(small_restless),
    }
    with torch.inference_mode():
        plain = step(everything, batch, "top-1")
        loop = looped(everything, batch)
        assert torch.allclose(plain, loop, atol=1e-3), "grouping changed the result"
        quality = {}
        for name, call in coarser.items():
            quality[name.removeprefix("top-1 ")] = float((call() - plain).norm() / plain.norm())
        flops = {
            name: gigaflops(lambda ensemble=ensemble, name=name: step(ensemble, few, name), EXPERTS)
            for name, ensemble in (("top-1", everything), ("top-2", everything), ("full", everything))
            if not compiled
        }
        if not compiled:
            flops["dense"] = gigaflops(lambda: step(dense, few, "top-1"), EXPERTS)
            flops["router"] = gigaflops(lambda: everything.route(few.x, few.t, few.states, few.mask), EXPERTS)
        seconds = interleaved(calls, setting.rounds, clock, warm=warm)
        rounds = max(1, setting.rounds // 2)
        seconds |= interleaved(draws, rounds, clock, warm=warm)
        seconds |= interleaved(coarser, rounds, clock, warm=False)  # asked once already
        loading = interleaved({"loading an expert": lambda: held.load(0)}, 3, clock)
    before = small.resident.loads, small_restless.resident.loads
    calls_made = warm + rounds
    steady = seconds["draw, room for two"] / seconds["draw"]
    drifting = seconds["draw, restless, room for two"] / seconds["draw, restless"]
    return {
        "top1_vs_dense": round(seconds["top-1"] / seconds["dense"], 3),
        "top2_vs_dense": round(seconds["top-2"] / seconds["dense"], 3),
        "grouped_vs_loop": round(seconds["top-1"] / seconds["top-1 loop"], 3),
        "budget2_vs_all": round(max(steady, drifting), 3),
        "detail": {
            "seconds": {name: round(value, 4) for name, value in (seconds | loading).items()},
            "gigaflops_per_picture_and_step": {name: round(value, 3) for name, value in flops.items()},
            "budget2_vs_all": {"steady": round(steady, 3), "restless": round(drifting, 3)},
            "loads_a_draw": {"steady": before[0] / calls_made, "restless": before[1] / calls_made},
            "relative_velocity_error": {name: round(value, 6) for name, value in quality.items()},
            "expert_parameters": parameter_count(seeded(Expert, config, 0)),
            "router_parameters": parameter_count(router.network),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "compiled": compiled,
            "clock": "CPU seconds" if clock is time.process_time else "seconds",
            "rounds": setting.rounds,
            "steps_a_draw": setting.steps,
            "depth": setting.depth,
        },
    }


def _bytes(x: Tensor) -> Tensor:
    return x.clamp(0, 1).mul(255).to(torch.uint8).movedim(1, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small networks: whether it runs, not what it costs")
    parser.add_argument("--precisions", action="store_true", help="bf16 and int8 weights as well")
    parser.add_argument("--compile", action="store_true", help="both sides through torch.compile")
    parser.add_argument(
        "--depth",
        type=int,
        help="experts of fewer layers of the same shapes, and a router in proportion (multiple of 3)",
    )
    parser.add_argument("--rounds", type=int, help="rounds of measuring")
    parser.add_argument("--cpu-seconds", action="store_true", help="for a busy machine; set OMP_NUM_THREADS=1 too")
    parser.add_argument("--cold", action="store_true", help="no unmeasured call first")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    setting = QUICK if options.quick else FULL
    if options.depth:
        router = (setting.router[0], max(1, setting.router[1] * options.depth // setting.depth), setting.router[2])
        setting = replace(setting, depth=options.depth, router=router)
    if options.rounds:
        setting = replace(setting, rounds=options.rounds)
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    with tempfile.TemporaryDirectory(prefix="sample-") as folder:
        precisions = ("bf16", "int8") if options.precisions else ()
        found = run(setting, Path(folder), precisions, options.compile, clock, not options.cold)
    if options.json:
        print(json.dumps(found))
        return
    targets = {"top1_vs_dense": 1.15, "top2_vs_dense": 2.2, "grouped_vs_loop": 0.85, "budget2_vs_all": 1.5}
    for name, target in targets.items():
        print(f"{name:16} {found[name]:.3f}  (target: at most {target})")
    for name, value in found["detail"].items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
