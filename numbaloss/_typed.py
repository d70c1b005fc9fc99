"""The mathematics by the precision of a row: one name for float32 and float64, for the CPU and for CUDA alike."""

import numpy as np
from numba import types
from numba.extending import overload

from ._intrinsics import (
    at_least,
    bits_float,
    fma,
    from_bfloat16,
    from_float16,
    low_bits_exponent,
    rounded_product,
    select,
)
from ._scalar import (
    BIAS,
    BIAS_64,
    INF,
    INV_LOG2E,
    LN2_HI,
    LN2_LO,
    MAGIC_64,
    ONE,
    ZERO,
    binary_slope,
    by_side,
    exp_64,
    exp_neg_32,
    exp_neg_64,
    f32,
    focal_curvatures,
    focal_slopes,
    focal_sum,
    frame_32,
    log1p_32,
    log1p_64,
    mantissa_exponent,
    power_32,
    reference_32,
    scalar,
    sigmoid_loss,
    sigmoid_slope,
    split_32,
    split_64,
    tanh_32,
    tanh_64,
    tanh_slope_32,
    tanh_slope_64,
    term_32,
    term_64,
    weighted_label_slope,
    weighted_loss,
    weighted_pos_weight_slope,
    without_sign,
)

LOW_64 = -709.0


def precision_of(kind):
    """The Numba type of a number, or of a Vector's items."""
    return getattr(kind, "dtype", kind)


def by_precision(single, double):
    """A function of one number or vector: `single` for float32, `double` for float64."""

    def function(x):
        """See by_precision."""

    @overload(function)
    def _function(x):
        if precision_of(x) == types.float64:
            return lambda x: double(x)
        return lambda x: single(x)

    return function


def widen(x):
    """A logit as float32, or as float64 if it is one; bfloat16 comes as uint16, float16 as int16."""


@overload(widen)
def _widen(x):
    if x == types.uint16:
        return lambda x: from_bfloat16(x)
    if x == types.int16:
        return lambda x: from_float16(x)
    return lambda x: x


def compute_zero(like):
    """A zero of the dtype that such logits are computed in."""


@overload(compute_zero)
def _compute_zero(like):
    if like == types.float64:
        return lambda like: 0.0
    return lambda like: ZERO


def number(like, x):
    """x in the precision that such logits, or such numbers or vectors, are computed in: that of their results."""


@overload(number)
def _number(like, x):
    if precision_of(like) == types.float64:
        return lambda like, x: np.float64(x)
    return lambda like, x: f32(x)


def item_size(like):
    """Bytes."""


@overload(item_size)
def _item_size(like):
    size = 1 if like == types.boolean else like.bitwidth // 8
    return lambda like: size


# -- terms of a sum ----------------------------------------------------------------------------------------------


def term(x, low, m, total):
    """term_32 or term_64."""


@overload(term)
def _term(x, low, m, total):
    if precision_of(x) == types.float64:
        return lambda x, low, m, total: term_64(x, low, m, total)
    return lambda x, low, m, total: term_32(x, low, m, total)


def shifted_frame(zero):
    """(m, low) of a sum whose reference exponent is 0."""


@overload(shifted_frame)
def _shifted_frame(zero):
    if zero == types.float64:
        return lambda zero: (MAGIC_64 + BIAS_64, LOW_64)
    return lambda zero: frame_32(ZERO, BIAS)


def key_value(zero, key):
    """The float whose key (ordered_bits) this is."""


@overload(key_value)
def _key_value(zero, key):
    if zero == types.float64:
        return lambda zero, key: bits_float(key if key >= 0 else key ^ np.int64(0x7FFFFFFFFFFFFFFF))
    return lambda zero, key: bits_float(np.int32(key if key >= 0 else key ^ 0x7FFFFFFF))


def row_frame(high):
    """(m, low, shift, c) for a row whose largest logit is `high`: how its terms are taken, and what their sum is of."""


@overload(row_frame)
def _row_frame(high):
    if high == types.float64:

        def row_frame_64(high):
            shift = select(high > -np.inf, high, 0.0)
            return MAGIC_64 + BIAS_64, LOW_64, shift, high

        return row_frame_64

    def row_frame_32(high):
        ref, shift = reference_32(high)
        m, low = frame_32(ref, BIAS)
        c = select(shift == ZERO, np.float64(ref) * INV_LOG2E, np.float64(high))
        return m, low, select(high > -INF, shift, ZERO), c

    return row_frame_32


# -- softmax -----------------------------------------------------------------------------------------------------


def softmax_frame(largest, u, log1p_u):
    """(m, low, shift, scale, top): exp(x - largest) / (1 + u) = p * 2^k * scale, (p, t) the split of x - shift.

    scale and top are NaN if log1p_u, the loss of the largest class, is.
    `top` is the largest class's own, 1 / (1 + u), which the product might miss by an ulp and make larger than 1.
    In float32, k is 24 too large and scale 2^24 too small, so that only the last product can be subnormal.
    """


@overload(softmax_frame)
def _softmax_frame(largest, u, log1p_u):
    if largest == types.float64:

        def softmax_frame_64(largest, u, log1p_u):
            top = select(log1p_u == log1p_u, 1.0 / (1.0 + u), np.nan)
            return MAGIC_64 + BIAS_64, LOW_64, largest, top, top

        return softmax_frame_64

    def softmax_frame_32(largest, u, log1p_u):
        ref, shift = reference_32(largest)
        m, low = frame_32(ref, BIAS + f32(24))
        rest = fma(np.float64(ref), LN2_HI, fma(np.float64(ref), LN2_LO, np.float64(shift - largest)))
        top = select(log1p_u == log1p_u, 1.0 / (1.0 + u), np.nan)
        scale = f32(exp_64(rest) * top * 2.0**-24)
        return m, low, shift, scale, f32(top)

    return softmax_frame_32


def probability_of(v, m, low, scale):
    """One entry of a softmax, of v = x - shift, which may miss `top` by an ulp; the rest from softmax_frame."""


@overload(probability_of)
def _probability_of(v, m, low, scale):
    if precision_of(v) == types.float64:

        def probability_of_64(v, m, low, scale):
            p, t = split_64(at_least(v, low), m)
            return p * low_bits_exponent(t) * scale

        return probability_of_64

    def probability_of_32(v, m, low, scale):
        p, t = split_32(at_least(v, low), m, ONE)
        return p * low_bits_exponent(t) * scale

    return probability_of_32


@scalar
def softmax_of(x, largest, m, low, shift, scale, top):
    """One entry of a softmax; the rest from softmax_frame."""
    return select(x == largest, top, probability_of(x - shift, m, low, scale))


def grad_frame(zero, like_grad, top, others, k):
    """(m, low, shift, factor, target): a row's gradient is `target` at the target and grad_of elsewhere. From top_of,
    others_of and scale_of; factor and target are NaN if k is.

    In float32 the factor is 1.5 to 3 and its power of two is in m. So no entry is subnormal: the power is 0 from 2^-127
    down. That is for bfloat16, where AVX512_BF16 takes subnormal numbers for 0; otherwise the power is 24 too large and
    the factor 2^24 too small, as in softmax_frame.
    """


@overload(grad_frame)
def _grad_frame(zero, like_grad, top, others, k):
    if zero == types.float64:

        def grad_frame_64(zero, like_grad, top, others, k):
            return MAGIC_64 + BIAS_64, LOW_64, top, k, 0.0 - rounded_product(others, k)

        return grad_frame_64
    more, less = (0.0, 1.0) if like_grad == types.uint16 else (24.0, 2.0**-24)

    def grad_frame_32(zero, like_grad, top, others, k):
        ref, shift = reference_32(f32(top))
        factor, n = mantissa_exponent(exp_64(fma(np.float64(ref), INV_LOG2E, np.float64(shift) - top)) * k)
        m, low = frame_32(ref, BIAS + f32(n + more))
        return m, low, shift, f32(factor * less), f32(0.0 - rounded_product(others, k))

    return grad_frame_32


def grad_of(v, m, low, factor):
    """One entry of a gradient but for the target's, of v = x - shift: in float32 the term that was summed, with a
    number in its coefficients; the rest from grad_frame."""


@overload(grad_of)
def _grad_of(v, m, low, factor):
    if precision_of(v) == types.float64:
        return lambda v, m, low, factor: probability_of(v, m, low, factor)

    def grad_of_32(v, m, low, factor):
        p, power, _ = power_32(v, low, m, factor)
        return p * power

    return grad_of_32


# -- one logit, two classes --------------------------------------------------------------------------------------


exp_neg = by_precision(exp_neg_32, exp_neg_64)  # exp(-a) for a >= 0
tanh = by_precision(tanh_32, tanh_64)
tanh_slope = by_precision(tanh_slope_32, tanh_slope_64)  # 1 - tanh(x)^2, without cancellation


def log1p(e):
    """log(1 + e) for 0 <= e <= 1."""


@overload(log1p)
def _log1p(e):
    if e == types.float64:
        return lambda e: select(e == e, log1p_64(e), e)
    return lambda e: log1p_32(e)


# x: a logit, z: its label, q: None, a pos_weight, or the focal loss's (factor of the positive part, of the negative
# part, gamma); all of one precision, and `one` is a 1 of it; e = exp(-|x|)


def _by_kind(q, plain, weighted, focal):
    return focal if isinstance(q, types.BaseTuple) else weighted if isinstance(q, types.Float) else plain


def binary_loss(x, z, q, one, log1p_exp):
    """The loss: sigmoid_loss, weighted_loss or focal."""


@overload(binary_loss)
def _binary_loss(x, z, q, one, log1p_exp):
    def focal(x, z, q, one, log1p_exp):
        return focal_of(x, z * q[0], (one - z) * q[1], q[2], one, log1p_exp)

    return _by_kind(
        q,
        lambda x, z, q, one, log1p_exp: sigmoid_loss(x, z, one, log1p_exp),
        lambda x, z, q, one, log1p_exp: weighted_loss(x, z, q, one, log1p_exp),
        focal,
    )


def slope_by_logit(x, z, q, one, e, log1p_exp):
    """d loss / d x."""


@overload(slope_by_logit)
def _slope_by_logit(x, z, q, one, e, log1p_exp):
    def focal(x, z, q, one, e, log1p_exp):
        a, gamma = cut(x), q[2]
        near, far = focal_powers(a, gamma, one, log1p_exp)
        near, far = focal_slopes(a, gamma, one, e, log1p_exp, near, far)
        w, w_far = by_side(x, z * q[0], (one - z) * q[1], one)
        slope = fma(w_far, far, -(w * near))
        return select(x >= one - one, slope, -slope)

    return _by_kind(
        q,
        lambda x, z, q, one, e, log1p_exp: binary_slope(x, one - z, z, one, e),
        lambda x, z, q, one, e, log1p_exp: binary_slope(x, one - z, q * z, one, e),
        focal,
    )


def slope_by_label(x, z, q, one, e, log1p_exp):
    """d loss / d z."""


@overload(slope_by_label)
def _slope_by_label(x, z, q, one, e, log1p_exp):
    return _by_kind(
        q,
        lambda x, z, q, one, e, log1p_exp: (one - one) - x,
        lambda x, z, q, one, e, log1p_exp: weighted_label_slope(x, q, one, log1p_exp),
        lambda x, z, q, one, e, log1p_exp: focal_of(x, q[0], -q[1], q[2], one, log1p_exp),
    )


def slope_by_pos_weight(x, z, q, one, e, log1p_exp):
    """d loss / d q."""


@overload(slope_by_pos_weight)
def _slope_by_pos_weight(x, z, q, one, e, log1p_exp):
    return lambda x, z, q, one, e, log1p_exp: weighted_pos_weight_slope(x, z, one, log1p_exp)


def curvature(x, z, q, one, e, log1p_exp):
    """d^2 loss / d x^2."""


@overload(curvature)
def _curvature(x, z, q, one, e, log1p_exp):
    def focal(x, z, q, one, e, log1p_exp):
        a, gamma = cut(x), q[2]
        near, far = focal_powers(a, gamma, one, log1p_exp)
        near, far = focal_curvatures(a, gamma, one, e, log1p_exp, near, far)
        w, w_far = by_side(x, z * q[0], (one - z) * q[1], one)
        return fma(w, near, w_far * far)

    return _by_kind(
        q,
        lambda x, z, q, one, e, log1p_exp: sigmoid_slope(one, e),
        lambda x, z, q, one, e, log1p_exp: fma(q, z, one - z) * sigmoid_slope(one, e),
        focal,
    )


def cut(x):
    """|x|, but finite: beyond, exp(-|x|) is 0 all the same."""


@overload(cut)
def _cut(x):
    if x == types.float64:
        return lambda x: select(abs(x) < 1024.0, abs(x), 1024.0)
    return lambda x: select(abs(x) < f32(128), abs(x), f32(128))


@scalar
def focal_powers(a, gamma, one, log1p_exp):
    """sigmoid(-a)^gamma and sigmoid(a)^gamma for a >= 0. gamma * a may be large: its rounding counts."""
    product, far = gamma * a, exp_neg(gamma * log1p_exp)
    near = exp_neg(product)
    return fma(-near, fma(gamma, a, -product), near) * far, far


@scalar
def focal_of(x, positive, negative, gamma, one, log1p_exp):
    """positive f(x) + negative f(-x), f(s) = sigmoid(-s)^gamma softplus(-s)."""
    near, far = focal_powers(cut(x), gamma, one, log1p_exp)
    w, w_far = by_side(x, positive, negative, one)
    return focal_sum(w, w_far, near * log1p_exp, fma(far, abs(x), far * log1p_exp), one)


def by_upstream(g, slope, one):
    """g * slope; 0 where g is, whatever the slope, and never -0. None counts as 1."""


@overload(by_upstream)
def _by_upstream(g, slope, one):
    if g == types.none:
        return lambda g, slope, one: without_sign(slope, one)
    return lambda g, slope, one: without_sign(select(g == one - one, g, g * slope), one)


# -- capped logits -----------------------------------------------------------------------------------------------


@scalar
def capped(x, cap):
    """softcap * tanh(x / softcap) / temperature, or x / temperature; what is not finite stays.

    `cap` is (1 / softcap, softcap / temperature, 1 / temperature); without a softcap (0, 1 / temperature, what rounding
    took from it).
    """
    inverse, scale, rest = cap
    zero = inverse - inverse
    if inverse == zero:
        y = fma(x, scale, x * rest)
    else:
        y = scale * tanh(inverse * x)
    return select(abs(x) < number(zero, np.inf), y, x)


@scalar
def uncapped(g, x, cap):
    """g, a gradient by capped(x), times d capped(x) / d x."""
    inverse, scale, rest = cap
    if inverse == inverse - inverse:
        return g * scale
    return g * rest * tanh_slope(inverse * x)
