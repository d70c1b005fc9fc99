"""Sums of exponentials over a chunk of logits, by a warp.

The 1024 lanes of a chunk are 32 a thread, a Vector (see _memory), so that eight rounds of the warp read a chunk. One
that begins between two 16-byte boundaries is read from the boundary before it: lanes then are rotated, which the
butterfly does not notice. Definitions are in docs/NUMERICS.md.
"""

import numpy as np
from numba import types
from numba.extending import overload

from .._intrinsics import at_least, bits_float, float_bits, fma, ordered_bits, select
from .._scalar import (
    BIAS,
    CHUNK,
    EXP_LIMIT,
    HEADROOM,
    INF,
    INV_LOG2E,
    LANES,
    ONE,
    ZERO,
    clipped_power_32,
    exponent_32,
    f32,
    frame_32,
    power_of_two,
)
from .._typed import compute_zero, item_size, key_value, number, row_frame, shifted_frame, term, widen
from .._vector import most_bits_of
from ._launch import cuda, device
from ._memory import (
    butterfly,
    count_larger,
    fold_loads,
    halves,
    hide,
    hide_first,
    join,
    larger_of_pair,
    larger_pair,
    largest_key,
    largest_pair,
    load,
    load_part,
    load_vector,
    pair_above,
    pairs_above,
    warp_largest,
    widened,
    zeros,
)

WARP = np.int32(32)
ALL = 0xFFFFFFFF  # threads of a warp
MARGIN = f32(40)  # a chunk's largest exponent may lie this much below that of the warp's chunk before it
NO_GUESS = f32(np.nan)
CLIP_LIMIT = f32(256)  # up to here 16-bit logits lie at most 1 apart


@device
def warp_max(x):
    for mask in (16, 8, 4, 2, 1):
        x = max(x, butterfly(x, mask))
    return x


@device
def warp_sum(x):
    for mask in (16, 8, 4, 2, 1):
        x += butterfly(x, mask)
    return x


@device
def exchange(v, mask):
    """One level of the butterfly: of two threads, one takes the lower halves of both vectors, the other the upper."""
    upper = (cuda.laneid & mask) != 0
    low, high = halves(v)
    return select(upper, high, low) + butterfly(select(upper, low, high), mask)


@device
def fold_lanes(like, v, team):
    """The butterfly over the 32 * team lanes of a team, or what is left of it after levels between loads: the others
    of those, then between threads, then within a load, whose items lie in different threads by then."""
    v1 = fold_loads(like, v)
    v2 = exchange(v1, team >> 1)
    v3 = exchange(v2, team >> 2)
    total = exchange(v3, team >> 3)
    for shift in (4, 5):
        other = butterfly(total, team >> shift)
        total = total + select(team >> shift != 0, other, compute_zero(like))
    total = total + butterfly(total, team >> 1)
    if item_size(like) <= 4:
        total = total + butterfly(total, team >> 2)
    if item_size(like) == 2:
        total = total + butterfly(total, team >> 3)
    return np.float64(total)


@device
def first_position(like, address, stride):
    """(address, position) where the reading of a chunk starts: at 16 bytes, at most one load before the chunk."""
    begin = np.int32((address & 15) // item_size(like)) if stride == item_size(like) else np.int32(0)
    return address - begin * item_size(like), begin


@device
def loads_step(like, base, stride, p, begin, end, skip, team):
    """This thread's Loads among 32 * team positions from p on; -inf outside of [begin, end) and at `skip`."""
    position = np.int32(p + (cuda.laneid & (team - 1)) * (16 // item_size(like)))
    at = base + position * stride
    if stride == item_size(like) and p >= begin and end - p >= 32 * team:
        v = load_vector(like, at, team)
    else:
        v = load_part(like, at, stride, position, begin, end, team)
    return hide(like, v, np.int32(skip - position), team) if 0 <= skip - p < 32 * team else v


@device
def load_step(like, base, stride, p, begin, end, skip, team):
    """The logits of loads_step."""
    return widened(like, loads_step(like, base, stride, p, begin, end, skip, team))


@device
def skip_position(skip, size, begin):
    return np.int32(skip + begin) if 0 <= skip < size else np.int32(-1)


@device
def chunk_max(like, address, stride, size, skip):
    """The largest key (ordered_bits) of `size` logits but for the one at `skip`; that of a positive NaN is larger."""
    base, begin = first_position(like, address, stride)
    end, skip = np.int32(begin + size), skip_position(skip, size, begin)
    best = np.int64(ordered_bits(number(like, -np.inf)))
    for p in range(np.int32(0), end, np.int32(LANES)):
        best = max(best, largest_key(load_step(like, base, stride, p, begin, end, skip, WARP)))
    return warp_max(best)


@device
def thread_largest(v):
    """The largest item of a Vector; where one is NaN, that or another."""
    a, b = halves(v)
    a2, b2 = halves(at_least(a, b))
    a3, b3 = halves(at_least(a2, b2))
    a4, b4 = halves(at_least(a3, b3))
    a5, b5 = halves(at_least(a4, b4))
    return at_least(a5, b5)


@device
def team_largest(v, team):
    """The largest item of a team's Vectors; where one is NaN, that or another."""
    best = thread_largest(v)
    for shift in (1, 2, 3, 4, 5):
        best = at_least(butterfly(best, team >> shift), best)  # with itself where nothing is left of the team
    return best


@device
def head_max(like, address, stride, size, skip):
    """The largest of the first LANES logits of a chunk but for the one at `skip`; anything if one is NaN."""
    base, begin = first_position(like, address, stride)
    end, skip = np.int32(begin + size), skip_position(skip, size, begin)
    return team_largest(load_step(like, base, stride, np.int32(0), begin, end, skip, WARP), WARP)


@device
def add_step(x, low, m, total, top):
    """Add logits to lanes; the larger of `top` and the bits of their exponent words."""
    total, t = term(x, low, m, total)
    return total, max(top, float_bits(most_bits_of(t)))


def thread_high(like, v):
    """thread_largest of Loads."""
    return high_16(like, v) if like.itemsize == 2 else thread_largest(v)


@overload(thread_high)
def _thread_high(like, v):
    if like.bitwidth == 16:
        return lambda like, v: high_16(like, v)
    return lambda like, v: thread_largest(v)


@device
def high_16(like, v):
    return larger_of_pair(like, largest_pair(like, v, pair_above(like, -INF)))


def largest_of(like, v, team):
    """team_largest of Loads."""
    return largest_16(like, v, team) if like.itemsize == 2 else team_largest(v, team)


@overload(largest_of)
def _largest_of(like, v, team):
    if like.bitwidth == 16:
        return lambda like, v, team: largest_16(like, v, team)
    return lambda like, v, team: team_largest(v, team)


@device
def largest_16(like, v, team):
    top = largest_pair(like, v, pair_above(like, -INF))
    for shift in (1, 2, 3, 4, 5):
        top = larger_pair(like, butterfly(top, team >> shift), top)
    return larger_of_pair(like, top)


def clip_of(like, low):
    """What pairs_above is to take for `low`: 0 where 16-bit logits lie far apart there, 1 for wider logits."""
    if like.itemsize > 2:
        return np.int32(1)
    return pair_above(like, low) if abs(low) <= CLIP_LIMIT else np.int32(0)


@overload(clip_of)
def _clip_of(like, low):
    if like.bitwidth > 16:
        return lambda like, low: np.int32(1)
    return lambda like, low: pair_above(like, low) if abs(low) <= CLIP_LIMIT else np.int32(0)


def clipped(like, v, clip, low):
    """The logits of Loads, none below `low`; by clip_of."""
    return widened(like, pairs_above(like, v, clip)) if like.itemsize == 2 else at_least(v, low)


@overload(clipped)
def _clipped(like, v, clip, low):
    if like.bitwidth == 16:
        return lambda like, v, clip, low: widened(like, pairs_above(like, v, clip))
    return lambda like, v, clip, low: at_least(v, low)


def first_terms(like, v, low, clip, m):
    """The terms of Loads after the butterfly's first level. A product with a power of two is exact (where it matters),
    so that a multiply-add takes the product and the sum in one."""
    if isinstance(like, float):
        return add_halves(term(v, low, m, zeros(like))[0])
    return first_products(clipped_power_32(clipped(like, v, clip, low), m, ONE))


@overload(first_terms)
def _first_terms(like, v, low, clip, m):
    if like == types.float64:
        return lambda like, v, low, clip, m: add_halves(term(v, low, m, zeros(like))[0])
    return lambda like, v, low, clip, m: first_products(clipped_power_32(clipped(like, v, clip, low), m, ONE))


@device
def add_halves(v):
    first, second = halves(v)
    return first + second


@device
def first_products(powers):
    (p1, p2), (power1, power2) = halves(powers[0]), halves(powers[1])
    return fma(p2, power2, p1 * power1)


@device
def round_sum(like, address, stride, size, skip, team):
    """(s, largest) of a row that a team reads at once, up to 32 * team logits with those before a 16-byte boundary: its
    chunk_sum is (s, row_frame(largest)[3]). The teams of a warp have rows of their own, or none (0 logits), but call
    this together."""
    base, begin = first_position(like, address, stride)
    end, skip = np.int32(begin + size), skip_position(skip, size, begin)
    v = loads_step(like, base, stride, np.int32(0), begin, end, skip, team)
    largest = largest_of(like, v, team)
    m, low, shift, _ = row_frame(largest)
    clip = clip_of(like, low)
    if shift == compute_zero(like) and clip != 0:
        total = first_terms(like, v, low, clip, m)
    else:
        total = add_halves(term(widened(like, v) - shift, low, m, zeros(like))[0])
    return fold_lanes(like, total, team), largest


@device
def chunk_terms(like, address, stride, size, skip, ref):
    """The sum of 2^(x * LOG2E - ref) over a chunk but for `skip`, and the chunk's largest exponent.

    A round is 1024 positions. The inner loop takes those that are whole; others are the first of an unaligned chunk,
    the last, and the one that holds `skip`. Of a ninth round an unaligned chunk has eight lanes at most.
    """
    base, begin = first_position(like, address, stride)
    end, skip = np.int32(begin + size), skip_position(skip, size, begin)
    m, low = frame_32(ref, BIAS)
    total, top, p = zeros(like), np.int32(0), np.int32(0)
    whole = np.int32(end & -LANES) if stride == item_size(like) else np.int32(0)
    apart = np.int32(skip & -LANES) if skip >= 0 else whole
    while p < min(end, np.int32(CHUNK)):
        stop = min(whole, apart) if p <= apart else whole
        if p < begin:
            stop = np.int32(0)
        at = base + np.int32(p + cuda.laneid * (16 // item_size(like))) * stride
        while p < stop:
            total, top = add_step(widened(like, load_vector(like, at, WARP)), low, m, total, top)
            p = np.int32(p + LANES)
            at += LANES * stride
        if p < min(end, np.int32(CHUNK)):
            if p < begin and p < whole and p != apart:
                v = hide_first(like, load_vector(like, at, WARP), begin if cuda.laneid == 0 else np.int32(0))
                x = widened(like, v)
            else:
                x = load_step(like, base, stride, p, begin, end, skip, WARP)
            total, top = add_step(x, low, m, total, top)
            p = np.int32(p + LANES)
    if end > CHUNK:
        low_half, high_half = halves(total)
        first, second = halves(low_half)
        x = load_step(like, base, stride, p, begin, end, skip, WARP)
        first, top = add_step(halves(halves(x)[0])[0], low, m, first, top)
        total = join(join(first, second), high_half)
    return fold_lanes(like, total, WARP), bits_float(warp_largest(np.int32(top))) - m


@device
def chunk_terms_shifted(like, address, stride, size, skip, shift):
    """The sum of exp(x - shift) over a chunk but for `skip`: every float64 chunk, and float32 ones beyond 2^20."""
    base, begin = first_position(like, address, stride)
    end, skip = np.int32(begin + size), skip_position(skip, size, begin)
    m, low = shifted_frame(compute_zero(like))
    total = zeros(like)
    for p in range(np.int32(0), end, np.int32(LANES)):
        total = term(load_step(like, base, stride, p, begin, end, skip, WARP) - shift, low, m, total)[0]
    return fold_lanes(like, total, WARP)


@device
def chunk_moment(like, address, stride, size, skip, shift):
    """The sum of exp(x - shift) * (x - shift) over a chunk but for `skip`."""
    base, begin = first_position(like, address, stride)
    end, skip = np.int32(begin + size), skip_position(skip, size, begin)
    zero = compute_zero(like)
    m, low = shifted_frame(zero)
    total = zeros(like)
    for p in range(np.int32(0), end, np.int32(LANES)):
        v = at_least(load_step(like, base, stride, p, begin, end, skip, WARP) - shift, low)
        (v1, v2), (total_1, total_2) = halves(v), halves(total)  # terms of all would not fit the registers
        total_1 = fma(term(v1, low, m, zero)[0], v1, total_1)
        total = join(total_1, fma(term(v2, low, m, zero)[0], v2, total_2))
    return fold_lanes(like, total, WARP)


@device
def empty_sum(like, address, stride, size, skip):
    """What chunk_sum gives for a chunk of -inf; a negative NaN, which is no maximum, may hide in it."""
    nan = np.int64(0)
    for i in range(np.int64(cuda.laneid), size, 32):
        x = widen(load(like, address + i * stride))
        if x != x and i != skip:
            nan = np.int64(1)
    return (np.nan, np.inf) if warp_max(nan) else (0.0, -np.inf)


@device
def chunk_sum_64(like, address, stride, size, skip, guess):
    """As chunk_sum for float64."""
    key = chunk_max(like, address, stride, size, skip)
    if key >= ordered_bits(np.inf):
        return np.nan, np.inf
    if key <= ordered_bits(-np.inf):
        return empty_sum(like, address, stride, size, skip)
    high = key_value(0.0, key)
    return chunk_terms_shifted(like, address, stride, size, skip, high), high


@device
def chunk_sum_32(like, address, stride, size, skip, guess):
    """(s, c) with s * e^c the sum of exp(x) over a chunk but for `skip`; c lies within 1 of the largest x that counts.

    The first reference exponent is `guess`, or, if that is NaN, the exponent of the chunk's first classes; if it is
    above all that follow, or one is too large for it, the sum is taken again from the exact maximum. s has the same
    bits in each case.
    """
    ref = guess if guess == guess else exponent_32(head_max(like, address, stride, size, skip))
    exact, high = False, -INF
    while True:  # twice at most
        if abs(ref) <= EXP_LIMIT:
            s, n = chunk_terms(like, address, stride, size, skip, ref)
            if exact or (0 <= n - ref <= HEADROOM and abs(n) <= EXP_LIMIT):
                return s * power_of_two(np.float64(ref - n)), np.float64(n) * INV_LOG2E
        if exact:
            return chunk_terms_shifted(like, address, stride, size, skip, high), np.float64(high)
        high = key_value(ZERO, chunk_max(like, address, stride, size, skip))
        if high == -INF:
            return empty_sum(like, address, stride, size, skip)
        if not high < INF:
            return np.nan, np.inf
        ref, exact = exponent_32(high), True


def chunk_sum(like, address, stride, size, skip, guess):
    """chunk_sum_32, or chunk_sum_64 for float64 logits."""
    function = chunk_sum_64 if isinstance(like, float) else chunk_sum_32
    return function(like, address, stride, size, skip, guess)


@overload(chunk_sum)
def _chunk_sum(like, address, stride, size, skip, guess):
    if like == types.float64:
        return lambda like, address, stride, size, skip, guess: chunk_sum_64(like, address, stride, size, skip, guess)
    return lambda like, address, stride, size, skip, guess: chunk_sum_32(like, address, stride, size, skip, guess)


@device
def guess_after(c):
    """The reference exponent to try after a chunk whose sum is of e^c."""
    return exponent_32(f32(c)) - MARGIN


@device
def chunk_rank(like, address, stride, size, x):
    """The number of logits of a chunk that are larger than x."""
    base, begin = first_position(like, address, stride)
    end, larger = np.int32(begin + size), np.int64(0)
    for p in range(np.int32(0), end, np.int32(LANES)):
        larger += count_larger(load_step(like, base, stride, p, begin, end, np.int32(-1), WARP), x)
    return warp_sum(larger)
