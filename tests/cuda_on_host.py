"""CuPy arrays over host memory and the CUDA backend run by ptx.py or simt.py: public functions on real cupy.ndarray
objects, without a GPU. Anything that would ask a driver raises.
"""

import contextlib
import ctypes
import functools
import itertools
import os
import struct
import sys
from types import SimpleNamespace
from unittest import mock

import cupy
import ml_dtypes
import numpy as np
import ptx
import simt
from numba import njit
from simt import MEMORY, scalar_twin, twin

from numbaloss import _check, _divergence_scalar, _intrinsics, _scalar, _typed, _vector
from numbaloss.cuda import _chunks, _launch, _memory, divergence
from numbaloss.cuda import _operands as _operands  # loads what the kernels use

DTYPES = {np.int16: np.dtype(np.int16), np.uint16: np.dtype(np.uint16)}
WIDTH, LANES = _memory.WIDTH, np.arange(_memory.WIDTH)
WIDEN = {np.dtype(np.uint16): ptx.from_bfloat16, np.dtype(np.int16): ptx.from_float16}
NARROW = {np.dtype(np.uint16): ptx.to_bfloat16, np.dtype(np.int16): ptx.to_float16}
SOURCES = "CUDA_SOURCES" in os.environ  # all kernels run in simt.py


# -- arrays ------------------------------------------------------------------------------------------------------


_current = [0]


class Device:
    """cupy.cuda.Device as far as it needs no driver."""

    compute_capability = "90"

    def __init__(self, number):
        self.id = number

    def __enter__(self):
        _current.append(self.id)

    def __exit__(self, *error):
        _current.pop()


def _allocate(nbytes):
    """Host memory at 256 bytes, as CuPy's allocator gives it, full of NaN; reads beyond its end are found."""
    raw = np.full(nbytes + 256, 0xFF, np.uint8)
    offset = -raw.ctypes.data % 256
    room = raw[offset : offset + max(nbytes, 1)]
    MEMORY.add(room)
    memory = cupy.cuda.UnownedMemory(room.ctypes.data, max(nbytes, 1), room, device_id=_current[-1])
    return cupy.cuda.MemoryPointer(memory, 0)


def empty(shape, dtype=float):
    dtype, shape = np.dtype(dtype), (shape,) if isinstance(shape, int) else tuple(shape)
    return cupy.ndarray(shape, dtype, memptr=_allocate(int(np.prod(shape)) * dtype.itemsize))


def zeros(shape, dtype=float):
    result = empty(shape, dtype)
    _view(result)[...] = 0
    return result


def to_cupy(x):
    """A CuPy array with the values and the strides of a NumPy array."""
    x = np.asarray(x)
    if x.size == 0:
        return cupy.empty(x.shape, x.dtype)
    low, high = getattr(np.lib, "array_utils", np).byte_bounds(x)  # its place in NumPy 2, or 1
    address = x.__array_interface__["data"][0]
    if ON_DEVICE:
        memory = cupy.cuda.alloc(high - low)
        memory.copy_from_host(ctypes.c_void_p(low), high - low)
    else:
        memory = _allocate(high - low)
        ctypes.memmove(memory.ptr, low, high - low)
    return cupy.ndarray(x.shape, x.dtype, memptr=memory + (address - low), strides=x.strides)


def far_apart(values, stride):
    """A CuPy array of float32 whose rows lie `stride` bytes apart; what lies between is not touched."""
    nbytes = stride * len(values)
    if ON_DEVICE:
        result = cupy.ndarray(values.shape, np.float32, cupy.cuda.alloc(nbytes), strides=(stride, 4))
        result[...] = cupy.asarray(values)
        return result
    raw = np.zeros(nbytes, np.uint8)
    np.ndarray(values.shape, np.float32, raw, strides=(stride, 4))[...] = values
    memory = cupy.cuda.UnownedMemory(MEMORY.add(raw), nbytes, raw, device_id=0)
    return cupy.ndarray(values.shape, np.float32, cupy.cuda.MemoryPointer(memory, 0), strides=(stride, 4))


def to_numpy(x):
    """A copy of a CuPy array as a NumPy array."""
    return x.get() if ON_DEVICE else _view(x).copy()


def _view(x):
    if x.size == 0:
        return np.empty(x.shape, x.dtype)
    buffer = (ctypes.c_ubyte * x.data.mem.size).from_address(x.data.mem.ptr)
    return np.ndarray(x.shape, x.dtype, buffer=buffer, offset=x.data.ptr - x.data.mem.ptr, strides=x.strides)


def ascontiguousarray(x, dtype=None):
    """The one function of CuPy's that would start a kernel of its own here."""
    if x.flags.c_contiguous and (dtype is None or x.dtype == dtype):
        return x
    return to_cupy(np.ascontiguousarray(to_numpy(x), dtype))


def by_numpy(function):
    """A function of CuPy's with `out`, computed by NumPy."""

    def run(*args, out):
        function(*(_view(a) if isinstance(a, cupy.ndarray) else a for a in args), out=_view(out))
        return out

    return run


def program_of(function, signature):
    """The compiled PTX of a kernel; None where its source is to run."""
    if SOURCES:
        return None
    from compiled import program  # which imports what there is on Linux only

    return program(function, signature)


@contextlib.contextmanager
def on_host(order=None, launches=None, races=False):
    """CuPy's allocations come from host memory. Kernels run in ptx.py, as they are compiled for sm_90; or in simt.py,
    as they are written: those that compiled.py has not, all with CUDA_SOURCES in the environment, in an `order` of the
    threads, or with a look for races. `launches` collects (name, blocks, threads). Nothing changes on a device."""
    if ON_DEVICE:
        yield
        return

    def compiled(kernel, first, number):
        signature = _launch.signature(first)
        struct.calcsize(_launch.parameters(first))  # raises for what cannot be packed
        program = None if order or races else program_of(kernel.py_func, signature)
        sizes = [len(x) if type(x) is tuple else None for x in first]

        def start(blocks, threads, stream, numbers):
            room = kernel.room * threads // 32
            if launches is not None:
                launches.append((kernel.py_func.__name__, blocks, threads))
            if program is not None:
                ptx.run(program, blocks, threads, room, numbers)
                return
            rest = iter(numbers)
            args = [next(rest) if n is None else tuple(itertools.islice(rest, n)) for n in sizes]
            simt.launch(kernel, blocks, threads, args, order, room, races)

        return start

    stream = SimpleNamespace(ptr=0, is_capturing=lambda: False)
    with contextlib.ExitStack() as patches:
        for target, name, value in (
            (cupy, "empty", empty),
            (cupy, "zeros", zeros),
            (cupy, "empty_like", lambda x, dtype: to_cupy(np.empty_like(_view(x), dtype))),
            (cupy, "array", lambda x, dtype=None, order="K": to_cupy(np.array(to_numpy(x), dtype, order=order))),
            (cupy, "asarray", lambda x: x if isinstance(x, cupy.ndarray) else to_cupy(x)),
            (cupy, "ascontiguousarray", ascontiguousarray),
            (cupy.cuda, "get_current_stream", lambda: stream),
            (cupy.cuda, "Device", Device),
            (cupy.cuda.runtime, "getDevice", lambda: _current[-1]),
            (_check, "on_host", lambda x: to_numpy(x) if isinstance(x, cupy.ndarray) else x),
            (_launch, "Compiled", compiled),
            (_launch, "_compiled", {}),
            (_launch, "_processors", lambda number: 2),
            (_launch, "_multiprocessor", lambda number: (228 << 10, 32)),
        ):
            patches.enter_context(mock.patch.object(target, name, value))
        yield


def results(result):
    """A result, or the fields of one that are not None, as NumPy arrays with one NaN."""
    if isinstance(result, tuple):
        return tuple(results(r) for r in result if r is not None)
    result = to_numpy(result) if isinstance(result, cupy.ndarray) else np.array(result)
    if result.dtype.kind not in "biu":
        result[result != result] = np.nan
    return result


def modules():
    """The modules of the CUDA backend."""
    return [module for name, module in sys.modules.items() if name.startswith("numbaloss.cuda.")]


def a_device_is_there():
    try:
        return cupy.cuda.runtime.getDeviceCount() > 0
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


ON_DEVICE = a_device_is_there()


# -- twins of the intrinsics: a Vector is a NumPy array of its width ---------------------------------------------


_DTYPES = {kind: np.dtype(kind) for kind in (np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64, float)}
_PER_LOAD = {kind: 16 // dtype.itemsize for kind, dtype in _DTYPES.items()}


def dtype_of(like):
    return _DTYPES.get(type(like)) or np.dtype(type(like))


def per_load(like):
    return _PER_LOAD[type(like)]


def widened(x):
    return WIDEN[x.dtype](x) if x.dtype in WIDEN else x.copy()


def precision(like):
    return np.float64 if isinstance(like, float) else np.float32


def load_item(address, dtype):
    array, i = MEMORY.item(address, dtype)
    return array[i]


@twin(_memory.load)
def load(like, address):
    simt.touch_memory(address, dtype_of(like).itemsize, simt.READS)
    return load_item(address, dtype_of(like))


@twin(_memory.load_fresh)
def load_fresh(address):
    return load_item(address, np.dtype(np.int64))


@twin(_memory.store)
def store(address, value):
    array, i = MEMORY.item(address, value.dtype if isinstance(value, np.generic) else np.asarray(value).dtype)
    simt.touch_memory(address, array.itemsize, simt.WRITES)
    array[i] = value


@twin(_memory.atomic_add)
def atomic_add(address, value):
    array, i = MEMORY.item(address, np.dtype(np.int64))
    before = array[i]
    array[i] += value
    return before


@twin(_memory.anew)
def anew(x):
    return x


@twin(_memory.thread_anew, needs_cuda=True)
def thread_anew(cuda):
    return lambda: np.int32(cuda.threadIdx.x)


@twin(_memory.zeros)
def zeros_like(like):
    return np.zeros(WIDTH, precision(like))


@twin(_memory.load_vector)
def load_vector(like, address, team):
    count, step = WIDTH // per_load(like), 16 * int(team)
    simt.touch_memory(int(address), 16, simt.READS, count, step)
    return widened(MEMORY.loads(address, count, step, dtype_of(like)))


@functools.cache
def _far(n, team):
    return LANES // n * team * n + LANES % n


def far(like, team=32):
    """How far each item of a thread's vector lies from the first."""
    return _far(per_load(like), int(team))


def neighbours(like, position, begin, end, team=32):
    """(k, how far it lies from the first, count): the items k, k + 1, ... of a load that are in [begin, end)."""
    n, position, begin, end = per_load(like), int(position), int(begin), int(end)
    for k, step in enumerate(range(0, WIDTH * int(team), n * int(team))):
        first = max(begin - position - step, 0)
        count = min(end - position - step, n) - first
        if count > 0:
            yield k * n + first, step + first, count


def _load(dtype, address, stride, first, last, out):
    """out[i] = item i of a load for i in [first, last)."""
    simt.touch_memory(address + first * stride, dtype.itemsize, simt.READS, last - first, stride)
    if last - first == out.size and stride == dtype.itemsize and address % 16 == 0:
        out[...] = widened(MEMORY.view(address, 16, 16).view(dtype))
    else:
        for i in range(first, last):
            out[i] = widen(load_item(address + i * stride, dtype))


@twin(_memory.load_once)
def load_once(like, address, stride, position, begin, end):
    """Items outside of [begin, end) are -inf and not touched."""
    n, position = per_load(like), int(position)
    result = np.full(n, -np.inf, precision(like))
    _load(dtype_of(like), address, stride, max(int(begin) - position, 0), min(int(end) - position, n), result)
    return result


@twin(_memory.load_part)
def load_part(like, address, stride, position, begin, end, team):
    n, dtype, step, position = per_load(like), dtype_of(like), per_load(like) * int(team), int(position)
    first, last, reach = int(begin) - position, int(end) - position, (WIDTH // n - 1) * step + n
    if first <= 0 and last >= reach and stride == dtype.itemsize and address % 16 == 0:
        return load_vector(like, address, team)
    result = np.full(WIDTH, -np.inf, precision(like))
    if first < reach and last > 0:
        for k in range(WIDTH // n):
            at = k * step
            _load(dtype, address + at * stride, stride, max(first - at, 0), min(last - at, n), result[k * n :][:n])
    return result


@twin(_memory.widened)
def widened_loads(like, v):
    """Loads are widened here as they are loaded."""
    return v


@twin(_memory.fill)
def fill(like, x):
    return np.full(WIDTH, x)


def narrowed(like, v):
    """Items rounded to the type of `like`."""
    dtype = dtype_of(like)
    return NARROW[dtype](v).view(dtype) if dtype in NARROW else v.astype(dtype)


@twin(_memory.store_item)
def store_item(like, address, value):
    store(address, narrowed(like, np.array([value]))[0])


@twin(_memory.store_part)
def store_part(like, like_out, address, stride, position, begin, end, v):
    narrow = narrowed(like_out, v)
    for k, step, count in neighbours(like, position, begin, end):
        if stride == narrow.itemsize:
            simt.touch_memory(address + step * stride, count * stride, simt.WRITES)
            MEMORY.view(address + step * stride, count * stride, stride)[:] = narrow[k : k + count].view(np.uint8)
        else:
            for i in range(count):
                store(address + (step + i) * stride, narrow[k + i])


@twin(_memory.store_once)
def store_once(like_out, address, stride, begin, end, v):
    narrow = narrowed(like_out, v)
    for k in range(int(begin), min(int(end), v.size)):
        store(address + k * stride, narrow[k])


@twin(_memory.hide)
def hide(like, v, k, team):
    return np.where(far(like, team) == k, v.dtype.type(-np.inf), v)


@twin(_memory.hide_first)
def hide_first(like, v, count):
    return np.where(LANES < count, v.dtype.type(-np.inf), v)


RINGS = {}  # by the address that the last of them got


@twin(_memory.shared_address)
def shared_address(array):
    """Small numbers stand for addresses, which would not fit into 32 bits."""
    for address, ring in RINGS.items():
        if ring is array:
            return np.int32(address)
    if len(RINGS) > 1000:
        RINGS.clear()
    RINGS[address := len(RINGS) << 20] = array
    return np.int32(address)


def _ring(where):
    """(bytes of the array, place) of an address in shared memory."""
    return RINGS[int(where) >> 20 << 20].view(np.uint8), int(where) & 0xFFFFF


@twin(_memory.copy_ahead, _memory.copy_last)
def copy_ahead(like, where, address):
    copy_ahead_part(like, where, address, 1 << 20)


@twin(_memory.copy_ahead_part, _memory.copy_last_part)
def copy_ahead_part(like, where, address, left):
    """Every second round is copied at once, the others not before they are awaited: so a place that is still to be read
    shows, and a round that is not awaited. `copies` of a thread are its rounds, the last one not ended."""
    ring, place = _ring(where)
    rounds, early = _copies(), simt.getcurrent().rounds % 2
    for g in range(WIDTH // per_load(like)):
        if int(left) - _memory.APART * g >= 16:
            at = int(address) + _memory.APART * g
            if at % 16:
                raise simt.SimError(f"a copy from {at:#x}, which is no multiple of 16")
            target, source = ring[place + _memory.APART * g :][:16], MEMORY.view(at, 16, 16)
            simt.touch(target, simt.COPIES)
            if early:
                target.view(np.ndarray)[:] = source
            rounds[-1].append((target, None if early else source))


def _copies():
    me = simt.getcurrent()
    if not hasattr(me, "copies"):
        me.copies, me.rounds = [[]], 0
    return me.copies


@twin(_memory.end_of_round)
def end_of_round():
    _copies().append([])
    simt.getcurrent().rounds += 1


@twin(_memory.await_oldest)
def await_oldest(like, capacity):
    rounds, under_way = _copies(), int(capacity) // (32 * WIDTH * dtype_of(like).itemsize) - 1
    while len(rounds) - 1 > under_way:
        for target, source in rounds.pop(0):
            target[:] = target if source is None else source


@twin(_memory.store_ring)
def store_ring(like, where, item):
    _store_bytes(where, np.array([item]).view(np.uint8))


def _store_bytes(where, items):
    ring, place = _ring(where)
    if place + items.size > ring.size:
        raise simt.SimError(f"byte {place} of a ring of {ring.size}")
    ring[place : place + items.size] = items


@functools.cache
def _hidden(dtype):
    """A load of -inf, as bytes."""
    return narrowed(dtype.type(0), np.full(16 // dtype.itemsize, -np.inf, np.float32)).view(np.uint8)


@twin(_memory.hide_item)
def hide_item(like, where):
    _store_bytes(where, _hidden(dtype_of(like))[: dtype_of(like).itemsize])


@twin(_memory.hide_load)
def hide_load(like, where):
    _store_bytes(where, _hidden(dtype_of(like)))


@twin(_memory.load_ring)
def load_ring(like, where):
    ring, place = _ring(where)
    loads = [ring[place + _memory.APART * g :][:16] for g in range(WIDTH // per_load(like))]
    for x in loads:
        simt.touch(x, simt.READS)
    return widened(np.concatenate([x.view(np.ndarray) for x in loads]).view(dtype_of(like)))


def _pair(words, like):
    """The logits in a word, or in many, the lower half first."""
    return widened(np.atleast_1d(np.asarray(words)).astype(np.int32).view(dtype_of(like)))


def _as_pair(a, b, like):
    return np.array([a, b], np.float32).astype(STORED[dtype_of(like)]).view(np.int32)[0]


STORED = {np.dtype(np.uint16): ml_dtypes.bfloat16, np.dtype(np.int16): np.float16}


@twin(_memory.larger_pair)
def larger_pair(like, a, b):
    return _as_pair(*np.maximum(_pair(a, like), _pair(b, like)), like)


@twin(_memory.pairs_above)
def pairs_above(like, v, low):
    return np.maximum(v, _pair(low, like)[0])


@twin(_memory.largest_pair)
def largest_pair(like, v, top):
    return _as_pair(*np.maximum(v.reshape(-1, 2).max(axis=0), _pair(top, like)), like)


@twin(_memory.pair_above)
def pair_above(like, x):
    dtype = STORED[dtype_of(like)]
    up = np.float32(x).astype(dtype)
    if up < x:
        up = np.nextafter(up, dtype(np.inf))
    return _as_pair(up, up, like)


@twin(_memory.larger_of_pair)
def larger_of_pair(like, pair):
    return np.float32(_pair(pair, like).max())


@twin(_memory.least_logit)
def least_logit(like, v):
    return np.float32(v.min())


@twin(_memory.warp_largest, needs_cuda=True)
def warp_largest(cuda):
    return lambda x: cuda.together(x, max)


@twin(_memory.load_apart)
def load_apart(like, like_items, address, stride, position, end):
    result, dtype = np.zeros(WIDTH // 2, precision(like)), dtype_of(like_items)
    for k, step, count in neighbours(like, position, position, end):
        if k >= result.size:
            break
        simt.touch_memory(address + step * stride, dtype.itemsize, simt.READS, count, stride)
        if stride == dtype.itemsize:
            result[k : k + count] = widened(MEMORY.view(address + step * stride, count * stride, stride).view(dtype))
        else:
            for i in range(count):
                result[k + i] = widen(load_item(address + (step + i) * stride, dtype))
    return result


@twin(_memory.ones_apart)
def ones_apart(like, position, end):
    return (far(like, 32)[: WIDTH // 2] < end - position).astype(precision(like))


@twin(_memory.fold_loads)
def fold_loads(like, v):
    while v.size > per_load(like):
        v = v[: v.size // 2] + v[v.size // 2 :]
    return v


@twin(_memory.halves)
def halves(v):
    if not isinstance(v, np.ndarray):
        return v, v
    low, high = v[: v.size // 2], v[v.size // 2 :]
    return (low[0], high[0]) if low.size == 1 else (low, high)


@twin(_memory.join)
def join(low, high):
    return np.concatenate([low, high])


@twin(_memory.butterfly, needs_cuda=True)
def butterfly(cuda):
    return lambda x, mask: cuda.shfl_xor_sync(0xFFFFFFFF, x, mask)


@twin(_memory.first_lanes, needs_cuda=True)
def first_lanes(cuda):
    return lambda x: np.array([cuda.shfl_sync(0xFFFFFFFF, x, k) for k in range(8)])


@twin(_chunks.warp_max, needs_cuda=True)
def warp_max(cuda):
    """One meeting of the warp in place of five."""
    return lambda x: cuda.together(x, max)


@twin(_chunks.warp_sum, needs_cuda=True)
def warp_sum(cuda):
    return lambda x: cuda.together(x, sum)


@njit
def _largest_key(v):
    best = _intrinsics.ordered_bits(v[0] + v.dtype.type(0))
    for x in v:
        best = max(best, _intrinsics.ordered_bits(x + v.dtype.type(0)))
    return np.int64(best)


@twin(_memory.largest_key)
def largest_key(v):
    return np.int64(_largest_key(v))


@twin(_memory.count_larger)
def count_larger(v, x):
    return np.int64(np.count_nonzero(v > x))


@twin(_memory.unless_zero)
def unless_zero(label, v, otherwise):
    return np.where(label == 0, otherwise, v)


# -- small functions that kernels call often: as compiled, but quicker ----------------------------------------------


@twin(_typed.widen)
def widen(x):
    return x if isinstance(x, np.floating) else WIDEN[x.dtype](x)


@twin(_typed.item_size)
def item_size(like):
    return like.itemsize


@twin(_typed.compute_zero)
def compute_zero(like):
    return np.float64(0) if isinstance(like, float) else np.float32(0)


@twin(_typed.number)
def number(like, x):
    return np.float64(x) if isinstance(like, float) else np.float32(x)


# -- functions of scalars that take vectors ------------------------------------------------------------------------

_scalar_fma, _scalar_at_least, _scalar_term = map(scalar_twin, (_intrinsics.fma, _intrinsics.at_least, _typed.term))


@njit(error_model="numpy")
def _fma_each(a, b, c, out):
    for i in range(out.size):
        out[i] = _intrinsics.fma(a[i], b[i], c[i])


@njit(error_model="numpy")
def _term_each(x, low, m, total, out, t):
    for i in range(out.size):
        out[i], t[i] = _typed.term(x[i], low, m, total[i])


_scalar_grad = scalar_twin(_typed.grad_of)


@njit(error_model="numpy")
def _grad_each(x, m, low, factor, out):
    for i in range(out.size):
        out[i] = _typed.grad_of(x[i], m, low, factor)


@twin(_typed.grad_of)
def grad_of(x, m, low, factor):
    if not isinstance(x, np.ndarray):
        return _scalar_grad(x, m, low, factor)
    out = np.empty_like(x)
    _grad_each(x, m, low, factor, out)
    return out


_scalar_softmax = scalar_twin(_typed.softmax_of)


@njit(error_model="numpy")
def _softmax_each(x, largest, m, low, shift, scale, top, out):
    for i in range(out.size):
        out[i] = _typed.softmax_of(x[i], largest, m, low, shift, scale, top)


@twin(_typed.softmax_of)
def softmax_of(x, *frame):
    if not isinstance(x, np.ndarray):
        return _scalar_softmax(x, *frame)
    out = np.empty_like(x)
    _softmax_each(x, *frame, out)
    return out


def _spread(like, *operands):
    return [x if isinstance(x, np.ndarray) else np.full(like.size, x, like.dtype) for x in operands]


@twin(_intrinsics.fma)
def fma(a, b, c):
    vector = next((x for x in (a, b, c) if isinstance(x, np.ndarray)), None)
    if vector is None:
        return _scalar_fma(a, b, c)
    out = np.empty_like(vector)
    _fma_each(*_spread(vector, a, b, c), out)
    return out


@twin(_intrinsics.at_least)
def at_least(x, low):
    """float32 has max.NaN there, which differs where `low` is NaN and where both are zeros."""
    if (x if isinstance(x, np.ndarray) else low).dtype == np.float32:
        return np.maximum(x, low)
    return np.where(x < low, low, x) if isinstance(x, np.ndarray) else _scalar_at_least(x, low)


@twin(_typed.term)
def term(x, low, m, total):
    if not isinstance(x, np.ndarray):
        return _scalar_term(x, low, m, total)
    out, t = np.empty_like(x), np.empty_like(x)
    _term_each(x, low, m, *_spread(x, total), out, t)
    return out, t


@njit(error_model="numpy")
def _power_each(x, m, scale, p, power, t):
    for i in range(x.size):
        p[i], power[i], t[i] = _scalar.clipped_power_32(x[i], m, scale)


_one_power = scalar_twin(_scalar.clipped_power_32)


@twin(_scalar.clipped_power_32)
def clipped_power_32(x, m, scale):
    if not isinstance(x, np.ndarray):
        return _one_power(x, m, scale)
    p, power, t = (np.empty_like(x) for _ in range(3))
    _power_each(x, m, scale, p, power, t)
    return p, power, t


@njit(error_model="numpy")
def _normal_product_each(x, m, scale, out):
    for i in range(x.size):
        out[i] = _scalar.normal_product_32(x[i], m, scale)


@twin(_scalar.normal_product_32)
def normal_product_32(x, m, scale):
    out = np.empty_like(x)
    _normal_product_each(x, m, scale, out)
    return out


@twin(_scalar.power_32)
def power_32(x, low, m, scale):
    return clipped_power_32(at_least(x, low), m, scale)


@twin(_scalar.clipped_term_32)
def clipped_term_32(x, m, total):
    return term(x, np.float32(-np.inf), m, total)


@twin(_intrinsics.select)
def select(condition, a, b):
    return np.where(condition, a, b) if isinstance(condition, np.ndarray) else a if condition else b


@twin(_intrinsics.rounded_product)
def rounded_product(a, b):
    return a * b


def each_item(function):
    """The twin of a function of scalars that takes vectors and gives one: slow, but for any such function."""
    scalar = scalar_twin(function)

    @twin(function)
    def run(*args):
        vector = next((x for x in args if isinstance(x, np.ndarray)), None)
        if vector is None:
            return scalar(*args)
        return np.array([scalar(*items) for items in zip(*_spread(vector, *args))], vector.dtype)


each_item(_typed.tanh)
each_item(_typed.tanh_slope)


@twin(_vector.least_bits_of)
def least_bits_of(v):
    return v.view(np.int32).min()


@twin(_vector.most_bits_of)
def most_bits_of(v):
    return v[np.argmax(v.view(np.int32))]


# -- divergences: what takes a term, one of the functions below, or a tuple ----------------------------------------

for _name, _term in vars(_divergence_scalar).items():
    if _name.endswith(("_term", "_slope")):
        twin(_term)(_term)


@functools.cache
def _of_term(term):
    """(accumulate for arrays, entry), kept on disk for the other processes."""

    @njit(error_model="numpy", cache=True)
    def accumulate(x, y, frame, total):
        for i in range(x.size):
            factor, value = term(x[i], y[i], frame)
            total[i] = _intrinsics.fma(factor, value, total[i])

    @njit(cache=True)
    def entry(x, y, frame, mean, scale):
        return divergence.entry(term, x, y, frame, mean, scale)

    return accumulate, entry


@twin(divergence.accumulate)
def accumulate(first, second, a, b, x, y, frame):
    totals = a.copy(), b.copy()
    for term, total in zip((first, second), totals):
        _of_term(term)[0](x, y, frame, total)
    return totals


@twin(divergence.entry)
def entry(term, x, y, frame, mean, scale):
    one = _of_term(term)[1]
    return np.array([one(*pair, frame, float(mean), scale) for pair in zip(x, y)], x.dtype)


@twin(_divergence_scalar.two_frames)
def two_frames(p, q, shift):
    return tuple(map(type(p[0]), _divergence_scalar.two_frames(p, q, shift)))


# -- items of vectors ----------------------------------------------------------------------------------------------


@twin(_memory.item_of)
def item_of(v, k):
    return v[k]


@twin(_memory.first_item)
def first_item(v, x):
    return np.int32(np.argmax(v == x) if (v == x).any() else v.size)
