"""Sums of exponentials for few classes: a group of rows lies side by side in the vector lanes. Bits as in _chunks."""

import numpy as np

from .._intrinsics import at_least, select
from .._typed import compute_zero, item_size, row_frame, term, widen
from .._vector import WIDTH
from ._chunks import fold_vectors
from ._memory import inner, load, out_of_line, prefetch, span, store, transpose
from ._rows import row_address

FEW = 8  # classes up to which a comparison with each finds the target faster than an index
NOT_COUNTED, BAD = -1, -2


@inner
def group_of(classes):
    """The number of rows side by side: what the first-level cache holds, a multiple of 64."""
    return min(256, max(64, 8192 // classes // 64 * 64))


@inner
def new_columns(like, classes, group):
    """Room for the columns of a group, whole vectors of classes."""
    return np.zeros((classes + WIDTH - 1) // WIDTH * WIDTH * group, type(compute_zero(like)))


@inner
def load_columns(like, rows, first, size, group, columns):
    """columns[j * group + i] = logit j of row first + i; rows up to the next outer stride lie evenly apart."""
    out_of_line()
    _, inner, _, inner_stride, stride, classes = rows
    step = group * columns.itemsize
    begin = 0
    while begin < size:
        source, target = row_address(rows, first + begin), np.int64(columns.ctypes.data) + begin * columns.itemsize
        run = min(size - begin, inner - (first + begin) % inner)
        whole = run // WIDTH * WIDTH
        if classes == 2 and stride == item_size(like) and inner_stride == 2 * stride:
            x, whole = span(like, source, 2 * run), run
            first_class, second_class = columns[begin : begin + run], columns[group + begin : group + begin + run]
            for i in range(np.uint64(run)):
                first_class[i] = widen(x[np.uint64(2) * i])
                second_class[i] = widen(x[np.uint64(2) * i + np.uint64(1)])
        elif stride == item_size(like):
            for i in range(0, whole, WIDTH):
                for j in range(0, classes, WIDTH):
                    at = source + i * inner_stride + j * stride
                    transpose(like, at, inner_stride, classes - j, target + i * columns.itemsize + j * step, step)
        elif inner_stride == item_size(like):
            for j in range(classes):
                for i in range(0, whole, WIDTH):
                    at = source + i * inner_stride + j * stride
                    store(target + i * columns.itemsize + j * step, load(like, at))
        else:
            whole = 0
        for j in range(classes):
            for i in range(whole, run):
                x = span(like, source + i * inner_stride + j * stride, 1)[0]
                columns[j * group + begin + i] = widen(x)
        begin += run


@inner
def take_targets(classes, targets, columns, x):
    """x[i] = the target's logit, whose place among the columns becomes -inf: by comparison for few classes.

    A target of NOT_COUNTED makes the whole row -inf and x 0, so that its loss is 0; a BAD one makes x NaN.
    """
    out_of_line()
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
                for j in range(i, columns.size, targets.size):
                    columns[j] = low


@inner
def sum_pairs(columns, targets, x, s, c):
    """take_targets and sum_columns for two classes: the sum is one term."""
    out_of_line()
    group, zero, low_x = np.uint64(targets.size), columns.dtype.type(0), columns.dtype.type(-np.inf)
    first, second = columns[: targets.size], columns[targets.size : 2 * targets.size]
    for i in range(group):
        y, a, b = targets[i], first[i], second[i]
        x[i] = select(y == BAD, np.nan, select(y == NOT_COUNTED, 0.0, np.float64(select(y == 1, b, a))))
        first[i] = select(y == NOT_COUNTED, low_x, select(y == 1, a, b))
    for i in range(group):  # float32 alone takes twice the lanes
        m, low, shift, _ = row_frame(first[i])
        second[i] = term(first[i] - shift, low, m, zero)[0]
    for i in range(group):
        s[i], c[i] = second[i], row_frame(first[i])[3]


@inner
def sum_columns(classes, columns, frames, s, c, ahead, item):
    """(s[i], c[i]) as row_sum gives them, for a group of rows; overwrites the columns. `frames` is room for (4, group).

    Meanwhile a later group is asked for: its logits lie at `ahead`, of `item` bytes each, if they are contiguous.
    One lane a class: the terms of class j of 16 rows at once, then the butterfly over the classes.
    """
    out_of_line()
    group, size, zero = s.size, columns.itemsize, columns.dtype.type(0)
    step = group * size
    high, m, low, shift = frames[0], frames[1], frames[2], frames[3]
    begin, frame_at = np.int64(columns.ctypes.data), np.int64(frames.ctypes.data)
    for i in range(0, group, WIDTH):
        best = load(zero, begin + i * size)
        for j in range(1, classes):
            best = at_least(load(zero, begin + i * size + j * step), best)
        store(frame_at + i * size, best)
    for i in range(np.uint64(group)):
        m[i], low[i], shift[i], c[i] = row_frame(high[i])
    half = 1
    while 2 * half < classes:
        half *= 2
    for i in range(0, group, WIDTH):
        at, line = begin + i * size, ahead + i * classes * item
        row = frame_at + i * size
        m_16, low_16, shift_16 = load(zero, row + step), load(zero, row + 2 * step), load(zero, row + 3 * step)
        for j in range(min(half, classes)):
            prefetch(line + j * WIDTH * item)
            total = term(load(zero, at + j * step) - shift_16, low_16, m_16, zero)[0]
            if j < classes - half:
                prefetch(line + (j + half) * WIDTH * item)
                total = total + term(load(zero, at + (j + half) * step) - shift_16, low_16, m_16, zero)[0]
            store(at + j * step, total)
        store(row, fold_vectors(zero, at, min(half, classes), step))
    for i in range(np.uint64(group)):
        s[i] = high[i]
