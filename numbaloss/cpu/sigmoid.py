"""Sigmoid family on the CPU: element by element, tiles of TILE so that strided operands can be copied to the cache."""

import numpy as np
from numba import prange, types
from numba.extending import overload

from .._scalar import LANES
from .._typed import (
    binary_loss,
    by_upstream,
    curvature,
    exp_neg,
    log1p,
    slope_by_label,
    slope_by_logit,
    slope_by_pos_weight,
    widen,
)
from ._launch import Kernel
from ._memory import TILE_BYTES, gather, inner, span, stack
from ._rows import row_address, write_tile

TILE = LANES


def _binary_xent(blocks, like, rows, like_labels, label_rows, like_weight, weight_rows, loss):
    """loss[r, j] = sigmoid cross entropy of logit j of row r, by `weight_rows` (see weight_tile)."""
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
    """What `rows` says of `size` elements: an array, or itself if it is a number for all, the numbers of the focal loss
    (see _typed) or None."""


@overload(weight_tile)
def _weight_tile(like, rows, r, begin, size, spare):
    if rows == types.none or isinstance(rows, types.Float) or isinstance(rows[0], types.Float):
        return lambda like, rows, r, begin, size, spare: rows
    return lambda like, rows, r, begin, size, spare: span(
        like, gather(like, row_address(rows, r) + begin * rows[4], rows[4], size, spare), size
    )


@inner
def loss_tile(x, z, q, loss):
    """One loop for the exponential and one for the logarithm are a sixth faster than one: shorter chains."""
    one = loss.dtype.type(1)
    for i in range(np.uint64(loss.size)):
        loss[i] = exp_neg(abs(widen(x[i])))
    for i in range(np.uint64(loss.size)):
        label = loss.dtype.type(widen(z[i]))
        loss[i] = binary_loss(widen(x[i]), label, weight_of(q, i, one), one, log1p(loss[i]))


def weight_of(q, i, one):
    """q, its items or q[i] in the precision of `one`; None stays None."""


@overload(weight_of)
def _weight_of(q, i, one):
    if isinstance(q, types.Array):
        return lambda q, i, one: type(one)(widen(q[i]))
    if q == types.none:
        return lambda q, i, one: None
    if isinstance(q, types.BaseTuple):
        return lambda q, i, one: (type(one)(q[0]), type(one)(q[1]), type(one)(q[2]))
    return lambda q, i, one: type(one)(q)


# -- gradients -----------------------------------------------------------------------------------------------------


def _binary_grad(
    blocks,
    like,
    rows,
    like_labels,
    label_rows,
    like_weight,
    weight_rows,
    like_upstream,
    upstream_rows,
    loss,
    like_out,
    out_rows,
    labels_grad,
    weight_grad,
    hess,
):
    """As binary_xent, and derivatives of upstream * loss: by logits, to `out_rows`, which may be the logits' memory, by
    labels, by pos_weight, and the second by logits. What is None is not wanted."""
    stride, columns = rows[4], rows[5]
    tiles = (columns + TILE - 1) // TILE
    n = loss.shape[0] * tiles
    for block in prange(blocks):
        spare, spare_2, spare_3, spare_4 = stack(TILE_BYTES), stack(TILE_BYTES), stack(TILE_BYTES), stack(TILE_BYTES)
        room, room_2, room_3 = stack(TILE_BYTES), stack(TILE_BYTES), stack(TILE_BYTES)
        for task in range(block * n // blocks, (block + 1) * n // blocks):
            r, begin = task // tiles, task % tiles * TILE
            size = min(TILE, columns - begin)
            end = begin + size
            x = span(like, gather(like, row_address(rows, r) + begin * stride, stride, size, spare), size)
            at = row_address(label_rows, r) + begin * label_rows[4]
            z = span(like_labels, gather(like_labels, at, label_rows[4], size, spare_2), size)
            q = weight_tile(like_weight, weight_rows, r, begin, size, spare_3)
            g = weight_tile(like_upstream, upstream_rows, r, begin, size, spare_4)
            zero = loss.dtype.type(0)
            e, log1p_e = span(zero, room, size), span(zero, room_2, size)
            exp_tile(x, e, log1p_e)
            if labels_grad is not None:
                label_slope_tile(x, z, q, g, e, log1p_e, labels_grad[r, begin:end])
            if weight_grad is not None:
                pos_weight_slope_tile(x, z, q, g, e, log1p_e, weight_grad[r, begin:end])
            if hess is not None:
                curvature_tile(x, z, q, g, e, log1p_e, hess[r, begin:end])
            value_tile(x, z, q, log1p_e, loss[r, begin:end])
            if out_rows is not None:
                slope_tile(x, z, q, g, e, log1p_e, span(zero, room_3, size))
                out = row_address(out_rows, r) + begin * out_rows[4]
                write_tile(zero, room_3, size, like_out, out, out_rows[4], room)


binary_grad = Kernel(_binary_grad)


@inner
def exp_tile(x, e, log1p_e):
    for i in range(np.uint64(e.size)):
        e[i] = exp_neg(abs(widen(x[i])))
    for i in range(np.uint64(e.size)):
        log1p_e[i] = log1p(e[i])


@inner
def value_tile(x, z, q, log1p_e, loss):
    one = loss.dtype.type(1)
    for i in range(np.uint64(loss.size)):
        loss[i] = binary_loss(widen(x[i]), loss.dtype.type(widen(z[i])), weight_of(q, i, one), one, log1p_e[i])


def tile_of(derivative):
    """A loop for a derivative. One for all: LLVM would give up on so many arrays at once."""

    @inner
    def tile(x, z, q, g, e, log1p_e, out):
        one = out.dtype.type(1)
        for i in range(np.uint64(out.size)):
            label = out.dtype.type(widen(z[i]))
            slope = derivative(widen(x[i]), label, weight_of(q, i, one), one, e[i], log1p_e[i])
            out[i] = by_upstream(weight_of(g, i, one), slope, one)

    return tile


slope_tile, label_slope_tile = tile_of(slope_by_logit), tile_of(slope_by_label)
pos_weight_slope_tile, curvature_tile = tile_of(slope_by_pos_weight), tile_of(curvature)
