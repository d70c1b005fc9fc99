"""Few classes on CUDA: a block brings its rows to shared memory, side by side, and a thread takes a row from there."""

import numpy as np
from numba import types
from numba.extending import overload

from .._intrinsics import at_least
from .._typed import compute_zero, item_size, row_frame, term, widen
from ._launch import cuda, device
from ._memory import load
from ._rows import row_address

ROOM = 33 * 1024  # bytes of shared memory for the rows of a block's threads
ROOM_32, ROOM_64 = ROOM // 4, ROOM // 8  # items


def threads_of(like, classes):
    """(threads of a block, words between their rows in shared memory: odd, so that a warp's lie in different banks)."""
    pitch = classes | 1
    return min(256, ROOM // (pitch * (8 if isinstance(like, float) else 4)) // 32 * 32), pitch


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
    """room[i * pitch + j] = logit j of row first + i, read so that neighbouring threads read neighbours."""
    _, inner, _, inner_stride, stride, classes = rows
    thread, threads = np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
    i, j = np.uint64(np.uint32(thread) // np.uint32(classes)), np.uint64(np.uint32(thread) % np.uint32(classes))
    rows_on, classes_on = np.uint32(threads) // np.uint32(classes), np.uint32(threads) % np.uint32(classes)
    if abs(stride) > abs(inner_stride):
        if thread < size:
            address = row_address(rows, first + thread)
            for k in range(np.uint64(classes)):
                room[np.uint64(thread * pitch) + k] = widen(load(like, address))
                address += stride
    elif stride == item_size(like) and inner_stride == classes * stride and first + size <= inner:
        begin = row_address(rows, first)
        address, end = begin + thread * stride, begin + size * inner_stride
        while address < end:
            room[i * np.uint64(pitch) + j] = widen(load(like, address))
            address += threads * stride
            i, j = next_place(i, j, rows_on, classes_on, classes)
    else:
        while np.int64(i) < size:
            room[i * np.uint64(pitch) + j] = widen(
                load(like, row_address(rows, first + np.int64(i)) + np.int64(j) * stride)
            )
            i, j = next_place(i, j, rows_on, classes_on, classes)
    cuda.syncthreads()


@device
def next_place(i, j, rows_on, classes_on, classes):
    """(row, class) of what a thread brings next."""
    i, j = np.uint64(i + rows_on), np.uint64(j + classes_on)
    if j >= np.uint64(classes):
        i, j = np.uint64(i + np.uint64(1)), np.uint64(j - np.uint64(classes))
    return i, j


@device
def few_sum(like, room, at, classes):
    """(s, c) of the row at room[at:], which it overwrites: the largest logit first, then a lane a class."""
    at, classes, one = np.uint64(at), np.uint64(classes), np.uint64(1)
    high = room[at]
    for j in range(one, classes):
        high = at_least(room[at + j], high)
    m, low, shift, c = row_frame(high)
    zero = compute_zero(like)
    half = one
    while half + half < classes:
        half = half + half
    for j in range(min(half, classes)):
        total = term(room[at + j] - shift, low, m, zero)[0]
        if j + half < classes:
            total = total + term(room[at + j + half] - shift, low, m, zero)[0]
        room[at + j] = total
    while half > one:
        half = half >> one
        for j in range(half):
            room[at + j] = room[at + j] + room[at + j + half]
    return np.float64(room[at]), np.float64(c)
