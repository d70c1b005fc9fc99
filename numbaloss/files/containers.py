"""Arrays in safetensors files, in files without a header, and in files that hold one piece each (shards)."""

import glob
import json
import math
import operator
import os
import re
from contextlib import suppress

import numpy as np

from .arrayfile import ArrayFile, FileError, reason, size_of, take

INDEX = ".safetensors.index.json"
_HEADER = 100_000_000  # bytes; the limit of the published format
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?", "I8": "i1", "U8": "u1"}
_DTYPES |= {f"{kind}{8 * n}": f"<{kind.lower()}{n}" for kind in "IU" for n in (2, 4, 8)}
_SUFFIXES = (".npy", ".npz", ".safetensors")
_ENTRY = {"dtype", "shape", "data_offsets"}


def bfloat16(name):
    try:
        from ml_dtypes import bfloat16 as scalar
    except ImportError as error:
        raise FileError(name, "bfloat16 needs another package: pip install ml_dtypes") from error
    return np.dtype(scalar)


def choose(name, names, member, argument, suffix):
    """The array to read of those in a container."""
    wanted = member or (next(iter(names)) if len(names) == 1 else argument)
    if wanted not in names:
        found = ", ".join(n if n.isprintable() else repr(n) for n in names) or "nothing"
        raise FileError(name, f"expected a member called {wanted!r}, found {found}; choose with FILE{suffix}:NAME")
    return wanted


def _pairs(pairs):
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name is there twice")
    return result


def _parse(name, data):
    try:
        header = json.loads(data.decode(), object_pairs_hook=_pairs)
    except Exception as error:  # invalid UTF-8 or JSON, too deep, a number too long
        raise FileError(name, f"damaged header: {reason(error)}") from error
    if not isinstance(header, dict):
        raise FileError(name, "damaged header: expected a JSON object")
    return header


def _counts(values):
    """Are these numbers that may be a shape, or offsets?"""
    return isinstance(values, list) and len(values) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


def open_safetensors(name, stream, magic, member, argument):
    """(shape, dtype). Leaves the stream, of which `magic` has been read, at the first element."""
    size, length = size_of(stream), int.from_bytes(magic[:8], "little")
    if magic[8:] not in (b"", b"{") or not length:
        raise FileError(name, f"not a safetensors file: expected a header that begins with b'{{', got {magic[8:]!r}")
    if len(magic) == 9 and length > _HEADER:
        raise FileError(name, f"damaged: a header of {length} bytes, expected at most {_HEADER}")
    data = magic[8:] + take(stream, length - 1) if len(magic) == 9 else b""
    if len(data) < length:
        raise FileError(name, "ends inside the header")
    header = _parse(name, data)
    header.pop("__metadata__", None)
    _check_offsets(name, header, None if size is None else size - 8 - length)
    wanted = choose(name, header, member, argument, ".safetensors")
    code, shape, (begin, end) = (header[wanted][key] for key in ("dtype", "shape", "data_offsets"))
    if code == "BF16":
        dtype = bfloat16(name)
    elif isinstance(code, str) and code in _DTYPES:
        dtype = np.dtype(_DTYPES[code])
    else:
        raise FileError(name, f"{wanted!r}: expected BF16, {', '.join(_DTYPES)}, got {code!r}")
    if not _counts(shape) or math.prod(shape) * dtype.itemsize != end - begin:
        raise FileError(name, f"damaged header: {wanted!r} has shape {shape}, {code}, in {end - begin} bytes")
    if size is not None:
        stream.seek(begin, 1)
    while size is None and begin and (passed := len(stream.read(min(begin, 1 << 20)))):
        begin -= passed
    return tuple(shape), dtype


def _check_offsets(name, header, held):
    """One tensor begins where another ends, as the format demands; in all `held` bytes (None: not known)."""
    for key, entry in header.items():
        if not (isinstance(entry, dict) and entry.keys() == _ENTRY and _counts(entry["data_offsets"])):
            raise FileError(name, f"damaged header: expected dtype, shape and data_offsets for {key!r}, got {entry!r}")
    end = 0
    for offsets in sorted(entry["data_offsets"] for entry in header.values()):
        if len(offsets) != 2 or offsets[0] != end or offsets[1] < end:
            raise FileError(name, f"damaged header: expected a tensor from byte {end} on, got data_offsets {offsets}")
        end = offsets[1]
    if held is not None and held != end:
        problem = "truncated" if held < end else "damaged"
        raise FileError(name, f"{problem}: expected {end} bytes of tensors, got {held}")


def find_in_index(name, file, member, argument):
    """(file, tensor) of a tensor in "model.safetensors.index.json"."""
    with open(file, "rb") as stream:
        data = take(stream, _HEADER + 1)
    if len(data) > _HEADER:
        raise FileError(name, f"damaged: expected at most {_HEADER} bytes, got more")
    places = _parse(name, data).get("weight_map")
    if not isinstance(places, dict):
        raise FileError(name, "expected weight_map, a JSON object, found none")
    wanted = choose(name, places, member, argument, INDEX)
    place = places[wanted]
    # A name in this folder: an index cannot send anybody elsewhere.
    if not (isinstance(place, str) and place.lower().endswith(".safetensors") and not re.search(r"[/\\:\0]", place)):
        raise FileError(name, f"{wanted!r}: expected the name of a .safetensors file in the same folder, got {place!r}")
    return os.path.join(os.path.dirname(file), place), wanted


def open_raw(name, raw, dtype, shape):
    """(shape, dtype) of a file that is all elements; one number of `shape` may be -1."""
    shape = tuple(operator.index(n) for n in shape)
    if any(n < -1 for n in shape) or shape.count(-1) > 1:
        raise FileError(name, f"shape: expected numbers >= 0, and one -1 at most, got {shape}")
    known, held = math.prod(n for n in shape if n != -1) * dtype.itemsize, size_of(raw)
    if -1 in shape:
        if held is None:
            raise FileError(name, f"shape: expected no -1 for a pipe, got {shape}")
        if not known or held % known:
            raise FileError(name, f"expected a multiple of {known} bytes for shape {shape} {dtype}, got {held}")
        shape = tuple(held // known if n == -1 else n for n in shape)
    elif held is not None and held != known:
        problem = "truncated: " if held < known else ""
        raise FileError(name, f"{problem}expected {known} bytes for shape {shape} {dtype}, got {held}")
    return shape, dtype


def find_shards(file, raw):
    """The files in a folder or of a pattern, shard2 before shard10; None if `file` is neither."""
    if os.path.isdir(file):
        names = [n for n in os.listdir(file) if n[:1] != "." and (raw or n.lower().endswith(_SUFFIXES))]
        files = [os.path.join(file, n) for n in names]
        missing = f"is a directory without {'files' if raw else ', '.join(_SUFFIXES) + ' files'}"
    elif glob.has_magic(file) and not os.path.lexists(file):
        files, missing = glob.glob(file, recursive=True), "no file matches this pattern"
    else:
        return None
    files = [f for f in files if os.path.isfile(f)]
    if not files:
        raise FileError(file, missing)
    return sorted(files, key=lambda f: ([int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", f)], f))


class Shards(ArrayFile):
    """Arrays in files, one after the other along their first axis. One of them is open at a time."""

    def __init__(self, name, files, opener):
        self._opener = opener
        self._shards = []  # file, identity, elements
        rows, size, kind = 0, 0, None
        for file in files:
            with opener(file) as shard:
                if not shard.shape:
                    raise FileError(shard.name, "expected an array with an axis to put shards together along, got ()")
                kind = kind or (shard.dtype, shard.shape[1:])
                if (shard.dtype, shard.shape[1:]) != kind:
                    expected = f"shape {('*', *kind[1])} {kind[0]} as in {files[0]}".replace("'", "")
                    raise FileError(shard.name, f"expected {expected}, got {shard.shape} {shard.dtype}")
                self._shards.append((file, shard.identity(), shard.size))
                rows, size = rows + shard.shape[0], size + shard.nbytes
                self.by_column = self.by_column or shard.by_column
                if len(self._shards) == 1:
                    self.floor = shard.floor
                if shard.floor != self.floor:
                    expected = f"a floor of {self.floor} nats as in {files[0]}"
                    raise FileError(shard.name, f"expected {expected}, got {shard.floor}")
        super().__init__(name, None, (rows, *kind[1]), kind[0])
        self.nbytes = size
        self._next, self._left, self._shard = 0, 0, None

    def _pieces(self, count):
        """(an open shard, how many of the next `count` elements it has)"""
        while count:
            while not self._left:
                file, identity, self._left = self._shards[self._next]
                self._next += 1
                self.close()
                self._shard = self.owned.enter_context(self._again(file, identity))
            piece = min(count, self._left)
            yield self._shard, piece
            count -= piece
            self._left -= piece

    def _again(self, file, identity):
        try:
            shard = self._opener(file)
        except FileError as error:
            raise FileError(error.args[0], f"changed while it was read: {error.args[1]}") from error
        if shard.identity() != identity:
            shard.close()
            raise FileError(shard.name, "changed while it was read")
        return shard

    def read(self, out):
        done = 0
        for shard, piece in self._pieces(len(out)):
            shard.read(out[done : done + piece])
            done += piece

    def skip(self, count):
        for shard, piece in self._pieces(count):
            shard.skip(piece)

    def identity(self):
        return [entry for _, identity, _ in self._shards for entry in identity]

    def is_file(self, path):
        with suppress(FileNotFoundError):
            return any(os.path.samefile(path, file) for file, _, _ in self._shards)
        return False
