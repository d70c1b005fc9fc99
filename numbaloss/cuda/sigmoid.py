"""Sigmoid family on CUDA: element by element."""

import numpy as np
from numba import types
from numba.extending import overload

from .._typed import as_result, binary_loss, compute_zero, exp_neg, item_size, log1p, widen
from ._launch import cuda, device, kernel, launch
from ._memory import load, store
from ._operands import address
from ._rows import row_address

THREADS = 256
TILE = 1024  # elements of a row that a block takes


def binary_xent(work, items, like, rows, like_labels, label_rows, like_weight, weight_rows, loss):
    """loss[r, j] = sigmoid cross entropy of logit j of row r, weighted unless `weight_rows` (pos_weight) is None."""
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
    one = as_result(like, 1.0)
    for j in range(begin + cuda.threadIdx.x, min(begin + TILE, columns), THREADS):
        x = widen(load(like, logits + j * rows[4]))
        z = as_result(like, widen(load(like_labels, labels + j * label_rows[4])))
        q = weight_of(like, like_weight, weight_rows, r, j)
        value = binary_loss(x, z, q, one, log1p(exp_neg(abs(x))))
        store(loss + (r * columns + j) * item_size(compute_zero(like)), value)


def weight_of(like, like_weight, weight_rows, r, j):
    """The pos_weight of an element: from an array, one number, or None for the integer 0."""
    if isinstance(weight_rows, tuple):
        return weight_from(like, like_weight, weight_rows, r, j)
    return as_result(like, weight_rows) if isinstance(weight_rows, float) else None


@overload(weight_of)
def _weight_of(like, like_weight, weight_rows, r, j):
    if isinstance(weight_rows, types.BaseTuple):
        return lambda like, like_weight, weight_rows, r, j: weight_from(like, like_weight, weight_rows, r, j)
    if isinstance(weight_rows, types.Float):
        return lambda like, like_weight, weight_rows, r, j: as_result(like, weight_rows)
    return lambda like, like_weight, weight_rows, r, j: None


@device
def weight_from(like, like_weight, weight_rows, r, j):
    at = row_address(weight_rows, r) + j * weight_rows[4]
    return as_result(like, widen(load(like_weight, at)))
