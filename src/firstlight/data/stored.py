"""Samples that stay on disk: each batch is read when it is needed, so the size of the data needs no memory.

Files are read, not mapped into memory. A map ends the process if the file becomes shorter, and its pages count as
memory of the process.

Shapes: `N` samples, `B` rows that are read, `...` shape of one sample.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from firstlight.errors import UsageError

Indices = NDArray[np.int64]

_CHUNK_VALUES = 2**22
"""Values of a chunk, so that a float64 copy of it takes 32 MiB."""


def chunk_rows(shape: Sequence[int]) -> int:
    """Return how many rows of an array `(N, ...)` are one chunk, at least 1."""
    return max(1, _CHUNK_VALUES // max(1, math.prod(shape[1:])))


class Stored(ABC):
    """Samples `(N, ...)` on disk, of which rows can be read. It has the attributes of an array that `Samples` needs.

    Worker processes get a copy of it, so it must hold what Python can send to them.

    Args:
        shape: `(N, ...)`.
        dtype: Type of the values.
    """

    def __init__(self, shape: Sequence[int], dtype: DTypeLike) -> None:
        self.shape = tuple(shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)

    @abstractmethod
    def read(self, rows: Indices) -> NDArray[Any]:
        """Return the samples `(B, ...)` at `rows`, an array of their own in memory."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Indices) -> NDArray[Any]:
        """Return the samples `(B, ...)` at a slice or at indices."""
        return self.read(np.arange(len(self))[rows])

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in memory, in bytes. Numbers would be kept as float64."""
        return self.size * (8 if self.dtype.kind in "fb" else self.dtype.itemsize)

    def chunks(self, rows: Indices | None = None) -> Iterator[NDArray[Any]]:
        """Yield all samples, or those at `rows`, some at a time."""
        rows = np.arange(len(self)) if rows is None else rows
        step = chunk_rows(self.shape)
        for start in range(0, len(rows), step):
            yield self.read(rows[start : start + step])


class Kept(Stored):
    """The samples at some rows of others, in that order."""

    def __init__(self, stored: Stored, rows: Indices) -> None:
        super().__init__((len(rows), *stored.shape[1:]), stored.dtype)
        self.stored = stored
        self.rows = rows

    def read(self, rows: Indices) -> NDArray[Any]:
        """Return the samples at `rows` of those that are kept."""
        return self.stored.read(self.rows[rows])


class Joined(Stored):
    """The samples of several sources of one type and shape, one source after the other."""

    def __init__(self, sources: Sequence[Stored]) -> None:
        super().__init__((sum(map(len, sources)), *sources[0].shape[1:]), sources[0].dtype)
        self.sources = [*sources]

    def read(self, rows: Indices) -> NDArray[Any]:
        """Return the samples at `rows` of all sources."""
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        start = 0
        for source in self.sources:
            inside = (rows >= start) & (rows < start + len(source))
            if inside.any():
                found[inside] = source.read(rows[inside] - start)
            start += len(source)
        return found


class File:
    """A file of which parts are read. It is opened for each read, so worker processes share no position in it.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            status = os.stat(path)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        self.size = status.st_size
        self._changed = status.st_mtime_ns

    def read(self, starts: Indices, width: int) -> NDArray[np.uint8]:
        """Return the bytes `(B, width)` from each position in `starts` on.

        Raises:
            UsageError: If the file cannot be read, or is not as it was.
        """
        found = np.empty((len(starts), width), np.uint8)
        if not found.size:
            return found
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                status = os.fstat(file)
                if (status.st_size, status.st_mtime_ns) != (self.size, self._changed):
                    raise UsageError(f"{self.path} was changed while it was used")
                if len(starts) > 1 and (np.diff(starts) == width).all():  # One read for neighbours.
                    _read_into(file, found.data.cast("B"), int(starts[0]))
                else:
                    for row, start in zip(found, starts.tolist(), strict=True):
                        _read_into(file, row.data, start)
            finally:
                os.close(file)
        except OSError as error:
            raise UsageError(f"cannot read {self.path}: {error.strerror}") from error
        return found

    def chunks(self) -> Iterator[bytes]:
        """Yield the whole content, 4 MiB at a time."""
        width = 2**22
        for start in range(0, self.size, width):
            yield self.read(np.array([start]), min(width, self.size - start)).tobytes()


def _read_into(file: int, buffer: memoryview, start: int) -> None:
    done = 0
    while done < len(buffer):  # One read returns at most 2 GiB.
        count = os.preadv(file, [buffer[done:]], start + done)
        if not count:
            raise OSError(0, "it ends too early")
        done += count


class StoredArray(Stored):
    """The array `(N, ...)` that lies in a file, row after row.

    Args:
        path: Path of the file.
        offset: Position of the first value in the file, in bytes.
        shape: `(N, ...)`.
        dtype: Type of the values in the file. They are read in the byte order of this machine.

    Raises:
        UsageError: If the file is too short.
    """

    def __init__(self, path: str, offset: int, shape: Sequence[int], dtype: DTypeLike) -> None:
        self._in_file = np.dtype(dtype)
        super().__init__(shape, self._in_file.newbyteorder("="))
        self._file = File(path)
        self._offset = offset
        self._width = math.prod(self.shape[1:]) * self._in_file.itemsize
        needed = offset + len(self) * self._width
        if self._file.size < needed:
            raise UsageError(f"{path} has {self._file.size:,} bytes, but its arrays need {needed:,}: it is truncated")

    def read(self, rows: Indices) -> NDArray[Any]:
        """Return the samples at `rows`."""
        content = self._file.read(self._offset + rows * self._width, self._width)
        values = content.reshape(-1).view(self._in_file).reshape(len(rows), *self.shape[1:])
        return values.astype(self.dtype, copy=False)
