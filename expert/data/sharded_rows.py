"""Rows of one kind that lie in many .npy files, read as if they were one array that may be larger than memory.

Only what is asked for is read. A folder of eleven million rows has tens of thousands of files, more than a process may
hold open, so at most `OPEN_FILES` of each kind are mapped at a time.
"""

from __future__ import annotations

import ast
import math
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

OPEN_FILES = 96
_MAGIC = b"\x93NUMPY\x01\x00"


class ShardedRows:
    """[N, ...] of one dtype across files. Indexed by a slice or by row numbers it gives a numpy array.

    files: (path, rows) in order; tail: the shape of a row. With ``padded`` a file's rows may be shorter than tail[0],
    and come back with zeros behind.
    """

    def __init__(
        self, files: Sequence[tuple[Path, int]], tail: tuple[int, ...], dtype: type, *, padded: bool = False
    ) -> None:
        self._paths = [path for path, _ in files]
        self._ends = np.cumsum([rows for _, rows in files], dtype=np.int64)
        self.shape = (int(self._ends[-1]) if len(files) else 0, *tail)
        self.dtype = np.dtype(dtype)
        self._padded = padded
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self._turn = threading.Lock()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The rows of a slice, or of whole numbers in any order, as an array of their own; one number gives one row."""
        if isinstance(rows, slice):
            return self._gather(np.arange(*rows.indices(len(self)), dtype=np.int64))
        wanted = np.asarray(rows)
        if wanted.dtype == bool:
            wanted = np.flatnonzero(wanted)
        wanted = wanted.astype(np.int64)
        return self._gather(wanted.reshape(-1)).reshape(*wanted.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All rows, in memory."""
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def _gather(self, wanted: np.ndarray) -> np.ndarray:
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"rows must be 0 to {len(self) - 1}, got {wanted.min()} to {wanted.max()}")
        out = np.zeros((len(wanted), *self.shape[1:]), dtype=self.dtype)
        if not len(wanted):
            return out
        files = np.searchsorted(self._ends, wanted, side="right")
        order = np.argsort(files, kind="stable")
        bounds = np.flatnonzero(np.diff(files[order])) + 1
        for here in np.split(order, bounds):
            number = int(files[here[0]])
            array = self._mapped(number)
            start = int(self._ends[number]) - len(array)
            if self._padded:
                out[here, : array.shape[1]] = array[wanted[here] - start]
            else:
                out[here] = array[wanted[here] - start]
        return out

    def _mapped(self, number: int) -> np.ndarray:
        with self._turn:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
            if len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)
            self._open[number] = np.load(self._paths[number], mmap_mode="r", allow_pickle=False)
            return self._open[number]


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file (format 1.0). The bytes depend on the array alone.

    Raises:
        OSError: with errno and path, where `np.save` on a full disk has neither.
    """
    array = np.ascontiguousarray(array)
    try:
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.reshape(-1).view(np.uint8).data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def array_header(path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) that a .npy file (format 1.0) says it has, and has the bytes for. Raises ValueError (no such
    header, or too short a file for it) or OSError.
    """
    with open(path, "rb") as file:
        start = file.read(10)
        if len(start) < 10 or start[:8] != _MAGIC:
            raise ValueError("no .npy file of format 1.0")
        text = file.read(struct.unpack("<H", start[8:])[0])
        begin, size = file.tell(), os.fstat(file.fileno()).st_size
    try:
        said = ast.literal_eval(text.decode("latin-1"))
        shape, dtype = tuple(said["shape"]), np.dtype(said["descr"])
        sound = said["fortran_order"] is False and all(type(extent) is int and extent >= 0 for extent in shape)
    except (SyntaxError, ValueError, KeyError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"a .npy header that cannot be read ({type(error).__name__})") from error
    if not sound:
        raise ValueError("a .npy header with an unusual order or shape")
    if size < begin + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{size} bytes, too few for {dtype} {list(shape)}")
    return shape, dtype
