"""Divergences of two arrays of logits on CUDA: a warp takes a row of one chunk, a block any other. A first kernel sums
exponentials, a second one the terms of the divergences."""

import cupy
import numpy as np
from numba import types
from numba.extending import overload

from .._check import NO_LABEL
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
from ._chunks import WARP, first_position, fold_lanes
from ._launch import cuda, device, kept, kernel, launch
from ._memory import fold_loads, halves, join, load, load_once, store, store_once, zeros
from ._operands import address, operand, weight_at, with_known_stride
from ._rows import PARTS, THREADS, class_stride, row_address, team_of, teams
from ._sums import SUMS, load_sums, row_sums

AT_ONCE = 2  # items of a Vector that are in work at the same time, as registers allow

inlined = cuda.jit(device=True, forceinline=True)  # what is called too often for NVVM to do it unasked


def divergence(work, items, like, rows_p, rows_q, count, weights, kl, reverse, js):
    """kl[r] = KL(p || q), reverse[r] = KL(q || p), js[r] = Jensen-Shannon, each an array or None; 0 for a row of weight
    0."""
    out = next(x for x in (kl, reverse, js) if x is not None)
    rows_p, rows_q = known_alike(like, rows_p, rows_q)
    sums = two_sums(items, like, rows_p, rows_q, weights, out)
    arguments = operand(weights), address(sums), address(kl), address(reverse), address(js)
    return launch(_divergence.of(like), *teams(items, rows_p[5]), out, items, like, rows_p, rows_q, *arguments)


def known_alike(like, rows_p, rows_q):
    """Both rows by with_known_stride, or none."""
    if rows_p[4] != rows_q[4]:
        return rows_p, rows_q
    return with_known_stride(like, rows_p), with_known_stride(like, rows_q)


def two_sums(items, like, rows_p, rows_q, weights, out):
    """sums[r] = what load_sums reads of row r of the one and of the other logits."""
    sums = kept(cupy.empty((items, 2, SUMS // 8)))
    for i, rows in enumerate((rows_p, rows_q)):
        to = address(sums) + SUMS * i
        row_sums(items, like, rows, operand(None), operand(weights), NO_LABEL, 0, to, 2 * SUMS, out)
    return sums


@device
def load_frame(like, sums, r, shift):
    """two_frames of rows r."""
    at = sums + r * (2 * SUMS)
    p, _, u_p, log1p_u_p = load_sums(like, at)
    q, _, u_q, log1p_u_q = load_sums(like, at + SUMS)
    return two_frames((p, u_p, log1p_u_p), (q, u_q, log1p_u_q), shift)


@kernel(THREADS, 4, 4, 3)
def _divergence(items, like, rows_p, rows_q, weights, sums, kl, reverse, js):
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
    frame = load_frame(like, sums, r, 0.0)
    if kl != 0:
        change, total = row_totals(change_term, kl_term, like, rows_p, rows_q, r, frame, room)
        put(like, kl, r, settled(total, change, 0.5, frame[0]), first)
    if reverse != 0:
        change, total = row_totals(change_term, reverse_term, like, rows_p, rows_q, r, frame, room)
        put(like, reverse, r, settled(total, change, 0.5, frame[0]), first)
    if js != 0:
        change, total = row_totals(change_term, js_term, like, rows_p, rows_q, r, frame, room)
        put(like, js, r, settled_js(total, change, frame[0]), first)


@device
def put(like, array, r, value, first):
    """array[r] = value, where there is an array, by the first thread of a team."""
    if array != 0 and first:
        store(array + r * item_size(compute_zero(like)), number(like, value))


@inlined
def row_totals(first, second, like, rows_p, rows_q, r, frame, room):
    """The sums of two terms over rows r, chunk by chunk from left to right. What the terms have in common, and that is
    most, is computed once."""
    _, warp, warps = team_of(rows_p[5])
    chunks, begin, a, b = np.int32((rows_p[5] + CHUNK - 1) // CHUNK), np.int32(0), 0.0, 0.0
    while begin < chunks:
        count, k = min(np.int32(PARTS), np.int32(chunks - begin)), np.int32(warp)
        while k < count:
            part_a, part_b = chunk_totals(first, second, like, rows_p, rows_q, r, np.int64(begin + k) * CHUNK, frame)
            if warps == 1:
                return part_a, part_b
            if cuda.laneid == 0:
                room[0, k], room[1, k] = part_a, part_b
            k = np.int32(k + warps)
        cuda.syncthreads()
        for k in range(count):
            a, b = a + room[0, k], b + room[1, k]
        cuda.syncthreads()
        begin = np.int32(begin + PARTS)
    return a, b


@inlined
def chunk_totals(first, second, like, rows_p, rows_q, r, begin, frame):
    """The sums of two terms over the chunk from class `begin` on, in the order of fold_lanes: of a thread's lanes,
    those of one load after the other, for all of them and their logits and terms do not fit the registers."""
    size, none = item_size(like), join(fold_loads(like, zeros(like)), fold_loads(like, zeros(like)))
    total = none
    for a in range(2):
        of_a = none
        for b in range(2):
            of_b = none
            for c in range(2 if size > 2 else 1):
                of_c = none
                for d in range(2 if size > 4 else 1):
                    load = a + 2 * b + 4 * c + 8 * d
                    of_c = of_c + load_totals(first, second, like, rows_p, rows_q, r, begin, load, frame)
                of_b = of_b + of_c
            of_a = of_a + of_b
        total = total + of_a
    total_a, total_b = halves(total)
    return fold_lanes(like, total_a, WARP), fold_lanes(like, total_b, WARP)


@inlined
def load_totals(first, second, like, rows_p, rows_q, r, begin, load, frame):
    """The lanes of this thread's load of this number, summed over a chunk: of the one term, then of the other."""
    p, q = class_stride(like, rows_p), class_stride(like, rows_q)
    at_p, at_q, before = first_pair(like, row_address(rows_p, r) + begin * p, p, row_address(rows_q, r) + begin * q, q)
    end = np.int32(before + min(np.int64(CHUNK), rows_p[5] - begin))
    a, b = fold_loads(like, zeros(like)), fold_loads(like, zeros(like))
    j = np.int32((load * 32 + cuda.laneid) * (16 // item_size(like)))
    while j < end:  # range() would hold a register more
        x, y = load_once(like, at_p + j * p, p, j, before, end), load_once(like, at_q + j * q, q, j, before, end)
        a, b = accumulate(first, second, a, b, x, y, frame)
        j = np.int32(j + LANES)
    return join(a, b)


@device
def first_pair(like, at_p, p, at_q, q):
    """(addresses, position) where the reading of a chunk of both rows starts: at 16 bytes if they lie alike there."""
    from_p, before = first_position(like, at_p, p)
    from_q, before_q = first_position(like, at_q, q)
    if before == before_q:
        return from_p, from_q, before
    return at_p, at_q, np.int32(0)


def accumulate(first, second, a, b, x, y, frame):
    """a + factor * value, as the first term gives them, and b + those of the second; vectors."""


@overload(accumulate)
def _accumulate(first, second, a, b, x, y, frame):
    if getattr(x, "width", 1) > AT_ONCE:

        def accumulate_halves(first, second, a, b, x, y, frame):
            (a1, a2), (b1, b2), (x1, x2), (y1, y2) = halves(a), halves(b), halves(x), halves(y)
            a1, b1 = accumulate(first, second, a1, b1, x1, y1, frame)
            a2, b2 = accumulate(first, second, a2, b2, x2, y2, frame)
            return join(a1, a2), join(b1, b2)

        return accumulate_halves

    def accumulate_all(first, second, a, b, x, y, frame):
        factor, value = first(x, y, frame)
        factor_b, value_b = second(x, y, frame)
        return fma(factor, value, a), fma(factor_b, value_b, b)

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
    sums = two_sums(items, like, rows_p, rows_q, weights, loss)
    arguments = like, rows_p, rows_q, operand(weights), address(sums), address(scale), address(loss), *grads
    return launch(kernel.of(like), *teams(items, rows_p[5]), loss, items, *arguments)


@kernel(THREADS, 4, 4, 3)
def _kl_grad(items, like, rows_p, rows_q, weights, sums, scale, loss, like_p, grad_p, like_q, grad_q):
    """A team takes a row."""
    room = cuda.shared.array((3, PARTS), types.float64)
    r, warp, _ = team_of(rows_p[5])
    if r >= items:
        return
    zero = compute_zero(like)
    frame = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    value, mean, factor_p, factor_q, looked_at = 0.0, 0.0, zero, zero, weight_at(weights, r) != 0.0
    if looked_at:
        frame = load_frame(like, sums, r, 0.0)
        change, total = row_totals(change_term, kl_term, like, rows_p, rows_q, r, frame, room)
        value = settled(total, change, 0.5, frame[0])
        frame = load_frame(like, sums, r, change)
        if grad_p[0] != 0:
            mean, _ = row_totals(kl_slope, kl_slope, like, rows_p, rows_q, r, frame, room)
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


@kernel(THREADS, 4, 4, 3)
def _js_grad(items, like, rows_p, rows_q, weights, sums, scale, loss, like_p, grad_p, like_q, grad_q):
    """A team takes a row."""
    room = cuda.shared.array((3, PARTS), types.float64)
    r, warp, _ = team_of(rows_p[5])
    if r >= items:
        return
    zero = compute_zero(like)
    frame = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    value, mean_p, mean_q, factor, looked_at = 0.0, 0.0, 0.0, zero, weight_at(weights, r) != 0.0
    if looked_at:
        frame = load_frame(like, sums, r, 0.0)
        change, total = row_totals(change_term, js_term, like, rows_p, rows_q, r, frame, room)
        value = settled_js(total, change, frame[0])
        frame = load_frame(like, sums, r, change)
        mean_p, mean_q = row_totals(js_slope, js_reverse_slope, like, rows_p, rows_q, r, frame, room)
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
    """Rows r of the gradients, zeros if the row is not looked at. A thread reads a load of both before it writes."""
    _, warp, warps = team_of(rows_p[5])
    n, p, q = np.int32(16 // item_size(like)), class_stride(like, rows_p), class_stride(like, rows_q)
    from_p, from_q, before = first_pair(like, row_address(rows_p, r), p, row_address(rows_q, r), q)
    to_p, to_q = row_address(grad_p, r), row_address(grad_q, r)
    j, end = np.int64(warp * 32 + cuda.laneid) * n, before + rows_p[5]
    while j < end:
        first = np.int32(max(np.int64(0), before - j))
        near = np.int32(min(end - j, np.int64(n)))  # positions from j on, which may lie beyond 32 bits
        g = fold_loads(like, zeros(like))
        h = g
        if looked_at:
            x = load_once(like, from_p + j * p, p, np.int32(0), first, near)
            y = load_once(like, from_q + j * q, q, np.int32(0), first, near)
            g, h = entry(term_p, x, y, frame, mean_p, scale_p), entry(term_q, x, y, frame, mean_q, scale_q)
        if grad_p[0] != 0:
            step = class_stride(like_p, grad_p)
            store_once(like_p, to_p + (j - before) * step, step, first, near, g)
        if grad_q[0] != 0:
            step = class_stride(like_q, grad_q)
            store_once(like_q, to_q + (j - before) * step, step, first, near, h)
        j += warps * 32 * n


def entry(term, x, y, frame, mean, scale):
    """slope_of factor and value, as the term gives them; of vectors."""


@overload(entry)
def _entry(term, x, y, frame, mean, scale):
    if getattr(x, "width", 1) > AT_ONCE:

        def slopes_of_halves(term, x, y, frame, mean, scale):
            (x1, x2), (y1, y2) = halves(x), halves(y)
            return join(entry(term, x1, y1, frame, mean, scale), entry(term, x2, y2, frame, mean, scale))

        return slopes_of_halves

    def slope(term, x, y, frame, mean, scale):
        factor, value = term(x, y, frame)
        return slope_of(factor, value, number(frame[0], mean), scale)

    return slope
