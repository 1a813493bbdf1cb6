"""The plan: what a swarm trains, signed by its organiser and named by the BLAKE3 digest of its bytes (the plan id).

``plan.json`` is the envelope. It names everything else by digest: the other files of the plan folder, the tensors of
every checkpoint file, the probe bars. Nothing that decides whether a checkpoint counts lies outside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from paris_swarm.dht_schemas.canonical import MAX_INT, canonical_json
from paris_swarm.dht_schemas.digest import blake3_hex
from paris_swarm.dht_schemas.envelope import payload_type, seal, unseal
from paris_swarm.dht_schemas.errors import DigestMismatch, RecordTooLarge, WrongSigner, quoted
from paris_swarm.dht_schemas.fields import (
    MAX_CLUSTERS,
    ROUTER,
    Count,
    Finite,
    Model,
    PeerId,
    Seconds,
    Slot,
    array,
    is_peer_id,
    printable,
    read_model,
    table,
)
from paris_swarm.dht_schemas.identity import Identity
from paris_swarm.dht_schemas.manifest import FileEntry, FileName, check_unique_names
from paris_swarm.dht_schemas.records import MAX_LEASE_S

MAX_PLAN = 1024 * 1024
"""Bytes of plan.json."""
PLAN_FILE = "plan.json"
MAX_PLAN_FILES = 2048
"""Files of a plan folder beside plan.json."""
MAX_PLAN_BYTES = 1 << 33
"""Bytes of all these files together, 8 GiB: whoever follows an invite fetches them."""
MAX_TENSORS = 65536
"""Tensors of a weights file."""
MAX_CHECKPOINT_BYTES = 1 << 36
"""Bytes of all tensors of a slot's files, 64 GiB: the manifest of a larger checkpoint would not fit its own bound."""
MAX_VARIANTS = 64
"""Kinds of experts beside the one that `expert` describes."""
MAX_FREE_FORM = 64 * 1024
"""Bytes of canonical JSON in a free-form field (``data``, ``recipe``)."""


def _free_form(value: dict[str, Any]) -> dict[str, Any]:
    size = len(canonical_json(value))
    if size > MAX_FREE_FORM:
        raise ValueError(f"{size} bytes of JSON, at most {MAX_FREE_FORM} are allowed")
    return value


FreeForm = Annotated[dict[str, Any], AfterValidator(_free_form)]


def _weights_name(value: str) -> str:
    if not value.endswith(".safetensors"):
        raise ValueError("only .safetensors files hold tensors")
    return value


def _router_slot(value: str) -> str:
    if value != "open" and not is_peer_id(value):
        raise ValueError('router_slot is "open" or a peer id')
    return value


class TensorSpec(Model):
    """One tensor of a safetensors file: name, dtype and shape must be exactly these."""

    name: Annotated[str, Field(min_length=1), *printable(256)]
    dtype: Literal["F32", "F16", "BF16", "I64", "U8"]
    shape: Annotated[tuple[Annotated[int, Field(ge=0, le=2**40)], ...], *array(8)]

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.name == "__metadata__":
            raise ValueError("__metadata__ is not the name of a tensor")
        if self.nbytes > MAX_INT:
            raise ValueError("the tensor has more than 2**53 - 1 bytes")
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        size = ITEM_BYTES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}
"""Bytes of one element, by safetensors dtype."""


class SlotSpec(Model):
    """What is trained in a slot: the recipe, and the table of tensors of every .safetensors file of its checkpoints."""

    recipe: FreeForm
    files: Annotated[
        dict[
            Annotated[FileName, AfterValidator(_weights_name)],
            Annotated[tuple[TensorSpec, ...], *array(MAX_TENSORS)],
        ],
        Field(min_length=1),
        *table(32),
    ]

    @model_validator(mode="after")
    def _unique_tensors(self) -> Self:
        for name, tensors in self.files.items():
            if len({spec.name for spec in tensors}) != len(tensors):
                raise ValueError(f"{name} names a tensor twice")
        return self

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.nbytes > MAX_CHECKPOINT_BYTES:
            raise ValueError(f"a checkpoint would have {self.nbytes} bytes, at most {MAX_CHECKPOINT_BYTES} are allowed")
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of a checkpoint."""
        return sum(spec.nbytes for tensors in self.files.values() for spec in tensors)


class ExpertVariant(SlotSpec):
    """What is trained in some cluster slots instead of ``Plan.expert``: another objective, size or precision."""

    slots: Annotated[tuple[Slot, ...], Field(min_length=1), *array(MAX_CLUSTERS)]


class Policy(Model):
    """Cadence and limits of the swarm."""

    lease_s: Annotated[Seconds, Field(le=MAX_LEASE_S)]
    """Length of a lease in seconds; renewed after a third of it."""
    checkpoint_every_s: Seconds
    first_checkpoint_grace_s: Seconds
    """Seconds that a claim protects its slot before the first verified checkpoint."""
    replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    """Protected claims that a slot may have."""
    slots_per_key: Annotated[int, Field(ge=1, le=MAX_CLUSTERS)] = 1
    """Cluster slots that one key may hold, beside the router."""
    checkpoint_cap_bytes: Annotated[int, Field(ge=1, le=MAX_INT)]


class Bars(Model):
    """Probe losses that a checkpoint must beat (be lower than)."""

    resumable: Finite
    """For a successor to continue from it: the loss of untrained weights."""
    assemblable: Finite
    """For an assembler to use it: the loss of the best scalar predictor (an expert), or the prior's entropy (the
    router).
    """


class Verification(Model):
    """How a checkpoint's probe loss is recomputed and judged."""

    probe_seed: Count
    tolerance: Annotated[Finite, Field(gt=0, le=1)] = 0.01
    """Share by which the recomputed probe loss may differ from the announced one."""
    bars: Annotated[dict[Slot, Bars], *table(MAX_CLUSTERS + 1)]
    """One pair for every slot."""


class Plan(Model):
    """What a swarm trains."""

    name: Annotated[str, Field(min_length=1), *printable(100)]
    organiser: PeerId
    created: Count
    """Unix seconds."""
    clusters: Annotated[int, Field(ge=1, le=MAX_CLUSTERS)]
    seed: Count
    data: FreeForm
    """Source, licences, encoders: for people and for the trainer."""
    expert: SlotSpec
    """Of every cluster slot that no variant names."""
    variants: Annotated[tuple[ExpertVariant, ...], Field(min_length=1), *array(MAX_VARIANTS)] = ()
    """Kinds of experts beside it. A plan without any leaves the field out, as plans did before there was one."""
    router: SlotSpec
    policy: Policy
    admission: Literal["open", "invited"]
    router_slot: Annotated[str, AfterValidator(_router_slot)] = "open"
    """"open", or the peer id of the only key that may train the router."""
    verification: Verification
    files: Annotated[tuple[FileEntry, ...], *array(MAX_PLAN_FILES)] = ()
    """Everything else in the plan folder."""

    @property
    def slots(self) -> tuple[str, ...]:
        """("0", ..., "K-1", "router")."""
        return (*(str(cluster) for cluster in range(self.clusters)), ROUTER)

    def has_slot(self, slot: str) -> bool:
        """Whether the plan has a slot of this name."""
        return slot == ROUTER or (
            slot.isascii()
            and slot.isdigit()
            and len(slot) <= 4
            and str(int(slot)) == slot
            and int(slot) < self.clusters
        )

    def slot_spec(self, slot: str) -> SlotSpec:
        """What is trained in a slot. Raises ValueError for a slot that the plan does not have."""
        if not self.has_slot(slot):
            raise ValueError(f"the plan {self.name!r} has no slot {quoted(slot)}")
        if slot == ROUTER:
            return self.router
        return next((variant for variant in self.variants if slot in variant.slots), self.expert)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_unique_names(self.files)
        if (total := sum(entry.length for entry in self.files)) > MAX_PLAN_BYTES:
            raise ValueError(f"the plan's files have {total} bytes, at most {MAX_PLAN_BYTES} are allowed")
        if any(entry.name == PLAN_FILE for entry in self.files):
            raise ValueError(f"{PLAN_FILE} cannot name itself among its files")
        if set(self.verification.bars) != set(self.slots):
            raise ValueError("verification.bars must have one entry for every slot and no other")
        named = [slot for variant in self.variants for slot in variant.slots]
        if len(set(named)) != len(named):
            raise ValueError("variants name a slot twice")
        if strange := next((slot for slot in named if slot == ROUTER or not self.has_slot(slot)), None):
            raise ValueError(f"variants name {strange}, which is no cluster of the plan")
        return self

    @model_serializer(mode="wrap")
    def _without_empty_variants(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = inner(self)
        if not self.variants:
            values.pop("variants", None)  # so that a plan without variants has the bytes that it always had
        return values


@dataclass(frozen=True, slots=True)
class OpenedPlan:
    """A verified plan."""

    plan: Plan
    plan_id: str
    envelope: bytes
    """The bytes of plan.json."""


def seal_plan(identity: Identity, plan: Plan) -> bytes:
    """Sign a plan and return the bytes of plan.json. Raises ValueError when ``identity`` is not the organiser or the
    plan exceeds MAX_PLAN.
    """
    if identity.peer_id != plan.organiser:
        raise ValueError(f"the plan names {plan.organiser} as organiser and cannot be signed by {identity.peer_id}")
    data = seal(identity, payload_type("plan"), canonical_json(plan.model_dump()))
    if len(data) > MAX_PLAN:
        raise ValueError(
            f"the plan would have {len(data)} bytes, at most {MAX_PLAN} are allowed; shorten its file list or tables"
        )
    return data


def open_plan(data: bytes, *, plan_id: str | None = None) -> OpenedPlan:
    """Verify plan.json, and that it is the plan ``plan_id`` names when given.

    Raises RecordTooLarge, DigestMismatch, MalformedRecord, WrongKind, BadSignature, WrongSigner.
    """
    if len(data) > MAX_PLAN:
        raise RecordTooLarge(f"a plan of {len(data)} bytes, at most {MAX_PLAN} are allowed", rule="R-PLAN-1")
    found = blake3_hex(data)
    if plan_id is not None and found != plan_id:
        raise DigestMismatch(f"the plan has id {found}, not {quoted(plan_id, 70)}", rule="R-PLAN-2")
    sealed = unseal(data, payload_type("plan"), max_bytes=MAX_PLAN)
    plan = read_model(Plan, sealed.payload, rule="R-PLAN-3")
    if plan.organiser != sealed.signer:
        raise WrongSigner(f"the plan names {plan.organiser} as organiser, signed by {sealed.signer}", rule="R-PLAN-4")
    return OpenedPlan(plan, found, bytes(data))
