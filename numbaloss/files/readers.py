"""Arrays in files, read front to back into buffers of the caller.

Nothing is mapped into memory (a file cut while it is mapped ends the process) and nothing a file declares is trusted:
headers are parsed within a size limit, nothing is unpickled, and memory is set aside for a block, never for a declared
size. Whatever is wrong with a file is a FileError: one line that names the file.
"""

import io
import math
import os
import re
import sys
import warnings
import zipfile
from contextlib import ExitStack
from functools import partial

import numpy as np
from numpy.lib import format as npy

from .arrayfile import READ_ERRORS, FileError, StreamFile, reason, size_of, take
from .containers import (
    INDEX,
    Shards,
    bfloat16,
    choose,
    find_in_index,
    find_shards,
    open_raw,
    open_safetensors,
)
from .llama import MAGIC, open_llama

_HEADER = 10_000  # bytes; NumPy's own limit
_MEMBER = re.compile(rf"(.*?(?:\.npz|\.safetensors|{re.escape(INDEX)})):(.*)", re.IGNORECASE | re.DOTALL)
_HALF = np.dtype("V2"), np.dtype(np.uint16), np.dtype(np.int16)  # what bfloat16 is saved as
_KINDS = {
    "logits": ("float16, bfloat16, float32 or float64", "f"),
    "targets": ("integers", "iu"),
    "groups": ("integers", "iu"),
    "weights": ("numbers", "biuf"),
}


def open_array(path, argument, *, dtype=None, shape=None):
    """Opens a file as an ArrayFile: .npy, .npz, .safetensors, llama.cpp's logits, one without header, or many of these.

    Args:
        path: str or path. A .npy, .npz or .safetensors file, "FILE.npz:NAME", "FILE.safetensors:NAME",
            "model.safetensors.index.json:NAME" (without a name, the only array or the one called `argument` is read),
            what `llama-perplexity --kl-divergence-base` wrote (logits of whole rows and their targets), or "-" for
            stdin. A folder or a pattern ("logits-*.npy"): its files, put together along the first axis.
        argument: "logits", "targets", "weights" or "groups"; decides which dtypes are accepted.
        dtype: the one expected. "bfloat16" also reads 2-byte elements without a type (uint16, int16, V2) as such.
        shape: with dtype, of a file that is all elements, without a header; one number may be -1.
    Raises:
        FileError: a file cannot be opened, is damaged, or holds another kind of array.
    """
    path = os.fsdecode(path)
    if dtype is not None:
        dtype = _dtype(path, dtype)
    elif shape is not None:
        raise FileError(path, "shape: expected dtype with it")
    named = None if os.path.exists(path) else _MEMBER.fullmatch(path)
    file, member = named.groups() if named else (path, None)
    try:
        files = find_shards(file, shape is not None)
    except OSError as error:
        raise FileError(path, reason(error)) from error
    opener = partial(_open, member=member, argument=argument, dtype=dtype, shape=shape)
    return opener(file) if files is None else Shards(path, files, opener)


def _dtype(path, dtype):
    if dtype == "bfloat16":
        return bfloat16(path)
    try:
        return np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as error:
        raise FileError(path, f"dtype: expected the name of a dtype, got {dtype!r}") from error


def _open(file, member, argument, dtype, shape):
    path = file if member is None else f"{file}:{member}"
    with ExitStack() as stack:
        try:
            if file.lower().endswith(INDEX):
                file, member = find_in_index(path, file, member, argument)
                path = f"{file}:{member}"
            raw = stack.enter_context(io.FileIO(0, closefd=False) if file == "-" else io.FileIO(file))
            array = _recognize(path, file, raw, member, argument, dtype, shape, stack)
            array.owned = stack.pop_all()
            return array
        except FileError:
            raise
        except (*READ_ERRORS, ValueError) as error:
            raise FileError(path, reason(error)) from error


def _recognize(path, file, raw, member, argument, dtype, shape, stack):
    """The array in a file, by the file's first bytes."""
    suffix = os.path.splitext(file)[1].lower()
    if shape is not None:
        magic = b""
        if raw.seekable():
            magic = take(raw, 8)
            raw.seek(-len(magic), 1)
        if magic[:6] == npy.MAGIC_PREFIX or magic == MAGIC or suffix in (".npz", ".safetensors"):
            raise FileError(path, "shape: expected a file without a header, got one that says its shape")
        found, asked = open_raw(path, raw, dtype, shape)
        _check(path, argument, found, asked)
        return StreamFile(path, raw, raw, found, asked)
    stream, magic = raw, take(raw, npy.MAGIC_LEN)
    if magic == MAGIC:
        if dtype is not None:
            raise FileError(path, f"dtype: expected none for a llama.cpp file, got {dtype}")
        return open_llama(path, raw, argument)
    if magic and (suffix == ".safetensors" or magic[4:] == bytes(4)):  # the length of a header, which then begins
        start = take(raw, 1)
        if suffix == ".safetensors" or start == b"{":
            found = open_safetensors(path, raw, magic + start, member, argument)
            return _array(path, raw, raw, *found, argument, dtype)
    if magic[:2] == b"PK":
        stream, magic = _open_member(path, raw, member, argument, stack)
    elif member is not None:
        raise FileError(path, f"{file} is not a {suffix} file")
    found, fortran, held = _read_header(path, stream, magic, argument)
    return _array(path, raw, stream, found, held, argument, dtype, fortran)


def _array(path, raw, stream, shape, dtype, argument, asked, fortran=False):
    if asked is not None and asked.kind == "V" and dtype in _HALF:
        dtype = asked
    _check(path, argument, shape, dtype)
    if asked is not None and asked.newbyteorder("=") != dtype.newbyteorder("="):
        raise FileError(path, f"dtype: expected {asked}, got {dtype}")
    by_column = fortran and sum(n != 1 for n in shape) > 1
    _check_layout(path, shape, dtype, stream, by_column)
    return StreamFile(path, raw, stream, shape, dtype, by_column)


def _open_member(path, raw, member, argument, stack):
    """(stream, its first bytes)"""
    if size_of(raw) is None:
        raise FileError(path, "a .npz file cannot be read from a pipe")
    try:
        archive = zipfile.ZipFile(raw)
        names = archive.namelist()
    except Exception as error:  # the directory of a damaged archive fails in many ways
        raise FileError(path, f"not a .npz file, or a damaged one: {reason(error)}") from error
    stack.enter_context(archive)
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        raise FileError(path, f"a pickle of PyTorch; {_convert(path, argument, torch=True)}")
    arrays = {name.removesuffix(".npy"): name for name in names}
    wanted = choose(path, arrays, member, argument, ".npz")
    info = archive.getinfo(arrays[wanted])
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others do not bound what they inflate
        raise FileError(path, f"member {wanted!r}: expected stored or deflated, got compression {info.compress_type}")
    try:
        stream = stack.enter_context(archive.open(info))
        return stream, take(stream, npy.MAGIC_LEN)
    except (*READ_ERRORS, ValueError) as error:
        raise FileError(path, f"damaged member {wanted!r}: {reason(error)}") from error


def _convert(path, argument, torch):
    """What to do about a pickle."""
    whole, cast = ("np.float32", "float") if argument in ("logits", "weights") else ("np.int64", "long")
    if torch:
        return f"convert it: np.save('plain.npy', torch.load({path!r}, weights_only=True).{cast}().numpy())"
    line = f"np.save('plain.npy', np.load({path!r}, allow_pickle=True).astype({whole}))"
    return f"pickles are not read; convert it, only if you trust the file: {line}"


def _read_header(path, stream, magic, argument):
    """(shape, Fortran order, dtype), by NumPy's parser. Leaves the stream at the first element."""
    if not magic:
        raise FileError(path, "is empty")
    if magic[0] == 0x80:
        torch = path.lower().endswith((".pt", ".pth", ".bin"))
        raise FileError(path, f"a pickle; {_convert(path, argument, torch)}")
    if not npy.MAGIC_PREFIX.startswith(magic[: len(npy.MAGIC_PREFIX)]):
        hint = "; a file without a header needs dtype and shape"
        raise FileError(path, f"not a .npy, .npz, .safetensors or llama.cpp file: it begins with {magic!r}{hint}")
    if len(magic) < npy.MAGIC_LEN:
        raise FileError(path, "ends inside the header")
    version = magic[6]
    if version not in (1, 2, 3):
        raise FileError(path, f"expected .npy version 1, 2 or 3, got {version}")
    width = 2 if version == 1 else 4
    length = take(stream, width)
    count = int.from_bytes(length, "little")
    if len(length) == width and count > _HEADER:
        raise FileError(path, f"damaged: a header of {count} bytes, expected at most {_HEADER}")
    header = take(stream, count)
    if len(length) < width or len(header) < count:
        raise FileError(path, "ends inside the header")
    # Version 3 differs from 2 in the encoding of field names, and arrays with fields are refused.
    parse = npy.read_array_header_1_0 if version == 1 else npy.read_array_header_2_0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers written by Python 2
            return parse(io.BytesIO(length + header))
    except Exception as error:  # it goes through Python's parser: anything can come out
        raise FileError(path, f"damaged header: {reason(error)}") from error


def _check(path, argument, shape, dtype):
    if any(n < 0 for n in shape):
        raise FileError(path, f"damaged header: shape {shape}")
    if any(n > sys.maxsize for n in shape) or math.prod(shape) * dtype.itemsize > sys.maxsize:
        raise FileError(path, f"damaged header: more than {sys.maxsize} bytes, shape {shape}")
    expected, kinds = _KINDS[argument]
    if dtype.kind in kinds and dtype.itemsize <= 8 or dtype.name == "bfloat16" and "f" in kinds:
        return
    if dtype.hasobject:
        got = f"pickled objects; {_convert(path, argument, torch=False)}"
    else:
        got = f"{dtype}; if these are bfloat16: --dtype bfloat16" if dtype in _HALF and "f" in kinds else str(dtype)
    raise FileError(path, f"{argument}: expected {expected}, got {got}")


def _check_layout(path, shape, dtype, stream, by_column):
    held = size_of(stream) if isinstance(stream, io.FileIO) else None
    if by_column and (len(shape) != 2 or held is None):
        where = "two-dimensional .npy files" if held is not None else ".npy files that are not pipes"
        raise FileError(
            path, f"Fortran order is read from {where} only, got shape {shape}; save np.ascontiguousarray(array)"
        )
    needed = math.prod(shape) * dtype.itemsize
    if held is not None and held - stream.tell() < needed:
        got = held - stream.tell()
        raise FileError(path, f"truncated: expected {needed} bytes of data for shape {shape} {dtype}, got {got}")
