"""Arrays in .npy and .npz files, read front to back into buffers of the caller.

Nothing is mapped into memory (a file cut while it is mapped ends the process) and nothing a file declares is trusted:
headers are parsed by NumPy within a size limit, nothing is unpickled, and memory is set aside for a block, never for a
declared size. Whatever is wrong with a file is a FileError: one line that names the file.
"""

import io
import math
import os
import stat
import sys
import warnings
import zipfile
import zlib

import numpy as np
from numpy.lib import format as npy

_HEADER = 10_000  # bytes; NumPy's own limit
_PIECE = 1 << 22  # bytes asked for at once
# zipfile raises RuntimeError for an encrypted member, and its NotImplementedError for a method it does not know
_READ_ERRORS = (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError)
_WIDEN = "np.save({path!r}, np.load({path!r}).view(ml_dtypes.bfloat16).astype(np.float32))"


class FileError(ValueError):
    """What is wrong with a file, in one line that begins with its name."""

    def __init__(self, file, problem):
        super().__init__(file, problem)

    def __str__(self):
        file, problem = self.args
        line = " ".join(str(problem).split())
        return f"{file}: {line if len(line) <= 400 else line[:400] + ' ...'}"


class ArrayFile:
    """An array in a file: its shape and dtype, and its elements in C order, one read() after the other."""

    def __init__(self, name, stream, shape, dtype, by_column, owned):
        self.name = name
        self.shape = shape
        self.dtype = dtype.newbyteorder("=")
        self.size = math.prod(shape)
        self.nbytes = self.size * dtype.itemsize
        self._stream = stream
        self._swapped = not dtype.isnative
        self._position = 0  # elements
        self.by_column = by_column  # Fortran order: every read() takes one positioned read for each column
        self._data = stream.tell() if by_column else None
        self._owned = owned

    def read(self, out):
        """Fills `out` (one-dimensional, contiguous, of this dtype) with the next elements."""
        if self.by_column:
            self._read_columns(out)
        else:
            self._fill(out, self._position)
        if self._swapped:
            out.byteswap(inplace=True)
        self._position += len(out)

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
        except _READ_ERRORS as error:
            raise FileError(self.name, f"cannot be read after element {self._position}: {_reason(error)}") from error

    def is_file(self, path):
        return os.path.samestat(os.fstat(self._owned[-1].fileno()), os.stat(path))

    def close(self):
        for file in self._owned:
            file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def open_array(path, argument):
    """Opens a .npy file, a member of a .npz file ("file.npz:name") or stdin ("-") as an ArrayFile.

    Args:
        path: str or path. Of a .npz file without ":name", the only member or the one called `argument` is read.
        argument: "logits", "targets" or "weights"; decides which dtypes are accepted.
    Raises:
        FileError: the file cannot be opened, is damaged, or holds another kind of array.
    """
    path = os.fsdecode(path)
    file, member = path, None
    head, colon, tail = path.rpartition(":")
    if colon and head.lower().endswith(".npz") and not os.path.exists(path):
        file, member = head, tail
    owned = []
    try:
        raw = io.FileIO(0, closefd=False) if file == "-" else io.FileIO(file)
        owned.append(raw)
        stream, magic = raw, _take(raw, npy.MAGIC_LEN)
        if magic[:2] == b"PK":
            stream, magic = _open_member(path, raw, member, argument, owned)
        elif member is not None:
            raise FileError(path, f"{file} is not a .npz file")
        shape, fortran, dtype = _read_header(path, stream, magic)
        _check(path, argument, shape, dtype)
        by_column = fortran and sum(n != 1 for n in shape) > 1
        _check_layout(path, shape, dtype, stream, by_column)
        return ArrayFile(path, stream, shape, dtype, by_column, owned[::-1])
    except (*_READ_ERRORS, ValueError) as error:
        for opened in owned[::-1]:
            opened.close()
        if isinstance(error, FileError):
            raise
        raise FileError(path, _reason(error)) from error
    except BaseException:
        for opened in owned[::-1]:
            opened.close()
        raise


def _reason(error):
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _take(stream, count):
    """The next `count` bytes, fewer at the end of the file. (A pipe gives what it has.)"""
    data = b""
    while len(data) < count and (piece := stream.read(count - len(data))):
        data += piece
    return data


def _open_member(path, raw, member, argument, owned):
    """(stream, its first bytes)"""
    if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
        raise FileError(path, "a .npz file cannot be read from a pipe")
    try:
        archive = zipfile.ZipFile(raw)
        names = archive.namelist()
    except Exception as error:  # the directory of a damaged archive fails in many ways
        raise FileError(path, f"not a .npz file, or a damaged one: {_reason(error)}") from error
    owned.append(archive)
    arrays = [name.removesuffix(".npy") for name in names]
    wanted = member or (arrays[0] if len(arrays) == 1 else argument)
    if wanted not in arrays:
        found = ", ".join(arrays) or "nothing"
        raise FileError(path, f"expected a member called {wanted!r}, found {found}; choose with FILE.npz:NAME")
    info = archive.getinfo(names[arrays.index(wanted)])
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others do not bound what they inflate
        raise FileError(path, f"member {wanted!r}: expected stored or deflated, got compression {info.compress_type}")
    try:
        stream = archive.open(info)
        owned.append(stream)
        return stream, _take(stream, npy.MAGIC_LEN)
    except (*_READ_ERRORS, ValueError) as error:
        raise FileError(path, f"damaged member {wanted!r}: {_reason(error)}") from error


def _read_header(path, stream, magic):
    """(shape, Fortran order, dtype), by NumPy's parser. Leaves the stream at the first element."""
    if not magic:
        raise FileError(path, "is empty")
    if not npy.MAGIC_PREFIX.startswith(magic[: len(npy.MAGIC_PREFIX)]):
        what = " (a pickle; pickles are not read)" if magic[0] == 0x80 else ""
        raise FileError(path, f"not a .npy or .npz file: it begins with {magic!r}{what}")
    if len(magic) < npy.MAGIC_LEN:
        raise FileError(path, "ends inside the header")
    version = magic[6]
    if version not in (1, 2, 3):
        raise FileError(path, f"expected .npy version 1, 2 or 3, got {version}")
    width = 2 if version == 1 else 4
    length = _take(stream, width)
    count = int.from_bytes(length, "little")
    if len(length) == width and count > _HEADER:
        raise FileError(path, f"damaged: a header of {count} bytes, expected at most {_HEADER}")
    header = _take(stream, count)
    if len(length) < width or len(header) < count:
        raise FileError(path, "ends inside the header")
    # Version 3 differs from 2 in the encoding of field names, and arrays with fields are refused.
    parse = npy.read_array_header_1_0 if version == 1 else npy.read_array_header_2_0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers written by Python 2
            return parse(io.BytesIO(length + header))
    except Exception as error:  # it goes through Python's parser: anything can come out
        raise FileError(path, f"damaged header: {_reason(error)}") from error


def _check(path, argument, shape, dtype):
    if any(n < 0 for n in shape):
        raise FileError(path, f"damaged header: shape {shape}")
    if any(n > sys.maxsize for n in shape) or math.prod(shape) * dtype.itemsize > sys.maxsize:
        raise FileError(path, f"damaged header: more than {sys.maxsize} bytes, shape {shape}")
    if argument == "logits":
        expected, good = "float16, float32 or float64", dtype.kind == "f" and dtype.itemsize <= 8
    elif argument == "targets":
        expected, good = "integers", dtype.kind in "iu"
    else:
        expected, good = "numbers", dtype.kind in "biuf" and dtype.itemsize <= 8
    if good:
        return
    hint = ""
    if argument == "logits" and dtype.itemsize == 2 and dtype.kind in "Vu":
        hint = f"; if these are bfloat16, widen them first: {_WIDEN.format(path=path)}"
    raise FileError(
        path, f"{argument}: expected {expected}, got {'pickled objects' if dtype.hasobject else dtype}{hint}"
    )


def _check_layout(path, shape, dtype, stream, by_column):
    plain = isinstance(stream, io.FileIO) and stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    if by_column and (len(shape) != 2 or not plain):
        where = "two-dimensional .npy files" if plain else ".npy files that are not pipes"
        raise FileError(
            path, f"Fortran order is read from {where} only, got shape {shape}; save np.ascontiguousarray(array)"
        )
    if plain:
        held = os.fstat(stream.fileno()).st_size - stream.tell()
        needed = math.prod(shape) * dtype.itemsize
        if held < needed:
            raise FileError(path, f"truncated: expected {needed} bytes of data for shape {shape} {dtype}, got {held}")
