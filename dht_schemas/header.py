"""The header of a safetensors file, compared with the plan's table before anything is loaded (safetensors, README,
"Format").

A file is 8 bytes (the header's length, little-endian), the header (JSON: tensor name -> dtype, shape, data_offsets),
then the data. Pure functions of the first bytes: nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paris_swarm.dht_schemas.canonical import parse_json
from paris_swarm.dht_schemas.errors import BadHeader, MalformedRecord, quoted
from paris_swarm.dht_schemas.plan import TensorSpec

MAX_HEADER = 4 * 1024 * 1024
"""Bytes of a header."""


def header_length(first8: bytes) -> int:
    """Length of the JSON header in bytes, from the first 8 bytes of the file. Raises BadHeader beyond MAX_HEADER."""
    if len(first8) < 8:
        raise BadHeader(f"the file has {len(first8)} bytes, not even a header's length", rule="R-HDR-1")
    length = int.from_bytes(first8[:8], "little")
    if not 2 <= length <= MAX_HEADER:
        raise BadHeader(
            f"a header of {length} bytes, at most {MAX_HEADER} are allowed (a safetensors file?)", rule="R-HDR-1"
        )
    return length


def check_safetensors_header(data: bytes, file_length: int, table: Sequence[TensorSpec]) -> None:
    """Check the first ``8 + header_length(data)`` bytes (or more) of a file of ``file_length`` bytes against the
    plan's ``table``.

    The file must hold exactly the tensors of the table, with their dtypes and shapes, their data back to back from
    the first byte after the header to the last byte of the file. Raises BadHeader.
    """
    length = header_length(data)
    if len(data) < 8 + length or file_length < 8 + length:
        raise BadHeader(f"the header says {length} bytes, the file ends before", rule="R-HDR-1")
    try:
        header = parse_json(bytes(data[8 : 8 + length]))
    except MalformedRecord as error:
        raise BadHeader(error.detail, rule="R-HDR-2") from error
    if not isinstance(header, dict) or data[8:9] != b"{":
        raise BadHeader("the header is not a JSON object", rule="R-HDR-2")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BadHeader("__metadata__ is not a table of texts", rule="R-HDR-2")
    wanted = {spec.name: spec for spec in table}
    if header.keys() != wanted.keys():
        missing, extra = wanted.keys() - header.keys(), header.keys() - wanted.keys()
        what = (
            f"tensor {quoted(min(missing))} is missing"
            if missing
            else f"tensor {quoted(min(extra))} is not in the plan's table"
        )
        raise BadHeader(f"{what} ({len(missing)} missing, {len(extra)} extra)", rule="R-HDR-3")
    spans = sorted(_span(spec, header[name]) for name, spec in wanted.items())
    position = 0
    for begin, end in spans:
        if begin != position:
            raise BadHeader(f"tensor data overlap or leave a gap at byte {min(begin, position)}", rule="R-HDR-5")
        position = end
    if position != file_length - 8 - length:
        raise BadHeader(
            f"the tensors have {position} bytes, the file has {file_length - 8 - length} after its header",
            rule="R-HDR-6",
        )


def _span(spec: TensorSpec, entry: Any) -> tuple[int, int]:
    """First and last byte (exclusive) of a tensor's data, after checking its entry."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if len(entry) == 3:
            pass
        case _:
            raise BadHeader(
                f"tensor {quoted(spec.name)} is not described by dtype, shape and data_offsets", rule="R-HDR-2"
            )
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise BadHeader(f"tensor {quoted(spec.name)} has a shape or offsets that are not whole numbers", rule="R-HDR-2")
    if dtype != spec.dtype or tuple(shape) != spec.shape:
        raise BadHeader(
            f"tensor {quoted(spec.name)} is {quoted(dtype)} {quoted(shape)}, not {spec.dtype} {list(spec.shape)}",
            rule="R-HDR-4",
        )
    if end - begin != spec.nbytes:
        raise BadHeader(
            f"tensor {quoted(spec.name)} spans {end - begin} bytes, its dtype and shape need {spec.nbytes}",
            rule="R-HDR-5",
        )
    return begin, end
