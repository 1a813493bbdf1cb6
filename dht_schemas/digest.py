"""BLAKE3 digests: of bytes, of a file, and of a file's chunks. Digests are 64 lower-case hexadecimal characters
everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from blake3 import blake3

CHUNK = 4 * 1024 * 1024
"""Bytes in a chunk. A file of n bytes has ceil(n / CHUNK) chunks, all of them full but the last; an empty file has
none.
"""

_READ = 1024 * 1024


def blake3_hex(data: bytes | bytearray | memoryview) -> str:
    """The digest of ``data``."""
    return blake3(data).hexdigest()


def chunk_count(length: int, chunk: int = CHUNK) -> int:
    """How many chunks a file of ``length`` bytes has."""
    return -(-length // chunk)


def digest_file(path: str | os.PathLike[str]) -> str:
    """The digest of a whole file, read in pieces of 1 MiB. Raises OSError."""
    hasher = blake3()
    for piece in _pieces(path, _READ):
        hasher.update(piece)
    return hasher.hexdigest()


def chunk_digests(path: str | os.PathLike[str], chunk: int = CHUNK) -> tuple[str, ...]:
    """The digest of every ``chunk`` bytes of a file, in order. Raises OSError, or ValueError when ``chunk`` is not
    positive.
    """
    if chunk < 1:
        raise ValueError(f"a chunk must have at least one byte, not {chunk}")
    return tuple(blake3_hex(piece) for piece in _pieces(path, chunk))


def _pieces(path: str | os.PathLike[str], size: int) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        while piece := stream.read(size):  # a buffered read is short only at the end of the file
            yield piece
