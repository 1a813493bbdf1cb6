"""The plan of a student: one cluster, signed by who distils, with probe rows, bars and the names of its teachers.

It is made before the first step, from the teachers' plan and the rows to learn by: what a student must beat is fixed
before anyone knows how good it is, as for every expert.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paris_swarm.cli import plan_folder as files
from paris_swarm.cli.plan_folder import PlanFolder, open_plan_folder
from paris_swarm.cli.tasks import ROUTER, data_facts, expert_recipe
from paris_swarm.dht_schemas.canonical import canonical_json
from paris_swarm.dht_schemas.files import atomic_write
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import file_entry
from paris_swarm.dht_schemas.plan import MAX_FREE_FORM, Bars, Plan, SlotSpec, TensorSpec, Verification, seal_plan

if TYPE_CHECKING:
    from torch import nn

    from paris_swarm.cli.distilling import StudentRows
    from paris_swarm.expert.recipe import Recipe
    from paris_swarm.expert.verify import Probe
    from paris_swarm.router.distill import DistillRecipe

STUDENT = "0"
"""The one slot of a student's plan that has a checkpoint."""


def student_recipe(plan: Plan, *, size: str | None, steps: int | None, batch: int | None, seed: int) -> Recipe:
    """The student's recipe: the first expert's network, or that of a named size, on the straight path.

    batch None: a quarter of what the experts together see a step (Decentralized Diffusion Models, section 4.6); steps
    None: the first expert's. Rates are the experts', or the named size's.

    Raises:
        ValueError: no such size, or one that does not fit the plan's pictures.
    """
    from paris_swarm.expert.recipe import Recipe, named_recipe

    experts = [expert_recipe(plan, str(k)) for k in range(plan.clusters)]
    first = experts[0]
    base = first
    if size is not None:
        channels, resolution, text_dim = first.model.data_shape
        base = named_recipe(size).with_data(
            channels=channels, resolution=resolution, text_dim=text_dim, text_tokens=first.model.text_tokens
        )
    model = base.model if base.model.path == "flow" else replace(base.model, path="flow", output="velocity")
    rows = batch or max(1, sum(expert.train.batch for expert in experts) // 4)
    train = replace(base.train, loss="velocity", seed=seed, batch=rows, steps=steps or first.train.steps)
    return Recipe(model, train)


def usual_start(plan: Plan, student: Recipe) -> str:
    """ "mean" where every expert is of the student's kind (they begin from the same weights, so their mean is worth
    something: docs/results/distill-2026-11.md), else "fresh".
    """
    alike = all(expert_recipe(plan, str(k)).model == student.model for k in range(plan.clusters))
    return "mean" if alike else "fresh"


def student_plan(
    teacher: PlanFolder,
    folder: Path,
    identity: Identity,
    recipe: DistillRecipe,
    learned: StudentRows,
    *,
    assembly: str,
    created: int,
) -> PlanFolder:
    """The student's signed plan folder: opened where it is there, else made, whole or not at all.

    One cluster, whose probe rows are the open halves of all the teachers'; the bars are computed on them as `init`
    does. There is no router, and none is needed.
    """
    if (folder / files.PLAN_FILE).is_file():
        return open_plan_folder(folder)
    import numpy as np
    from safetensors.numpy import save_file

    from paris_swarm.expert.verify import assemblable_bar, resumable_bar

    shutil.rmtree(folder, ignore_errors=True)  # half of one
    folder.mkdir(parents=True)
    of = teacher.opened.plan
    probe = _write_probe(teacher, folder / files.PROBE_FILE)
    centre = teacher.centroids().mean(axis=0, keepdims=True)
    centre /= max(float(np.linalg.norm(centre)), 1e-12)
    save_file({"centroids": centre.astype(np.float32)}, folder / files.CENTROIDS_FILE)
    shutil.copyfile(teacher.path / files.HELD_OUT_FILE, folder / files.HELD_OUT_FILE)

    student = recipe.student
    seed = of.verification.probe_seed
    untrained, scalar = resumable_bar(student, probe), assemblable_bar(learned.rows, probe, seed)
    # Fitted on what poor experts drew, the scalar predictor may be worse than untrained weights.
    bars = Bars(resumable=untrained, assemblable=min(untrained, scalar))
    expert, router = _specs(student, of)
    cap = 2 * sum(tensor.nbytes for table in expert.files.values() for tensor in table) + (1 << 24)
    data = student_data(
        {
            **of.data,
            **({} if learned.drawn else data_facts(learned.data)),
            "partition": {"method": "clusters", "seed": of.seed, "sizes": [len(learned.rows)]},
        },
        {
            "plan": teacher.plan_id,
            "assembly": assembly,
            "start": recipe.start,
            "rows": {"drawn": learned.drawn, "digest": learned.digest, "count": len(learned.rows)},
        },
        recipe.teachers,
    )
    verification = Verification(
        probe_seed=seed,
        tolerance=of.verification.tolerance,
        bars={STUDENT: bars, ROUTER: Bars(resumable=0.0, assemblable=0.0)},  # the entropy of one cluster
    )
    plan = Plan.model_validate(
        {
            "name": f"{of.name}, distilled"[:100],
            "organiser": identity.peer_id,
            "created": created,
            "clusters": 1,
            "seed": student.train.seed,
            "data": data,
            "expert": expert.model_dump(),
            "router": router.model_dump(),
            "policy": {**of.policy.model_dump(), "checkpoint_cap_bytes": cap},
            "admission": "open",
            "verification": {**verification.model_dump(), "probe_times": list(teacher.probe_times)},
            "files": [file_entry(path).model_dump() for path in sorted(folder.iterdir())],
            **{name: value for name, value in (of.model_extra or {}).items() if name == "sampling"},
        }
    )
    atomic_write(folder / files.PLAN_FILE, seal_plan(identity, plan))
    return open_plan_folder(folder)


def student_data(facts: Mapping[str, Any], distilled: Mapping[str, Any], teachers: Mapping[str, str]) -> dict[str, Any]:
    """A student's `data`: what is known of its rows, and whom it learned from, each teacher by its root.

    Some 800 roots fill the field. Then they are left out: the lock of the assembly that is named holds them all.

    Raises:
        ValueError: the facts alone are too large.
    """
    named = {**facts, "distilled": {**distilled, "teachers": dict(teachers)}}
    unnamed = {**facts, "distilled": dict(distilled)}
    for data in (named, unnamed):
        if len(canonical_json(data)) <= MAX_FREE_FORM:
            return data
    raise ValueError(
        f"the teachers' plan says {len(canonical_json(unnamed)):,} bytes of its data, and a student's plan has room "
        f"for {MAX_FREE_FORM:,}: distil a model of another plan, or by rows of your own (--data)"
    )


def _write_probe(teacher: PlanFolder, path: Path) -> Probe:
    """Writes the open halves of all clusters as that of one, and reads them as everybody will."""
    import numpy as np
    from safetensors.numpy import load_file

    from paris_swarm.expert.verify import load_probe, write_probe_set

    held = load_file(teacher.probe_path)
    clusters = range(teacher.opened.plan.clusters)
    pixels, states, lengths = (
        np.concatenate([held[f"{kind}.{k}"] for k in clusters]) for kind in ("pixels", "states", "lengths")
    )
    null_length = int(held["null_length"].reshape(-1)[0])
    write_probe_set(path, {STUDENT: (pixels, states, lengths)}, held["null_states"], null_length)
    return load_probe(path, STUDENT, teacher.opened.plan.verification.probe_seed, teacher.probe_times)


def _specs(student: Recipe, of: Plan) -> tuple[SlotSpec, SlotSpec]:
    """The student's slot, and the router's that every plan has: with one cluster it has nothing to say."""
    from paris_swarm.expert.checkpoint import tensor_table
    from paris_swarm.expert.task import build_expert
    from paris_swarm.router.layout import EMA_FILE
    from paris_swarm.router.recipe import RouterRecipe
    from paris_swarm.router.task import build_router

    router = RouterRecipe.from_dict(of.router.recipe)
    router = replace(router, model=replace(router.model, clusters=1))

    def spec(network: nn.Module, recipe: dict[str, Any]) -> SlotSpec:
        table = tensor_table(network.state_dict())
        tensors = (TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in table)  # type: ignore[arg-type]
        return SlotSpec(recipe=recipe, files={EMA_FILE: tuple(tensors)})

    return spec(build_expert(student), student.to_dict()), spec(build_router(router), router.to_dict())
