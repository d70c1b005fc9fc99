"""The only file that knows there are two backends: the type of the arrays picks one."""

import os
import sys
from functools import cache, wraps
from importlib import import_module

import numpy as np

_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def is_cupy(x):
    """Whether x is a CuPy array; never imports CuPy, which must have been imported for one to exist."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def array_module(x):
    """NumPy, or CuPy for a CuPy array."""
    return sys.modules["cupy"] if is_cupy(x) else np


def on_its_device(function):
    """Decorator: CuPy arrays make their device the current one, so that results and scratch lie there too."""

    @wraps(function)
    def run(*args, **options):
        cupy = sys.modules.get("cupy")
        if cupy is not None:
            first = next((x for x in (*args, *options.values()) if isinstance(x, cupy.ndarray)), None)
            if first is not None and first.device.id != cupy.cuda.runtime.getDevice():
                with cupy.cuda.Device(first.device.id):
                    return function(*args, **options)
        return function(*args, **options)

    return run


def kernels(family, **arrays):
    """The module of kernels for these arguments: numbaloss.cpu.<family>, or its twin for CuPy arrays.

    Raises:
        TypeError: NumPy and CuPy arrays are mixed.
        ImportError: CuPy arrays, and no CUDA backend; says what to install.
    """
    cupy = sys.modules.get("cupy")
    if cupy is None:
        return _module("cpu", family)
    on_device = on_host = None
    for name, x in arrays.items():
        if isinstance(x, cupy.ndarray):
            on_device = on_device or name
        elif isinstance(x, np.ndarray):
            on_host = on_host or name
    if on_device and on_host:
        raise TypeError(f"{on_host}: expected a CuPy array as {on_device} is, got a NumPy array")
    return _module("cuda" if on_device else "cpu", family)


def package_stamp(backend):
    """Changes when a source file of the package or this backend does: Numba looks only at the kernel's own file."""
    stamps = []
    for folder in (_PACKAGE, os.path.join(_PACKAGE, backend)):
        with os.scandir(folder) as files:
            stamps += [(f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.name.endswith(".py")]
    return tuple(sorted(stamps))


@cache
def _module(device, family):
    return import_module(f"numbaloss.{device}.{family}")
