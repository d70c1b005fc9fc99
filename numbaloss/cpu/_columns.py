"""Sums of exponentials for few classes: a group of rows lies side by side in the vector lanes. Bits as in _chunks."""

import numpy as np
from numba import njit, types
from numba.extending import overload

from .._scalar import (
    BIAS,
    BIAS_64,
    EXP_LIMIT,
    INF,
    INV_LOG2E,
    INV_LOG2E_32,
    MAGIC,
    MAGIC_64,
    ZERO,
    exponent_32,
    select,
)
from ._chunks import LOW_64, row_address, term
from ._memory import prefetch, span, transpose_16, widen

STEP = 2  # classes at a time
FEW = 8  # classes up to which a comparison with each finds the target faster than an index
NOT_COUNTED, BAD = -1, -2


@njit
def group_of(classes):
    """The number of rows side by side: what the first-level cache holds, a multiple of 16."""
    return min(256, max(32, 8192 // classes // 16 * 16))


@njit
def load_columns(like, rows, first, size, group, columns):
    """columns[j * group + i] = logit j of row first + i; rows up to the next outer stride lie evenly apart."""
    _, inner, _, inner_stride, stride, classes = rows
    begin = 0
    while begin < size:
        address = row_address(rows, first + begin)
        run = min(size - begin, inner - (first + begin) % inner)
        blocks, block_classes = 0, 0
        if stride == like.itemsize:
            blocks, block_classes = run // 16, classes // 16 * 16
            transpose_blocks(like, address, inner_stride, blocks, block_classes, group, columns[begin:])
        for j in range(classes):
            done = blocks * 16 if j < block_classes else 0
            column = columns[j * group + begin + done : j * group + begin + run]
            at = address + j * stride + done * inner_stride
            if inner_stride == like.itemsize:
                x = span(like, at, column.size)
                for i in range(np.uint64(column.size)):
                    column[i] = widen(x[i])
            else:
                for i in range(np.uint64(column.size)):
                    column[i] = widen(span(like, at + np.int64(i) * inner_stride, 1)[0])
        begin += run


def transpose_blocks(like, address, stride, blocks, classes, group, columns):
    """The first blocks * 16 rows and `classes` classes of load_columns, 16 by 16."""


@overload(transpose_blocks)
def _transpose_blocks(like, address, stride, blocks, classes, group, columns):
    if like.dtype == types.float64:

        def one_by_one(like, address, stride, blocks, classes, group, columns):
            for i in range(blocks * 16):
                for j in range(classes):
                    columns[j * group + i] = span(like, address + i * stride, classes)[j]

        return one_by_one

    def by_sixteen(like, address, stride, blocks, classes, group, columns):
        target, item = columns.ctypes.data, columns.itemsize
        for i in range(0, blocks * 16, 16):
            for j in range(0, classes, 16):
                source = address + i * stride + j * like.itemsize
                transpose_16(like, source, stride, target + (j * group + i) * item, group * item)

    return by_sixteen


@njit
def take_targets(classes, targets, columns, x):
    """x[i] = the target's logit, whose place among the columns becomes -inf: by comparison for few classes.

    A target of NOT_COUNTED makes the whole row -inf and x 0, so that its loss is 0; a BAD one makes x NaN.
    """
    group = np.uint64(targets.size)
    low = columns.dtype.type(-np.inf)
    for i in range(group):
        x[i] = select(targets[i] == BAD, np.nan, 0.0)
    if classes <= FEW:
        for j in range(classes):
            column = columns[j * targets.size : (j + 1) * targets.size]
            for i in range(group):
                hit = targets[i] == j
                x[i] = select(hit, np.float64(column[i]), x[i])
                column[i] = select(hit | (targets[i] == NOT_COUNTED), low, column[i])
    else:
        for i in range(targets.size):
            if targets[i] >= 0:
                at = targets[i] * targets.size + i
                x[i] = columns[at]
                columns[at] = low
            elif targets[i] == NOT_COUNTED:
                columns[i :: targets.size] = low


@njit
def sum_columns(classes, columns, frames, s, c, ahead, item):
    """(s[i], c[i]) as row_sum gives them, for a group of rows; overwrites the columns. `frames` is room for (4, group).

    Meanwhile the next group is asked for: its logits lie at `ahead`, of `item` bytes each, if they are contiguous.
    One lane a class: the terms of class j of all rows at once, then the butterfly over the classes.
    """
    group, zero = np.uint64(s.size), columns.dtype.type(0)
    high, m, low, shift = frames[0], frames[1], frames[2], frames[3]
    padded = (classes + STEP - 1) // STEP * STEP
    columns[classes * s.size : padded * s.size] = -np.inf
    high[:] = -np.inf
    for j in range(np.uint64(0), np.uint64(padded), np.uint64(STEP)):
        a, b = columns[j * group : (j + np.uint64(1)) * group], columns[(j + np.uint64(1)) * group :]
        for i in range(group):
            pair = select(a[i] > b[i], a[i], b[i])
            high[i] = select(pair > high[i], pair, high[i])
    for i in range(group):
        m[i], low[i], shift[i], c[i] = frame(high[i])
    for j in range(np.uint64(0), np.uint64(padded), np.uint64(STEP)):
        for k in range(0, STEP * s.size * item, 64):
            prefetch(ahead + np.int64(j) * s.size * item + k)
        base = j * group
        for i in range(group):
            at = base + i
            at2 = base + group + i
            columns[at] = term(columns[at] - shift[i], low[i], m[i], zero)[0]
            columns[at2] = term(columns[at2] - shift[i], low[i], m[i], zero)[0]
    half = 1
    while 2 * half < classes:
        half *= 2
    width = classes
    while half > 0:
        for j in range(np.uint64(max(0, min(half, width - half)))):
            for i in range(group):
                columns[j * group + i] += columns[(j + np.uint64(half)) * group + i]
        width = half
        half //= 2
    for i in range(group):
        s[i] = columns[i]


def frame(high):
    """(m, low, shift, c) for a row whose largest logit is `high`: how its terms are taken, and what their sum is of."""


@overload(frame)
def _frame(high):
    if high == types.float64:

        def frame_64(high):
            shift = select(high > -np.inf, high, 0.0)
            return MAGIC_64 + BIAS_64, LOW_64, shift, high

        return frame_64

    def frame_32(high):
        n = exponent_32(high)
        near = abs(n) <= EXP_LIMIT
        ref = select(near, n, ZERO)
        shift = select(near, ZERO, select(high > -INF, high, ZERO))
        c = select(near, np.float64(n) * INV_LOG2E, np.float64(high))
        return MAGIC + (BIAS - ref), (ref - BIAS) * INV_LOG2E_32, shift, c

    return frame_32
