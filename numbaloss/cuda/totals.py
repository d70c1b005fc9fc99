"""Exact sums on CUDA: threads add to words of their own, blocks to those in memory, by integer atomics."""

import cupy
import numpy as np
from numba import types

from .._check import CLASS_FACTORS, FACTORS_ALONE, NONZERO_OR_NONE
from .._exact import LOW_32, SPAN, WORDS, carry, number_words, quotient, round_between
from .._intrinsics import rounded_product, select
from .._scalar import focal_row, focal_row_slope
from .._typed import item_size, number
from ._chunks import ALL, warp_max, warp_sum
from ._launch import cuda, device, kernel, launch, processors
from ._memory import atomic_add, load, load_fresh, store, store_item
from ._operands import ABSENT, address, factor, label_at, operand, weight_at

THREADS = 256
MOST, TOKENS = 1024, 512  # threads of a block that sums, at most
ALONE = 4  # numbers of a thread: as many one block sums before others could have told it theirs
WINDOW = 30  # numbers of 2^-62 to 2^34 fall into three of the words from here on
HELD = 5  # words, that a thread has of its own
EMPTY = (0,) * HELD
ONE = (ABSENT, 0, 1, 0, 0)  # an operand of ones
ONE_BIT = 1074 - 32 * (WINDOW + 3)  # of the number 1 in the fourth word held


def grid_for(items, most, out):
    """(blocks, threads): at most a block for each multiprocessor, so that few have to meet in memory."""
    blocks = 1 if items <= ALONE * most else min(-(-items // THREADS), processors(out))
    return blocks, min(most, max(64, -(-items // (32 * blocks)) * 32))


@device
def clear(room):
    """Shared memory: the words of a block, in rows."""
    for row in range(room.shape[0]):
        k = np.int64(cuda.threadIdx.x)
        while k < WORDS:
            room[row, k] = 0
            k += cuda.blockDim.x
    cuda.syncthreads()


@device
def hold(held, room, row, x):
    """What a thread holds, with its number x; the whole warp takes part. Other numbers go to the room."""
    i, low, middle, high = number_words(x)
    i -= WINDOW
    away = x != 0.0 and not 0 <= i <= HELD - 3
    if cuda.any_sync(ALL, away):
        add_number(room, row, x if away else 0.0)
    none, first, second, third = np.int64(0), i == 0, i == 1, i == 2
    a, b, c, d, e = held
    a += select(first, low, none)
    b += select(first, middle, select(second, low, none))
    c += select(first, high, select(second, middle, select(third, low, none)))
    d += select(second, high, select(third, middle, none))
    e += select(third, high, none)
    return a, b, c, d, e


@device
def add_number(room, row, x):
    """Add a number of each thread of a warp, those with the index of the largest as one: an atomic operation of 64 bits
    is a loop in shared memory."""
    i, low, middle, high = number_words(x)
    lane, none = np.int64(cuda.laneid), np.int64(0)
    largest = warp_max(i * 32 + lane if x != 0.0 else np.int64(-1))
    alike, leads = i == largest >> 5, lane == largest & 31
    a, b, c = select(alike, low, none), select(alike, middle, none), select(alike, high, none)
    a, b, c = warp_sum(a), warp_sum(b), warp_sum(c)
    if alike:
        low, middle, high = select(leads, a, none), select(leads, b, none), select(leads, c, none)
    if low != 0:
        cuda.atomic.add(room, (row, i), low)
    if middle != 0:
        cuda.atomic.add(room, (row, i + 1), middle)
    if high != 0:
        cuda.atomic.add(room, (row, i + 2), high)


@device
def add_held(room, row, first, held, parts):
    """Add what the threads of a block hold to a row from its word `first` on; each warp sums a word of some threads."""
    thread, lane = np.int64(cuda.threadIdx.x), np.int64(cuda.laneid)
    parts[0, thread], parts[1, thread], parts[2, thread], parts[3, thread], parts[4, thread] = held
    cuda.syncthreads()
    warps = np.int64(cuda.blockDim.x >> 5)
    shares = max(warps // HELD, 1)
    k = thread >> 5
    while k < HELD * shares:
        word, other = np.int64(0), k // HELD * 32 + lane
        while other < cuda.blockDim.x:
            word += parts[k % HELD, other]
            other += shares * 32
        word = warp_sum(word)
        if lane == 0 and word != 0:
            cuda.atomic.add(room, (row, first + k % HELD), word)
        k += warps
    cuda.syncthreads()


@device
def all_blocks_added(room, words, counter):
    """Add the room of each block to the words in memory, once its carries have moved. Whether this is the last block:
    its room then holds these words."""
    for row in range(room.shape[0]):
        k = np.int64(cuda.threadIdx.x)
        while k < WORDS:
            word = carried(room[row], k)
            if word != 0:
                atomic_add(words + (row * WORDS + k) * 8, word)
            k += cuda.blockDim.x
    if not all_blocks_are_done(counter, room):
        return False
    for row in range(room.shape[0]):
        k = np.int64(cuda.threadIdx.x)
        while k < WORDS:
            room[row, k] = load_fresh(words + (row * WORDS + k) * 8)
            k += cuda.blockDim.x
    cuda.syncthreads()
    return True


@device
def carried(words, k):
    """Word k of the sum when each has given the next what it has beyond 32 bits."""
    word = words[k]
    if k < SPAN - 1:
        word &= LOW_32
    if 0 < k < SPAN:
        word += words[k - 1] >> 32
    return word


@device
def all_blocks_are_done(counter, last):
    """Whether this is the last block of the grid, by `last`, shared memory; the counter then is 0 again."""
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        cuda.threadfence()  # for the whole block, which has met
        last[0, 0] = np.int64(atomic_add(counter, np.int64(1)) == cuda.gridDim.x - 1)
        if last[0, 0]:
            store(counter, np.int64(0))
        cuda.threadfence()
    cuda.syncthreads()
    done = last[0, 0] != 0
    cuda.syncthreads()
    return done


@device
def reach(words):
    """(first, last) word of the sum that is not 0, for the threads of a warp; (SPAN, -1) if all are."""
    first, last, k = SPAN, -1, np.int64(cuda.laneid)
    while k < SPAN:
        if words[k] != 0:
            first, last = min(first, k), k
        k += 32
    cuda.syncwarp()  # one of them will carry through these words
    return -np.int64(warp_max(np.int32(-first))), np.int64(warp_max(np.int32(last)))  # a shuffle moves 32 bits


def total(values, labels, weights, class_weights, ignore_index, divisor):
    """sum(factor * value), each product rounded to float64 and the sum once, divided as `divisor` says (_exact).

    The result shares its memory with the words of the sums: nothing else to allocate, or to keep for a CUDA graph.
    """
    blocks, threads = grid_for(values.size, MOST, values)
    words = (cupy.zeros if blocks > 1 else cupy.empty)(2 * WORDS + 2, np.int64)  # one block writes the result alone
    result = cupy.ndarray((), values.dtype, words.data + 8 * (words.size - 1))
    classes = 0 if class_weights is None else class_weights.size
    factors = operand(labels), operand(weights), address(class_weights), classes, ignore_index
    like = values.dtype.type(0)
    arguments = values.size, like, address(values), *factors, divisor, address(words)
    launch(_total.of(like), blocks, threads, values, *arguments)
    return result


@kernel(MOST)
def _total(items, like, values, labels, weights, class_weights, classes, ignore_index, divisor, words):
    """A thread holds the words that usual numbers fall into. At the end a block adds those of its threads in shared
    memory, to where it has put other numbers, and its words to those in memory. The last block rounds: a warp for each
    sum finds the words that are not 0, and one thread carries through these few."""
    room, parts = cuda.shared.array((2, WORDS), types.int64), cuda.shared.array((HELD, MOST), types.int64)
    sums = cuda.shared.array(2, types.float64)
    size, thread, threads = item_size(like), np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
    top, bottom, ones = EMPTY, EMPTY, np.int64(0)
    clear(room)
    step = cuda.gridDim.x * threads
    first = cuda.blockIdx.x * threads
    while first < items:
        k = first + thread
        f, value = 0.0, 0.0
        if k < items:
            if divisor != FACTORS_ALONE:
                value = np.float64(load(like, values + k * size))  # without waiting for the factor
            f = factor(k, labels, weights, class_weights, classes, ignore_index)
            above = factor(k, labels, weights, 0, classes, ignore_index) if divisor == CLASS_FACTORS else f
            value = select(above != 0.0, value * above, 0.0)  # a factor of exactly 0 hides its value, even a NaN
        top = hold(top, room, 0, value)
        if f == 1.0:
            ones += 1
        share = 0.0 if f == 0.0 or f == 1.0 else 1.0 if divisor == NONZERO_OR_NONE else f
        if cuda.any_sync(ALL, share != 0.0):
            bottom = hold(bottom, room, 1, share)
        first += step
    a, b, c, d, e = bottom
    add_held(room, 0, WINDOW, top, parts)
    add_held(room, 1, WINDOW, (a, b, c, d + (ones << ONE_BIT), e), parts)
    if cuda.gridDim.x == 1 or all_blocks_added(room, words, words + 2 * WORDS * 8):
        row = thread >> 5
        if row < 2:
            begin, end = reach(room[row])
            if cuda.laneid == 0:
                sums[row] = round_between(room[row], begin, end)
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
    """A warp takes a row."""
    room, parts = cuda.shared.array((2, WORDS), types.int64), cuda.shared.array((HELD, 32), types.int64)
    lane, r = np.int64(cuda.laneid), np.int64(cuda.blockIdx.x)
    top, bottom, first = EMPTY, EMPTY, np.int64(0)
    clear(room)
    while first < count:
        w, value = 0.0, 0.0
        if first + lane < count:
            at = r * row_step + (first + lane) * step
            value, w = np.float64(load(like, values + at * item_size(like))), weight_at(weights, at)
            value = select(w != 0.0, value * w, 0.0)
        top = hold(top, room, 0, value)
        bottom = hold(bottom, room, 1, 1.0 if divisor == NONZERO_OR_NONE and w != 0.0 else w)
        first += 32
    add_held(room, 0, WINDOW, top, parts)
    add_held(room, 1, WINDOW, bottom, parts)
    (begin, end), (begin2, end2) = reach(room[0]), reach(room[1])
    if lane == 0:
        below = round_between(room[1], begin2, end2)
        above = round_between(room[0], begin, end)
        store(totals + r * item_size(like), number(like, quotient(above, below, divisor)))
        if divisors != 0:
            store(divisors + r * 8, np.inf if below == 0.0 else below)


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
    grid = grid_for(items, TOKENS, logprob)
    return launch(_add_tokens.of(like), *grid, logprob, items, like, *arguments)


@kernel(TOKENS)
def _add_tokens(items, like, logprob, argmax, labels, weights, ignore_index, words):
    """As _total; the last block brings the words back into their range."""
    room, parts = cuda.shared.array((7, WORDS), types.int64), cuda.shared.array((HELD, TOKENS), types.int64)
    thread, threads = np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x)
    step = cuda.gridDim.x * threads
    first = cuda.blockIdx.x * threads
    tokens, bad_targets, bad_weights = np.int64(0), np.int64(0), np.int64(0)
    of_f, of_loss, of_correct, of_square, of_square_loss, of_square_loss2 = EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY
    clear(room)
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
        of_f = hold(of_f, room, 0, f)
        of_loss = hold(of_loss, room, 1, f * loss)
        of_correct = hold(of_correct, room, 2, correct)
        of_square = hold(of_square, room, 3, square)
        of_square_loss = hold(of_square_loss, room, 4, square * loss)
        of_square_loss2 = hold(of_square_loss2, room, 5, square * loss * loss)
        first += step
    add_held(room, 0, WINDOW, of_f, parts)
    add_held(room, 1, WINDOW, of_loss, parts)
    add_held(room, 2, WINDOW, of_correct, parts)
    add_held(room, 3, WINDOW, of_square, parts)
    add_held(room, 4, WINDOW, of_square_loss, parts)
    add_held(room, 5, WINDOW, of_square_loss2, parts)
    add_held(room, 6, 0, (tokens, bad_targets, bad_weights, 0, 0), parts)
    if all_blocks_added(room, words, words + (6 * WORDS + 3) * 8):
        put_carried(room, words)


@device
def put_carried(room, words):
    """Bring the rows but the last, which counts, into their range in memory; threads take a row each."""
    thread = np.int64(cuda.threadIdx.x)
    rows = room.shape[0] - 1
    if thread < rows:
        carry(room[thread])
    cuda.syncthreads()
    for row in range(rows):
        k = thread
        while k < WORDS:
            store(words + (row * WORDS + k) * 8, room[row, k])
            k += cuda.blockDim.x
