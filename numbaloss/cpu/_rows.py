"""Rows of logits on the CPU, one at a time; `like` and `rows` are described in _chunks."""

import numpy as np

from .._check import NO_LABEL
from .._scalar import CHUNK, LANES, exp_64, exponent_32, f32, merge, merge_moments, others_to_target, target_loss
from .._typed import compute_zero, item_size, widen
from .._vector import WIDTH, splat
from ._chunks import MARGIN, NO_GUESS, chunk_moment, chunk_sum, tile_max
from ._memory import always_inline, gather, inner, load, out_of_line, span, store_as


@inner
def counts(r, labels, weights, ignore_index):
    """Whether row r is looked at. An ignore_index of NO_LABEL ignores none."""
    return (labels[r] != ignore_index or ignore_index == NO_LABEL) and not weight_is_zero(r, weights)


@inner
def weight_is_zero(r, weights):
    """Whether weights[r] is 0; empty weights are all 1."""
    return weights.size > 0 and weights[r] == 0


@inner
def row_address(rows, r):
    always_inline()
    address, inner, outer_stride, inner_stride, _, _ = rows
    return address + (r // inner) * outer_stride + (r % inner) * inner_stride


@inner
def row_sum(like, rows, address, skip, lanes, spare):
    """(s, c) of a whole row but for the class `skip`: its chunks, left to right, each guessing from those before."""
    out_of_line()
    stride, classes = rows[4], rows[5]
    s, c = chunk_sum(like, address, stride, min(CHUNK, classes), skip, NO_GUESS, lanes, spare)
    for begin in range(CHUNK, classes, CHUNK):
        at, size = address + begin * stride, min(CHUNK, classes - begin)
        guess = exponent_32(f32(c)) - MARGIN
        s2, c2 = chunk_sum(like, at, stride, size, skip - begin, guess, lanes, spare)
        s, c = merge(s, c, s2, c2)
    return s, c


@inner
def row_max(like, rows, address, spare):
    """(largest logit, its first index) of a row; of a row with NaN any number, and an index."""
    out_of_line()
    stride, classes, zero = rows[4], rows[5], compute_zero(like)
    best, where = type(zero)(-np.inf), 0
    for begin in range(0, classes, LANES):
        size = min(LANES, classes - begin)
        top = tile_max(like, gather(like, address + begin * stride, stride, size, spare), size)
        if top > best:
            best, where = top, begin
    for i in range(where, min(where + LANES, classes)):
        if widen(span(like, address + i * stride, 1)[0]) == best:
            where = i
            break
    return best + zero, where  # -0 becomes 0


@inner
def first_nan(like, rows, address):
    """The index of a row's first NaN, or -1."""
    out_of_line()
    stride, classes = rows[4], rows[5]
    for i in range(classes):
        x = widen(span(like, address + i * stride, 1)[0])
        if x != x:
            return i
    return -1


@inner
def row_rank(like, rows, address, x, spare):
    """The number of classes with a logit larger than x."""
    out_of_line()
    stride, classes = rows[4], rows[5]
    larger = 0
    for begin in range(0, classes, LANES):
        size = min(LANES, classes - begin)
        tile = span(like, gather(like, address + begin * stride, stride, size, spare), size)
        count = np.int32(0)
        for i in range(np.uint64(size)):
            count += np.int32(widen(tile[i]) > x)
        larger += count
    return larger


@inner
def row_moments(like, rows, address, skip, lanes, spare):
    """(s, c, b) of a row but for `skip`: s * e^c sums exp(x), b sums exp(x - c) * (x - c)."""
    out_of_line()
    stride, classes = rows[4], rows[5]
    s, c, b = 0.0, -np.inf, 0.0
    for begin in range(0, classes, CHUNK):
        at, size = address + begin * stride, min(CHUNK, classes - begin)
        s2, c2 = chunk_sum(like, at, stride, size, skip - begin, NO_GUESS, lanes, spare)
        if s2 != 0.0:
            shift = type(compute_zero(like))(c2)  # c2 lies between two numbers of the row's precision: take one of them
            s2, c2 = s2 * exp_64(c2 - shift), np.float64(shift)
            b2 = chunk_moment(like, at, stride, size, skip - begin, shift, lanes, spare)
            s, c, b = merge_moments(s, c, b, s2, c2, b2)
    return s, c, b


@inner
def leave_largest_out(like, rows, address, lanes, spare):
    """(largest logit, its class, u, log(1 + u)), u the sum of exp(x - largest) over the others; an undefined row has a
    logarithm of NaN."""
    largest, where = row_max(like, rows, address, spare)
    s, c = row_sum(like, rows, address, where, lanes, spare)
    x = np.float64(largest)
    full = item_size(like) == 8
    u = others_to_target(s, c, x, full)
    return largest, where, u, target_loss(u, s, c, x, full)


@inner
def fill_row(like_grad, out, stride, classes, value, room):
    """A gradient row of one number."""
    out_of_line()
    for i in range(0, min(classes, LANES), WIDTH):
        store_as(like_grad, room + i * item_size(like_grad), splat(value), WIDTH)
    for begin in range(0, classes, LANES):
        scatter(like_grad, room, min(LANES, classes - begin), out + begin * stride, stride)


@inner
def write_tile(zero, source, size, like_out, out, stride, spare):
    """Write `size` numbers of the type of `zero`, one after the other, as `like_out` to places `stride` bytes apart."""
    always_inline()
    to = out if stride == item_size(like_out) else spare
    for j in range(0, size, WIDTH):
        store_as(like_out, to + j * item_size(like_out), load(zero, source + j * item_size(zero)), size - j)
    scatter(like_out, to, size, out, stride)


@inner
def scatter(like, source, size, out, stride):
    """Copy neighbouring items to places `stride` bytes apart."""
    if source != out:
        items = span(like, source, size)
        for i in range(size):
            span(like, out + i * stride, 1)[0] = items[i]
