"""Logits capped or divided on CUDA, element by element, before a loss and after its gradient; rows copied."""

import numpy as np

from .._typed import capped, compute_zero, item_size, uncapped, widen
from ._launch import cuda, device, kernel, launch
from ._memory import load, store, store_item
from ._operands import address, operand, weight_at
from ._rows import row_address

THREADS = 256
TILE = 4 * THREADS  # elements of a row that a block takes


@device
def first_element(columns):
    """(row, column) of this thread's first element; the others lie THREADS apart."""
    tiles = (columns + TILE - 1) // TILE
    r = np.int64(cuda.blockIdx.x) // tiles
    return r, (np.int64(cuda.blockIdx.x) - r * tiles) * TILE + cuda.threadIdx.x


@device
def read(like, row, stride, j, columns):
    """Logit j of a row that begins at an address, or its last; 0 from address 0."""
    return widen(load(like, row + min(j, columns - 1) * stride)) if row != 0 else compute_zero(like)


def cap(work, items, like, rows, cap, out):
    """out[r, j] = capped logit j of row r."""
    blocks = items * -(-rows[5] // TILE)
    return launch(_cap.of(like), blocks, THREADS, out, items, like, rows, cap, address(out))


@kernel(THREADS)
def _cap(items, like, rows, cap, out):
    """A block takes a tile of a row, neighbouring threads neighbouring elements. A thread has four and reads them all
    before it writes one: a store might change what is to be read, so the compiler does not."""
    r, j, columns = *first_element(rows[5]), rows[5]
    k, row, to = j + 2 * THREADS, row_address(rows, r), out + r * columns * item_size(compute_zero(like))
    a, b = read(like, row, rows[4], j, columns), read(like, row, rows[4], j + THREADS, columns)
    c, d = read(like, row, rows[4], k, columns), read(like, row, rows[4], k + THREADS, columns)
    put(like, to, j, columns, capped(a, cap))
    put(like, to, j + THREADS, columns, capped(b, cap))
    put(like, to, k, columns, capped(c, cap))
    put(like, to, k + THREADS, columns, capped(d, cap))


@device
def put(like, row, j, columns, value):
    if j < columns:
        store(row + j * item_size(compute_zero(like)), value)


def uncap(work, items, grad, like, rows, cap, like_out, out_rows):
    """Row r of `out_rows` = grad[r], by capped logits, times d capped / d logit. `rows` and `out_rows` may be one."""
    blocks = items * -(-rows[5] // TILE)
    arguments = items, address(grad), like, rows, cap, like_out, out_rows
    return launch(_uncap.of(like), blocks, THREADS, grad, *arguments)


@kernel(THREADS)
def _uncap(items, grad, like, rows, cap, like_out, out_rows):
    """As _cap."""
    r, j, columns, zero = *first_element(rows[5]), rows[5], compute_zero(like)
    k, row, grads, size = j + 2 * THREADS, row_address(rows, r), grad + r * columns * item_size(zero), item_size(zero)
    a, b = read(like, row, rows[4], j, columns), read(like, row, rows[4], j + THREADS, columns)
    c, d = read(like, row, rows[4], k, columns), read(like, row, rows[4], k + THREADS, columns)
    g_a, g_b = read(zero, grads, size, j, columns), read(zero, grads, size, j + THREADS, columns)
    g_c, g_d = read(zero, grads, size, k, columns), read(zero, grads, size, k + THREADS, columns)
    to = row_address(out_rows, r)
    put_rounded(like_out, to, out_rows[4], j, columns, uncapped(g_a, a, cap))
    put_rounded(like_out, to, out_rows[4], j + THREADS, columns, uncapped(g_b, b, cap))
    put_rounded(like_out, to, out_rows[4], k, columns, uncapped(g_c, c, cap))
    put_rounded(like_out, to, out_rows[4], k + THREADS, columns, uncapped(g_d, d, cap))


@device
def put_rounded(like_out, row, stride, j, columns, value):
    if j < columns:
        store_item(like_out, row + j * stride, value)


def take_rows(work, items, like, rows, first, weights, out):
    """out[r] = row first + r of `rows`, widened; zeros where weights[r] is 0. `weights` may be None."""
    blocks = items * -(-rows[5] // TILE)
    return launch(_take_rows.of(like), blocks, THREADS, out, like, rows, first, operand(weights), address(out))


@kernel(THREADS)
def _take_rows(like, rows, first, weights, out):
    """As _cap."""
    r, j, columns = *first_element(rows[5]), rows[5]
    k, row, to = j + 2 * THREADS, row_address(rows, first + r), out + r * columns * item_size(compute_zero(like))
    if weight_at(weights, r) == 0.0:
        row = np.int64(0)
    a, b = read(like, row, rows[4], j, columns), read(like, row, rows[4], j + THREADS, columns)
    c, d = read(like, row, rows[4], k, columns), read(like, row, rows[4], k + THREADS, columns)
    put(like, to, j, columns, a)
    put(like, to, j + THREADS, columns, b)
    put(like, to, k, columns, c)
    put(like, to, k + THREADS, columns, d)


def put_rows(work, items, values, weights, like_out, out_rows, first):
    """Row first + r of `out_rows` = values[r], rounded; zeros where weights[r] is 0. `weights` may be None."""
    blocks = items * -(-out_rows[5] // TILE)
    arguments = address(values), operand(weights), like_out, out_rows, first
    return launch(_put_rows.of(like_out), blocks, THREADS, values, *arguments)


@kernel(THREADS)
def _put_rows(values, weights, like_out, out_rows, first):
    """As _cap."""
    r, j, columns, zero = *first_element(out_rows[5]), out_rows[5], compute_zero(like_out)
    k, row, size = j + 2 * THREADS, values + r * columns * item_size(zero), item_size(zero)
    if weight_at(weights, r) == 0.0:
        row = np.int64(0)
    a, b = read(zero, row, size, j, columns), read(zero, row, size, j + THREADS, columns)
    c, d = read(zero, row, size, k, columns), read(zero, row, size, k + THREADS, columns)
    to = row_address(out_rows, first + r)
    put_rounded(like_out, to, out_rows[4], j, columns, a)
    put_rounded(like_out, to, out_rows[4], j + THREADS, columns, b)
    put_rounded(like_out, to, out_rows[4], k, columns, c)
    put_rounded(like_out, to, out_rows[4], k + THREADS, columns, d)
