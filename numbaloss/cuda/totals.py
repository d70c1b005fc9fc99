"""Exact sums on CUDA: threads add to words of their own, warps to those in memory, by integer atomics."""

import cupy
import numpy as np
from numba import types

from .._check import CLASS_FACTORS, NONZERO_OR_NONE
from .._exact import LOW_32, WORDS, carry, number_words, quotient, round_sum
from .._intrinsics import rounded_product
from .._scalar import focal_row, focal_row_slope
from .._typed import item_size, number
from ._chunks import warp_max, warp_sum
from ._launch import cuda, device, kernel, launch, processors
from ._memory import atomic_add, load, load_fresh, store, store_item
from ._operands import ABSENT, address, factor, label_at, operand, weight_at

THREADS = 256
ALL = 0xFFFFFFFF  # threads of a warp
PER_THREAD = 8  # numbers at least, but for the last block
ONE = (ABSENT, 0, 1, 0, 0)  # an operand of ones


def blocks_for(items, out):
    return max(1, min(-(-items // (THREADS * PER_THREAD)), 2 * processors(out)))


@device
def add_words(words, i, low, middle, high):
    """Add every thread's low, middle and high to the words from its i on; as one where the warp's are alike."""
    empty = (low | middle | high) == 0
    common = warp_max(np.int64(-1) if empty else np.int64(i))
    if common < 0:
        return
    if not cuda.any_sync(ALL, not empty and i != common):
        i, low, middle, high = common, warp_sum(low), warp_sum(middle), warp_sum(high)
        empty = cuda.laneid != 0
    if not empty:
        middle, low = middle + (low >> 32), low & LOW_32
        high, middle = high + (middle >> 32), middle & LOW_32
        at = words + i * 8
        if low != 0:
            atomic_add(at, low)
        if middle != 0:
            atomic_add(at + 8, middle)
        if high != 0:
            atomic_add(at + 16, high)


@device
def all_blocks_are_done(counter, last):
    """Whether this is the last block of the grid, by `last`, shared memory; the counter then is 0 again."""
    cuda.threadfence()
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        last[0, 0] = np.int64(atomic_add(counter, np.int64(1)) == cuda.gridDim.x - 1)
        if last[0, 0]:
            store(counter, np.int64(0))
    cuda.syncthreads()
    cuda.threadfence()
    done = last[0, 0] != 0
    cuda.syncthreads()
    return done


def total(values, labels, weights, class_weights, ignore_index, divisor):
    """sum(factor * value), each product rounded to float64 and the sum once, divided as `divisor` says (_exact).

    The result shares its memory with the words of the sums: nothing else to allocate, or to keep for a CUDA graph.
    """
    words = cupy.zeros(2 * WORDS + 2, np.int64)
    result = cupy.ndarray((), values.dtype, words.data + 8 * (words.size - 1))
    classes = 0 if class_weights is None else class_weights.size
    factors = operand(labels), operand(weights), address(class_weights), classes, ignore_index
    like = values.dtype.type(0)
    arguments = values.size, like, address(values), *factors, divisor, address(words)
    launch(_total.of(like), blocks_for(values.size, values), THREADS, values, *arguments)
    return result


@kernel(THREADS)
def _total(items, like, values, labels, weights, class_weights, classes, ignore_index, divisor, words):
    """A thread holds the three words that its numbers fall into, and adds them to memory when they change. The last
    block rounds."""
    size, thread = item_size(like), np.int64(cuda.threadIdx.x)
    i, low, middle, high = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    i2, low2, middle2, high2 = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    ones = np.int64(0)
    step = np.int64(cuda.gridDim.x) * THREADS
    first = np.int64(cuda.blockIdx.x) * THREADS
    while first < items:
        k = first + thread
        f, value = 0.0, 0.0
        if k < items:
            f = factor(k, labels, weights, class_weights, classes, ignore_index)
            above = factor(k, labels, weights, 0, classes, ignore_index) if divisor == CLASS_FACTORS else f
            if above != 0.0:  # a factor of exactly 0 hides its value, even a NaN
                value = np.float64(load(like, values + k * size)) * above
        j, a, b, c = number_words(value)
        if cuda.any_sync(ALL, j != i and value != 0.0):
            add_words(words, i, low, middle, high)
            i, low, middle, high = np.int64(j) if value != 0.0 else i, np.int64(0), np.int64(0), np.int64(0)
        low, middle, high = low + a, middle + b, high + c
        if f == 1.0:
            ones += 1
        share = 0.0 if f == 0.0 or f == 1.0 else 1.0 if divisor == NONZERO_OR_NONE else f
        j, a, b, c = number_words(share)
        if cuda.any_sync(ALL, j != i2 and share != 0.0):
            add_words(words + WORDS * 8, i2, low2, middle2, high2)
            i2, low2, middle2, high2 = np.int64(j) if share != 0.0 else i2, np.int64(0), np.int64(0), np.int64(0)
        low2, middle2, high2 = low2 + a, middle2 + b, high2 + c
        first += step
    add_words(words, i, low, middle, high)
    add_words(words + WORDS * 8, i2, low2, middle2, high2)
    j, a, b, c = number_words(np.float64(ones))
    add_words(words + WORDS * 8, j, a, b, c)
    room, sums = cuda.shared.array((2, WORDS), types.int64), cuda.shared.array(2, types.float64)
    if all_blocks_are_done(words + 2 * WORDS * 8, room):
        for k in range(thread, 2 * WORDS, THREADS):
            room[k // WORDS, k % WORDS] = load_fresh(words + k * 8)
        cuda.syncthreads()
        if thread == 0 or thread == 32:
            sums[thread >> 5] = round_sum(room[thread >> 5])
        cuda.syncthreads()
        if thread == 0:
            store(words + (2 * WORDS + 1) * 8, number(like, quotient(sums[0], sums[1], divisor)))


def row_totals(work, items, values, weights, count, row_step, step, divisor, totals, divisors):
    """totals[r] = the total of values[r * row_step + i * step] for i < count, weighted and divided as in `total`.

    `divisors`, float64 or None, gets what it was divided by, +inf for one of 0 that gave 0.
    """
    like = values.dtype.type(0)
    results = address(totals), address(divisors)
    arguments = like, address(values), operand(weights), count, row_step, step, divisor, *results
    return launch(_row_totals.of(like), items, 32, values, items, *arguments)


@kernel(32)
def _row_totals(items, like, values, weights, count, row_step, step, divisor, totals, divisors):
    """A warp takes a row; its words lie in shared memory."""
    room = cuda.shared.array((2, WORDS), types.int64)
    lane, r = np.int64(cuda.laneid), np.int64(cuda.blockIdx.x)
    for k in range(lane, 2 * WORDS, 32):
        room[k // WORDS, k % WORDS] = 0
    cuda.syncwarp()
    for i in range(lane, count, 32):
        at = r * row_step + i * step
        w = weight_at(weights, at)
        if w != 0.0:
            add_number(room, 0, np.float64(load(like, values + at * item_size(like))) * w)
            add_number(room, 1, 1.0 if divisor == NONZERO_OR_NONE else w)
    cuda.syncwarp()
    if lane == 0:
        below = round_sum(room[1])
        store(totals + r * item_size(like), number(like, quotient(round_sum(room[0]), below, divisor)))
        if divisors != 0:
            store(divisors + r * 8, np.inf if below == 0.0 else below)


@device
def add_number(room, row, x):
    i, low, middle, high = number_words(x)
    cuda.atomic.add(room, (row, i), low)
    cuda.atomic.add(room, (row, i + 1), middle)
    cuda.atomic.add(room, (row, i + 2), high)


def scale(work, items, values, labels, weights, class_weights, ignore_index):
    """values[i] *= factor, in float64 and rounded once; exactly 0 where the factor is."""
    classes = 0 if class_weights is None else class_weights.size
    factors = operand(labels), operand(weights), address(class_weights), classes, ignore_index
    blocks, like = -(-items // THREADS), values.dtype.type(0)
    return launch(_scale.of(like), blocks, THREADS, values, items, like, address(values), *factors)


@kernel(THREADS)
def _scale(items, like, values, labels, weights, class_weights, classes, ignore_index):
    i = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if i < items:
        at = values + i * item_size(like)
        f = factor(i, labels, weights, class_weights, classes, ignore_index)
        store(at, number(like, np.float64(load(like, at)) * f if f != 0.0 else 0.0))


def slopes(work, items, upstream, labels, weights, class_weights, ignore_index, divisor, out):
    """out[i] = factor * (upstream[i] / divisor[i]), float64, exactly 0 where the factor is: d(total) / d(value i).

    upstream and divisor may be None, or one number for all.
    """
    classes = 0 if class_weights is None else class_weights.size
    factors = operand(labels), operand(weights), address(class_weights), classes, ignore_index
    arguments = operand(upstream), *factors, operand(divisor), address(out)
    return launch(_slopes.of(np.float64(0)), -(-items // THREADS), THREADS, out, items, *arguments)


@kernel(THREADS)
def _slopes(items, upstream, labels, weights, class_weights, classes, ignore_index, divisor, out):
    i = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if i < items:
        f = factor(i, labels, weights, class_weights, classes, ignore_index)
        g = weight_at(upstream, i) / weight_at(divisor, i)
        store(out + i * 8, f * g if f != 0.0 else 0.0)


def weight_slopes(
    work, items, values, upstream, divisor, mean, labels, weights, class_weights, inside, ignore_index, out
):
    """out[i] = (upstream[i] / divisor[i]) * (c * value i - c * mean[i]), c the class weight: d(total) / d(weight i), 0
    for a weight of 0. The first c is 1 if values have it `inside`; `divisor` and `mean` may be None, as in slopes."""
    classes, like = 0 if class_weights is None else class_weights.size, values.dtype.type(0)
    factors = operand(labels), operand(weights), address(class_weights), classes, int(inside), ignore_index
    arguments = like, address(values), operand(upstream), operand(divisor), operand(mean), *factors, address(out)
    return launch(_weight_slopes.of(like), -(-items // THREADS), THREADS, out, items, out.dtype.type(0), *arguments)


@kernel(THREADS)
def _weight_slopes(
    items,
    like_out,
    like,
    values,
    upstream,
    divisor,
    mean,
    labels,
    weights,
    class_weights,
    classes,
    inside,
    ignore_index,
    out,
):
    i = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if i < items:
        slope = 0.0
        if factor(i, labels, weights, 0, classes, ignore_index) != 0.0:
            c = factor(i, labels, ONE, class_weights, classes, ignore_index)
            slope = np.float64(load(like, values + i * item_size(like)))
            if not inside:
                slope = rounded_product(slope, c)
            if mean[0] != ABSENT:
                slope -= rounded_product(c, weight_at(mean, i))
            slope *= weight_at(upstream, i) / weight_at(divisor, i)
        store_item(like_out, out + i * item_size(like_out), slope)


def focal(work, items, losses, gamma):
    """l (1 - exp(-l))^gamma for each loss l, in place."""
    like = losses.dtype.type(0)
    return launch(_focal.of(like), -(-items // THREADS), THREADS, losses, items, like, address(losses), float(gamma))


@kernel(THREADS)
def _focal(items, like, losses, gamma):
    i = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if i < items:
        at = losses + i * item_size(like)
        store(at, number(like, focal_row(np.float64(load(like, at)), gamma)))


def focal_slopes(work, items, losses, gamma, slopes):
    """slopes[i] *= d focal / d loss."""
    like = losses.dtype.type(0)
    arguments = items, like, address(losses), float(gamma), address(slopes)
    return launch(_focal_slopes.of(like), -(-items // THREADS), THREADS, losses, *arguments)


@kernel(THREADS)
def _focal_slopes(items, like, losses, gamma, slopes):
    i = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if i < items:
        loss = np.float64(load(like, losses + i * item_size(like)))
        store(slopes + i * 8, load(0.0, slopes + i * 8) * focal_row_slope(loss, gamma))


def negate(work, items, values):
    """values[i] = 0 - values[i]; never -0."""
    like = values.dtype.type(0)
    return launch(_negate.of(like), -(-items // THREADS), THREADS, values, items, like, address(values))


@kernel(THREADS)
def _negate(items, like, values):
    i = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if i < items:
        store(values + i * item_size(like), like - load(like, values + i * item_size(like)))


def add_tokens(work, items, logprob, argmax, labels, weights, ignore_index, words):
    """Add the six sums of an Evaluation to the rows of `words`, and the number of tokens to words[6, 0], of targets and
    of weights out of range to words[6, 1:3]."""
    like = logprob.dtype.type(0)
    arguments = address(logprob), address(argmax), operand(labels), operand(weights), ignore_index, address(words)
    return launch(_add_tokens.of(like), blocks_for(items, logprob), THREADS, logprob, items, like, *arguments)


@kernel(THREADS)
def _add_tokens(items, like, logprob, argmax, labels, weights, ignore_index, words):
    """A warp adds 32 tokens at a time. The last block brings the words back into their range."""
    thread, row = np.int64(cuda.threadIdx.x), WORDS * 8
    step = np.int64(cuda.gridDim.x) * THREADS
    first = np.int64(cuda.blockIdx.x) * THREADS
    tokens, bad_targets, bad_weights = np.int64(0), np.int64(0), np.int64(0)
    while first < items:
        k = first + thread
        f, loss, correct = 0.0, 0.0, 0.0
        if k < items:
            y, w = label_at(labels, k), weight_at(weights, k)
            if not 0.0 <= w < np.inf:
                bad_weights += 1
            elif y != ignore_index and w != 0.0:
                where = load(np.int64(0), argmax + k * 8)
                if where < 0:  # score gave up on this label
                    bad_targets += 1
                else:
                    f, loss = w, -np.float64(load(like, logprob + k * item_size(like)))
                    correct = w if where == y else 0.0
                    tokens += 1
        square = f * f
        add_numbers(words, f)
        add_numbers(words + row, f * loss)
        add_numbers(words + 2 * row, correct)
        add_numbers(words + 3 * row, square)
        add_numbers(words + 4 * row, square * loss)
        add_numbers(words + 5 * row, square * loss * loss)
        first += step
    add_words(words + 6 * row, np.int64(0), tokens, bad_targets, bad_weights)
    room = cuda.shared.array((6, WORDS), types.int64)
    if all_blocks_are_done(words + 6 * row + 24, room):
        for k in range(thread, 6 * WORDS, THREADS):
            room[k // WORDS, k % WORDS] = load_fresh(words + k * 8)
        cuda.syncthreads()
        if thread < 6:
            carry(room[thread])
        cuda.syncthreads()
        for k in range(thread, 6 * WORDS, THREADS):
            store(words + k * 8, room[k // WORDS, k % WORDS])


@device
def add_numbers(words, x):
    """Add a number of each thread."""
    i, low, middle, high = number_words(x)
    add_words(words, i, low, middle, high)
