"""Probe losses from files alone: `verify --probe`, other rows, the audit of the bars, and rivals for one slot."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_pictures import draw_folder
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from swarm_processes import Answer, done, verb

from paris_swarm.cli.assembling import Gathered, deciding_record, gather_slots
from paris_swarm.cli.checking import check_weights
from paris_swarm.cli.connect import Connected
from paris_swarm.cli.plan_folder import PlanFolder, open_plan_folder
from paris_swarm.cli.probe_views import GOOD, cross_picture, cross_table, probe_table
from paris_swarm.cli.probing import (
    ProbeReport,
    ProbeRows,
    _problem,
    judge_slots,
    load_slot,
    open_half,
    own_rows,
    sealed_half,
)
from paris_swarm.cli.tasks import build_task
from paris_swarm.cli.verbs.verify import with_open
from paris_swarm.dht_schemas.errors import MalformedRecord
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import build_manifest
from paris_swarm.dht_schemas.plan import Bars, Plan, open_plan, seal_plan
from paris_swarm.dht_schemas.records import Announcement
from paris_swarm.expert.data.shards import PreparedData
from paris_swarm.expert.training import CheckpointReport, TrainJob, train
from paris_swarm.expert.verify import Probe
from paris_swarm.router.folder_writing import SlotSource, write_folder
from paris_swarm.router.lock import open_lock
from paris_swarm.router.png import read_text
from paris_swarm.router.verify import verify_folder
from paris_swarm.swarm.home import Home
from paris_swarm.swarm.memory import MemoryNetwork, MemoryTransport
from paris_swarm.swarm.node import SwarmNode

SLOTS = ("0", "1", "router")


# ---- what is judged -------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """A plan, a checkpoint folder and its true probe loss for every slot. Changed copies go elsewhere."""

    plan: PlanFolder
    sealed: Path
    folders: dict[str, Path] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)

    def source(self, author: Identity, slot: str, folder: Path, announced: float) -> SlotSource:
        manifest, data, root = build_manifest(folder, names_of(folder), slot, meta={"step": 24, "parent": None})
        announcement = Announcement(
            plan=self.plan.plan_id,
            slot=slot,
            author=author.peer_id,
            seq=1,
            step=24,
            parent=None,
            root=root,
            bytes=manifest.total_bytes,
            probe_loss=announced,
        )
        return SlotSource(announcement.seal(author), data, folder / "ema.safetensors")

    def assembled(self, target: Path, **changed: tuple[Path, float]) -> Path:
        """An assembled folder of these checkpoints, some (``slot_0``) replaced by others and what is said of them."""
        sources = []
        for slot in SLOTS:
            folder, said = changed.get(f"slot_{slot}", (self.folders[slot], self.losses[slot]))
            sources.append(self.source(Identity.generate(), slot, folder, said))
        write_folder(
            target,
            identity=Identity.generate(),
            plan=self.plan.opened,
            plan_folder=self.plan.path,
            slots=sources,
            created=1,
        )
        return target


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def trained(plan: Answer, data: Path, room: Path) -> Trained:
    torch.set_num_threads(1)
    opened = open_plan_folder(room / "plan")
    made = Trained(opened, Path(plan.json["sealed_probe"]))
    prepared = PreparedData.open(data)
    for slot in SLOTS:
        job = TrainJob(build_task(opened, prepared, slot), room / "probe" / slot, device="cpu", precision="fp32")
        report = [found for found in train(job) if isinstance(found, CheckpointReport)][-1]
        made.folders[slot], made.losses[slot] = report.folder, report.probe_loss
    return made


@pytest.fixture(scope="module")
def honest(trained: Trained, room: Path) -> Path:
    return trained.assembled(room / "honest")


def altered(source: Path, target: Path, change: float) -> Path:
    """A copy of a checkpoint whose EMA weights are moved by ``change`` times their own spread."""
    shutil.copytree(source, target)
    tensors = load_file(target / "ema.safetensors")
    dice = torch.Generator().manual_seed(1)
    moved = {
        name: tensor + change * tensor.std(correction=0) * torch.randn(tensor.shape, generator=dice)
        for name, tensor in tensors.items()
    }
    save_file(moved, target / "ema.safetensors")
    return target


def loss_of(trained: Trained, slot: str, folder: Path, rows: ProbeRows | None = None) -> float:
    more = [] if rows is None else [rows]
    report = judge_slots(trained.plan, {slot: folder / "ema.safetensors"}, {slot: 0.0}, more)
    measured = report.figures[-1].measured
    assert measured is not None
    return measured


# ---- verify --probe -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["model", "--probe"], ["model", "--probe", "open"]),
        (["--probe", "--json", "model"], ["--probe", "open", "--json", "model"]),
        (["model", "--probe", "rows"], ["model", "--probe", "rows"]),
        (["--probe", "model"], ["--probe", "model"]),
        (["--", "--probe"], ["--", "--probe"]),
        (["--probe=rows", "model"], ["--probe=rows", "model"]),
    ],
)
def test_a_bare_probe_option_means_the_open_half(words: list[str], written: list[str]) -> None:
    assert with_open(words) == written


@pytest.mark.parametrize("order", [0, 1])
def test_every_loss_is_computed_again_from_the_folder_alone(trained: Trained, honest: Path, order: int) -> None:
    words = [[honest, "--probe"], ["--probe", honest]][order]
    report = done(verb("verify", *words, "--json")).json
    assert report["ok"] is True
    figures = {figure["slot"]: figure for figure in report["probe"]["figures"]}
    assert tuple(figures) == SLOTS
    for slot, figure in figures.items():
        assert figure["rows"] == "open"
        assert figure["measured"] == pytest.approx(trained.losses[slot], rel=1e-6)
        bars = trained.plan.opened.plan.verification.bars[slot]
        assert (figure["resumable"], figure["assemblable"]) == (bars.resumable, bars.assemblable)
        assert figure["problem"] is None


def test_people_get_a_table_with_a_verdict(honest: Path) -> None:
    said = done(verb("verify", honest, "--probe")).said
    for word in ("announced", "measured", "resumable", "assemblable", "verdict", "router"):
        assert word in said
    assert "FAILS" not in said


def test_a_lie_about_the_loss_is_refused_with_slot_and_figure(trained: Trained, tmp_path: Path) -> None:
    """The lock is honest about what the author said: only computing it again shows that the author lied."""
    lie = 0.9 * trained.losses["1"]
    model = trained.assembled(tmp_path / "model", slot_1=(trained.folders["1"], lie))
    done(verb("verify", model))
    answer = verb("verify", model, "--probe", "--json")
    assert answer.code == 4
    assert f"slot 1: announced {lie:.6g}, measured {trained.losses['1']:.6g}" in answer.err
    assert answer.json["ok"] is False
    failing = [figure["slot"] for figure in answer.json["probe"]["figures"] if figure["problem"]]
    assert failing == ["1"]


def test_useless_weights_are_refused_by_the_bar(trained: Trained, tmp_path: Path) -> None:
    """An author who says a loss within the tolerance of the truth, just below the bar, gets past the lock alone."""
    useless, level = trained.folders["0"], 0.02
    limit = trained.plan.opened.plan.verification.bars["0"].assemblable
    while (found := loss_of(trained, "0", useless)) < 1.001 * limit:
        level *= 2
        useless = altered(trained.folders["0"], tmp_path / f"useless-{level}", level)
    said = min(found, 0.999 * limit)
    model = trained.assembled(tmp_path / "model", slot_0=(useless, said))
    answer = verb("verify", model, "--probe")
    assert answer.code == 4
    assert f"slot 0: announced {said:.6g}" in answer.err
    assert "FAILS" in answer.said


def test_weights_just_above_the_bar_fail_even_if_the_announced_loss_agrees() -> None:
    bars = Bars(resumable=1.2, assemblable=1.0)
    assert _problem(0.01, "open", 0.995, 1.001, bars, True) == (
        "measured 1.001 on the open half, the assemblable bar is 1 [R-VAL-3]"
    )
    assert _problem(0.01, "open", 0.995, 0.999, bars, True) is None
    assert _problem(0.01, "own", None, 1.1, bars, False) is None
    assert "resumable" in str(_problem(0.01, "own", None, 1.2, bars, False))
    assert "not finite" in str(_problem(0.01, "own", None, float("nan"), bars, True))


def test_nan_in_the_weights_is_named(trained: Trained, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(trained.folders["0"], spoilt)
    tensors = load_file(spoilt / "ema.safetensors")
    tensors["pos_embed"].view(-1)[3] = float("nan")
    save_file(tensors, spoilt / "ema.safetensors")
    model = trained.assembled(tmp_path / "model", slot_0=(spoilt, trained.losses["0"]))
    answer = verb("verify", model, "--probe", "--json")
    assert answer.code == 4
    assert "slot 0: pos_embed" in answer.err
    assert answer.json["probe"]["figures"][0]["measured"] is None


def test_the_cross_table_has_the_own_cluster_on_its_diagonal(trained: Trained, honest: Path, tmp_path: Path) -> None:
    png = tmp_path / "cross.png"
    report = done(verb("verify", honest, "--cross", "--picture", png, "--json")).json["probe"]
    cross = report["cross"]
    assert [len(row) for row in cross] == [2, 2]
    for k in range(2):
        assert cross[k][k] == pytest.approx(trained.losses[str(k)], rel=1e-6)
        assert cross[k][k] < cross[1 - k][k], "each expert is the better one on its own cluster"
    assert read_text(png) == {}, "a PNG"
    assert "Reported, not judged" in done(verb("verify", honest, "--cross")).said


def test_it_needs_no_network_code(honest: Path) -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(["hivemind", "paris_swarm.swarm.node", "paris_swarm.swarm.hivemind_transport"]))
from paris_swarm.cli.app import run
sys.exit(run(["verify", sys.argv[1], "--probe", "--json"]))
"""
    ended = subprocess.run([sys.executable, "-c", code, str(honest)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["ok"] is True


# ---- other rows -----------------------------------------------------------------------------------------------------


def test_the_sealed_half_opens_for_anyone_and_must_be_the_plans(trained: Trained, honest: Path, tmp_path: Path) -> None:
    published = tmp_path / "sealed-probe.safetensors"
    shutil.copyfile(trained.sealed, published)
    report = done(verb("verify", honest, "--sealed", published, "--json")).json
    by_rows = [(figure["slot"], figure["rows"]) for figure in report["probe"]["figures"]]
    assert by_rows == [(slot, rows) for slot in SLOTS for rows in ("open", "sealed")]
    of_zero = [figure for figure in report["probe"]["figures"] if figure["slot"] == "0"]
    assert of_zero[0]["measured"] != of_zero[1]["measured"]
    assert of_zero[1]["assemblable"] == trained.plan.sealed_bars["0"].assemblable, "pinned when the plan was signed"

    bytes_ = bytearray(published.read_bytes())
    bytes_[-1] ^= 1
    published.write_bytes(bytes_)
    answer = verb("verify", honest, "--sealed", published)
    assert answer.code == 4
    assert "is not the sealed half" in answer.err
    assert verb("verify", honest, "--sealed", tmp_path / "nothing").code == 2


@pytest.fixture(scope="module")
def others(room: Path) -> Path:
    """Rows that the organiser never had."""
    draw_folder(room / "others", good=24, bad=False, seed=99)
    done(verb("prepare", room / "others", room / "others-data", "--resolution", 12, "--workers", 1))
    return room / "others-data"


def test_own_rows_judge_too_and_what_is_not_held_out_is_said(
    trained: Trained, honest: Path, data: Path, others: Path
) -> None:
    said = done(verb("verify", honest, "--probe", others)).said
    assert "0 of 24" in said, "the router's rows"
    assert said.count("are not held out by the plan") == 2

    report = done(verb("verify", honest, "--probe", data, "--json")).json["probe"]["figures"]
    own = {figure["slot"]: figure for figure in report if figure["rows"] == "own"}
    held = len(trained.plan.held_out())
    assert own["router"]["held_out"] == held > 0
    assert own["router"]["count"] > held


def test_own_rows_do_not_depend_on_their_order(trained: Trained, others: Path) -> None:
    prepared = PreparedData.open(others)

    class Backwards:
        def __getattr__(self, name: str) -> Any:
            return getattr(prepared, name)

        @property
        def digests(self) -> np.ndarray:
            return np.asarray(prepared.digests)[::-1]

        def features(self) -> np.ndarray:
            return np.asarray(prepared.features())[::-1]

        def pixels(self, rows: np.ndarray) -> np.ndarray:
            return prepared.pixels(prepared.count - 1 - rows)

        def states(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return prepared.states(prepared.count - 1 - rows)

    usual, turned = own_rows(trained.plan, prepared), own_rows(trained.plan, Backwards())  # type: ignore[arg-type]
    assert turned.digest == usual.digest
    assert loss_of(trained, "0", trained.folders["0"], turned) == loss_of(trained, "0", trained.folders["0"], usual)


def test_rows_prepared_otherwise_are_refused(honest: Path, room: Path) -> None:
    draw_folder(room / "larger", good=16, bad=False, seed=5)
    done(verb("prepare", room / "larger", room / "larger-data", "--resolution", 16, "--workers", 1))
    answer = verb("verify", honest, "--probe", room / "larger-data")
    assert answer.code == 2
    assert "resolution" in answer.err


# ---- the plan's bars ------------------------------------------------------------------------------------------------


def test_anyone_can_compute_the_bars_again(trained: Trained, data: Path) -> None:
    folder = trained.plan.path
    found = done(verb("verify", folder, "--probe", "--data", data, "--json")).json["baselines"]
    assert {(bar["slot"], bar["bar"]) for bar in found["bars"]} == {
        (slot, half + bar) for slot in SLOTS for half in ("", "sealed ") for bar in ("resumable", "assemblable")
    }
    assert found["drawn_by_seed"] == {"open": True, "sealed": True}
    assert set(found["unknown_rows"].values()) == {0}
    said = done(verb("verify", folder, "--probe")).said
    assert "pass --data DATA" in said
    assert verb("verify", folder).code == 4, "without --probe an assembled folder is meant"


def resigned(
    trained: Trained,
    target: Path,
    *,
    probe: bytes | None = None,
    sealed: dict[str, float] | None = None,
    **bars: dict[str, float],
) -> Path:
    """The plan folder as a bad organiser would sign it: other bars, or another probe file."""
    from paris_swarm.dht_schemas.manifest import file_entry

    shutil.copytree(trained.plan.path, target)
    if probe is not None:
        (target / "probe.safetensors").write_bytes(probe)
    organiser = Identity.generate()
    plan = json.loads(trained.plan.opened.plan.model_dump_json())
    plan["organiser"] = organiser.peer_id
    for slot, changed in bars.items():
        plan["verification"]["bars"][slot.removeprefix("slot_")] |= changed
    if sealed is not None:
        plan["verification"]["sealed_bars"]["0"] |= sealed
    plan["files"] = [file_entry(target / entry["name"]).model_dump() for entry in plan["files"]]
    envelope = seal_plan(organiser, Plan.model_validate(plan))
    open_plan(envelope)
    (target / "plan.json").write_bytes(envelope)
    return target


def test_a_bar_that_was_not_computed_is_found(trained: Trained, data: Path, tmp_path: Path) -> None:
    lax = resigned(
        trained, tmp_path / "lax", slot_1={"assemblable": 5.0}, slot_0={"resumable": 0.01}, sealed={"assemblable": 7}
    )
    answer = verb("verify", lax, "--probe", "--data", data, "--json")
    assert answer.code == 4
    assert "slot 1: the plan's assemblable bar is 5" in answer.err
    assert "slot 0: the plan's resumable bar is 0.01" in answer.err
    assert "slot 0: the plan's sealed assemblable bar is 7" in answer.err
    assert verb("verify", lax, "--probe").code == 4, "the resumable one is found without data"


def test_probe_rows_that_the_seed_did_not_draw_are_found(trained: Trained, data: Path, tmp_path: Path) -> None:
    """An organiser who knows some training rows by heart puts them into the probe set."""
    from paris_swarm.cli.planning import choose_probe_rows, probe_bytes
    from paris_swarm.router.partition import nearest

    prepared = PreparedData.open(data)
    labels = nearest(prepared.features(), trained.plan.centroids())
    drawn, _ = choose_probe_rows(prepared, labels, 2, trained.plan.opened.plan.seed)
    taken = {int(row) for rows in drawn.values() for row in rows}
    digests = np.asarray(prepared.digests)
    held = set(trained.plan.held_out())
    free = [row for row in np.flatnonzero(labels == 0) if row not in taken and digests[row].tobytes() not in held]
    drawn["0"] = np.array([free[0], *drawn["0"][1:]])
    picked = resigned(trained, tmp_path / "picked", probe=probe_bytes(prepared, drawn))
    answer = verb("verify", picked, "--probe", "--data", data)
    assert answer.code == 4
    assert "1 probe row(s) of slot 0 are no held-out rows" in answer.err
    assert "the open half of the probe set is not what the plan's seed draws" in answer.err


# ---- rivals ---------------------------------------------------------------------------------------------------------


class Swarm:
    """Authors with real files, and an assembler, in a network in memory."""

    def __init__(self, trained: Trained, folder: Path) -> None:
        self.trained, self.folder = trained, folder
        self.network = MemoryNetwork(seed=1)
        self.nodes: list[SwarmNode] = []

    async def node(self, name: str, *, observer: bool = False) -> SwarmNode:
        home = Home(self.folder / name)
        identity = home.identity()
        seeds = await self.nodes[0].transport.addresses() if self.nodes else []
        transport = await MemoryTransport.start(self.network, identity.peer_id, seeds=seeds, observer=observer)
        node = SwarmNode(home, identity, transport, self.trained.plan.opened, observer=observer)
        self.nodes.append(node)
        await node.join()
        return node

    async def author(self, name: str, slot: str, folder: Path, announced: float) -> str:
        """Publish a checkpoint and say this of it; the peer id."""
        node = await self.node(name)
        manifest, data, root = build_manifest(folder, names_of(folder), slot, meta={"step": 24, "parent": None})
        node.store.put_folder(data, folder)
        await node.announce(
            slot, step=24, root=root, parent=None, total_bytes=manifest.total_bytes, probe_loss=announced
        )
        return node.identity.peer_id

    async def gather(self, deciding: ProbeRows | None = None) -> tuple[Gathered, SwarmNode]:
        node = await self.node(f"assembler-{len(self.nodes)}", observer=True)
        here = Connected(node, self.trained.plan, None)  # type: ignore[arg-type]
        with Progress(disable=True) as bars:
            return await gather_slots(here, bars, deciding), node

    async def close(self) -> None:
        await asyncio.gather(*(node.close() for node in self.nodes))


@pytest.fixture
def slightly_worse(trained: Trained, tmp_path: Path) -> Path:
    return altered(trained.folders["0"], tmp_path / "worse", 0.02)


def test_a_lying_rival_is_refused_named_doubted_and_the_next_is_taken(
    trained: Trained, slightly_worse: Path, tmp_path: Path
) -> None:
    async def scene() -> None:
        swarm = Swarm(trained, tmp_path)
        try:
            truth = trained.losses["0"]
            liar = await swarm.author("liar", "0", slightly_worse, 0.5 * truth)
            honest = await swarm.author("honest", "0", trained.folders["0"], truth)
            found, node = await swarm.gather()
            assert found.slots["0"].announcement.author == honest
            assert found.slots["0"].probe_loss == pytest.approx(truth, rel=1e-6)
            assert len(found.refused) == 1
            assert liar[-8:] in found.refused[0]
            assert f"announced {0.5 * truth:.6g}" in found.refused[0]
            assert [candidate.announcement.author for candidate in node.candidates("0")] == [honest], "doubted"
        finally:
            await swarm.close()

    asyncio.run(scene())


def test_of_two_honest_rivals_the_better_one_is_taken_without_fetching_the_other(
    trained: Trained, slightly_worse: Path, tmp_path: Path
) -> None:
    async def scene() -> None:
        swarm = Swarm(trained, tmp_path)
        try:
            worse_loss = loss_of(trained, "0", slightly_worse)
            pairs = sorted([(trained.losses["0"], trained.folders["0"]), (worse_loss, slightly_worse)])
            second = await swarm.author("second", "0", pairs[1][1], pairs[1][0])
            first = await swarm.author("first", "0", pairs[0][1], pairs[0][0])
            found, node = await swarm.gather()
            assert found.slots["0"].announcement.author == first
            assert found.refused == []
            assert second not in node.counters.as_dict()["received"]
        finally:
            await swarm.close()

    asyncio.run(scene())


@pytest.mark.parametrize("kind", ["sealed", "own"])
def test_deciding_rows_overrule_the_announced_loss_and_the_lock_says_so(
    trained: Trained, others: Path, tmp_path: Path, kind: str
) -> None:
    """An author whose weights fit the open half and nothing else wins by the announced loss, not on rows he lacked."""
    rows = sealed_half(trained.plan, trained.sealed)
    if kind == "own":
        rows = own_rows(trained.plan, PreparedData.open(others))
    cheat = fitted_to_the_open_half(trained, rows, tmp_path / "cheat")
    open_loss, other_loss = loss_of(trained, "0", cheat), loss_of(trained, "0", cheat, rows)
    assert open_loss < trained.losses["0"]
    assert other_loss > loss_of(trained, "0", trained.folders["0"], rows)

    async def scene() -> tuple[Gathered, str, str]:
        swarm = Swarm(trained, tmp_path)
        try:
            cheater = await swarm.author("cheater", "0", cheat, open_loss)
            honest = await swarm.author("honest", "0", trained.folders["0"], trained.losses["0"])
            usual, _ = await swarm.gather()
            assert usual.slots["0"].announcement.author == cheater, "the open half alone does not see it"
            return (await swarm.gather(rows))[0], cheater, honest
        finally:
            await swarm.close()

    found, cheater, honest = asyncio.run(scene())
    assert found.slots["0"].announcement.author == honest
    assert [rival.announcement.author for rival in found.rivals["0"]] == [honest, cheater]

    model = tmp_path / "model"
    deciding = deciding_record(found, rows)
    write_folder(
        model,
        identity=Identity.generate(),
        plan=trained.plan.opened,
        plan_folder=trained.plan.path,
        slots=[found.slots["0"].source],
        created=1,
        deciding=deciding,
    )
    lock = verify_folder(model).lock
    assert lock.deciding is not None
    assert (lock.deciding.rows, lock.deciding.digest) == (kind, rows.digest)
    assert [rival.author for rival in lock.deciding.measured["0"]] == [honest, cheater]
    card = (model / "README.md").read_text()
    assert cheater in card
    assert "loss on these rows" in card
    again = ["--sealed", trained.sealed] if kind == "sealed" else ["--probe", others]
    figures = done(verb("verify", model, *again, "--json")).json["probe"]["figures"]
    assert figures[1]["announced"] == pytest.approx(figures[1]["measured"], rel=1e-6), "what the lock says of it"


def fitted_to_the_open_half(trained: Trained, rows: ProbeRows, target: Path) -> Path:
    """Honest weights, moved a little so that the open half's loss falls and that of ``rows`` rises."""
    shutil.copytree(trained.folders["0"], target)
    model = load_slot(trained.plan, "0", target / "ema.safetensors")
    weights = list(model.parameters())
    for _ in range(4):
        down, up = (
            torch.autograd.grad(loss(model, probe), weights)
            for probe in (open_half(trained.plan, "0").probes["0"], rows.probes["0"])
        )
        # Unit gradients: a step along their difference lowers the one loss and raises the other.
        lengths = [torch.stack([part.square().sum() for part in parts]).sum().sqrt() for parts in (down, up)]
        with torch.no_grad():
            for weight, less, more in zip(weights, down, up, strict=True):
                weight += 0.03 * (more / lengths[1] - less / lengths[0])
    save_file(model.state_dict(), target / "ema.safetensors")
    return target


def loss(model: torch.nn.Module, probe: Probe) -> torch.Tensor:
    """The probe loss, with gradients."""
    found = [
        (model(x, t, probe.states[rows], probe.mask[rows]) - (noise - probe.x0[rows])).square().mean()
        for rows, x, t, noise in probe.noised()
    ]
    return torch.stack(found).mean()


def test_a_lock_cannot_name_another_winner_than_its_own_figures(trained: Trained, honest: Path) -> None:
    lock = open_lock((honest / "lock.json").read_bytes()).lock
    slot = lock.slots[0]
    rival = {"author": slot.author, "root": slot.root, "loss": 0.5}
    better = {**rival, "root": "0" * 64, "loss": 0.4}
    value = lock.model_dump() | {"deciding": {"rows": "own", "digest": "1" * 64, "measured": {slot.slot: [rival]}}}
    assert type(lock).model_validate(value).deciding is not None
    for order in ([better, rival], [rival, better]):
        value["deciding"]["measured"] = {slot.slot: order}
        with pytest.raises(ValueError, match=r"best (first|on)"):
            type(lock).model_validate(value)


# ---- views ----------------------------------------------------------------------------------------------------------


def test_views_are_pure_and_a_missing_expert_is_a_dash(trained: Trained) -> None:
    report = judge_slots(trained.plan, {"0": trained.folders["0"] / "ema.safetensors"}, {"0": trained.losses["0"]})
    console = Console(width=80, no_color=True, record=True, file=io.StringIO())
    cross = ((0.3, 9.9), (None, None))
    console.print(probe_table(report))
    console.print(cross_table(cross, (0.7, 0.7)))
    text = console.export_text()
    assert "0.3000*" in text
    assert "9.9000*" not in text
    assert [line.split() for line in text.splitlines() if line.split()[:1] == ["1"]] == [["1", "-", "-"]]
    pixels = cross_picture(((0.1, 0.7), (None, 9.0)), (0.7, 0.7))
    colours = {tuple(int(part) for part in colour) for colour in pixels.reshape(-1, 3)}
    assert GOOD in colours
    assert (0xCC, 0xCC, 0xCC) in colours
    assert isinstance(report, ProbeReport)
    assert report.problems == []


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        ({"step": 9999}, "says step 9999"),
        ({"recipe": "a" * 64}, "is of recipe"),
        ({"losses": ["\x1b[2J"]}, "no numbers"),
        ({"losses": [0.5] * 300_000}, "at most 1048576 are read"),
        ({"format": 2}, "has format 2"),
        ("[" * 100_000, "state.json"),
        (None, "has no state.json"),
    ],
)
def test_nobody_continues_from_a_state_that_is_not_the_announced_one(
    trained: Trained, tmp_path: Path, lie: dict[str, object] | str | None, why: str
) -> None:
    """R-VAL-4: the weights are honest, and so is their probe loss; a trainer that believed the file would sign steps
    that nobody trained.
    """
    folder = tmp_path / "lying"
    shutil.copytree(trained.folders["0"], folder)
    state = json.loads((folder / "state.json").read_bytes())
    source = trained.source(Identity.generate(), "0", trained.folders["0"], trained.losses["0"])
    announcement = Announcement.open(source.announcement).record.model_copy(update={"step": state["step"]})
    check_weights(trained.plan, "0", folder, announcement, "resume")
    match lie:
        case dict():
            (folder / "state.json").write_text(json.dumps({**state, **lie}))
        case str():
            (folder / "state.json").write_text(lie)
        case None:
            (folder / "state.json").unlink()
    with pytest.raises(MalformedRecord, match=re.escape(why)) as caught:
        check_weights(trained.plan, "0", folder, announcement, "resume")
    assert caught.value.rule == "R-VAL-4"
    check_weights(trained.plan, "0", folder, announcement, "assemble")
