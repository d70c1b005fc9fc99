"""The only file that imports Numba's CUDA target, and the only function that starts a kernel.

Kernels get integers alone: an array as an argument would cost more host time than a small kernel takes. Everything runs
on CuPy's current stream and on the device of the arrays; nothing here waits for the device.
"""

import ctypes
import importlib
import struct
import threading
from contextlib import nullcontext as leave_a_core  # of the CPU, which these kernels do not use
from contextlib import suppress
from functools import cache

import cupy
import numpy as np
from cupy.cuda import driver
from numba import cuda, types
from numba.cuda.cudadrv.driver import binding
from numba.cuda.cudadrv.driver import driver as numba_driver
from numba.cuda.models import register_model

from .._backend import keep_on_disk, package_stamp

if not hasattr(np, "row_stack"):  # gone with NumPy 2.5, and numba-cuda 0.30 still asks for it, once
    np.row_stack = np.vstack
    try:
        importlib.import_module("numba.cuda.cudaimpl")
    finally:
        del np.row_stack

__all__ = ["cuda", "device", "kept", "kernel", "launch", "leave_a_core", "processors", "register_model", "resident"]

SYSTEM_SHARED = 1024  # bytes of shared memory that a block has beside its own
MOST_ROOM = binding.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

_lock = threading.Lock()
_compiled = {}
_captured = []

device = cuda.jit(device=True)


_STAMP = package_stamp("cuda")


class Kernel:
    """A kernel for at most `threads` a block, and for so many blocks on a multiprocessor at once (the fewer, the more
    registers a thread may have) for logits of 2, 4 and 8 bytes. Each warp has `room` bytes of its block's array of
    length 0 in shared memory; `shared` are the bytes of its other arrays, where they decide how many blocks there are.
    """

    def __init__(self, function, threads, blocks, room=0, shared=0):
        self.py_func, self.__doc__ = function, function.__doc__
        self._for_size = {2 << i: Bounded(function, threads, n, room, shared) for i, n in enumerate(blocks)}

    def of(self, like):
        """What to launch for such logits."""
        return self._for_size[like.itemsize]


def kernel(threads, *blocks, room=0, shared=0):
    return lambda function: Kernel(function, threads, blocks or (1, 1, 1), room, shared)


class Bounded:
    """A Kernel for logits of one size. It is compiled at its first launch on a device and then kept on disk, where a
    folder can be written."""

    def __init__(self, function, threads, blocks, room, shared):
        self.py_func, self.threads, self.room, self.most_room = function, threads, room, room * threads // 32
        self.shared, self._most, self._jits = shared, blocks, {}

    def blocks(self, number):
        """How many blocks a multiprocessor of device `number` is to hold at once."""
        shared, most = _multiprocessor(number)
        if self.shared:
            most = min(most, max(1, shared // (self.shared + self.most_room + SYSTEM_SHARED)))
        return min(self._most, most)

    def jit(self, number):
        """What compiles it for device `number`."""
        bounds = self.threads, self.blocks(number)
        if bounds not in self._jits:
            self._jits[bounds] = compiled = cuda.jit(launch_bounds=bounds)(self.py_func)
            with suppress(RuntimeError, OSError, AttributeError):
                keep_on_disk(compiled, _STAMP)
        return self._jits[bounds]


def launch(kernel, blocks, threads, out, *args):
    """Start blocks of threads with these arguments, numbers and tuples of numbers, on CuPy's current stream and the
    current device, that of the array `out`."""
    if blocks == 0:
        return 0
    numbers = []
    for x in args:
        if type(x) is tuple:
            numbers.extend(x)
        else:
            numbers.append(x)
    key = kernel, out.data.device_id, *map(type, numbers)
    compiled = _compiled.get(key) or _compile(key, args)
    compiled(blocks, threads, cupy.cuda.get_current_stream().ptr, numbers)
    return 0


class Compiled:
    """A kernel of one signature on device `number`, the current one. Its arguments go to the driver in one piece, as C
    would lay them out: Numba's own launch turns each into a ctypes object, which takes longer than all the rest."""

    def __init__(self, kernel, args, number):
        function = kernel.jit(number).compile(signature(args))._codelibrary.get_cufunc()
        self._room_of_warp = kernel.room
        self._handle = int(function.handle)
        if kernel.most_room:  # more than 48 KB are asked for by name
            numba_driver.cuKernelSetAttribute(MOST_ROOM, kernel.most_room, function.handle, function.device.id)
        self._pack = struct.Struct(parameters(args)).pack_into
        self._room = ctypes.create_string_buffer(struct.calcsize(parameters(args)))
        self._size = ctypes.c_size_t(len(self._room))
        items = 1, ctypes.addressof(self._room), 2, ctypes.addressof(self._size), 0  # CU_LAUNCH_PARAM_...
        self._extra = (ctypes.c_void_p * 5)(*items)
        self._lock, self._where = threading.Lock(), ctypes.addressof(self._extra)

    def __call__(self, blocks, threads, stream, numbers):
        with self._lock:
            self._pack(self._room, 0, *numbers)
            room = self._room_of_warp * threads // 32
            driver.launchKernel(self._handle, blocks, 1, 1, threads, 1, 1, room, stream, 0, self._where)


_TYPES = {
    int: ("q", types.int64),
    float: ("d", types.float64),
    np.int32: ("i", types.int32),
    np.int16: ("h", types.int16),
    np.uint16: ("H", types.uint16),
    np.float32: ("f", types.float32),
    np.float64: ("d", types.float64),
}


def signature(args):
    """The Numba types of a kernel's arguments."""
    of = types.BaseTuple.from_types
    return tuple(of([_TYPES[type(n)][1] for n in x]) if type(x) is tuple else _TYPES[type(x)][1] for x in args)


def parameters(args):
    """A format of the module struct for a kernel's arguments: Numba passes the items of a tuple one by one."""
    numbers = (n for x in args for n in (x if type(x) is tuple else (x,)))
    return "@" + "".join(_TYPES[type(n)][0] for n in numbers)


def _compile(key, args):
    _require(key[1])
    with _lock:
        if key not in _compiled:
            _compiled[key] = Compiled(key[0], args, key[1])
    return _compiled[key]


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


@cache
def _multiprocessor(number):
    """(bytes of shared memory, most blocks at once) of one."""
    runtime = cupy.cuda.runtime
    wanted = runtime.cudaDevAttrMaxSharedMemoryPerMultiprocessor, runtime.cudaDevAttrMaxBlocksPerMultiprocessor
    return tuple(runtime.deviceGetAttribute(x, number) for x in wanted)


def processors(out):
    """Multiprocessors of the device of the array `out`."""
    return _processors(out.data.device_id)


def resident(kernel, out):
    """How many blocks of a Kernel.of the device of the array `out` holds at once."""
    number = out.data.device_id
    return kernel.blocks(number) * _processors(number)


def kept(x):
    """x, an array that no user holds. A CUDA graph that is being captured will write to it again: then it lives on."""
    if cupy.cuda.get_current_stream().is_capturing():
        _captured.append(x)
    return x
