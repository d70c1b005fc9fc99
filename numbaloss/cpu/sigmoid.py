"""Sigmoid family on the CPU: element by element, tiles of TILE so that strided operands can be copied to the cache."""

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from .._scalar import log1p_exp_neg_32, log1p_exp_neg_64, sigmoid_loss, weighted_loss
from ._chunks import row_address
from ._launch import Kernel
from ._memory import gather, scratch, widen

TILE = 1024


def _binary_xent(blocks, like, rows, like_labels, label_rows, like_weight, weight_rows, loss):
    """loss[r, j] = sigmoid cross entropy of logit j of row r, weighted unless `weight_rows` (pos_weight) is None."""
    stride, columns = rows[4], rows[5]
    tiles = (columns + TILE - 1) // TILE
    n = loss.shape[0] * tiles
    for block in prange(blocks):
        spare, spare_2 = scratch(TILE, like).ctypes.data, scratch(TILE, like_labels).ctypes.data
        spare_3 = scratch(TILE, like_weight).ctypes.data
        for task in range(block * n // blocks, (block + 1) * n // blocks):
            r, begin = task // tiles, task % tiles * TILE
            size = min(TILE, columns - begin)
            x = gather(like, row_address(rows, r) + begin * stride, stride, size, spare)
            at = row_address(label_rows, r) + begin * label_rows[4]
            z = gather(like_labels, at, label_rows[4], size, spare_2)
            q = weight_tile(like_weight, weight_rows, r, begin, size, spare_3)
            loss_tile(x, z, q, loss[r, begin : begin + size])


binary_xent = Kernel(_binary_xent)


def weight_tile(like, rows, r, begin, size, spare):
    """The pos_weight of `size` elements: an array, one number, or None."""


@overload(weight_tile)
def _weight_tile(like, rows, r, begin, size, spare):
    if rows == types.none or isinstance(rows, types.Float):
        return lambda like, rows, r, begin, size, spare: rows
    return lambda like, rows, r, begin, size, spare: gather(
        like, row_address(rows, r) + begin * rows[4], rows[4], size, spare
    )


@njit
def loss_tile(x, z, q, loss):
    one = loss.dtype.type(1)
    for i in range(np.uint64(loss.size)):
        logit = widen(x[i])
        loss[i] = loss_of(logit, loss.dtype.type(widen(z[i])), q, i, one, log1p_exp_neg(abs(logit)))


def log1p_exp_neg(a):
    """log(1 + exp(-a)) for a >= 0, by the type of a."""


@overload(log1p_exp_neg)
def _log1p_exp_neg(a):
    if a == types.float64:
        return lambda a: log1p_exp_neg_64(a)
    return lambda a: log1p_exp_neg_32(a)


def loss_of(x, z, q, i, one, log1p_exp):
    """sigmoid_loss, or weighted_loss with q or q[i]."""


@overload(loss_of)
def _loss_of(x, z, q, i, one, log1p_exp):
    if q == types.none:
        return lambda x, z, q, i, one, log1p_exp: sigmoid_loss(x, z, one, log1p_exp)
    if isinstance(q, types.Array):
        return lambda x, z, q, i, one, log1p_exp: weighted_loss(x, z, type(one)(widen(q[i])), one, log1p_exp)
    return lambda x, z, q, i, one, log1p_exp: weighted_loss(x, z, type(one)(q), one, log1p_exp)
