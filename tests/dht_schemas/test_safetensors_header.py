"""A weights file's header: exactly the plan's tensors, and files that the safetensors library writes pass."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_swarm.dht_schemas import BadHeader, TensorSpec, check_safetensors_header, header_length

TABLE = [
    TensorSpec(name="blocks.0.weight", dtype="F32", shape=(4, 3)),
    TensorSpec(name="bias", dtype="BF16", shape=(5,)),
    TensorSpec(name="step", dtype="I64", shape=()),
    TensorSpec(name="nothing", dtype="U8", shape=(0, 7)),
]
DATA_BYTES = 48 + 10 + 8


def header() -> dict[str, Any]:
    return {
        "blocks.0.weight": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]},
        "bias": {"dtype": "BF16", "shape": [5], "data_offsets": [48, 58]},
        "step": {"dtype": "I64", "shape": [], "data_offsets": [58, 66]},
        "nothing": {"dtype": "U8", "shape": [0, 7], "data_offsets": [66, 66]},
    }


def frame(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def encoded(value: object) -> bytes:
    return frame(json.dumps(value).encode())


def check(value: object, *, extra: int = 0) -> None:
    data = value if isinstance(value, bytes) else encoded(value)
    check_safetensors_header(data, len(data) + DATA_BYTES + extra, TABLE)


def test_good_headers() -> None:
    check(header())
    check({"__metadata__": {"format": "pt"}, **header()})
    check(frame(json.dumps(header()).encode() + b"   "))
    swapped = header()
    swapped["step"]["data_offsets"] = [0, 8]
    swapped["bias"]["data_offsets"] = [8, 18]
    swapped["blocks.0.weight"]["data_offsets"] = [18, 66]
    swapped["nothing"]["data_offsets"] = [8, 8]
    check(swapped)
    assert header_length(encoded(header())[:8]) == len(encoded(header())) - 8


def test_files_written_by_the_safetensors_library_pass() -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save

    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
    table = [
        TensorSpec(name=f"{dtype}.{rank}", dtype=dtype, shape=(3, 2, 5)[:rank])  # type: ignore[arg-type]
        for dtype in names
        for rank in range(4)
    ]
    data = save({spec.name: torch.zeros(spec.shape, dtype=names[spec.dtype]) for spec in table}, {"format": "pt"})
    check_safetensors_header(data, len(data), table)
    check_safetensors_header(data[: 8 + header_length(data)], len(data), table)
    with pytest.raises(BadHeader):
        check_safetensors_header(data, len(data) - 1, table)
    with pytest.raises(BadHeader):
        check_safetensors_header(data, len(data), table[1:])


def change(name: str, field: str, value: Any) -> Callable[[dict[str, Any]], object]:
    def apply(good: dict[str, Any]) -> object:
        good[name][field] = value
        return good

    return apply


def moved(good: dict[str, Any]) -> object:
    """Back to back and covering the file, but one tensor a byte short and the next a byte long."""
    good["blocks.0.weight"]["data_offsets"], good["bias"]["data_offsets"] = [0, 47], [47, 58]
    return good


ATTACKS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "missing tensor": ("R-HDR-3", lambda good: {name: good[name] for name in good if name != "bias"}),
    "extra tensor": ("R-HDR-3", lambda good: {**good, "evil": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
    "renamed tensor": (
        "R-HDR-3",
        lambda good: {**{n: good[n] for n in good if n != "bias"}, "bia\u0455": good["bias"]},
    ),
    "wrong dtype": ("R-HDR-4", change("bias", "dtype", "F16")),
    "unknown dtype": ("R-HDR-4", change("bias", "dtype", "F8_E4M3")),
    "wrong shape": ("R-HDR-4", change("blocks.0.weight", "shape", [3, 4])),
    "flattened": ("R-HDR-4", change("blocks.0.weight", "shape", [12])),
    "shape with a truth value": ("R-HDR-2", change("bias", "shape", [True])),
    "negative shape": ("R-HDR-2", change("bias", "shape", [-5])),
    "shape is text": ("R-HDR-2", change("bias", "shape", "5")),
    "offsets too short": ("R-HDR-5", change("bias", "data_offsets", [48, 57])),
    "offsets reversed": ("R-HDR-5", change("bias", "data_offsets", [58, 48])),
    "offsets negative": ("R-HDR-2", change("bias", "data_offsets", [-10, 0])),
    "offsets of three": ("R-HDR-2", change("bias", "data_offsets", [48, 53, 58])),
    "offsets are fractions": ("R-HDR-2", change("bias", "data_offsets", [48.0, 58.0])),
    "overlap": ("R-HDR-5", change("bias", "data_offsets", [47, 57])),
    "shared bytes": ("R-HDR-5", change("bias", "data_offsets", [0, 10])),
    "bytes moved from one tensor to the next": ("R-HDR-5", lambda good: moved(good)),
    "gap": ("R-HDR-5", change("step", "data_offsets", [59, 67])),
    "not from the first byte": ("R-HDR-5", change("blocks.0.weight", "data_offsets", [1, 49])),
    "empty tensor in the middle of another": ("R-HDR-5", change("nothing", "data_offsets", [50, 50])),
    "field missing": ("R-HDR-2", lambda good: {**good, "bias": {"dtype": "BF16", "shape": [5]}}),
    "field added": ("R-HDR-2", change("bias", "note", 1)),
    "entry is a list": ("R-HDR-2", lambda good: {**good, "bias": []}),
    "metadata of numbers": ("R-HDR-2", lambda good: {**good, "__metadata__": {"a": 1}}),
    "metadata is text": ("R-HDR-2", lambda good: {**good, "__metadata__": "a"}),
    "list": ("R-HDR-2", lambda good: [good]),
    "number": ("R-HDR-2", lambda good: 12),
    "twice named": ("R-HDR-2", lambda good: frame(json.dumps(good).encode()[:-1] + b',"bias":{}}')),
    "leading spaces": ("R-HDR-2", lambda good: frame(b"  " + json.dumps(good).encode())),
    "not json": ("R-HDR-2", lambda good: frame(b"{]")),
    "deep": ("R-HDR-2", lambda good: frame(b'{"a":' + b"[" * 100_000)),
    "huge offset": ("R-HDR-2", lambda good: frame(b'{"a":' + b"9" * 50_000 + b"}")),
    "header of 100 MB": ("R-HDR-1", lambda good: (100_000_000).to_bytes(8, "little") + b"{" * 64),
    "header of 2**63": ("R-HDR-1", lambda good: b"\xff" * 8 + b"{}"),
    "empty header": ("R-HDR-1", lambda good: bytes(8)),
    "header beyond the file": ("R-HDR-1", lambda good: encoded(good)[:-1]),
    "pickle renamed": ("R-HDR-1", lambda good: b"\x80\x04\x95\x1d\x00\x00\x00\x00" + b"\x00\x00\x00cposix\nsystem"),
    "zip (torch.save) renamed": ("R-HDR-1", lambda good: b"PK\x03\x04\x00\x00\x08\x08" + bytes(64)),
    "seven bytes": ("R-HDR-1", lambda good: bytes(7)),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str) -> None:
    rule, make = ATTACKS[name]
    with pytest.raises(BadHeader) as caught:
        check(make(header()))
    assert caught.value.rule == rule
    assert str(caught.value).isprintable()


def test_a_length_cut_short_is_no_length() -> None:
    with pytest.raises(BadHeader):
        header_length(b"\x10\x00\x00")


@pytest.mark.parametrize("extra", [-1, 1, 10**12])
def test_bytes_that_no_tensor_covers(extra: int) -> None:
    with pytest.raises(BadHeader) as caught:
        check(header(), extra=extra)
    assert caught.value.rule == "R-HDR-6"


@given(st.binary(max_size=200), st.integers(0, 2**63))
def test_arbitrary_files(data: bytes, length: int) -> None:
    with pytest.raises(BadHeader):
        check_safetensors_header(data, length, TABLE)
    with pytest.raises(BadHeader):
        check_safetensors_header(frame(data), len(data) + 8 + DATA_BYTES, TABLE)


@given(st.data())
def test_a_replaced_value_passes_only_when_equal(data: st.DataObject) -> None:
    good = header()
    name = data.draw(st.sampled_from(sorted(good)))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    value = data.draw(
        st.none()
        | st.sampled_from(["F32", "BF16", "I64", "U8"])
        | st.lists(st.integers(-1, 70) | st.booleans() | st.none() | st.floats(0, 9), max_size=3)
    )
    same = value == good[name][field] and repr(value) == repr(good[name][field])
    movable = name == "nothing" and field == "data_offsets" and value in ([0, 0], [48, 48], [58, 58], [66, 66])
    good[name][field] = value
    if same:
        check(good)
    elif movable:
        with contextlib.suppress(BadHeader):  # [False, False] equals [0, 0]
            check(good)
    else:
        with pytest.raises(BadHeader):
            check(good)
