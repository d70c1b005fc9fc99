"""Divergences of two rows of logits: what a class adds to them, and their slopes. For both precisions, and for vectors.

With d = log q - log p, a = |d| and e = e^-a every term is a product of the larger of p and q and a function of a alone
that is never negative and has no cancellation: a polynomial of a^2 for a < NEAR, a formula of e beyond.
"""

from functools import wraps

import numpy as np
from numba.extending import overload

from ._intrinsics import at_least, fma, rounded_product, select
from ._scalar import f32, log1p_32, scalar
from ._typed import by_precision, exp_neg, number, probability_of, softmax_frame

LN2 = 0.6931471805599453
NEAR = 1.5


# -- curves, relative errors of the polynomials ------------------------------------------------------------------


@scalar
def phi_32(t):
    """Even part and odd part / d of (e^d - 1 - d) / d^2, t = d^2 <= 2.25; relative errors 6e-10 and 3e-8."""
    even = fma(f32(2.867697617148224e-07), t, f32(2.4781591491773725e-05))
    even = fma(even, t, f32(0.001388902310281992))
    even = fma(even, t, f32(0.0416666641831398))
    even = fma(even, t, f32(0.5))
    odd = fma(f32(5.153811954983212e-08), t, f32(2.6389600407128455e-06))
    odd = fma(odd, t, f32(0.00019857518782373518))
    odd = fma(odd, t, f32(0.008333261124789715))
    odd = fma(odd, t, f32(0.1666666716337204))
    return even, odd


@scalar
def js_curve_32(t):
    """h(tanh(d / 2)) / (4 t), t = d^2 <= 2.25, h(r) = (1 - r) log(1 - r) + (1 + r) log(1 + r); 3e-9."""
    h = fma(f32(4.8626706217191895e-08), t, f32(-8.527874229002919e-07))
    h = fma(h, t, f32(9.416767170478124e-06))
    h = fma(h, t, f32(-9.20893726288341e-05))
    h = fma(h, t, f32(0.0008680071332491934))
    h = fma(h, t, f32(-0.007812494412064552))
    h = fma(h, t, f32(0.0625))
    return h


@scalar
def log_cosh_32(t):
    """log(cosh(d / 2)) / t, t = d^2 <= 2.25; relative error 5e-9."""
    c = fma(f32(-1.0593355170840368e-07), t, f32(1.973204689420527e-06))
    c = fma(c, t, f32(-2.618064172565937e-05))
    c = fma(c, t, f32(0.0003471417585387826))
    c = fma(c, t, f32(-0.005208320915699005))
    c = fma(c, t, f32(0.125))
    return c


@scalar
def phi_64(t):
    """As phi_32; relative errors 1e-19 and 6e-17."""
    even = fma(1.633247706573059e-16, t, 4.7751093953644795e-14)
    even = fma(even, t, 1.1470878665901077e-11)
    even = fma(even, t, 2.087675474027775e-09)
    even = fma(even, t, 2.7557319245475336e-07)
    even = fma(even, t, 2.4801587301475835e-05)
    even = fma(even, t, 0.0013888888888889165)
    even = fma(even, t, 0.041666666666666664)
    even = fma(even, t, 0.5)
    odd = fma(-4.807868752306419e-16, t, 7.198710870170241e-15)
    odd = fma(odd, t, 7.487378914225813e-13)
    odd = fma(odd, t, 1.6062071710417888e-10)
    odd = fma(odd, t, 2.505207662902051e-08)
    odd = fma(odd, t, 2.7557319404639356e-06)
    odd = fma(odd, t, 0.00019841269840765964)
    odd = fma(odd, t, 0.008333333333333868)
    odd = fma(odd, t, 0.16666666666666666)
    return even, odd


@scalar
def js_curve_64(t):
    """As js_curve_32; relative error 1e-20."""
    h = fma(-2.2580500766953308e-17, t, 6.235943095931934e-16)
    h = fma(h, t, -9.363508107071327e-15)
    h = fma(h, t, 1.0764026736703222e-13)
    h = fma(h, t, -1.1083804861313082e-12)
    h = fma(h, t, 1.1007320491047972e-11)
    h = fma(h, t, -1.0830069829359708e-10)
    h = fma(h, t, 1.062846653109426e-09)
    h = fma(h, t, -1.0412926971179446e-08)
    h = fma(h, t, 1.0179282515619694e-07)
    h = fma(h, t, -9.917764351835776e-07)
    h = fma(h, t, 9.610615079100472e-06)
    h = fma(h, t, -9.223090277775173e-05)
    h = fma(h, t, 0.0008680555555555545)
    h = fma(h, t, -0.0078125)
    h = fma(h, t, 0.0625)
    return h


@scalar
def log_cosh_64(t):
    """As log_cosh_32; relative error 8e-19."""
    c = fma(-2.1844994120062403e-16, t, 5.754045882130588e-15)
    c = fma(c, t, -8.559101496852522e-14)
    c = fma(c, t, 1.02089785829269e-12)
    c = fma(c, t, -1.13515351738308e-11)
    c = fma(c, t, 1.2498005180745127e-10)
    c = fma(c, t, -1.3883365870470447e-09)
    c = fma(c, t, 1.5660401606659778e-08)
    c = fma(c, t, -1.8032297448230178e-07)
    c = fma(c, t, 2.135692236140426e-06)
    c = fma(c, t, -2.635168650735751e-05)
    c = fma(c, t, 0.0003472222222221775)
    c = fma(c, t, -0.005208333333333332)
    c = fma(c, t, 0.125)
    return c


@scalar
def log1p_small_64(e):
    """log(1 + e) for 0 <= e <= e^-1.5; relative error 2e-18."""
    p = fma(0.022220531040587133, e, -0.05630627226832228)
    p = fma(p, e, 0.08211126892853035)
    p = fma(p, e, -0.09805385861178516)
    p = fma(p, e, 0.11081305108585325)
    p = fma(p, e, -0.12496825394053457)
    p = fma(p, e, 0.1428548145752252)
    p = fma(p, e, -0.16666655212369005)
    p = fma(p, e, 0.1999999963980972)
    p = fma(p, e, -0.24999999993344976)
    p = fma(p, e, 0.33333333333271575)
    p = fma(p, e, -0.499999999999998)
    p = fma(p, e, 1.0)
    return rounded_product(p, e)


phi = by_precision(phi_32, phi_64)
js_curve = by_precision(js_curve_32, js_curve_64)
log_cosh = by_precision(log_cosh_32, log_cosh_64)
log1p_small = by_precision(log1p_32, log1p_small_64)


# -- two rows ----------------------------------------------------------------------------------------------------


@scalar
def difference(a, b):
    """(a - b, what rounding took from it); both finite."""
    s = a - b
    c = s - a  # -b, rounded
    return s, (a - (s - c)) - (b + c)


@scalar
def two_frames(p, q, shift):
    """What the terms of two rows need: the logarithm of q's sum less that of p's, in two numbers, and how to take
    their entries.

    p and q are (largest logit, u, log(1 + u)), u the sum of exp(x - largest) over the others; `shift` is added to the
    first. That is finite if and only if both rows have a softmax.
    """
    a, rest_a = difference(np.float64(q[0]), np.float64(p[0]))
    b, rest_b = difference(q[2], p[2])
    more, rest = difference(a, -b)
    high = number(p[0], more)
    low = number(p[0], (more - np.float64(high)) + (rest + (rest_a + rest_b) + shift))
    m_p, low_p, shift_p, scale_p, _ = softmax_frame(p[0], p[1], p[2])
    m_q, low_q, shift_q, scale_q, _ = softmax_frame(q[0], q[1], q[2])
    return high, low, m_p, low_p, shift_p, scale_p, m_q, low_q, shift_q, scale_q


@scalar
def log_ratio(x, y, high, low):
    """log q - log p of a class with logits x and y, right to an eps of itself; NaN if both are -inf."""
    s, rest = difference(y, x)
    return select(abs(s) < number(x, np.inf), (s - high) + (rest - low), s)


@scalar
def parts(x, y, frame):
    """(larger of p and q, whether it is q, d, a, e); d and a are 0 where both logits are -inf."""
    high, low, m_p, low_p, shift_p, scale_p, m_q, low_q, shift_q, scale_q = frame
    d = log_ratio(x, y, high, low)
    zero = number(x, 0.0)
    d = select(d == d, d, zero)
    up = d > zero
    v = select(up, y - shift_q, x - shift_p)
    larger = probability_of(v, select(up, m_q, m_p), select(up, low_q, low_p), select(up, scale_q, scale_p))
    a = abs(d)
    return larger, up, d, a, exp_neg(a)


@scalar
def gaps(a, e):
    """(e^-a - 1 + a, 1 - e^-a - a e^-a): (q - p - p d) / max(p, q) for the smaller q and for the larger."""
    t, one = a * a, number(a, 1.0)
    even, odd = phi(t)
    near = a < number(a, NEAR)
    down = select(near, t * fma(-a, odd, even), (e - one) + a)
    up = select(near, e * (t * fma(a, odd, even)), fma(at_least(-a, number(a, -1000.0)), e, one - e))
    return down, up


@scalar
def fall(a, e):
    """1 - e^-a."""
    t = a * a
    even, odd = phi(t)
    return select(a < number(a, NEAR), fma(-t, fma(-a, odd, even), a), number(a, 1.0) - e)


@scalar
def log_share(d, a, e):
    """log(p / m) = -log((1 + e^d) / 2), m = (p + q) / 2."""
    zero = number(a, 0.0)
    t, half = a * a, number(a, -0.5)
    far = (number(a, LN2) - log1p_small(e)) - select(d > zero, a, zero)
    return select(a < number(a, NEAR), fma(-t, log_cosh(t), half * d), far)


# -- terms: (factor, value) of a class with logits x and y; frame from two_frames -----------------------------------


def term(function):
    """Decorator: a function that compiled code can pass on to compiled code. (One made by njit would be passed by its
    address, and Numba would not keep the kernel on disk.)"""
    compiled = scalar(function)

    @wraps(function)
    def stub(x, y, frame):
        pass

    overload(stub)(lambda x, y, frame: lambda x, y, frame: compiled(x, y, frame))
    return stub


@term
def change_term(x, y, frame):
    """q - p: its sum over a row would be 0 if the frame were exact. The slope of KL(p || q) by y."""
    larger, up, _, a, e = parts(x, y, frame)
    w = fall(a, e)
    return larger, select(up, w, -w)


@term
def kl_term(x, y, frame):
    """q - p - p d, never negative; the sum is KL(p || q). For a = inf and p > 0 it is inf, though p may underflow."""
    larger, up, _, a, e = parts(x, y, frame)
    down_gap, up_gap = gaps(a, e)
    certain = select(a < number(a, np.inf), larger, number(a, 1.0))
    return select(up, larger, certain), select(up, up_gap, down_gap)


@term
def reverse_term(x, y, frame):
    """p - q + q d: as kl_term for KL(q || p)."""
    larger, up, _, a, e = parts(x, y, frame)
    down_gap, up_gap = gaps(a, e)
    certain = select(a < number(a, np.inf), larger, number(a, 1.0))
    return select(up, certain, larger), select(up, down_gap, up_gap)


@term
def js_term(x, y, frame):
    """(p log(p / m) + q log(q / m)) / 2, never negative."""
    larger, _, _, a, e = parts(x, y, frame)
    t, one = a * a, number(a, 1.0)
    logs = number(a, LN2) - log1p_small(e)
    far = number(a, 0.5) * fma(at_least(-a, number(a, -1000.0)), e, (one + e) * logs)
    return larger, select(a < number(a, NEAR), (one + e) * (t * js_curve(t)), far)


@term
def kl_slope(x, y, frame):
    """p and -d: less the mean of -d by p, the slope of KL(p || q) by x."""
    larger, up, d, _, e = parts(x, y, frame)
    p = larger * select(up, e, number(e, 1.0))
    zero = number(e, 0.0)
    return p, select(p > zero, -d, zero)


@term
def js_slope(x, y, frame):
    """p and log(p / m) / 2: less its mean by p, the slope of the divergence by x."""
    larger, up, d, a, e = parts(x, y, frame)
    p = larger * select(up, e, number(e, 1.0))
    zero = number(e, 0.0)
    return p, select(p > zero, number(e, 0.5) * log_share(d, a, e), zero)


@term
def js_reverse_slope(x, y, frame):
    """q and log(q / m) / 2: js_slope for y."""
    larger, up, d, a, e = parts(x, y, frame)
    q = larger * select(up, number(e, 1.0), e)
    zero = number(e, 0.0)
    return q, select(q > zero, number(e, 0.5) * log_share(-d, a, e), zero)


@scalar
def slope_of(factor, value, mean, scale):
    """An entry of a gradient; never -0."""
    g = factor * (value - mean) * scale
    zero = number(mean, 0.0)
    return select(g == zero, zero, g)


# -- rows --------------------------------------------------------------------------------------------------------


@scalar
def settled(total, change, curvature, high):
    """A divergence from the sum of its terms. If the difference of the two sums in the frame is off by z, the sum of
    changes is z and the divergence curvature * z^2 too large. NaN for rows without a softmax."""
    value = at_least(fma(-curvature * change, change, total), 0.0)
    return select(abs(high) < number(high, np.inf), value, np.nan)


@scalar
def settled_js(total, change, high):
    """The Jensen-Shannon divergence, at most ln 2. (min() of floats would take ln 2 of NaN too on CUDA.)"""
    value = settled(total, change, 0.125, high)
    return select(value > LN2, LN2, value)


@scalar
def slope_scale(scale, mean, high):
    """The factor of a row of slopes: NaN for rows without a softmax, or where the divergence is infinite."""
    defined = select(abs(high) < number(high, np.inf), abs(mean) < np.inf, False)
    return number(high, select(defined, scale, np.nan))
