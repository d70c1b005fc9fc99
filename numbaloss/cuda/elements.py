"""Logits capped or divided on CUDA, element by element, before a loss and after its gradient; rows copied."""

import numpy as np

from .._typed import capped, compute_zero, item_size, uncapped, widen
from ._launch import cuda, kernel, launch
from ._memory import load, store, store_item
from ._operands import address, operand, weight_at
from ._rows import row_address

THREADS = 256
TILE = 1024  # elements of a row that a block takes


def cap(work, items, like, rows, cap, out):
    """out[r, j] = capped logit j of row r."""
    blocks = items * -(-rows[5] // TILE)
    return launch(_cap.of(like), blocks, THREADS, out, items, like, rows, cap, address(out))


@kernel(THREADS)
def _cap(items, like, rows, cap, out):
    """A block takes a tile of a row, neighbouring threads neighbouring elements."""
    columns, size = rows[5], item_size(compute_zero(like))
    tiles = (columns + TILE - 1) // TILE
    r, begin = np.int64(cuda.blockIdx.x) // tiles, np.int64(cuda.blockIdx.x) % tiles * TILE
    source = row_address(rows, r)
    for j in range(begin + cuda.threadIdx.x, min(begin + TILE, columns), THREADS):
        x = widen(load(like, source + j * rows[4]))
        store(out + (r * columns + j) * size, capped(x, cap))


def uncap(work, items, grad, like, rows, cap, like_out, out_rows):
    """Row r of `out_rows` = grad[r], by capped logits, times d capped / d logit. `rows` and `out_rows` may be one."""
    blocks = items * -(-rows[5] // TILE)
    arguments = items, address(grad), like, rows, cap, like_out, out_rows
    return launch(_uncap.of(like), blocks, THREADS, grad, *arguments)


@kernel(THREADS)
def _uncap(items, grad, like, rows, cap, like_out, out_rows):
    """As _cap."""
    columns, zero = rows[5], compute_zero(like)
    tiles = (columns + TILE - 1) // TILE
    r, begin = np.int64(cuda.blockIdx.x) // tiles, np.int64(cuda.blockIdx.x) % tiles * TILE
    source, target = row_address(rows, r), row_address(out_rows, r)
    for j in range(begin + cuda.threadIdx.x, min(begin + TILE, columns), THREADS):
        x = widen(load(like, source + j * rows[4]))
        g = load(zero, grad + (r * columns + j) * item_size(zero))
        store_item(like_out, target + j * out_rows[4], uncapped(g, x, cap))


def take_rows(work, items, like, rows, first, weights, out):
    """out[r] = row first + r of `rows`, widened; zeros where weights[r] is 0. `weights` may be None."""
    blocks = items * -(-rows[5] // TILE)
    return launch(_take_rows.of(like), blocks, THREADS, out, like, rows, first, operand(weights), address(out))


@kernel(THREADS)
def _take_rows(like, rows, first, weights, out):
    """As _cap."""
    columns, size = rows[5], item_size(compute_zero(like))
    tiles = (columns + TILE - 1) // TILE
    r, begin = np.int64(cuda.blockIdx.x) // tiles, np.int64(cuda.blockIdx.x) % tiles * TILE
    source, counts = row_address(rows, first + r), weight_at(weights, r) != 0.0
    for j in range(begin + cuda.threadIdx.x, min(begin + TILE, columns), THREADS):
        x = compute_zero(like)
        if counts:
            x = widen(load(like, source + j * rows[4]))
        store(out + (r * columns + j) * size, x)


def put_rows(work, items, values, weights, like_out, out_rows, first):
    """Row first + r of `out_rows` = values[r], rounded; zeros where weights[r] is 0. `weights` may be None."""
    blocks = items * -(-out_rows[5] // TILE)
    arguments = address(values), operand(weights), like_out, out_rows, first
    return launch(_put_rows.of(like_out), blocks, THREADS, values, *arguments)


@kernel(THREADS)
def _put_rows(values, weights, like_out, out_rows, first):
    """As _cap."""
    columns, zero = out_rows[5], compute_zero(like_out)
    tiles = (columns + TILE - 1) // TILE
    r, begin = np.int64(cuda.blockIdx.x) // tiles, np.int64(cuda.blockIdx.x) % tiles * TILE
    target, counts = row_address(out_rows, first + r), weight_at(weights, r) != 0.0
    for j in range(begin + cuda.threadIdx.x, min(begin + TILE, columns), THREADS):
        x = zero
        if counts:
            x = load(zero, values + (r * columns + j) * item_size(zero))
        store_item(like_out, target + j * out_rows[4], x)
