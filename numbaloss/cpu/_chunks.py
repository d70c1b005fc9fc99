"""Sums of exponentials over tiles, chunks and rows of logits, one row at a time.

A row is described by `rows = (address, inner, outer_stride, inner_stride, class_stride, classes)`: row r begins at
address + (r // inner) * outer_stride + (r % inner) * inner_stride; strides in bytes. `like` is a zero of the dtype of
the logits; `lanes` and `spare` are addresses of room for one tile, widened and not. Arrays are not passed on: Numba
would count references, which costs more than a short row. Definitions are in docs/NUMERICS.md.
"""

import numpy as np
from numba import types
from numba.extending import overload

from .._intrinsics import at_least, bits_float, float_bits, fma, ordered_bits, select
from .._scalar import (
    BIAS,
    EXP_LIMIT,
    HEADROOM,
    INV_LOG2E,
    LANES,
    ZERO,
    exponent_32,
    f32,
    frame_32,
    power_of_two,
    term_32,
)
from .._typed import compute_zero, item_size, key_value, shifted_frame, term, widen
from .._vector import WIDTH, fold, largest, most_bits, most_bits_of, splat
from ._memory import always_inline, fill, gather, inner, load, load_part, load_up_to, out_of_line, span, store

HEAD = 64  # classes whose maximum gives a chunk its first reference exponent
NO_GUESS = f32(np.nan)
MARGIN = f32(40)  # a chunk's largest exponent may lie this much below that of the chunks before it


# -- one tile ----------------------------------------------------------------------------------------------------


@inner
def add_tile(like, address, size, first, lanes, low, m, top):
    """Add one class to each lane; `top` or an exponent word of the tile, whichever has most bits. `first`: see start.

    Slower were: a tile of two or eight classes a lane (its streams through memory are a page apart), software
    prefetch, and the maximum in a loop of its own (by 20 %).
    """
    always_inline()
    whole = size // WIDTH
    for _ in range(whole):
        total, t = term_32(load(like, address), low, m, start(first, lanes))
        store(lanes, total)
        top = most_bits(t, top)
        address += WIDTH * item_size(like)
        lanes += WIDTH * item_size(m)
    if whole * WIDTH < size:
        total, t = term_32(load_part(like, address, size - whole * WIDTH), low, m, start(first, lanes))
        store(lanes, total)
        top = most_bits(t, top)
    return top


def start(first, lanes):
    """What the lanes hold already: 0 if `first` is None, for a chunk's first tile."""


@overload(start)
def _start(first, lanes):
    if first == types.none:
        return lambda first, lanes: ZERO
    return lambda first, lanes: load(ZERO, lanes)


@inner
def top_tile(x, low, m):
    top = np.int32(0)
    for i in range(np.uint64(x.size)):
        top = max(top, float_bits(term_32(widen(x[i]), low, m, ZERO)[1]))
    return top


@inner
def max_tile(x, best):
    """The larger of the key `best` and the keys of x (ordered_bits)."""
    for i in range(np.uint64(x.size)):
        best = max(best, ordered_bits(widen(x[i]) + ZERO))  # -0 becomes 0
    return best


@inner
def tile_max(like, address, size):
    """The largest of `size` > 0 neighbouring logits; if one is NaN, that or another."""
    out_of_line()
    a = b = c = d = splat(type(compute_zero(like))(-np.inf))
    step, whole = WIDTH * item_size(like), size // (4 * WIDTH)
    for _ in range(whole):  # four at a time: one would wait for the one before
        a, b = at_least(load(like, address), a), at_least(load(like, address + step), b)
        c, d = at_least(load(like, address + 2 * step), c), at_least(load(like, address + 3 * step), d)
        address += 4 * step
    for i in range(4 * WIDTH * whole, size, WIDTH):
        a = at_least(load_up_to(like, address, size - i), a)
        address += step
    return largest(at_least(at_least(a, b), at_least(c, d)))


@inner
def fold_lanes(zero, lanes, size):
    """The butterfly: lane l takes in lane l + h for h = 512 ... 1. Lanes from `size` on count as `zero`."""
    always_inline()
    count = (size + WIDTH - 1) // WIDTH
    for i in range(size, count * WIDTH):
        span(zero, lanes, LANES)[i] = zero
    return np.float64(fold(fold_vectors(zero, lanes, count, WIDTH * item_size(zero))))


@inner
def fold_vectors(zero, address, count, stride):
    """The butterfly over `count` > 0 vectors, `stride` bytes apart: vector i takes in i + h for h = ..., 4, 2, 1."""
    always_inline()
    if count == LANES // WIDTH:  # the first three levels in registers
        count = count // 8
        for i in range(count):
            at, h = address + i * stride, count * stride
            a = (load(zero, at) + load(zero, at + 4 * h)) + (load(zero, at + 2 * h) + load(zero, at + 6 * h))
            b = (load(zero, at + h) + load(zero, at + 5 * h)) + (load(zero, at + 3 * h) + load(zero, at + 7 * h))
            store(at, a + b)
    half = 1
    while 2 * half < count:
        half *= 2
    while count > 1:
        for i in range(count - half):
            at = address + i * stride
            store(at, load(zero, at) + load(zero, at + half * stride))
        count = half
        half //= 2
    return load(zero, address)


# -- one chunk ---------------------------------------------------------------------------------------------------


@inner
def chunk_max(like, address, stride, size, skip, spare):
    """The largest of `size` logits but for the one at `skip`, -inf if there is none; a positive NaN wins."""
    out_of_line()
    best = ordered_bits(type(compute_zero(like))(-np.inf))
    for begin in range(0, size, LANES):
        count = min(LANES, size - begin)
        x = span(like, gather(like, address + begin * stride, stride, count, spare), count)
        lane = skip - begin
        if 0 <= lane < count:
            best = max_tile(x[:lane], best)
            best = max_tile(x[lane + 1 :], best)
        else:
            best = max_tile(x, best)
    return best


@inner
def chunk_terms(like, address, stride, size, skip, ref, lanes, spare):
    """The sum of 2^(x * LOG2E - ref) over a chunk but for `skip`, and the chunk's largest exponent.

    The tile that holds `skip` is summed as any other; its lane is then put back, and its largest exponent is looked
    up again if it was the skipped one's.
    """
    out_of_line()
    m, low = frame_32(ref, BIAS)
    top = np.int32(0)
    tops = splat(ZERO)
    for begin in range(0, size, LANES):
        count, lane = min(LANES, size - begin), skip - begin
        at = gather(like, address + begin * stride, stride, count, spare)
        inside = 0 <= lane < count
        if inside:  # this tile's largest exponent is looked at on its own
            top, tops = float_bits(most_bits_of(tops)), splat(ZERO)
        kept = span(ZERO, lanes, LANES)[lane] if inside and begin > 0 else ZERO
        if begin == 0:
            tops = add_tile(like, at, count, None, lanes, low, m, tops)
        else:
            tops = add_tile(like, at, count, 0, lanes, low, m, tops)
        if inside:
            span(ZERO, lanes, LANES)[lane] = kept
            x = span(like, at, count)
            skipped = widen(x[lane])
            tile_top = float_bits(most_bits_of(tops))
            if tile_top <= float_bits(term_32(skipped, low, m, ZERO)[1]) or skipped != skipped:
                tile_top = max(top_tile(x[:lane], low, m), top_tile(x[lane + 1 :], low, m))
            top, tops = max(top, tile_top), splat(ZERO)
    top = max(top, float_bits(most_bits_of(tops)))
    return fold_lanes(ZERO, lanes, min(size, LANES)), bits_float(np.int32(top)) - m


@inner
def chunk_terms_shifted(like, address, stride, size, skip, shift, lanes, spare):
    """The sum of exp(x - shift) over a chunk but for `skip`: every float64 chunk, and float32 ones beyond 2^20."""
    out_of_line()
    zero = compute_zero(like)
    m, low = shifted_frame(zero)
    sums = span(zero, lanes, LANES)
    fill(sums, zero)
    for begin in range(0, size, LANES):
        count = min(LANES, size - begin)
        x = span(like, gather(like, address + begin * stride, stride, count, spare), count)
        for i in range(np.uint64(count)):
            v = widen(x[i]) - shift
            sums[i] = term(select(np.int64(i) == skip - begin, low, v), low, m, sums[i])[0]
    return fold_lanes(zero, lanes, min(size, LANES))


@inner
def chunk_moment(like, address, stride, size, skip, shift, lanes, spare):
    """The sum of exp(x - shift) * (x - shift) over a chunk but for `skip`."""
    out_of_line()
    zero = compute_zero(like)
    m, low = shifted_frame(zero)
    sums = span(zero, lanes, LANES)
    fill(sums, zero)
    for begin in range(0, size, LANES):
        count = min(LANES, size - begin)
        x = span(like, gather(like, address + begin * stride, stride, count, spare), count)
        for i in range(np.uint64(count)):
            v = widen(x[i]) - shift
            v = select(np.int64(i) == skip - begin, low, v)
            sums[i] = fma(term(v, low, m, zero)[0], select(v < low, low, v), sums[i])
    return fold_lanes(zero, lanes, min(size, LANES))


@inner
def empty_sum(like, address, stride, size, skip):
    """What chunk_sum gives for a chunk of -inf; a negative NaN, which is no maximum, may hide in it."""
    out_of_line()
    for i in range(size):
        x = widen(span(like, address + i * stride, 1)[0])
        if x != x and i != skip:
            return np.nan, np.inf
    return 0.0, -np.inf


def chunk_sum(like, address, stride, size, skip, guess, lanes, spare):
    """(s, c) with s * e^c the sum of exp(x) over a chunk but for `skip`; c lies within 1 of the largest x that counts.

    The first reference exponent is `guess`, or, if that is NaN, the exponent of the chunk's first classes; if it is
    above all that follow, or one is too large for it, the sum is taken again from the exact maximum. s has the same
    bits in each case.
    """


@overload(chunk_sum)
def _chunk_sum(like, address, stride, size, skip, guess, lanes, spare):
    if like == types.float64:

        def chunk_sum_64(like, address, stride, size, skip, guess, lanes, spare):
            out_of_line()
            key = chunk_max(like, address, stride, size, skip, spare)
            if key >= ordered_bits(np.inf):
                return np.nan, np.inf
            if key <= ordered_bits(-np.inf):
                return empty_sum(like, address, stride, size, skip)
            largest = key_value(like, key)
            return chunk_terms_shifted(like, address, stride, size, skip, largest, lanes, spare), largest

        return chunk_sum_64

    def chunk_sum_32(like, address, stride, size, skip, guess, lanes, spare):
        out_of_line()
        ref = guess if guess == guess else exponent_32(head_max(like, address, stride, size, skip, spare))
        if abs(ref) <= EXP_LIMIT:
            s, n = chunk_terms(like, address, stride, size, skip, ref, lanes, spare)
            if 0 <= n - ref <= HEADROOM and abs(n) <= EXP_LIMIT:
                return s * power_of_two(np.float64(ref - n)), np.float64(n) * INV_LOG2E
        high = key_value(ZERO, chunk_max(like, address, stride, size, skip, spare))
        if high == -np.inf:
            return empty_sum(like, address, stride, size, skip)
        if not high < np.inf:
            return np.nan, np.inf
        ref = exponent_32(high)
        if abs(ref) <= EXP_LIMIT:
            s, n = chunk_terms(like, address, stride, size, skip, ref, lanes, spare)
            return s, np.float64(n) * INV_LOG2E
        return chunk_terms_shifted(like, address, stride, size, skip, high, lanes, spare), np.float64(high)

    return chunk_sum_32


@inner
def head_max(like, address, stride, size, skip, spare):
    """The largest of the first HEAD logits of a chunk but for the one at `skip`; anything if one is NaN."""
    always_inline()
    if size < HEAD or 0 <= skip < HEAD or stride != item_size(like):
        return key_value(ZERO, chunk_max(like, address, stride, min(HEAD, size), skip, spare))
    return tile_max(like, address, HEAD)
