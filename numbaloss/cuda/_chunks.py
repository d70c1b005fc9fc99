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
    LOG2E,
    ONE,
    ZERO,
    clipped_term_32,
    exponent_32,
    f32,
    frame_32,
    power_32,
    power_of_two,
)
from .._typed import compute_zero, item_size, key_value, number, row_frame, shifted_frame, term, widen
from .._vector import most_bits_of
from ._launch import cuda, device
from ._memory import (
    await_oldest,
    butterfly,
    copy_ahead,
    copy_ahead_part,
    end_of_round,
    first_lanes,
    fold_loads,
    halves,
    hide,
    hide_first,
    hide_from,
    join,
    larger_of_pair,
    largest_key,
    load,
    load_part,
    load_ring,
    load_ring_above,
    load_vector,
    pair_above,
    zeros,
)

WARP = np.int32(32)
CLIP_LIMIT = f32(256)  # up to here 16-bit logits lie at most 1 apart
MARGIN = f32(40)  # a chunk's largest exponent may lie this much below that of the warp's chunk before it
NO_GUESS = f32(np.nan)


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
    """The butterfly over the 32 * team lanes of a team: between loads, then between threads, then within a load, whose
    items lie in different threads by then."""
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
def load_step(like, base, stride, p, begin, end, skip, team):
    """This thread's logits among 32 * team positions from p on; -inf outside of [begin, end) and at `skip`."""
    position = np.int32(p + (cuda.laneid & (team - 1)) * (16 // item_size(like)))
    at = base + position * stride
    if stride == item_size(like) and p >= begin and end - p >= 32 * team:
        v = load_vector(like, at, team)
    else:
        v = load_part(like, at, stride, position, begin, end, team)
    return hide(like, v, np.int32(skip - position), team) if 0 <= skip - p < 32 * team else v


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
def team_largest(v, team):
    """The largest item of a team's Vectors; where one is NaN, that or another."""
    a, b = halves(v)
    a2, b2 = halves(at_least(a, b))
    a3, b3 = halves(at_least(a2, b2))
    a4, b4 = halves(at_least(a3, b3))
    a5, b5 = halves(at_least(a4, b4))
    best = at_least(a5, b5)
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


@device
def ring_step(like, where, p, begin, end, skip):
    """As load_step for a warp, of logits side by side that have been copied to this thread's places in a ring."""
    position = np.int32(p + cuda.laneid * (16 // item_size(like)))
    v = load_ring(like, where)
    if p < begin:
        v = hide_first(like, v, np.int32(begin - position))
    if end - p < LANES:
        v = hide_from(like, v, np.int32(end - position), WARP)
    return hide(like, v, np.int32(skip - position), WARP) if 0 <= skip - p < LANES else v


@device
def round_sum(like, address, stride, size, skip, team):
    """(s, c) as by chunk_sum of up to 32 * team logits, those before a 16-byte boundary counting: a row that a team
    reads at once. The teams of a warp have rows of their own, or none (0 logits), but call this together."""
    base, begin = first_position(like, address, stride)
    end, skip = np.int32(begin + size), skip_position(skip, size, begin)
    x = load_step(like, base, stride, np.int32(0), begin, end, skip, team)
    m, low, shift, c = row_frame(team_largest(x, team))
    if shift == compute_zero(like):
        total = term(x, low, m, zeros(like))[0]
    else:
        total = term(x - shift, low, m, zeros(like))[0]
    return fold_lanes(like, total, team), c


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
            total, top = add_step(load_vector(like, at, WARP), low, m, total, top)
            p = np.int32(p + LANES)
            at += LANES * stride
        if p < min(end, np.int32(CHUNK)):
            if p < begin and p < whole and p != apart:
                x = hide_first(like, load_vector(like, at, WARP), begin if cuda.laneid == 0 else np.int32(0))
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
    top = warp_max(top)
    return fold_lanes(like, total, WARP), bits_float(np.int32(top)) - m


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
        total = fma(term(v, low, m, zero)[0], v, total)
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


# -- chunks in a stream --------------------------------------------------------------------------------------------


@device
def round_bytes(like):
    return np.int32(LANES * item_size(like))


@device
def rounds_in(like, capacity):
    """Of a ring of so many bytes; float64 may have less than one there, and is not copied ahead then."""
    return np.int32(capacity) // round_bytes(like)


@device
def copy_round(like, where, task, at, left, size, room):
    """Start to copy the next round of the tasks of sum_stream: `left` bytes of this task, from `at` on (this thread's
    first load), have not been asked for. Gives (task, at, left) for the round after it."""
    if left >= round_bytes(like):
        copy_ahead(like, where, at)
    else:
        if left <= 0:
            task = np.int32(task + 1)
            while task < size and float_bits(room[0, task]) == 0:
                task = np.int32(task + 1)
            if task < size:
                base, begin = first_position(like, float_bits(room[0, task]), item_size(like))
                at = base + cuda.laneid * 16
                left = np.int32(min(begin + float_bits(room[2, task]), np.int64(CHUNK)) * item_size(like))
        if task < size:
            copy_ahead_part(like, where, at, np.int32(left - cuda.laneid * 16))
    end_of_round()
    return task, at + round_bytes(like), np.int32(left - round_bytes(like))


@device
def next_round(like, where, ring, capacity):
    """This thread's places for the round after that at `where`, in a ring that begins at `ring` for it."""
    where = np.int32(where + round_bytes(like))
    return where if where < np.int32(ring + capacity) else ring


def clip_of(like, low):
    """What add_round needs of `low`: for 16 bits a pair of logits (see pair_above), 0 where these lie far apart."""
    if isinstance(like, np.float32):
        return np.int32(1)
    return pair_above(like, low) if abs(low) <= CLIP_LIMIT else np.int32(0)


@overload(clip_of)
def _clip_of(like, low):
    if like == types.float32:
        return lambda like, low: np.int32(1)
    return lambda like, low: pair_above(like, low) if abs(low) <= CLIP_LIMIT else np.int32(0)


def add_round(like, where, clip, low, m, total, top):
    """As add_step, of a round in the ring. Of 16-bit logits `top` is a pair: two are compared at once."""
    if isinstance(like, np.float32):
        return add_step(load_ring(like, where), low, m, total, top)
    x, top = load_ring_above(like, where, clip, top)
    return clipped_term_32(x, m, total)[0], top


@overload(add_round)
def _add_round(like, where, clip, low, m, total, top):
    if like == types.float32:
        return lambda like, where, clip, low, m, total, top: add_step(load_ring(like, where), low, m, total, top)

    def add(like, where, clip, low, m, total, top):
        x, top = load_ring_above(like, where, clip, top)
        return clipped_term_32(x, m, total)[0], np.int32(top)

    return add


def no_top(like):
    """What add_round begins with."""
    return np.int32(0) if isinstance(like, np.float32) else pair_above(like, -INF)


@overload(no_top)
def _no_top(like):
    return (lambda like: np.int32(0)) if like == types.float32 else (lambda like: pair_above(like, -INF))


def exponent_word(like, top, low, m):
    """The bits that add_step would give for the `top` of add_round."""
    return top if isinstance(like, np.float32) else float_bits(fma(at_least(larger_of_pair(like, top), low), LOG2E, m))


@overload(exponent_word)
def _exponent_word(like, top, low, m):
    if like == types.float32:
        return lambda like, top, low, m: top
    return lambda like, top, low, m: float_bits(fma(at_least(larger_of_pair(like, top), low), LOG2E, m))


@device
def late_logit(like, address, end, begin, skip):
    """What the first threads of a warp have in the ninth round of an unaligned chunk: one logit each, at most seven."""
    x, position = -INF, np.int32(CHUNK + cuda.laneid)
    if position < end and position != skip:
        x = widen(load(like, address + (position - begin) * item_size(like)))
    return x


@device
def add_late(like, late, low, m, total):
    """The logits of late_logit added to their lanes, which are the first thread's first; and their exponent words."""
    p, power, t = power_32(late, low, m, ONE)
    power = first_lanes(power)
    low_half, high_half = halves(total)
    first, second = halves(low_half)
    first = fma(first_lanes(p), select(cuda.laneid == 0, power, power - power), first)
    return join(join(first, second), high_half), t


@device
def sum_apart(like, stride, size, room, ring, capacity):
    """sum_chunks of what is not copied ahead, or was not summed so: the chunks with any classes."""
    guess = NO_GUESS
    for i in range(size):
        address, skip, classes = float_bits(room[0, i]), float_bits(room[1, i]), np.int32(float_bits(room[2, i]))
        if classes > 0:
            s, c = 0.0, -np.inf
            if address != 0:
                s, c = chunk_sum(like, address, stride, classes, skip, guess)
                guess = guess_after(c)
            put_sum(room, i, s, c)


@device
def sum_stream(like, stride, size, room, ring, capacity):
    """sum_chunks of chunks whose rounds are copied to the ring ahead of time, also those of chunks to come: loads never
    wait for a sum. One that its guess does not fit is summed again from memory."""
    task, at, left, where = np.int32(-1), np.int64(0), np.int32(0), ring
    for _ in range(rounds_in(like, capacity)):
        task, at, left = copy_round(like, where, task, at, left, size, room)
        where = next_round(like, where, ring, capacity)
    for i in range(size):
        address, classes = float_bits(room[0, i]), np.int32(float_bits(room[2, i]))
        if address != 0:
            begin = first_position(like, address, stride)[1]
            end, skip = np.int32(begin + classes), skip_position(float_bits(room[1, i]), classes, begin)
            late = late_logit(like, address, end, begin, skip)
            ref = NO_GUESS
            if i > 0 and float_bits(room[2, i - 1]) == 0:
                ref = guess_after(room[1, i - 1])
            if ref != ref:
                await_oldest(like, capacity)
                head = ring_step(like, where, np.int32(0), begin, end, skip)
                ref = exponent_32(team_largest(head, WARP))
            m, low = frame_32(ref, BIAS)
            clip, best = clip_of(like, low), no_top(like)
            total, top, p = zeros(like), np.int32(0), np.int32(0)
            whole = np.int32(end & -LANES) if clip != 0 else np.int32(0)
            apart = np.int32(skip & -LANES) if skip >= 0 else whole
            while p < min(end, np.int32(CHUNK)):
                stop = min(whole, apart) if p <= apart else whole
                if p < begin:
                    stop = np.int32(0)
                while p < stop:
                    await_oldest(like, capacity)
                    total, best = add_round(like, where, clip, low, m, total, best)
                    task, at, left = copy_round(like, where, task, at, left, size, room)
                    where, p = next_round(like, where, ring, capacity), np.int32(p + LANES)
                if p < min(end, np.int32(CHUNK)):
                    await_oldest(like, capacity)
                    x = ring_step(like, where, p, begin, end, skip)
                    total, top = add_step(x, low, m, total, top)
                    task, at, left = copy_round(like, where, task, at, left, size, room)
                    where, p = next_round(like, where, ring, capacity), np.int32(p + LANES)
            if end > CHUNK:
                total, t = add_late(like, late, low, m, total)
                top = max(top, float_bits(t))
            top = max(top, exponent_word(like, best, low, m))
            s, n = fold_lanes(like, total, WARP), bits_float(np.int32(warp_max(top))) - m
            if 0 <= n - ref <= HEADROOM and abs(n) <= EXP_LIMIT and abs(ref) <= EXP_LIMIT:
                put_sum(room, i, s * power_of_two(np.float64(ref - n)), np.float64(n) * INV_LOG2E)
        cuda.syncwarp()
    sum_apart(like, stride, size, room, ring, capacity)


@device
def put_sum(room, i, s, c):
    """room[:3, i] = (s, c, no classes), after all threads have read what was there."""
    cuda.syncwarp()
    if cuda.laneid == 0:
        room[0, i], room[1, i], room[2, i] = s, c, 0.0


def sum_chunks(like, stride, size, room, ring, capacity):
    """room[:2, i] = chunk_sum of the chunk room[:3, i] = (address, skip, classes) for i < size, by one warp; an address
    of 0 is no chunk. `stride` is an int32 where classes lie side by side."""
    ahead = isinstance(stride, np.int32) and not isinstance(like, float)
    return (sum_stream if ahead else sum_apart)(like, int(stride), size, room, ring, capacity)


@overload(sum_chunks)
def _sum_chunks(like, stride, size, room, ring, capacity):
    if like != types.float64 and stride == types.int32:
        return lambda like, stride, size, room, ring, capacity: sum_stream(
            like, np.int64(item_size(like)), size, room, ring, capacity
        )
    if stride == types.int32:
        return lambda like, stride, size, room, ring, capacity: sum_apart(
            like, np.int64(item_size(like)), size, room, ring, capacity
        )
    return lambda like, stride, size, room, ring, capacity: sum_apart(like, stride, size, room, ring, capacity)


@device
def thread_largest(v):
    """The largest item of a Vector; where one is NaN, that or another."""
    a, b = halves(v)
    a2, b2 = halves(at_least(a, b))
    a3, b3 = halves(at_least(a2, b2))
    a4, b4 = halves(at_least(a3, b3))
    a5, b5 = halves(at_least(a4, b4))
    return at_least(a5, b5)
