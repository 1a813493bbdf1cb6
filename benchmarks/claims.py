"""Play a swarm on a virtual clock and print what its claims cost, as one JSON object.

    python benchmarks/claims.py --peers 1000 --slots 64 --seed 1 --json
    python benchmarks/claims.py --grid docs/results/claims     every scenario of the report that is not there yet
    python benchmarks/claims.py --plots docs/results/claims    the table and the plots of what is there

duplicate_work: peer-seconds trained on a slot beyond its planned replicas, over all peer-seconds trained, after the
first two leases (standing by is no work). orphan_leases_p99: 99th percentile, over trainers that died, of the leases
until another peer held the slot. records_per_peer_s: stores and reads of DHT keys, per peer and virtual second, after
the first two leases. all_held_s: virtual seconds until every slot was trained (null when it never came to that). More
under "detail". Policy values are the defaults of `paris-swarm init`: lease 300 s, a checkpoint every 600 s, 1,200 s of
grace.

The lane's decisions, the claim policy and the record rules are those that ship (swarm/simulation). Each distinct
envelope is verified once; "verifications" counts what separate peers would have verified, the measured cost of one
beside.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from paris_swarm.swarm.simulation.liars import KINDS
from paris_swarm.swarm.simulation.scenario import Scenario, Simulation
from paris_swarm.swarm.simulation.verifying import verification_s
from paris_swarm.swarm.simulation.world import Faults

FAULTY = Faults(loss=0.05, duplicate=0.02, absent=0.02)
USUAL = Faults(loss=0.01, duplicate=0.01, absent=0.01)
LEASES = {8: 40, 64: 14, 256: 8, 1024: 5}
"""Virtual length of a run: few slots see few deaths."""


def grid() -> dict[str, Scenario]:
    """The scenarios of the report, the cheap ones first."""
    found: dict[str, Scenario] = {}
    for peers in (10, 100, 1000, 10_000):
        for slots in (8, 64, 256, 1024):
            if peers >= slots:
                leases = min(LEASES[slots], 12 if peers == 10_000 else 1000)
                name = f"usual-{peers}-{slots}"
                found[name] = Scenario(peers, slots, seed=1, leases=leases, faults=USUAL, skew_s=1.0)
    for peers, slots in ((100, 16), (1000, 64)):
        plain = Scenario(peers, slots, seed=1, leases=30 if slots < 64 else LEASES[64], faults=USUAL, skew_s=1.0)
        name = f"{peers}-{slots}"
        found[f"perfect-{name}"] = replace(plain, faults=Faults(), skew_s=0.0)
        found[f"loss-{name}"] = replace(plain, faults=FAULTY)
        found[f"parted-{name}"] = replace(plain, parted=(4, 8))
        found[f"liars-{name}"] = replace(plain, liars=0.1, faults=replace(USUAL, early_eviction=True))
        found[f"leaving-{name}"] = replace(plain, leaving=0.5)
        found[f"short-{name}"] = replace(plain, life_leases=4.0)
        found[f"replicas-{name}"] = replace(plain, replicas=2)
    order = sorted(found, key=lambda name: (found[name].slots * found[name].leases, found[name].peers))
    return {name: found[name] for name in order}


def play(scenario: Scenario) -> dict[str, Any]:
    """Run one scenario; adds what the run itself cost."""
    begun = time.process_time()
    figures = Simulation(scenario).run()
    one = verification_s()
    detail = figures["detail"]
    detail["verification_s"] = one
    detail["verification_cpu_share_per_peer"] = detail["verifications_per_peer_s"] * one
    detail["cpu_s"] = round(time.process_time() - begun, 1)
    detail["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    detail["scenario"] = {
        key: value for key, value in vars(scenario).items() if isinstance(value, (int, float, tuple, type(None)))
    } | {"faults": vars(scenario.faults)}
    return figures


def scenario_of(args: argparse.Namespace) -> Scenario:
    """The scenario of the command line."""
    leases = args.leases or min((LEASES[known] for known in LEASES if known >= args.slots), default=5)
    return Scenario(
        args.peers,
        args.slots,
        seed=args.seed,
        leases=leases,
        life_leases=args.life,
        leaving=args.leaving,
        liars=args.liars,
        kinds=tuple(args.kinds.split(",")),
        slow=args.slow,
        grace_s=args.grace,
        checkpoint_every_s=args.checkpoint_every,
        parted=tuple(args.parted) if args.parted else None,
        skew_s=args.skew,
        replicas=args.replicas,
        faults=Faults(loss=args.loss, duplicate=args.duplicate, absent=args.absent, early_eviction=args.early_eviction),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=100)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--leases", type=float, help="virtual length of the run (default: 5 to 40, by slots)")
    parser.add_argument("--life", type=float, default=12.0, help="mean lifetime of a peer, in leases")
    parser.add_argument("--leaving", type=float, default=0.0, help="share of departures that release their slot")
    parser.add_argument("--liars", type=float, default=0.0, help="share of peers that lie, all kinds alike")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of liars, separated by commas")
    parser.add_argument("--slow", type=float, default=0.0, help="share of honest peers whose checkpoints take long")
    parser.add_argument("--parted", type=float, nargs=2, metavar=("FROM", "TO"), help="leases of a partition in halves")
    parser.add_argument("--skew", type=float, default=1.0, help="clocks are off by up to this, seconds")
    parser.add_argument(
        "--grace", type=float, default=1200.0, help="seconds that a claim without a checkpoint protects"
    )
    parser.add_argument("--checkpoint-every", type=float, default=600.0, help="seconds between two checkpoints")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--loss", type=float, default=0.01, help="probability that a message is lost")
    parser.add_argument("--duplicate", type=float, default=0.01, help="probability that a store arrives twice")
    parser.add_argument("--absent", type=float, default=0.01, help="probability that a read misses a replica")
    parser.add_argument("--early-eviction", action="store_true", help="nodes have hivemind's storage fault")
    parser.add_argument("--json", action="store_true", help="one JSON object (otherwise indented)")
    parser.add_argument("--grid", type=Path, metavar="FOLDER", help="play the report's scenarios into FOLDER")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="table and plots of FOLDER")
    args = parser.parse_args()
    if args.plots:
        from claims_report import write_report  # beside this file

        print(write_report(args.plots))
        return 0
    if args.grid:
        args.grid.mkdir(parents=True, exist_ok=True)
        for name, scenario in grid().items():
            path = args.grid / f"{name}.json"
            if not path.exists():
                figures = play(scenario)
                path.write_text(json.dumps(figures, indent=1) + "\n")
                print(name, {key: value for key, value in figures.items() if key != "detail"}, flush=True)
        return 0
    print(json.dumps(play(scenario_of(args)), indent=None if args.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
