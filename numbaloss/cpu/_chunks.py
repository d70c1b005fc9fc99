"""Sums of exponentials over tiles, chunks and rows of logits, one row at a time.

A row is described by `rows = (address, inner, outer_stride, inner_stride, class_stride, classes)`: row r begins at
address + (r // inner) * outer_stride + (r % inner) * inner_stride; strides in bytes. `like` is an empty array that
carries the dtype of the logits, `spare` the address of room for one tile. Definitions are in docs/NUMERICS.md.
"""

import numpy as np
from numba import njit, types
from numba.extending import overload

from .._scalar import (
    BIAS,
    BIAS_64,
    CHUNK,
    EXP_LIMIT,
    HEADROOM,
    INV_LOG2E,
    INV_LOG2E_32,
    LANES,
    MAGIC,
    MAGIC_64,
    ZERO,
    bits_float,
    exp_64,
    exponent_32,
    float_bits,
    fma,
    merge,
    merge_moments,
    ordered_bits,
    power_of_two,
    select,
    term_32,
    term_64,
)
from ._memory import compute_dtype, gather, span, widen

HEAD = 64  # classes whose maximum gives a chunk its first reference exponent
LOW_64 = -709.0


# -- one tile ----------------------------------------------------------------------------------------------------


@njit
def add_tile(x, first, lanes, low, m):
    """Add one class to each lane; the bits of the largest exponent word, which order as it does. `first`: see start.

    Slower were: a tile of two or eight classes a lane (its streams through memory are a page apart), four vectors in
    lockstep, software prefetch, and the maximum in a loop of its own (by 20 %).
    """
    top = np.int32(0)
    for i in range(np.uint64(x.size)):
        lanes[i], t = term_32(widen(x[i]), low, m, start(first, lanes, i))
        top = max(top, float_bits(t))
    return top


def start(first, lanes, i):
    """What lane i holds already: 0 if `first` is None, for a chunk's first tile."""


@overload(start)
def _start(first, lanes, i):
    if first == types.none:
        return lambda first, lanes, i: ZERO
    return lambda first, lanes, i: lanes[i]


@njit
def top_tile(x, low, m):
    top = np.int32(0)
    for i in range(np.uint64(x.size)):
        top = max(top, float_bits(term_32(widen(x[i]), low, m, ZERO)[1]))
    return top


@njit
def max_tile(x, best):
    """The larger of the key `best` and the keys of x (ordered_bits)."""
    for i in range(np.uint64(x.size)):
        best = max(best, ordered_bits(widen(x[i]) + ZERO))  # -0 becomes 0
    return best


@njit
def fold_lanes(lanes, size):
    """The butterfly: lane l takes in lane l + h for h = 512 ... 1. Lanes from `size` on count as 0."""
    width = np.uint64(16)
    while width < np.uint64(size):
        width <<= np.uint64(1)
    lanes[size : np.int64(width)] = lanes.dtype.type(0)
    if width == np.uint64(LANES):
        width = np.uint64(LANES // 8)
        for i in range(width):  # three levels in one pass
            a = (lanes[i] + lanes[i + np.uint64(512)]) + (lanes[i + np.uint64(256)] + lanes[i + np.uint64(768)])
            b = (lanes[i + np.uint64(128)] + lanes[i + np.uint64(640)]) + (
                lanes[i + np.uint64(384)] + lanes[i + np.uint64(896)]
            )
            lanes[i] = a + b
    while width > np.uint64(16):
        width >>= np.uint64(1)
        for i in range(width):
            lanes[i] += lanes[i + width]
    return np.float64(fold_16(lanes))


@njit
def fold_16(v):
    """The last four levels."""
    a0, a1, a2, a3 = v[0] + v[8], v[1] + v[9], v[2] + v[10], v[3] + v[11]
    a4, a5, a6, a7 = v[4] + v[12], v[5] + v[13], v[6] + v[14], v[7] + v[15]
    return ((a0 + a4) + (a2 + a6)) + ((a1 + a5) + (a3 + a7))


# -- one chunk ---------------------------------------------------------------------------------------------------


@njit
def chunk_max(like, address, stride, size, skip, spare):
    """The largest of `size` logits but for the one at `skip`, -inf if there is none; a positive NaN wins."""
    best = ordered_bits(compute_dtype(like).dtype.type(-np.inf))
    for begin in range(0, size, LANES):
        x = gather(like, address + begin * stride, stride, min(LANES, size - begin), spare)
        lane = skip - begin
        if 0 <= lane < x.size:
            best = max_tile(x[:lane], best)
            best = max_tile(x[lane + 1 :], best)
        else:
            best = max_tile(x, best)
    return best


@njit
def chunk_terms(like, address, stride, size, skip, ref, lanes, spare):
    """The sum of 2^(x * LOG2E - ref) over a chunk but for `skip`, and the chunk's largest exponent.

    The tile that holds `skip` is summed as any other; its lane is then put back, and its largest exponent is looked
    up again if it was the skipped one's.
    """
    m = MAGIC + (BIAS - ref)
    low = (ref - BIAS) * INV_LOG2E_32
    top = np.int32(0)
    for begin in range(0, size, LANES):
        x = gather(like, address + begin * stride, stride, min(LANES, size - begin), spare)
        lane = skip - begin
        inside = 0 <= lane < x.size
        kept = lanes[lane] if inside and begin > 0 else ZERO
        tile_top = add_tile(x, None, lanes, low, m) if begin == 0 else add_tile(x, 0, lanes, low, m)
        if inside:
            lanes[lane] = kept
            skipped = widen(x[lane])
            if tile_top <= float_bits(term_32(skipped, low, m, ZERO)[1]) or skipped != skipped:
                tile_top = max(top_tile(x[:lane], low, m), top_tile(x[lane + 1 :], low, m))
        top = max(top, tile_top)
    return fold_lanes(lanes, min(size, LANES)), bits_float(np.int32(top)) - m


@njit
def chunk_terms_shifted(like, address, stride, size, skip, shift, lanes, spare):
    """The sum of exp(x - shift) over a chunk but for `skip`: every float64 chunk, and float32 ones beyond 2^20."""
    one = lanes.dtype.type(1)
    m, low = shifted_frame(one)
    lanes[:] = one - one
    for begin in range(0, size, LANES):
        x = gather(like, address + begin * stride, stride, min(LANES, size - begin), spare)
        for i in range(np.uint64(x.size)):
            v = widen(x[i]) - shift
            lanes[i] = term(select(np.int64(i) == skip - begin, low, v), low, m, lanes[i])[0]
    return fold_lanes(lanes, min(size, LANES))


@njit
def chunk_moment(like, address, stride, size, skip, shift, lanes, spare):
    """The sum of exp(x - shift) * (x - shift) over a chunk but for `skip`."""
    one = lanes.dtype.type(1)
    m, low = shifted_frame(one)
    lanes[:] = one - one
    for begin in range(0, size, LANES):
        x = gather(like, address + begin * stride, stride, min(LANES, size - begin), spare)
        for i in range(np.uint64(x.size)):
            v = widen(x[i]) - shift
            v = select(np.int64(i) == skip - begin, low, v)
            lanes[i] = fma(term(v, low, m, one - one)[0], select(v < low, low, v), lanes[i])
    return fold_lanes(lanes, min(size, LANES))


def term(x, low, m, total):
    """term_32 or term_64, by the type of x."""


@overload(term)
def _term(x, low, m, total):
    if x == types.float64:
        return lambda x, low, m, total: term_64(x, low, m, total)
    return lambda x, low, m, total: term_32(x, low, m, total)


def shifted_frame(one):
    """(m, low) of a sum whose reference exponent is 0."""


@overload(shifted_frame)
def _shifted_frame(one):
    if one == types.float64:
        return lambda one: (MAGIC_64 + BIAS_64, LOW_64)
    return lambda one: (MAGIC + BIAS, -BIAS * INV_LOG2E_32)


def chunk_sum(like, address, stride, size, skip, lanes, spare):
    """(s, c) with s * e^c the sum of exp(x) over a chunk but for `skip`; c lies within 1 of the largest x that counts.

    The first reference exponent is that of the chunk's first classes; if a later one is too large for it, or there was
    none, the sum is taken again from the exact maximum. s has the same bits either way.
    """


@overload(chunk_sum)
def _chunk_sum(like, address, stride, size, skip, lanes, spare):
    if like.dtype == types.float64:

        def chunk_sum_64(like, address, stride, size, skip, lanes, spare):
            key = chunk_max(like, address, stride, size, skip, spare)
            if key >= ordered_bits(np.inf):
                return np.nan, np.inf
            if key <= ordered_bits(-np.inf):
                return empty_sum(like, address, stride, size, skip)
            largest = key_value(like, key)
            return chunk_terms_shifted(like, address, stride, size, skip, largest, lanes, spare), largest

        return chunk_sum_64

    def chunk_sum_32(like, address, stride, size, skip, lanes, spare):
        ref = exponent_32(key_value(lanes, chunk_max(like, address, stride, min(HEAD, size), skip, spare)))
        if abs(ref) <= EXP_LIMIT:
            s, n = chunk_terms(like, address, stride, size, skip, ref, lanes, spare)
            if n - ref <= HEADROOM and abs(n) <= EXP_LIMIT:
                return s * power_of_two(np.float64(ref - n)), np.float64(n) * INV_LOG2E
        largest = key_value(lanes, chunk_max(like, address, stride, size, skip, spare))
        if largest == -np.inf:
            return empty_sum(like, address, stride, size, skip)
        if not largest < np.inf:
            return np.nan, np.inf
        ref = exponent_32(largest)
        if abs(ref) <= EXP_LIMIT:
            s, n = chunk_terms(like, address, stride, size, skip, ref, lanes, spare)
            return s, np.float64(n) * INV_LOG2E
        return chunk_terms_shifted(like, address, stride, size, skip, largest, lanes, spare), np.float64(largest)

    return chunk_sum_32


def key_value(dtype, key):
    """The float of this dtype whose key (ordered_bits) this is."""


@overload(key_value)
def _key_value(dtype, key):
    if dtype.dtype == types.float64:
        return lambda dtype, key: bits_float(key if key >= 0 else key ^ np.int64(0x7FFFFFFFFFFFFFFF))
    return lambda dtype, key: bits_float(np.int32(key if key >= 0 else key ^ 0x7FFFFFFF))


# -- one row -----------------------------------------------------------------------------------------------------


@njit
def empty_sum(like, address, stride, size, skip):
    """What chunk_sum gives for a chunk of -inf; a negative NaN, which is no maximum, may hide in it."""
    for i in range(size):
        x = widen(span(like, address + i * stride, 1)[0])
        if x != x and i != skip:
            return np.nan, np.inf
    return 0.0, -np.inf


@njit
def row_address(rows, r):
    address, inner, outer_stride, inner_stride, _, _ = rows
    return address + (r // inner) * outer_stride + (r % inner) * inner_stride


@njit
def row_sum(like, rows, address, skip, lanes, spare):
    """(s, c) of a whole row but for the class `skip`: its chunks, left to right."""
    stride, classes = rows[4], rows[5]
    s, c = 0.0, -np.inf
    for begin in range(0, classes, CHUNK):
        part = chunk_sum(
            like, address + begin * stride, stride, min(CHUNK, classes - begin), skip - begin, lanes, spare
        )
        if begin == 0:
            s, c = part
        else:
            s, c = merge(s, c, part[0], part[1])
    return s, c


@njit
def row_max(like, rows, address, spare):
    """(largest logit, its first index) of a row. A row with NaN: that of a positive NaN, or of the largest number."""
    stride, classes = rows[4], rows[5]
    best = chunk_max(like, address, stride, min(CHUNK, classes), -1, spare)
    where = 0
    for begin in range(CHUNK, classes, CHUNK):
        key = chunk_max(like, address + begin * stride, stride, min(CHUNK, classes - begin), -1, spare)
        if key > best:
            best, where = key, begin
    largest = key_value(compute_dtype(like), best)
    for i in range(where, classes):
        x = widen(span(like, address + i * stride, 1)[0])
        if x == largest or (x != x and largest != largest):
            where = i
            break
    return largest, where


@njit
def first_nan(like, rows, address):
    """The index of a row's first NaN, or -1."""
    stride, classes = rows[4], rows[5]
    for i in range(classes):
        x = widen(span(like, address + i * stride, 1)[0])
        if x != x:
            return i
    return -1


@njit
def row_rank(like, rows, address, x, spare):
    """The number of classes with a logit larger than x."""
    stride, classes = rows[4], rows[5]
    larger = 0
    for begin in range(0, classes, LANES):
        tile = gather(like, address + begin * stride, stride, min(LANES, classes - begin), spare)
        count = np.int32(0)
        for i in range(np.uint64(tile.size)):
            count += np.int32(widen(tile[i]) > x)
        larger += count
    return larger


@njit
def row_moments(like, rows, address, skip, lanes, spare):
    """(s, c, b) of a row but for `skip`: s * e^c sums exp(x), b sums exp(x - c) * (x - c)."""
    stride, classes = rows[4], rows[5]
    s, c, b = 0.0, -np.inf, 0.0
    for begin in range(0, classes, CHUNK):
        at, size = address + begin * stride, min(CHUNK, classes - begin)
        s2, c2 = chunk_sum(like, at, stride, size, skip - begin, lanes, spare)
        if s2 != 0.0:
            shift = lanes.dtype.type(c2)  # c2 lies between two numbers of the row's precision: take one of them
            s2, c2 = s2 * exp_64(c2 - shift), np.float64(shift)
            b2 = chunk_moment(like, at, stride, size, skip - begin, shift, lanes, spare)
            s, c, b = merge_moments(s, c, b, s2, c2, b2)
    return s, c, b
