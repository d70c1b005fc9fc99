"""Exact sums of float64 numbers: a superaccumulator of int64 words, 32 bits apart (Neal 2015), for both backends.

The sum is sum_i words[i] * 2^(32 i - 1074), so words of different accumulators add; three words after them count NaN,
+inf and -inf. Every number adds less than 2^32 to a word, so that 2^31 of them fit before carries have to move.
"""

import numpy as np

from ._check import FACTORS_ALONE, FACTORS_OR_NONE, NOTHING
from ._intrinsics import bits_float, float_bits
from ._scalar import scalar

SPAN = 68  # words of the sum: 64 * 32 bits hold every finite float64, the others the carries
WORDS = SPAN + 5  # the last two stay 0: every number adds to three words
CARRY_EVERY = 1 << 30  # numbers
LOW_32 = np.int64(0xFFFFFFFF)


@scalar
def number_words(x):
    """(i, low, middle, high): x as what it adds to the words i, i + 1 and i + 2."""
    bits = float_bits(x)
    exponent = (bits >> 52) & 0x7FF
    mantissa = np.uint64(bits & 0xFFFFFFFFFFFFF)
    if exponent == 0x7FF:
        return SPAN + (0 if x != x else 1 if x > 0 else 2), np.int64(1), np.int64(0), np.int64(0)
    if exponent > 0:
        mantissa |= np.uint64(1 << 52)
        exponent -= 1
    i, shift = exponent >> 5, np.uint64(exponent & 31)
    low = np.int64((mantissa << shift) & np.uint64(0xFFFFFFFF))
    rest = mantissa >> (np.uint64(32) - shift)
    middle, high = np.int64(rest & np.uint64(0xFFFFFFFF)), np.int64(rest >> np.uint64(32))
    if bits < 0:
        low, middle, high = -low, -middle, -high
    return i, low, middle, high


@scalar
def carry(words):
    """Bring all words but the last into [0, 2^32); the sum stays."""
    carry_between(words, 0, SPAN - 1)


@scalar
def carry_between(words, first, last):
    """As carry, of the words from first to last."""
    above = np.int64(0)
    for i in range(first, last):
        word = words[i] + above
        words[i] = word & LOW_32
        above = word >> 32
    words[last] += above


@scalar
def round_sum(words):
    """The float64 nearest to the sum, ties to even; spoils the words."""
    first, last = 0, SPAN - 1
    while first < last and words[first] == 0:
        first += 1
    while last > first and words[last] == 0:
        last -= 1
    return round_between(words, first, last)


@scalar
def round_between(words, first, last):
    """As round_sum, where all words of the sum but those from first to last are 0."""
    if words[SPAN] > 0 or (words[SPAN + 1] > 0 and words[SPAN + 2] > 0):
        return np.nan
    if words[SPAN + 1] > 0:
        return np.inf
    if words[SPAN + 2] > 0:
        return -np.inf
    top = min(last + 1, SPAN - 1)  # what the others carry, and the sign
    carry_between(words, first, top)
    negative = words[top] < 0
    if negative:
        for i in range(first, top + 1):
            words[i] = -words[i]
        carry_between(words, first, top)
    while top > first and words[top] == 0:
        top -= 1
    if words[top] == 0:
        return 0.0
    head, middle = np.uint64(words[top]), np.uint64(words[top - 1] if top > 0 else 0)
    below = np.uint64(words[top - 2] if top > 1 else 0)
    shift = np.uint64(1023 + 31 - (float_bits(np.float64(words[top])) >> 52))  # that makes 32 bits of the first word
    head = (((head << np.uint64(32)) | middle) << shift) | (below >> (np.uint64(32) - shift))
    sticky = (below << shift) & np.uint64(0xFFFFFFFF) != 0
    for i in range(first, top - 2):
        sticky = sticky or words[i] != 0
    kept, rest = head >> np.uint64(11), head & np.uint64(0x7FF)
    if rest > np.uint64(0x400) or (rest == np.uint64(0x400) and (sticky or kept & np.uint64(1))):
        kept += np.uint64(1)
    value = scale_by_two(np.float64(kept), 32 * (top - 1) - np.int64(shift) + 11 - 1074)
    return -value if negative else value


@scalar
def scale_by_two(x, n):
    """x * 2^n, +inf on overflow; in steps of powers that are normal numbers."""
    while n > 1000:
        x, n = x * bits_float(np.int64(2023) << 52), n - 1000
    while n < -1000:
        x, n = x * bits_float(np.int64(23) << 52), n + 1000
    return x * bits_float(np.int64(1023 + n) << 52)


@scalar
def quotient(top, bottom, divisor):
    """top / bottom, or what `divisor` says; 0 / 0 is NaN but for the divisors "or none", which give 0 for any 0."""
    if divisor == NOTHING:
        return top
    if divisor == FACTORS_ALONE:
        return bottom
    return 0.0 if divisor >= FACTORS_OR_NONE and bottom == 0.0 else top / bottom
