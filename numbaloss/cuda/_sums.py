"""Sums of exponentials of whole rows on CUDA, the first of a row's largest logits apart: u, the sum of exp(x - largest)
over the others, is small where a softmax is nearly 1. A first kernel for all that reads rows more than once: one that
does both takes twice the registers. What is known of a row goes to the addresses `lse`, the logarithms of the sums, and
`sums`, what load_sums gives, every `pitch` bytes; either may be 0. Rows that do not count are not looked at."""

import cupy
import numpy as np
from numba import types

from .._intrinsics import bits_float, float_bits
from .._scalar import CHUNK, others_to_target, target_loss
from .._typed import compute_zero, item_size, key_value, number
from ._chunks import chunk_sum, first_position, guess_after, warp_max
from ._launch import cuda, device, kept, kernel, launch, resident
from ._memory import RING, RING_ITEMS, anew, load, store
from ._operands import address, counts, operand
from ._rows import (
    PARTS,
    THREADS,
    class_stride,
    first_nan,
    join_few,
    join_parts,
    round_place,
    row_address,
    rows_from,
    rows_of_warps,
    score_row,
    team_of,
    teams,
    warps_for,
)
from ._stream import start_chunks, sum_apart, sum_chunks, thread_ring

SCORE_SHARED = RING + 5 * 32 * 8  # bytes of shared memory of a warp that sums in a stream and keeps largest logits too
SUMS = 32  # bytes that load_sums reads
NO_KEY = -0x8000000000000000  # below any of key_of


def sums_of_rows(items, like, rows, labels, weights, ignore_index, out):
    """A new array of what load_sums reads; `rows` by with_known_stride, `out` is an array on the device."""
    sums = kept(cupy.empty((items, SUMS // 8)))
    row_sums(items, like, rows, operand(labels), operand(weights), ignore_index, 0, address(sums), SUMS, out)
    return sums


def row_sums(items, like, rows, labels, weights, ignore_index, lse, sums, pitch, out):
    """`labels` and `weights` are operands."""
    factors, results, chunks = (labels, weights, ignore_index), (lse, sums, pitch), -(-rows[5] // CHUNK)
    if not streams(like, rows, CHUNK):  # one chunk stays in the caches
        return launch(_row_sums.of(like), *teams(items, rows[5]), out, items, like, rows, *factors, *results)
    most = resident(_stream_sums.of(like), out)
    blocks, group = rows_of_warps(items, chunks, most, 2)
    if group:
        rows_of_warp = items, group, chunks, 32 // chunks
        return launch(_stream_sums.of(like), blocks, 32, out, *rows_of_warp, like, rows, *factors, *results)
    parts, (blocks, group) = kept(cupy.empty((items * chunks, 3))), warps_for(items * chunks, 1, most)
    launch(_part_sums.of(like), blocks, 32, out, items * chunks, group, chunks, like, rows, *factors, address(parts))
    return launch(_join_part_sums.of(like), items, 32, out, items, address(parts), like, rows, *factors, *results)


def streams(like, rows, most):
    """Whether chunks of these rows can be copied ahead, and there are more than `most` classes."""
    return rows[5] > most and like.itemsize < 8 and type(rows[4]) is np.int32


@kernel(THREADS, 3, 3, 2)
def _row_sums(items, like, rows, labels, weights, ignore_index, lse, sums, pitch):
    """A team takes a row."""
    room = cuda.shared.array((3, PARTS), types.float64)
    r, warp, _ = team_of(rows[5])
    if r >= items or not counts(r, labels, weights, ignore_index):
        return
    address = row_address(rows, r)
    largest, where, u, log1p_u = leave_largest_out(like, rows, address, room)
    if log1p_u != log1p_u and first_nan(like, rows, address, room) >= 0:
        largest = number(like, np.nan)
    if warp == 0 and cuda.laneid == 0:
        put_sums(like, r, np.float64(largest), where, u, log1p_u, lse, sums, pitch)


@device
def leave_largest_out(like, rows, address, room):
    """(largest logit, its class, u, log(1 + u)), u the sum of exp(x - largest) over the others; an undefined row has a
    logarithm of NaN."""
    zero = compute_zero(like)
    s, c, largest, where, _ = score_row(like, rows, address, np.int64(-1), zero, False, room)
    x = np.float64(largest)
    full = item_size(like) == 8
    u = others_to_target(s, c, x, full)
    return largest, where, u, target_loss(u, s, c, x, full)


@device
def put_sums(like, r, largest, where, u, log1p_u, lse, sums, pitch):
    """Write what is known of row r. An undefined one has a log1p_u of NaN, and for `lse` its largest logit."""
    if lse != 0:
        value = largest if log1p_u != log1p_u else largest + log1p_u
        store(lse + r * item_size(compute_zero(like)), number(like, value))
    if sums != 0:
        at = sums + r * pitch
        store(at, largest)
        store(at + 8, u)
        store(at + 16, log1p_u)
        store(at + 24, where)


@device
def load_sums(like, at):
    """(largest logit, its class, u, log(1 + u)) of the row with its sums at this address."""
    return number(like, load(0.0, at)), load(np.int64(0), at + 24), load(0.0, at + 8), load(0.0, at + 16)


@kernel(32, 16, 16, 8, shared=SCORE_SHARED)
def _stream_sums(items, group, chunks, at_once, like, rows, labels, weights, ignore_index, lse, sums, pitch):
    """As _row_sums for rows of up to 32 chunks, classes side by side, by warps of their own, as in _sparse_xent: with
    the sum of a chunk comes its largest logit, and the chunk that holds a row's is summed once more, without it; then
    thread i finishes row i."""
    room, lane = cuda.shared.array((5, 32), types.float64), np.int32(cuda.laneid)
    ring = thread_ring(cuda.shared.array(RING_ITEMS, types.float64, 16), 0, RING)
    done = np.int64(0)
    while done < group:
        first, size = rows_from(done, group, items, at_once)
        prepare(like, rows, first, np.int64(0), size * chunks, chunks, labels, weights, ignore_index, room)
        ahead = start_chunks(like, rows[4], np.int32(size * chunks), room, ring, RING)
        sum_chunks(like, rows[4], np.int32(size * chunks), room, ring, RING, ahead, np.int64(0))
        done = anew(done)
        first, size = rows_from(done, group, items, at_once)
        for k in range(size):
            if counts(first + k, labels, weights, ignore_index):
                leave_out(like, rows, first + k, np.int32(k * chunks), chunks, room)
        sum_apart(like, class_stride(like, rows), np.int32(size * chunks), room, ring, RING, None, None)
        if lane < size and counts(first + lane, labels, weights, ignore_index):
            i = np.int32(lane * chunks)
            s, c = join_few(room, i, np.int32(i + chunks))
            u = others_to_target(s, c, room[4, i], False)
            log1p_u = target_loss(u, s, c, room[4, i], False)
            put_sums(like, first + lane, room[4, i], float_bits(room[3, i]), u, log1p_u, lse, sums, pitch)
        cuda.syncwarp()
        done += at_once


@device
def prepare(like, rows, r, k, size, chunks, labels, weights, ignore_index, room):
    """room[:4, i] of this warp = (address, no class to skip, classes, 0) of the i-th chunk from chunk k of row r on."""
    i = np.int32(cuda.laneid)
    if i < size:
        k += i
        while k >= chunks:  # up to 16 times
            r, k = r + 1, k - chunks
        address = np.int64(0)
        if counts(r, labels, weights, ignore_index):
            address = row_address(rows, r) + k * CHUNK * class_stride(like, rows)
        room[0, i], room[1, i] = bits_float(address), bits_float(np.int64(-1))
        room[2, i], room[3, i] = bits_float(min(np.int64(CHUNK), rows[5] - k * CHUNK)), 0.0
    cuda.syncwarp()


@device
def leave_out(like, rows, r, i, chunks, room):
    """Makes a chunk to sum of that which holds the first of row r's largest logits, without it. The row's chunks are at
    i, i + 1, ... of the room, as put_scores left them; its class and the logit go to room[3:, i]."""
    key, address = np.int64(NO_KEY), row_address(rows, r)
    if cuda.laneid < chunks:
        key = key_of(room[3, i + cuda.laneid], np.int64(cuda.laneid))
    k = np.int32(chunk_of(warp_max(key)))
    begin = np.int64(k) * CHUNK
    largest, start = largest_found(like, rows, address, k, room[3, i + k])
    where = round_place(like, rows, address, start, largest)
    cuda.syncwarp()
    if cuda.laneid == 0:
        room[3, i], room[4, i] = bits_float(where), np.float64(largest)
        room[0, i + k] = bits_float(address + begin * class_stride(like, rows))
        room[1, i + k], room[2, i + k] = bits_float(where - begin), bits_float(min(np.int64(CHUNK), rows[5] - begin))
    cuda.syncwarp()


@device
def key_of(found, k):
    """Of chunk k, by what put_scores left of it: larger for a larger largest logit, and for the first of equal ones."""
    return float_bits(found) >> 32 << 24 | np.int64(0xFFFFFF - k)


@device
def chunk_of(key):
    return 0xFFFFFF - (key & 0xFFFFFF)


@device
def largest_found(like, rows, address, k, found):
    """(largest logit of chunk k, class where a round begins that holds it first), by what put_scores left of it."""
    place = (float_bits(found) & 0xFFFFFFFF) - first_position(like, address, class_stride(like, rows))[1]
    return key_value(compute_zero(like), np.int32(float_bits(found) >> 32)), k * CHUNK + max(place, np.int64(0))


@kernel(32, 16, 16, 8, shared=SCORE_SHARED)
def _part_sums(items, group, chunks, like, rows, labels, weights, ignore_index, parts):
    """Few rows, or more chunks than 32: as _stream_sums, but for `group` chunks, of one row or of several. parts[i] =
    (s, c, what put_scores left) of chunk i."""
    room, lane = cuda.shared.array((5, 32), types.float64), np.int32(cuda.laneid)
    ring = thread_ring(cuda.shared.array(RING_ITEMS, types.float64, 16), 0, RING)
    first = np.int64(cuda.blockIdx.x) * group
    size, r = np.int32(min(group, items - first)), first // chunks
    prepare(like, rows, r, first - r * chunks, size, chunks, labels, weights, ignore_index, room)
    ahead = start_chunks(like, rows[4], size, room, ring, RING)
    sum_chunks(like, rows[4], size, room, ring, RING, ahead, np.int64(0))
    if lane < size:
        at = parts + (first + lane) * 24
        store(at, room[0, lane])
        store(at + 8, room[1, lane])
        store(at + 16, room[3, lane])


@kernel(32)
def _join_part_sums(items, parts, like, rows, labels, weights, ignore_index, lse, sums, pitch):
    """What is left to do after _part_sums, a warp a row."""
    room = cuda.shared.array((3, PARTS), types.float64)
    lane, r, stride = np.int64(cuda.laneid), np.int64(cuda.blockIdx.x), class_stride(like, rows)
    if not counts(r, labels, weights, ignore_index):
        return
    chunks, key, address = (rows[5] + CHUNK - 1) // CHUNK, np.int64(NO_KEY), row_address(rows, r)
    parts += r * chunks * 24
    for k in range(lane, chunks, 32):
        key = max(key, key_of(load(0.0, parts + k * 24 + 16), k))
    apart = chunk_of(warp_max(key))
    begin, found = apart * CHUNK, load(0.0, parts + apart * 24 + 16)
    largest, start = largest_found(like, rows, address, apart, found)
    where = round_place(like, rows, address, start, largest)
    classes, guess = min(np.int64(CHUNK), rows[5] - begin), guess_after(load(0.0, parts + apart * 24 + 8))
    others = chunk_sum(like, address + begin * stride, stride, classes, where - begin, guess)
    s, c = 0.0, -np.inf
    for first in range(0, chunks, PARTS):
        count = np.int32(min(PARTS, chunks - first))
        for i in range(lane, count, 32):
            room[0, i], room[1, i] = load(0.0, parts + (first + i) * 24), load(0.0, parts + (first + i) * 24 + 8)
            if first + i == apart:
                room[0, i], room[1, i] = others
        s, c = join_parts(room, count, s, c)
    if lane == 0:
        x = np.float64(largest)
        u = others_to_target(s, c, x, False)
        put_sums(like, r, x, where, u, target_loss(u, s, c, x, False), lse, sums, pitch)
