"""Rows of logits on CUDA: a warp for a row of one chunk, a block for others; a team, either way.

`rows` is as in cpu/_chunks.py; `room`, (3, PARTS) float64 in shared memory, is where the warps of a block exchange
numbers. What these functions give, they give to every thread of the team.
"""

from functools import lru_cache

import numpy as np
from numba import types
from numba.extending import overload

from .._intrinsics import bits_float, float_bits, fma, ordered_bits, select
from .._scalar import CHUNK, LANES, exp_64, f32, merge_moments
from .._typed import compute_zero, item_size, key_value, number, widen
from ._chunks import (
    ALL,
    NO_GUESS,
    WARP,
    chunk_moment,
    chunk_rank,
    chunk_sum,
    first_position,
    guess_after,
    load_step,
    thread_largest,
    warp_max,
)
from ._launch import cuda, device
from ._memory import anew, first_item, load, thread_anew
from ._operands import counts, item_place, label_at

PARTS = 64  # chunks that a team joins at a time
TEAMS = 4  # warps of a block, each with a row of its own where a row is one chunk
THREADS = 32 * TEAMS


def teams(items, classes, warps=TEAMS):
    """(blocks, threads) for a team a row, of at most `warps` for a row of more than one chunk."""
    if classes <= CHUNK:
        return -(-items // TEAMS), THREADS
    return items, 32 * min(warps, -(-classes // CHUNK))


def warps_for(items, chunks, most, at_once=1):
    """(blocks of a warp, rows of each): whole waves of `most` warps that have equally much to do, in chunks about
    32."""
    waves = max(1, -(-items * chunks // (32 * most)))
    group = max(at_once, -(-items // (waves * most)))
    return -(-items // group), group


@lru_cache(256)  # half a microsecond of each call
def rows_of_warps(items, chunks, most, times=1):
    """warps_for rows that a warp sums whole, of up to 32 chunks; (0, 0) where chunks that are shared out evenly, each
    taking so many times as long, would need less time by more than one."""
    if chunks <= 32:
        blocks, group = warps_for(items, chunks, most)
        if group * chunks <= times * warps_for(items * chunks, 1, most)[1] + 1:
            return blocks, group
    return 0, 0


@device
def rows_from(done, group, items, at_once):
    """(first row, number of rows) that a warp sums at once, after it has summed `done` rows."""
    first = cuda.blockIdx.x * group + done
    return first, max(np.int64(0), min(at_once, group - done, items - first))


@device
def team_of(classes):
    """(number of this thread's team, its warp in the team, warps of the team): a row of one chunk has a warp, others a
    block."""
    warp = np.int64(thread_anew() >> 5)
    if anew(classes) <= CHUNK:
        return np.int64(cuda.blockIdx.x) * (cuda.blockDim.x >> 5) + warp, np.int64(0), np.int64(1)
    return np.int64(cuda.blockIdx.x), warp, np.int64(cuda.blockDim.x >> 5)


def class_stride(like, rows):
    """Bytes between the classes of a row: known to the compiler where it is given as an int32."""
    return int(rows[4])


@overload(class_stride)
def _class_stride(like, rows):
    size = np.int64(like.bitwidth // 8)
    return (lambda like, rows: size) if rows[4] == types.int32 else (lambda like, rows: rows[4])


@device
def row_address(rows, r):
    return item_place(rows[:4], r)


@device
def join_parts(room, count, s, c):
    """(s, c) merged with the pairs room[:2, 0], room[:2, 1], ... one after the other, by one warp; overwrites them, and
    ends when all have read them. Thread k % 32 may just have written pair k.

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
    cuda.syncwarp()
    return s, c


@device
def join_few(room, k, end):
    """As join_parts, of room[:2, k], ..., room[:2, end - 1] by one thread, which overwrites nothing."""
    s, c = 0.0, -np.inf
    while k < end:
        part, c2 = room[0, k], room[1, k]
        weight = exp_64(min(c, c2) - max(c, c2))
        large, small = (s, part) if c >= c2 else (part, s)
        s = fma(small, weight, large) if small != 0.0 else large
        c, k = max(c, c2), np.int32(k + 1)
    return s, c


@device
def team_max(value, classes, room):
    """The largest int64 of a team's threads."""
    value = warp_max(value)
    if classes <= CHUNK:
        return value
    _, warp, warps = team_of(classes)
    if cuda.laneid == 0:
        room[2, warp] = bits_float(value)
    cuda.syncthreads()
    for i in range(warps):
        value = max(value, float_bits(room[2, i]))
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
def first_nan(like, rows, address, room):
    """The index of a row's first NaN, or -1."""
    where = first_equal(like, rows, address, np.int64(0), f32(np.nan), room)
    return where if where < rows[5] else np.int64(-1)


@device
def row_rank(like, rows, address, x):
    """How many logits of a row are larger than x, by one warp."""
    stride, begin, larger = class_stride(like, rows), np.int64(0), np.int64(0)
    while begin < rows[5]:
        size = min(np.int64(CHUNK), rows[5] - begin)
        larger += chunk_rank(like, address + begin * stride, stride, size, x)
        begin += CHUNK
    return larger


@device
def score_row(like, rows, address, skip, target, ranked, room):
    """(s, c, largest logit, its first class, number of logits above `target` if `ranked`) of a row, where (s, c) is the
    sum without the class `skip`, or, for a skip of -1, without the largest.

    The first pass takes the maximum and the sum of a chunk while it is in the caches; the second one sums the chunk
    that holds the largest once more, without it. Where that is left out and each warp has one chunk at most, and in
    rows with more than PARTS - 1 chunks, the second pass sums all: it takes no longer.
    """
    stride, classes = class_stride(like, rows), rows[5]
    _, warp, warps = team_of(classes)
    chunks, larger = np.int32((classes + CHUNK - 1) // CHUNK), np.int64(0)
    at_once = chunks < PARTS and (chunks > TEAMS or skip >= 0)
    best, start, where, s, c = np.int64(ordered_bits(number(like, -np.inf))), np.int64(0), np.int64(-1), 0.0, -np.inf
    found, guess = np.int32(0), NO_GUESS
    for again in range(2):
        first = np.int32(0)
        while first < chunks:
            count, k = min(np.int32(PARTS), np.int32(chunks - first + 1)), np.int32(warp + 1)
            while k < count:
                begin = np.int64(first + k - 1) * CHUNK
                at, size = address + begin * stride, min(np.int64(CHUNK), classes - begin)
                if not again:
                    key, place = chunk_largest(like, at, stride, size)
                    guess = guess_after(np.float64(key_value(compute_zero(like), key)))
                    if key > best:
                        best, start = key, begin + place
                    if ranked:
                        larger += chunk_rank(like, at, stride, size, target)
                if at_once != again or (skip < 0 and first + k - 1 == found):
                    s, c = chunk_sum(like, at, stride, size, (skip if skip >= 0 else where) - begin, guess)
                    if cuda.laneid == 0 and warps > 1:
                        room[0, k], room[1, k] = s, c
                k = np.int32(k + warps)
            if again and warps > 1:
                join_round(room, first, count)
            first = np.int32(first + PARTS - 1)
        if not again:
            key = team_max(best, classes, room)
            start = -team_max(-(start if best == key else classes), classes, room)
            value = key_value(compute_zero(like), key)
            where, found = round_place(like, rows, address, start, value), np.int32(start // CHUNK)
            if chunks > TEAMS:
                guess = guess_after(np.float64(value)) if at_once else NO_GUESS
    if warps > 1:
        s, c = room[0, 0], room[1, 0]
    return s, c, value, where, team_sum(larger, classes, room)


@device
def join_round(room, first, count):
    """room[:2, 0] = (s, c) of all chunks of a row so far: those before `first` there, others in room[:2, 1:]."""
    cuda.syncthreads()
    if cuda.threadIdx.x < 32:
        if first == 0 and cuda.laneid == 0:
            room[0, 0], room[1, 0] = 0.0, -np.inf
        s, c = join_parts(room, count, 0.0, -np.inf)
        if cuda.laneid == 0:
            room[0, 0], room[1, 0] = s, c
    cuda.syncthreads()


@device
def team_sum(value, classes, room):
    """The sum of an int64 that the threads of each warp agree on over the warps of a team."""
    if classes <= CHUNK:
        return value
    _, warp, warps = team_of(classes)
    if cuda.laneid == 0:
        room[2, warp] = bits_float(value)
    cuda.syncthreads()
    total = np.int64(0)
    for i in range(warps):
        total += float_bits(room[2, i])
    cuda.syncthreads()
    return total


@device
def row_moments(like, rows, address, skip, room):
    """(s, c, b) of a row but for `skip`: s * e^c sums exp(x), b sums exp(x - c) * (x - c)."""
    _, warp, warps = team_of(rows[5])
    chunks, first = np.int32((rows[5] + CHUNK - 1) // CHUNK), np.int32(0)
    s, c, b = 0.0, -np.inf, 0.0
    while first < chunks:
        count, k = min(np.int32(PARTS), np.int32(chunks - first)), np.int32(warp)
        s2, c2, b2 = 0.0, -np.inf, 0.0
        while k < count:
            s2, c2, b2 = part_moments(like, rows, address, np.int64(first + k) * CHUNK, skip)
            if cuda.laneid == 0 and warps > 1:
                room[0, k], room[1, k], room[2, k] = s2, c2, b2
            k = np.int32(k + warps)
        if warps == 1:
            if s2 != 0.0:
                s, c, b = merge_moments(s, c, b, s2, c2, b2)
        else:
            cuda.syncthreads()
            for k in range(count):
                if room[0, k] != 0.0:
                    s, c, b = merge_moments(s, c, b, room[0, k], room[1, k], room[2, k])
            cuda.syncthreads()
        first = np.int32(first + PARTS)
    return s, c, b


@device
def part_moments(like, rows, address, begin, skip):
    """What the chunk from `begin` on adds to row_moments."""
    stride, classes = class_stride(like, rows), rows[5]
    at, size = address + begin * stride, min(np.int64(CHUNK), classes - begin)
    s, c = chunk_sum(like, at, stride, size, skip - begin, NO_GUESS)
    b = 0.0
    if s != 0.0:
        shift = number(like, c)  # c lies between two numbers of the row's precision: take one of them
        s, c = s * exp_64(c - np.float64(shift)), np.float64(shift)
        b = chunk_moment(like, at, stride, size, skip - begin, shift)
    return s, c, b


@device
def chunk_largest(like, address, stride, size):
    """(key of the largest logit of a chunk, where the round of the warp begins that holds the first one)."""
    base, begin = first_position(like, address, stride)
    end, best, where = np.int32(begin + size), number(like, -np.inf), np.int32(0)
    for p in range(np.int32(0), end, np.int32(LANES)):
        high = thread_largest(load_step(like, base, stride, p, begin, end, np.int32(-1), WARP))
        if high > best or high != high:
            best, where = high, p
    key = np.int64(ordered_bits(best + compute_zero(like)))  # 0 for -0
    largest = warp_max(key)
    first = -warp_max(np.int64(-where if key == largest else -end))
    return largest, max(first - begin, np.int64(0))


@device
def round_place(like, rows, address, start, value):
    """The first class from `start` on, where a round of the warp begins, with this logit, NaN being equal to NaN;
    `start` if it is -inf."""
    stride, chunk = class_stride(like, rows), np.int64(start) // CHUNK * CHUNK
    base, begin = first_position(like, address + chunk * stride, stride)
    end, p = np.int32(begin + min(np.int64(CHUNK), rows[5] - chunk)), np.int32(start - chunk + begin) & -LANES
    v, wanted = load_step(like, base, stride, np.int32(p), begin, end, np.int32(-1), WARP), value
    if value != value:
        wanted = number(value, 1.0)
        v = select(v == v, wanted - wanted, wanted)
    k = first_item(v, wanted)
    n = np.int32(16 // item_size(like))
    position = np.int64(p + cuda.laneid * n + k // n * 32 * n + k % n)
    place = -warp_max(-(position if k < 32 else np.int64(end)))
    return chunk + place - begin if value != -np.inf and place < end else start


@device
def row_of(like, rows, r, labels, weights, ignore_index):
    """(address of row r, its label); (0, 0) if the label is out of range, (0, -1) if the row does not count."""
    if not counts(r, labels, weights, ignore_index):
        return np.int64(0), np.int64(-1)
    y = label_at(labels, r)
    if not 0 <= y < rows[5]:
        return np.int64(0), np.int64(0)
    return row_address(rows, r), y


@device
def target_of(like, rows, address, y):
    """The logit of a target, by row_of; NaN for a label out of range, 0 for a row that does not count."""
    if address == 0:
        return np.nan if y == 0 else 0.0
    return np.float64(widen(load(like, address + y * class_stride(like, rows))))


@device
def look_up(like, rows, r, k, size, chunks, labels, weights, ignore_index, room):
    """room[:3, i] of this warp = (address, label, classes) of the i-th chunk from chunk k of row r on, the label as it
    counts there. Gives the target of this thread's chunk."""
    lane, x = np.int32(cuda.laneid), 0.0
    if lane < size:
        k += lane
        if chunks == 1:
            r, k = r + k, np.int64(0)
        while k >= chunks:  # up to 16 times: a division of 64 bits takes longer
            r, k = r + 1, k - chunks
        address, y = row_of(like, rows, r, labels, weights, ignore_index)
        x = target_of(like, rows, address, y)
        if address != 0:
            address, y = address + k * CHUNK * class_stride(like, rows), y - k * CHUNK
        room[0, lane], room[1, lane] = bits_float(address), bits_float(y)
        room[2, lane] = bits_float(min(np.int64(CHUNK), rows[5] - k * CHUNK))
    cuda.syncwarp()
    return x
