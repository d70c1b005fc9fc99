"""How a CPU kernel is compiled and started: in parallel where that is safe and worth it, serially otherwise.

Both ways give the same bits. Serial are: small inputs (a parallel start costs 10 microseconds), calls while another
thread is inside a parallel kernel (Numba's workqueue layer would abort the process), and children of a fork whose
parent had started threads (GNU OpenMP would end them).
"""

import inspect
import os
import threading
import types
from contextlib import contextmanager

import numba
import numpy as np
from numba import njit
from numba.core.caching import NullCache

from .._backend import keep_on_disk, package_stamp

_OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False}
_SMALL = 1 << 15  # elements
BLOCKS_PER_THREAD = 8

_NO_WEIGHTS = np.empty(0)

_busy = threading.Lock()
_started = False
_forked = False


def _after_fork():
    global _forked, _busy
    _forked = _started
    _busy = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_STAMP = package_stamp("cpu")


def _compile(function, parallel):
    """`function` for Numba's disk cache, or for this process alone where no folder can be written.

    Numba's cache goes by name and signature, not by options: the serial form needs a name of its own.
    """
    if not parallel:
        copy = types.FunctionType(function.__code__, function.__globals__, function.__name__)
        copy.__qualname__ = function.__qualname__ + "_serial"
        copy.__module__, copy.__doc__ = function.__module__, function.__doc__
        function = copy
    kernel = njit(parallel=parallel, **_OPTIONS)(function)
    try:
        keep_on_disk(kernel, _STAMP)
    except (RuntimeError, OSError, AttributeError):
        kernel._cache = NullCache()
    return kernel


class Kernel:
    """A kernel and its two compiled forms.

    kernel(work, items, *args) runs function(blocks, *args): `work` is the number of elements it will read, `items` the
    number of rows or the like that it cuts into blocks, one after another a thread. Weights of None become an empty
    array, so that the kernel is compiled once for both.
    """

    def __init__(self, function):
        self.__doc__ = function.__doc__
        self.function = function
        names = list(inspect.signature(function).parameters)[1:]
        self._weights = names.index("weights") if "weights" in names else None
        self.serial = _compile(function, parallel=False)
        self.parallel = _compile(function, parallel=True)

    def __call__(self, work, items, *args):
        global _started
        if self._weights is not None and args[self._weights] is None:
            args = *args[: self._weights], _NO_WEIGHTS, *args[self._weights + 1 :]
        if work > _SMALL and not _forked and numba.get_num_threads() > 1 and _busy.acquire(blocking=False):
            try:
                _started = True
                return self._run(
                    self.parallel, (max(1, min(items, BLOCKS_PER_THREAD * numba.get_num_threads())), *args)
                )
            finally:
                _busy.release()
        return self._run(self.serial, (1, *args))

    @staticmethod
    def _run(kernel, args):
        try:
            return kernel(*args)
        except OSError:  # the cache folder is full or has become read-only
            kernel._cache = NullCache()
            return kernel(*args)


@contextmanager
def leave_a_core():
    """Kernels use a thread less: another one reads, or holds its core for 20 ms after a matmul (OpenBLAS), and a kernel
    waits for the slowest of its own."""
    global _started
    if _forked:
        yield
        return
    _started, threads = True, numba.get_num_threads()
    numba.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        numba.set_num_threads(threads)


def cache_folder():
    """The folder that keeps the compiled kernels, or None if none can be written."""
    from .totals import round_total

    return getattr(round_total.serial._cache, "cache_path", None)
