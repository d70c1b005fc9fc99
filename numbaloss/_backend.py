"""The only file that knows there are two backends: the type of the arrays picks one. And where Dask's go."""

import hashlib
import os
import sys
from functools import cache, wraps
from importlib import import_module

import numpy as np

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
OTHER, CUPY, DASK = range(3)


class _Kinds(dict):
    """CUPY, DASK or OTHER by types; never imports CuPy or Dask, which must have been for such an array to exist."""

    def __missing__(self, type_):
        found = OTHER
        for kind, module, name in (CUPY, "cupy", "ndarray"), (DASK, "dask.array", "Array"):
            if issubclass(type_, getattr(sys.modules.get(module), name, ())):  # one may be half imported, elsewhere
                found = kind
        self[type_] = found  # at once: other threads look too
        return found


_kinds = _Kinds()


def is_cupy(x):
    """Whether x is a CuPy array."""
    return _kinds[type(x)] == CUPY


def is_dask(x):
    """Whether x is a Dask array."""
    return _kinds[type(x)] == DASK


def array_module(x):
    """NumPy, or CuPy for a CuPy array. (NumPy's functions take Dask arrays.)"""
    return sys.modules["cupy"] if is_cupy(x) else np


def on_its_device(function):
    """Decorator: CuPy arrays make their device the current one, so that results and scratch lie there too; with a Dask
    array the function is called on blocks of rows."""

    @wraps(function)
    def run(*args, **options):
        number = None
        for x in (*args, *options.values()):
            kind = _kinds[type(x)]
            if kind == CUPY:
                number = x.data.device_id if number is None else number
            elif kind == DASK:
                return import_module("numbaloss._dask").call(run, args, options)
        if number is not None:
            device = sys.modules["cupy"].cuda
            if number != device.runtime.getDevice():
                with device.Device(number):
                    return function(*args, **options)
        return function(*args, **options)

    return run


def kernels(family, **arrays):
    """The module of kernels for these arguments: numbaloss.cpu.<family>, or its twin for CuPy arrays.

    Raises:
        TypeError: NumPy and CuPy arrays are mixed.
        ValueError: CuPy arrays on several devices.
        ImportError: CuPy arrays, and no CUDA backend; says what to install.
    """
    first = on_host = None
    for name, x in arrays.items():
        if is_cupy(x):
            here = x.data.device_id
            if first is None:
                first, there = name, here
            elif here != there:
                raise ValueError(f"{name}: expected an array on device {there} as {first} is, got one on device {here}")
        elif isinstance(x, np.ndarray):
            on_host = on_host or name
    if first and on_host:
        raise TypeError(f"{on_host}: expected a CuPy array as {first} is, got a NumPy array")
    return _module("cuda" if first else "cpu", family)


def kernels_of(x, family):
    """As kernels, for an array that has been through it."""
    return _module("cuda" if is_cupy(x) else "cpu", family)


def package_stamp(backend):
    """Changes when a source file of the package or this backend does: Numba looks only at the kernel's own file."""
    stamps = []
    for folder in (_PACKAGE, os.path.join(_PACKAGE, backend)):
        with os.scandir(folder) as files:
            stamps += [(f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.name.endswith(".py")]
    return tuple(sorted(stamps))


def keep_on_disk(dispatcher, stamp):
    """Let Numba keep what `dispatcher` compiles, as long as `stamp` stays; an OSError, RuntimeError or AttributeError
    says that it can't.

    Numba gives the next free number to a file and looks it up by an index: of two processes that compile the same
    function for different types at once, one may find the other's code under its own types. Files here are named by
    what they hold, and an index that lacks one costs a compilation.
    """
    dispatcher.enable_caching()
    file = dispatcher._cache._cache_file
    file._source_stamp = stamp

    def save(key, data):
        name = file._data_name(int(hashlib.sha256(repr(key).encode()).hexdigest()[:15], 16))
        file._save_data(name, data)
        file._save_index(file._load_index() | {key: name})

    file.save = save


@cache
def _module(device, family):
    return import_module(f"numbaloss.{device}.{family}")
