"""The model card of an assembled folder: written from the plan and the lock, nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from paris_swarm.dht_schemas.fields import ROUTER
from paris_swarm.dht_schemas.plan import OpenedPlan, SlotSpec
from paris_swarm.router.layout import EMA_FILE, TRAINED_ON, expert_kind
from paris_swarm.router.lock import Deciding, LockedSlot

_USE = """\
With diffusers (0.42.1 was tried), torch and transformers, and nothing else. It runs `pipeline.py` and
`ddm_components.py` of this folder, which is why it asks for trust: verify first (it says too whether they are
what paris-swarm writes, for a signature alone does not say what code does).

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(".", trust_remote_code=True)
drawn = pipe("...", strategy="top-1", num_inference_steps=50, seed=0)
drawn.images[0].save("picture.png")  # says in its text chunks where it comes from
```

With paris-swarm, which runs its own code instead of the folder's and needs no such trust
(`paris_swarm.router.diffusers_folder.load_pipeline(".")` gives the same pipeline):

```sh
paris-swarm verify .                                   # offline; names every file that is not as it was signed
paris-swarm sample . --prompt "..." -n 4 -o grid.png   # loads nothing that does not verify
```"""

_METHOD = """\
The training data were split into {k} clusters. Each expert learned the flow of one cluster
(x_t = (1 - t) x_0 + t eps, v = eps - x_0) with {objective}, in isolation: no gradient, parameter or
activation was exchanged while training. The router says which expert's velocity counts for a sample at a step
(Decentralized Diffusion Models, arXiv 2501.05450; Paris, arXiv 2510.03434).

Strategies: `top-1` (the likeliest expert), `top-2` ... `top-{k}` (the likeliest, renormalised), `full` (all),
`threshold-TAU`, `adaptive` (as many as the router is in doubt about), `sample` and `nucleus-P` (one, drawn)."""

_STUDENT = """\
The training data were split into {k} clusters, and an expert was trained on each. This student is one network that
learned, for pictures of every cluster, the velocity that the expert of the picture's own cluster says
(Decentralized Diffusion Models, arXiv 2501.05450, section 4.6; x_t = (1 - t) x_0 + t eps, v = eps - x_0). It has no
router, and every strategy is the same. It learned from {rows}."""

LICENCES = {
    "CC0": "cc0-1.0",
    "CC0 1.0": "cc0-1.0",
    "CC0-1.0": "cc0-1.0",
    "CC-BY-4.0": "cc-by-4.0",
    "CC BY 4.0": "cc-by-4.0",
    "MIT": "mit",
    "Apache-2.0": "apache-2.0",
}
"""How model hubs write a licence."""


_SHAPE = ("hidden", "depth", "patch")


def model_card(
    plan: OpenedPlan,
    slots: Sequence[LockedSlot],
    missing: Sequence[str],
    *,
    assembler: str,
    figures: Mapping[str, str],
    deciding: Deciding | None = None,
) -> str:
    """README.md as text. Values that come from other people are quoted, so none of them can add markup."""
    front = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusion", "flow-matching", "multi-expert", "decentralized", "paris-swarm"],
        **_licence(plan.plan.data.get("licences")),
    }
    taught = _taught(plan)
    sections = [
        "---\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()) + "\n---",
        f"# {_plain(plan.plan.name)}",
        "An ensemble of diffusion experts, each trained by one peer on its own cluster of the data, assembled from "
        "checkpoints that were verified against their authors' signatures."
        if taught is None
        else "One dense diffusion model, by the word of its organiser distilled from the experts of an ensemble, which "
        "are named below. What was verified is the checkpoint, not how it was made.",
        "## Use\n\n" + _USE,
        "## Who trained what\n\n" + _slot_table(plan, slots),
    ]
    if plan.plan.variants:
        sections.append("## Kinds of experts\n\n" + _kinds(plan))
    if deciding is not None:
        sections.append("## Who else could have\n\n" + _rivals(deciding))
    if missing:
        named = ", ".join("the router" if slot == ROUTER else f"expert {slot}" for slot in missing)
        sections.append(
            f"**Missing: {named}.** `paris-swarm sample` refuses unless missing experts are allowed; diffusers draws "
            "with what is here, and never without the router. Pictures then say what is missing, and how much of the "
            "router's weight went elsewhere."
        )
    sections += [
        "## Method\n\n" + (taught or _METHOD.format(k=plan.plan.clusters, objective=_objective(plan))),
        "## Data\n\n" + _data(plan),
    ]
    if figures:
        rows = "\n".join(f"| {_plain(name)} | {_plain(value)} |" for name, value in figures.items())
        sections.append("## Figures\n\n| figure | value |\n|---|---|\n" + rows)
    sections += [
        "## Provenance\n\n"
        f"- plan `{plan.plan_id}`\n"
        f"- organiser `{plan.plan.organiser}`\n"
        f"- assembler `{assembler}` (signed `lock.json`)\n\n"
        "`plan.json` and `records/` hold the signed envelopes, `manifests/` the digests they commit to; the weights "
        "are the announced `ema.safetensors`, byte for byte.",
        "## Limits\n\n"
        "The signatures say who published what, not that it is good: quality rests on the probe losses above, which "
        "were recomputed when the folder was assembled. The pictures can be no better, and no less biased, than the "
        "data.",
    ]
    return "\n\n".join(sections) + "\n"


def _taught(plan: OpenedPlan) -> str | None:
    """How a student was distilled, and the roots of its teachers, as its plan says; None for any other plan."""
    said = plan.plan.data.get("distilled")
    if not isinstance(said, Mapping) or plan.plan.clusters != 1:
        return None
    teachers, rows = said.get("teachers"), said.get("rows")
    named = teachers if isinstance(teachers, Mapping) else {}
    drawn = isinstance(rows, Mapping) and rows.get("drawn") is True
    count = _plain(str(rows.get("count"))) if isinstance(rows, Mapping) else "some"
    learned = f"{count} pictures that the experts drew" if drawn else f"{count} of the rows"
    lines = [
        _STUDENT.format(k=len(named) or "several", rows=learned),
        "",
        f"The experts are those of assembly `{_plain(str(said.get('assembly')))}` of plan "
        f"`{_plain(str(said.get('plan')))}`:",
        "",
        "| cluster | checkpoint |",
        "|---|---|",
        *(f"| {_plain(str(cluster))} | `{_plain(str(root))}` |" for cluster, root in named.items()),
    ]
    if not named:  # a student of more teachers than its plan has room to name
        lines = [*lines[:2], lines[2].removesuffix(":") + ", whose lock names them."]
    return "\n".join(lines)


def _licence(named: object) -> dict[str, str]:
    """What the front matter says about the licence: of the data, for nobody asked the peers for another."""
    entries = named if isinstance(named, list | tuple) else []
    names = [each.get("name") if isinstance(each, Mapping) else each for each in entries]
    licences = sorted({str(name) for name in names if name})
    if len(licences) == 1 and licences[0] in LICENCES:
        return {"license": LICENCES[licences[0]]}
    if licences:
        return {"license": "other", "license_name": _plain(", ".join(licences))}
    return {}


def _slot_table(plan: OpenedPlan, slots: Sequence[LockedSlot]) -> str:
    rows = ["| slot | peer | steps | probe loss | bar | checkpoint |", "|---|---|---|---|---|---|"]
    for slot in slots:
        bars = plan.plan.verification.bars.get(slot.slot)
        bar = f"{bars.assemblable:.4f}" if bars is not None else ""
        rows.append(
            f"| {slot.slot} | `{slot.author}` | {slot.step} | {slot.probe_loss:.4f} | {bar} | `{slot.root[:16]}` |"
        )
    return "\n".join(rows)


def _objective(plan: OpenedPlan) -> str:
    if plan.plan.variants:
        return "the objective of its kind"
    kind = expert_kind(plan.plan.expert.recipe)
    straight = kind["trained_on"] == TRAINED_ON["flow"] and kind["prediction_type"] != "noise"
    return "flow matching" if straight else f"a network that says {_plain(kind['output'])}"


def _kinds(plan: OpenedPlan) -> str:
    """Which experts are of which size, objective and precision, where the plan has several kinds."""
    groups: dict[int, tuple[SlotSpec, list[str]]] = {}
    for cluster in range(plan.plan.clusters):
        spec = plan.plan.slot_spec(str(cluster))
        groups.setdefault(id(spec), (spec, []))[1].append(str(cluster))
    lines = [
        "Experts differ. Each says what its kind of training teaches; all are asked for the velocity of one straight "
        "path, at the point of their own path that has the same signal-to-noise ratio (Heterogeneous Decentralized "
        "Diffusion Models, arXiv 2603.06741).",
        "",
        "| experts | says | trained on | precision | hidden | depth | patch | numbers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for spec, slots in groups.values():
        kind = expert_kind(spec.recipe)
        model = spec.recipe.get("model")
        shape = [_plain(str(model.get(name, "?") if isinstance(model, Mapping) else "?")) for name in _SHAPE]
        count = sum(math.prod(tensor.shape) for tensor in spec.files.get(EMA_FILE, ()))
        said = [_plain(kind[name]) for name in ("output", "trained_on", "precision")]
        lines.append(f"| {', '.join(slots)} | {' | '.join([*said, *shape])} | {count:,} |")
    return "\n".join(lines)


def _rivals(deciding: Deciding) -> str:
    rows = "the sealed half of the plan's probe set" if deciding.rows == "sealed" else "rows of the assembler's own"
    lines = [
        f"Of the verified checkpoints of a slot, the one with the lowest loss on {rows} was taken "
        f"(digest `{deciding.digest[:16]}`):",
        "",
        "| slot | peer | checkpoint | loss on these rows |",
        "|---|---|---|---|",
    ]
    for slot, rivals in deciding.measured.items():
        lines += [f"| {slot} | `{rival.author}` | `{rival.root[:16]}` | {rival.loss:.4f} |" for rival in rivals]
    return "\n".join(lines)


def _data(plan: OpenedPlan) -> str:
    lines = [
        f"- {_plain(str(name))}: `{json.dumps(value, sort_keys=True, ensure_ascii=True).replace('`', chr(39))[:500]}`"
        for name, value in sorted(plan.plan.data.items())
    ]
    return "\n".join(lines) or "The plan says nothing about them."


def _plain(text: str) -> str:
    """One line of text without anything Markdown, HTML or YAML would act on."""
    return "".join(char if char.isalnum() or char in " .,:;+-_/()%=&'" else "?" for char in text)[:200]
