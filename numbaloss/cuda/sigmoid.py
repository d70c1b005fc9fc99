"""Sigmoid family on CUDA: element by element."""

import numpy as np
from numba import types
from numba.extending import overload

from .._typed import (
    binary_loss,
    by_upstream,
    compute_zero,
    curvature,
    exp_neg,
    item_size,
    log1p,
    number,
    slope_by_label,
    slope_by_logit,
    slope_by_pos_weight,
    widen,
)
from ._launch import cuda, device, kernel, launch
from ._memory import load, store, store_item
from ._operands import address
from ._rows import row_address

THREADS = 256
TILE = 1024  # elements of a row that a block takes


def binary_xent(work, items, like, rows, like_labels, label_rows, like_weight, weight_rows, loss):
    """loss[r, j] = sigmoid cross entropy of logit j of row r, by `weight_rows` (see weight_of)."""
    blocks = loss.shape[0] * -(-rows[5] // TILE)
    weight = 0 if weight_rows is None else weight_rows
    arguments = like, rows, like_labels, label_rows, like_weight, weight, address(loss)
    return launch(_binary_xent.of(like), blocks, THREADS, loss, items, *arguments)


@kernel(THREADS)
def _binary_xent(items, like, rows, like_labels, label_rows, like_weight, weight_rows, loss):
    """A block takes a tile of a row, neighbouring threads neighbouring elements."""
    columns = rows[5]
    tiles = (columns + TILE - 1) // TILE
    r, begin = np.int64(cuda.blockIdx.x) // tiles, np.int64(cuda.blockIdx.x) % tiles * TILE
    logits, labels = row_address(rows, r), row_address(label_rows, r)
    one = number(like, 1.0)
    for j in range(begin + cuda.threadIdx.x, min(begin + TILE, columns), THREADS):
        x = widen(load(like, logits + j * rows[4]))
        z = number(like, widen(load(like_labels, labels + j * label_rows[4])))
        q = weight_of(like, like_weight, weight_rows, r, j)
        value = binary_loss(x, z, q, one, log1p(exp_neg(abs(x))))
        store(loss + (r * columns + j) * item_size(compute_zero(like)), value)


def binary_grad(
    work,
    items,
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
    blocks = loss.shape[0] * -(-rows[5] // TILE)
    weight, upstream = (0 if x is None else x for x in (weight_rows, upstream_rows))
    operands = like, rows, like_labels, label_rows, like_weight, weight, like_upstream, upstream
    wanted = like_out, (0,) * 6 if out_rows is None else out_rows, *map(address, (labels_grad, weight_grad, hess))
    return launch(_binary_grad.of(like), blocks, THREADS, loss, items, *operands, address(loss), *wanted)


@kernel(THREADS)
def _binary_grad(
    items,
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
    columns, size = rows[5], item_size(compute_zero(like))
    tiles = (columns + TILE - 1) // TILE
    r, begin = np.int64(cuda.blockIdx.x) // tiles, np.int64(cuda.blockIdx.x) % tiles * TILE
    logits, labels = row_address(rows, r), row_address(label_rows, r)
    one = number(like, 1.0)
    for j in range(begin + cuda.threadIdx.x, min(begin + TILE, columns), THREADS):
        x = widen(load(like, logits + j * rows[4]))
        z = number(like, widen(load(like_labels, labels + j * label_rows[4])))
        q = weight_of(like, like_weight, weight_rows, r, j)
        g = weight_of(like, like_upstream, upstream_rows, r, j)
        e = exp_neg(abs(x))
        log1p_e = log1p(e)
        at = (r * columns + j) * size
        store(loss + at, binary_loss(x, z, q, one, log1p_e))
        if out_rows[0] != 0:
            slope = by_upstream(g, slope_by_logit(x, z, q, one, e, log1p_e), one)
            store_item(like_out, row_address(out_rows, r) + j * out_rows[4], slope)
        if labels_grad != 0:
            store(labels_grad + at, by_upstream(g, slope_by_label(x, z, q, one, e, log1p_e), one))
        if weight_grad != 0:
            store(weight_grad + at, by_upstream(g, slope_by_pos_weight(x, z, q, one, e, log1p_e), one))
        if hess != 0:
            store(hess + at, by_upstream(g, curvature(x, z, q, one, e, log1p_e), one))


def weight_of(like, like_weight, weight_rows, r, j):
    """The pos_weight or upstream of an element, from an array or one for all; the numbers of the focal loss (see
    _typed); None for the integer 0."""
    if isinstance(weight_rows, tuple):
        if isinstance(weight_rows[0], float):
            return tuple(number(like, x) for x in weight_rows)
        return weight_from(like, like_weight, weight_rows, r, j)
    return number(like, weight_rows) if isinstance(weight_rows, float) else None


@overload(weight_of)
def _weight_of(like, like_weight, weight_rows, r, j):
    if isinstance(weight_rows, types.BaseTuple) and isinstance(weight_rows[0], types.Float):
        return lambda like, like_weight, weight_rows, r, j: (
            number(like, weight_rows[0]),
            number(like, weight_rows[1]),
            number(like, weight_rows[2]),
        )
    if isinstance(weight_rows, types.BaseTuple):
        return lambda like, like_weight, weight_rows, r, j: weight_from(like, like_weight, weight_rows, r, j)
    if isinstance(weight_rows, types.Float):
        return lambda like, like_weight, weight_rows, r, j: number(like, weight_rows)
    return lambda like, like_weight, weight_rows, r, j: None


@device
def weight_from(like, like_weight, weight_rows, r, j):
    at = row_address(weight_rows, r) + j * weight_rows[4]
    return number(like, widen(load(like_weight, at)))
