"""Logits capped or divided on CUDA, element by element, before a loss and after its gradient; rows copied."""

import numpy as np

from .._typed import capped, compute_zero, item_size, uncapped, widen
from ._launch import cuda, device, kernel, launch
from ._memory import load, store_item
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
    """This thread's four logits, from j on, of the row at an address, or its last one; zeros for address 0."""
    if row == 0:
        zero = compute_zero(like)
        return zero, zero, zero, zero
    a, b = row + min(j, columns - 1) * stride, row + min(j + THREADS, columns - 1) * stride
    c, d = row + min(j + 2 * THREADS, columns - 1) * stride, row + min(j + 3 * THREADS, columns - 1) * stride
    return widen(load(like, a)), widen(load(like, b)), widen(load(like, c)), widen(load(like, d))


@device
def write(like_out, row, stride, j, columns, values):
    """These four, rounded, to where they belong, by read."""
    a, b, c, d = values
    if j < columns:
        store_item(like_out, row + j * stride, a)
    if j + THREADS < columns:
        store_item(like_out, row + (j + THREADS) * stride, b)
    if j + 2 * THREADS < columns:
        store_item(like_out, row + (j + 2 * THREADS) * stride, c)
    if j + 3 * THREADS < columns:
        store_item(like_out, row + (j + 3 * THREADS) * stride, d)


def cap(work, items, like, rows, cap, out):
    """out[r, j] = capped logit j of row r."""
    blocks = items * -(-rows[5] // TILE)
    return launch(_cap.of(like), blocks, THREADS, out, items, like, rows, cap, address(out))


@kernel(THREADS)
def _cap(items, like, rows, cap, out):
    """A block takes a tile of a row, neighbouring threads neighbouring elements. A thread has four and reads them all
    before it writes one: a store might change what is to be read, so the compiler does not."""
    r, j, columns, zero = *first_element(rows[5]), rows[5], compute_zero(like)
    a, b, c, d = read(like, row_address(rows, r), rows[4], j, columns)
    values = capped(a, cap), capped(b, cap), capped(c, cap), capped(d, cap)
    write(zero, out + r * columns * item_size(zero), item_size(zero), j, columns, values)


def uncap(work, items, grad, like, rows, cap, like_out, out_rows):
    """Row r of `out_rows` = grad[r], by capped logits, times d capped / d logit. `rows` and `out_rows` may be one."""
    blocks = items * -(-rows[5] // TILE)
    arguments = items, address(grad), like, rows, cap, like_out, out_rows
    return launch(_uncap.of(like), blocks, THREADS, grad, *arguments)


@kernel(THREADS)
def _uncap(items, grad, like, rows, cap, like_out, out_rows):
    """As _cap."""
    r, j, columns, zero = *first_element(rows[5]), rows[5], compute_zero(like)
    a, b, c, d = read(like, row_address(rows, r), rows[4], j, columns)
    e, f, g, h = read(zero, grad + r * columns * item_size(zero), item_size(zero), j, columns)
    values = uncapped(e, a, cap), uncapped(f, b, cap), uncapped(g, c, cap), uncapped(h, d, cap)
    write(like_out, row_address(out_rows, r), out_rows[4], j, columns, values)


def take_rows(work, items, like, rows, first, weights, out):
    """out[r] = row first + r of `rows`, widened; zeros where weights[r] is 0. `weights` may be None."""
    blocks = items * -(-rows[5] // TILE)
    return launch(_take_rows.of(like), blocks, THREADS, out, like, rows, first, operand(weights), address(out))


@kernel(THREADS)
def _take_rows(like, rows, first, weights, out):
    """As _cap."""
    r, j, columns, zero = *first_element(rows[5]), rows[5], compute_zero(like)
    row = row_address(rows, first + r) if weight_at(weights, r) != 0.0 else np.int64(0)
    values = read(like, row, rows[4], j, columns)
    write(zero, out + r * columns * item_size(zero), item_size(zero), j, columns, values)


def put_rows(work, items, values, weights, like_out, out_rows, first):
    """Row first + r of `out_rows` = values[r], rounded; zeros where weights[r] is 0. `weights` may be None."""
    blocks = items * -(-out_rows[5] // TILE)
    arguments = address(values), operand(weights), like_out, out_rows, first
    return launch(_put_rows.of(like_out), blocks, THREADS, values, *arguments)


@kernel(THREADS)
def _put_rows(values, weights, like_out, out_rows, first):
    """As _cap."""
    r, j, columns, zero = *first_element(out_rows[5]), out_rows[5], compute_zero(like_out)
    row = values + r * columns * item_size(zero) if weight_at(weights, r) != 0.0 else np.int64(0)
    items = read(zero, row, item_size(zero), j, columns)
    write(like_out, row_address(out_rows, first + r), out_rows[4], j, columns, items)
