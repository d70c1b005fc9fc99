"""Softmax family on the CPU. Every kernel is a loop over rows; `like` and `rows` are described in _chunks."""

import numpy as np
from numba import prange, types
from numba.extending import overload

from .._intrinsics import select
from .._scalar import (
    CHUNK,
    LANES,
    merge,
    others_of,
    others_to_target,
    row_entropy,
    scale_of,
    target_loss,
    target_lse,
    top_of,
)
from .._typed import compute_zero, grad_frame, grad_of, item_size, number, softmax_frame, softmax_of, widen
from .._vector import WIDTH
from ._chunks import NO_GUESS, chunk_sum
from ._columns import BAD, NOT_COUNTED, group_of, load_columns, new_columns, sum_columns, sum_pairs, take_targets
from ._launch import Kernel
from ._memory import (
    TILE_BYTES,
    copy,
    fill,
    gather,
    inner,
    load,
    load_up_to,
    out_of_line,
    prefetch,
    span,
    stack,
    store_as,
    store_item,
    store_pair,
    transpose,
    write,
)
from ._rows import (
    counts,
    fill_row,
    first_nan,
    leave_largest_out,
    row_address,
    row_max,
    row_moments,
    row_rank,
    row_sum,
    scatter,
    write_tile,
)

GROUP = 64  # rows that are finished together, so that log1p runs in vector lanes
NARROW = 256  # classes up to which rows go side by side into the vector lanes
SPLIT = 64  # with fewer rows than this, the chunks of a row go to different threads


@inner
def finish(s, c, x, u, loss):
    """The losses of up to GROUP rows: one loop for the exponential and one for the logarithm are faster than one."""
    out_of_line()
    full = loss.itemsize == 8
    for i in range(np.uint64(loss.size)):
        u[i] = others_to_target(s[i], c[i], x[i], full)
    for i in range(np.uint64(loss.size)):
        loss[i] = target_loss(u[i], s[i], c[i], x[i], full)


# -- kernels -----------------------------------------------------------------------------------------------------


def sparse_xent(work, items, like, rows, labels, weights, ignore_index, loss):
    """loss[r] = -log softmax(row r)[labels[r]]; 0 for a row that does not count; NaN for a label out of range. Returns
    the number of labels out of range."""
    arguments, chunks = (like, rows, labels, weights, ignore_index), -(-rows[5] // CHUNK)
    if items >= SPLIT or chunks == 1:
        return _sparse_xent_kernel(work, items, *arguments, loss)
    parts = np.empty((items * chunks, 2))
    _chunk_sums_kernel(work, len(parts), *arguments, parts)
    return _join_sums_kernel(items, items, parts, *arguments, loss)


def _sparse_xent(blocks, like, rows, labels, weights, ignore_index, loss):
    """GROUP rows are summed one after the other and finished together."""
    stride, classes = rows[4], rows[5]
    n = loss.size
    bad = np.zeros(blocks, np.int64)
    for block in prange(blocks):
        lanes, spare = stack(TILE_BYTES), stack(TILE_BYTES)
        s, c, x, u = np.empty(GROUP), np.empty(GROUP), np.empty(GROUP), np.empty(GROUP)
        for first in range(block * n // blocks, (block + 1) * n // blocks, GROUP):
            size = min(GROUP, (block + 1) * n // blocks - first)
            for i in range(size):
                y = labels[first + i]
                s[i], c[i], x[i] = 0.0, -np.inf, 0.0
                if counts(first + i, labels, weights, ignore_index):
                    if 0 <= y < classes:
                        address = row_address(rows, first + i)
                        s[i], c[i] = row_sum(like, rows, address, y, lanes, spare)
                        x[i] = widen(span(like, address + y * stride, 1)[0])
                    else:
                        x[i] = np.nan
                        bad[block] += 1
            finish(s, c, x, u, loss[first : first + size])
    return bad.sum()


_sparse_xent_kernel = Kernel(_sparse_xent)


def _chunk_sums(blocks, like, rows, labels, weights, ignore_index, parts):
    """parts[r * chunks + k] = (s, c) of chunk k of row r but for its target, if the row counts and has one."""
    stride, classes = rows[4], rows[5]
    n, chunks = len(parts), (classes + CHUNK - 1) // CHUNK
    for block in prange(blocks):
        lanes, spare = stack(TILE_BYTES), stack(TILE_BYTES)
        for task in range(block * n // blocks, (block + 1) * n // blocks):
            r, begin = task // chunks, task % chunks * CHUNK
            if counts(r, labels, weights, ignore_index) and 0 <= labels[r] < classes:
                address, size = row_address(rows, r) + begin * stride, min(CHUNK, classes - begin)
                s, c = chunk_sum(like, address, stride, size, labels[r] - begin, NO_GUESS, lanes, spare)
                parts[task, 0], parts[task, 1] = s, c


_chunk_sums_kernel = Kernel(_chunk_sums)


def _join_sums(blocks, parts, like, rows, labels, weights, ignore_index, loss):
    """What is left to do after _chunk_sums."""
    stride, classes, full, wrong = rows[4], rows[5], item_size(like) == 8, 0
    chunks = (classes + CHUNK - 1) // CHUNK
    for r in range(loss.size):
        y = labels[r]
        loss[r] = 0
        if counts(r, labels, weights, ignore_index):
            if 0 <= y < classes:
                s, c = 0.0, -np.inf
                for k in range(r * chunks, (r + 1) * chunks):
                    s, c = merge(s, c, parts[k, 0], parts[k, 1])
                x = np.float64(widen(span(like, row_address(rows, r) + y * stride, 1)[0]))
                loss[r] = target_loss(others_to_target(s, c, x, full), s, c, x, full)
            else:
                loss[r] = np.nan
                wrong += 1
    return wrong


_join_sums_kernel = Kernel(_join_sums)


def _narrow_sparse_xent(blocks, like, rows, labels, weights, ignore_index, loss):
    """As sparse_xent, for up to NARROW classes: a group of rows lies side by side in the vector lanes."""
    classes = rows[5]
    group = group_of(classes)
    n = loss.size
    bad = np.zeros(blocks, np.int64)
    for block in prange(blocks):
        columns = new_columns(like, classes, group)
        frames = np.empty((4, group), columns.dtype)
        targets, wrong = np.empty(group, np.int64), 0
        s, c, x, u = np.empty(group), np.empty(group), np.empty(group), np.empty(group)
        for first in range(block * n // blocks, (block + 1) * n // blocks, group):
            size = min(group, (block + 1) * n // blocks - first)
            load_columns(like, rows, first, size, group, columns)
            later = first + 2 * group  # the rows to ask for now: those of the next group would be late
            for k in range(later, later + group, 8):
                prefetch(np.int64(labels.ctypes.data) + k * 8)
                prefetch(np.int64(loss.ctypes.data) + k * loss.itemsize)
            fill(targets, NOT_COUNTED)
            for i in range(np.uint64(size)):
                r = np.uint64(first) + i
                y = labels[r]
                targets[i] = select(
                    counts(r, labels, weights, ignore_index), y if 0 <= y < classes else BAD, NOT_COUNTED
                )
                wrong += targets[i] == BAD
            ahead = row_address(rows, later)
            if classes == 2:
                for k in range(0, group, 32 // item_size(like)):
                    prefetch(ahead + 2 * k * item_size(like))
                sum_pairs(columns, targets, x, s, c)
            else:
                take_targets(classes, targets, columns, x)
                sum_columns(classes, columns, frames, s, c, ahead, item_size(like))
            finish(s, c, x, u, loss[first : first + size])
        bad[block] = wrong
    return bad.sum()


narrow_sparse_xent = Kernel(_narrow_sparse_xent)


def _sparse_xent_grad(blocks, like, rows, labels, weights, ignore_index, scale, loss, like_grad, grad_rows):
    """As sparse_xent, and row r of `grad_rows` = d(scale[r] * loss[r]) / d(row r), which may be the logits' memory.

    A row is read twice, the second time from the cache. Rows that do not count get zeros.
    """
    stride, classes, full = rows[4], rows[5], item_size(like) == 8
    n = loss.size
    bad = np.zeros(blocks, np.int64)
    for block in prange(blocks):
        lanes, spare, room = stack(TILE_BYTES), stack(TILE_BYTES), stack(TILE_BYTES)
        for r in range(block * n // blocks, (block + 1) * n // blocks):
            y, out = labels[r], row_address(grad_rows, r)
            if not counts(r, labels, weights, ignore_index) or not 0 <= y < classes:
                value = 0.0
                if counts(r, labels, weights, ignore_index):
                    value = np.nan
                    bad[block] += 1
                loss[r] = value
                fill_row(like_grad, out, grad_rows[4], classes, loss[r], room)
                continue
            address = row_address(rows, r)
            s, c = row_sum(like, rows, address, y, lanes, spare)
            x = np.float64(widen(span(like, address + y * stride, 1)[0]))
            loss[r] = target_loss(others_to_target(s, c, x, full), s, c, x, full)
            k = scale_of(s, c, x, scale[r])
            frame = grad_frame(compute_zero(like), like_grad, top_of(c, x), others_of(s, c, x), k)
            neighbours = stride == item_size(like) and grad_rows[4] == item_size(like_grad)
            tile = classes if neighbours else LANES
            for begin in range(0, classes, tile):
                size = min(tile, classes - begin)
                at = gather(like, address + begin * stride, stride, size, spare)
                target = y - begin if 0 <= y - begin < size else -1
                grad_tile(like, at, size, frame, target, like_grad, out + begin * grad_rows[4], grad_rows[4], room)
    return bad.sum()


sparse_xent_grad = Kernel(_sparse_xent_grad)


def _narrow_sparse_xent_grad(blocks, like, rows, labels, weights, ignore_index, scale, loss, like_grad, grad_rows):
    """As sparse_xent_grad, for up to NARROW classes: a group of rows lies side by side in the vector lanes."""
    classes = rows[5]
    group = group_of(classes)
    n = loss.size
    bad = np.zeros(blocks, np.int64)
    for block in prange(blocks):
        columns = new_columns(like, classes, group)
        terms, frames = np.empty_like(columns), np.empty((5, group), columns.dtype)
        turned = np.empty((WIDTH, columns.size // group), columns.dtype)
        targets, spare = np.empty(group, np.int64), stack(TILE_BYTES)
        s, c, x, u = np.empty(group), np.empty(group), np.empty(group), np.empty(group)
        for first in range(block * n // blocks, (block + 1) * n // blocks, group):
            size = min(group, (block + 1) * n // blocks - first)
            load_columns(like, rows, first, size, group, columns)
            fill(targets, NOT_COUNTED)
            for i in range(size):
                y = labels[first + i]
                if counts(first + i, labels, weights, ignore_index):
                    targets[i] = y if 0 <= y < classes else BAD
                    bad[block] += targets[i] == BAD
            take_targets(classes, targets, columns, x)
            copy(terms, columns)
            sum_columns(classes, terms, frames, s, c, row_address(rows, first + 2 * group), item_size(like))
            finish(s, c, x, u, loss[first : first + size])
            fill_grad_frames(like_grad, s, c, x, scale[first : first + size], u, frames)
            for j in range(classes):
                grad_column(columns[j * group : (j + 1) * group], frames)
            for begin in range(0, size, WIDTH):
                turn_columns(columns, group, begin, turned)
                for i in range(begin, min(begin + WIDTH, size)):
                    if targets[i] >= 0:
                        turned[i - begin, targets[i]] = frames[4, i]
                write_rows(turned, like_grad, grad_rows, first + begin, min(WIDTH, size - begin), spare)
    return bad.sum()


narrow_sparse_xent_grad = Kernel(_narrow_sparse_xent_grad)


@inner
def fill_grad_frames(like_grad, s, c, x, scale, k, frames):
    """frames = grad_frame of each row. Three loops: LLVM gives up on more arrays at once. Overwrites s."""
    out_of_line()
    m, low, shift, factor, entry = frames[0], frames[1], frames[2], frames[3], frames[4]
    zero = frames.dtype.type(0)
    for i in range(np.uint64(scale.size)):
        k[i] = scale_of(s[i], c[i], x[i], scale[i])
    for i in range(np.uint64(scale.size)):
        s[i] = others_of(s[i], c[i], x[i])
    for i in range(np.uint64(scale.size)):
        m[i], low[i], shift[i], factor[i], entry[i] = grad_frame(zero, like_grad, top_of(c[i], x[i]), s[i], k[i])


@inner
def grad_column(x, frames):
    m, low, shift, factor = frames[0], frames[1], frames[2], frames[3]
    for i in range(np.uint64(x.size)):
        x[i] = grad_of(x[i] - shift[i], m[i], low[i], factor[i])


@inner
def turn_columns(columns, group, begin, turned):
    """turned[i] = row begin + i of a group."""
    out_of_line()
    size, zero = columns.itemsize, columns.dtype.type(0)
    source, target, pitch = np.int64(columns.ctypes.data), np.int64(turned.ctypes.data), turned.shape[1] * size
    for j in range(0, turned.shape[1], WIDTH):
        at = source + (j * group + begin) * size
        transpose(zero, at, group * size, WIDTH, target + j * size, pitch)


@inner
def write_rows(turned, like_grad, grad_rows, first, size, spare):
    """Rows of a gradient from `first` on, rounded to its dtype."""
    out_of_line()
    stride, classes, zero = grad_rows[4], grad_rows[5], turned.dtype.type(0)
    source, pitch = np.int64(turned.ctypes.data), turned.shape[1] * turned.itemsize
    for i in range(size):
        write_tile(zero, source + i * pitch, classes, like_grad, row_address(grad_rows, first + i), stride, spare)


@inner
def grad_tile(like, address, size, frame, target, like_grad, out, out_stride, room):
    """Entries of a gradient row for `size` logits side by side, `target` being the target's place there, or -1."""
    out_of_line()
    entry = frame[4]
    to = out if out_stride == item_size(like_grad) else room
    if frame[2] == 0:
        grad_vectors(like, address, size, frame, None, like_grad, to)
    else:
        grad_vectors(like, address, size, frame, frame[2], like_grad, to)
    if target >= 0:
        store_item(like_grad, to + target * item_size(like_grad), entry)
    scatter(like_grad, to, size, out, out_stride)


@inner
def grad_vectors(like, address, size, frame, shift, like_grad, to):
    """grad_of side by side; a `shift` of None is 0."""
    m, low, _, factor, _ = frame
    step, pairs = WIDTH * item_size(like), size // (2 * WIDTH) * (2 * WIDTH)
    for i in range(0, pairs, 2 * WIDTH):
        at = address + i * item_size(like)
        x, x_2 = shifted(load(like, at), shift), shifted(load(like, at + step), shift)
        g, g_2 = grad_of(x, m, low, factor), grad_of(x_2, m, low, factor)
        store_pair(like_grad, to + i * item_size(like_grad), g, g_2)
    for i in range(pairs, size, WIDTH):
        x = shifted(load_up_to(like, address + i * item_size(like), size - i), shift)
        store_as(like_grad, to + i * item_size(like_grad), grad_of(x, m, low, factor), size - i)


def shifted(x, shift):
    """x - shift, or x if shift is None."""


@overload(shifted)
def _shifted(x, shift):
    if shift == types.none:
        return lambda x, shift: x
    return lambda x, shift: x - shift


def _score(blocks, like, rows, labels, weights, ignore_index, logprob, lse, argmax, rank, entropy):
    """What a row tells of its target; `rank` and `entropy` are arrays, or None. Returns as sparse_xent does."""
    stride, classes, full = rows[4], rows[5], item_size(like) == 8
    n = logprob.size
    bad = np.zeros(blocks, np.int64)
    for block in prange(blocks):
        lanes, spare = stack(TILE_BYTES), stack(TILE_BYTES)
        for r in range(block * n // blocks, (block + 1) * n // blocks):
            y, address = labels[r], row_address(rows, r)
            looked_at = counts(r, labels, weights, ignore_index)
            value = 0.0
            if looked_at and not 0 <= y < classes:
                bad[block] += 1
                looked_at, value = False, np.nan
            logprob[r], lse[r], argmax[r] = value, value, -1
            write(rank, r, -1)
            write(entropy, r, value)
            if looked_at:
                s, c = row_sum(like, rows, address, y, lanes, spare)
                target = widen(span(like, address + y * stride, 1)[0])
                x = np.float64(target)
                u = others_to_target(s, c, x, full)
                loss = target_loss(u, s, c, x, full)
                logprob[r], lse[r] = compute_zero(like) - number(like, loss), target_lse(u, s, c, x, loss, full)
                largest, argmax[r] = row_max(like, rows, address, spare)
                if loss != loss:  # a row that is all -inf or holds +inf or NaN
                    nan = first_nan(like, rows, address)
                    argmax[r] = nan if nan >= 0 else argmax[r]
                    lse[r] = np.float64(largest) if nan < 0 else np.nan
                if rank is not None:
                    rank[r] = row_rank(like, rows, address, target, spare)
                if entropy is not None:
                    s, c, b = row_moments(like, rows, address, argmax[r], lanes, spare)
                    defined = -np.inf < lse[r] < np.inf
                    entropy[r] = row_entropy(s, c, b, np.float64(largest), full) if defined else np.nan
    return bad.sum()


score = Kernel(_score)


@inner
def plain_lse(like, rows, address, lanes, spare):
    """log of the sum of exp over a row; -inf if all are, +inf if one is and none is NaN."""
    out_of_line()
    largest, _, _, log1p_u = leave_largest_out(like, rows, address, lanes, spare)
    if log1p_u == log1p_u:
        return np.float64(largest) + log1p_u
    return np.nan if first_nan(like, rows, address) >= 0 else np.float64(largest)


def _logsumexp(blocks, like, rows, lse):
    """lse[r] = log(sum(exp(row r)))."""
    n = lse.size
    for block in prange(blocks):
        lanes, spare = stack(TILE_BYTES), stack(TILE_BYTES)
        for r in range(block * n // blocks, (block + 1) * n // blocks):
            lse[r] = plain_lse(like, rows, row_address(rows, r), lanes, spare)


logsumexp = Kernel(_logsumexp)


def _normalize(blocks, like, rows, logarithm, out):
    """out[r] = softmax of row r, or its logarithm. A row is read three times, twice from the cache."""
    stride, classes = rows[4], rows[5]
    n = out.shape[0]
    for block in prange(blocks):
        lanes, spare = stack(TILE_BYTES), stack(TILE_BYTES)
        for r in range(block * n // blocks, (block + 1) * n // blocks):
            address = row_address(rows, r)
            largest, _, u, log1p_u = leave_largest_out(like, rows, address, lanes, spare)
            loss = type(largest)(log1p_u)
            for begin in range(0, classes, LANES):
                size = min(LANES, classes - begin)
                x = span(like, gather(like, address + begin * stride, stride, size, spare), size)
                if logarithm:
                    log_tile(x, largest, loss, out[r, begin : begin + size])
                else:
                    exp_tile(x, largest, u, loss, out[r, begin : begin + size])


normalize = Kernel(_normalize)


def _narrow_normalize(blocks, like, rows, logarithm, out):
    """As normalize, for up to NARROW classes: a group of rows lies side by side in the vector lanes."""
    n, classes = out.shape
    group = group_of(classes)
    for block in prange(blocks):
        columns = new_columns(like, classes, group)
        terms, frames = np.empty_like(columns), np.empty((5, group), columns.dtype)
        largest, targets = np.empty(group, columns.dtype), np.empty(group, np.int64)
        s, c, x, u = np.empty(group), np.empty(group), np.empty(group), np.empty(group)
        loss = np.empty(group, columns.dtype)
        for first in range(block * n // blocks, (block + 1) * n // blocks, group):
            size = min(group, (block + 1) * n // blocks - first)
            load_columns(like, rows, first, size, group, columns)
            copy(terms, columns)
            largest_columns(classes, columns, largest, targets)
            take_targets(classes, targets, terms, x)
            sum_columns(classes, terms, frames, s, c, row_address(rows, first + 2 * group), item_size(like))
            finish(s, c, x, u, loss)
            fill_frames(largest, u, loss, frames)
            for j in range(classes):
                column = columns[j * group : (j + 1) * group]
                if logarithm:
                    log_column(column, largest, loss)
                else:
                    exp_column(column, largest, frames)
            for i in range(size):
                row = out[first + i]
                for j in range(np.uint64(classes)):
                    row[j] = columns[j * np.uint64(group) + np.uint64(i)]


narrow_normalize = Kernel(_narrow_normalize)


@inner
def log_column(x, largest, log1p_u):
    for i in range(np.uint64(x.size)):
        x[i] = log_softmax_of(x[i], largest[i], log1p_u[i])


@inner
def fill_frames(largest, u, log1p_u, frames):
    m, low, shift, scale, top = frames[0], frames[1], frames[2], frames[3], frames[4]
    for i in range(np.uint64(largest.size)):
        m[i], low[i], shift[i], scale[i], top[i] = softmax_frame(largest[i], u[i], log1p_u[i])


@inner
def exp_column(x, largest, frames):
    m, low, shift, scale, top = frames[0], frames[1], frames[2], frames[3], frames[4]
    for i in range(np.uint64(x.size)):
        x[i] = softmax_of(x[i], largest[i], m[i], low[i], shift[i], scale[i], top[i])


@inner
def largest_columns(classes, columns, largest, targets):
    """The largest logit of each row of a group, and its first index."""
    group = np.uint64(targets.size)
    fill(largest, -np.inf)
    fill(targets, 0)
    for j in range(classes):
        column = columns[j * targets.size : (j + 1) * targets.size]
        for i in range(group):
            more = column[i] > largest[i]
            largest[i] = select(more, column[i], largest[i])
            targets[i] = select(more, j, targets[i])


@inner
def log_tile(x, largest, log1p_u, out):
    out_of_line()
    for i in range(np.uint64(out.size)):
        out[i] = log_softmax_of(widen(x[i]), largest, log1p_u)


@inner
def log_softmax_of(x, largest, log1p_u):
    return (x - largest) - log1p_u


@inner
def exp_tile(x, largest, u, log1p_u, out):
    out_of_line()
    m, low, shift, scale, top = softmax_frame(largest, u, log1p_u)
    for i in range(np.uint64(out.size)):
        out[i] = softmax_of(widen(x[i]), largest, m, low, shift, scale, top)
