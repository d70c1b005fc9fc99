"""Runs a kernel's own Python source on the CPU, one greenlet a CUDA thread, without a GPU.

The function is rebuilt with the names that it uses replaced: numba.cuda by `FakeCuda`, device functions by their own
sources, intrinsics and compiled functions by what `TWINS` and `scalar_twin` give. Threads take turns at barriers and
shuffles. Found are: barriers and shuffles that some threads miss, reads outside of the memory that was allocated or
at a wrong alignment, reads of shared memory that was not written (NaN or -1), with several `order`s results that depend
on who comes first, and races, where they are asked for. Not modelled: the overflow of integers.
"""

import bisect
import ctypes
import functools
import inspect
import math
import random
import sys
import types as pytypes
import weakref

import numba
import numpy as np
from numba import cuda as real_cuda
from numba import types
from numba.core.dispatcher import Dispatcher as CPUDispatcher
from numba.cuda.dispatcher import CUDADispatcher
from numba.cuda.np.numpy_support import as_dtype

try:
    from greenlet import getcurrent, greenlet
except ImportError:  # a machine with a GPU does without
    getcurrent = greenlet = None

TWINS = {}  # id of an object that kernels name -> Python function, or f(cuda) -> Python function
NEEDS_CUDA = set()


def twin(*objects, needs_cuda=False):
    """Decorator: what stands for these objects in a simulated kernel."""

    def decorate(function):
        for thing in objects:
            TWINS[id(thing)] = function
            if needs_cuda:
                NEEDS_CUDA.add(id(thing))
        return function

    return decorate


class SimError(RuntimeError):
    """What would be undefined behaviour on a device."""


# -- memory ------------------------------------------------------------------------------------------------------


class Memory:
    """What a kernel may touch: host arrays, each a range of addresses, as long as they live."""

    def __init__(self):
        self.starts, self.ranges, self.last = [], {}, (0, 0, None)

    def add(self, array):
        start = array.ctypes.data
        bisect.insort(self.starts, start)
        forget = weakref.finalize(array, self._forget, start)
        forget.atexit = False
        self.ranges[start] = Range(array, start)
        return start

    def _forget(self, start):
        del self.starts[bisect.bisect_left(self.starts, start)], self.ranges[start]
        self.last = 0, 0, None

    def _find(self, address, size, align):
        """The range that holds these bytes."""
        if address % align:
            raise SimError(f"{size} bytes at {address:#x}, which is no multiple of {align}")
        start, end, found = self.last
        if start <= address and address + size <= end:
            return found
        i = bisect.bisect_right(self.starts, address) - 1
        if i >= 0:
            found = self.ranges[self.starts[i]]
            if address + size <= found.end:
                self.last = found.start, found.end, found
                return found
        raise SimError(f"{size} bytes at {address:#x}, outside of all arrays")

    def view(self, address, size, align):
        """The bytes at an address."""
        address = int(address)
        found = self._find(address, size, align)
        return found.bytes[address - found.start : address - found.start + size]

    def loads(self, address, count, step, dtype):
        """The items of `count` loads of 16 bytes, each `step` bytes behind the one before, in one array."""
        address = int(address)
        found = self._find(address, (count - 1) * step + 16, 16)
        shape, strides = (count, 16 // dtype.itemsize), (step, dtype.itemsize)
        return np.ndarray(shape, dtype, found.bytes, address - found.start, strides).reshape(-1)

    def item(self, address, dtype):
        """(array, index) of the item at an address."""
        address, size = int(address), dtype.itemsize
        start, end, found = self.last
        if not start <= address <= end - size or address % size:
            found = self._find(address, size, size)
        items = found.of_dtype.get(dtype)
        return found.items(dtype) if items is None else items, (address - found.start) // size


class Range:
    """The memory of an array, which begins at a multiple of 8, without a reference to it: it must be free to die."""

    def __init__(self, array, start):
        self.start, self.end, self.of_dtype = start, start + array.nbytes, {}
        self.bytes = np.ndarray(array.nbytes, np.uint8, buffer=(ctypes.c_ubyte * array.nbytes).from_address(start))
        if start % 8:
            raise ValueError(f"expected an array at a multiple of 8 bytes, got {start:#x}")

    def items(self, dtype):
        if dtype not in self.of_dtype:
            self.of_dtype[dtype] = self.bytes[: self.bytes.size // dtype.itemsize * dtype.itemsize].view(dtype)
        return self.of_dtype[dtype]


MEMORY = Memory()


# -- what the name `cuda` means in a kernel ----------------------------------------------------------------------


class Dim3:
    __slots__ = ("x", "y", "z")

    def __init__(self, x, y=1, z=1):
        self.x, self.y, self.z = x, y, z


REACHED, LEFT_OUT = set(), set()  # (file, line) of barriers: where threads met, and where they are not to, to see why


def _wait(me, what, value=None, source=None):
    """Another thread's turn; what comes back is the value of the thread `source`."""
    me.wait, me.value, me.source = what, value, source
    return me.parent.switch()


class FakeCuda:
    def __init__(self, launch):
        self._launch, self.shared, self.atomic = launch, Shared(launch), Atomic()

    threadIdx = property(lambda self: getcurrent().thread)
    blockIdx = property(lambda self: self._launch.block)
    blockDim = property(lambda self: self._launch.threads)
    gridDim = property(lambda self: self._launch.blocks)
    laneid = property(lambda self: getcurrent().lane)

    def syncthreads(self):
        if self._is_there():
            _wait(getcurrent(), "barrier")

    def syncwarp(self, mask=0xFFFFFFFF):
        if self._is_there():
            _wait(getcurrent(), ("warp", mask, "sync"))

    def _is_there(self):
        if not self._launch.races:
            return True
        frame = sys._getframe(2)
        place = frame.f_code.co_filename, frame.f_lineno
        REACHED.add(place)
        return place not in LEFT_OUT

    def shfl_xor_sync(self, mask, value, other):
        me = getcurrent()
        return _wait(me, ("warp", mask, "shuffle"), value, me.lane ^ int(other))

    def shfl_sync(self, mask, value, source):
        return _wait(getcurrent(), ("warp", mask, "shuffle"), value, int(source) & 31)

    def shfl_up_sync(self, mask, value, delta):
        me = getcurrent()
        source = me.lane - int(delta) if me.lane >= int(delta) else me.lane
        return _wait(me, ("warp", mask, "shuffle"), value, source)

    def any_sync(self, mask, value):
        if mask != 0xFFFFFFFF:
            raise SimError(f"a vote of the mask {mask:#x}, expected all of the warp")
        return self.together(value, any)

    def together(self, value, combine):
        """`combine` of the values of a warp's threads."""
        return _wait(getcurrent(), ("warp", 0xFFFFFFFF, combine), value)

    def threadfence(self):
        pass


class Shared:
    def __init__(self, launch):
        self._launch = launch

    def array(self, shape, dtype, alignment=None):
        """One array for each place in the source and block, full of NaN or -1; the launch's room for length 0."""
        frame = sys._getframe(1)
        key = frame.f_code, frame.f_lasti
        if key not in self._launch.shared:
            whole = shape or self._launch.room // as_dtype(dtype).itemsize
            room = np.empty(whole, as_dtype(dtype))
            room.reshape(-1).view(np.uint8)[:] = 0xFF
            self._launch.shared[key] = Watched.over(room, self._launch) if self._launch.races else room
        return self._launch.shared[key]


class Atomic:
    def add(self, array, index, value):
        if type(array) is Watched:
            array.access(index, array.itemsize, ADDS)
        plain = array.view(np.ndarray)
        before = plain[index]
        plain[index] += value
        return before


# -- races -------------------------------------------------------------------------------------------------------


READS, WRITES, ADDS, COPIES = "reads", "writes", "adds", "copies"


class Accesses:
    """Who has accessed memory. Two accesses of which one is a write must be ordered: by the same thread, by
    syncthreads, or by syncwarp of masks with both threads, through others too. Shuffles and votes order nothing, nor
    does anything order blocks."""

    def __init__(self, launch, step):
        self.launch, self.step = launch, step  # bytes that are one place
        self.writes, self.reads = {}, {}  # by place: the last write; the last reads and additions by thread since then

    def note(self, at, size, how, depth):
        """These bytes are accessed by who called so many functions ago."""
        me, frame = getcurrent(), sys._getframe(depth)
        epoch, clock = self.launch.epoch, me.clock
        if how is COPIES:  # until it is awaited it comes before nothing
            epoch = clock = math.inf
        now = me.number, epoch, clock, how, frame.f_code, frame.f_lineno, self.launch.block
        for place in range(int(at) // self.step, (int(at) + size - 1) // self.step + 1):
            last, others = self.writes.get(place), self.reads.get(place)
            if last is not None:
                self._must_be_before(last, now, me)
            if how is READS or how is ADDS:
                if others is None:
                    others = self.reads[place] = {}
                for other in others.values():
                    if other[3] is not how:
                        self._must_be_before(other, now, me)
                others[me.number, self.launch.block.x] = now
            else:
                if others:
                    for other in others.values():
                        self._must_be_before(other, now, me)
                    del self.reads[place]
                self.writes[place] = now

    def _must_be_before(self, other, now, me):
        number, epoch, clock, block = *other[:3], other[6]
        if block is now[6]:
            if number == me.number or epoch < self.launch.epoch:
                return
            if number >> 5 == me.number >> 5 and me.seen[number & 31] >= clock:
                return
        a, b = (f"thread {x[0]} of block {x[6].x} {x[3]} ({x[4].co_name}, line {x[5]})" for x in (other, now))
        raise SimError(f"a race: {a}, {b}, and nothing orders them")


class Watched(np.ndarray):
    """Shared memory of which the accesses are noted, or a part of it."""

    @classmethod
    def over(cls, array, launch):
        self = array.view(cls)
        self.accesses, self.start = Accesses(launch, array.itemsize), array.ctypes.data
        return self

    def __array_finalize__(self, parent):
        self.at = None
        if type(parent) is Watched:
            self.accesses, self.start = parent.accesses, parent.start

    def __getitem__(self, index):
        found = super().__getitem__(index)
        if not isinstance(found, np.ndarray):
            self.access(index, self.itemsize, READS)
        return found

    def __setitem__(self, index, value):
        super().__setitem__(index, value)
        if type(index) is slice:
            part = super().__getitem__(index)
            part.access(0, part.nbytes, WRITES)
        else:
            self.access(index, self.itemsize, WRITES)

    def access(self, index, size, how, depth=3):
        """`size` bytes from the item of an index on."""
        if self.at is None:
            self.at = self.__array_interface__["data"][0] - self.start
        at = self.at
        for i, stride, n in zip(index if type(index) is tuple else (index,), self.strides, self.shape):
            at += (i if i >= 0 else i + n) * stride
        self.accesses.note(at, size, how, depth)


def touch(array, how):
    """A twin of an intrinsic does this with all of an array."""
    if type(array) is Watched:
        array.access(0, array.nbytes, how, 4)


def touch_memory(address, size, how, count=1, step=0):
    """As touch, with `count` places that are not shared, `step` bytes from one to the next. Atomic operations, and what
    is loaded fresh after them, say nothing."""
    if Launch.watched is not None:
        for i in range(count):
            Launch.watched.accesses.note(address + i * step, size, how, 3)


# -- rebuilding --------------------------------------------------------------------------------------------------


def _convert(kind):
    """A boxed result in its own type again: Numba gives Python's float for float32."""
    if isinstance(kind, types.BaseTuple):
        parts = [_convert(k) for k in kind.types]
        return lambda value: tuple(f(v) for f, v in zip(parts, value, strict=True))
    if isinstance(kind, (types.Float, types.Integer)):
        return as_dtype(kind).type
    return lambda value: value


def _kind(x):
    return tuple(map(_kind, x)) if type(x) is tuple else type(x)


def scalar_twin(function):
    """A compiled CPU function, or anything that compiled code can call, with results in their own types."""
    if not isinstance(function, CPUDispatcher):
        names = list(inspect.signature(getattr(function, "_defn", function)).parameters)
        names = names[1:] if hasattr(function, "_defn") else names  # an intrinsic's first one is the typing context
        source = f"lambda {', '.join(names)}: function({', '.join(names)})"
        function = numba.njit(error_model="numpy")(eval(source, {"function": function}))
    else:
        function.enable_caching()  # on disk, for the other processes
    known = {}  # types of arguments -> (compiled code, what types its result)

    def call(*args):
        watched = [x for x in args if type(x) is Watched]
        if watched:
            return _watched_call(call, args, watched)
        key = tuple(map(type, args))
        if tuple in key:
            key = tuple(map(_kind, args))
        found = known.get(key)
        if found is None:
            function.compile(tuple(map(numba.typeof, args)))  # a call would run twice, which shows in arrays
            compiled = function.overloads[tuple(map(numba.typeof, args))]
            found = known[key] = compiled.entry_point, _convert(compiled.signature.return_type)
        run, convert = found
        return convert(run(*args))

    return call


def _watched_call(call, args, watched):
    """A call that reads all of these arrays, and writes what is then another."""
    for x in watched:
        x.access(0, x.nbytes, READS)
    before = [x.view(np.ndarray).copy() for x in watched]
    result = call(*(x.view(np.ndarray) if type(x) is Watched else x for x in args))
    for x, old in zip(watched, before):
        for k in np.flatnonzero(x.view(np.ndarray).view(np.int64) != old.view(np.int64)):
            x.access(k, x.itemsize, WRITES)
    return result


@functools.cache
def _twin_of(thing):
    return scalar_twin(thing)


def _rebuild(function, cuda, done):
    """`function` with its names replaced for this launch."""
    if function in done:
        return done[function]
    new = pytypes.FunctionType(function.__code__, {}, function.__name__, function.__defaults__)
    done[function] = new
    names = _names(function.__code__)
    new.__globals__.update(
        {name: _replace(value, cuda, done) for name, value in function.__globals__.items() if name in names}
    )
    return new


def _names(code):
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, pytypes.CodeType):
            names |= _names(constant)
    return names


def _replace(value, cuda, done):
    if value is real_cuda:
        return cuda
    if id(value) in TWINS:
        return TWINS[id(value)](cuda) if id(value) in NEEDS_CUDA else TWINS[id(value)]
    if isinstance(value, CUDADispatcher):
        return _rebuild(value.py_func, cuda, done)
    if isinstance(value, CPUDispatcher) or hasattr(value, "_defn"):
        return _twin_of(value)
    if isinstance(value, pytypes.FunctionType):
        module = getattr(value, "__module__", "") or ""
        if module.startswith("numbaloss.cuda"):
            return _rebuild(value, cuda, done)
        if module.startswith("numbaloss."):
            return _twin_of(value)
    return value


# -- running -----------------------------------------------------------------------------------------------------


class Launch:
    watched = None  # the one in which races are looked for, while it runs

    def __init__(self, blocks, threads, room, races):
        self.blocks, self.threads, self.block, self.shared = Dim3(blocks), Dim3(threads), None, {}
        self.room, self.races = room, races  # bytes of a shared array of length 0; whether races are looked for
        self.epoch = 0  # how often all threads of a block have met
        self.accesses = Accesses(self, 2)  # to what is not shared


def launch(kernel, blocks, threads, args, order=None, room=0, races=False):
    """kernel[blocks, threads, 0, room](*args); `order` seeds a shuffling of blocks and threads; with `races`, see
    Accesses."""
    if blocks < 1 or not 1 <= threads <= 1024:
        raise SimError(f"{blocks} blocks of {threads} threads")
    now = Launch(blocks, threads, room, races)
    function = _rebuild(kernel.py_func, FakeCuda(now), {})
    chance = None if order is None else random.Random(order)
    numbers = list(range(blocks))
    if chance:
        chance.shuffle(numbers)
    Launch.watched = now if races else None
    try:
        for block in numbers:
            now.block, now.shared = Dim3(block), {}
            _run_block(function, args, threads, chance, now)
    finally:
        Launch.watched = None


def _run_block(function, args, threads, chance, launch):
    everyone = []
    for i in range(threads):
        thread = greenlet(function)
        thread.number, thread.lane, thread.thread, thread.wait, thread.result = i, i & 31, Dim3(i), None, None
        thread.started, thread.clock, thread.seen = False, 0, [-1] * 32
        everyone.append(thread)
    warps = [everyone[first : first + 32] for first in range(0, threads, 32)]
    ready = list(everyone)
    slow = chance.randrange(-(-threads // 32)) if chance else None  # a warp that lags behind the others
    while ready:
        if chance:
            chance.shuffle(ready)
        lags = slow if chance and chance.random() < 0.8 else None
        running = [thread for thread in ready if thread.number >> 5 != lags] or ready
        held = [thread for thread in ready if thread.number >> 5 == lags and running is not ready]
        for thread in running:
            if thread.started:
                thread.switch(thread.result)
            else:
                thread.started = True
                thread.switch(*args)
        ready = held + _warps_that_met(warps, launch.races) or _block_that_met(everyone, launch)


def _warps_that_met(warps, races):
    """The threads that go on because all of their warp's mask wait for the same."""
    ready = []
    for warp in warps:
        seen = set()
        for thread in warp:
            if not isinstance(thread.wait, tuple) or thread in seen or thread.dead:
                continue
            what = thread.wait
            wanted = warp if what[1] == 0xFFFFFFFF else [other for other in warp if what[1] >> other.lane & 1]
            if len({other.wait for other in wanted}) > 1:
                if any(other.dead for other in wanted):
                    raise SimError(f"{what[2]}: a thread of the mask {what[1]:#x} has ended")
                continue
            seen.update(wanted)
            if what[2] == "shuffle":
                for other in wanted:
                    if other.source >= len(warp) or (wanted is not warp and warp[other.source] not in wanted):
                        raise SimError("a shuffle reads a thread outside of the mask")
                    other.result = warp[other.source].value
            elif callable(what[2]):
                result = what[2]([other.value for other in wanted])
                for other in wanted:
                    other.result = result
            elif races:
                seen_by_all = [max(known) for known in zip(*(other.seen for other in wanted))]
                for other in wanted:
                    seen_by_all[other.lane] = other.clock
                for other in wanted:
                    other.seen, other.clock = seen_by_all, other.clock + 1
            ready += wanted
    for thread in ready:
        thread.wait = None
    return ready


def _block_that_met(everyone, launch):
    """All threads if all wait at a barrier, none if all have ended."""
    waiting = [thread for thread in everyone if not thread.dead]
    if not waiting:
        return []
    if any(thread.wait != "barrier" for thread in waiting):
        raise SimError(f"threads wait for different things: { {str(thread.wait) for thread in waiting} }")
    if len(waiting) < len(everyone):
        raise SimError(f"a barrier, and {len(everyone) - len(waiting)} of {len(everyone)} threads have ended")
    for thread in waiting:
        thread.wait = None
    launch.epoch += 1
    return list(waiting)
