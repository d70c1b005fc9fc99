"""Scores on CUDA: what a row tells of its target, and the entropy of its softmax. A row of few classes is a thread's;
others go through streams, whole or by chunks, where classes lie side by side."""

import cupy
import numpy as np
from numba import types

from .._intrinsics import at_least, bits_float, float_bits
from .._scalar import CHUNK, LANES, others_to_target, row_entropy, target_loss, target_lse
from .._typed import compute_zero, item_size, number, widen
from ._chunks import warp_max, warp_sum
from ._columns import (
    NARROW,
    ROOM_32,
    ROOM_64,
    bring_rows,
    few_larger,
    few_largest,
    few_max,
    few_moments,
    few_nan,
    few_sum,
    place_of,
    room_of,
    threads_of,
)
from ._launch import cuda, device, kept, kernel, launch, resident
from ._memory import RING, RING_ITEMS, anew, load, store
from ._operands import address, counts, label_at, operand, with_known_stride
from ._rows import (
    PARTS,
    THREADS,
    class_stride,
    first_nan,
    join_few,
    join_parts,
    look_up,
    round_place,
    row_address,
    row_moments,
    row_of,
    row_rank,
    rows_from,
    rows_of_warps,
    score_row,
    target_of,
    team_of,
    teams,
    warps_for,
)
from ._stream import start_chunks, sum_chunks, thread_ring
from ._sums import NO_KEY, SCORE_SHARED, chunk_of, key_of, largest_found, streams

PART_BYTES = 32  # that _part_scores leaves of a chunk


@device
def logprob_and_lse(like, s, c, x):
    """The log-probability of a target whose logit is x, the others summing to s * e^c, and the logarithm of the whole
    sum; NaN and anything for a row without a softmax."""
    full = item_size(like) == 8
    u = others_to_target(s, c, x, full)
    loss = target_loss(u, s, c, x, full)
    return compute_zero(like) - number(like, loss), number(like, target_lse(u, s, c, x, loss, full))


def score(work, items, like, rows, labels, weights, ignore_index, logprob, lse, argmax, rank, entropy):
    """What a row tells of its target; `rank` and `entropy` are arrays, or None."""
    if score_threads(like, rows[5])[0]:
        return narrow_score(items, like, rows, labels, weights, ignore_index, logprob, lse, argmax, rank, entropy)
    rows = with_known_stride(like, rows)
    fields = tuple(address(x) for x in (logprob, lse, argmax, rank))
    arguments = like, rows, operand(labels), operand(weights), ignore_index
    if streams(like, rows, LANES):
        stream_score(items, logprob, *arguments, fields)
    else:
        launch(_score.of(like), *teams(items, rows[5]), logprob, items, *arguments, *fields)
    if entropy is not None:
        arguments = items, like, rows, *(address(x) for x in (logprob, lse, argmax, entropy))
        launch(_entropy.of(like), *teams(items, rows[5]), logprob, *arguments)
    return 0


def stream_score(items, out, like, rows, labels, weights, ignore_index, fields):
    """As _score, but with `fields` of what it writes, and an array on the device."""
    arguments, chunks = (like, rows, labels, weights, ignore_index), -(-rows[5] // CHUNK)
    most = resident(_stream_score.of(like), out)
    blocks, group = rows_of_warps(items, chunks, most)
    if group:
        rows_of_warp = items, group, chunks, 32 // chunks
        return launch(_stream_score.of(like), blocks, 32, out, *rows_of_warp, *arguments, *fields)
    blocks, group = warps_for(items * chunks, 1, most)
    parts, chunks_of_warp = kept(cupy.empty((items * chunks, PART_BYTES // 8))), (items * chunks, group, chunks)
    launch(_part_scores.of(like), blocks, 32, out, *chunks_of_warp, *arguments, fields[-1], address(parts))
    return launch(_join_scores.of(like), items, 32, out, items, address(parts), *arguments, *fields)


@kernel(THREADS)
def _score(items, like, rows, labels, weights, ignore_index, logprob, lse, argmax, rank):
    """A team takes a row, from memory once and then from the caches."""
    room = cuda.shared.array((3, PARTS), types.float64)
    r, warp, _ = team_of(rows[5])
    if r >= items:
        return
    first = warp == 0 and cuda.laneid == 0
    address, y = row_of(like, rows, r, labels, weights, ignore_index)
    if address == 0:
        if first:
            value = number(like, np.nan if y == 0 else 0.0)
            put(like, r, value, value, np.int64(-1), np.int64(-1), logprob, lse, argmax, rank)
        return
    target = widen(load(like, address + y * class_stride(like, rows)))
    s, c, largest, where, larger = score_row(like, rows, address, y, target, rank != 0, room)
    value, row_lse = logprob_and_lse(like, s, c, np.float64(target))
    if value != value:  # a row that is all -inf or holds +inf or NaN
        nan = first_nan(like, rows, address, room)
        where = nan if nan >= 0 else where
        row_lse = largest if nan < 0 else number(like, np.nan)
    if first:
        put(like, r, value, row_lse, where, larger, logprob, lse, argmax, rank)


@kernel(32, 16, 16, 8, shared=SCORE_SHARED)
def _stream_score(items, group, chunks, at_once, like, rows, labels, weights, ignore_index, logprob, lse, argmax, rank):
    """As _score for rows of up to 32 chunks, classes side by side, by warps of their own, as in _sparse_xent: with the
    sum of a chunk comes its largest logit and the round that holds it first, which is read again for the class."""
    room, lane = cuda.shared.array((5, 32), types.float64), np.int32(cuda.laneid)
    ring = thread_ring(cuda.shared.array(RING_ITEMS, types.float64, 16), 0, RING)
    done = np.int64(0)
    while done < group:
        first, size = rows_from(done, group, items, at_once)
        x = look_up(like, rows, first, np.int64(0), size * chunks, chunks, labels, weights, ignore_index, room)
        ahead = start_chunks(like, rows[4], np.int32(size * chunks), room, ring, RING)
        room[4, lane] = x
        cuda.syncwarp()
        sum_chunks(like, rows[4], np.int32(size * chunks), room, ring, RING, ahead, rank)
        done = anew(done)
        first, size = rows_from(done, group, items, at_once)
        start, y, value, x, larger = row_scores(
            like, rows, first, size, chunks, labels, weights, ignore_index, room, logprob, lse, argmax, rank
        )
        cuda.syncwarp()
        room[0, lane], room[1, lane], room[4, lane] = bits_float(start), bits_float(y), larger
        room[2, lane], room[3, lane] = np.float64(value), np.float64(x)
        cuda.syncwarp()
        for k in range(size):
            start, y, larger = float_bits(room[0, k]), float_bits(room[1, k]), room[4, k]
            value, x = number(like, room[2, k]), number(like, room[3, k])
            find_largest(like, rows, first + k, start, y, value, x, larger, argmax, rank)
        cuda.syncwarp()
        done += at_once


@device
def row_scores(like, rows, first, size, chunks, labels, weights, ignore_index, room, logprob, lse, argmax, rank):
    """Writes the scores of row first + i, a thread a row, from what _stream_score has in room[:, i * chunks] and so on,
    but for what find_largest writes, whose arguments it gives."""
    zero, r = compute_zero(like), first + cuda.laneid
    start, y, value, x, larger = np.int64(-1), np.int64(-1), zero, zero, 0.0
    if cuda.laneid < size:
        i, key = np.int32(cuda.laneid * chunks), np.int64(NO_KEY)
        address, y = row_of(like, rows, r, labels, weights, ignore_index)
        x = number(like, target_of(like, rows, address, y))
        if address == 0:
            put(like, r, x, x, np.int64(-1), np.int64(-1), logprob, lse, argmax, rank)
        else:
            for k in range(chunks):
                key, larger = max(key, key_of(room[3, i + k], np.int64(k))), larger + room[4, i + k]
            k = chunk_of(key)
            value, start = largest_found(like, rows, address, k, room[3, i + k])
            s, c = join_few(room, i, np.int32(i + chunks))
            put_score(like, r, s, c, x, y, value, larger, logprob, lse, argmax, rank)
    return start, y, value, x, larger


@device
def put_score(like, r, s, c, x, y, largest, larger, logprob, lse, argmax, rank):
    """Write the scores of a row as if its target, with the logit x, were the largest; the others have the sum s * e^c
    and the largest logit `largest`."""
    value, row_lse = logprob_and_lse(like, s, c, np.float64(x))
    if value != value:  # a row that is all -inf or holds +inf or NaN
        row_lse = at_least(largest, x)
    put(like, r, value, row_lse, y, np.int64(larger), logprob, lse, argmax, rank)


@device
def find_largest(like, rows, r, start, y, value, x, larger, argmax, rank):
    """Writes what put_score left open for row r, by the whole warp: the class of the largest logit, if that is `value`,
    which the round from `start` on holds first (-1: nothing is open), and the rank, if `larger` is below 0."""
    address = row_address(rows, r)
    if start >= 0 and not (x > value or (x != x and value == value)):
        where = round_place(like, rows, address, start, value)
        if x == value or x != x:
            where = min(where, y)
        if cuda.laneid == 0:
            store(argmax + r * 8, where)
    if larger < 0.0:
        count = row_rank(like, rows, address, x)
        if cuda.laneid == 0:
            store(rank + r * 8, count)


@kernel(32, 16, 16, 8, shared=SCORE_SHARED)
def _part_scores(items, group, chunks, like, rows, labels, weights, ignore_index, rank, parts):
    """Few rows, or more chunks than 32: as _stream_score, but for `group` chunks, of one row or of several. parts[i] =
    (s, c, both numbers of put_scores) of chunk i."""
    room, lane = cuda.shared.array((5, 32), types.float64), np.int32(cuda.laneid)
    ring = thread_ring(cuda.shared.array(RING_ITEMS, types.float64, 16), 0, RING)
    first = np.int64(cuda.blockIdx.x) * group
    size, r = np.int32(min(group, items - first)), first // chunks
    x = look_up(like, rows, r, first - r * chunks, size, chunks, labels, weights, ignore_index, room)
    ahead = start_chunks(like, rows[4], size, room, ring, RING)
    room[4, lane] = x
    cuda.syncwarp()
    sum_chunks(like, rows[4], size, room, ring, RING, ahead, rank)
    if lane < size:
        at = parts + (first + lane) * PART_BYTES
        store(at, room[0, lane])
        store(at + 8, room[1, lane])
        store(at + 16, room[3, lane])
        store(at + 24, room[4, lane])


@kernel(32)
def _join_scores(items, parts, like, rows, labels, weights, ignore_index, logprob, lse, argmax, rank):
    """What is left to do after _part_scores, a warp a row."""
    room = cuda.shared.array((3, PARTS), types.float64)
    lane, r, chunks = np.int64(cuda.laneid), np.int64(cuda.blockIdx.x), (rows[5] + CHUNK - 1) // CHUNK
    address, y = row_of(like, rows, r, labels, weights, ignore_index)
    x = number(like, target_of(like, rows, address, y))
    if address == 0:
        if lane == 0:
            put(like, r, x, x, np.int64(-1), np.int64(-1), logprob, lse, argmax, rank)
        return
    parts += r * chunks * PART_BYTES
    s, c, key, larger = 0.0, -np.inf, np.int64(NO_KEY), 0.0
    for first in range(0, chunks, PARTS):
        count = np.int32(min(PARTS, chunks - first))
        for i in range(lane, count, 32):
            at = parts + (first + i) * PART_BYTES
            room[0, i], room[1, i] = load(0.0, at), load(0.0, at + 8)
            key, larger = max(key, key_of(load(0.0, at + 16), first + i)), larger + load(0.0, at + 24)
        s, c = join_parts(room, count, s, c)
    k, larger = chunk_of(warp_max(key)), warp_sum(larger)
    value, start = largest_found(like, rows, address, k, load(0.0, parts + k * PART_BYTES + 16))
    if lane == 0:
        put_score(like, r, s, c, x, y, value, larger, logprob, lse, argmax, rank)
    find_largest(like, rows, r, start, y, value, x, larger, argmax, rank)


@device
def put(like, r, value, row_lse, where, larger, logprob, lse, argmax, rank):
    """Write what _score found for row r."""
    size = item_size(compute_zero(like))
    store(logprob + r * size, value)
    store(lse + r * size, row_lse)
    store(argmax + r * 8, where)
    if rank != 0:
        store(rank + r * 8, larger)


@kernel(THREADS, 3, 3, 2)
def _entropy(items, like, rows, logprob, lse, argmax, entropy):
    """entropy[r] by what _score found: a team sums row r without its largest logit, twice a chunk."""
    room = cuda.shared.array((3, PARTS), types.float64)
    zero, size = compute_zero(like), item_size(compute_zero(like))
    r, warp, _ = team_of(rows[5])
    if r >= items:
        return
    where, row_lse = load(np.int64(0), argmax + r * 8), load(zero, lse + r * size)
    if where < 0:  # not looked at
        value = np.float64(load(zero, logprob + r * size))
    elif not -np.inf < row_lse < np.inf:
        value = np.nan
    else:
        address = row_address(rows, r)
        s, c, b = row_moments(like, rows, address, where, room)
        largest = np.float64(widen(load(like, address + where * class_stride(like, rows))))
        value = row_entropy(s, c, b, largest, item_size(like) == 8)
    if warp == 0 and cuda.laneid == 0:
        store(entropy + r * size, number(like, value))


def score_threads(like, classes):
    """threads_of for rows with room for half of their lanes; (0, _) where narrow_score would have too few threads."""
    if classes > NARROW:
        return 0, 0
    return threads_of(like, classes + max(1, 1 << (classes - 1).bit_length() >> 1))


def narrow_score(items, like, rows, labels, weights, ignore_index, logprob, lse, argmax, rank, entropy):
    """As score, for few classes."""
    threads, pitch = score_threads(like, rows[5])
    fields = (address(x) for x in (logprob, lse, argmax, rank, entropy))
    arguments = items, pitch, like, rows, operand(labels), operand(weights), ignore_index, *fields
    return launch(_narrow_score.of(like), -(-items // threads), threads, logprob, *arguments)


@kernel(256)
def _narrow_score(items, pitch, like, rows, labels, weights, ignore_index, logprob, lse, argmax, rank, entropy):
    """A thread takes a row from shared memory, where it has room for half of the lanes behind the row."""
    classes, thread = rows[5], np.int64(cuda.threadIdx.x)
    first = np.int64(cuda.blockIdx.x) * cuda.blockDim.x
    size = min(np.int64(cuda.blockDim.x), items - first)
    full, low = item_size(like) == 8, number(like, -np.inf)
    room_32, room_64 = cuda.shared.array(ROOM_32, types.float32), cuda.shared.array(ROOM_64, types.float64)
    room = room_of(like, room_32, room_64)
    bring_rows(like, rows, first, size, pitch, room)
    if thread < size:
        r, at, count = first + thread, place_of(thread, pitch), np.int32(classes)
        to, y, where, larger, value = np.int32(at + count), np.int64(-1), np.int32(-1), np.int32(-1), number(like, 0.0)
        if counts(r, labels, weights, ignore_index):
            y, value = label_at(labels, r), number(like, np.nan)
        row_lse, spread = value, value
        if 0 <= y < classes:
            target = room[at + y]
            room[at + y] = low
            s, c = few_sum(like, room, at, count, few_max(like, room, at, count), to)
            room[at + y] = target
            value, row_lse = logprob_and_lse(like, s, c, np.float64(target))
            largest, where, others = few_largest(like, room, at, count)
            if value != value:  # a row that is all -inf or holds +inf or NaN
                nan = few_nan(room, at, count)
                where = nan if nan >= 0 else where
                row_lse = largest if nan < 0 else number(like, np.nan)
            if rank != 0:
                larger = few_larger(room, at, count, target)
            if entropy != 0:
                spread = number(like, np.nan)
                if -np.inf < row_lse < np.inf:
                    room[np.uint64(at + where)] = low
                    s, c, b = few_moments(like, room, at, count, others, to)
                    spread = number(like, row_entropy(s, c, b, np.float64(largest), full))
        put(like, r, value, row_lse, np.int64(where), np.int64(larger), logprob, lse, argmax, rank)
        if entropy != 0:
            store(entropy + r * item_size(compute_zero(like)), spread)
