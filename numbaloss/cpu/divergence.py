"""Divergences of two arrays of logits on the CPU. `like` and rows are described in _chunks; the arrays share dtype and
shape.

`rows` is (rows_p, rows_q) and `rooms` the addresses of room for the lanes of four sums and for two tiles of logits.
"""

from numba import prange, types
from numba.extending import overload

from .._divergence_scalar import (
    change_term,
    js_reverse_slope,
    js_slope,
    js_term,
    kl_slope,
    kl_term,
    reverse_term,
    settled,
    settled_js,
    slope_of,
    slope_scale,
    two_frames,
)
from .._intrinsics import fma
from .._scalar import CHUNK, LANES
from .._typed import compute_zero, item_size, number
from .._vector import WIDTH
from ._chunks import fold_lanes
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
    span,
    stack,
    store,
    store_as,
    write,
)
from ._rows import fill_row, leave_largest_out, row_address, scatter, weight_is_zero

SUMS_BYTES = 4 * TILE_BYTES


def _divergence(blocks, like, rows_p, rows_q, count, weights, kl, reverse, js):
    """kl[r] = KL(p || q), reverse[r] = KL(q || p), js[r] = Jensen-Shannon, each an array or None; 0 for a row of weight
    0. Rows are read from memory once and then from the cache."""
    for block in prange(blocks):
        rows = rows_p, rows_q  # a parallel loop takes no tuple of tuples from outside
        rooms = stack(SUMS_BYTES), stack(TILE_BYTES), stack(TILE_BYTES)
        for r in range(block * count // blocks, (block + 1) * count // blocks):
            write(kl, r, 0.0)
            write(reverse, r, 0.0)
            write(js, r, 0.0)
            if not weight_is_zero(r, weights):
                frame = two_frames(row_sum(like, rows_p, r, rooms), row_sum(like, rows_q, r, rooms), 0.0)
                sums = row_sums(like, rows, r, frame, kl, reverse, js, rooms)
                write(kl, r, settled(sums[1], sums[0], 0.5, frame[0]))
                write(reverse, r, settled(sums[2], sums[0], 0.5, frame[0]))
                write(js, r, settled_js(sums[3], sums[0], frame[0]))


divergence = Kernel(_divergence)


@inner
def row_sum(like, rows, r, rooms):
    """(largest logit, u, log(1 + u)) of a row, by leave_largest_out."""
    largest, _, u, log1p_u = leave_largest_out(like, rows, row_address(rows, r), rooms[0], rooms[1])
    return largest, u, log1p_u


@inner
def row_sums(like, rows, r, frame, kl, reverse, js, rooms):
    """The sums of change_term, and of kl_term, reverse_term and js_term where these are not None."""
    out_of_line()
    zero, classes, lanes = compute_zero(like), rows[0][5], rooms[0]
    change, sum_kl, sum_reverse, sum_js = 0.0, 0.0, 0.0, 0.0
    for chunk in range(0, classes, CHUNK):
        end = min(chunk + CHUNK, classes)
        for k in range(4):
            fill(span(zero, lanes + k * TILE_BYTES, LANES), zero)
        for begin in range(chunk, end, LANES):
            size = min(LANES, end - begin)
            at_p, at_q = tiles(like, rows, r, begin, size, rooms)
            add_terms(like, at_p, at_q, size, frame, kl, reverse, js, lanes)
        size = min(LANES, end - chunk)
        change += fold_lanes(zero, lanes, size)
        sum_kl += fold_if(kl, zero, lanes + TILE_BYTES, size)
        sum_reverse += fold_if(reverse, zero, lanes + 2 * TILE_BYTES, size)
        sum_js += fold_if(js, zero, lanes + 3 * TILE_BYTES, size)
    return change, sum_kl, sum_reverse, sum_js


def fold_if(wanted, zero, lanes, size):
    """fold_lanes, or 0 if `wanted` is None."""


@overload(fold_if)
def _fold_if(wanted, zero, lanes, size):
    if wanted == types.none:
        return lambda wanted, zero, lanes, size: 0.0
    return lambda wanted, zero, lanes, size: fold_lanes(zero, lanes, size)


@inner
def tiles(like, rows, r, begin, size, rooms):
    """Where `size` classes of both rows lie side by side."""
    p, q = rows
    at_p = gather(like, row_address(p, r) + begin * p[4], p[4], size, rooms[1])
    return at_p, gather(like, row_address(q, r) + begin * q[4], q[4], size, rooms[2])


@inner
def pair(like, at_p, at_q, i, size):
    """Vectors of both rows; -inf from `size` on, which adds 0 to every sum."""
    at = i * item_size(like)
    return load_up_to(like, at_p + at, size - i), load_up_to(like, at_q + at, size - i)


@inner
def add_terms(like, at_p, at_q, size, frame, kl, reverse, js, lanes):
    out_of_line()
    for i in range(0, size, WIDTH):
        x, y = pair(like, at_p, at_q, i, size)
        at = lanes + i * item_size(compute_zero(like))
        add(change_term, x, y, frame, at)
        if kl is not None:
            add(kl_term, x, y, frame, at + TILE_BYTES)
        if reverse is not None:
            add(reverse_term, x, y, frame, at + 2 * TILE_BYTES)
        if js is not None:
            add(js_term, x, y, frame, at + 3 * TILE_BYTES)


@inner
def add(term, x, y, frame, at):
    factor, value = term(x, y, frame)
    store(at, fma(factor, value, load(frame[0], at)))


# -- gradients ---------------------------------------------------------------------------------------------------


def _kl_grad(blocks, like, rows_p, rows_q, weights, scale, loss, like_p, grad_p, like_q, grad_q):
    """loss[r] = KL(p || q), and rows r of grad_p and grad_q = scale[r] times its slopes. Either may be None, with its
    `like`; they may be the logits' memory. Zeros for rows of weight 0."""
    count = loss.size
    for block in prange(blocks):
        rows = rows_p, rows_q
        rooms = stack(SUMS_BYTES), stack(TILE_BYTES), stack(TILE_BYTES)
        for r in range(block * count // blocks, (block + 1) * count // blocks):
            loss[r] = 0
            if weight_is_zero(r, weights):
                no_slopes(like, r, rows_p[5], like_p, grad_p, like_q, grad_q, rooms)
            else:
                p, q = row_sum(like, rows_p, r, rooms), row_sum(like, rows_q, r, rooms)
                frame = two_frames(p, q, 0.0)
                sums = row_sums(like, rows, r, frame, loss, None, None, rooms)
                loss[r] = settled(sums[1], sums[0], 0.5, frame[0])
                frame = two_frames(p, q, sums[0])
                mean = row_mean(kl_slope, like_p, like, rows, r, frame, rooms)
                one, two = slope_scale(scale[r], mean, frame[0]), slope_scale(scale[r], 0.0, frame[0])
                write_slopes(
                    kl_slope,
                    mean,
                    one,
                    change_term,
                    0.0,
                    two,
                    like,
                    rows,
                    r,
                    frame,
                    like_p,
                    grad_p,
                    like_q,
                    grad_q,
                    rooms,
                )


kl_grad = Kernel(_kl_grad)


def _js_grad(blocks, like, rows_p, rows_q, weights, scale, loss, like_p, grad_p, like_q, grad_q):
    """As kl_grad for the Jensen-Shannon divergence."""
    count = loss.size
    for block in prange(blocks):
        rows = rows_p, rows_q
        rooms = stack(SUMS_BYTES), stack(TILE_BYTES), stack(TILE_BYTES)
        for r in range(block * count // blocks, (block + 1) * count // blocks):
            loss[r] = 0
            if weight_is_zero(r, weights):
                no_slopes(like, r, rows_p[5], like_p, grad_p, like_q, grad_q, rooms)
            else:
                p, q = row_sum(like, rows_p, r, rooms), row_sum(like, rows_q, r, rooms)
                frame = two_frames(p, q, 0.0)
                sums = row_sums(like, rows, r, frame, None, None, loss, rooms)
                loss[r] = settled_js(sums[3], sums[0], frame[0])
                frame = two_frames(p, q, sums[0])
                mean_p = row_mean(js_slope, like_p, like, rows, r, frame, rooms)
                mean_q = row_mean(js_reverse_slope, like_q, like, rows, r, frame, rooms)
                factor = slope_scale(scale[r], 0.0, frame[0])
                write_slopes(
                    js_slope,
                    mean_p,
                    factor,
                    js_reverse_slope,
                    mean_q,
                    factor,
                    like,
                    rows,
                    r,
                    frame,
                    like_p,
                    grad_p,
                    like_q,
                    grad_q,
                    rooms,
                )


js_grad = Kernel(_js_grad)


@inner
def row_mean(term, wanted, like, rows, r, frame, rooms):
    """The sum of a term over lanes and chunks, or 0 if `wanted` is None."""
    out_of_line()
    total, zero, classes = 0.0, compute_zero(like), rows[0][5]
    if wanted is not None:
        for chunk in range(0, classes, CHUNK):
            end = min(chunk + CHUNK, classes)
            fill(span(zero, rooms[0], LANES), zero)
            for begin in range(chunk, end, LANES):
                size = min(LANES, end - begin)
                at_p, at_q = tiles(like, rows, r, begin, size, rooms)
                for i in range(0, size, WIDTH):
                    x, y = pair(like, at_p, at_q, i, size)
                    add(term, x, y, frame, rooms[0] + i * item_size(zero))
            total += fold_lanes(zero, rooms[0], min(LANES, end - chunk))
    return total


@inner
def write_slopes(
    term_p, mean_p, scale_p, term_q, mean_q, scale_q, like, rows, r, frame, like_p, grad_p, like_q, grad_q, rooms
):
    """Rows r of the gradients that are not None. A tile of both is computed before either is put in its place."""
    out_of_line()
    classes = rows[0][5]
    for begin in range(0, classes, LANES):
        size = min(LANES, classes - begin)
        at_p, at_q = tiles(like, rows, r, begin, size, rooms)
        to_p, to_q = rooms[0], rooms[0] + TILE_BYTES
        slope_tile(term_p, mean_p, scale_p, like, at_p, at_q, size, frame, like_p, to_p)
        slope_tile(term_q, mean_q, scale_q, like, at_p, at_q, size, frame, like_q, to_q)
        put_tile(like_p, to_p, size, grad_p, r, begin)
        put_tile(like_q, to_q, size, grad_q, r, begin)


@inner
def slope_tile(term, mean, scale, like, at_p, at_q, size, frame, like_grad, to):
    out_of_line()
    if like_grad is not None:
        m = number(frame[0], mean)
        for i in range(0, size, WIDTH):
            x, y = pair(like, at_p, at_q, i, size)
            factor, value = term(x, y, frame)
            store_as(like_grad, to + i * item_size(like_grad), slope_of(factor, value, m, scale), size - i)


@inner
def put_tile(like_grad, source, size, grad, r, begin):
    """Copy a tile of a gradient to its place, unless that is None."""
    if like_grad is not None:
        out = row_address(grad, r) + begin * grad[4]
        if grad[4] == item_size(like_grad):
            copy(span(like_grad, out, size), span(like_grad, source, size))
        else:
            scatter(like_grad, source, size, out, grad[4])


@inner
def no_slopes(like, r, classes, like_p, grad_p, like_q, grad_q, rooms):
    """Rows r of the gradients that are not None are 0."""
    if like_p is not None:
        fill_row(like_p, row_address(grad_p, r), grad_p[4], classes, compute_zero(like), rooms[0])
    if like_q is not None:
        fill_row(like_q, row_address(grad_q, r), grad_q[4], classes, compute_zero(like), rooms[0])
