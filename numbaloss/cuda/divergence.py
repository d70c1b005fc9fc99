"""Divergences of two arrays of logits on CUDA: a warp takes a row of one chunk, a block any other. A row is read from
memory once, then from the caches: once a sum, for the lanes of one fill the registers."""

import numpy as np
from numba import types
from numba.extending import overload

from .._divergence_scalar import (
    LN2,
    change_term,
    js_reverse_slope,
    js_slope,
    js_term,
    kl_slope,
    kl_term,
    reverse_term,
    settled,
    slope_of,
    slope_scale,
    two_frames,
)
from .._intrinsics import fma
from .._scalar import CHUNK, LANES
from .._typed import compute_zero, item_size, number, widen
from ._chunks import WARP, first_position, fold_lanes
from ._launch import cuda, device, kernel, launch
from ._memory import fold_loads, halves, join, load, load_once, store, store_item, zeros
from ._operands import address, operand, weight_at, with_known_stride
from ._rows import PARTS, class_stride, leave_largest_out, row_address, team_of
from .softmax import THREADS, teams

AT_ONCE = 2  # items of a Vector that are in work at the same time, as registers allow

inlined = cuda.jit(device=True, forceinline=True)  # what is called too often for NVVM to do it unasked


def divergence(work, items, like, rows_p, rows_q, count, weights, kl, reverse, js):
    """kl[r] = KL(p || q), reverse[r] = KL(q || p), js[r] = Jensen-Shannon, each an array or None; 0 for a row of weight
    0."""
    out = next(x for x in (kl, reverse, js) if x is not None)
    rows_p, rows_q = known_alike(like, rows_p, rows_q)
    arguments = operand(weights), address(kl), address(reverse), address(js)
    return launch(_divergence.of(like), *teams(items, rows_p[5]), out, items, like, rows_p, rows_q, *arguments)


def known_alike(like, rows_p, rows_q):
    """Both rows by with_known_stride, or none."""
    if rows_p[4] != rows_q[4]:
        return rows_p, rows_q
    return with_known_stride(like, rows_p), with_known_stride(like, rows_q)


@kernel(THREADS)
def _divergence(items, like, rows_p, rows_q, weights, kl, reverse, js):
    """A team takes a row."""
    room = cuda.shared.array((3, PARTS), types.float64)
    r, warp, _ = team_of(rows_p[5])
    if r >= items:
        return
    first = warp == 0 and cuda.laneid == 0
    if weight_at(weights, r) == 0.0:
        put(like, kl, r, 0.0, first)
        put(like, reverse, r, 0.0, first)
        put(like, js, r, 0.0, first)
        return
    p, q = row_sums(like, rows_p, rows_q, r, room)
    frame = two_frames(p, q, 0.0)
    change = row_total(change_term, like, rows_p, rows_q, r, frame, room)
    if kl != 0:
        total = row_total(kl_term, like, rows_p, rows_q, r, frame, room)
        put(like, kl, r, settled(total, change, 0.5, frame[0]), first)
    if reverse != 0:
        total = row_total(reverse_term, like, rows_p, rows_q, r, frame, room)
        put(like, reverse, r, settled(total, change, 0.5, frame[0]), first)
    if js != 0:
        total = row_total(js_term, like, rows_p, rows_q, r, frame, room)
        put(like, js, r, min(settled(total, change, 0.125, frame[0]), LN2), first)


@device
def row_sums(like, rows_p, rows_q, r, room):
    """leave_largest_out of rows r. One call in a loop: two would not be inlined and give their results on the stack."""
    rows, p, q = rows_p, (compute_zero(like), 0.0, 0.0), (compute_zero(like), 0.0, 0.0)
    for _ in range(2):
        largest, _, u, log1p_u = leave_largest_out(like, rows, row_address(rows, r), room)
        p, q, rows = q, (largest, u, log1p_u), rows_q
    return p, q


@device
def put(like, array, r, value, first):
    """array[r] = value, where there is an array, by the first thread of a team."""
    if array != 0 and first:
        store(array + r * item_size(compute_zero(like)), number(like, value))


@inlined
def row_total(term, like, rows_p, rows_q, r, frame, room):
    """The sum of a term over rows r, chunk by chunk from left to right."""
    _, warp, warps = team_of(rows_p[5])
    chunks, first, total = np.int32((rows_p[5] + CHUNK - 1) // CHUNK), np.int32(0), 0.0
    while first < chunks:
        count, k, part = min(np.int32(PARTS), np.int32(chunks - first)), np.int32(warp), 0.0
        while k < count:
            part = chunk_total(term, like, rows_p, rows_q, r, np.int64(first + k) * CHUNK, frame)
            if cuda.laneid == 0 and warps > 1:
                room[0, k] = part
            k = np.int32(k + warps)
        if warps == 1:
            return part
        cuda.syncthreads()
        for k in range(count):
            total = total + room[0, k]
        cuda.syncthreads()
        first = np.int32(first + PARTS)
    return total


@inlined
def chunk_total(term, like, rows_p, rows_q, r, begin, frame):
    """The sum of a term over the chunk from class `begin` on, in the order of fold_lanes: of a thread's lanes, those of
    one load after the other, for all of them and their logits and terms do not fit the registers."""
    size, total = item_size(like), fold_loads(like, zeros(like))
    for a in range(2):
        of_a = fold_loads(like, zeros(like))
        for b in range(2):
            of_b = fold_loads(like, zeros(like))
            for c in range(2 if size > 2 else 1):
                of_c = fold_loads(like, zeros(like))
                for d in range(2 if size > 4 else 1):
                    of_c = of_c + load_total(term, like, rows_p, rows_q, r, begin, a + 2 * b + 4 * c + 8 * d, frame)
                of_b = of_b + of_c
            of_a = of_a + of_b
        total = total + of_a
    return fold_lanes(like, total, WARP)


@inlined
def load_total(term, like, rows_p, rows_q, r, begin, load, frame):
    """The lanes of this thread's load of this number, summed over a chunk."""
    p, q = class_stride(like, rows_p), class_stride(like, rows_q)
    at_p, at_q, before = first_pair(like, row_address(rows_p, r) + begin * p, p, row_address(rows_q, r) + begin * q, q)
    end = np.int32(before + min(np.int64(CHUNK), rows_p[5] - begin))
    total = fold_loads(like, zeros(like))
    for j in range(np.int32((load * 32 + cuda.laneid) * (16 // item_size(like))), end, np.int32(LANES)):
        x, y = load_once(like, at_p + j * p, p, j, before, end), load_once(like, at_q + j * q, q, j, before, end)
        total = accumulate(term, total, x, y, frame)
    return total


@device
def first_pair(like, at_p, p, at_q, q):
    """(addresses, position) where the reading of a chunk of both rows starts: at 16 bytes if they lie alike there."""
    from_p, before = first_position(like, at_p, p)
    from_q, before_q = first_position(like, at_q, q)
    if before == before_q:
        return from_p, from_q, before
    return at_p, at_q, np.int32(0)


def accumulate(term, total, x, y, frame):
    """total + factor * value, as the term gives them; vectors."""


@overload(accumulate)
def _accumulate(term, total, x, y, frame):
    if getattr(x, "width", 1) > AT_ONCE:

        def accumulate_halves(term, total, x, y, frame):
            (a, b), (x1, x2), (y1, y2) = halves(total), halves(x), halves(y)
            return join(accumulate(term, a, x1, y1, frame), accumulate(term, b, x2, y2, frame))

        return accumulate_halves

    def accumulate_all(term, total, x, y, frame):
        factor, value = term(x, y, frame)
        return fma(factor, value, total)

    return accumulate_all


# -- gradients ---------------------------------------------------------------------------------------------------


def kl_grad(work, items, like, rows_p, rows_q, weights, scale, loss, like_p, grad_p, like_q, grad_q):
    """loss[r] = KL(p || q), and rows r of grad_p and grad_q = scale[r] times its slopes. Either may be None, with its
    `like`; they may be the logits' memory. Zeros for rows of weight 0."""
    grads = *place_of(like, like_p, grad_p), *place_of(like, like_q, grad_q)
    return start(_kl_grad, items, like, rows_p, rows_q, weights, scale, loss, grads)


def js_grad(work, items, like, rows_p, rows_q, weights, scale, loss, like_p, grad_p, like_q, grad_q):
    """As kl_grad for the Jensen-Shannon divergence."""
    grads = *place_of(like, like_p, grad_p), *place_of(like, like_q, grad_q)
    return start(_js_grad, items, like, rows_p, rows_q, weights, scale, loss, grads)


def place_of(like, like_grad, rows):
    """(like, rows) of a gradient; its address is 0 if it is not wanted."""
    if like_grad is None:
        like_grad, rows = like, (0, 1, 0, 0, like.itemsize, 0)
    return like_grad, with_known_stride(like_grad, rows)


def start(kernel, items, like, rows_p, rows_q, weights, scale, loss, grads):
    rows_p, rows_q = known_alike(like, rows_p, rows_q)
    arguments = like, rows_p, rows_q, operand(weights), address(scale), address(loss), *grads
    return launch(kernel.of(like), *teams(items, rows_p[5]), loss, items, *arguments)


@kernel(THREADS)
def _kl_grad(items, like, rows_p, rows_q, weights, scale, loss, like_p, grad_p, like_q, grad_q):
    """A team takes a row."""
    room = cuda.shared.array((3, PARTS), types.float64)
    r, warp, _ = team_of(rows_p[5])
    if r >= items:
        return
    zero = compute_zero(like)
    frame = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    value, mean, factor_p, factor_q, looked_at = 0.0, 0.0, zero, zero, weight_at(weights, r) != 0.0
    if looked_at:
        p, q = row_sums(like, rows_p, rows_q, r, room)
        frame = two_frames(p, q, 0.0)
        change = row_total(change_term, like, rows_p, rows_q, r, frame, room)
        value = settled(row_total(kl_term, like, rows_p, rows_q, r, frame, room), change, 0.5, frame[0])
        frame = two_frames(p, q, change)
        if grad_p[0] != 0:
            mean = row_total(kl_slope, like, rows_p, rows_q, r, frame, room)
        k = load(0.0, scale + r * 8)
        factor_p, factor_q = slope_scale(k, mean, frame[0]), slope_scale(k, 0.0, frame[0])
    put(like, loss, r, value, warp == 0 and cuda.laneid == 0)
    write_slopes(
        kl_slope,
        mean,
        factor_p,
        change_term,
        0.0,
        factor_q,
        like,
        rows_p,
        rows_q,
        r,
        frame,
        looked_at,
        like_p,
        grad_p,
        like_q,
        grad_q,
    )


@kernel(THREADS)
def _js_grad(items, like, rows_p, rows_q, weights, scale, loss, like_p, grad_p, like_q, grad_q):
    """A team takes a row."""
    room = cuda.shared.array((3, PARTS), types.float64)
    r, warp, _ = team_of(rows_p[5])
    if r >= items:
        return
    zero = compute_zero(like)
    frame = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    value, mean_p, mean_q, factor, looked_at = 0.0, 0.0, 0.0, zero, weight_at(weights, r) != 0.0
    if looked_at:
        p, q = row_sums(like, rows_p, rows_q, r, room)
        frame = two_frames(p, q, 0.0)
        change = row_total(change_term, like, rows_p, rows_q, r, frame, room)
        total = row_total(js_term, like, rows_p, rows_q, r, frame, room)
        value = min(settled(total, change, 0.125, frame[0]), LN2)
        frame = two_frames(p, q, change)
        if grad_p[0] != 0:
            mean_p = row_total(js_slope, like, rows_p, rows_q, r, frame, room)
        if grad_q[0] != 0:
            mean_q = row_total(js_reverse_slope, like, rows_p, rows_q, r, frame, room)
        factor = slope_scale(load(0.0, scale + r * 8), 0.0, frame[0])
    put(like, loss, r, value, warp == 0 and cuda.laneid == 0)
    write_slopes(
        js_slope,
        mean_p,
        factor,
        js_reverse_slope,
        mean_q,
        factor,
        like,
        rows_p,
        rows_q,
        r,
        frame,
        looked_at,
        like_p,
        grad_p,
        like_q,
        grad_q,
    )


@device
def write_slopes(
    term_p,
    mean_p,
    scale_p,
    term_q,
    mean_q,
    scale_q,
    like,
    rows_p,
    rows_q,
    r,
    frame,
    looked_at,
    like_p,
    grad_p,
    like_q,
    grad_q,
):
    """Rows r of the gradients, zeros if the row is not looked at. A thread reads both logits before it writes."""
    _, warp, warps = team_of(rows_p[5])
    at_p, at_q = row_address(rows_p, r), row_address(rows_q, r)
    to_p, to_q = row_address(grad_p, r), row_address(grad_q, r)
    for j in range(warp * 32 + cuda.laneid, rows_p[5], warps * 32):
        g, h = compute_zero(like), compute_zero(like)
        if looked_at:
            x = widen(load(like, at_p + j * class_stride(like, rows_p)))
            y = widen(load(like, at_q + j * class_stride(like, rows_q)))
            g, h = entry(term_p, x, y, frame, mean_p, scale_p), entry(term_q, x, y, frame, mean_q, scale_q)
        if grad_p[0] != 0:
            store_item(like_p, to_p + j * class_stride(like_p, grad_p), g)
        if grad_q[0] != 0:
            store_item(like_q, to_q + j * class_stride(like_q, grad_q), h)


def entry(term, x, y, frame, mean, scale):
    """slope_of factor and value, as the term gives them."""


@overload(entry)
def _entry(term, x, y, frame, mean, scale):
    def slope(term, x, y, frame, mean, scale):
        factor, value = term(x, y, frame)
        return slope_of(factor, value, number(frame[0], mean), scale)

    return slope
