"""Cross entropies of class probabilities on CUDA: of dense labels, or of one class smoothed over all. A team, a warp or
a block, takes a row.

`targets` is as in cpu/dense.py, but that kernels get (*operand(labels), hot, rest, ignore_index). `class_weights` is an
address, 0 for none.
"""

import numpy as np
from numba import types
from numba.extending import overload

from .._check import NO_LABEL
from .._intrinsics import fma, rounded_product
from .._scalar import CHUNK, LANES, dense_entry, dense_loss, exp_64
from .._typed import compute_zero, grad_frame, grad_of, item_size, number, widen
from ._chunks import WARP, fold_lanes
from ._launch import cuda, device, kernel, launch
from ._memory import (
    HALF,
    fill,
    halves,
    join,
    load,
    load_apart,
    ones_apart,
    store,
    store_item,
    store_part,
    unless_zero,
    zeros,
)
from ._operands import address, counts, label_at, operand, weight_at, with_known_stride
from ._rows import PARTS, TEAMS, class_stride, row_address, team_of, teams
from ._sums import SUMS, load_sums, sums_of_rows
from .elements import THREADS

BAD, NOT_COUNTED, NONE = -3, -2, -1


def numbers(targets):
    """Targets as the kernels get them."""
    return targets if len(targets) == 9 else (*operand(targets[0]), *targets[1:])


def sums_of_targets(items, like, rows, targets, weights, out):
    """sums_of_rows that count."""
    labels, ignore_index = (None, NO_LABEL) if len(targets) == 9 else (targets[0], targets[3])
    return sums_of_rows(items, like, rows, labels, weights, ignore_index, out)


def target_class(targets, weights, r, classes):
    """The class with a share of its own, or NONE; NOT_COUNTED for a row that is not looked at; BAD for a label out of
    range."""
    return dense_class(targets, weights, r, classes) if len(targets) == 9 else own_class(targets, weights, r, classes)


@overload(target_class)
def _target_class(targets, weights, r, classes):
    if len(targets) == 9:
        return lambda targets, weights, r, classes: dense_class(targets, weights, r, classes)
    return lambda targets, weights, r, classes: own_class(targets, weights, r, classes)


@device
def dense_class(targets, weights, r, classes):
    return np.int64(NOT_COUNTED) if weight_at(weights, r) == 0.0 else np.int64(NONE)


@device
def own_class(targets, weights, r, classes):
    if not counts(r, targets[:5], weights, targets[7]):
        return np.int64(NOT_COUNTED)
    y = label_at(targets[:5], r)
    return y if 0 <= y < classes else np.int64(BAD)


def shares(targets):
    """(hot, rest); dense labels are shares of the classes as they stand."""
    return (0.0, 1.0) if len(targets) == 9 else (targets[5], targets[6])


@overload(shares)
def _shares(targets):
    if len(targets) == 9:
        return lambda targets: (0.0, 1.0)
    return lambda targets: (targets[5], targets[6])


def load_labels(like, targets, r, class_weights, begin, position, end):
    """Half of this thread's labels among LANES positions of row r from class `begin` on (see load_apart), times class
    weights; 0 from `end` on."""
    function = labels_of_row if len(targets) == 9 else labels_of_one
    return function(like, targets, r, class_weights, begin, position, end)


@overload(load_labels)
def _load_labels(like, targets, r, class_weights, begin, position, end):
    if len(targets) == 9:
        return lambda like, targets, r, class_weights, begin, position, end: labels_of_row(
            like, targets, r, class_weights, begin, position, end
        )
    return lambda like, targets, r, class_weights, begin, position, end: labels_of_one(
        like, targets, r, class_weights, begin, position, end
    )


@device
def labels_of_row(like, targets, r, class_weights, begin, position, end):
    stride = targets[5]
    at = row_address(targets[1:], r) + (begin + position) * stride
    labels = load_apart(like, targets[0], at, stride, position, end)
    labels = fma(number(like, targets[7]), labels, number(like, targets[8]))
    return rounded_product(labels, labels_of_one(like, targets, r, class_weights, begin, position, end))


@device
def labels_of_one(like, targets, r, class_weights, begin, position, end):
    if class_weights == 0:
        return ones_apart(like, position, end)
    zero, item = compute_zero(like), np.int64(item_size(compute_zero(like)))
    return load_apart(like, zero, class_weights + (begin + position) * item, item, position, end)


def label_of(like, targets, r, j):
    """The label of class j of row r."""
    return label_at_class(like, targets, r, j) if len(targets) == 9 else number(like, 1.0)


@overload(label_of)
def _label_of(like, targets, r, j):
    if len(targets) == 9:
        return lambda like, targets, r, j: label_at_class(like, targets, r, j)
    return lambda like, targets, r, j: number(like, 1.0)


@device
def label_at_class(like, targets, r, j):
    label = number(like, widen(load(targets[0], row_address(targets[1:], r) + j * targets[5])))
    return fma(number(like, targets[7]), label, number(like, targets[8]))


@device
def share_of(like, targets, r, j, y, class_weights):
    """What class j of row r has a share of, as float64."""
    hot, rest = shares(targets)
    label = label_of(like, targets, r, j)
    if class_weights != 0:
        label = label * load(compute_zero(like), class_weights + j * item_size(compute_zero(like)))
    return rounded_product(rest + (hot if j == y else 0.0), np.float64(label))


# -- losses ------------------------------------------------------------------------------------------------------


def dense_xent(work, items, like, rows, targets, class_weights, weights, z_loss, loss):
    """loss[r] = sum_j t_j (lse - x_j) + z_loss lse^2, t_j the share of class j; 0 for a row that does not count."""
    rows = with_known_stride(like, rows)
    sums = sums_of_targets(items, like, rows, targets, weights, loss)
    arguments = numbers(targets), address(class_weights), operand(weights), float(z_loss), address(sums), address(loss)
    return launch(_dense_xent.of(like), *teams(items, rows[5]), loss, items, like, rows, *arguments)


@kernel(32 * TEAMS, 4, 4, 2)
def _dense_xent(items, like, rows, targets, class_weights, weights, z_loss, sums, loss):
    """sum_j t_j (x_k - x_j) + log(1 + u) sum_j t_j, k the largest logit; both sums over lanes and chunks."""
    room = cuda.shared.array((3, PARTS), types.float64)
    r, warp, _ = team_of(rows[5])
    if r >= items:
        return
    y = target_class(targets, weights, r, rows[5])
    value = np.nan if y == BAD else 0.0
    if y >= NONE:
        largest, _, _, log1p_u = load_sums(like, sums + r * SUMS)
        distance, mass = share_sums(like, rows, targets, r, y, class_weights, largest, room)
        value = dense_loss(distance, mass, log1p_u, np.float64(largest), z_loss)
    if warp == 0 and cuda.laneid == 0:
        store(loss + r * item_size(compute_zero(like)), number(like, value))


@device
def share_sums(like, rows, targets, r, y, class_weights, largest, room):
    """(sum_j t_j (largest - x_j), sum_j t_j) of row r: its chunks left to right, then y's own."""
    address, stride = row_address(rows, r), class_stride(like, rows)
    _, warp, warps = team_of(rows[5])
    hot, rest = shares(targets)
    chunks, first = np.int32((rows[5] + CHUNK - 1) // CHUNK), np.int32(0)
    if rest == 0.0:
        chunks = np.int32(0)
    distance, mass = 0.0, 0.0
    while first < chunks:
        count, k = min(np.int32(PARTS), np.int32(chunks - first)), np.int32(warp)
        while k < count:
            begin = np.int64(first + k) * CHUNK
            size = min(np.int64(CHUNK), rows[5] - begin)
            at = address + begin * stride
            d = chunk_distance(like, at, stride, targets, r, class_weights, begin, size, largest)
            w = chunk_mass(like, targets, r, class_weights, begin, size)
            if warps == 1:
                distance, mass = d, w
            elif cuda.laneid == 0:
                room[0, k], room[1, k] = d, w
            k = np.int32(k + warps)
        if warps > 1:
            cuda.syncthreads()
            for k in range(count):
                distance, mass = distance + room[0, k], mass + room[1, k]
            cuda.syncthreads()
        first = np.int32(first + PARTS)
    if y < 0:
        return distance, mass
    weight = hot
    if class_weights != 0:
        weight = hot * np.float64(load(compute_zero(like), class_weights + y * item_size(compute_zero(like))))
    own = 0.0
    if weight != 0.0:
        own = weight * (np.float64(largest) - np.float64(widen(load(like, address + y * stride))))
    return fma(rest, distance, own), fma(rest, mass, weight)


@device
def chunk_distance(like, address, stride, targets, r, class_weights, begin, size, largest):
    """The sum of l (largest - x) over a chunk, l the label times its class weight: 0 for a label of 0, whatever its
    logit."""
    low, high = halves(zeros(like))
    for p in range(0, size, LANES):
        position = p + cuda.laneid * (16 // item_size(like))
        low = add_distance(like, address, stride, targets, r, class_weights, begin, position, size, largest, low)
        position += HALF
        high = add_distance(like, address, stride, targets, r, class_weights, begin, position, size, largest, high)
    return fold_lanes(like, join(low, high), WARP)


@device
def add_distance(like, address, stride, targets, r, class_weights, begin, position, end, largest, total):
    x = load_apart(like, like, address + position * stride, stride, position, end)
    label = load_labels(like, targets, r, class_weights, begin, position, end)
    return unless_zero(label, fma(label, largest - x, total), total)


@device
def chunk_mass(like, targets, r, class_weights, begin, size):
    """The sum of l over a chunk."""
    low, high = halves(zeros(like))
    for p in range(0, size, LANES):
        position = p + cuda.laneid * (16 // item_size(like))
        low = low + load_labels(like, targets, r, class_weights, begin, position, size)
        high = high + load_labels(like, targets, r, class_weights, begin, position + HALF, size)
    return fold_lanes(like, join(low, high), WARP)


# -- gradients ---------------------------------------------------------------------------------------------------


def dense_xent_grad(
    work, items, like, rows, targets, class_weights, weights, z_loss, as_one, second, scale, loss, like_grad, grad_rows
):
    """As dense_xent, and row r of `grad_rows` = scale[r] ((sum_j t_j + 2 z_loss lse) softmax - t), which may be the
    logits' memory; `as_one` takes 1 for the sum. A `second` that is not 0 writes the diagonal of the Hessian times it
    in place of the gradient, scale[r] p ((sum_j t_j + 2 z_loss lse) (1 - p) + 2 z_loss p). Rows that do not count get
    zeros."""
    rows, grad_rows = with_known_stride(like, rows), with_known_stride(like_grad, grad_rows)
    factors = numbers(targets), address(class_weights), operand(weights), float(z_loss), int(as_one), float(second)
    sums = sums_of_targets(items, like, rows, targets, weights, loss)
    arguments = items, like, rows, *factors, address(sums), address(scale), address(loss), like_grad, grad_rows
    return launch(_dense_xent_grad.of(like), *teams(items, rows[5]), loss, *arguments)


@kernel(32 * TEAMS, 3, 3, 2)
def _dense_xent_grad(
    items, like, rows, targets, class_weights, weights, z_loss, as_one, second, sums, scale, loss, like_grad, grad_rows
):
    """As _dense_xent; then the team reads the row again from the caches and writes its gradient, and one thread the
    largest class's entry and y's."""
    room = cuda.shared.array((3, PARTS), types.float64)
    r, _, _ = team_of(rows[5])
    if r >= items:
        return
    zero = compute_zero(like)
    y, stride = target_class(targets, weights, r, rows[5]), class_stride(like, rows)
    value, where, top, own, a, b, g = np.nan if y == BAD else 0.0, np.int64(-1), 0.0, 0.0, 0.0, 0.0, 0.0
    m, low, shift, factor, _ = grad_frame(zero, like_grad, 0.0, 0.0, 0.0)
    if y >= NONE:
        largest, where, u, log1p_u = load_sums(like, sums + r * SUMS)
        x, (r, _, _) = np.float64(largest), team_of(rows[5])  # again: registers are for the sums
        distance, mass = share_sums(like, rows, targets, r, y, class_weights, largest, room)
        value, g = dense_loss(distance, mass, log1p_u, x, z_loss), load(0.0, scale + r * 8)
        mass, tilt = 1.0 if as_one else mass, rounded_product(2.0 * z_loss, x + log1p_u)
        p = 1.0 / (1.0 + u) if log1p_u == log1p_u else np.nan
        a, b = rounded_product(second, g * (mass + tilt)), rounded_product(second, g * (2.0 * z_loss))
        m, low, shift, factor, _ = grad_frame(zero, like_grad, x, u, p if second != 0.0 else g * (mass + tilt) * p)
        top = g * dense_entry(mass, tilt, share_of(like, targets, r, where, y, class_weights), p, u * p)
        own = top
        if second != 0.0:
            top = p * fma(b, p, a * (u * p))
        elif y >= 0 and y != where:
            of_y = widen(load(like, row_address(rows, r) + y * stride))
            p = rounded_product(p, exp_64(np.float64(of_y) - x))
            own = g * dense_entry(mass, tilt, share_of(like, targets, r, y, y, class_weights), p, 1.0 - p)
    r, warp, warps = team_of(rows[5])
    first = warp == 0 and cuda.laneid == 0
    if first:
        store(loss + r * item_size(zero), number(like, value))
    if warps > 1:
        cuda.syncthreads()
    cuda.syncwarp()  # in place: y's logit has been read by all
    address, out, grad_stride = row_address(rows, r), row_address(grad_rows, r), class_stride(like_grad, grad_rows)
    g, p = number(like, g * shares(targets)[1]), np.int64(warp) * LANES
    while p < rows[5]:
        near = np.int32(min(rows[5] - p, np.int64(LANES)))
        position = np.int32(cuda.laneid * (16 // item_size(like)))
        grad = fill(like, number(like, value))
        if y >= NONE:
            at, frame, extra = address + p * stride, (m, low, shift, factor), (g, a, b)
            half = np.int64(position)
            first_half = grad_half(like, at, stride, targets, r, class_weights, p, half, near, frame, second, extra)
            half += HALF
            last_half = grad_half(like, at, stride, targets, r, class_weights, p, half, near, frame, second, extra)
            grad = join(first_half, last_half)
        to = out + (p + position) * grad_stride
        store_part(like, like_grad, to, grad_stride, position, np.int32(0), near, grad)
        p += warps * LANES
    if y >= NONE:
        if warps > 1:
            cuda.syncthreads()
        cuda.syncwarp()
        if first:
            if y >= 0 and second == 0.0:
                store_item(like_grad, out + y * grad_stride, number(like, own))
            store_item(like_grad, out + where * grad_stride, number(like, top))


@device
def grad_half(like, address, stride, targets, r, class_weights, begin, position, end, frame, second, extra):
    """Entries of a gradient, or of a Hessian if `second` is not 0, at the positions of load_apart."""
    m, low, shift, factor = frame
    g, a, b = extra
    x = load_apart(like, like, address + position * stride, stride, position, np.int64(end))
    grad = grad_of(x - shift, m, low, factor)
    if second != 0.0:
        return grad * fma(number(like, b - a), grad, number(like, a))
    return fma(-g, load_labels(like, targets, r, class_weights, begin, position, np.int64(end)), grad)


def label_slopes(work, items, logs, class_weights, weights, keep, scale):
    """logs[r, j] = -scale[r] * keep * w_j * logs[r, j], in float64 and rounded once: the gradient by a label, of
    log-softmaxes. 0 for a row of weight 0."""
    like, classes = logs.dtype.type(0), logs.shape[1]
    arguments = address(logs), classes, address(class_weights), operand(weights), float(keep), address(scale)
    return launch(_label_slopes.of(like), -(-work // THREADS), THREADS, logs, work, like, *arguments)


@kernel(THREADS)
def _label_slopes(items, like, logs, classes, class_weights, weights, keep, scale):
    """A thread takes an item."""
    i = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if i < items:
        r, size = i // classes, item_size(like)
        value = 0.0
        if weight_at(weights, r) != 0.0:
            share = -(load(0.0, scale + r * 8) * keep)
            if class_weights != 0:
                share *= np.float64(load(like, class_weights + (i - r * classes) * size))
            value = share * np.float64(load(like, logs + i * size))
        store(logs + i * size, number(like, value))
