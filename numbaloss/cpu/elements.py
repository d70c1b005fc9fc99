"""Logits capped or divided on the CPU, element by element, before a loss and after its gradient.

`cap` is described at _typed.capped.
"""

import numpy as np
from numba import njit, prange

from .._scalar import LANES
from .._typed import capped, item_size, uncapped
from .._vector import WIDTH
from ._launch import Kernel
from ._memory import TILE_BYTES, always_inline, gather, load, load_part, out_of_line, stack, store_as
from ._rows import row_address, scatter


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


@njit
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


@njit
def uncap_tile(zero, grad, like, address, size, cap, like_out, to):
    out_of_line()
    for i in range(0, size, WIDTH):
        x = load_up_to(like, address + i * item_size(like), size - i)
        g = load_up_to(zero, grad + i * item_size(zero), size - i)
        store_as(like_out, to + i * item_size(like_out), uncapped(g, x, cap), size - i)


@njit
def load_up_to(like, address, size):
    always_inline()
    return load(like, address) if size >= WIDTH else load_part(like, address, size)
