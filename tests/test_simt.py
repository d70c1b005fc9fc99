"""The executor finds what it says it finds, and the twins of the CUDA intrinsics do what the intrinsics do.

Most intrinsics are plain LLVM code, so the CPU can run them: that is what their twins are compared with.
"""

import numpy as np
import pytest
from common import DTYPES

pytest.importorskip("cupy", reason="CuPy is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
pytest.importorskip("greenlet", reason="greenlet is not installed")

import cuda_on_host as host
import simt
from numba import cuda, njit, types
from numba.core.errors import NumbaError

from numbaloss import _intrinsics, _scalar, _typed
from numbaloss.cuda import _memory
from numbaloss.cuda._chunks import warp_max, warp_sum
from numbaloss.cuda._memory import WIDTH, atomic_add, load, store

ZERO = np.float32(0)
ALL = 0xFFFFFFFF


def run(kernel, threads, *args, blocks=1, order=None, races=False):
    simt.launch(cuda.jit(kernel), blocks, threads, args, order, races=races)


@pytest.fixture
def room():
    """(address, float32 array) of 64 items that kernels may touch."""
    raw = np.zeros(64, np.float32)
    return simt.MEMORY.add(raw), raw


# -- the executor --------------------------------------------------------------------------------------------------


def test_barrier_that_a_thread_misses(room):
    def kernel(address):
        if cuda.threadIdx.x != 5:
            cuda.syncthreads()

    with pytest.raises(simt.SimError, match="1 of 64 threads have ended"):
        run(kernel, 64, room[0])


def test_different_barriers(room):
    def kernel(address):
        if cuda.threadIdx.x < 32:
            cuda.syncthreads()
        else:
            cuda.syncwarp()
            cuda.shfl_sync(ALL, 1, 0) if cuda.laneid < 16 else cuda.syncthreads()

    with pytest.raises(simt.SimError, match="wait for different things"):
        run(kernel, 64, room[0])


def test_shuffle_without_a_thread(room):
    def kernel(address):
        if cuda.laneid != 7:
            cuda.shfl_xor_sync(ALL, 1, 1)

    with pytest.raises(simt.SimError, match="has ended"):
        run(kernel, 32, room[0])


def test_reads_and_writes_outside(room):
    def reads(address):
        load(ZERO, address + 4 * 64)

    def writes(address):
        store(address - 4, ZERO)

    def unaligned(address):
        load(ZERO, address + 2)

    for kernel in (reads, writes):
        with pytest.raises(simt.SimError, match="outside of all arrays"):
            run(kernel, 1, room[0])
    with pytest.raises(simt.SimError, match="no multiple of 4"):
        run(unaligned, 1, room[0])


def test_shared_memory_is_not_zero(room):
    def kernel(address):
        shared = cuda.shared.array(4, types.float32)
        if cuda.threadIdx.x == 0:
            shared[0] = ZERO
        store(address, shared[0])
        store(address + 4, shared[1])

    run(kernel, 1, room[0])
    assert room[1][0] == 0 and np.isnan(room[1][1])


def test_missing_barrier_shows_in_some_order(room):
    def kernel(address):
        shared = cuda.shared.array(64, types.float32)
        shared[cuda.threadIdx.x] = np.float32(cuda.threadIdx.x)
        store(address + 4 * cuda.threadIdx.x, shared[63 - cuda.threadIdx.x])

    run(kernel, 64, room[0], order=1)
    assert np.isnan(room[1]).any()


def exchange(address, how):
    """Each thread reads what another one has written."""
    shared = cuda.shared.array(64, types.float32)
    shared[cuda.threadIdx.x] = ZERO
    if how == "barrier":
        cuda.syncthreads()
    elif how == "warp":
        cuda.syncwarp()
    elif how == "team":
        cuda.syncwarp(0xFF << (cuda.laneid & 24))
    elif how == "through a third":
        cuda.syncwarp(0x55555555 << (cuda.laneid & 1))
        cuda.syncwarp(0x33333333 << (cuda.laneid & 2))
    elif how == "others":
        cuda.syncwarp(0x55555555 << (cuda.laneid & 1))
    elif how == "shuffle":
        cuda.shfl_sync(ALL, 1, 0)
    elif how == "vote":
        cuda.any_sync(ALL, True)
    elif how == "fence":
        cuda.threadfence()
    store(address + 4 * cuda.threadIdx.x, shared[cuda.threadIdx.x ^ 3])


@pytest.mark.parametrize("order", [None, 1])
def test_what_orders_threads(room, order):
    for how in ("barrier", "warp", "team", "through a third"):
        run(exchange, 64, room[0], how, order=order, races=True)
    for how in ("others", "shuffle", "vote", "fence", "nothing"):
        with pytest.raises(simt.SimError, match="nothing orders them"):
            run(exchange, 64, room[0], how, order=order, races=True)


def test_races(room):
    """Read before another thread writes; two writes; a warp that does not wait for another; additions beside a read."""

    def read_first(address):
        shared = cuda.shared.array((2, 32), types.float32)
        shared[0, cuda.laneid] = ZERO
        cuda.syncwarp()
        row = shared[0]
        x = row[31 - cuda.laneid]
        row[cuda.laneid] = x

    def two_writes(address):
        shared = cuda.shared.array(1, types.float32)
        shared[0] = ZERO

    def two_warps(address):
        shared = cuda.shared.array(64, types.float32)
        shared[cuda.threadIdx.x] = ZERO
        cuda.syncwarp()
        store(address, shared[cuda.threadIdx.x ^ 32])

    def addition(address):
        shared = cuda.shared.array(1, types.int64)
        if cuda.laneid == 0:
            shared[0] = 0
        cuda.syncthreads()
        cuda.atomic.add(shared, 0, 1)
        store(address, shared[0])

    def additions(address):
        shared = cuda.shared.array(1, types.int64)
        if cuda.threadIdx.x == 0:
            shared[0] = 0
        cuda.syncthreads()
        cuda.atomic.add(shared, 0, 1)
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            store(address, shared[0])

    for kernel, threads in ((read_first, 32), (two_writes, 2), (two_warps, 64), (addition, 32)):
        with pytest.raises(simt.SimError, match="nothing orders them"):
            run(kernel, threads, room[0], races=True)
    run(additions, 64, room[0], races=True)
    assert room[1].view(np.int64)[0] == 64


def test_races_in_global_memory(room):
    """Between threads and between blocks; an atomic addition is none."""

    def in_place(address):
        x = load(ZERO, address)
        store(address + 4 * cuda.laneid, x)

    def ordered(address):
        x = load(ZERO, address)
        cuda.syncwarp()
        store(address + 4 * cuda.laneid, x)

    def blocks(address):
        if cuda.threadIdx.x == 0:
            store(address, ZERO)

    def additions(address):
        atomic_add(address, np.int64(1))

    for kernel, grid in ((in_place, 1), (blocks, 2)):
        with pytest.raises(simt.SimError, match="nothing orders them"):
            run(kernel, 32, room[0], blocks=grid, races=True)
    run(ordered, 32, room[0], races=True)
    run(additions, 32, room[0], blocks=2, races=True)


def test_exchange_between_threads(room):
    """What shuffles, shared memory and atomics give."""

    def kernel(address):
        x = np.float32(cuda.threadIdx.x)
        for mask in (16, 8, 4, 2, 1):
            x += cuda.shfl_xor_sync(ALL, x, mask)
        shared = cuda.shared.array(2, types.float32)
        if cuda.laneid == 0:
            shared[cuda.threadIdx.x >> 5] = x
        cuda.syncthreads()
        store(address + 4 * cuda.threadIdx.x, shared[1] - shared[0] + cuda.shfl_up_sync(ALL, x, 1) * ZERO)

    for order in (None, 1, 2):
        run(kernel, 64, room[0], order=order)
        assert (room[1] == 32 * 32).all()


# -- twins of the intrinsics ---------------------------------------------------------------------------------------


def special(dtype, size):
    """Numbers of all magnitudes, subnormals, zeros of both signs, infinities; no NaN, whose bits may change."""
    bits = np.random.default_rng(0).integers(0, 2**16, size * dtype.itemsize // 2, dtype=np.uint16)
    x = bits.view(dtype).copy()
    with np.errstate(invalid="ignore"):
        x[x != x] = dtype.type(1)
    x[:4] = [0.0, -0.0, np.inf, -np.inf]
    return x


@njit
def items(v):
    """The items of a Vector: what its butterflies leave, for the CPU has no other way to look into one."""
    return v


def stored(function, like, width=WIDTH):
    """A compiled function of raw memory that writes the Vector `function(*args)` gives to memory."""
    from numbaloss.cpu._memory import store as store_vector

    @njit
    def call(out, *args):
        store_vector(out, function(*args))

    def run(*args):
        out = np.zeros(width, host.precision(like))
        call(out.ctypes.data_as(host.ctypes.c_void_p).value, *args)
        return out

    return run


def bits(x):
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_loads(dtype):
    dtype = np.dtype(dtype)
    raw = np.zeros(32768 + 64, np.uint8)
    raw = raw[-raw.ctypes.data % 16 :][:32768]
    raw.view(dtype)[:] = special(dtype, 32768 // dtype.itemsize)
    address = simt.MEMORY.add(raw)
    carrier = {"float16": np.int16(0), "bfloat16": np.uint16(0)}
    like = carrier.get(dtype.name, dtype.type(0))
    wide = _memory.widened
    vector = stored(njit(lambda like, address, team: wide(like, _memory.load_vector(like, address, team))), like)
    part = stored(njit(lambda like, *args: wide(like, _memory.load_part(like, *args))), like)
    take = njit(lambda like, like_items, a, s, p, e: _memory.load_apart(like, like_items, a, s, p, e))
    apart, ones = stored(take, like, 16), stored(njit(lambda like, p, e: _memory.ones_apart(like, p, e)), like, 16)
    for team in (np.int32(8), np.int32(16), np.int32(32)):
        assert np.array_equal(bits(vector(like, address, team)), bits(host.load_vector(like, address, team)))
    for stride in (dtype.itemsize, 3 * dtype.itemsize):
        for position, begin, end in ((0, 0, 1024), (0, 1, 600), (8, 0, 270), (8, 0, 12), (16, 0, 16), (0, 0, 0)):
            for team in (8, 16, 32):
                args = like, address, stride, *(np.int32(n) for n in (position, begin, end, team))
                assert np.array_equal(bits(part(*args)), bits(host.load_part(*args))), args
            args = like, like, address, stride, position, end
            assert np.array_equal(bits(apart(*args)), bits(host.load_apart(*args)))
            assert np.array_equal(bits(ones(like, position, end)), bits(host.ones_apart(like, position, end)))


def memory_of(dtype, size=32768):
    """(address, like) of so many bytes of special numbers, at 16 bytes."""
    raw = np.zeros(size + 64, np.uint8)
    raw = raw[-raw.ctypes.data % 16 :][:size]
    raw.view(dtype)[:] = special(np.dtype(dtype), size // np.dtype(dtype).itemsize)
    carrier = {"float16": np.int16(0), "bfloat16": np.uint16(0)}
    return simt.MEMORY.add(raw), carrier.get(np.dtype(dtype).name, np.dtype(dtype).type(0)), raw


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_loads_of_other_types(dtype):
    """Labels and class weights beside logits, at 16 bytes and not, side by side and not."""
    like = memory_of(dtype)[1]
    take = njit(lambda like, like_items, a, s, p, e: _memory.load_apart(like, like_items, a, s, p, e))
    apart = stored(take, like, 16)
    for other in DTYPES.values():
        address, like_items, _kept = memory_of(other)
        size = like_items.itemsize
        for at, stride, end in ((0, size, 1024), (size, size, 1024), (0, size, 300), (0, 2 * size, 1024), (0, size, 0)):
            args = like, like_items, address + at, stride, 0, end
            with np.errstate(over="ignore"):
                expected = host.load_apart(*args)
            assert np.array_equal(bits(apart(*args)), bits(expected)), (other, at, stride, end)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_stores_of_a_load(dtype):
    """store_once, to other types too, of all items and of some, at 16 bytes and not."""
    address, like, _kept = memory_of(dtype)
    n, size = 16 // like.itemsize, np.int64(like.itemsize)

    @njit
    def move(like, like_out, a, size, to, stride, begin, end):
        v = _memory.load_once(like, a, size, np.int32(0), np.int32(0), np.int32(64))
        _memory.store_once(like_out, to, stride, begin, end, v)

    for out in {np.dtype(dtype).name: dtype, "float32": np.float32}.values():
        for at, step, begin, end in ((0, 1, 0, n), (1, 1, 0, n), (0, 1, 1, n), (0, 1, 0, n - 1), (0, 3, 0, n)):
            found = []
            for take in (True, False):
                to, like_out, raw = memory_of(out, 256)
                rest = to + at * like_out.itemsize, step * like_out.itemsize, np.int32(begin), np.int32(end)
                if take:
                    move(like, like_out, address, size, *rest)
                else:
                    v = host.load_once(like, address, size, np.int32(0), np.int32(0), np.int32(64))
                    host.store_once(like_out, *rest, v)
                found.append(raw.copy())
            assert np.array_equal(*found), (out, at, step, begin, end)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_hidden_items(dtype):
    """-inf in place of some, NaN among the others."""
    address, like, _kept = memory_of(dtype)
    n = 16 // like.itemsize
    for team in (np.int32(8), np.int32(32)):
        v = host.load_vector(like, address, team)

        @njit
        def hide(like, a, k, team):
            return _memory.widened(like, _memory.hide(like, _memory.load_vector(like, a, team), k, team))

        @njit
        def hide_first(like, a, count, team):
            return _memory.widened(like, _memory.hide_first(like, _memory.load_vector(like, a, team), count))

        run, run_first = stored(hide, like), stored(hide_first, like)
        for k in (-1, *range(n + 1), team * n - 1, team * n, team * n + 1, 3 * team * n + n - 1, 32 * team):
            got = run(like, address, np.int32(k), team)
            assert np.array_equal(bits(got), bits(host.hide(like, v, k, team))), k
        for count in range(n):
            got = run_first(like, address, np.int32(count), team)
            assert np.array_equal(bits(got), bits(host.hide_first(like, v, count))), count


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vectors(dtype):
    zero = dtype(0)
    x = special(np.dtype(dtype), WIDTH)
    where = x.ctypes.data
    n = 16 // x.itemsize
    load_all = njit(lambda zero, a: _memory.load_vector(zero, a, np.int32(1)))

    def vector():
        return x.copy()

    nothing = stored(njit(lambda zero: _memory.zeros(zero)), zero)
    assert np.array_equal(bits(nothing(zero)), bits(host.zeros_like(zero)))
    fold = stored(njit(lambda zero, a: _memory.fold_loads(zero, load_all(zero, a))), zero, n)
    x[2:4] = 1
    assert np.array_equal(bits(fold(zero, where)), bits(host.fold_loads(zero, vector())))
    for half in (0, 1):
        get = stored(njit(lambda zero, a, half=half: _memory.halves(load_all(zero, a))[half]), zero, WIDTH // 2)
        assert np.array_equal(bits(get(zero, where)), bits(host.halves(vector())[half]))
    joined = stored(njit(lambda zero, a: _memory.join(*_memory.halves(load_all(zero, a)))), zero)
    assert np.array_equal(bits(joined(zero, where)), bits(host.join(*host.halves(vector()))))
    key = njit(lambda zero, a: _memory.largest_key(load_all(zero, a)))
    larger = njit(lambda zero, a, b: _memory.count_larger(load_all(zero, a), b))
    for x[0] in (0, -0.0, 7, np.inf, -np.inf):
        x[2:4] = x[0]
        assert key(zero, where) == host.largest_key(vector())
        for bound in (dtype(0), dtype(1), dtype(np.inf), dtype(-np.inf)):
            assert larger(zero, where, bound) == host.count_larger(vector(), bound)
    pick = stored(
        njit(lambda zero, a: _memory.unless_zero(load_all(zero, a), load_all(zero, a), _memory.zeros(zero))), zero
    )
    x[1:3] = [0, -0.0]
    assert np.array_equal(bits(pick(zero, where)), bits(host.unless_zero(vector(), vector(), host.zeros_like(zero))))


def test_pairs_of_bfloat16():
    """The least bfloat16 above a number, twice in a word. What takes max.bf16x2 runs on a device only."""
    pair = njit(lambda like, x: _memory.pair_above(like, x))
    like = np.uint16(0)
    for x in (0, -0.0, 1, -1, 1.001, -1.001, 255.5, -255.5, -88.1, 3e-40, -3e-40, -np.inf, np.inf):
        got, want = pair(like, np.float32(x)), host.pair_above(like, np.float32(x))
        assert np.int32(got) == want, (x, hex(got), hex(want))
        low, high = host._pair(want, like)
        assert low == high >= np.float32(x)


def test_scalars_keep_their_types():
    """A compiled function gives Python's float for float32: the executor must not take that for a float64."""
    twin = simt.scalar_twin(_scalar.exponent_32)
    assert type(twin(np.float32(3))) is np.float32
    assert [type(x) for x in simt.scalar_twin(_scalar.frame_32)(np.float32(3), np.float32(127))] == [np.float32] * 2
    assert type(simt.scalar_twin(_typed.number)(np.float32(0), 0.5)) is np.float32
    assert type(simt.scalar_twin(_intrinsics.float_bits)(np.float32(1))) is np.int32


def test_device_functions_take_no_float64_for_float32():
    """What NumPy would let pass: Numba types are the compiler's, and test_cuda_sass.py compiles every kernel."""
    with pytest.raises((NumbaError, TypeError, AttributeError)):
        simt.scalar_twin(_intrinsics.fma)(np.float32(1), 1.0, np.float32(1))


OWN_MAX, OWN_SUM = warp_max.py_func, warp_sum.py_func  # the sources, not their twins


def test_what_a_warp_does_together(room):
    """Votes, maxima and sums in one meeting give what the butterflies of the sources give."""

    def kernel(address):
        x = np.int64((cuda.laneid * 37) % 32 - 9)
        same = OWN_MAX(x) == warp_max(x) == 22 and OWN_SUM(x) == warp_sum(x) == 208
        votes = cuda.any_sync(ALL, x == 22), cuda.any_sync(ALL, x == 23)
        store(address + 4 * cuda.laneid, np.float32(same and votes == (True, False)))

    run(kernel, 32, room[0])
    assert (room[1][:32] == 1).all()
