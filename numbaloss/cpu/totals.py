"""Exact sums on the CPU: each block of rows has an accumulator of its own."""

import numpy as np
from numba import prange, types
from numba.extending import overload

from .._check import CLASS_FACTORS, FACTORS_ALONE, NO_LABEL, NONZERO_OR_NONE
from .._exact import CARRY_EVERY, WORDS, carry, number_words, quotient, round_sum
from .._intrinsics import rounded_product
from .._scalar import exp_any, focal_row, focal_row_slope
from ._launch import Kernel
from ._memory import fill, inner, write


@inner
def add_number(words, x):
    i, low, middle, high = number_words(x)
    words[i] += low
    words[i + 1] += middle
    words[i + 2] += high


@inner
def weight_at(weights, i):
    """weights[i]; empty weights are all 1."""
    return weights[i] if weights.size > 0 else 1.0


def factor(i, labels, weights, class_weights, ignore_index):
    """The weight of row i times that of its class, 0 if it does not count; any of the three may be None."""


@overload(factor)
def _factor(i, labels, weights, class_weights, ignore_index):
    if labels == types.none:
        return lambda i, labels, weights, class_weights, ignore_index: weight_at(weights, i)
    by_class = class_weights != types.none

    def impl(i, labels, weights, class_weights, ignore_index):
        y, w = labels[i], weight_at(weights, i)
        if y == ignore_index and ignore_index != NO_LABEL:
            return 0.0
        if by_class:
            return w * class_weights[y] if w != 0.0 and 0 <= y < class_weights.size else w
        return w

    return impl


def _total(blocks, values, labels, weights, class_weights, ignore_index, divisor):
    """sum(factor * value), each product rounded to float64 and the sum once, divided as `divisor` says (_exact); in
    values' dtype, where NumPy's conversion would warn of infinity."""
    n = values.size
    parts = np.zeros((blocks, 2, WORDS), np.int64)
    for block in prange(blocks):
        top, bottom, ones = parts[block, 0], parts[block, 1], 0
        begin = block * n // blocks
        for i in range(begin, (block + 1) * n // blocks):
            f = factor(i, labels, weights, class_weights, ignore_index)
            above = factor(i, labels, weights, None, ignore_index) if divisor == CLASS_FACTORS else f
            if above != 0.0 and divisor != FACTORS_ALONE:  # a factor of exactly 0 hides its value, even a NaN
                add_number(top, np.float64(values[i]) * above)
            if f == 1.0:
                ones += 1
            elif f != 0.0:
                add_number(bottom, 1.0 if divisor == NONZERO_OR_NONE else f)
            if (i - begin) % CARRY_EVERY == CARRY_EVERY - 1:
                carry(top)
                carry(bottom)
        add_number(bottom, np.float64(ones))
        carry(top)
        carry(bottom)
    for block in range(1, blocks):
        add_words(parts[0], parts[block])
    return values.dtype.type(quotient(round_sum(parts[0, 0]), round_sum(parts[0, 1]), divisor))


_total_kernel = Kernel(_total)


@inner
def add_words(words, others):
    for r in range(len(words)):
        for i in range(words.shape[1]):
            words[r, i] += others[r, i]


def total(values, labels, weights, class_weights, ignore_index, divisor):
    """What the kernel gives, as a number of NumPy's."""
    n = values.size
    return values.dtype.type(_total_kernel(n, n, values, labels, weights, class_weights, ignore_index, divisor))


def _row_totals(blocks, values, weights, count, row_step, step, divisor, totals, divisors):
    """totals[r] = the total of values[r * row_step + i * step] for i < count, weighted and divided as in `total`.

    `divisors`, float64 or None, gets what it was divided by, +inf for one of 0 that gave 0.
    """
    n = totals.size
    for block in prange(blocks):
        top, bottom = np.empty(WORDS, np.int64), np.empty(WORDS, np.int64)
        for r in range(block * n // blocks, (block + 1) * n // blocks):
            fill(top, 0)
            fill(bottom, 0)
            for i in range(r * row_step, r * row_step + count * step, step):
                w = weight_at(weights, i)
                if w != 0.0:
                    add_number(top, np.float64(values[i]) * w)
                    add_number(bottom, 1.0 if divisor == NONZERO_OR_NONE else w)
            below = round_sum(bottom)
            totals[r] = quotient(round_sum(top), below, divisor)
            write(divisors, r, np.inf if below == 0.0 else below)


row_totals = Kernel(_row_totals)


def _scale(blocks, values, labels, weights, class_weights, ignore_index):
    """values[i] *= factor, in float64 and rounded once; exactly 0 where the factor is."""
    n = values.size
    for block in prange(blocks):
        for i in range(block * n // blocks, (block + 1) * n // blocks):
            f = factor(i, labels, weights, class_weights, ignore_index)
            values[i] = np.float64(values[i]) * f if f != 0.0 else 0.0


scale = Kernel(_scale)


def upstream_at(upstream, i):
    """upstream[i], or the one number for all; 1 if upstream is None."""


@overload(upstream_at)
def _upstream_at(upstream, i):
    if upstream == types.none:
        return lambda upstream, i: 1.0
    return lambda upstream, i: upstream[i if upstream.size > 1 else 0]


def _slopes(blocks, upstream, labels, weights, class_weights, ignore_index, divisor, out):
    """out[i] = factor * (upstream[i] / divisor[i]), float64, exactly 0 where the factor is: d(total) / d(value i).

    upstream and divisor, float64, may be None, or one number for all.
    """
    n = out.size
    for block in prange(blocks):
        for i in range(block * n // blocks, (block + 1) * n // blocks):
            f = factor(i, labels, weights, class_weights, ignore_index)
            g = upstream_at(upstream, i) / upstream_at(divisor, i)
            out[i] = f * g if f != 0.0 else 0.0


slopes = Kernel(_slopes)


def _weight_slopes(blocks, values, upstream, divisor, mean, labels, weights, class_weights, inside, ignore_index, out):
    """out[i] = (upstream[i] / divisor[i]) * (c * value i - c * mean[i]), c the class weight: d(total) / d(weight i), 0
    for a weight of 0. The first c is 1 if values have it `inside`; `divisor` and `mean` may be None, as in slopes."""
    n = out.size
    for block in prange(blocks):
        for i in range(block * n // blocks, (block + 1) * n // blocks):
            out[i] = 0
            if factor(i, labels, weights, None, ignore_index) != 0.0:
                c = factor(i, labels, weights[:0], class_weights, ignore_index)
                slope = np.float64(values[i]) if inside else rounded_product(np.float64(values[i]), c)
                slope -= rounded_product(c, mean_at(mean, i))
                out[i] = slope * (upstream_at(upstream, i) / upstream_at(divisor, i))


weight_slopes = Kernel(_weight_slopes)


def mean_at(mean, i):
    """mean[i], or the one number for all; 0 if mean is None."""


@overload(mean_at)
def _mean_at(mean, i):
    if mean == types.none:
        return lambda mean, i: 0.0
    return lambda mean, i: np.float64(mean[i if mean.size > 1 else 0])


def _focal(blocks, losses, gamma):
    """l (1 - exp(-l))^gamma for each loss l, in place."""
    n = losses.size
    for block in prange(blocks):
        for i in range(block * n // blocks, (block + 1) * n // blocks):
            losses[i] = focal_row(np.float64(losses[i]), gamma)


focal = Kernel(_focal)


def _focal_slopes(blocks, losses, gamma, slopes):
    """slopes[i] *= d focal / d loss."""
    n = losses.size
    for block in prange(blocks):
        for i in range(block * n // blocks, (block + 1) * n // blocks):
            slopes[i] *= focal_row_slope(np.float64(losses[i]), gamma)


focal_slopes = Kernel(_focal_slopes)


def _negate(blocks, values):
    """values[i] = 0 - values[i]; never -0."""
    for i in range(values.size):
        values[i] = type(values[i])(0) - values[i]


negate = Kernel(_negate)


def _add_tokens(blocks, logprob, argmax, labels, weights, ignore_index, words):
    """Add the six sums of an Evaluation to the rows of `words`, and the number of tokens to words[6, 0]."""
    n = logprob.size
    parts = np.zeros((blocks, words.shape[0], words.shape[1]), np.int64)
    for block in prange(blocks):
        part = parts[block]
        begin = block * n // blocks
        for i in range(begin, (block + 1) * n // blocks):
            f, loss = factor(i, labels, weights, None, ignore_index), -np.float64(logprob[i])
            if f != 0.0:
                square = f * f
                add_number(part[0], f)
                add_number(part[1], f * loss)
                add_number(part[2], f if argmax[i] == labels[i] else 0.0)
                add_number(part[3], square)
                add_number(part[4], square * loss)
                add_number(part[5], square * loss * loss)
                part[6, 0] += 1
            if (i - begin) % CARRY_EVERY == CARRY_EVERY - 1:
                carry_all(part)
        carry_all(part)
    for block in range(blocks):
        add_words(words, parts[block])
    carry_all(words)


add_tokens = Kernel(_add_tokens)


@inner
def carry_all(words):
    for r in range(len(words) - 1):  # the last row counts
        carry(words[r])


def _round_total(blocks, words):
    """The float64 nearest to the sum that the words hold."""
    return round_sum(words.copy())


round_total = Kernel(_round_total)


def _exponentials(blocks, x, out):
    """out[i] = exp(x[i])."""
    n = x.size
    for block in prange(blocks):
        for i in range(block * n // blocks, (block + 1) * n // blocks):
            out[i] = exp_any(x[i])


exponentials = Kernel(_exponentials)


def _merge(blocks, words, other):
    """words += other, row by row."""
    words += other
    carry_all(words)


merge = Kernel(_merge)
