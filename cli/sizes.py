"""Amounts and rates as people type them: `20GB`, `500 MB`, `10MB/s`. Decimal units, as disks and networks are sold."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


def parse_size(text: str, *, option: str) -> int:
    """Bytes. Raises ValueError, naming the option, for anything but a positive amount."""
    found = _AMOUNT.fullmatch(text.strip().lower())
    count = 0 if found is None or found[2] not in _UNITS else int(float(found[1]) * _UNITS[found[2]])
    if count < 1:
        raise ValueError(f"{option} {text}: an amount such as 500MB or 20GB is needed")
    return count


def parse_limits(upload: str | None, store: str | None) -> tuple[float | None, int | None]:
    """``--upload-limit`` in bytes/s and ``--store-limit`` in bytes; None where there is none. Raises ValueError."""
    return (
        None if upload is None else parse_rate(upload, option="--upload-limit"),
        None if store is None else parse_size(store, option="--store-limit"),
    )


def parse_rate(text: str, *, option: str) -> float:
    """Bytes a second. Raises ValueError, naming the option."""
    try:
        return float(parse_size(text.strip().removesuffix("/s"), option=option))
    except ValueError:
        raise ValueError(f"{option} {text}: a rate such as 500kB/s or 10MB/s is needed (bytes, not bits)") from None
