"""Softmax family on CUDA. A row is a warp's if it is one chunk, else a block's; one of few classes is a thread's.

The function of each name plans, turns arrays into integers and launches the kernel of that name; `work` is the number
of logits, `items` that of rows. Kernels return nothing: where the CPU's count labels out of range, these give 0.
"""

import cupy
import numpy as np
from numba import types
from numba.extending import overload

from .._check import NO_LABEL
from .._intrinsics import bits_float, float_bits, select
from .._scalar import CHUNK, LANES, others_of, others_to_target, scale_of, target_loss, top_of
from .._typed import compute_zero, grad_frame, grad_of, item_size, number, row_frame, softmax_frame, softmax_of
from ._chunks import WARP, first_position, load_step, round_sum
from ._columns import (
    NARROW,
    ROOM_32,
    ROOM_64,
    bring_rows,
    few_largest,
    few_max,
    few_nan,
    few_sum,
    inverse_of,
    place_of,
    room_of,
    row_before,
    take_rows,
    threads_of,
)
from ._gradients import TASKS, TEAM, fill_row, row_sum, team_for, write_grad
from ._launch import cuda, device, kept, kernel, launch, resident
from ._memory import (
    GRAD_RING,
    RING,
    RING_ITEMS,
    anew,
    load,
    store,
    store_item,
    store_part,
    thread_anew,
)
from ._operands import address, counts, label_at, operand, with_known_stride
from ._rows import (
    PARTS,
    TEAMS,
    THREADS,
    class_stride,
    join_few,
    join_parts,
    look_up,
    row_address,
    row_of,
    rows_from,
    rows_of_warps,
    target_of,
    team_of,
    teams,
    warps_for,
)
from ._scores import score as score
from ._stream import start_chunks, sum_chunks, thread_ring
from ._sums import SUMS, load_sums, row_sums, sums_of_rows

SPREAD = 2 * CHUNK  # positions of a long row that a block writes
STREAM_SHARED = RING + 4 * 32 * 8  # bytes of shared memory of a warp that sums chunks in a stream
NOTE = 7  # numbers that a warp which writes gradients keeps of its row
GRAD_SHARED = (3 * PARTS + TEAM * (3 * TASKS + NOTE)) * 8  # bytes of shared memory of its block beside the rings


def round_team(like, rows):
    """How many threads read a row of at most 1024 classes at once, 32 each; 0 for rows of more."""
    base, _, outer_stride, inner_stride, stride, classes = rows
    aligned = stride != like.itemsize or (base | outer_stride | inner_stride) % 16 == 0
    needed = classes if aligned else classes + 16 // like.itemsize - 1
    return 8 if needed <= 256 else 16 if needed <= 512 else 32 if needed <= 1024 else 0


TEAM_TYPES = {8: np.int16, 16: np.uint16, 32: np.int32}  # by which the compiler knows the number


def known_team(team):
    """The number of round_team, as an int32."""
    return np.int32(team)


@overload(known_team)
def _known_team(team):
    number = {types.int16: np.int32(8), types.uint16: np.int32(16), types.int32: np.int32(32)}[team]
    return lambda team: number


@device
def loss_of(like, s, c, x):
    """The loss of a target whose logit is x, the others summing to s * e^c, as it is stored."""
    full = item_size(like) == 8
    return number(like, target_loss(others_to_target(s, c, x, full), s, c, x, full))


# -- sparse labels -----------------------------------------------------------------------------------------------


def sparse_xent(work, items, like, rows, labels, weights, ignore_index, loss):
    """loss[r] = -log softmax(row r)[labels[r]]; 0 for a row that does not count; NaN for a label out of range."""
    rows = with_known_stride(like, rows)
    arguments = like, rows, operand(labels), operand(weights), ignore_index
    team, chunks = round_team(like, rows), -(-rows[5] // CHUNK)
    if team:
        blocks, group = warps_for(items, 1, resident(_short_sparse_xent.of(like), loss), 32 // team)
        rows_of_warp = items, group, TEAM_TYPES[team](team)
        return launch(_short_sparse_xent.of(like), blocks, 32, loss, *rows_of_warp, *arguments, address(loss))
    most = resident(_sparse_xent.of(like), loss)
    blocks, group = rows_of_warps(items, chunks, most)
    if group:
        rows_of_warp = items, group, chunks, 32 // chunks
        return launch(_sparse_xent.of(like), blocks, 32, loss, *rows_of_warp, *arguments, address(loss))
    more_blocks, parts_each = warps_for(items * chunks, 1, most)
    parts, chunks_of_warp = kept(cupy.empty((items * chunks, 2))), (items * chunks, parts_each, chunks)
    launch(_chunk_sums.of(like), more_blocks, 32, loss, *chunks_of_warp, *arguments, address(parts))
    return launch(_join_sums.of(like), items, 32, loss, items, address(parts), *arguments, address(loss))


@device
def finish(like, loss, first, size, chunks, room):
    """loss[first + i] from room[:, i * chunks] ... of this warp = (s, c, ..., target), a thread a row."""
    cuda.syncwarp()
    if cuda.laneid < size:
        i = np.int32(cuda.laneid * chunks)
        s, c = room[0, i], room[1, i]
        if chunks > 1:
            s, c = join_few(room, i, np.int32(i + chunks))
        store(loss + (first + cuda.laneid) * item_size(compute_zero(like)), loss_of(like, s, c, room[3, i]))
    cuda.syncwarp()


@kernel(32, 32, 32, 8)
def _short_sparse_xent(items, group, team, like, rows, labels, weights, ignore_index, loss):
    """Rows of one round: thread i looks up label and target of row i, `team` threads sum a row at once, so that the
    warp sums 32 / team of its `group` rows at a time; then thread i takes the logarithm for row i."""
    room = cuda.shared.array((4, 32), types.float64)
    team, first = known_team(team), np.int64(cuda.blockIdx.x) * group
    size = np.int32(min(group, items - first))
    x = look_up(like, rows, first, np.int64(0), size, np.int64(1), labels, weights, ignore_index, room)
    room[3, cuda.laneid] = x
    at_once, i, done = np.int32(np.int32(32) // team), np.int32(np.int32(cuda.laneid) // team), np.int32(0)
    while done < size:
        address, y, classes = np.int64(0), np.int32(-1), np.int32(0)
        if i < size:
            address, y = float_bits(room[0, np.uint64(i)]), np.int32(float_bits(room[1, np.uint64(i)]))
        if address != 0:
            classes = np.int32(rows[5])
        s, largest = round_sum(like, address, class_stride(like, rows), classes, y, team)
        cuda.syncwarp()
        if i < size and cuda.laneid & (team - 1) == 0:
            room[0, np.uint64(i)], room[1, np.uint64(i)] = s, np.float64(largest)
        i, done = np.int32(i + at_once), np.int32(done + at_once)
    cuda.syncwarp()
    if cuda.laneid < size:
        room[1, cuda.laneid] = row_frame(number(like, room[1, cuda.laneid]))[3]
    finish(like, loss, first, size, 1, room)


@kernel(32, 16, 16, 8, shared=STREAM_SHARED)
def _sparse_xent(items, group, chunks, at_once, like, rows, labels, weights, ignore_index, loss):
    """A warp takes `group` rows of up to 32 chunks: it looks up those of `at_once` rows, 32 at most, sums one after the
    other, and then each of its threads joins the chunks of a row and takes the logarithm."""
    room = cuda.shared.array((4, 32), types.float64)
    ring = thread_ring(cuda.shared.array(RING_ITEMS, types.float64, 16), 0, RING)
    done = np.int64(0)
    while done < group:
        first, size = rows_from(done, group, items, at_once)
        x = look_up(like, rows, first, np.int64(0), size * chunks, chunks, labels, weights, ignore_index, room)
        ahead = start_chunks(like, rows[4], np.int32(size * chunks), room, ring, RING)
        room[3, cuda.laneid] = x  # which the copies did not wait for
        sum_chunks(like, rows[4], np.int32(size * chunks), room, ring, RING, ahead, None)
        done = anew(done)
        first, size = rows_from(done, group, items, at_once)
        finish(like, loss, first, size, chunks, room)
        done += at_once


@kernel(32, 16, 16, 8, shared=STREAM_SHARED)
def _chunk_sums(items, group, chunks, like, rows, labels, weights, ignore_index, parts):
    """Rows of many chunks: as _sparse_xent, but for `group` chunks, of one row or of several."""
    room = cuda.shared.array((4, 32), types.float64)
    ring = thread_ring(cuda.shared.array(RING_ITEMS, types.float64, 16), 0, RING)
    first = np.int64(cuda.blockIdx.x) * group
    size, r = np.int32(min(group, items - first)), first // chunks
    look_up(like, rows, r, first - r * chunks, size, chunks, labels, weights, ignore_index, room)
    sum_chunks(like, rows[4], size, room, ring, RING, start_chunks(like, rows[4], size, room, ring, RING), None)
    if cuda.laneid < size:
        at, i = parts + (first + cuda.laneid) * 16, np.int32(cuda.laneid)
        store(at, room[0, i])
        store(at + 8, room[1, i])


@kernel(32)
def _join_sums(items, parts, like, rows, labels, weights, ignore_index, loss):
    """What is left to do after _chunk_sums, a warp a row."""
    room = cuda.shared.array((3, PARTS), types.float64)
    lane, r = np.int64(cuda.laneid), np.int64(cuda.blockIdx.x)
    chunks = (rows[5] + CHUNK - 1) // CHUNK
    address, y = row_of(like, rows, r, labels, weights, ignore_index)
    x = target_of(like, rows, address, y)
    s, c = 0.0, -np.inf
    if address != 0:
        for first in range(0, chunks, PARTS):
            count = np.int32(min(PARTS, chunks - first))
            for k in range(lane, count, 32):
                room[0, k] = load(0.0, parts + (r * chunks + first + k) * 16)
                room[1, k] = load(0.0, parts + (r * chunks + first + k) * 16 + 8)
            s, c = join_parts(room, count, s, c)
    if lane == 0:
        store(loss + r * item_size(compute_zero(like)), loss_of(like, s, c, x))


# -- gradients ---------------------------------------------------------------------------------------------------


def sparse_xent_grad(work, items, like, rows, labels, weights, ignore_index, scale, loss, like_grad, grad_rows):
    """As sparse_xent, and row r of `grad_rows` = d(scale[r] * loss[r]) / d(row r), which may be the logits' memory."""
    rows, grad_rows = with_known_stride(like, rows), with_known_stride(like_grad, grad_rows)
    arguments = operand(labels), operand(weights), ignore_index, address(scale), address(loss), like_grad, grad_rows
    most = resident(_sparse_xent_grad.of(like), loss) * TEAM
    blocks, threads = teams(items, rows[5], team_for(items, rows[5], most))
    return launch(_sparse_xent_grad.of(like), blocks, threads, loss, items, like, rows, *arguments)


@device
def frame_of(zero, like_grad, s, c, x, scale):
    return grad_frame(zero, like_grad, top_of(c, x), others_of(s, c, x), scale_of(s, c, x, scale))


@kernel(32 * TEAM, 2, 2, 1, room=GRAD_RING, shared=GRAD_SHARED)
def _sparse_xent_grad(items, like, rows, labels, weights, ignore_index, scale, loss, like_grad, grad_rows):
    """A team sums a row, reads it again, the last rounds first, which its warps' rings still hold, and writes its
    gradient; one thread writes the loss and the target's entry."""
    room, tasks = cuda.shared.array((3, PARTS), types.float64), cuda.shared.array((TEAM, 3, TASKS), types.float64)
    ring = cuda.shared.array(0, types.float64, 16)
    notes, mine = cuda.shared.array((TEAM, NOTE), types.float64), np.int32(thread_anew() >> 5)
    note = notes[mine]  # (address, label, target, row, ..., entry, scale) of a warp's row: registers are for the sum
    r, _, _ = team_of(rows[5])
    if r >= items:
        return
    g = load(0.0, scale + r * 8)
    address, y = row_of(like, rows, r, labels, weights, ignore_index)
    zero = compute_zero(like)
    if cuda.laneid == 0:
        note[0], note[1], note[3], note[6] = bits_float(address), bits_float(y), bits_float(r), g
        note[2] = np.nan if y == 0 else 0.0  # where the address is 0: see row_of
    cuda.syncwarp()
    s, c = 0.0, -np.inf
    if address != 0:
        s, c = row_sum(
            like, rows, notes, room, tasks[mine], thread_ring(ring, thread_anew() >> 5, GRAD_RING), GRAD_RING
        )
    note = notes[thread_anew() >> 5]
    address, x, r = float_bits(note[0]), note[2], float_bits(note[3])
    m, low, shift, factor, entry = grad_frame(zero, like_grad, 0.0, 0.0, 0.0)
    if address != 0:
        m, low, shift, factor, entry = frame_of(zero, like_grad, s, c, x, note[6])
    _, warp, _ = team_of(rows[5])
    if warp == 0 and cuda.laneid == 0:
        note[5] = np.float64(entry)
        store(loss + r * item_size(zero), loss_of(like, s, c, x) if address != 0 else number(like, x))
    if address == 0:
        fill_row(like, rows, r, like_grad, grad_rows, number(like, x))
    else:
        write_grad(
            like,
            rows,
            rows[4],
            r,
            address,
            like_grad,
            grad_rows,
            m,
            low,
            shift,
            factor,
            thread_ring(ring, thread_anew() >> 5, GRAD_RING),
        )
    note = notes[thread_anew() >> 5]
    if float_bits(note[0]) != 0:
        _, warp, warps = team_of(rows[5])
        if warps > 1:
            cuda.syncthreads()
        cuda.syncwarp()
        if warp == 0 and cuda.laneid == 0:
            to = row_address(grad_rows, float_bits(note[3])) + float_bits(note[1]) * class_stride(like_grad, grad_rows)
            store_item(like_grad, to, number(like, note[5]))


# -- few classes -------------------------------------------------------------------------------------------------


def narrow_sparse_xent(work, items, like, rows, labels, weights, ignore_index, loss):
    """As sparse_xent, for up to NARROW classes."""
    threads, pitch = threads_of(like, rows[5])
    arguments = like, rows, operand(labels), operand(weights), ignore_index, address(loss)
    return launch(_narrow_sparse_xent.of(like), -(-items // threads), threads, loss, items, pitch, *arguments)


@kernel(256)
def _narrow_sparse_xent(items, pitch, like, rows, labels, weights, ignore_index, loss):
    """A block brings its rows to shared memory, a thread takes a row from there."""
    classes, thread = rows[5], np.int64(cuda.threadIdx.x)
    first = np.int64(cuda.blockIdx.x) * cuda.blockDim.x
    size = min(np.int64(cuda.blockDim.x), items - first)
    room_32, room_64 = cuda.shared.array(ROOM_32, types.float32), cuda.shared.array(ROOM_64, types.float64)
    room = room_of(like, room_32, room_64)
    bring_rows(like, rows, first, size, pitch, room)
    if thread < size:
        r, at = first + thread, place_of(thread, pitch)
        s, c, x = 0.0, -np.inf, 0.0
        if counts(r, labels, weights, ignore_index):
            y = label_at(labels, r)
            x = np.nan
            if 0 <= y < classes:
                x = np.float64(room[at + y])
                room[at + y] = number(like, -np.inf)
                s, c = few_sum(like, room, at, np.int32(classes), few_max(like, room, at, np.int32(classes)), at)
        store(loss + r * item_size(compute_zero(like)), loss_of(like, s, c, x))


def narrow_sparse_xent_grad(work, items, like, rows, labels, weights, ignore_index, scale, loss, like_grad, grad_rows):
    """As sparse_xent_grad, for up to NARROW classes."""
    threads, pitch = threads_of(like, rows[5])
    arguments = operand(labels), operand(weights), ignore_index, address(scale), address(loss), like_grad, grad_rows
    blocks = -(-items // threads)
    return launch(_narrow_sparse_xent_grad.of(like), blocks, threads, loss, items, pitch, like, rows, *arguments)


@kernel(256)
def _narrow_sparse_xent_grad(
    items, pitch, like, rows, labels, weights, ignore_index, scale, loss, like_grad, grad_rows
):
    """A thread takes a row from shared memory, then from there again; the block writes the gradients side by side."""
    classes, thread = rows[5], np.int64(cuda.threadIdx.x)
    first = np.int64(cuda.blockIdx.x) * cuda.blockDim.x
    size = min(np.int64(cuda.blockDim.x), items - first)
    room_32, room_64 = cuda.shared.array(ROOM_32, types.float32), cuda.shared.array(ROOM_64, types.float64)
    room = room_of(like, room_32, room_64)
    bring_rows(like, rows, first, size, pitch, room)
    r, at, zero, looked_at = first + thread, place_of(thread, pitch), compute_zero(like), False
    y, s, c, x, g = np.int64(-1), 0.0, -np.inf, 0.0, 0.0
    if thread < size:
        looked_at = counts(r, labels, weights, ignore_index)
        if looked_at:
            y, x, g = label_at(labels, r), np.nan, load(0.0, scale + r * 8)
            if 0 <= y < classes:
                x = np.float64(room[at + y])
                room[at + y] = number(like, -np.inf)
                s, c = few_sum(like, room, at, np.int32(classes), few_max(like, room, at, np.int32(classes)), at)
        store(loss + r * item_size(zero), loss_of(like, s, c, x))
    m, low, shift, factor, entry = frame_of(zero, like_grad, s, c, x, g)
    cuda.syncthreads()
    bring_rows(like, rows, first, size, pitch, room)
    if thread < size:
        k, end = at, np.int32(at + classes)
        while k < end:
            g = grad_of(room[np.uint64(k)] - shift, m, low, factor)
            room[np.uint64(k)] = select(looked_at, g, zero)
            k = np.int32(k + 1)
        if 0 <= y < classes:
            room[at + y] = entry
    cuda.syncthreads()
    k, count, inverse = np.int32(thread), np.int32(classes), inverse_of(classes)
    while k < size * classes:
        i = row_before(k, inverse)
        j = np.int32(k - i * count)
        at = row_address(grad_rows, first + i) + j * grad_rows[4]
        store_item(like_grad, at, room[np.uint64(place_of(i, pitch) + j)])
        k = np.int32(k + cuda.blockDim.x)


def narrow_normalize(work, items, like, rows, logarithm, out):
    """As normalize, for up to NARROW classes."""
    threads, pitch = threads_of(like, rows[5])
    arguments = items, pitch, like, rows, int(logarithm), address(out)
    return launch(_narrow_normalize.of(like), -(-items // threads), threads, out, *arguments)


@kernel(256)
def _narrow_normalize(items, pitch, like, rows, logarithm, out):
    """A thread takes a row from shared memory, then from there again; the block writes the results side by side."""
    classes, thread = rows[5], np.int64(cuda.threadIdx.x)
    first = np.int64(cuda.blockIdx.x) * cuda.blockDim.x
    size = min(np.int64(cuda.blockDim.x), items - first)
    full = item_size(like) == 8
    room_32, room_64 = cuda.shared.array(ROOM_32, types.float32), cuda.shared.array(ROOM_64, types.float64)
    room = room_of(like, room_32, room_64)
    bring_rows(like, rows, first, size, pitch, room)
    at, count, largest, u, log1p_u = place_of(thread, pitch), np.int32(classes), number(like, -np.inf), 0.0, 0.0
    if thread < size:
        largest, where, others = few_largest(like, room, at, count)
        room[np.uint64(at + where)] = number(like, -np.inf)
        s, c = few_sum(like, room, at, count, others, at)
        x = np.float64(largest)
        u = others_to_target(s, c, x, full)
        log1p_u = target_loss(u, s, c, x, full)
    cuda.syncthreads()
    bring_rows(like, rows, first, size, pitch, room)
    if thread < size:
        loss = number(like, log1p_u)
        m, low, shift, scale, top = softmax_frame(largest, u, loss)
        k, end = at, np.int32(at + count)
        while k < end:
            x = room[np.uint64(k)]
            value = (x - largest) - loss if logarithm else softmax_of(x, largest, m, low, shift, scale, top)
            room[np.uint64(k)] = value
            k = np.int32(k + 1)
    cuda.syncthreads()
    take_rows(like, size, classes, pitch, room, out + first * classes * item_size(compute_zero(like)))


def narrow_logsumexp(items, like, rows, lse):
    """As logsumexp, for up to NARROW classes."""
    threads, pitch = threads_of(like, rows[5])
    arguments = items, pitch, like, rows, address(lse)
    return launch(_narrow_logsumexp.of(like), -(-items // threads), threads, lse, *arguments)


@kernel(256)
def _narrow_logsumexp(items, pitch, like, rows, lse):
    """A thread takes a row from shared memory."""
    classes, thread = rows[5], np.int64(cuda.threadIdx.x)
    first = np.int64(cuda.blockIdx.x) * cuda.blockDim.x
    size = min(np.int64(cuda.blockDim.x), items - first)
    full = item_size(like) == 8
    room_32, room_64 = cuda.shared.array(ROOM_32, types.float32), cuda.shared.array(ROOM_64, types.float64)
    room = room_of(like, room_32, room_64)
    bring_rows(like, rows, first, size, pitch, room)
    if thread < size:
        at, count = place_of(thread, pitch), np.int32(classes)
        largest, where, others = few_largest(like, room, at, count)
        nan = few_nan(room, at, count)
        room[np.uint64(at + where)] = number(like, -np.inf)
        s, c = few_sum(like, room, at, count, others, at)
        x = np.float64(largest + compute_zero(like))  # 0 for -0
        log1p_u = target_loss(others_to_target(s, c, x, full), s, c, x, full)
        value = x + log1p_u
        if log1p_u != log1p_u:
            value = np.nan if nan >= 0 else x
        store(lse + (first + thread) * item_size(compute_zero(like)), number(like, value))


# -- logsumexp, softmax -------------------------------------------------------------------------------------------


def logsumexp(work, items, like, rows, lse):
    """lse[r] = log(sum(exp(row r)))."""
    if rows[5] <= NARROW:
        return narrow_logsumexp(items, like, rows, lse)
    return row_sums(
        items, like, with_known_stride(like, rows), operand(None), operand(None), NO_LABEL, address(lse), 0, 0, lse
    )


def normalize(work, items, like, rows, logarithm, out):
    """out[r] = softmax of row r, or its logarithm."""
    rows = with_known_stride(like, rows)
    sums = sums_of_rows(items, like, rows, None, None, NO_LABEL, out)
    blocks, tiles = -(-items // TEAMS), 0
    if rows[5] > CHUNK:
        tiles = -(-(rows[5] + 16 // like.itemsize - 1) // SPREAD)  # unaligned rows may end in one more
        blocks = items * tiles
    arguments = items, tiles, like, rows, int(logarithm), address(sums), address(out)
    return launch(_normalize.of(like), blocks, THREADS, out, *arguments)


@kernel(THREADS, 5, 5, 2)
def _normalize(items, tiles, like, rows, logarithm, sums, out):
    """A warp reads a row of one chunk and writes it side by side, or a block such a part of a longer one."""
    stride, classes, zero = class_stride(like, rows), rows[5], compute_zero(like)
    block, warp, first, start, step = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x >> 5), 0, 0, LANES
    r = block * TEAMS + warp
    if tiles > 0:
        r = block // tiles
        first, start, step = warp * LANES, (block - r * tiles) * SPREAD, TEAMS * LANES
    if r >= items:
        return
    address = row_address(rows, r)
    largest, _, u, log1p_u = load_sums(like, sums + r * SUMS)
    loss = number(like, log1p_u)
    frame = softmax_frame(largest, u, loss)
    base, begin = first_position(like, address, stride)
    end = begin + classes
    p, stop = start + first, min(end, start + SPREAD)
    while p < stop:
        near = np.int32(min(end - p, np.int64(LANES)))  # as in _sparse_xent_grad
        before = np.int32(begin) if p == 0 else np.int32(0)
        position = np.int32(cuda.laneid * (16 // item_size(like)))
        to = out + (r * classes + p - begin + position) * item_size(zero)
        x = load_step(like, base + p * stride, stride, np.int32(0), before, near, np.int32(-1), WARP)
        v = normalized(x, largest, loss, logarithm, frame)
        store_part(like, zero, to, np.int64(item_size(zero)), position, before, near, v)
        p += step


@device
def normalized(x, largest, loss, logarithm, frame):
    """Entries of a softmax with this frame, or their logarithms."""
    if logarithm:
        return (x - largest) - loss
    m, low, shift, scale, top = frame
    return softmax_of(x, largest, m, low, shift, scale, top)
