"""The field types that several records share, and the base of all record models.

Models are frozen, strict (no text for numbers, no bool for int), finite, and keep fields they do not know.
Constructing one with wrong values raises pydantic's ValidationError, which is a ValueError; ``read_model`` turns the
same into a RecordError for a peer's bytes.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from paris_swarm.dht_schemas.canonical import MAX_INT, parse_json
from paris_swarm.dht_schemas.errors import MalformedRecord, described
from paris_swarm.dht_schemas.identity import public_key_bytes

ROUTER = "router"
"""The name of the router's slot; cluster slots are named "0" to "K-1"."""

MAX_CLUSTERS = 1024

_SLOT = re.compile(r"0|[1-9][0-9]{0,3}|router")
_DIGEST = re.compile(r"[0-9a-f]{64}")

# R-REC-12: control and format characters, separators other than the space, private use and non-characters, written
# out: a list taken from a Unicode version would differ from node to node. Blocks reserved for further format
# characters are in it.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\xa0\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u1680\u180e\u2000-\u200f\u2028-\u202f"
    "\u205f-\u206f\u3000\ud800-\uf8ff\ufdd0-\ufdef\ufeff\ufff0-\ufffb\ufffe\uffff\U000110bd\U000110cd"
    "\U00013430-\U0001345f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff\U000f0000-\U0010ffff"
    + "".join(f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(1, 15))
    + "]"
)


class Model(BaseModel):
    """Base of every record. Fields it does not know are kept, not refused (R-ENV-7)."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


M = TypeVar("M", bound=BaseModel)


def read_model(
    kind: type[M], data: bytes, *, error: type[MalformedRecord] = MalformedRecord, rule: str = "R-REC-1"
) -> M:
    """Parse JSON bytes and validate them as ``kind``. Raises MalformedRecord for what is not JSON, ``error`` for a
    wrong shape.
    """
    value = parse_json(data)
    try:
        return kind.model_validate(value)
    except ValidationError as problem:
        raise error(
            described(problem.errors(include_url=False, include_context=False, include_input=False)), rule=rule
        ) from None


def _peer_id(value: str) -> str:
    try:
        public_key_bytes(value)
    except MalformedRecord as error:
        raise ValueError(error.detail) from None
    return value


def _digest(value: str) -> str:
    if not _DIGEST.fullmatch(value):
        raise ValueError("a digest has 64 lower-case hexadecimal characters")
    return value


def _slot(value: str) -> str:
    if not _SLOT.fullmatch(value):
        raise ValueError('a slot is named "0", "1", ... without leading zeros, or "router"')
    return value


def _printable(value: str) -> str:
    # A record's text reaches other people's terminals: no control characters, escape sequences or bidirectional tricks.
    if not is_printable(value):
        raise ValueError("text must be printable")
    return value


def _at_most(limit: int) -> BeforeValidator:
    def check(value: Any) -> Any:
        if isinstance(value, list | tuple | dict) and len(value) > limit:
            raise ValueError(f"{len(value)} items, at most {limit} are allowed")
        return value

    return BeforeValidator(check)


PeerId = Annotated[str, AfterValidator(_peer_id)]
Digest = Annotated[str, AfterValidator(_digest)]
Slot = Annotated[str, AfterValidator(_slot)]
Count = Annotated[int, Field(ge=0, le=MAX_INT)]
"""A number of steps, bytes, or a sequence number."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=10 * 365.25 * 86400, allow_inf_nan=False)]
UnixTime = Annotated[float, Field(gt=0, le=float(MAX_INT), allow_inf_nan=False)]
Token = Annotated[str, Field(max_length=2048)]


def printable(limit: int) -> Any:
    """Validators for a text field of at most ``limit`` printable characters, for use inside ``Annotated``."""
    return (Field(max_length=limit), AfterValidator(_printable))


def array(limit: int) -> Any:
    """Validators for an array of at most ``limit`` items, for use inside ``Annotated``.

    The number is looked at first, and the first wrong item ends the reading: a refusal that kept one error for every
    item would cost hundreds of times the memory of the bytes it refuses.
    """
    return (Field(strict=False, fail_fast=True), _at_most(limit))


def table(limit: int) -> Any:
    """Validators for an object of at most ``limit`` keys, for use inside ``Annotated``."""
    return (_at_most(limit),)


def is_printable(text: str) -> bool:
    """Whether ``text`` is free of what a terminal acts on or does not show; the same in every Unicode version."""
    return _UNPRINTABLE.search(text) is None


def is_peer_id(text: str) -> bool:
    """Whether ``text`` is an Ed25519 peer id in its one spelling."""
    try:
        public_key_bytes(text)
    except MalformedRecord:
        return False
    return True


def is_digest(text: str) -> bool:
    """Whether ``text`` is a BLAKE3 digest in its one spelling."""
    return _DIGEST.fullmatch(text) is not None
