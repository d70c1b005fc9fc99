"""Few classes on CUDA: a block brings its rows to shared memory, side by side, and a thread takes a row from there."""

import numpy as np
from numba import types
from numba.extending import overload

from .._intrinsics import at_least, fma, select
from .._scalar import exp_64
from .._typed import compute_zero, item_size, number, row_frame, shifted_frame, term, widen
from ._chunks import first_position
from ._launch import cuda, device
from ._memory import item_of, load, load_once, store
from ._rows import row_address

# What is done a class has indices of 32 bits and a `while`: a range() of Numba's takes ten instructions more a round.
NARROW = 128  # classes up to which a row is a thread's
ROOM = 33 * 1024  # bytes of shared memory for the rows of a block's threads
SLACK = np.int32(8)  # items before the first row, and after the last, for a load that begins or ends between rows
ROOM_32, ROOM_64 = ROOM // 4 + 16, ROOM // 8 + 16  # items


def threads_of(like, items):
    """(threads of a block, words between their rows of so many items in shared memory: odd, so that a warp's lie in
    different banks)."""
    pitch = items | 1
    return min(256, ROOM // (pitch * (8 if isinstance(like, float) else 4)) // 32 * 32), pitch


@device
def place_of(thread, pitch):
    """Where in the room the row of a thread begins."""
    return np.int32(SLACK + thread * pitch)


@device
def inverse_of(classes):
    """What row_before multiplies by."""
    return np.int32(np.uint32(1 << 21) // np.uint32(classes) + np.uint32(1))


@device
def row_before(k, inverse):
    """k // classes, rounded down, for -2^14 < k < 2^14 and at most 128 classes."""
    return np.int32(np.int32(k * inverse) >> 21)


def room_of(like, room_32, room_64):
    """The shared memory that holds numbers of a row's precision."""
    return room_64 if isinstance(like, float) else room_32


@overload(room_of)
def _room_of(like, room_32, room_64):
    if like == types.float64:
        return lambda like, room_32, room_64: room_64
    return lambda like, room_32, room_64: room_32


@device
def bring_rows(like, rows, first, size, pitch, room):
    """room[place_of(i, pitch) + j] = logit j of row first + i, read so that neighbouring threads read neighbours, 16
    bytes at a time where rows lie side by side."""
    _, inner, _, inner_stride, stride, classes = rows
    thread, threads, pitch = np.int32(cuda.threadIdx.x), np.int32(cuda.blockDim.x), np.int32(pitch)
    size, count = np.int32(size), np.int32(classes)
    if abs(stride) > abs(inner_stride):
        if thread < size:
            address, at = row_address(rows, first + thread), place_of(thread, pitch)
            end = np.int32(at + count)
            while at < end:
                room[np.uint64(at)] = widen(load(like, address))
                address += stride
                at = np.int32(at + 1)
    elif stride == item_size(like) and inner_stride == classes * stride and first + size <= inner:
        n, inverse, gap = np.int32(16 // item_size(like)), inverse_of(classes), np.int32(pitch - count)
        base, before = first_position(like, row_address(rows, first), np.int64(item_size(like)))
        position, end = np.int32(thread * n), np.int32(before + size * count)
        while position < end:
            address = base + np.int64(position) * item_size(like)
            v = load_once(like, address, np.int64(item_size(like)), position, before, end)
            for i in range(16 // item_size(like)):
                k = np.int32(position - before + i)
                room[np.uint64(SLACK + k + row_before(k, inverse) * gap)] = item_of(v, i)
            position = np.int32(position + threads * n)
    else:
        inverse, k = inverse_of(classes), thread
        while k < size * count:
            i = row_before(k, inverse)
            j = np.int32(k - i * count)
            address = row_address(rows, first + i) + np.int64(j) * stride
            room[np.uint64(place_of(i, pitch) + j)] = widen(load(like, address))
            k = np.int32(k + threads)
    cuda.syncthreads()


@device
def take_rows(like, size, classes, pitch, room, out):
    """Write rows of the room to `out`, side by side, so that neighbouring threads write neighbours."""
    thread, threads, count = np.int32(cuda.threadIdx.x), np.int32(cuda.blockDim.x), np.int32(classes)
    k, end, inverse, gap = thread, np.int32(size * count), inverse_of(classes), np.int32(pitch - count)
    address, item = out + np.int64(thread) * item_size(compute_zero(like)), item_size(compute_zero(like))
    while k < end:
        store(address, room[np.uint64(SLACK + k + row_before(k, inverse) * gap)])
        k, address = np.int32(k + threads), address + np.int64(threads) * item


@device
def few_max(like, room, at, classes):
    """The largest of the logits at room[at:], or anything if one is NaN."""
    high, j = room[np.uint64(at)], np.int32(1)
    while j < classes:
        high = at_least(room[np.uint64(at + j)], high)
        j = np.int32(j + 1)
    return high


@device
def few_sum(like, room, at, classes, high, to):
    """(s, c) of the row at room[at:] whose largest logit is `high`, a lane a class; overwrites room[to:], where there
    must be room for half of the lanes and `at` may be."""
    m, low, shift, c = row_frame(high)
    half, j, zero = half_of(classes), np.int32(0), compute_zero(like)
    while j < half:
        total = term(room[np.uint64(at + j)] - shift, low, m, zero)[0]
        if j + half < classes:
            total = total + term(room[np.uint64(at + j + half)] - shift, low, m, zero)[0]
        room[np.uint64(to + j)] = total
        j = np.int32(j + 1)
    return few_total(room, to, half), np.float64(c)


@device
def few_total(room, to, lanes):
    """The butterfly over the lanes at room[to:], a power of two."""
    while lanes > 1:
        lanes, j = np.int32(lanes >> 1), np.int32(0)
        while j < lanes:
            room[np.uint64(to + j)] = room[np.uint64(to + j)] + room[np.uint64(to + j + lanes)]
            j = np.int32(j + 1)
    return np.float64(room[np.uint64(to)])


@device
def half_of(classes):
    """Lanes that are left of a row's after the first level of the butterfly."""
    half = np.int32(1)
    while half + half < classes:
        half = np.int32(half + half)
    return half


@device
def few_largest(like, room, at, classes):
    """(largest of the logits at room[at:], its first class, the largest of the others, or anything if one is NaN)."""
    largest, others, where, j = number(like, -np.inf), number(like, -np.inf), np.int32(0), np.int32(0)
    while j < classes:
        x = room[np.uint64(at + j)]
        more = x > largest
        others = at_least(select(more, largest, x), others)
        largest, where = select(more, x, largest), select(more, j, where)
        j = np.int32(j + 1)
    return largest, where, others


@device
def few_larger(room, at, classes, x):
    """How many of the logits at room[at:] are larger than x."""
    count, j = np.int32(0), np.int32(0)
    while j < classes:
        count = select(room[np.uint64(at + j)] > x, np.int32(count + 1), count)
        j = np.int32(j + 1)
    return count


@device
def few_nan(room, at, classes):
    """The class of the first NaN at room[at:], or -1."""
    where, j = np.int32(-1), np.int32(classes - 1)
    while j >= 0:
        where = select(room[np.uint64(at + j)] == room[np.uint64(at + j)], where, j)
        j = np.int32(j - 1)
    return where


@device
def few_moments(like, room, at, classes, high, to):
    """(s, c, b) as row_moments gives them for the row at room[at:], whose largest logit is `high`; as few_sum."""
    s, c = few_sum(like, room, at, classes, high, to)
    if s == 0.0:
        return s, c, 0.0
    shift = number(like, c)
    s, c, zero = s * exp_64(c - np.float64(shift)), np.float64(shift), compute_zero(like)
    m, low = shifted_frame(zero)
    half, j = half_of(classes), np.int32(0)
    while j < half:
        v = at_least(room[np.uint64(at + j)] - shift, low)
        total = fma(term(v, low, m, zero)[0], v, zero)
        if j + half < classes:
            v = at_least(room[np.uint64(at + j + half)] - shift, low)
            total = total + fma(term(v, low, m, zero)[0], v, zero)
        room[np.uint64(to + j)] = total
        j = np.int32(j + 1)
    return s, c, few_total(room, to, half)
