"""Cross entropies of class probabilities on the CPU: of dense labels, or of one class smoothed over all.

`targets` is (labels, hot, rest, ignore_index): a share `hot` of the class labels[r] and a share `rest` of every class;
or (like_labels, *label_rows, keep, rest): of each class `keep` times its label in rows of their own, and `rest`. Class
weights, or None, multiply either.
"""

import numpy as np
from numba import prange, types
from numba.extending import overload

from .._intrinsics import fma, rounded_product, select
from .._scalar import CHUNK, LANES, dense_entry, dense_loss, exp_64
from .._typed import compute_zero, grad_frame, grad_of, number, widen
from ._chunks import fold_lanes
from ._launch import Kernel
from ._memory import TILE_BYTES, fill, gather, inner, out_of_line, span, stack
from ._rows import counts, fill_row, leave_largest_out, row_address, weight_is_zero, write_tile

BAD, NOT_COUNTED, NONE = -3, -2, -1


def target_class(targets, weights, r, classes):
    """The class with a share of its own, or NONE; NOT_COUNTED for a row that is not looked at; BAD for a label out of
    range."""


@overload(target_class)
def _target_class(targets, weights, r, classes):
    if not isinstance(targets[0], types.Array):
        return lambda targets, weights, r, classes: NOT_COUNTED if weight_is_zero(r, weights) else NONE

    def smoothed(targets, weights, r, classes):
        labels, _, _, ignore_index = targets
        if not counts(r, labels, weights, ignore_index):
            return NOT_COUNTED
        return labels[r] if 0 <= labels[r] < classes else BAD

    return smoothed


def shares(targets):
    """(hot, rest); dense labels are shares of the classes as they stand."""


@overload(shares)
def _shares(targets):
    if not isinstance(targets[0], types.Array):
        return lambda targets: (0.0, 1.0)
    return lambda targets: (targets[1], targets[2])


def label_tile(like, targets, r, begin, size, spare):
    """(labels of `size` classes, keep, rest), the latter in the precision of logits; None if all labels are 1."""


@overload(label_tile)
def _label_tile(like, targets, r, begin, size, spare):
    if isinstance(targets[0], types.Array):
        return lambda like, targets, r, begin, size, spare: None

    def dense(like, targets, r, begin, size, spare):
        like_labels, rows, keep, rest = targets[0], targets[1:7], targets[7], targets[8]
        at = gather(like_labels, row_address(rows, r) + begin * rows[4], rows[4], size, spare)
        return span(like_labels, at, size), number(like, keep), number(like, rest)

    return dense


def label_of(tile, i, begin, class_weights, one):
    """The label of class begin + i times its class weight, in the precision of `one`."""


@overload(label_of)
def _label_of(tile, i, begin, class_weights, one):
    if tile == types.none:
        return lambda tile, i, begin, class_weights, one: weight_of(class_weights, np.uint64(begin) + i, one)
    return lambda tile, i, begin, class_weights, one: (
        fma(tile[1], type(one)(widen(tile[0][i])), tile[2]) * weight_of(class_weights, np.uint64(begin) + i, one)
    )


def weight_of(class_weights, j, one):
    """class_weights[j], or 1."""


@overload(weight_of)
def _weight_of(class_weights, j, one):
    if class_weights == types.none:
        return lambda class_weights, j, one: one
    return lambda class_weights, j, one: class_weights[j]


@inner
def share_of(like, targets, r, j, y, class_weights, spare):
    """What class j of row r has a share of, as float64."""
    hot, rest = shares(targets)
    label = label_of(label_tile(like, targets, r, j, 1, spare), np.uint64(0), j, class_weights, number(like, 1.0))
    return rounded_product(rest + (hot if j == y else 0.0), np.float64(label))


# -- losses ------------------------------------------------------------------------------------------------------


def _dense_xent(blocks, like, rows, targets, class_weights, weights, z_loss, loss):
    """loss[r] = sum_j t_j (lse - x_j) + z_loss lse^2, t_j the share of class j; 0 for a row that does not count.

    With k the largest logit that is sum_j t_j (x_k - x_j) + log(1 + u) sum_j t_j + ...: no term cancels another.
    Returns the number of labels out of range.
    """
    n, classes = loss.size, rows[5]
    bad = np.zeros(blocks, np.int64)
    for block in prange(blocks):
        lanes, lanes_2, spare, spare_2 = stack(TILE_BYTES), stack(TILE_BYTES), stack(TILE_BYTES), stack(TILE_BYTES)
        for r in range(block * n // blocks, (block + 1) * n // blocks):
            y = target_class(targets, weights, r, classes)
            bad[block] += y == BAD
            loss[r] = np.nan if y == BAD else 0.0
            if y >= NONE:
                address = row_address(rows, r)
                largest, _, _, log1p_u = leave_largest_out(like, rows, address, lanes, spare)
                rooms = lanes, lanes_2, spare, spare_2
                distance, mass = share_sums(like, rows, address, targets, r, y, class_weights, largest, rooms)
                loss[r] = dense_loss(distance, mass, log1p_u, np.float64(largest), z_loss)
    return bad.sum()


dense_xent = Kernel(_dense_xent)


@inner
def share_sums(like, rows, address, targets, r, y, class_weights, largest, rooms):
    """(sum_j t_j (largest - x_j), sum_j t_j) of row r: lanes and chunks for the shares that all have, then y's own."""
    stride, classes, zero = rows[4], rows[5], compute_zero(like)
    lanes, lanes_2, spare, spare_2 = rooms
    distances, masses = span(zero, lanes, LANES), span(zero, lanes_2, LANES)
    hot, rest = shares(targets)
    distance, mass = 0.0, 0.0
    for chunk in range(0, classes if rest != 0.0 else 0, CHUNK):
        end = min(chunk + CHUNK, classes)
        fill(distances, zero)
        fill(masses, zero)
        for begin in range(chunk, end, LANES):
            size = min(LANES, end - begin)
            x = span(like, gather(like, address + begin * stride, stride, size, spare), size)
            labels = label_tile(like, targets, r, begin, size, spare_2)
            add_shares(x, labels, class_weights, begin, largest, distances, masses)
        distance += fold_lanes(zero, lanes, min(LANES, end - chunk))
        mass += fold_lanes(zero, lanes_2, min(LANES, end - chunk))
    if y < 0:
        return distance, mass
    weight = hot * np.float64(weight_of(class_weights, y, number(like, 1.0)))
    apart = np.float64(largest) - np.float64(widen(span(like, address + y * stride, 1)[0]))
    own = weight * apart if weight != 0.0 else 0.0
    return fma(rest, distance, own), fma(rest, mass, weight)


@inner
def add_shares(x, labels, class_weights, begin, largest, distance, mass):
    """Add l (largest - x) and l to the lanes; a label of 0 adds 0 whatever its logit."""
    out_of_line()
    for i in range(np.uint64(x.size)):
        label = label_of(labels, i, begin, class_weights, distance.dtype.type(1))
        product = fma(label, largest - widen(x[i]), distance[i])
        distance[i] = select(label == 0, distance[i], product)
        mass[i] += label


# -- gradients ---------------------------------------------------------------------------------------------------


def _dense_xent_grad(
    blocks, like, rows, targets, class_weights, weights, z_loss, as_one, second, scale, loss, like_grad, grad_rows
):
    """As dense_xent, and row r of `grad_rows` = scale[r] ((sum_j t_j + 2 z_loss lse) softmax - t), which may be the
    logits' memory; `as_one` takes 1 for the sum. A `second` that is not 0 writes the diagonal of the Hessian times it
    in place of the gradient, scale[r] p ((sum_j t_j + 2 z_loss lse) (1 - p) + 2 z_loss p). Rows that do not count get
    zeros.

    A row is read from memory once and three times from the cache. The largest class's entry and y's are put in last.
    """
    n, stride, classes, zero = loss.size, rows[4], rows[5], compute_zero(like)
    bad = np.zeros(blocks, np.int64)
    for block in prange(blocks):
        lanes, lanes_2, spare, spare_2 = stack(TILE_BYTES), stack(TILE_BYTES), stack(TILE_BYTES), stack(TILE_BYTES)
        for r in range(block * n // blocks, (block + 1) * n // blocks):
            y, out = target_class(targets, weights, r, classes), row_address(grad_rows, r)
            bad[block] += y == BAD
            loss[r] = np.nan if y == BAD else 0.0
            if y < NONE:
                fill_row(like_grad, out, grad_rows[4], classes, loss[r], lanes)
                continue
            address = row_address(rows, r)
            largest, where, u, log1p_u = leave_largest_out(like, rows, address, lanes, spare)
            rooms, x = (lanes, lanes_2, spare, spare_2), np.float64(largest)
            distance, mass = share_sums(like, rows, address, targets, r, y, class_weights, largest, rooms)
            loss[r] = dense_loss(distance, mass, log1p_u, x, z_loss)
            mass, tilt = 1.0 if as_one else mass, rounded_product(2.0 * z_loss, x + log1p_u)
            p = select(log1p_u == log1p_u, 1.0 / (1.0 + u), np.nan)
            if second != 0:
                frame = grad_frame(zero, like_grad, x, u, p)
                a, b = second * (scale[r] * (mass + tilt)), second * (scale[r] * (2.0 * z_loss))
                hess_row(like, rows, address, where, frame, a, b, p, u, like_grad, grad_rows, out, lanes, spare)
                continue
            frame = grad_frame(zero, like_grad, x, u, scale[r] * (mass + tilt) * p)
            share = share_of(like, targets, r, where, y, class_weights, spare_2)
            top = scale[r] * dense_entry(mass, tilt, share, p, u * p)
            own = top
            if y >= 0 and y != where:
                p = rounded_product(p, exp_64(np.float64(widen(span(like, address + y * stride, 1)[0])) - x))
                share = share_of(like, targets, r, y, y, class_weights, spare_2)
                own = scale[r] * dense_entry(mass, tilt, share, p, 1.0 - p)
            g = type(zero)(scale[r] * shares(targets)[1])
            for begin in range(0, classes, LANES):
                size = min(LANES, classes - begin)
                tile = span(like, gather(like, address + begin * stride, stride, size, spare), size)
                labels = label_tile(like, targets, r, begin, size, spare_2)
                grad_shares(tile, labels, class_weights, begin, g, frame, span(zero, lanes, size))
                put(zero, lanes, size, y - begin, own)
                put(zero, lanes, size, where - begin, top)
                write_tile(zero, lanes, size, like_grad, out + begin * grad_rows[4], grad_rows[4], lanes_2)
    return bad.sum()


dense_xent_grad = Kernel(_dense_xent_grad)


@inner
def hess_row(like, rows, address, where, frame, a, b, p, u, like_out, out_rows, out, room, spare):
    """Write p_j (a (1 - p_j) + b p_j) for each class; the largest's p and 1 - p are p and u p."""
    stride, classes, zero = rows[4], rows[5], compute_zero(like)
    m, low, shift, factor, _ = frame
    for begin in range(0, classes, LANES):
        size = min(LANES, classes - begin)
        x = span(like, gather(like, address + begin * stride, stride, size, spare), size)
        hess = span(zero, room, size)
        first, slope = type(zero)(a), type(zero)(b - a)
        for i in range(np.uint64(size)):
            q = grad_of(widen(x[i]) - shift, m, low, factor)
            hess[i] = q * fma(slope, q, first)
        put(zero, room, size, where - begin, p * fma(b, p, a * (u * p)))
        to = out + begin * out_rows[4]
        write_tile(zero, room, size, like_out, to, out_rows[4], spare)


@inner
def put(zero, address, size, i, value):
    """Item i of `size` at an address = value, if there is one. (Numba would drop this line in the parallel form of a
    kernel: it sees no use of the array.)"""
    if 0 <= i < size:
        span(zero, address, size)[i] = value


@inner
def grad_shares(x, labels, class_weights, begin, g, frame, grad):
    out_of_line()
    m, low, shift, factor, _ = frame
    for i in range(np.uint64(x.size)):
        label = label_of(labels, i, begin, class_weights, grad.dtype.type(1))
        grad[i] = fma(-g, label, grad_of(widen(x[i]) - shift, m, low, factor))


def _label_slopes(blocks, logs, class_weights, weights, keep, scale):
    """logs[r, j] = -scale[r] * keep * w_j * logs[r, j], in float64 and rounded once: the gradient by a label, of
    log-softmaxes. 0 for a row of weight 0."""
    n = len(logs)
    for block in prange(blocks):
        for r in range(block * n // blocks, (block + 1) * n // blocks):
            row, looked_at, slope = logs[r], not weight_is_zero(r, weights), -(scale[r] * keep)
            for j in range(np.uint64(row.size)):
                share = slope * np.float64(weight_of(class_weights, j, logs.dtype.type(1)))
                row[j] = share * np.float64(row[j]) if looked_at else 0.0


label_slopes = Kernel(_label_slopes)
