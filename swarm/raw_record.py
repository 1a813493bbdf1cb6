"""A record as a DHT node hands it over, before anything in it is believed: msgpack of anybody's making."""

from __future__ import annotations

import logging
import math

import msgpack  # type: ignore[import-untyped]

from paris_swarm.dht_schemas.errors import RecordError
from paris_swarm.swarm.transport import RecordCheck

log = logging.getLogger(__name__)

MAX_RAW_RECORD = 8192
"""Bytes of a packed value before it is decoded; the records themselves are at most 4 KiB."""
_MAX_RAW_SUBKEY = 256


def passes(check: RecordCheck, key: bytes, subkey: bytes, value: object, expiration: object) -> bool:
    """Whether it is a str subkey with bytes, of bounded size and finite expiration, that ``check`` lets pass.

    Args:
        key: 20 bytes, the DHT's id of the key. subkey, value: msgpack.
    """
    try:
        if not isinstance(value, bytes) or len(value) > MAX_RAW_RECORD or len(subkey) > _MAX_RAW_SUBKEY:
            raise ValueError("not bytes, or too many")
        if not isinstance(expiration, float) or not math.isfinite(expiration):
            raise ValueError("the expiration is not a finite number")
        name, envelope = _unpack(subkey), _unpack(value)
        if not isinstance(name, str) or not isinstance(envelope, bytes):
            raise ValueError("not a str subkey with bytes")
    except Exception as error:  # noqa: BLE001 - msgpack raises anything on hostile bytes, and all of it is a refusal
        log.debug("refused a malformed record: %s", error)
        return False
    try:
        check(key, name, envelope, expiration)
    except RecordError as error:
        log.debug("refused a record: %s", error)
        return False
    except Exception:
        log.exception("the record check failed; the record was refused")
        return False
    return True


def _unpack(raw: bytes) -> object:
    unpacked: object = msgpack.unpackb(raw, raw=False, ext_hook=_refuse_extension, strict_map_key=True)
    return unpacked


def _refuse_extension(code: int, data: bytes) -> object:
    raise ValueError(f"msgpack extension {code}")
