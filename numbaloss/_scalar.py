"""The mathematics: scalars in, scalars out, compiled for the CPU and for CUDA alike.

Every multiply-add is an explicit ``fma`` and no expression is left for a compiler to contract or reorder, so both
targets round alike. The numbers are defined in docs/NUMERICS.md; constants without a source here are minimax fits.
"""

import numpy as np
from numba import njit

from ._intrinsics import (
    add_low_bits,
    at_least,
    bits_float,
    float_bits,
    fma,
    low_bits_exponent,
    rounded_product,
    select,
)

CHUNK = 8192  # classes summed before the sum goes to float64
LANES = 1024  # class j of a chunk belongs to lane j mod LANES

f32, f64 = np.float32, np.float64

LOG2E = f32(1.4426950408889634)
LOG2E_LO = f32(1.4426950408889634 - float(LOG2E))
INV_LOG2E = 0.69314718981329267  # 1 / float(LOG2E), not ln 2
INV_LOG2E_32 = f32(INV_LOG2E)
MAGIC = f32(1.5 * 2**23)  # adding it rounds to an integer, which lands in the low bits of the sum
BIAS = f32(127)
ONE, HALF, ZERO = f32(1), f32(0.5), f32(0)
INF = f32(np.inf)
EXP_LIMIT = f32(2**20 * 1.4426950408889634)  # |x| log2(e) beyond this: subtract the maximum first
HEADROOM = f32(100)  # a chunk's exponents may exceed its reference by this much before a sum could overflow

LOG2E_64 = 1.4426950408889634
LOG2E_LO_64 = 2.0355273740931033e-17
MAGIC_64 = 1.5 * 2**52
BIAS_64 = 1023.0
LN2_HI = 0.6931467056274414  # 21 bits: times an exponent is exact
LN2_LO = 4.7493250390316726e-07
SQRT_HALF_BITS = np.int64(0x3FE6A09E667F3BCD)

# A division that could raise would keep a loop out of the vector lanes; nothing needs a C function.
scalar = njit(error_model="numpy", no_cfunc_wrapper=True)

# -- exponentials ------------------------------------------------------------------------------------------------


@scalar
def exp2_sum(f, scale):
    """scale * 2^f for |f| <= 0.5, one ulp; relative error of the polynomial 9.3e-8. For sums, where every multiply
    counts."""
    p = fma(f32(0.0013269407209008932) * scale, f, f32(0.009671294130384922) * scale)
    p = fma(p, f, f32(0.0555071122944355) * scale)
    p = fma(p, f, f32(0.24022246897220612) * scale)
    p = fma(p, f, f32(0.6931470036506653) * scale)
    return fma(p, f, scale)


@scalar
def exp2_32(f, scale):
    """scale * 2^f for |f| <= 0.5 and a power of two; relative error of the polynomial 3.0e-9."""
    p = fma(f32(0.00015326461289077997) * scale, f, f32(0.0013390806270763278) * scale)
    p = fma(p, f, f32(0.009618505835533142) * scale)
    p = fma(p, f, f32(0.05550359934568405) * scale)
    p = fma(p, f, f32(0.24022647738456726) * scale)
    p = fma(p, f, f32(0.6931471824645996) * scale)
    return fma(p, f, scale)


@scalar
def exp2_64(f):
    """2^f for |f| <= 0.5; relative error of the polynomial 2.0e-17."""
    p = fma(4.4549607416075015e-10, f, 7.072585952902488e-09)
    p = fma(p, f, 1.0178062445040239e-07)
    p = fma(p, f, 1.3215442587903525e-06)
    p = fma(p, f, 1.5252733829837681e-05)
    p = fma(p, f, 0.0001540353044173608)
    p = fma(p, f, 0.0013333558146416933)
    p = fma(p, f, 0.009618129107606888)
    p = fma(p, f, 0.0555041086648216)
    p = fma(p, f, 0.24022650695910097)
    p = fma(p, f, 0.6931471805599453)
    return fma(p, f, 1.0)


@scalar
def split_32(x, m, scale):
    """(scale * mantissa, exponent word) of exp(x): exp(x) = p * 2^n, t = m + n. Right to 0.6 ulp for |x| <= 2^20."""
    t = fma(x, LOG2E, m)
    n = t - m
    f = fma(x, LOG2E_LO, fma(x, LOG2E, -n))
    return exp2_32(f, scale), t


@scalar
def split_64(x, m):
    """(mantissa, exponent word) of exp(x) in float64."""
    t = fma(x, LOG2E_64, m)
    n = t - m
    f = fma(x, LOG2E_LO_64, fma(x, LOG2E_64, -n))
    return exp2_64(f), t


@scalar
def exp_64(x):
    """exp(x) for x <= 660, subnormal results included, 1 ulp; anything for NaN."""
    v = select(x > -753.4, x, -753.4)  # whose exponent field is 0
    p, t = split_64(select(v < 660.0, v, 660.0), MAGIC_64 + (BIAS_64 + 64.0))
    return p * low_bits_exponent(t) * 2.0**-64


@scalar
def exp_any(x):
    """exp(x): 1 ulp up to x = 660, 3 ulp beyond; infinite where that is too large; NaN for NaN."""
    half = exp_64(0.5 * x)
    return select(x <= 660.0, exp_64(x), select(x == x, half * half, x))


@scalar
def exp_short(x):
    """exp(x) for x <= 60, relative error 1.1e-10, 0 below -708.8: enough where the result becomes a float32."""
    m = MAGIC_64 + BIAS_64
    v = at_least(x, -709.1)  # whose exponent field is 0
    t = fma(v, LOG2E_64, m)
    f = fma(v, LOG2E_64, -(t - m))
    p = fma(1.5297323760701075e-05, f, 0.0001546144469856913)
    p = fma(p, f, 0.001333350238616277)
    p = fma(p, f, 0.009618056678524637)
    p = fma(p, f, 0.055504108839096185)
    p = fma(p, f, 0.24022650922288757)
    p = fma(p, f, 0.6931471805599453)
    return fma(p, f, 1.0) * low_bits_exponent(t)


# -- logarithms --------------------------------------------------------------------------------------------------


@scalar
def log_plus(v, c, full):
    """log(v + c) for a normal v > 0 and |c| <= ulp(v) / 2, which counts only for v < 2: 1 ulp, or 2.5e-11 if not full.

    `full` is a constant wherever this is compiled into a loop.
    """
    i = float_bits(v)
    e = (i - SQRT_HALF_BITS) >> np.int64(52)
    m = bits_float(i - (e << np.int64(52)))  # in [sqrt(1/2), sqrt(2))
    k = bits_float(e + np.int64(0x4338000000000000)) - MAGIC_64  # e as a float, without a conversion
    f = m - 1.0
    s = f / (2.0 + f)
    z = s * s
    if full:
        p = fma(0.14616449685043406, z, 0.15331721600556042)
        p = fma(p, z, 0.18182889125261723)
        p = fma(p, z, 0.2222221113479508)
        p = fma(p, z, 0.28571428625975487)
        p = fma(p, z, 0.39999999999899505)
        p = fma(p, z, 0.666666666666667)
    else:
        p = fma(0.23330467216303835, z, 0.28550820815960665)
        p = fma(p, z, 0.40000121839806124)
        p = fma(p, z, 0.6666666655449709)
    half_square = 0.5 * f * f
    tail = fma(s, fma(p, z, half_square), fma(k, LN2_LO, select(v < 2.0, c, 0.0)))
    return fma(k, LN2_HI, f - (half_square - tail))


@scalar
def log1p_64(u):
    """log(1 + u) for u >= 0, with full relative accuracy. +inf gives an undefined value, NaN NaN."""
    v = 1.0 + u
    return log_plus(v, u - (v - 1.0), True)


# -- rows --------------------------------------------------------------------------------------------------------


@scalar
def merge(s, c, s2, c2):
    """The sum of s * e^c and s2 * e^c2 as another such pair; an empty sum is (0, -inf), a NaN one (NaN, +inf)."""
    high = c if c >= c2 else c2
    low = c2 if c >= c2 else c
    a = s if c >= c2 else s2
    b = s2 if c >= c2 else s
    return (fma(b, exp_64(low - high), a) if b != 0.0 else a), high


@scalar
def others_to_target(s, c, x, full):
    """u = s * e^c / e^x, the others' sum beside a target whose logit is x; +inf if it is beyond e^60.

    `full` says, here and below, that the logits are float64; for others 1e-10 is enough.
    """
    a = c - x
    return select(a > 60.0, np.inf, s * (exp_64(a) if full else exp_short(a)))


@scalar
def target_loss(u, s, c, x, full):
    """log(1 + u), u from others_to_target; where that is +inf, log(s) + c - x."""
    far = u == np.inf
    v = select(far, s, 1.0 + u)
    loss = log_plus(v, select(far, 0.0, u - (v - 1.0)), full) + select(far, c - x, 0.0)
    loss = select(x == -np.inf, np.inf, loss)
    alone = select(x > -np.inf, 0.0, np.nan)
    loss = select(s == 0.0, alone, loss)
    return select(x < np.inf, select(s == s, loss, np.nan), np.nan)


@scalar
def target_lse(u, s, c, x, loss, full):
    """log of the sum over all classes, the target's x included."""
    return select(s == 0.0, x, select(u == np.inf, log_plus(s, 0.0, full) + c, x + loss))


@scalar
def top_of(c, x):
    """The exponent that is taken out of a sum of s * e^c and e^x."""
    return select(c >= x, c, x)


@scalar
def others_of(s, c, x):
    """s * e^c with the exponent top_of taken out."""
    return s * exp_64(c - top_of(c, x))


@scalar
def scale_of(s, c, x, scale):
    """scale over the sum of s * e^c and e^x, the exponent top_of taken out; NaN for a row without a softmax."""
    top = top_of(c, x)
    k = scale / fma(s, exp_64(c - top), exp_64(x - top))
    return select(s == s, select(abs(top) < np.inf, k, np.nan), np.nan)


@scalar
def dense_loss(distance, mass, log1p_u, largest, z_loss):
    """distance + mass log(1 + u) + z_loss lse^2, lse = largest + log(1 + u)."""
    lse = largest + log1p_u
    return fma(rounded_product(z_loss, lse), lse, fma(mass, log1p_u, distance))


@scalar
def dense_entry(mass, tilt, share, p, others):
    """(mass + tilt) p - share, where p = 1 - others, which is right relatively also where p is nearly 1."""
    return fma(tilt, p, fma(-mass, others, mass - share))


@scalar
def row_entropy(s, c, b, x, full):
    """Entropy in nats of a row whose largest logit is x: log(1 + u) + sum_j e^d_j (-d_j) / (1 + u), d_j = x_j - x.

    The other logits sum to s * e^c, and b is the sum of exp(x_j - c) * (x_j - c) over them. No term is negative.
    """
    u = others_to_target(s, c, x, full)
    entropy = target_loss(u, s, c, x, full) - fma(s, c - x, b) * exp_64(c - x) / (1.0 + u)
    return select(s == 0.0, 0.0, entropy)


@scalar
def merge_moments(s, c, b, s2, c2, b2):
    """merge for (s, c) with b as in row_entropy."""
    high = select(c >= c2, c, c2)
    w, w2 = exp_64(c - high), exp_64(c2 - high)
    first = select(s == 0.0, 0.0, rounded_product(fma(s, c - high, b), w))
    second = select(s2 == 0.0, 0.0, rounded_product(fma(s2, c2 - high, b2), w2))
    return fma(s, w, s2 * w2), high, first + second


# -- one logit, two classes --------------------------------------------------------------------------------------


@scalar
def exp_neg_32(a):
    """exp(-a) for a >= 0, subnormal results included; NaN for NaN."""
    p, t = split_32(at_least(-a, f32(-105)), MAGIC + (BIAS + f32(24)), f32(2**-24))
    return rounded_product(p, low_bits_exponent(t))


@scalar
def log1p_32(e):
    """log(1 + e) for 0 <= e <= 1: 2 ulp."""
    h = e - HALF
    p = fma(f32(0.00512227788567543), h, f32(-0.008495018817484379))
    p = fma(p, h, f32(0.011652885004878044))
    p = fma(p, h, f32(-0.020266389474272728))
    p = fma(p, h, f32(0.036620162427425385))
    p = fma(p, h, f32(-0.0677059218287468))
    p = fma(p, h, f32(0.13261018693447113))
    p = fma(p, h, f32(-0.28852689266204834))
    p = fma(p, h, f32(0.8109301924705505))
    return rounded_product(p, e)


@scalar
def exp_neg_64(a):
    """exp(-a) for a >= 0; NaN for NaN."""
    return select(a == a, exp_64(-a), a)


@scalar
def inverse_32(e):
    """1 / (1 + e) for 0 <= e <= 1, 2 ulp: Newton's steps in place of a division, which on CUDA may jump."""
    r = fma(fma(f32(0.3232332766056061), e, f32(-0.8080854415893555)), e, f32(0.9899002313613892))
    w = ONE + e
    r = fma(r, fma(-w, r, ONE), r)
    return fma(r, fma(-w, r, ONE), r)


@scalar
def inverse_64(e):
    """1 / (1 + e) for 0 <= e <= 1, 2 ulp."""
    r = fma(-0.10450538367517063, e, 0.4179720374811773)
    r = fma(r, e, -0.7705992119301591)
    r = fma(r, e, 0.9534275145839527)
    r = fma(r, e, -0.9962758631835416)
    r = fma(r, e, 0.9999489907875492)
    w = 1.0 + e
    r = fma(r, fma(-w, r, 1.0), r)
    return fma(r, fma(-w, r, 1.0), r)


@scalar
def tanh_32(v):
    """tanh(v), 1.3 eps; relative error of the polynomial 4.6e-9. NaN for NaN."""
    a, z = abs(v), v * v
    p = fma(f32(-0.005692329257726669), z, f32(0.020628182217478752))
    p = fma(p, z, f32(-0.05373651534318924))
    p = fma(p, z, f32(0.13331405818462372))
    p = fma(p, z, f32(-0.3333328068256378))
    e = exp_neg_32(a + a)
    far = fma(f32(-2) * e, inverse_32(e), ONE)
    return select(a < f32(0.625), fma(v * z, p, v), select(v < ZERO, -far, far))


@scalar
def tanh_64(v):
    """tanh(v), 1.3 eps; relative error of the polynomial 1.5e-17. NaN for NaN."""
    a, z = abs(v), v * v
    p = fma(-1.6086604801979197e-05, z, 7.71654058151583e-05)
    p = fma(p, z, -0.00022857631866666465)
    p = fma(p, z, 0.000586319668810716)
    p = fma(p, z, -0.0014549590959855566)
    p = fma(p, z, 0.0035919891066123573)
    p = fma(p, z, -0.008863220985443674)
    p = fma(p, z, 0.021869487574459622)
    p = fma(p, z, -0.053968253931194254)
    p = fma(p, z, 0.13333333333261932)
    p = fma(p, z, -0.33333333333332854)
    e = exp_neg_64(a + a)
    far = fma(-2.0 * e, inverse_64(e), 1.0)
    return select(a < 0.625, fma(v * z, p, v), select(v < 0.0, -far, far))


@scalar
def tanh_slope_32(v):
    """1 - tanh(v)^2 = 4 e^(-2 |v|) / (1 + e^(-2 |v|))^2, 3 eps."""
    e = exp_neg_32(abs(v) + abs(v))
    k = inverse_32(e)
    return f32(4) * e * k * k


@scalar
def tanh_slope_64(v):
    """As tanh_slope_32."""
    e = exp_neg_64(abs(v) + abs(v))
    k = inverse_64(e)
    return 4.0 * e * k * k


@scalar
def sigmoid_loss(x, z, one, log1p_exp):
    """max(x, 0) - x z + log(1 + exp(-|x|)), the last of which is given; a product of 0 with infinity is 0."""
    factor = select(x >= one - one, one - z, z)
    return select(factor == one - one, log1p_exp, fma(abs(x), factor, log1p_exp))


@scalar
def weighted_loss(x, z, q, one, log1p_exp):
    """q z softplus(-x) + (1 - z) softplus(x)."""
    positive, negative = q * z, one - z
    factor = select(x >= one - one, negative, positive)
    both = fma(q, z, negative) * log1p_exp
    return select(factor == one - one, both, fma(abs(x), factor, both))


@scalar
def focal_factors(loss, gamma):
    """(p, q, q^gamma) of p = exp(-loss), q = 1 - p, for a loss >= 0; NaN for NaN."""
    p = select(loss == loss, exp_64(-loss), loss)
    # of a small loss, 1 - p = (1 - p) * loss / -log(p), where the errors of both differences cancel
    q = 1.0 - p
    near = select(q > 0.0, q, 0.5)
    q = select(loss < 1.0, select(q > 0.0, near * (loss / -log_plus(1.0 - near, 0.0, True)), loss), q)
    power = exp_64(gamma * log_plus(select(q > 0.0, q, 1.0), 0.0, True))
    return p, q, select(q == 0.0, 0.0, select(q == q, power, q))


@scalar
def focal_row(loss, gamma):
    """(1 - p)^gamma loss, p = exp(-loss)."""
    _, _, power = focal_factors(loss, gamma)
    return select(power == 0.0, 0.0, power * loss)


@scalar
def focal_row_slope(loss, gamma):
    """d focal_row / d loss = q^gamma (1 + gamma p loss / q)."""
    p, q, power = focal_factors(loss, gamma)
    ratio = select(p == 0.0, 0.0, p * (loss / select(q == 0.0, 1.0, q)))
    return power * fma(gamma, ratio, 1.0)


@scalar
def binary_slope(x, negative, positive, one, e):
    """negative * sigmoid(x) - positive * sigmoid(-x), e = exp(-|x|): a fused step, which cannot cancel, over 1 + e."""
    right = x >= one - one
    return fma(select(right, -positive, negative), e, select(right, negative, -positive)) * (one / (one + e))


@scalar
def weighted_label_slope(x, q, one, log1p_exp):
    """q softplus(-x) - softplus(x); a product of 0 with infinity is 0."""
    zero = one - one
    far = select(x >= zero, -abs(x), select(q == zero, zero, q * abs(x)))
    return fma(q - one, log1p_exp, far)


@scalar
def weighted_pos_weight_slope(x, z, one, log1p_exp):
    """z softplus(-x); a product of 0 with infinity is 0."""
    zero = one - one
    return fma(z, log1p_exp, select(x >= zero, zero, select(z == zero, zero, z * abs(x))))


@scalar
def sigmoid_slope(one, e):
    """sigmoid(x) * sigmoid(-x)."""
    r = one / (one + e)
    return e * r * r


@scalar
def by_side(x, positive, negative, one):
    """(weight of the side that the logit is on, weight of the other)."""
    right = x >= one - one
    return select(right, positive, negative), select(right, negative, positive)


@scalar
def focal_sum(near, far, value_near, value_far, one):
    """near * value_near + far * value_far; a product of 0 with infinity is 0."""
    zero = one - one
    return fma(near, value_near, select(far == zero, zero, far * value_far))


@scalar
def focal_slopes(a, gamma, one, e, log1p_exp, near, far):
    """-f'(a) and -f'(-a), a >= 0 finite: -f'(s) = q^gamma (gamma p softplus(-s) + q), p = sigmoid(s), q = 1 - p; `near`
    and `far` are q^gamma. No sum of a and log1p_exp, a product, which CUDA's compiler would contract."""
    r = one / (one + e)
    k = gamma * (e * r)
    return near * fma(gamma * r, log1p_exp, e * r), far * fma(k, a, fma(k, log1p_exp, r))


@scalar
def focal_curvatures(a, gamma, one, e, log1p_exp, near, far):
    """f''(a) and f''(-a): f''(s) = q^gamma p (gamma softplus(-s) (gamma p - q) + q (2 gamma + 1))."""
    r = one / (one + e)
    small, twice = e * r, fma(gamma, one + one, one)
    k = gamma * fma(gamma, small, -r)
    return (
        near * r * fma(gamma * log1p_exp, fma(gamma, r, -small), small * twice),
        far * small * fma(k, a, fma(k, log1p_exp, r * twice)),
    )


@scalar
def without_sign(x, one):
    """x, and 0 for -0."""
    zero = one - one
    return select(x == zero, zero, x)


# -- terms of a sum ----------------------------------------------------------------------------------------------


@scalar
def frame_32(ref, bias):
    """(m, low) of terms 2^(x * LOG2E - ref): m + n holds n - ref + bias in its low bits, which is 0 for x = low."""
    return MAGIC + (bias - ref), (ref - bias) * INV_LOG2E_32


@scalar
def reference_32(largest):
    """(ref, shift) for a row with this largest logit: its exponent and 0 or, beyond 2^20, 0 and the logit itself."""
    n = exponent_32(largest)
    near = abs(n) <= EXP_LIMIT
    return select(near, n, ZERO), select(near, ZERO, largest)


@scalar
def power_32(x, low, m, scale):
    """(scale * p, power of two, exponent word t = m + n), p times the power being 2^(x * LOG2E - ref); (m, low) from
    frame_32(ref, BIAS). Exactly 0 where x lies under `low`. NaN stays NaN.
    """
    return clipped_power_32(at_least(x, low), m, scale)


@scalar
def clipped_power_32(x, m, scale):
    """power_32 of what lies under no `low`."""
    t = fma(x, LOG2E, m)
    f = fma(x, LOG2E, -(t - m))
    return exp2_sum(f, scale), low_bits_exponent(t), t


@scalar
def normal_product_32(x, m, scale):
    """The first two numbers of clipped_power_32 multiplied, where they and the product are normal; m is BIAS less."""
    t = fma(x, LOG2E, m)
    f = fma(x, LOG2E, -(t - m))
    return add_low_bits(exp2_sum(f, scale), t)


@scalar
def term_32(x, low, m, total):
    """total + 2^(x * LOG2E - ref), and its exponent word; see power_32."""
    return clipped_term_32(at_least(x, low), m, total)


@scalar
def clipped_term_32(x, m, total):
    """term_32 of what lies under no `low`."""
    p, power, t = clipped_power_32(x, m, ONE)
    return fma(p, power, total), t


@scalar
def term_64(x, low, m, total):
    """As term_32, with the exact base e."""
    p, t = split_64(at_least(x, low), m)
    return fma(p, low_bits_exponent(t), total), t


@scalar
def exponent_32(x):
    """The integer nearest to x * LOG2E, as a float32, for |x| <= 2^20; anything with a larger magnitude for others."""
    y = x * LOG2E
    return select(abs(y) < f32(2**21), fma(x, LOG2E, MAGIC) - MAGIC, y)


@scalar
def mantissa_exponent(x):
    """(x 2^-n, n) with a magnitude of 1.5 to 3 and an integer n as a float64, which stops at -1000 and 100."""
    e = ((float_bits(x) & np.int64(0x7FFFFFFFFFFFFFFF)) - np.int64(0x3FF8000000000000)) >> np.int64(52)
    k = bits_float(e + np.int64(0x4338000000000000)) - MAGIC_64
    n = select(k < 100.0, at_least(k, -1000.0), 100.0)
    return x * power_of_two(-n), n


@scalar
def power_of_two(n):
    """2^n for an integer -1022 <= n <= 1023 given as a float64; 0 below that."""
    k = n if n > -1023.0 else -1023.0
    return low_bits_exponent(k + (MAGIC_64 + BIAS_64))
