"""Logits capped or divided on the CPU, element by element, before a loss and after its gradient; rows copied.

`cap` is described at _typed.capped.
"""

import numpy as np
from numba import prange

from .._scalar import LANES
from .._typed import capped, item_size, uncapped
from .._vector import WIDTH
from ._launch import Kernel
from ._memory import TILE_BYTES, gather, inner, load_up_to, out_of_line, stack, store_as
from ._rows import fill_row, row_address, scatter, weight_is_zero


def _cap(blocks, like, rows, cap, out):
    """out[r, j] = capped logit j of row r."""
    stride, classes, zero = rows[4], rows[5], out.dtype.type(0)
    tiles, to = (classes + LANES - 1) // LANES, np.int64(out.ctypes.data)
    n = len(out) * tiles
    for block in prange(blocks):
        spare = stack(TILE_BYTES)
        for task in range(block * n // blocks, (block + 1) * n // blocks):
            r, begin = task // tiles, task % tiles * LANES
            size = min(LANES, classes - begin)
            at = gather(like, row_address(rows, r) + begin * stride, stride, size, spare)
            cap_tile(zero, like, at, size, cap, to + (r * classes + begin) * item_size(zero))


cap = Kernel(_cap)


@inner
def cap_tile(zero, like, address, size, cap, to):
    out_of_line()
    for i in range(0, size, WIDTH):
        x = load_up_to(like, address + i * item_size(like), size - i)
        store_as(zero, to + i * item_size(zero), capped(x, cap), size - i)


def _uncap(blocks, grad, like, rows, cap, like_out, out_rows):
    """Row r of `out_rows` = grad[r], by capped logits, times d capped / d logit. `rows` and `out_rows` may be one."""
    stride, classes, zero = rows[4], rows[5], grad.dtype.type(0)
    tiles, source = (classes + LANES - 1) // LANES, np.int64(grad.ctypes.data)
    n = len(grad) * tiles
    for block in prange(blocks):
        spare, room = stack(TILE_BYTES), stack(TILE_BYTES)
        for task in range(block * n // blocks, (block + 1) * n // blocks):
            r, begin = task // tiles, task % tiles * LANES
            size = min(LANES, classes - begin)
            at = gather(like, row_address(rows, r) + begin * stride, stride, size, spare)
            out = row_address(out_rows, r) + begin * out_rows[4]
            to = out if out_rows[4] == item_size(like_out) else room
            uncap_tile(zero, source + (r * classes + begin) * item_size(zero), like, at, size, cap, like_out, to)
            scatter(like_out, to, size, out, out_rows[4])


uncap = Kernel(_uncap)


@inner
def uncap_tile(zero, grad, like, address, size, cap, like_out, to):
    out_of_line()
    for i in range(0, size, WIDTH):
        x = load_up_to(like, address + i * item_size(like), size - i)
        g = load_up_to(zero, grad + i * item_size(zero), size - i)
        store_as(like_out, to + i * item_size(like_out), uncapped(g, x, cap), size - i)


def _take_rows(blocks, like, rows, first, weights, out):
    """out[r] = row first + r of `rows`, widened; zeros where weights[r] is 0. Empty weights are all 1."""
    stride, columns, zero, to = rows[4], rows[5], out.dtype.type(0), np.int64(out.ctypes.data)
    pitch, n = columns * item_size(zero), len(out)
    for block in prange(blocks):
        spare = stack(TILE_BYTES)
        for r in range(block * n // blocks, (block + 1) * n // blocks):
            if weight_is_zero(r, weights):
                out[r] = zero
                continue
            source = row_address(rows, first + r)
            for begin in range(0, columns, LANES):
                size = min(LANES, columns - begin)
                at = gather(like, source + begin * stride, stride, size, spare)
                copy_tile(like, at, size, zero, to + r * pitch + begin * item_size(zero))


take_rows = Kernel(_take_rows)


def _put_rows(blocks, values, weights, like_out, out_rows, first):
    """Row first + r of `out_rows` = values[r], rounded; zeros where weights[r] is 0. Empty weights are all 1."""
    stride, columns, zero, source = out_rows[4], out_rows[5], values.dtype.type(0), np.int64(values.ctypes.data)
    pitch, n = columns * item_size(zero), len(values)
    for block in prange(blocks):
        room = stack(TILE_BYTES)
        for r in range(block * n // blocks, (block + 1) * n // blocks):
            out = row_address(out_rows, first + r)
            if weight_is_zero(r, weights):
                fill_row(like_out, out, stride, columns, zero, room)
                continue
            for begin in range(0, columns, LANES):
                size, at = min(LANES, columns - begin), out + begin * stride
                to = at if stride == item_size(like_out) else room
                copy_tile(zero, source + r * pitch + begin * item_size(zero), size, like_out, to)
                scatter(like_out, to, size, at, stride)


put_rows = Kernel(_put_rows)


@inner
def copy_tile(like, address, size, like_out, to):
    out_of_line()
    for i in range(0, size, WIDTH):
        x = load_up_to(like, address + i * item_size(like), size - i)
        store_as(like_out, to + i * item_size(like_out), x, size - i)
