"""What every reader is: an array in files, read front to back into buffers of the caller."""

import math
import os
import stat
import zipfile
import zlib
from contextlib import ExitStack

import numpy as np

_PIECE = 1 << 22  # bytes asked for at once
# zipfile raises RuntimeError for an encrypted member, and its NotImplementedError for a method it does not know
READ_ERRORS = (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError)


class FileError(ValueError):
    """What is wrong with a file, in one line that begins with its name."""

    def __init__(self, file, problem):
        super().__init__(file, problem)

    def __str__(self):
        file, problem = self.args
        line = " ".join(str(problem).split())
        return f"{file}: {line if len(line) <= 400 else line[:400] + ' ...'}"


def reason(error):
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def take(stream, count):
    """The next `count` bytes, fewer at the end of the file. (A pipe gives what it has.)"""
    data = bytearray()
    while len(data) < count and (piece := stream.read(min(count - len(data), _PIECE))):
        data += piece
    return bytes(data)


def size_of(raw):
    """The size of a regular file in bytes; None for a pipe."""
    state = os.fstat(raw.fileno())
    return state.st_size if stat.S_ISREG(state.st_mode) else None


class ArrayFile:
    """An array in a file: its shape and dtype, and its elements in C order, one read() after the other."""

    by_column = False
    floor = None  # nats: smaller probabilities than exp(-floor) of the row's largest were cut off by the writer

    def __init__(self, name, raw, shape, dtype):
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.size = math.prod(shape)
        self.nbytes = self.size * dtype.itemsize
        self.owned = ExitStack()
        self._raw = raw
        self._state = self._now() if raw else None

    def _now(self):
        state = os.fstat(self._raw.fileno())
        return [[self.name, state.st_size, state.st_mtime_ns]] if stat.S_ISREG(state.st_mode) else None

    def read(self, out):
        """Fills `out` (one-dimensional, contiguous, of this dtype) with the next elements."""
        raise NotImplementedError

    def skip(self, count):
        """Leaves out the next `count` elements."""
        raise NotImplementedError

    def identity(self):
        """[name, bytes, mtime in ns] of each file when it was opened; None for a pipe."""
        return self._state

    def is_file(self, path):
        return os.path.samestat(os.fstat(self._raw.fileno()), os.stat(path))

    def close(self):
        self.owned.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class StreamFile(ArrayFile):
    """An array whose elements lie in a stream from here on. (`stream`: the file `raw` itself, or what unpacks it)"""

    def __init__(self, name, raw, stream, shape, dtype, by_column=False):
        super().__init__(name, raw, shape, dtype if dtype.isnative else dtype.newbyteorder("="))
        self._swapped = not dtype.isnative
        self._stream = stream
        self._data = stream.tell() if stream.seekable() else None
        self._position = 0  # elements
        self.by_column = by_column  # Fortran order: every read() takes one positioned read for each column

    def read(self, out):
        if self.by_column:
            self._read_columns(out)
        else:
            self._fill(out, self._position)
        if self._swapped:
            out.byteswap(inplace=True)
        self._advance(len(out))

    def skip(self, count):
        if self._data is None:
            for done in range(0, count, _PIECE):
                self.read(np.empty(min(_PIECE, count - done), self.dtype))
        else:
            self._call(self._stream.seek, self._data + (self._position + count) * self.dtype.itemsize)
            self._advance(count)

    def _advance(self, count):
        self._position += count
        if self._position == self.size and self._now() != self._state:
            raise FileError(self.name, "changed while it was read")

    def _read_columns(self, out):
        """The same from a two-dimensional array in Fortran order: one positioned read for each column."""
        rows, columns = self.shape
        for i in range(min(columns, len(out))):
            row, column = divmod(self._position + i, columns)
            first = column * rows + row
            piece = np.empty(len(out[i::columns]), self.dtype)
            self._call(self._stream.seek, self._data + first * self.dtype.itemsize)
            self._fill(piece, first)
            out[i::columns] = piece

    def _fill(self, out, first):
        out, done = out.view(np.uint8), 0
        while done < len(out):
            count = self._call(self._stream.readinto, out[done : done + _PIECE])
            if not count:
                at = first * self.dtype.itemsize + done
                raise FileError(self.name, f"ends after {at} of {self.nbytes} bytes of data")
            done += count

    def _call(self, function, argument):
        try:
            return function(argument)
        except READ_ERRORS as error:
            raise FileError(self.name, f"cannot be read after element {self._position}: {reason(error)}") from error
