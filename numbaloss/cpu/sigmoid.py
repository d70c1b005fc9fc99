"""Sigmoid family on the CPU: element by element, tiles of TILE so that strided operands can be copied to the cache."""

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from .._scalar import LANES
from .._typed import binary_loss, exp_neg, log1p, widen
from ._launch import Kernel
from ._memory import TILE_BYTES, gather, span, stack
from ._rows import row_address

TILE = LANES


def _binary_xent(blocks, like, rows, like_labels, label_rows, like_weight, weight_rows, loss):
    """loss[r, j] = sigmoid cross entropy of logit j of row r, weighted unless `weight_rows` (pos_weight) is None."""
    stride, columns = rows[4], rows[5]
    tiles = (columns + TILE - 1) // TILE
    n = loss.shape[0] * tiles
    for block in prange(blocks):
        spare, spare_2, spare_3 = stack(TILE_BYTES), stack(TILE_BYTES), stack(TILE_BYTES)
        for task in range(block * n // blocks, (block + 1) * n // blocks):
            r, begin = task // tiles, task % tiles * TILE
            size = min(TILE, columns - begin)
            x = span(like, gather(like, row_address(rows, r) + begin * stride, stride, size, spare), size)
            at = row_address(label_rows, r) + begin * label_rows[4]
            z = span(like_labels, gather(like_labels, at, label_rows[4], size, spare_2), size)
            q = weight_tile(like_weight, weight_rows, r, begin, size, spare_3)
            loss_tile(x, z, q, loss[r, begin : begin + size])


binary_xent = Kernel(_binary_xent)


def weight_tile(like, rows, r, begin, size, spare):
    """The pos_weight of `size` elements: an array, one number, or None."""


@overload(weight_tile)
def _weight_tile(like, rows, r, begin, size, spare):
    if rows == types.none or isinstance(rows, types.Float):
        return lambda like, rows, r, begin, size, spare: rows
    return lambda like, rows, r, begin, size, spare: span(
        like, gather(like, row_address(rows, r) + begin * rows[4], rows[4], size, spare), size
    )


@njit
def loss_tile(x, z, q, loss):
    """One loop for the exponential and one for the logarithm are a sixth faster than one: shorter chains."""
    one = loss.dtype.type(1)
    for i in range(np.uint64(loss.size)):
        loss[i] = exp_neg(abs(widen(x[i])))
    for i in range(np.uint64(loss.size)):
        label = loss.dtype.type(widen(z[i]))
        loss[i] = binary_loss(widen(x[i]), label, weight_of(q, i, one), one, log1p(loss[i]))


def weight_of(q, i, one):
    """q or q[i] in the precision of `one`; None stays None."""


@overload(weight_of)
def _weight_of(q, i, one):
    if isinstance(q, types.Array):
        return lambda q, i, one: type(one)(widen(q[i]))
    if q == types.none:
        return lambda q, i, one: None
    return lambda q, i, one: type(one)(q)
