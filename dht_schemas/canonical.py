"""JSON as this protocol speaks it: one way to write a value, a strict way to read one.

Writing: UTF-8, keys sorted by code point, no spaces, numbers as Python prints them (floats: the shortest digits that
read back the same). Reading follows I-JSON (RFC 7493): duplicate keys, NaN and infinities, integers beyond 2**53 - 1
and lone surrogates are refused; so is nesting deeper than 32. What can be read can be written, and reads back equal.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from paris_swarm.dht_schemas.errors import MalformedRecord, quoted

MAX_DEPTH = 32
"""Arrays and objects inside one another."""

MAX_INT = 2**53 - 1
"""Integers beyond this are not the same number in every language (RFC 7493 section 2.2)."""

MAX_NUMBER = 64
"""Characters of a number with a fraction or an exponent."""

# Possessive and with an optional end, so that it matches at every quotation mark: linear in time for any input.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_ROUND = bytes.maketrans(b"[{]}", b"(())")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


def canonical_json(obj: object) -> bytes:
    """The one way to write ``obj`` (None, bool, int, finite float, str, list or tuple, dict with str keys).
    ValueError for anything else.
    """
    _check_value(obj, 0)
    try:
        return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode(
            "utf-8"
        )
    except UnicodeEncodeError as error:
        raise ValueError("text with lone surrogates cannot be written as JSON") from error


def parse_json(data: bytes) -> Any:
    """Read a JSON document strictly. Raises MalformedRecord for every input that is not one, and nothing else.

    The caller has capped ``len(data)``; time and memory are linear in it.
    """
    _check_depth(data)
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_pairs,
            parse_int=_bounded_int,
            parse_float=_finite_float,
            parse_constant=_no_constant,
        )
        if b"\\u" in data:  # an escape is the only way to a lone surrogate: the UTF-8 decoder refuses raw ones
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise MalformedRecord("text is not UTF-8, or has lone surrogates", rule="R-ENV-2") from error
    except ValueError as error:
        raise MalformedRecord(f"not JSON: {error}", rule="R-ENV-2") from error
    return value


def _check_depth(data: bytes) -> None:
    """Refuse deep nesting before the parser recurses. Brackets in strings do not count.

    Each round takes the innermost brackets away, one level exactly; brackets that do not match are left to the parser.
    """
    brackets = _STRING.sub(b"", data).translate(_ROUND, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        if not brackets:
            return
        brackets = brackets.replace(b"()", b"")
    if brackets:
        raise MalformedRecord(f"JSON nested deeper than {MAX_DEPTH}, or brackets that do not match", rule="R-ENV-2")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise MalformedRecord(f"JSON key {quoted(key)} appears twice", rule="R-ENV-2")
            seen.add(key)
    return result


def _bounded_int(text: str) -> int:
    value = int(text) if len(text) <= 17 else MAX_INT + 1
    if abs(value) > MAX_INT:
        raise MalformedRecord(f"integer {quoted(text)} is beyond 2**53 - 1", rule="R-ENV-2")
    return value


def _finite_float(text: str) -> float:
    value = float(text) if len(text) <= MAX_NUMBER else math.inf
    if not math.isfinite(value):
        raise MalformedRecord(f"number {quoted(text)} is not finite, or too long", rule="R-ENV-2")
    return value


def _no_constant(text: str) -> NoReturn:
    raise MalformedRecord(f"{text} is not JSON", rule="R-ENV-2")


def _check_value(value: object, depth: int) -> None:
    if value is None or isinstance(value, bool | str):
        return
    if isinstance(value, int):
        if abs(value) > MAX_INT:
            raise ValueError(
                f"integer {value:#x} is beyond 2**53 - 1 and would not read back the same everywhere; store it as text"
            )
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a finite number and JSON cannot hold it")
    elif isinstance(value, dict | list | tuple):
        if depth >= MAX_DEPTH:
            raise ValueError(f"JSON nested deeper than {MAX_DEPTH}")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise ValueError(f"JSON keys are text, not {type(key).__name__}")
        for item in value.values() if isinstance(value, dict) else value:
            _check_value(item, depth + 1)
    else:
        raise ValueError(f"JSON cannot hold {type(value).__name__}")
