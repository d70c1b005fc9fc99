"""Chunks in a stream: a warp copies the rounds of its chunks to a ring in shared memory ahead of time, also those of
chunks to come, so that no load waits for a sum. Each thread copies and reads its own bytes: there is no barrier.
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
    MAGIC,
    ONE,
    ZERO,
    clipped_term_32,
    exponent_32,
    f32,
    frame_32,
    low_bits_exponent,
    power_32,
)
from .._typed import item_size, widen
from ._chunks import (
    ALL,
    MARGIN,
    NO_GUESS,
    WARP,
    add_step,
    chunk_sum,
    clip_of,
    clipped,
    first_position,
    fold_lanes,
    guess_after,
    largest_of,
    skip_position,
    thread_high,
    warp_sum,
)
from ._launch import cuda, device
from ._memory import (
    APART,
    anew,
    await_oldest,
    copy_ahead,
    copy_ahead_part,
    count_larger,
    end_of_round,
    first_lanes,
    halves,
    hide_item,
    hide_load,
    join,
    larger_of_pair,
    largest_pair,
    load,
    load_ring,
    pair_above,
    pairs_above,
    shared_address,
    store_ring,
    warp_largest,
    widened,
    zeros,
)

UNCOUNTED = -(2.0**40)  # below 0 whatever counts are added to it


@device
def thread_ring(ring, warp, capacity):
    """This thread's first places in the ring of its warp. They come through a shuffle, or the compiler works them out
    anew in each round."""
    where = np.int32(shared_address(ring) + warp * capacity + cuda.laneid * 16)
    return np.int32(cuda.shfl_sync(ALL, where, cuda.laneid))


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
        if left > 0:
            mine = np.int32(min(left, round_bytes(like)) - cuda.laneid * 16)
            there = np.int32(anew(np.int64(where)))  # or what is made of it is made in each round
            copy_ahead_part(like, there, at, mine)
            hide_rest(like, there, mine)
            copy_rest(like, there, at, mine)
    end_of_round()
    return task, at + round_bytes(like), np.int32(left - round_bytes(like))


@device
def copy_rest(like, where, at, left):
    """What of this thread's loads is less than 16 bytes where `left` bytes, less than a round, are left: item by item,
    as an instruction that copies less reads 16 bytes for the memory checker."""
    rest = np.int32(left & (APART - 1))
    if left > 0 and rest < 16:
        k = np.int32(left - rest)
        while k < left:
            store_ring(like, np.int32(where + k), load(like, at + k))
            k = np.int32(k + item_size(like))


@device
def hide_rest(like, where, left):
    """-inf in place of this thread's loads that are not whole where `left` bytes, less than a round, are left."""
    for k in range(round_bytes(like) // APART):
        if left - APART * k < 16:
            hide_load(like, np.int32(where + APART * k))


@device
def hide_in_ring(like, where, p, begin, skip):
    """-inf for what a chunk's first load holds of its neighbour, and for the class `skip`, in the round from position p
    on that has been copied to `where`."""
    if p < begin and cuda.laneid == 0:
        count = np.int32(begin - p)
        for k in range(16 // item_size(like)):
            if np.int32(k) < count:
                hide_item(like, np.int32(where + k * item_size(like)))
    at = np.int32((skip - p) * item_size(like))
    if 0 <= at < round_bytes(like) and np.int32(at >> 4 & 31) == np.int32(cuda.laneid):
        hide_item(like, np.int32(where + (at & -APART) + (at & 15)))


@device
def next_round(like, where, ring, capacity):
    """This thread's places for the round after that at `where`, in a ring that begins at `ring` for it."""
    where = np.int32(where + round_bytes(like))
    return where if where < np.int32(ring + capacity) else ring


def add_round(like, where, clip, low, m, total, top):
    """As add_step, of a round in the ring. Of 16-bit logits `top` is a pair: two are compared at once."""
    if isinstance(like, np.float32):
        return add_step(load_ring(like, where), low, m, total, top)
    return add_round_16(like, where, clip, m, total, top)


@overload(add_round)
def _add_round(like, where, clip, low, m, total, top):
    if like == types.float32:
        return lambda like, where, clip, low, m, total, top: add_step(load_ring(like, where), low, m, total, top)
    return lambda like, where, clip, low, m, total, top: add_round_16(like, where, clip, m, total, top)


@device
def add_round_16(like, where, clip, m, total, top):
    v = pairs_above(like, load_ring(like, where), clip)
    top = largest_pair(like, v, np.int32(top))  # first, or pairs and logits are both held in registers
    return clipped_term_32(widened(like, v), m, total)[0], top


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
    """The logits of late_logit added to their lanes, which are the first thread's first; and their exponent words. A
    product with a power of two is exact, as in first_terms."""
    p, power, t = power_32(late, low, m, ONE)
    low_half, high_half = halves(total)
    first, second = halves(low_half)
    return join(join(select(cuda.laneid == 0, first + first_lanes(p * power), first), second), high_half), t


@device
def guess_from(room, i):
    """The reference exponent to try for chunk i after the one before it, if that has been summed and has one."""
    if i > 0 and float_bits(room[2, i - 1]) == 0:
        return checked_guess(guess_after(room[1, i - 1]))
    return NO_GUESS


@device
def checked_guess(guess):
    """A guess that a frame may be made of, or none."""
    return guess if abs(guess) <= EXP_LIMIT else NO_GUESS


@device
def chunk_in(like, stride, room, i):
    """(position where chunk i begins, where it ends, that of the class to skip); anew, as registers are for the sum."""
    k = np.uint32(anew(np.int64(i)))  # a signed index may count from the end
    classes, begin = np.int32(float_bits(room[2, k])), first_position(like, float_bits(room[0, k]), stride)[1]
    return begin, np.int32(begin + classes), skip_position(float_bits(room[1, k]), classes, begin)


@device
def sum_apart(like, stride, size, room, ring, capacity, ahead, ranked):
    """sum_chunks of what is not copied ahead, or was not summed so: the chunks with any classes."""
    i = first_left(size, room)
    while i < size:
        address, skip, classes = float_bits(room[0, i]), float_bits(room[1, i]), np.int32(float_bits(room[2, i]))
        s, c = 0.0, -np.inf
        if address != 0:
            s, c = chunk_sum(like, address, stride, classes, skip, guess_from(room, i))
        put_sum(room, first_left(size, room), s, c)
        cuda.syncwarp()
        i = first_left(size, room)


@device
def first_left(size, room):
    """The first chunk that is not summed, found anew as in chunk_in."""
    i = np.int32(0)
    while i < size and float_bits(room[2, i]) == 0:
        i = np.int32(i + 1)
    return i


@device
def start_stream(like, size, room, ring, capacity):
    """Start to copy as many rounds as the ring holds; gives (task, at, left) of copy_round, and where the first is."""
    task, at, left, where = np.int32(-1), np.int64(0), np.int32(0), ring
    for _ in range(rounds_in(like, capacity)):
        task, at, left = copy_round(like, where, task, at, left, size, room)
        where = next_round(like, where, ring, capacity)
    return task, at, left, where


@device
def sum_stream(like, stride, size, room, ring, capacity, ahead, ranked):
    """sum_chunks of chunks whose rounds are copied to the ring ahead of time, also those of chunks to come: loads never
    wait for a sum. One that its guess does not fit is summed again from memory."""
    task, at, left, where = ahead
    i, guess = np.int32(0), NO_GUESS
    while i < size:
        address = float_bits(room[0, np.uint32(i)])
        if address != 0:
            begin, end, skip = chunk_in(like, stride, room, i)
            late = late_logit(like, address, end, begin, skip)
            ref, guess = checked_guess(guess), NO_GUESS
            if ref != ref:
                await_oldest(like, capacity)
                hide_in_ring(like, where, np.int32(0), begin, skip)
                ref = exponent_32(largest_of(like, load_ring(like, where), WARP))
            m, low = frame_32(ref, BIAS)
            clip, total, top, p = clip_of(like, low), zeros(like), no_top(like), np.int32(0)
            best, place, larger, target = -INF, np.int32(0), np.int32(0), ZERO
            if ranked is not None:
                target = f32(room[4, np.uint32(i)])
            last, apart = min(end, np.int32(CHUNK)), np.int32(0) if begin > 0 else np.int32(skip & -LANES)
            while p < last:
                await_oldest(like, capacity)
                if p == apart:
                    begin, end, skip = chunk_in(like, stride, room, i)
                    hide_in_ring(like, where, p, begin, skip)
                    apart = np.int32(skip & -LANES)
                if ranked is None:
                    total, top = add_round(like, where, clip, low, m, total, top)
                else:
                    v = load_ring(like, where)
                    high = thread_high(like, v)
                    if exceeds(high, best):
                        best, place = high, p
                    x = clipped(like, v, clip, low)
                    if ranked != 0:
                        larger = np.int32(larger + count_larger(x, target))
                    total = clipped_term_32(x, m, total)[0]
                task, at, left = copy_round(like, where, task, at, left, size, room)
                where, p = next_round(like, where, ring, capacity), np.int32(p + LANES)
            if ranked is None:
                top = exponent_word(like, top, low, m)
            else:
                top = float_bits(fma(at_least(best, low), LOG2E, m))
            if chunk_in(like, stride, room, i)[1] > CHUNK:
                total, t = add_late(like, late, low, m, total)
                top = max(top, float_bits(t))
                if exceeds(late, best):
                    best, place = late, np.int32(CHUNK)
                larger = np.int32(larger + (late > target))
            if ranked is not None:
                put_scores(like, room, i, best, place, larger, clip, low, target, ranked)
            s, n = fold_lanes(like, total, WARP), bits_float(warp_largest(np.int32(top))) - m
            ref = BIAS - (m - MAGIC)  # as it was
            if clip != 0 and 0 <= n - ref <= HEADROOM and abs(n) <= EXP_LIMIT and abs(ref) <= EXP_LIMIT:
                guess = n - MARGIN
                scaled = f32(s) * low_bits_exponent((ref - n) + (MAGIC + BIAS))  # from 0.7 to 2^14: exactly
                k = np.uint32(anew(np.int64(i)))  # or a place in room is held all through the sum
                put_sum(room, k, np.float64(scaled), np.float64(n) * INV_LOG2E)
        cuda.syncwarp()
        i = np.int32(i + 1)
    sum_apart(like, stride, size, room, ring, capacity, ahead, ranked)


@device
def exceeds(x, best):
    """Whether x is larger; NaN is than all but NaN."""
    return x > best or (x != x and best == best)


@device
def put_scores(like, room, i, best, place, larger, clip, low, target, ranked):
    """room[3:5, i] = (the key of a chunk's largest logit, 2^31 - 1 for NaN, and below it where the first round begins
    that holds it; how many logits are larger than the target, UNCOUNTED if that is to be counted again)."""
    key = np.int32(0x7FFFFFFF) if best != best else np.int32(ordered_bits(best + ZERO))
    highest = warp_largest(key)
    first = -warp_largest(np.int32(-place if key == highest else -2 * CHUNK))
    count = 0.0
    if ranked != 0:
        count = np.float64(warp_sum(larger))
        if clip == 0 or not target >= low + ONE:  # it was compared with logits that `low` had replaced, or NaN
            count = UNCOUNTED
    cuda.syncwarp()  # all have read the target
    if cuda.laneid == 0:
        room[3, i], room[4, i] = bits_float(np.int64(highest) << 32 | np.int64(first)), count


@device
def put_sum(room, i, s, c):
    """room[:3, i] = (s, c, no classes), after all threads have read what was there."""
    cuda.syncwarp()
    if cuda.laneid == 0:
        room[0, i], room[1, i], room[2, i] = s, c, 0.0


def start_chunks(like, stride, size, room, ring, capacity):
    """What sum_chunks begins with; whatever is loaded in between does not keep the logits waiting."""
    if isinstance(stride, np.int32) and not isinstance(like, float):
        return start_stream(like, size, room, ring, capacity)
    return None


@overload(start_chunks)
def _start_chunks(like, stride, size, room, ring, capacity):
    if like != types.float64 and stride == types.int32:
        return lambda like, stride, size, room, ring, capacity: start_stream(like, size, room, ring, capacity)
    return lambda like, stride, size, room, ring, capacity: None


def sum_chunks(like, stride, size, room, ring, capacity, ahead, ranked):
    """room[:2, i] = chunk_sum of the chunk room[:3, i] = (address, skip, classes) for i < size, by one warp, whose
    threads have then met; an address of 0 is no chunk. `stride` is an int32 where classes lie side by side; `ahead` is
    from start_chunks. If `ranked` is not None, room[4, i] holds a target's logit, and put_scores is called too, to
    count what is larger unless `ranked` is 0."""
    return (sum_apart if ahead is None else sum_stream)(like, int(stride), size, room, ring, capacity, ahead, ranked)


@overload(sum_chunks)
def _sum_chunks(like, stride, size, room, ring, capacity, ahead, ranked):
    function = sum_apart if ahead == types.none else sum_stream
    if stride == types.int32:
        return lambda like, stride, size, room, ring, capacity, ahead, ranked: function(
            like, np.int64(item_size(like)), size, room, ring, capacity, ahead, ranked
        )
    return lambda like, stride, size, room, ring, capacity, ahead, ranked: function(
        like, stride, size, room, ring, capacity, ahead, ranked
    )
