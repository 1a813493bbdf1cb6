"""BLAKE3 in plain Python, for short inputs: what a folder's own code uses where the package `blake3` is not installed.

From the BLAKE3 specification (O'Connor, Aumasson, Neves, Wilcox-O'Hearn, 2020), sections 2.1 to 2.5, hash mode only.
"""

from __future__ import annotations

import struct

BLAKE3_IV = (
    0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19,
)  # fmt: skip
BLAKE3_ORDER = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
"""How the message words move between two rounds."""
BLAKE3_COLUMNS_AND_DIAGONALS = (
    (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
    (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),
)  # fmt: skip
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8


def plain_blake3_hex(data: bytes) -> str:
    """BLAKE3 of `data`, 64 hex digits. About 10 KB take 50 ms: for labels and small records, not for weights."""
    chaining, block, counter, length, flags = _blake3_node(data, 0)
    return struct.pack("<8I", *_compress(chaining, block, counter, length, flags | ROOT)).hex()


def _blake3_node(data: bytes, first: int) -> tuple[tuple[int, ...], tuple[int, ...], int, int, int]:
    """The inputs of the last compression of the subtree over `data`, whose first chunk is number `first`."""
    if len(data) > 1024:
        # The left subtree is complete: the largest power of two of chunks that leaves something to the right.
        left = 1024 << ((len(data) - 1) // 1024).bit_length() - 1
        halves = (_blake3_node(data[:left], first), _blake3_node(data[left:], first + left // 1024))
        words = tuple(word for half in halves for word in _compress(*half))
        return BLAKE3_IV, words, 0, 64, PARENT
    chaining = BLAKE3_IV
    blocks = [data[start : start + 64] for start in range(0, len(data), 64)] or [b""]
    for index, piece in enumerate(blocks):
        words = struct.unpack("<16I", piece.ljust(64, b"\0"))
        flags = CHUNK_START * (index == 0) | CHUNK_END * (index == len(blocks) - 1)
        if index == len(blocks) - 1:
            break
        chaining = _compress(chaining, words, first, len(piece), flags)
    return chaining, words, first, len(piece), flags


def _compress(
    chaining: tuple[int, ...], block: tuple[int, ...], counter: int, length: int, flags: int
) -> tuple[int, ...]:
    """The compression function, its first 8 words."""
    s = [*chaining, *BLAKE3_IV[:4], counter & 0xFFFFFFFF, counter >> 32, length, flags]
    m = list(block)
    for _ in range(7):
        for index, (a, b, c, d) in enumerate(BLAKE3_COLUMNS_AND_DIAGONALS):
            for word, turn, turn_back in ((m[2 * index], 16, 12), (m[2 * index + 1], 8, 7)):
                s[a] = (s[a] + s[b] + word) & 0xFFFFFFFF
                s[d] = _right(s[d] ^ s[a], turn)
                s[c] = (s[c] + s[d]) & 0xFFFFFFFF
                s[b] = _right(s[b] ^ s[c], turn_back)
        m = [m[place] for place in BLAKE3_ORDER]
    return tuple(s[index] ^ s[index + 8] for index in range(8))


def _right(word: int, by: int) -> int:
    return (word >> by | word << (32 - by)) & 0xFFFFFFFF
