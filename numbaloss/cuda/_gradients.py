"""Gradients of rows on CUDA: a team sums its row, reads it again and writes what a frame (_typed.grad_frame) makes of
it."""

import numpy as np
from numba import types
from numba.extending import overload

from .._intrinsics import bits_float, float_bits, fma
from .._scalar import BIAS, CHUNK, LANES, LOG2E, f32, normal_product_32
from .._typed import grad_of, item_size, number, widen
from .._vector import least_bits_of
from ._chunks import WARP, first_position, load_step
from ._launch import cuda, device
from ._memory import (
    GRAD_RING,
    anew,
    await_oldest,
    copy_last,
    copy_last_part,
    end_of_round,
    fill,
    least_logit,
    load,
    load_ring,
    store_item,
    store_part,
    thread_anew,
    widened,
)
from ._rows import PARTS, class_stride, join_round, row_address, team_of
from ._stream import copy_rest, round_bytes, rounds_in, start_chunks, sum_chunks

ROUNDS = CHUNK // LANES
TEAM = 8  # warps of a block at most
SAFE = f32(20)  # so far above `low` no entry is subnormal: e^20 is more than 2^24
TASKS = PARTS // TEAM  # chunks that a warp takes at a time at most


def team_for(items, classes, most):
    """How many warps take a row of more than one chunk: two or three chunks each where there are rows enough for `most`
    warps, as what there is to do beside the chunks takes as long as one of them."""
    warps, chunks = 1, -(-classes // CHUNK)
    while warps < TEAM and (chunks > 3 * warps or chunks > warps and 2 * items * warps <= most):
        warps *= 2
    return warps


@device
def row_sum(like, rows, notes, room, tasks, ring, capacity):
    """(s, c) of the whole row notes[w, :2] = (address, label), for each warp w, but for the label's class, for every
    thread of its team: its chunks, left to right, by sum_chunks, for which each warp has `tasks`, (3, TASKS) float64,
    and a ring. A team has TEAM warps, or none of them more than TASKS chunks: see team_for. notes[w, 2] is the target's
    logit afterwards, which the copies do not wait for, and notes[w, 4] holds a number meanwhile."""
    lane, classes, first = np.int32(cuda.laneid), rows[5], np.int32(0)
    while np.int64(first) * CHUNK < classes:
        size, before, count = chunks_of_warp(first, classes)
        if lane < size:
            note = notes[thread_anew() >> 5]
            address, skip, begin = float_bits(note[0]), float_bits(note[1]), np.int64(first + before + lane) * CHUNK
            tasks[0, lane] = bits_float(address + begin * class_stride(like, rows))
            tasks[1, lane] = bits_float(skip - begin)
            tasks[2, lane] = bits_float(min(np.int64(CHUNK), classes - begin))
        if lane == 0:
            notes[thread_anew() >> 5, 4] = bits_float(np.int64(first if classes > CHUNK else -1))
        cuda.syncwarp()
        ahead = start_chunks(like, rows[4], size, tasks, ring, capacity)
        if lane == 0:
            note = notes[thread_anew() >> 5]
            target = float_bits(note[0]) + float_bits(note[1]) * class_stride(like, rows)
            note[2] = np.float64(widen(load(like, target)))
        sum_chunks(like, rows[4], size, tasks, ring, capacity, ahead, None)
        first = np.int32(float_bits(notes[thread_anew() >> 5, 4]))
        if first < 0:
            return tasks[0, 0], tasks[1, 0]
        size, before, count = chunks_of_warp(first, classes)
        if lane < size:
            room[0, before + lane + 1], room[1, before + lane + 1] = tasks[0, lane], tasks[1, lane]
        join_round(room, first, np.int32(count + 1))
        first = np.int32(first + PARTS - 1)
    return room[0, 0], room[1, 0]


@device
def chunks_of_warp(first, classes):
    """Of the chunks of a row from `first` on that go to `room` at once: (how many are this warp's, which lie side by
    side, how many lie before them, how many there are)."""
    count = min(np.int32(PARTS - 1), np.int32((anew(classes) + CHUNK - 1) // CHUNK - first))
    begin, end = share_of_warp(count, classes)
    return np.int32(end - begin), begin, count


@device
def share_of_warp(chunks, classes):
    """(first, end) of a warp's part of so many chunks."""
    _, warp, warps = team_of(classes)
    part, parts = np.uint32(warp), np.uint32(warps)
    return np.int32(np.uint32(chunks) * part // parts), np.int32(np.uint32(chunks) * (part + np.uint32(1)) // parts)


@device
def fill_row(like, rows, r, like_grad, grad_rows, value):
    """Each entry of a row = value, by its team."""
    _, warp, warps = team_of(rows[5])
    grad_stride, p = class_stride(like_grad, grad_rows), np.int64(warp) * LANES
    position = np.int32(cuda.laneid * (16 // item_size(like)))
    to = row_address(grad_rows, r) + position * grad_stride
    while p < rows[5]:
        near = np.int32(min(rows[5] - p, np.int64(LANES)))
        store_part(like, like_grad, to + p * grad_stride, grad_stride, position, np.int32(0), near, fill(like, value))
        p += warps * LANES


@device
def safe_word(m, low, shift, factor):
    """What the words of normal_product_32 are to lie above; none does in rows that have a shift or no gradient."""
    if shift == number(shift, 0.0) and factor == factor:
        return float_bits(fma(low + SAFE, LOG2E, m - BIAS))
    return np.int32(0x7FFFFFFF)


def least_word(like, loads, m):
    """The least of the words of normal_product_32, as signed integers, of Loads without NaN."""
    if like.itemsize == 2:
        return float_bits(fma(least_logit(like, loads), LOG2E, m))
    return least_bits_of(fma(loads, LOG2E, m))


@overload(least_word)
def _least_word(like, loads, m):
    if like.bitwidth == 16:
        return lambda like, loads, m: float_bits(fma(least_logit(like, loads), LOG2E, m))
    return lambda like, loads, m: least_bits_of(fma(loads, LOG2E, m))


@device
def round_entries(like, loads, safe, shift, m, low, factor):
    """The entries of Loads. Nearly always none of a thread's is 0 or subnormal: then powers of two can be added."""
    v = widened(like, loads)
    if least_word(like, loads, m - BIAS) > safe:
        return normal_product_32(v, m - BIAS, factor)
    return grad_of(v - shift, m, low, factor)


@device
def write_apart(like, rows, r, address, like_grad, grad_rows, m, low, shift, factor, ring):
    """write_grad of rows that are not copied ahead."""
    _, warp, warps = team_of(rows[5])
    stride, grad_stride, out = class_stride(like, rows), class_stride(like_grad, grad_rows), row_address(grad_rows, r)
    base, begin = first_position(like, address, stride)
    end, p = begin + rows[5], np.int64(warp) * LANES
    while p < end:
        near = np.int32(min(end - p, np.int64(LANES)))  # positions from p on, which may lie beyond 32 bits
        before = np.int32(begin) if p == 0 else np.int32(0)
        position = np.int32(cuda.laneid * (16 // item_size(like)))
        v = load_step(like, base + p * stride, stride, np.int32(0), before, near, np.int32(-1), WARP)
        to = out + (p - begin + position) * grad_stride
        store_part(like, like_grad, to, grad_stride, position, before, near, grad_of(v - shift, m, low, factor))
        p += warps * LANES


@device
def write_stream(like, rows, r, address, like_grad, grad_rows, m, low, shift, factor, ring):
    """write_grad by a ring. A warp takes the rounds of the chunks that it has summed, the last ones first: the ring
    still holds as many as it has room for, and where one has been written, one before those is copied. Only the last
    round of a row, the first that is taken, may be less than a round."""
    classes, size, grad_stride = rows[5], np.int64(item_size(like)), class_stride(like_grad, grad_rows)
    chunks = np.int32((classes + CHUNK - 1) // CHUNK)
    start, end = share_of_warp(chunks, classes)
    base, begin = first_position(like, address, size)
    stop = min(np.int64(end) * CHUNK, begin + classes)
    behind = (stop + LANES - 1) // LANES * LANES  # the position where the last round ends
    near, rounds = np.int32(stop - behind + LANES), np.int32(behind // LANES - start * ROUNDS)
    slots = rounds_in(like, GRAD_RING)
    held = rounds if chunks < PARTS else np.int32(0)  # more chunks are summed in parts, which begin with other warps
    where = np.int32(ring + held % slots * round_bytes(like))
    thread, safe = np.int32(cuda.laneid * (16 // item_size(like))), safe_word(m, low, shift, factor)
    out = row_address(grad_rows, r)
    place, at, to = where, base + behind * size + cuda.laneid * 16, out + (behind - begin + thread) * grad_stride
    for i in range(slots):
        at, place = at - round_bytes(like), round_behind(like, place, ring)
        if i >= held:
            if i < rounds:
                copy_back(like, place, at, np.int32(near * item_size(like)) if i == 0 else round_bytes(like))
            end_of_round()
    while rounds > 0:
        rounds, where = np.int32(rounds - 1), round_behind(like, where, ring)
        to = anew(to - LANES * grad_stride)  # or what it was is held too, for addresses are made from that
        await_oldest(like, GRAD_RING)
        g = round_entries(like, load_ring(like, where), safe, shift, m, low, factor)
        first = np.int32(rounds & (ROUNDS - 1)) == 0  # of a chunk
        store_part(like, like_grad, to, grad_stride, thread, begin if first else np.int32(0), near, g)
        near, at = np.int32(LANES), at - round_bytes(like)
        if rounds >= slots:
            copy_last(like, where, at)
        end_of_round()
    out = row_address(grad_rows, anew(r))  # or it is held all through the loop
    write_late(like, address, begin, classes, like_grad, out, grad_stride, shift, m, low, factor)


@device
def write_late(like, address, begin, classes, like_grad, out, grad_stride, shift, m, low, factor):
    """Gradients of what the ninth rounds of this warp's chunks hold, which went through no ring: eight threads a
    chunk."""
    k, end = share_of_warp(np.int32((classes + CHUNK - 1) // CHUNK), classes)
    i, k = np.int64(cuda.laneid & 7), np.int32(k + (cuda.laneid >> 3))
    while k < end:
        at = np.int64(k + 1) * CHUNK - begin + i
        if i < begin and at < classes:
            x = widen(load(like, address + at * item_size(like)))
            store_item(like_grad, out + at * grad_stride, grad_of(x - shift, m, low, factor))
        k = np.int32(k + 4)


@device
def round_behind(like, where, ring):
    """This thread's places for the round before that at `where`."""
    return np.int32(where - round_bytes(like)) if where > ring else np.int32(ring + GRAD_RING - round_bytes(like))


@device
def copy_back(like, where, at, left):
    """Start to copy a round, of which `left` bytes are left, from `at` on (this thread's first load)."""
    if left >= round_bytes(like):
        copy_last(like, where, at)
    else:
        copy_last_part(like, where, at, np.int32(left - cuda.laneid * 16))
        copy_rest(like, where, at, np.int32(left - cuda.laneid * 16))


def write_grad(like, rows, stride, r, address, like_grad, grad_rows, m, low, shift, factor, ring):
    """The gradient of a row by its team, but for the target's. `stride` is an int32 where classes lie side by side."""
    ahead = isinstance(stride, np.int32) and not isinstance(like, float)
    function = write_stream if ahead else write_apart
    function(like, rows, r, address, like_grad, grad_rows, m, low, shift, factor, ring)


@overload(write_grad)
def _write_grad(like, rows, stride, r, address, like_grad, grad_rows, m, low, shift, factor, ring):
    function = write_stream if like != types.float64 and stride == types.int32 else write_apart

    def run(like, rows, stride, r, address, like_grad, grad_rows, m, low, shift, factor, ring):
        function(like, rows, r, address, like_grad, grad_rows, m, low, shift, factor, ring)

    return run
