"""The plan: bound to its id and its organiser, complete, bounded, and read back equal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas import (
    MAX_PLAN,
    Bars,
    DigestMismatch,
    ExpertVariant,
    FileEntry,
    MalformedRecord,
    Plan,
    Policy,
    RecordError,
    RecordTooLarge,
    SlotSpec,
    TensorSpec,
    Verification,
    WrongKind,
    WrongSigner,
    blake3_hex,
    open_plan,
    seal_plan,
)

TABLE = [TensorSpec(name="w", dtype="F32", shape=(1,))]


def test_round_trip_and_id(world: Any) -> None:
    plan = world.plan(note="kept", files=[FileEntry(name="centroids.npy", length=1, chunks=["a" * 64])])
    data = seal_plan(world.organiser, plan)
    opened = open_plan(data, plan_id=blake3_hex(data))
    assert opened.plan == plan
    assert (opened.plan_id, opened.envelope) == (blake3_hex(data), data)
    assert opened.plan.model_dump()["note"] == "kept"
    assert seal_plan(world.organiser, opened.plan) == data


def test_slots(world: Any) -> None:
    plan = world.plan()
    assert plan.slots == ("0", "1", "2", "router")
    assert all(map(plan.has_slot, plan.slots))
    assert plan.slot_spec("0") is plan.expert
    assert plan.slot_spec("router") is plan.router
    for slot in ("3", "00", "-1", "", "Router", "٠", "1.0", "9" * 50):
        assert not plan.has_slot(slot)
        with pytest.raises(ValueError, match="no slot"):
            plan.slot_spec(slot)


@given(st.integers(1, 40))
def test_every_slot_is_known_and_the_next_is_not(world: Any, clusters: int) -> None:
    bars = {slot: Bars(resumable=1, assemblable=1) for slot in [*map(str, range(clusters)), "router"]}
    plan = world.plan(clusters=clusters, verification=Verification(probe_seed=0, bars=bars))
    assert all(map(plan.has_slot, plan.slots))
    assert not plan.has_slot(str(clusters))


def test_a_variant_says_what_its_slots_are_and_leaves_the_others(world: Any) -> None:
    kind = ExpertVariant(slots=("2", "0"), recipe={"objective": "noise"}, files={"ema.safetensors": TABLE})
    plan = open_plan(seal_plan(world.organiser, world.plan(variants=[kind]))).plan
    assert plan.slot_spec("0") == plan.slot_spec("2") == kind
    assert plan.slot_spec("1") is plan.expert
    assert plan.slot_spec("router") is plan.router


def test_a_plan_without_variants_has_the_bytes_it_always_had(world: Any) -> None:
    plan = world.opened.plan
    assert "variants" not in plan.model_dump()
    assert "variants" not in plan.model_dump_json()
    assert seal_plan(world.organiser, plan) == world.opened.envelope


def test_another_plan_under_this_id_is_refused(world: Any) -> None:
    other = seal_plan(world.organiser, world.plan(seed=8))
    with pytest.raises(DigestMismatch) as caught:
        open_plan(other, plan_id=world.opened.plan_id)
    assert caught.value.rule == "R-PLAN-2"


def test_only_the_organiser_signs(world: Any) -> None:
    with pytest.raises(ValueError, match="cannot be signed"):
        seal_plan(world.alice, world.plan())
    with pytest.raises(WrongSigner):
        open_plan(world.forge(world.alice, "plan", world.plan().model_dump()))
    with pytest.raises(WrongKind):
        open_plan(world.claim().seal(world.alice))


def test_size(world: Any) -> None:
    with pytest.raises(RecordTooLarge) as caught:
        open_plan(b"[" * (MAX_PLAN + 1), plan_id="a" * 64)
    assert caught.value.rule == "R-PLAN-1"
    table = [TensorSpec(name=f"{'n' * 200}{i}", dtype="F32", shape=(1, 2)) for i in range(6000)]
    with pytest.raises(ValueError, match="at most"):
        seal_plan(world.organiser, world.plan(expert=SlotSpec(recipe={}, files={"a.safetensors": table})))
    with pytest.raises(ValueError, match="JSON"):
        world.plan(data={"text": "x" * 70_000})


@given(st.data())
def test_any_changed_bit_is_refused(world: Any, data: st.DataObject) -> None:
    plan = bytearray(world.opened.envelope)
    bit = data.draw(st.integers(0, len(plan) * 8 - 1))
    plan[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RecordError):
        open_plan(bytes(plan))


@given(st.data())
def test_a_replaced_field_gives_a_plan_or_a_refusal(world: Any, data: st.DataObject) -> None:
    kind = ExpertVariant(slots=("1",), recipe={}, files={"ema.safetensors": TABLE})
    values = world.plan(variants=[kind]).model_dump()
    junk = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-3, 2**53 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text("ab0.\x1b", max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["name", "recipe", "files", "x"]), inner, max_size=3)
        ),
        max_leaves=8,
    )
    target: Any = values
    path = data.draw(
        st.sampled_from(
            [(), ("expert",), ("policy",), ("verification",), ("verification", "bars", "0"), ("variants", 0)]
        )
    )
    for step in path:
        target = target[step]
    target[data.draw(st.sampled_from([*target]))] = data.draw(junk)
    try:
        opened = open_plan(world.forge(world.organiser, "plan", values))
    except RecordError:
        return
    assert open_plan(seal_plan(world.organiser, opened.plan)).plan == opened.plan


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "a" * 101),
        ("name", "\x1b[2Jcleared"),
        ("organiser", "me"),
        ("created", 1.5),
        ("clusters", 0),
        ("clusters", 1025),
        ("clusters", True),
        ("clusters", 4),
        ("seed", "7"),
        ("data", []),
        ("admission", "closed"),
        ("router_slot", "anyone"),
        ("files", [{"name": "plan.json", "length": 0, "chunks": []}]),
        ("files", [{"name": "../a", "length": 0, "chunks": []}]),
        ("files", [{"name": "a", "length": 0, "chunks": []}] * 2),
        ("files", [{"name": "a", "length": 1, "chunks": []}]),
        ("files", [{"name": f"f{i}", "length": 0, "chunks": []} for i in range(2049)]),
        ("variants", []),
        ("variants", [{"slots": ["0"], "recipe": {}, "files": {}}]),
        ("variants", [{"slots": [slot], "recipe": {}, "files": {"a.safetensors": []}} for slot in ("0", "0")]),
        ("variants", [{"slots": ["router"], "recipe": {}, "files": {"a.safetensors": []}}]),
        ("variants", [{"slots": ["3"], "recipe": {}, "files": {"a.safetensors": []}}]),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_wrong_values(world: Any, field: str, value: Any) -> None:
    values = {**world.plan().model_dump(), field: value}
    with pytest.raises(MalformedRecord) as caught:
        open_plan(world.forge(world.organiser, "plan", values))
    assert caught.value.rule == "R-PLAN-3"
    with pytest.raises(ValueError, match=r".+"):
        Plan.model_validate(values)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SlotSpec(recipe={}, files={}),
        lambda: SlotSpec(recipe={}, files={"weights.bin": TABLE}),
        lambda: SlotSpec(recipe={}, files={"../w.safetensors": TABLE}),
        lambda: SlotSpec(recipe={}, files={"w.safetensors": TABLE * 2}),
        lambda: SlotSpec(recipe={"x": float("nan")}, files={"w.safetensors": TABLE}),
        lambda: SlotSpec(recipe={"x": object()}, files={"w.safetensors": TABLE}),
        lambda: TensorSpec(name="__metadata__", dtype="F32", shape=(1,)),
        lambda: TensorSpec(name="", dtype="F32", shape=(1,)),
        lambda: TensorSpec(name="w", dtype="F64", shape=(1,)),  # type: ignore[arg-type]
        lambda: TensorSpec(name="w", dtype="F32", shape=(-1,)),
        lambda: TensorSpec(name="w", dtype="F32", shape=(True,)),
        lambda: TensorSpec(name="w", dtype="F32", shape=(2**30, 2**30)),
        lambda: Policy(lease_s=901, checkpoint_every_s=1, first_checkpoint_grace_s=1, checkpoint_cap_bytes=1),
        lambda: Policy(lease_s=0, checkpoint_every_s=1, first_checkpoint_grace_s=1, checkpoint_cap_bytes=1),
        lambda: Verification(probe_seed=1, tolerance=0.0, bars={}),
        lambda: Verification(probe_seed=1, bars={"01": Bars(resumable=1, assemblable=1)}),
    ],
)
def test_parts_that_cannot_be_made(make: Any) -> None:
    with pytest.raises(ValueError, match=r".+"):
        make()


def test_tensor_bytes() -> None:
    assert TensorSpec(name="w", dtype="BF16", shape=(3, 4)).nbytes == 24
    assert TensorSpec(name="w", dtype="I64", shape=()).nbytes == 8
    assert TensorSpec(name="w", dtype="U8", shape=(0, 9)).nbytes == 0
