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
from ._launch import device, kernel, launch
from ._memory import load, store, store_item
from ._operands import address
from ._rows import row_address
from .elements import THREADS, TILE, first_element


def binary_xent(work, items, like, rows, like_labels, label_rows, like_weight, weight_rows, loss):
    """loss[r, j] = sigmoid cross entropy of logit j of row r, by `weight_rows` (see weight_of)."""
    blocks = loss.shape[0] * -(-rows[5] // TILE)
    weight = 0 if weight_rows is None else weight_rows
    arguments = like, rows, like_labels, label_rows, like_weight, weight, address(loss)
    return launch(_binary_xent.of(like), blocks, THREADS, loss, items, *arguments)


@kernel(THREADS)
def _binary_xent(items, like, rows, like_labels, label_rows, like_weight, weight_rows, loss):
    """As elements._cap: a thread reads its four elements before it writes one."""
    r, j, columns = *first_element(rows[5]), rows[5]
    operands = like, row_address(rows, r), rows[4], like_labels, row_address(label_rows, r), label_rows[4]
    weight, none = (like_weight, weight_rows, r), (like, 0, r)
    a, b = read(operands, weight, none, j, columns), read(operands, weight, none, j + THREADS, columns)
    k, to = j + 2 * THREADS, loss + r * columns * item_size(compute_zero(like))
    c, d = read(operands, weight, none, k, columns), read(operands, weight, none, k + THREADS, columns)
    put_loss(like, to, j, columns, a)
    put_loss(like, to, j + THREADS, columns, b)
    put_loss(like, to, k, columns, c)
    put_loss(like, to, k + THREADS, columns, d)


@device
def read(operands, weight, upstream, j, columns):
    """(logit, label, weight, upstream) of element j of a row, or of its last, by weight_of."""
    like, logits, stride, like_labels, labels, label_stride = operands
    j = min(j, columns - 1)
    x, z = widen(load(like, logits + j * stride)), number(like, widen(load(like_labels, labels + j * label_stride)))
    return x, z, weight_of(like, *weight, j), weight_of(like, *upstream, j)


@device
def put_loss(like, loss, j, columns, element):
    x, z, q, _ = element
    if j < columns:
        value = binary_loss(x, z, q, number(like, 1.0), log1p(exp_neg(abs(x))))
        store(loss + j * item_size(compute_zero(like)), value)


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
    """As _binary_xent."""
    r, j, columns = *first_element(rows[5]), rows[5]
    operands = like, row_address(rows, r), rows[4], like_labels, row_address(label_rows, r), label_rows[4]
    weight, upstream, out = (like_weight, weight_rows, r), (like_upstream, upstream_rows, r), np.int64(0)
    if out_rows[0] != 0:
        out = row_address(out_rows, r)
    to = r * columns, loss, like_out, out, out_rows[4], labels_grad, weight_grad, hess
    a, b = read(operands, weight, upstream, j, columns), read(operands, weight, upstream, j + THREADS, columns)
    k = j + 2 * THREADS
    c, d = read(operands, weight, upstream, k, columns), read(operands, weight, upstream, k + THREADS, columns)
    put_slopes(like, to, j, columns, a)
    put_slopes(like, to, j + THREADS, columns, b)
    put_slopes(like, to, k, columns, c)
    put_slopes(like, to, k + THREADS, columns, d)


@device
def put_slopes(like, to, j, columns, element):
    x, z, q, g = element
    before, loss, like_out, out, out_stride, labels_grad, weight_grad, hess = to
    if j < columns:
        e, one = exp_neg(abs(x)), number(like, 1.0)
        log1p_e, at = log1p(e), (before + j) * item_size(compute_zero(like))
        store(loss + at, binary_loss(x, z, q, one, log1p_e))
        if out != 0:
            slope = by_upstream(g, slope_by_logit(x, z, q, one, e, log1p_e), one)
            store_item(like_out, out + j * out_stride, slope)
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
