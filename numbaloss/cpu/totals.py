"""Exact sums of float64 numbers on the CPU: a superaccumulator of int64 words, 32 bits apart (Neal 2015).

The sum is sum_i words[i] * 2^(32 i - 1074), so words of different accumulators add; the last three words count NaN,
+inf and -inf. Every number adds less than 2^32 to a word, so that 2^31 of them fit before carries have to move.
"""

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from .._scalar import bits_float, float_bits
from ._launch import Kernel

SPAN = 68  # words of the sum: 64 * 32 bits hold every finite float64, the others the carries
WORDS = SPAN + 3
CARRY_EVERY = 1 << 30
LOW_32 = np.int64(0xFFFFFFFF)


@njit
def add_number(words, x):
    bits = float_bits(x)
    exponent = (bits >> 52) & 0x7FF
    mantissa = np.uint64(bits & 0xFFFFFFFFFFFFF)
    if exponent == 0x7FF:
        words[SPAN + (0 if x != x else 1 if x > 0 else 2)] += 1
        return
    if exponent > 0:
        mantissa |= np.uint64(1 << 52)
        exponent -= 1
    i, shift = exponent >> 5, np.uint64(exponent & 31)
    low = np.int64((mantissa << shift) & np.uint64(0xFFFFFFFF))
    rest = mantissa >> (np.uint64(32) - shift)
    middle, high = np.int64(rest & np.uint64(0xFFFFFFFF)), np.int64(rest >> np.uint64(32))
    if bits < 0:
        low, middle, high = -low, -middle, -high
    words[i] += low
    words[i + 1] += middle
    words[i + 2] += high


@njit
def carry(words):
    """Bring all words but the last into [0, 2^32); the sum stays."""
    for i in range(SPAN - 1):
        words[i + 1] += words[i] >> 32
        words[i] &= LOW_32


@njit
def round_sum(words):
    """The float64 nearest to the sum, ties to even; changes the words, not their sum."""
    if words[SPAN] > 0 or (words[SPAN + 1] > 0 and words[SPAN + 2] > 0):
        return np.nan
    if words[SPAN + 1] > 0:
        return np.inf
    if words[SPAN + 2] > 0:
        return -np.inf
    carry(words)
    negative = words[SPAN - 1] < 0
    if negative:
        words[:SPAN] = -words[:SPAN]
        carry(words)
    top = SPAN - 1
    while top > 1 and words[top] == 0:
        top -= 1
    head = (np.uint64(words[top]) << np.uint64(32)) | np.uint64(words[top - 1])
    value = 0.0
    if head != 0:
        below = np.uint64(words[top - 2]) if top > 1 else np.uint64(0)
        shift = np.uint64(0)
        while head < np.uint64(1 << 63):
            head = (head << np.uint64(1)) | ((below >> np.uint64(31)) & np.uint64(1))
            below = (below << np.uint64(1)) & np.uint64(0xFFFFFFFF)
            shift += np.uint64(1)
        sticky = below != 0
        for i in range(top - 2):
            sticky = sticky or words[i] != 0
        kept, rest = head >> np.uint64(11), head & np.uint64(0x7FF)
        if rest > np.uint64(0x400) or (rest == np.uint64(0x400) and (sticky or kept & np.uint64(1))):
            kept += np.uint64(1)
        value = scale_by_two(np.float64(kept), 32 * (top - 1) - np.int64(shift) + 11 - 1074)
    if negative:
        words[:SPAN] = -words[:SPAN]
        carry(words)
        return -value
    return value


@njit
def scale_by_two(x, n):
    """x * 2^n, +inf on overflow; in steps of powers that are normal numbers."""
    while n > 1000:
        x, n = x * bits_float(np.int64(2023) << 52), n - 1000
    while n < -1000:
        x, n = x * bits_float(np.int64(23) << 52), n + 1000
    return x * bits_float(np.int64(1023 + n) << 52)


def product(value, scale, i):
    """value * scale[i] in float64; scale may be None."""


@overload(product)
def _product(value, scale, i):
    if scale == types.none:
        return lambda value, scale, i: np.float64(value)
    # a scale of exactly 0 hides its value, even a NaN
    return lambda value, scale, i: np.float64(value) * scale[i] if scale[i] != 0 else 0.0


@njit
def sum_into(words, values, scale, begin, end):
    """words += values[begin:end] * scale[begin:end], each product rounded to float64 and then summed exactly."""
    for i in range(begin, end):
        add_number(words, product(values[i], scale, i))
        if (i - begin) % CARRY_EVERY == CARRY_EVERY - 1:
            carry(words)
    carry(words)


def _accumulate(blocks, values, scale, words):
    """words += values * scale, exactly."""
    n = values.size
    parts = np.zeros((blocks, WORDS), np.int64)
    for block in prange(blocks):
        sum_into(parts[block], values, scale, block * n // blocks, (block + 1) * n // blocks)
    for block in range(blocks):
        words += parts[block]
    carry(words)


accumulate = Kernel(_accumulate)


def _total(blocks, values, scale):
    """sum(values * scale): each product rounded to float64, their sum rounded once; scale may be None."""
    n = values.size
    parts = np.zeros((blocks, WORDS), np.int64)
    for block in prange(blocks):
        sum_into(parts[block], values, scale, block * n // blocks, (block + 1) * n // blocks)
    for block in range(1, blocks):
        parts[0] += parts[block]
    return round_sum(parts[0])


total = Kernel(_total)


def _row_totals(blocks, values, scale, totals):
    """totals[r] = sum of values[r] * scale[r], rounded once."""
    n = values.shape[0]
    for block in prange(blocks):
        words = np.empty(WORDS, np.int64)
        for r in range(block * n // blocks, (block + 1) * n // blocks):
            words[:] = 0
            sum_into(words, values[r], scale[r], 0, values.shape[1])
            totals[r] = round_sum(words)


row_totals = Kernel(_row_totals)


def _round_total(blocks, words):
    """The float64 nearest to the sum that the words hold."""
    return round_sum(words.copy())


round_total = Kernel(_round_total)


def _merge(blocks, words, other):
    """words += other, row by row."""
    for r in range(words.shape[0]):
        words[r] += other[r]
        carry(words[r])


merge = Kernel(_merge)
