"""Sums of exponentials over chunks and rows of logits, a warp for a chunk and a team of warps for a row.

`rows` is as in cpu/_chunks.py; `room`, (3, PARTS) float64 in shared memory, is where the warps of a team exchange
numbers. The 1024 lanes of a chunk are 32 a thread, two Vectors (see _memory), so that eight rounds of the warp read a
chunk. A row that begins between two 16-byte boundaries is read from the boundary before it: lanes then are rotated,
which the butterfly does not notice. Definitions are in docs/NUMERICS.md.
"""

import numpy as np
from numba import types
from numba.extending import overload

from .._scalar import (
    BIAS,
    CHUNK,
    EXP_LIMIT,
    HEADROOM,
    INF,
    INV_LOG2E,
    LANES,
    ZERO,
    at_least,
    bits_float,
    exp_64,
    exponent_32,
    f32,
    float_bits,
    fma,
    frame_32,
    merge_moments,
    ordered_bits,
    power_of_two,
    select,
)
from .._typed import as_result, compute_zero, item_size, key_value, minus_inf, shifted_frame, term, widen
from .._vector import largest, most_bits_of, splat
from ._launch import cuda, device
from ._memory import (
    butterfly,
    count_larger,
    fold_loads,
    halves,
    hide_first,
    join,
    largest_key,
    load,
    load_part,
    load_vector,
)

STEP = 512  # classes in the Vectors of a warp
PARTS = 256  # chunks that a team joins at a time
TEAMS = 4  # warps of a block, each with a row of its own where a row is one chunk
ALL = 0xFFFFFFFF
MARGIN = f32(40)  # a chunk's largest exponent may lie this much below that of the warp's chunk before it
NO_GUESS = f32(np.nan)


@device
def team_of(classes):
    """(number of this thread's team, its warp in the team, warps of the team): a row of one chunk has a warp, others a
    block."""
    warp = np.int64(cuda.threadIdx.x >> 5)
    if classes <= CHUNK:
        return np.int64(cuda.blockIdx.x) * TEAMS + warp, np.int64(0), np.int64(1)
    return np.int64(cuda.blockIdx.x), warp, np.int64(cuda.blockDim.x >> 5)


# -- one warp ----------------------------------------------------------------------------------------------------


@device
def warp_max(x):
    for mask in (16, 8, 4, 2, 1):
        x = max(x, butterfly(x, mask))
    return x


@device
def exchange(v, mask):
    """One level of the butterfly: of two threads, one takes the lower halves of both vectors, the other the upper."""
    upper = (cuda.laneid & mask) != 0
    low, high = halves(v)
    return select(upper, high, low) + butterfly(select(upper, low, high), mask)


@device
def fold_lanes(like, a, b):
    """The butterfly over 1024 lanes: h = 512 and others between loads, then between threads, then within a load, whose
    items lie in different threads by then."""
    v = fold_loads(like, a + b)
    v2 = exchange(v, 16)
    v3 = exchange(v2, 8)
    v4 = exchange(v3, 4)
    v5 = exchange(v4, 2)
    total = exchange(v5, 1)
    mask = 16
    while mask >= 2 * item_size(like):
        total = total + butterfly(total, mask)
        mask >>= 1
    return np.float64(total)


@device
def first_position(like, address, stride):
    """(address, position) where the reading of a chunk starts: at 16 bytes, at most one load before the chunk."""
    begin = np.int32((address & 15) // item_size(like)) if stride == item_size(like) else np.int32(0)
    return address - begin * item_size(like), begin


@device
def load_step(like, base, stride, p, begin, end, skip):
    """This thread's logits among STEP positions from p on; -inf outside of [begin, end) and at `skip`."""
    position = np.int32(p + cuda.laneid * (16 // item_size(like)))
    at = base + position * stride
    if stride == item_size(like) and p >= begin and end - p >= STEP and not 0 <= skip - p < STEP:
        return load_vector(like, at)
    return load_part(like, at, stride, position, begin, end, skip)


@device
def skip_position(skip, size, begin):
    return np.int32(skip + begin) if 0 <= skip < size else np.int32(-1)


@device
def chunk_max(like, address, stride, size, skip):
    """The largest key (ordered_bits) of `size` logits but for the one at `skip`; that of a positive NaN is larger."""
    base, begin = first_position(like, address, stride)
    end, skip = np.int32(begin + size), skip_position(skip, size, begin)
    best = np.int64(ordered_bits(minus_inf(like)))
    for p in range(np.int32(0), end, np.int32(STEP)):
        best = max(best, largest_key(load_step(like, base, stride, p, begin, end, skip)))
    return warp_max(best)


@device
def head_max(like, address, stride, size, skip):
    """The largest of the first STEP logits of a chunk but for the one at `skip`; anything if one is NaN."""
    base, begin = first_position(like, address, stride)
    x = load_step(like, base, stride, np.int32(0), begin, np.int32(begin + size), skip_position(skip, size, begin))
    best = largest(x)
    for mask in (16, 8, 4, 2, 1):
        best = at_least(butterfly(best, mask), best)
    return best


@device
def add_step(x, low, m, total, top):
    """Add 16 logits to 16 lanes; the larger of `top` and the bits of their exponent words."""
    total, t = term(x, low, m, total)
    return total, max(top, float_bits(most_bits_of(t)))


@device
def chunk_terms(like, address, stride, size, skip, ref):
    """The sum of 2^(x * LOG2E - ref) over a chunk but for `skip`, and the chunk's largest exponent.

    A round is 1024 positions. The inner loop takes those that are whole; others are the first of an unaligned chunk,
    the last, and the one that holds `skip`. Of a ninth round an unaligned chunk has eight lanes at most.
    """
    base, begin = first_position(like, address, stride)
    end, skip = np.int32(begin + size), skip_position(skip, size, begin)
    m, low = frame_32(ref, BIAS)
    a, b, top = splat(ZERO), splat(ZERO), np.int32(0)
    position = np.int32(cuda.laneid * (16 // item_size(like)))
    at, step = base + position * stride, STEP * stride
    whole = np.int32(end & -LANES) if stride == item_size(like) else np.int32(0)
    apart = np.int32(skip & -LANES) if skip >= 0 else whole
    p = np.int32(0)
    while p < min(end, np.int32(CHUNK)):
        stop = min(whole, apart) if p <= apart else whole
        if p < begin:
            stop = np.int32(0)
        while p < stop:
            x, y = load_vector(like, at), load_vector(like, at + step)
            a, top = add_step(x, low, m, a, top)
            b, top = add_step(y, low, m, b, top)
            p = np.int32(p + LANES)
            at += 2 * step
        if p < min(end, np.int32(CHUNK)):
            if p < begin and p < whole and p != apart:
                x, y = load_vector(like, at), load_vector(like, at + step)
                x = hide_first(like, x, begin if cuda.laneid == 0 else np.int32(0))
            else:
                x = load_part(like, at, stride, np.int32(p + position), begin, end, skip)
                y = load_part(like, at + step, stride, np.int32(p + STEP + position), begin, end, skip)
            a, top = add_step(x, low, m, a, top)
            b, top = add_step(y, low, m, b, top)
            p = np.int32(p + LANES)
            at += 2 * step
    if end > CHUNK:
        few, others = halves(a)
        x = halves(load_part(like, at, stride, np.int32(p + position), begin, end, skip))[0]
        few, top = add_step(x, low, m, few, top)
        a = join(few, others)
    top = warp_max(top)
    return fold_lanes(like, a, b), bits_float(np.int32(top)) - m


@device
def chunk_terms_shifted(like, address, stride, size, skip, shift):
    """The sum of exp(x - shift) over a chunk but for `skip`: every float64 chunk, and float32 ones beyond 2^20."""
    base, begin = first_position(like, address, stride)
    end, skip = np.int32(begin + size), skip_position(skip, size, begin)
    zero = compute_zero(like)
    m, low = shifted_frame(zero)
    a, b = splat(zero), splat(zero)
    for p in range(np.int32(0), end, np.int32(STEP)):  # a and b take turns; which is which does not matter to their sum
        a, b = b, term(load_step(like, base, stride, p, begin, end, skip) - shift, low, m, a)[0]
    return fold_lanes(like, a, b)


@device
def chunk_moment(like, address, stride, size, skip, shift):
    """The sum of exp(x - shift) * (x - shift) over a chunk but for `skip`."""
    base, begin = first_position(like, address, stride)
    end, skip = np.int32(begin + size), skip_position(skip, size, begin)
    zero = compute_zero(like)
    m, low = shifted_frame(zero)
    a, b = splat(zero), splat(zero)
    for p in range(np.int32(0), end, np.int32(STEP)):
        v = at_least(load_step(like, base, stride, p, begin, end, skip) - shift, low)
        a, b = b, fma(term(v, low, m, zero)[0], v, a)
    return fold_lanes(like, a, b)


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


# -- one row -----------------------------------------------------------------------------------------------------


def class_stride(like, rows):
    """Bytes between the classes of a row: known to the compiler where it is given as an int32."""
    return int(rows[4])


@overload(class_stride)
def _class_stride(like, rows):
    size = np.int64(like.bitwidth // 8)
    return (lambda like, rows: size) if rows[4] == types.int32 else (lambda like, rows: rows[4])


@device
def row_address(rows, r):
    address, inner, outer_stride, inner_stride, _, _ = rows
    outer = np.int64(0)
    if r >= inner:  # a division is a function call
        outer = r // inner
    return address + outer * outer_stride + (r - outer * inner) * inner_stride


@device
def join_parts(room, count, s, c):
    """(s, c) merged with the pairs room[:2, 0], room[:2, 1], ... one after the other, by one warp; overwrites them.

    The c that a pair meets is the largest before it, so 32 threads take the exponentials of 32 merges at once.
    """
    lane, first = np.int32(cuda.laneid), np.int32(0)
    while first < count:
        k = np.int32(first + lane)
        c2 = room[1, k] if k < count else -np.inf
        top = c2
        for shift in (1, 2, 4, 8, 16):
            other = cuda.shfl_up_sync(ALL, top, shift)
            top = other if lane >= shift and other > top else top
        before = cuda.shfl_up_sync(ALL, top, 1)
        before = c if lane == 0 or c > before else before
        if k < count:
            room[1, k], room[2, k] = exp_64(min(before, c2) - max(before, c2)), np.float64(before >= c2)
        c = max(c, cuda.shfl_sync(ALL, top, 31))
        first = np.int32(first + 32)
    cuda.syncwarp()
    for k in range(count):
        part, weight = room[0, k], room[1, k]
        large, small = (s, part) if room[2, k] != 0.0 else (part, s)
        s = fma(small, weight, large) if small != 0.0 else large
    return s, c


@device
def row_sum(like, rows, address, skip, guess, room):
    """(s, c) of a whole row but for the class `skip`, for every thread of its team: its chunks, left to right."""
    stride, classes = class_stride(like, rows), rows[5]
    _, warp, warps = team_of(classes)
    if warps > 1 and cuda.threadIdx.x == 0:
        room[0, 0], room[1, 0] = 0.0, -np.inf
    chunks, first = np.int32((classes + CHUNK - 1) // CHUNK), np.int32(0)
    while first < chunks:  # in rounds of PARTS - 1; the sum of those before is the first part
        k = np.int32(first + warp)
        while k < chunks and k - first < PARTS - 1:
            begin = np.int64(k) * CHUNK
            size = min(np.int64(CHUNK), classes - begin)
            s, c = chunk_sum(like, address + begin * stride, stride, size, skip - begin, guess)
            if warps == 1:
                return s, c
            if cuda.laneid == 0:
                room[0, k - first + 1], room[1, k - first + 1] = s, c
            guess = guess_after(c)
            k = np.int32(k + warps)
        cuda.syncthreads()
        if warp == 0:
            s, c = join_parts(room, min(np.int32(PARTS), np.int32(chunks - first + 1)), 0.0, -np.inf)
            cuda.syncwarp()
            if cuda.laneid == 0:
                room[0, 0], room[1, 0] = s, c
        cuda.syncthreads()
        first = np.int32(first + PARTS - 1)
    s, c = room[0, 0], room[1, 0]
    cuda.syncthreads()
    return s, c


@device
def team_max(value, classes, room):
    """The largest int64 of a team's threads."""
    value = warp_max(value)
    if classes <= CHUNK:
        return value
    _, warp, warps = team_of(classes)
    if cuda.laneid == 0:
        room[0, warp] = bits_float(value)
    cuda.syncthreads()
    for i in range(warps):
        value = max(value, float_bits(room[0, i]))
    cuda.syncthreads()
    return value


@device
def first_equal(like, rows, address, begin, value, room):
    """The first class from `begin` on whose logit is `value`, NaN being equal to NaN, or `classes` if there is none."""
    stride, classes = class_stride(like, rows), rows[5]
    _, warp, warps = team_of(classes)
    where = classes
    first, found = begin, np.int64(0)
    while first < classes and not found:
        i = first + warp * 32 + cuda.laneid
        if i < classes:
            x = widen(load(like, address + i * stride))
            if x == value or (x != x and value != value):
                where = i
        first += warps * 32
        found = team_max(np.int64(where < classes), classes, room)
    return -team_max(-where, classes, room)


@device
def row_max(like, rows, address, room):
    """(largest logit, its first class) of a row. A row with NaN: that of a positive NaN, or of the largest number."""
    stride, classes = class_stride(like, rows), rows[5]
    _, warp, warps = team_of(classes)
    best, where = np.int64(ordered_bits(minus_inf(like))), np.int64(0)
    for k in range(warp, (classes + CHUNK - 1) // CHUNK, warps):
        begin = k * CHUNK
        size = min(np.int64(CHUNK), classes - begin)
        key = chunk_max(like, address + begin * stride, stride, size, np.int64(-1))
        if key > best:
            best, where = key, begin
    key = team_max(best, classes, room)
    begin = -team_max(-(where if best == key else classes), classes, room)
    value = key_value(compute_zero(like), key)
    where = first_equal(like, rows, address, begin, value, room)
    return value, (where if where < classes else begin)


@device
def first_nan(like, rows, address, room):
    """The index of a row's first NaN, or -1."""
    where = first_equal(like, rows, address, np.int64(0), f32(np.nan), room)
    return where if where < rows[5] else np.int64(-1)


@device
def row_rank(like, rows, address, x, room):
    """The number of classes with a logit larger than x."""
    stride, classes = class_stride(like, rows), rows[5]
    _, warp, warps = team_of(classes)
    larger = np.int64(0)
    for k in range(warp, (classes + CHUNK - 1) // CHUNK, warps):
        base, begin = first_position(like, address + k * CHUNK * stride, stride)
        end = np.int32(begin + min(np.int64(CHUNK), classes - k * CHUNK))
        for p in range(np.int32(0), end, np.int32(STEP)):
            larger += count_larger(load_step(like, base, stride, p, begin, end, np.int32(-1)), x)
    for mask in (16, 8, 4, 2, 1):
        larger += butterfly(larger, mask)
    return team_sum(larger, classes, room)


@device
def team_sum(value, classes, room):
    """The sum of an int64 that the threads of each warp agree on over the warps of a team."""
    if classes <= CHUNK:
        return value
    _, warp, warps = team_of(classes)
    if cuda.laneid == 0:
        room[0, warp] = bits_float(value)
    cuda.syncthreads()
    total = np.int64(0)
    for i in range(warps):
        total += float_bits(room[0, i])
    cuda.syncthreads()
    return total


@device
def row_moments(like, rows, address, skip, room):
    """(s, c, b) of a row but for `skip`: s * e^c sums exp(x), b sums exp(x - c) * (x - c)."""
    classes = rows[5]
    _, warp, warps = team_of(classes)
    chunks = (classes + CHUNK - 1) // CHUNK
    s, c, b = 0.0, -np.inf, 0.0
    for first in range(0, chunks, PARTS):
        count = min(np.int64(PARTS), chunks - first)
        s2, c2, b2 = 0.0, -np.inf, 0.0
        for k in range(warp, count, warps):
            s2, c2, b2 = part_moments(like, rows, address, (first + k) * CHUNK, skip)
            if cuda.laneid == 0 and warps > 1:
                room[0, k], room[1, k], room[2, k] = s2, c2, b2
        if warps == 1:
            if s2 != 0.0:
                s, c, b = merge_moments(s, c, b, s2, c2, b2)
        else:
            cuda.syncthreads()
            for k in range(count):
                if room[0, k] != 0.0:
                    s, c, b = merge_moments(s, c, b, room[0, k], room[1, k], room[2, k])
            cuda.syncthreads()
    return s, c, b


@device
def part_moments(like, rows, address, begin, skip):
    """What the chunk from `begin` on adds to row_moments."""
    stride, classes = class_stride(like, rows), rows[5]
    at, size = address + begin * stride, min(np.int64(CHUNK), classes - begin)
    s, c = chunk_sum(like, at, stride, size, skip - begin, NO_GUESS)
    b = 0.0
    if s != 0.0:
        shift = as_result(like, c)  # c lies between two numbers of the row's precision: take one of them
        s, c = s * exp_64(c - np.float64(shift)), np.float64(shift)
        b = chunk_moment(like, at, stride, size, skip - begin, shift)
    return s, c, b
