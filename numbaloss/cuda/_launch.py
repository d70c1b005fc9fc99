"""The only file that imports Numba's CUDA target, and the only function that starts a kernel.

Kernels get integers alone: an array as an argument would cost more host time than a small kernel takes. Everything runs
on CuPy's current stream and on the device of the arrays; nothing here waits for the device.
"""

import threading
import warnings
from functools import cache

import cupy
from numba import cuda
from numba.core.errors import NumbaPerformanceWarning
from numba.cuda.models import register_model

from .._backend import package_stamp

__all__ = ["cuda", "device", "kept", "kernel", "launch", "processors", "register_model"]

_HELD = 1024  # configured launches
_lock = threading.Lock()
_configured = {}
_captured = []

device = cuda.jit(device=True)


_STAMP = package_stamp("cuda")


class Kernel:
    """A kernel for at most `threads` a block, and for at least so many blocks a multiprocessor (the fewer, the more
    registers a thread may have) for logits of 2, 4 and 8 bytes. It is compiled at its first launch and then kept on
    disk, where a folder can be written."""

    def __init__(self, function, threads, blocks):
        self.py_func, self.__doc__ = function, function.__doc__
        self._for_size = {2 << i: self._jit(threads, n) for i, n in enumerate(blocks)}

    def _jit(self, *bounds):
        compiled = cuda.jit(launch_bounds=bounds)(self.py_func)
        try:
            compiled.enable_caching()
            compiled._cache._cache_file._source_stamp = _STAMP
        except (RuntimeError, OSError, AttributeError):
            pass
        return compiled

    def of(self, like):
        """What to launch for such logits."""
        return self._for_size[like.itemsize]


def kernel(threads, *blocks):
    return lambda function: Kernel(function, threads, blocks or (1, 1, 1))


def launch(kernel, blocks, threads, out, *args):
    """kernel[blocks, threads](*args) on the current device, that of the array `out`, and CuPy's current stream."""
    if blocks == 0:
        return 0
    key = kernel, blocks, threads, cupy.cuda.get_current_stream().ptr, out.device.id
    start = _configured.get(key)
    if start is None:
        start = _configure(key)
    start(*args)
    return 0


def _configure(key):
    kernel, blocks, threads, stream, number = key
    _require(number)
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaPerformanceWarning)  # small grids are meant to be small
        if len(_configured) >= _HELD:
            _configured.clear()
        _configured[key] = kernel[blocks, threads, cuda.external_stream(stream) if stream else 0]
    return _configured[key]


@cache
def _require(number):
    """The instructions that keep NaN through a maximum came with Ampere."""
    capability = cupy.cuda.Device(number).compute_capability
    if int(capability) < 80:
        raise RuntimeError(
            f"device {number}: expected compute capability 8.0 or later, got {capability[:-1]}.{capability[-1]}; "
            "pass NumPy arrays, as cupy.asnumpy gives them"
        )


@cache
def _processors(number):
    return cupy.cuda.Device(number).attributes["MultiProcessorCount"]


def processors(out):
    """Multiprocessors of the device of the array `out`."""
    return _processors(out.device.id)


def kept(x):
    """x, an array that no user holds. A CUDA graph that is being captured will write to it again: then it lives on."""
    if cupy.cuda.get_current_stream().is_capturing():
        _captured.append(x)
    return x
